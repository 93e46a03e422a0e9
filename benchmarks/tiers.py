"""Tiers of bits against one dtype for the whole state, at the same bytes per sequence.

    python benchmarks/tiers.py
    python benchmarks/tiers.py MODEL --calibration TEXT --text OTHER_TEXT --shares 8 16

At each share of the dense float32 state one dtype takes the largest N' that fits, scales included; tiers are those that
`prune --state-bytes` makes. All share the calibration windows, and states are rounded after every token.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch
from interleaved import print_machine

import ghostssm
from ghostssm.evaluation.perplexity import evaluate
from ghostssm.models.families import layout_of, mixers_of
from ghostssm.ops.state_format import FLOAT32, TIERS, StateStorage
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.pruning import tiers
from ghostssm.pruning.run import Calibration
from ghostssm.pruning.search import widest_fit
from ghostssm.units import plus_minus

RECIPE = "balanced+per-layer"


@dataclass(frozen=True)
class Choice:
    """One way to keep the state within a bound."""

    size: int
    plan: Plan
    storage: StateStorage


class Bounds:
    """A model with what all choices share."""

    def __init__(self, args: argparse.Namespace):
        checkpoint = ghostssm.load(args.model, dtype=torch.float32)
        self.model, vocabulary = checkpoint.model, checkpoint.require_tokenizer()
        calibration = ghostssm.read_text(args.calibration, "calibration")
        self.calibration = Calibration(
            self.model, ghostssm.cut_windows(calibration, vocabulary, args.calibration_length, args.windows, seed=42)
        )
        text = ghostssm.read_text(args.text, "evaluation")
        self.text = ghostssm.evaluation_windows(text, vocabulary, args.window_length, args.text_windows)
        self.layout, self.dtypes = layout_of(self.model.config), args.dtypes
        self.rows = len(mixers_of(self.model)) * self.layout.intermediate_size
        self.bytes = self.rows * FLOAT32.row_bytes(self.layout.state_size)
        self.dense = evaluate(self.model, self.text)

    @cache  # noqa: B019  (there is one of these per run)
    def plan(self, size: int) -> Plan:
        return self.calibration.plan(RECIPE, size, progress=None)

    def choices(self, share: Fraction) -> Iterator[Choice]:
        bound, limit = int(self.bytes * share), self.layout.state_size
        for dtype, size in widest_fit(bound / self.rows, range(1, limit + 1), self.dtypes).items():
            yield Choice(size, self.plan(size), StateStorage.of(dtype))
        size = tiers.widest_tiered(bound / self.rows, [*range(8, limit, 8), limit])
        if size is not None:
            divided = tiers.in_tiers(self.model, self.plan(size), self.calibration.windows, bound)
            for rounding in ("nearest", "stochastic"):
                yield Choice(size, divided, StateStorage.of(TIERS, rounding))

    def line(self, share: Fraction, choice: Choice) -> str:
        storage = choice.storage
        with pruned(self.model, choice.plan) as smaller:
            excess = evaluate(smaller, self.text, storage=storage).excess_over(self.dense)
        cells = [
            str(share),
            f"{choice.size}, {storage.format.name}, {'stochastic' if storage.stochastic else 'nearest'}",
            f"{choice.plan.state_bytes(self.layout, storage.format.name):,}",
            plus_minus(excess.mean, excess.standard_error),
        ]
        return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--windows", type=int, default=8, help="to calibrate on")
    parser.add_argument("--calibration-length", type=int, default=1024)
    parser.add_argument("--text-windows", type=int, default=24)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", default=["int8", "int4"])
    parser.add_argument("--shares", type=int, nargs="+", default=[8, 16, 32], help="parts of the dense state's bytes")
    args = parser.parse_args()

    print_machine()
    bounds = Bounds(args)
    print(f"{len(bounds.text)} windows of {bounds.text.length} tokens, dense loss {bounds.dense.loss:.5f}\n")
    print(
        "| bytes per sequence | N', dtype, rounding | of these taken | excess loss |\n|---|---|---:|---:|", flush=True
    )
    for share in args.shares:
        for choice in bounds.choices(Fraction(1, share)):
            print(bounds.line(Fraction(1, share), choice), flush=True)


if __name__ == "__main__":
    main()
