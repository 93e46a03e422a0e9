"""Whole-model decoding on a GPU: what does a smaller state buy, from which batch on, and how many sequences fit?

    python benchmarks/gpu_model_decode.py
    python benchmarks/gpu_model_decode.py --models 1.3b --batch 1 128
    python benchmarks/gpu_model_decode.py --mamba-ssm FOLDER  # FOLDER has mamba_ssm/ops/triton
    TRITON_INTERPRET=1 python benchmarks/gpu_model_decode.py --dry-run

Models of published sizes with random weights in bfloat16. A step is one token for every sequence of the batch, greedy,
as one CUDA graph: transformers' own forward pass in PyTorch, the same with mamba_ssm's kernel where its sources are
given, ours on the same weights, and ours with states of N' channels. The largest batch in 80 GB follows from the bytes
of weights, states and a step's working memory; a step at that batch then runs under a limit of 80 GB.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_common import (
    SHAPES,
    TINY,
    Shape,
    attempt,
    captured,
    device_of,
    failed,
    mamba_ssm_kernel,
    medians,
    parser,
    report,
    say,
    seconds_by_side,
)
from transformers import PreTrainedModel
from transformers.models.mamba2 import modeling_mamba2

import ghostssm
from ghostssm.evaluation.speed import first_channels
from ghostssm.models.families import mixers_of

_LIMIT_BYTES = 80 * 10**9
_PAYS = 1.05
"""A smaller state pays where tokens per second rise by this factor."""
_SHARE_OF_FREE = 0.7
"""Of the free memory: if the states of all sides take no more, all are kept at once, and the sides take turns."""


@dataclass(frozen=True)
class Row:
    """One side at one batch; seconds is the median of a step, None where the batch did not fit in memory or failed."""

    model: str
    side: str
    state_size: int
    batch: int
    seconds: float | None
    tokens_per_second: float | None
    times_dense: float | None
    state_bytes_per_sequence: int


@dataclass(frozen=True)
class Capacity:
    """batch: the largest that should fit. fitted: whether a step at this batch did; None where it was not tried."""

    model: str
    state_size: int
    weight_bytes: int
    bytes_per_sequence: int
    batch: int
    fitted: bool | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Side:
    """A model, and what runs it.

    Attributes:
        own: its mixers run ours, otherwise transformers'.
        kernel: mamba_ssm's, in place of the PyTorch code that transformers has for a step of the recurrence.
    """

    name: str
    model: PreTrainedModel
    own: bool
    state_size: int
    kernel: Callable[..., torch.Tensor] | None = None

    def begun(self, batch: int, state_dtype: torch.dtype) -> Callable[[], object]:
        """A decode step on a cache of its own, which a prompt of two tokens has filled."""
        if self.own:
            ghostssm.accelerate(self.model, state_dtype=state_dtype)
        else:
            ghostssm.restore(self.model)
        device, vocabulary = self.model.device, self.model.config.vocab_size
        ids = torch.randint(0, vocabulary, (batch, 2), device=device)
        output: Any = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token, cache = output.logits.argmax(-1), output.cache_params

        def step() -> None:
            logits = self.model(input_ids=token, cache_params=cache, use_cache=True).logits
            token.copy_(logits.argmax(-1))

        before = modeling_mamba2.mamba2_selective_state_update
        if self.kernel is not None:
            modeling_mamba2.mamba2_selective_state_update = self.kernel
        try:
            return captured(step, device.type)
        finally:
            modeling_mamba2.mamba2_selective_state_update = before

    def bytes_per_sequence(self, state_dtype: torch.dtype) -> int:
        """Of the recurrent states and the convolutions' windows of all layers; transformers' states are float32."""
        numbers = [mixer.layout for mixer in mixers_of(self.model)]
        state, window = (
            sum(getattr(part, name) for part in numbers) for name in ("state_numbers", "conv_state_numbers")
        )
        return state * (state_dtype if self.own else torch.float32).itemsize + window * self.model.dtype.itemsize


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    options.add_argument("--state-size", type=int, nargs="+", default=[64, 32, 16])
    options.add_argument("--state-dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--mamba-ssm", type=Path, help="a folder with mamba_ssm's sources")
    args = options.parse_args()
    device = device_of(args)
    shapes: dict[str, Shape] = {"tiny": TINY} if args.dry_run else {name: SHAPES[name] for name in args.models}
    if args.dry_run:
        args.batch, args.state_size, args.rounds = [1, 2], [8], 1
    dtype = getattr(torch, args.state_dtype)

    kernel = mamba_ssm_kernel(args.mamba_ssm) if args.mamba_ssm else None
    rows: list[Row] = []
    capacities: list[Capacity] = []
    failures: list[str] = []
    for name, shape in shapes.items():
        sides = sides_of(shape, args.state_size, kernel, device)
        for batch in args.batch:
            seconds = step_seconds(name, sides, batch, dtype, args.rounds, device, failures)
            dense = seconds.get("ours, dense")
            for side in sides:
                taken = seconds.get(side.name)
                speed = None if taken is None else batch / taken
                times = None if taken is None or dense is None else dense / taken
                rows.append(
                    Row(name, side.name, side.state_size, batch, taken, speed, times, side.bytes_per_sequence(dtype))
                )
                say(line(rows[-1]))
        for side in sides:
            if side.own:
                with attempt(f"{name}, {side.name}, largest batch", failures):
                    capacities.append(capacity(name, side, dtype, device))
                    say(capacity_line(capacities[-1]))
        del sides
        _free(device)
    more = {"capacities": [vars(part) for part in capacities]}
    report(args, device, rows, failures, lambda: table(rows, capacities), **more)


def sides_of(
    shape: Shape, state_sizes: list[int], kernel: Callable[..., torch.Tensor] | None, device: str
) -> list[Side]:
    dense = shape.model(device, torch.bfloat16)
    sides = [Side("transformers", dense, False, shape.state), Side("ours, dense", dense, True, shape.state)]
    if kernel is not None:
        sides.insert(1, Side("with mamba_ssm's", dense, False, shape.state, kernel))
    for size in state_sizes:
        smaller = ghostssm.apply_plan(copy.deepcopy(dense), first_channels(dense, size))
        sides.append(Side(f"ours, N' = {size}", smaller, True, size))
    return sides


def step_seconds(
    model: str,
    sides: list[Side],
    batch: int,
    dtype: torch.dtype,
    rounds: int,
    device: str,
    failures: list[str],
) -> dict[str, float]:
    """Median seconds of a step, by side; without the sides that do not fit in memory even alone, or fail."""
    wanted = sum(batch * side.bytes_per_sequence(torch.float32) for side in sides)
    together = device != "cuda" or wanted < _SHARE_OF_FREE * torch.cuda.mem_get_info()[0]
    left = [sides] if together else [[side] for side in sides]
    seconds: dict[str, float] = {}
    while left:
        group = left.pop(0)
        try:
            steps = {side.name: side.begun(batch, dtype) for side in group}
            seconds |= medians(seconds_by_side(steps, rounds, device))
        except Exception as error:
            if len(group) > 1:  # each alone then: it is for want of memory, or one of them fails
                left = [[side] for side in group]
            elif not isinstance(error, torch.cuda.OutOfMemoryError):
                failed(f"{model}, batch {batch}, {group[0].name}", error, failures)
        steps = {}
        _free(device)
    return seconds


def capacity(name: str, side: Side, dtype: torch.dtype, device: str) -> Capacity:
    """The largest batch in 80 GB. What a step needs besides states is measured at a small batch, and grows with it."""
    weights, per_sequence = side.model.get_memory_footprint(), side.bytes_per_sequence(dtype)
    if device != "cuda":
        return Capacity(
            name, side.state_size, weights, per_sequence, (_LIMIT_BYTES - weights) // per_sequence, None, None
        )
    small = 64
    peak, held = _peak(side, small, dtype)
    working = max(0, peak - held - small * per_sequence) // small
    batch = (_LIMIT_BYTES - weights) // (per_sequence + working)
    others = held - weights  # what other sides keep is no part of this one
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (_LIMIT_BYTES + others) / total))
    try:
        peak, _ = _peak(side, batch, dtype)
        return Capacity(name, side.state_size, weights, per_sequence, batch, True, peak - others)
    except torch.cuda.OutOfMemoryError:
        return Capacity(name, side.state_size, weights, per_sequence, batch, False, None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        _free(device)


def _peak(side: Side, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """Peak bytes while a batch is begun and decodes a token, and the bytes that were held before."""
    _free("cuda")
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ghostssm.accelerate(side.model, state_dtype=dtype)
    token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    output: Any = side.model(input_ids=token, use_cache=True)
    cache = output.cache_params
    del output
    side.model(input_ids=token, cache_params=cache, use_cache=True)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), held


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def table(rows: list[Row], capacities: list[Capacity]) -> None:
    print("model  batch  side                  ms per step     tokens/s  times dense  state MB per sequence")
    for row in rows:
        print(line(row))
    print(f"\nsmallest batch at which a state of N' gives {_PAYS:.2f} times the tokens of the dense one")
    for model, size in dict.fromkeys((row.model, row.state_size) for row in rows if row.side.startswith("ours, N'")):
        paying = [
            row.batch
            for row in rows
            if (row.model, row.state_size) == (model, size) and row.times_dense and row.times_dense >= _PAYS
        ]
        print(f"{model:6} N' = {size:<4} {min(paying) if paying else 'none of these'}")
    print("\nmodel     N  largest batch in 80 GB  a step at this batch")
    for part in capacities:
        print(capacity_line(part))


def line(row: Row) -> str:
    numbers = "     no result"
    if row.seconds is not None and row.tokens_per_second is not None:
        times = "" if row.times_dense is None else f"{row.times_dense:.2f}"
        numbers = f"{row.seconds * 1e3:13.3f}{row.tokens_per_second:13,.0f}{times:>13}"
    return f"{row.model:6}{row.batch:6}  {row.side:20}{numbers}{row.state_bytes_per_sequence / 1e6:23.2f}"


def capacity_line(part: Capacity) -> str:
    tried = {None: "not tried", True: "fits", False: "DOES NOT FIT"}[part.fitted]
    peak = "" if part.peak_bytes is None else f", peak {part.peak_bytes / 1e9:.1f} GB"
    return f"{part.model:6}{part.state_size:5}{part.batch:24}  {tried}{peak}"


if __name__ == "__main__":
    with torch.inference_mode():
        main()
