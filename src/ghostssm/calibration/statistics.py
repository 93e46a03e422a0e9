"""Statistics of one mixer over the calibration windows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ghostssm.calibration.processes import Processes
from ghostssm.models.mixer import Mixer, Streams
from ghostssm.ops.energy import channel_energies


@dataclass(frozen=True)
class LayerStatistics:
    """Means over the calibration tokens, float64, each (g, n).

    Attributes:
        output_energy: mean over t of C_t[n]^2 sum_(h in g, p) H_t[h, p, n]^2.
        state_energy: mean over t of sum_(h in g, p) H_t[h, p, n]^2, the diagonal of the controllability Gramian.
        readout_energy: mean over t of C_t[n]^2, the diagonal of the observability Gramian.
        tokens: how many tokens the means are over.
    """

    output_energy: Tensor
    state_energy: Tensor
    readout_energy: Tensor
    tokens: int


def gather_statistics(
    mixer: Mixer, batches: Iterable[Streams], count: int, processes: Processes | None = None
) -> LayerStatistics:
    """Statistics of a mixer whose streams arrive in batches, over those of all processes.

    Args:
        count: of this process's batches.
    """
    processes, layout, tokens = processes or Processes(), mixer.layout, 0
    # Room for all of them before the first: small tensors between large ones, if kept, leave holes in the heap.
    sums = torch.empty(count, 3, layout.n_groups, layout.state_size, dtype=torch.float64)
    with torch.inference_mode():
        for room, streams in zip(sums, batches, strict=True):
            energies = channel_energies(streams.x, streams.dt, mixer.A, streams.B, streams.C)
            room.copy_(torch.stack((energies.output, energies.state, energies.readout)))
            tokens += streams.dt.shape[0] * streams.dt.shape[1]
    total = reduce(add, processes.gather(list(sums)))
    tokens = sum(processes.gather([tokens]))
    output, state, readout = total / tokens
    return LayerStatistics(output, state, readout, tokens)
