"""The recurrence at sampled tokens, seen from the block's output.

At one token, what state channel n of group g adds to the mixer's output is

    C[g, n] * M[g, :, n],      M[g] = P W diag(after) (1 - share * v v^T / (k p rms^2)) diag(before / rms) H[g]

H[g] is the state of the group's heads as a matrix (k * p, n), v what the norm normalises and rms^2 = |v|^2 / (k p) +
eps, W the columns of out_proj, `before` and `after` what multiplies the output on either side of the norm (the gate
silu(z) on one of them, the norm's weight after it), and P a random map of the output's directions to a few (Johnson &
Lindenstrauss 1984), with E[P^T P] = 1: inner products keep their expectation, and a sample takes little memory. So the
channels' output errors, their correlations, and both Gramians all come from the pairs (M, C).

With share = 1 this is the derivative of the gated norm: exact for small changes, but it has the loss of a part of v in
v's own direction cost nothing, which is wrong for large ones. With share = 0 the rms counts as fixed. Which of them
tells best what a cut does differs from layer to layer; methods try several and measure. Where a mixer has no norm, the
rms counts as 1, its derivative as 0, and the share as nothing.

Shape letters as in `ghostssm.ops.ssd`; s sample, d output direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ghostssm.models.mixer import Mixer, Streams
from ghostssm.ops.ssd import ssd
from ghostssm.ops.step import at_least_float32

DEFAULT_SAMPLES = 4096
DEFAULT_DIRECTIONS = 16


@dataclass(frozen=True)
class OutputSamples:
    """Samples of one mixer.

    Attributes:
        maps: (s, g, d, n), M above for share = 0.
        readouts: (s, g, n), C.
        directions: (s, g, d), P W diag(after) v / rms. along: (s, g, n), v^T diag(before / rms) H / (k p rms), 0
            without a norm; their outer product is what a share of 1 takes off the maps.
    """

    maps: Tensor
    readouts: Tensor
    directions: Tensor
    along: Tensor

    def __len__(self) -> int:
        return self.maps.shape[0]

    def with_share(self, share: float) -> OutputSamples:
        """The same samples with the norm's derivative to this share."""
        along = self.along * share
        maps = self.maps - self.directions[..., None] * along[:, :, None]
        return OutputSamples(maps, self.readouts, self.directions, self.along - along)

    def output_gram(self) -> Tensor:
        """(g * n, g * n), float64: mean inner products of the channels' contributions.

        For a set R of channels, 1_R^T G 1_R is the mean squared change of the output from removing all of R, with the
        norm linearised; G is an unbiased estimate of its mean over tokens and directions.
        """
        contributions = (self.maps * self.readouts[:, :, None]).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        return _gram(contributions) / len(self)

    def controllability(self) -> Tensor:
        """(g, n, n), float64: the Gramian of the states, weighted by how they reach the output."""
        return torch.stack([_gram(self.maps[:, g].flatten(0, 1)) for g in range(self.maps.shape[1])]) / len(self)

    def observability(self) -> Tensor:
        """(g, n, n), float64: the Gramian of the readouts."""
        return torch.stack([_gram(self.readouts[:, g]) for g in range(self.readouts.shape[1])]) / len(self)

    def split(self, held_out: float) -> tuple[OutputSamples, OutputSamples]:
        """The samples in two parts, of which the last has this fraction."""
        count = len(self) - max(1, round(held_out * len(self)))
        parts = (self.maps, self.readouts, self.directions, self.along)
        return OutputSamples(*(part[:count] for part in parts)), OutputSamples(*(part[count:] for part in parts))


def _gram(rows: Tensor) -> Tensor:
    """rows^T rows; summed in float64 over stretches, each in the rows' own precision."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for stretch in rows.split(4096):
        total += (stretch.T @ stretch).double()
    return total


def sample_outputs(
    mixer: Mixer,
    batches: Iterable[Streams],
    tokens: int,
    samples: int = DEFAULT_SAMPLES,
    directions: int | None = DEFAULT_DIRECTIONS,
    seed: int = 0,
    first: int = 0,
) -> OutputSamples:
    """Sample a mixer whose streams arrive in batches.

    Positions are evenly spaced, shifted at random from batch to batch, so that all depths of a window are covered. What
    is drawn depends on the seed and on the number of a batch's first window.

    Args:
        tokens: how many there are in all batches.
        samples: about how many to take; all tokens if there are fewer.
        directions: of the output per sample, drawn anew for every position; None for all, without a random map.
        first: the number of the first window.
    """
    stride = max(1, tokens // samples)
    taken: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with torch.inference_mode():
        for streams in batches:
            generator = torch.Generator().manual_seed(_mixed(seed, first))
            first += len(streams.dt)
            shift = int(torch.randint(stride, (), generator=generator))
            for position, state in states_at(mixer, streams, range(shift, streams.dt.shape[1], stride)):
                taken.append(_sample(mixer, _at(streams, position), state, directions, generator))
    return OutputSamples(*(torch.cat(part) for part in zip(*taken, strict=True)))


def _mixed(seed: int, window: int) -> int:
    """One seed from a seed and the number of a window."""
    return int(np.random.SeedSequence((seed % 2**64, window)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def joined(parts: Sequence[OutputSamples]) -> OutputSamples:
    """All samples in one."""
    return OutputSamples(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(OutputSamples)))


def states_at(mixer: Mixer, s: Streams, positions: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """The state (b, h, p, n) right after each of some ascending positions, from a state of zeros."""
    state, done = None, 0
    for position in positions:
        span = slice(done, position + 1)
        _, state = ssd(s.x[:, span], s.dt[:, span], mixer.A, s.B[:, span], s.C[:, span], None, state)
        done = position + 1
        yield position, state


def _at(s: Streams, position: int) -> Streams:
    return Streams(s.x[:, position], s.B[:, position], s.C[:, position], s.dt[:, position], s.z[:, position])


def _sample(
    mixer: Mixer, s: Streams, state: Tensor, directions: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `OutputSamples` has of one token, for a batch; the streams hold that token only."""
    b, _, _, n = state.shape
    g = s.C.shape[1]
    grouped = state.reshape(b, g, -1, n)
    y = (grouped @ s.C[..., None])[..., 0] + (at_least_float32(mixer.D)[:, None] * s.x).view(b, g, -1)
    gate = F.silu(at_least_float32(s.z)).view(b, g, -1)
    norm = mixer.norm
    gate_first = norm is None or norm.gate_first
    weight = at_least_float32(mixer.out_proj.weight)
    if norm is not None:
        weight = weight * at_least_float32(norm.weight)
    if directions is not None:
        signs = torch.randint(0, 2, (directions, len(weight)), generator=generator).to(weight) * 2 - 1
        weight = signs @ weight / math.sqrt(directions)
    by_group = weight.view(len(weight), g, -1).transpose(0, 1)  # (g, d, k * p)
    if not gate_first:
        by_group = by_group * gate[:, :, None]  # (b, g, d, k * p)
    factor = gate if gate_first else torch.ones_like(gate)
    if norm is None:
        along = grouped.new_zeros(b, g, n)
        normed = y * factor
    else:
        factor = factor * torch.rsqrt((y * factor).square().mean(-1, keepdim=True) + norm.eps)
        normed = y * factor
        along = ((normed * factor)[:, :, None] @ grouped)[:, :, 0] / normed.shape[-1]
    return (by_group * factor[:, :, None]) @ grouped, s.C, (by_group @ normed[..., None])[..., 0], along
