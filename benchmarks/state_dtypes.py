"""What a narrower state costs: the loss of a state that is rounded after every token, and how its error grows.

    python benchmarks/state_dtypes.py
    python benchmarks/state_dtypes.py --windows 0 --long 16384

The first table has paired differences to the float32 state on the same windows; the second the same on one sequence of
16,384 tokens, by the stretch of it.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
from interleaved import print_machine

import ghostssm
from ghostssm.evaluation.perplexity import Evaluation, evaluate, token_losses
from ghostssm.models.families import layout_of, mixers_of
from ghostssm.ops.state_format import FORMATS, StateStorage
from ghostssm.text.windows import Windows

STRETCHES = (0, 1024, 2048, 4096, 8192, 16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--long", type=int, default=16384, help="tokens of the one long sequence; 0 for none")
    args = parser.parse_args()

    print_machine()
    checkpoint = ghostssm.load(args.model, dtype=torch.float32)
    text = ghostssm.read_text(args.text, "evaluation")
    storages = [
        StateStorage.of(form, rounding)
        for form in FORMATS.values()
        if form.name != "float32"
        for rounding in ("nearest", "stochastic")
    ]
    if args.windows:
        cut = ghostssm.cut_windows(text, checkpoint.require_tokenizer(), args.window_length, args.windows)
        print_losses(checkpoint.model, cut, storages)
    if args.long:
        cut = ghostssm.cut_windows(text, checkpoint.require_tokenizer(), args.long, 1)
        print_growth(checkpoint.model, cut, storages)


def print_losses(model: torch.nn.Module, windows: Windows, storages: list[StateStorage]) -> None:
    """Bytes per sequence and excess loss of every format and rounding."""
    layout, layers = layout_of(model.config), len(mixers_of(model))
    whole = evaluate(model, windows)
    print(f"{len(windows)} windows of {windows.length} tokens; float32: {whole.loss:.5f} nats per token")
    for storage in storages:
        found = evaluate(model, windows, storage=storage).excess_over(whole)
        size = layers * storage.format.state_bytes(layout.intermediate_size, layout.state_size)
        print(
            f"{named(storage)}{size:10,} bytes per sequence {found.mean:+10.5f} +- {found.standard_error:.5f}",
            flush=True,
        )


def print_growth(model: torch.nn.Module, windows: Windows, storages: list[StateStorage]) -> None:
    """Excess loss by the stretch of one long sequence; its standard error is over blocks of 64 tokens."""
    whole = token_losses(model, windows)[0]
    stretches = [(a, b) for a, b in pairwise(STRETCHES) if a < windows.length]
    print("one sequence, tokens   " + "".join(f"{f'{a}-{min(b, windows.length)}':>24}" for a, b in stretches))
    for storage in storages:
        excess = token_losses(model, windows, storage=storage)[0] - whole
        cells = []
        for a, b in stretches:
            blocks = torch.stack([each.double().mean() for each in excess[a:b].split(64)])
            error = Evaluation(blocks, 1.0).standard_error
            cells.append(f"{blocks.mean().item():+.5f} +- {error:.5f}")
        print(named(storage) + "".join(f"{cell:>24}" for cell in cells), flush=True)


def named(storage: StateStorage) -> str:
    return f"{storage.format.name:9}{'stochastic' if storage.stochastic else 'nearest':11}"


if __name__ == "__main__":
    main()
