"""Measure how fast a model prefills and decodes with smaller states on this machine, beside what is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ghostssm.checkpoint.description import Description, describe
from ghostssm.checkpoint.loading import load
from ghostssm.errors import InputError
from ghostssm.evaluation.roofline import Machine, measure_machine, predicted_step_seconds
from ghostssm.evaluation.speed import Rate, Speedup, first_channels, measure
from ghostssm.models.layout import check_state_size
from ghostssm.ops.state_format import FLOAT32, StateStorage
from ghostssm.progress import Notify, Progress, silent, unheard
from ghostssm.workflows.inputs import tell_idle_gpu
from ghostssm.workflows.request_checks import check_request
from ghostssm.workflows.requests import BenchRequest
from ghostssm.workflows.state_size import check_dtypes

ROUNDS = 5
"""Where nothing differs, all rounds agree by chance one time in 16; of three rounds it would be one time in four."""


@dataclass(frozen=True)
class BenchRow:
    """One state size and dtype at one batch size; tokens per second are over all sequences together.

    Attributes:
        speedup: times faster than the whole state in float32 decodes; predicted_speedup: by bandwidth and arithmetic.
    """

    batch: int
    state_size: int
    state_bytes: int
    prefill: Rate
    decode: Rate
    predicted_tokens_per_second: float
    peak_memory_bytes: int
    speedup: Speedup
    predicted_speedup: float
    state_dtype: str = "float32"

    def as_json(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name not in ("prefill", "decode", "speedup")}
        for name, rate in (("prefill", self.prefill), ("decode", self.decode)):
            values |= {f"{name}_tokens_per_second": rate.median, f"{name}_range": [rate.low, rate.high]}
        return values | {"speedup": self.speedup.median, "speedup_range": [self.speedup.low, self.speedup.high]}


@dataclass(frozen=True)
class BenchOutcome:
    """What `bench` measured.

    Attributes:
        machine: what the machine does: bandwidth and arithmetic.
        state_size: that of the whole state; the widest layer's, if it differs between layers.
        rows: by batch size, the whole state in float32 first.
        is_stock: whether smaller states were measured too; our own class is measured as it is.
    """

    machine: Machine
    state_size: int
    rows: tuple[BenchRow, ...]
    is_stock: bool

    def as_json(self) -> dict[str, Any]:
        return {**vars(self.machine), "rows": [row.as_json() for row in self.rows]}


def bench(request: BenchRequest, *, progress: Progress = silent, notify: Notify = unheard) -> BenchOutcome:
    """Measure prefill and decode at several state sizes, in float32: what ``ghostssm bench`` does, in one call.

    Args:
        request: the model, the sizes and the batches.
        progress: told how far the work is.
        notify: told what a person should know, in sentences.

    Raises:
        InputError: a fault of the request or of what it names, found before anything is loaded where it can be.
    """
    batches, prompt = request.batches, request.prompt_length
    check_request(request)
    described = describe(request.model)
    sizes, dtypes = _sizes(request, described), [FLOAT32.name, *request.state_dtypes]
    if not described.tiers:
        check_dtypes(dtypes)
    storages = {
        name: StateStorage.of(name, request.state_rounding if name != FLOAT32.name else "nearest") for name in dtypes
    }
    tell_idle_gpu(notify, request.device)
    model = load(request.model, dtype=torch.float32, device=request.device).model
    machine = measure_machine(batches, request.device)
    plans, kept = {}, {}
    for size in sizes:
        for name, storage in storages.items():
            plans[size, name], kept[size, name] = first_channels(model, size) if size else None, storage
    timings = measure(model, plans, batches, prompt, progress, ROUNDS, kept)
    widest, whole = max(described.state_sizes), (sizes[0], FLOAT32.name)

    def row(batch: int, key: tuple[int | None, str]) -> BenchRow:
        timing, form, size = timings[key, batch], kept[key].format, key[0]
        state_bytes = described.state_bytes(size, form)
        predicted = predicted_step_seconds(described, machine, batch, size, form)
        return BenchRow(
            batch=batch,
            state_size=size or widest,
            state_bytes=batch * state_bytes,
            prefill=timing.prefill(batch * prompt),
            decode=timing.decode(batch),
            predicted_tokens_per_second=batch / predicted,
            peak_memory_bytes=timing.peak_bytes,
            speedup=Speedup.of(timings[whole, batch], timing),
            predicted_speedup=predicted_step_seconds(described, machine, batch, sizes[0]) / predicted,
            state_dtype=form.name,
        )

    rows = tuple(row(batch, key) for batch in batches for key in plans)
    return BenchOutcome(machine, widest, rows, described.is_stock)


def _sizes(request: BenchRequest, described: Description) -> list[int | None]:
    """That are measured, the model's own first; None for a model that can only be measured as it is."""
    if not described.is_stock:
        if request.state_sizes:
            raise InputError(
                f"{request.model} has a projected state or a state size per layer, which can't be cut. Leave "
                "--state-size out, to measure it as it is, or name the model that it was made of."
            )
        return [None]
    dense = described.layout.state_size
    smaller = request.state_sizes or tuple(size for size in (dense // 2, dense // 4) if size)
    for size in smaller:
        check_state_size(size, dense)
    return [dense, *smaller]
