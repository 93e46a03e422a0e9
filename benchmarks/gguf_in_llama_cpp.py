"""Pruned models in llama.cpp: agreement with transformers, and decode speed at several state sizes.

    python benchmarks/gguf_in_llama_cpp.py                     logits, the built-in model
    python benchmarks/gguf_in_llama_cpp.py --speed             decode speed, random weights of mamba2-130m's sizes

Needs llama-cpp-python and gguf; it builds llama.cpp when it is installed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from interleaved import model_130m, print_machine, seconds_by_side
from llama_engine import Llama

import ghostssm

PROMPTS = (
    "def main(argv):\n    return",
    "import os\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n",
    '"""Utilities for reading text files, one line after the other."""\n\nfrom __future__ import annotations\n',
)
FORMATS = ("f32", "f16", "bf16", "q8_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="measure decode speed instead of logits")
    parser.add_argument("--state-size", type=int, nargs="+", default=[128, 64, 32])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", choices=FORMATS, default="q8_0", help="of the weights, for --speed")
    parser.add_argument("--layers", type=int, default=24, help="for --speed")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=8, help="decode steps per round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="not wall time: for one thread on a busy machine")
    args = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        if args.speed:
            compare_speed(Path(folder), args)
        else:
            compare_logits(Path(folder), args.state_size)


def compare_logits(folder: Path, state_sizes: list[int]) -> None:
    """The largest difference of any logit, over all prompts and positions, to transformers in float32."""
    print(
        f"{'N':>4} {'file':6}{'padded':>8}{'largest |logit|':>17}{'prefill':>12}{'token by token':>16}{'same best':>11}"
    )
    for size in state_sizes:
        model = ghostssm.load("reference", dtype=torch.float32)
        tokenizer = model.require_tokenizer()
        if size < 128:
            text = ghostssm.read_text("stdlib", "calibration")
            windows = ghostssm.cut_windows(text, tokenizer, 512, 8, seed=42)
            ghostssm.apply_plan(model.model, ghostssm.Calibration(model.model, windows).plan("ghost", size))
        prompts = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in PROMPTS]
        with torch.inference_mode():
            expected = [model.model(torch.tensor([ids])).logits[0] for ids in prompts]
        cases = [(name, None) for name in FORMATS] + ([("f32", 128)] if size < 128 else [])
        for name, padded in cases:
            if padded:
                ghostssm.pad_state(model.model, padded)
            path = ghostssm.export_gguf(model, folder / "model.gguf", dtype=name, overwrite=True).path
            with Llama(path) as llama:
                pairs = [(llama.prefill(ids), llama.token_by_token(ids)) for ids in prompts]
            prefill = max(float((pair[0] - logits).abs().max()) for pair, logits in zip(pairs, expected, strict=True))
            steps = max(float((pair[1] - logits).abs().max()) for pair, logits in zip(pairs, expected, strict=True))
            best = torch.cat([pair[0].argmax(-1) == x.argmax(-1) for pair, x in zip(pairs, expected, strict=True)])
            largest = max(float(logits.abs().max()) for logits in expected)
            print(
                f"{size:4} {name:6}{padded or '':>8}{largest:17.1f}{prefill:12.1e}{steps:16.1e}"
                f"{int(best.sum()):7}/{len(best)}"
            )


def compare_speed(folder: Path, args: argparse.Namespace) -> None:
    """Decode steps of a batch of sequences; the state sizes take turns."""
    paths = {}
    for size in args.state_size:
        model = model_130m(size, layers=args.layers)
        source = ghostssm.find_source("reference")
        checkpoint = ghostssm.Checkpoint(model, None, source)
        path = folder / f"{size}.gguf"
        paths[size] = ghostssm.export_gguf(checkpoint, path, dtype=args.dtype, with_tokenizer=False).path
    print(f"mamba2-130m's sizes, {args.layers} layers, {args.dtype} weights, float32 state, {args.threads} threads")
    print(f"{'batch':>5}{'N':>5}{'ms per step':>13}{'min':>9}{'max':>9}{'tokens/s':>10}{'times faster':>14}")
    for batch in args.batch:
        engines = {size: Llama(path, sequences=batch, threads=args.threads) for size, path in paths.items()}
        position = dict.fromkeys(engines, 0)

        def decode(size: int, batch: int, engines: dict[int, Llama], position: dict[int, int]) -> None:
            for _ in range(args.tokens):
                engines[size].decode([7] * batch, [position[size]] * batch, range(batch))
                position[size] += 1

        sides = {str(size): lambda size=size: decode(size, batch, engines, position) for size in engines}  # noqa: B023
        clock = time.process_time if args.cpu_time else time.perf_counter
        seconds = seconds_by_side(sides, args.rounds, warmup=2, clock=clock)
        steps = {name: [time / args.tokens for time in times] for name, times in seconds.items()}
        base = statistics.median(steps[str(args.state_size[0])])
        for name, times in steps.items():
            median = statistics.median(times)
            cells = f"{median * 1e3:13.2f}{min(times) * 1e3:9.2f}{max(times) * 1e3:9.2f}"
            print(f"{batch:5}{name:>5}{cells}{batch / median:10.0f}{base / median:14.2f}", flush=True)
        for engine in engines.values():
            engine.__exit__()


if __name__ == "__main__":
    main()
