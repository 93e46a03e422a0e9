"""What decoding should cost: bytes moved over the machine's bandwidth, operations over its rate.

A decode step multiplies every weight with one row per sequence, and reads and writes every sequence's state once:

    seconds = max(weight bytes / bandwidth, 2 x weights x batch / rate) + 2 x batch x state bytes / bandwidth

Nothing else is counted, so a measured step takes longer; the ratio of two state sizes is what the model is for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ghostssm.checkpoint.description import Description
from ghostssm.ops.state_format import FLOAT32, StateFormat
from ghostssm.progress import stage

_BUFFER_BYTES = 256 << 20
_ROUNDS = 5


@dataclass(frozen=True)
class Machine:
    """How fast a machine is, as measured.

    Attributes:
        bandwidth: bytes per second, read or written, while a tensor is scaled in place.
        rates: batch size to floating-point operations per second of float32 products with a weight matrix.
    """

    bandwidth: float
    rates: dict[int, float]


def measure_machine(batches: Sequence[int], device: str = "cpu") -> Machine:
    """Measure bandwidth on a buffer beyond the caches, and the rate of a (batch, 1024) x (1024, 4096) product."""
    with stage("measuring the bandwidth of this machine"):
        buffer = torch.ones(_BUFFER_BYTES // 4, device=device)
        bandwidth = 2 * _BUFFER_BYTES / _median_seconds(lambda: buffer.mul_(1.0), device)
        weight = torch.randn(4096, 1024, device=device)
        rates = {}
        for batch in batches:
            rows = torch.randn(batch, 1024, device=device)
            seconds = _median_seconds(lambda rows=rows: torch.nn.functional.linear(rows, weight), device)  # type: ignore[misc]
            rates[batch] = 2 * weight.numel() * batch / seconds
    return Machine(bandwidth, rates)


def predicted_step_seconds(
    model: Description, machine: Machine, batch: int, state_size: int | None, form: StateFormat = FLOAT32
) -> float:
    """Seconds per decode step of a whole batch, with weights in float32."""
    weights = model.parameters - model.removed_parameters(state_size)
    multiply = max(4 * weights / machine.bandwidth, 2 * weights * batch / machine.rates[batch])
    return multiply + 2 * batch * model.state_bytes(state_size, form) / machine.bandwidth


def wait_for(device: torch.device | str) -> None:
    """Wait until the device has done what it was given, so that a clock can be read."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _median_seconds(run: Callable[[], object], device: str) -> float:
    seconds = []
    for _ in range(_ROUNDS + 1):
        wait_for(device)
        begun = time.perf_counter()
        run()
        wait_for(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])
