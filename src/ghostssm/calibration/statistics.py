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
from ghostssm.ops.energy import ChannelEnergies, channel_energies


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


def gather_statistics(mixer: Mixer, batches: Iterable[Streams], processes: Processes | None = None) -> LayerStatistics:
    """Statistics of a mixer whose streams arrive in batches, over those of all processes."""
    parts: list[tuple[ChannelEnergies, int]] = []
    with torch.inference_mode():
        for streams in batches:
            energies = channel_energies(streams.x, streams.dt, mixer.A, streams.B, streams.C)
            parts.append((energies, streams.dt.shape[0] * streams.dt.shape[1]))
    parts = (processes or Processes()).gather(parts)
    total = reduce(add, (energies for energies, _ in parts))
    tokens = sum(count for _, count in parts)
    return LayerStatistics(total.output / tokens, total.state / tokens, total.readout / tokens, tokens)
