"""What does pruning cost, next to one plain forward pass of transformers over the same tokens?

    python benchmarks/pruning.py

The model has the sizes of mamba2-130m and random weights. Memory is the growth of the process's peak while pruning.
"""

from __future__ import annotations

import argparse

import torch
from interleaved import model_130m, print_machine, print_sides, seconds_by_side

import ghostssm
from ghostssm.evaluation.speed import peak_bytes, reset_peak
from ghostssm.text.windows import Windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--window-length", type=int, default=2048)
    parser.add_argument("--state-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()

    print_machine()
    model = model_130m(layers=args.layers)
    ids = torch.randint(0, 50000, (args.windows, args.window_length), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids, "random", "", 1.0, None)

    def prune() -> None:
        ghostssm.Calibration(model, windows).plan("ghost", args.state_size)

    def forward(part: torch.nn.Module) -> None:
        with torch.inference_mode():
            for window in ids:
                part(window[None], use_cache=False)

    reset_peak(model.device)
    before = peak_bytes(model.device)
    prune()
    megabytes = (peak_bytes(model.device) - before) / 1e6
    print(f"{args.windows} x {args.window_length} tokens, peak memory above the model: {megabytes:.0f} MB")
    sides = {
        "transformers forward": lambda: forward(model),
        "transformers without logits": lambda: forward(model.backbone),
        "ghostssm prune": prune,
    }
    print_sides(seconds_by_side(sides, args.rounds, warmup=0), "transformers forward")


if __name__ == "__main__":
    main()
