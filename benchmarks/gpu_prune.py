"""What does GHOST's pruning cost on a GPU: seconds and peak memory, for models of published sizes with random weights?

    python benchmarks/gpu_prune.py
    TRITON_INTERPRET=1 python benchmarks/gpu_prune.py --dry-run

The published figures are about 8 minutes and 15 GB for mamba2-1.3b with 128 windows of 2048 tokens on an H100. The
first of two runs also compiles the kernels, unless triton's cache has them. Memory is what tensors take, the model
included.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from gpu_common import SHAPES, TINY, Shape, attempt, device_of, parser, report, say

import ghostssm
from ghostssm.evaluation.speed import peak_bytes, reset_peak
from ghostssm.text.windows import Windows


@dataclass(frozen=True)
class Row:
    model: str
    windows: int
    window_length: int
    model_bytes: int
    run: int
    seconds: float
    peak_bytes: int


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=SHAPES, default=["1.3b", "2.7b"])
    options.add_argument("--windows", type=int, default=128)
    options.add_argument("--window-length", type=int, default=2048)
    options.add_argument("--state-size", type=int, default=64)
    options.add_argument("--recipe", default="ghost")
    options.add_argument("--runs", type=int, default=2)
    args = options.parse_args()
    device = device_of(args)
    shapes: dict[str, Shape] = {"tiny": TINY} if args.dry_run else {name: SHAPES[name] for name in args.models}
    if args.dry_run:
        args.windows, args.window_length, args.state_size, args.runs = 2, 5, 8, 1

    rows: list[Row] = []
    failures: list[str] = []
    for name, shape in shapes.items():
        model = shape.model(device, torch.bfloat16)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, shape.vocabulary, (args.windows, args.window_length), generator=draw)
        windows = Windows(ids, "random", "", 1.0, None)
        with attempt(name, failures):
            for run in range(args.runs):
                if device == "cuda":
                    torch.cuda.empty_cache()
                reset_peak(model.device)
                begun = time.perf_counter()
                ghostssm.Calibration(model, windows).plan(args.recipe, args.state_size)  # ends with scores on the CPU
                seconds = time.perf_counter() - begun
                sizes = (args.windows, args.window_length, model.get_memory_footprint())
                rows.append(Row(name, *sizes, run + 1, seconds, peak_bytes(model.device)))
                say(line(rows[-1]))
        del model
    report(args, device, rows, failures, lambda: table(rows), recipe=args.recipe)


def table(rows: list[Row]) -> None:
    print("model  windows x tokens    run   seconds   peak memory   of it the model")
    for row in rows:
        print(line(row))


def line(row: Row) -> str:
    return (
        f"{row.model:7}{row.windows:7} x {row.window_length:<6}{row.run:6}{row.seconds:10.1f}"
        f"{row.peak_bytes / 1e9:11.2f} GB{row.model_bytes / 1e9:15.2f} GB"
    )


if __name__ == "__main__":
    main()
