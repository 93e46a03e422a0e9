"""The recurrence at sampled tokens, seen from the block's output.

At one token, what state channel n of group g adds to the mixer's output is

    C[g, n] * M[g, :, n],      M[g] = P W diag(after) (1 - share * v v^T / (k p rms^2)) diag(before / rms) H[g]

H[g] is the state of the group's heads as a matrix (k * p, n), v what the norm normalises and rms^2 = |v|^2 / (k p) +
eps, W the columns of out_proj, `before` and `after` what multiplies the output on either side of the norm (the gate
silu(z) on one of them, the norm's weight after it), and P a random map of the output's directions to a few (Johnson &
Lindenstrauss 1984), with E[P^T P] = 1: inner products keep their expectation, and a sample takes little memory. So the
channels' output errors, their correlations, and both Gramians all come from the pairs (M, C).

P has rows of one random rotation of the output, in proportion. All of its rows are dealt out to one position after the
other before any comes again: so the rotation's product with W is made once, and the maps' sum is nearly exact.

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
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ghostssm.models.mixer import Mixer, Streams
from ghostssm.ops.reading import read_and_pull, read_states
from ghostssm.ops.step import at_least_float32

DEFAULT_SAMPLES = 4096
DEFAULT_DIRECTIONS = 8
_STRETCH = 32
"""Sampled positions whose directions are in memory at a time: few enough for a processor's cache."""


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

    def read(self, readouts: Tensor, share: float = 0.0) -> tuple[Tensor, Tensor]:
        """What the states add to the output where they are read with ``readouts`` (s, g, n), summed over groups (s, d);
        and half the derivative of its square with respect to the readouts (s, g, n)."""
        return read_and_pull(self.maps, self.directions, self.along, readouts, share)

    def output_gram(self, share: float = 0.0) -> Tensor:
        """(g * n, g * n), float64: mean inner products of the channels' contributions.

        For a set R of channels, 1_R^T G 1_R is the mean squared change of the output from removing all of R, with the
        norm linearised; G is an unbiased estimate of its mean over tokens and directions.
        """
        return self._contributions.at(share) / len(self)

    def controllability(self, share: float = 0.0) -> Tensor:
        """(g, n, n), float64: the Gramian of the states, weighted by how they reach the output."""
        return torch.stack([group.at(share) for group in self._by_group]) / len(self)

    def observability(self) -> Tensor:
        """(g, n, n), float64: the Gramian of the readouts."""
        return torch.stack([_gram(self.readouts[:, g]) for g in range(self.readouts.shape[1])]) / len(self)

    def split(self, held_out: float) -> tuple[OutputSamples, OutputSamples]:
        """The samples in two parts, of which the last has this fraction."""
        count = len(self) - max(1, round(held_out * len(self)))
        return self._rows(slice(0, count)), self._rows(slice(count, None))

    def _rows(self, rows: slice) -> OutputSamples:
        return OutputSamples(self.maps[rows], self.readouts[rows], self.directions[rows], self.along[rows])

    @cached_property
    def _contributions(self) -> _Forms:
        return _Forms.of(self.maps, self.directions, self.along, self.readouts)

    @cached_property
    def _by_group(self) -> list[_Forms]:
        each = (part.split(1, dim=1) for part in (self.maps, self.directions, self.along))
        return [_Forms.of(*parts) for parts in zip(*each, strict=True)]


@dataclass(frozen=True)
class _Forms:
    """Gram matrices of samples' maps, of what a share of 1 takes off them, and between the two, summed over samples.

    So the Gram matrix for any share takes no further look at the samples.

    Attributes:
        whole, taken, between: (g * n, g * n), float64.
    """

    whole: Tensor
    taken: Tensor
    between: Tensor

    @classmethod
    def of(cls, maps: Tensor, directions: Tensor, along: Tensor, readouts: Tensor | None = None) -> _Forms:
        """From what `OutputSamples` has of the groups; if ``readouts`` are given, the maps and ``along`` times these.

        Summed in float64 over stretches, each in the samples' own precision.
        """
        (_, g, _, n), stretch = maps.shape, max(1, 4096 // maps.shape[2])
        sums = [torch.zeros(g * n, g * n, dtype=torch.float64, device=maps.device) for _ in range(3)]
        for first in range(0, len(maps), stretch):
            rows = slice(first, first + stretch)
            M, toward, off = maps[rows], directions[rows], along[rows]
            if readouts is not None:
                M, off = M * readouts[rows, :, None], off * readouts[rows]
            flat = M.transpose(1, 2).reshape(-1, g * n)
            sums[0] += (flat.T @ flat).double()
            toward = toward.transpose(1, 2)  # (s, d, g)
            sums[1] += torch.einsum("sgn,sge,sem->gnem", off, toward.mT @ toward, off).reshape(g * n, g * n).double()
            onto = (M.transpose(1, 2).flatten(2).mT @ toward).unflatten(1, (g, n))  # (s, g, n, g)
            sums[2] += torch.einsum("sgne,sem->gnem", onto, off).reshape(g * n, g * n).double()
        return cls(*sums)

    def at(self, share: float) -> Tensor:
        """The Gram matrix for a share."""
        return self.whole - share * (self.between + self.between.T) + share**2 * self.taken


def _gram(rows: Tensor) -> Tensor:
    """rows^T rows; summed in float64 over stretches, each in the rows' own precision."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for stretch in rows.split(4096):
        total += (stretch.T @ stretch).double()
    return total


def sample_outputs(
    mixer: Mixer,
    batches: Iterable[tuple[Streams, Tensor]],
    tokens: int,
    samples: int = DEFAULT_SAMPLES,
    directions: int = DEFAULT_DIRECTIONS,
    seed: int = 0,
    first: int = 0,
) -> OutputSamples:
    """Sample a mixer whose streams arrive in batches, each with the y (b, l, h, p) that the recurrence gives on them.

    Positions are evenly spaced, shifted at random from batch to batch, so that all depths of a window are covered. What
    is drawn depends on the seed and on the number of a batch's first window.

    Args:
        tokens: how many there are in all batches.
        samples: about how many to take; all tokens if there are fewer.
        directions: of the output per sample; nothing is lost where they are as many as the output has.
        first: the number of the first window.
    """
    stride, rotated = max(1, tokens // samples), _rotated(mixer, seed)
    directions = min(directions, len(rotated))
    weight = rotated * math.sqrt(len(rotated) / directions)
    taken: list[OutputSamples] = []
    with torch.inference_mode():
        for streams, y in batches:
            generator = torch.Generator().manual_seed(_mixed(seed, first))
            first += len(streams.dt)
            shift = int(torch.randint(stride, (), generator=generator))
            positions = range(shift, streams.dt.shape[1], stride)
            order = torch.randperm(len(weight), generator=generator).to(weight.device)
            taken += _sampled(mixer, streams, y, positions, weight, order, directions)
        return joined(taken)


def _rotated(mixer: Mixer, seed: int) -> Tensor:
    """Q W diag(norm's weight), (hidden_size, h * p), with a random rotation Q: signs, then the cosine transform.

    Every row of Q looks at all of the output in equal parts (Ailon & Chazelle 2006), so any few of them will do.
    """
    weight = at_least_float32(mixer.out_proj.weight.detach())
    if mixer.norm is not None:
        weight = weight * at_least_float32(mixer.norm.weight.detach())
    size = len(weight)
    generator = torch.Generator().manual_seed(seed % 2**64)
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    number = torch.arange(size, dtype=torch.float64)
    rotation = torch.cos(math.pi / size * number[:, None] * (number + 0.5)) * signs * math.sqrt(2 / size)
    rotation[0] /= math.sqrt(2)
    return rotation.to(weight) @ weight


def _mixed(seed: int, window: int) -> int:
    """One seed from a seed and the number of a window."""
    return int(np.random.SeedSequence((seed % 2**64, window)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def joined(parts: Sequence[OutputSamples]) -> OutputSamples:
    """All samples in one."""
    if len(parts) == 1:
        return parts[0]
    return OutputSamples(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(OutputSamples)))


def _sampled(
    mixer: Mixer, s: Streams, y: Tensor, positions: range, weight: Tensor, order: Tensor, directions: int
) -> Iterator[OutputSamples]:
    """Samples at some positions of a batch, stretch by stretch.

    Args:
        weight: (hidden_size, h * p), of all directions. order: of its rows; every position takes the next few of them.
    """
    state, done = None, 0
    for first in range(0, len(positions), _STRETCH):
        at = positions[first : first + _STRETCH]
        numbers = torch.arange(first * directions, (first + len(at)) * directions, device=order.device)
        rows = weight[order[numbers % len(order)]]
        toward, u = _directions(mixer, rows.unflatten(0, (len(at), directions)), y[:, at], s.z[:, at])
        span = slice(done, at[-1] + 1)
        here = range(at[0] - done, span.stop - done, positions.step)
        reads, state = read_states(s.x[:, span], s.dt[:, span], mixer.A, s.B[:, span], u, here, state)
        done = span.stop
        maps, along = reads[..., :-1, :], reads[..., -1, :]
        # One position after the other, all windows of each together.
        yield OutputSamples(*(part.transpose(0, 1).flatten(0, 1) for part in (maps, s.C[:, at], toward, along)))


def output_factors(mixer: Mixer, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What multiplies y (b, s, h, p) on its way to out_proj, the norm's weight left out.

    Args:
        z: (b, s, h * p).

    Returns:
        what does before the norm (b, s, h, p), the inverse of what the norm divides by (b, s, h, 1), and all of it
        (b, s, h, p).
    """
    (b, s, h, _), norm, g = y.shape, mixer.norm, mixer.layout.n_groups
    gate = F.silu(at_least_float32(z)).view(y.shape)
    before = gate if norm is None or norm.gate_first else torch.ones_like(gate)
    inverse_rms = y.new_ones(b, s, g, 1, 1)
    if norm is not None:
        square = (y * before).square().unflatten(2, (g, -1)).mean((-1, -2), keepdim=True)
        inverse_rms = torch.rsqrt(square + norm.eps)
    inverse_rms = inverse_rms.expand(b, s, g, h // g, 1).reshape(b, s, h, 1)
    return before, inverse_rms, gate * inverse_rms


def _directions(mixer: Mixer, weight: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The maps of states at some positions, from y (b, s, h, p) and z (b, s, h * p) there.

    Args:
        weight: (s, d, h * p), what makes each position's directions of a vector that was gated and divided by its rms.

    Returns:
        `OutputSamples.directions`, (b, s, g, d), and u (b, s, h, d + 1, p), which makes of states the maps and, by the
        last of the directions, ``along``.
    """
    (b, s, h, p), norm = y.shape, mixer.norm
    g = mixer.layout.n_groups
    weight = weight.view(s, -1, h, p)
    before, inverse_rms, factor = output_factors(mixer, y, z)
    u = y.new_empty(b, s, h, weight.shape[1] + 1, p)
    torch.mul(weight.transpose(1, 2), factor[:, :, :, None], out=u[:, :, :, :-1])
    along = 0 if norm is None else before * inverse_rms / (h // g * p)
    torch.mul(y * before * inverse_rms, along, out=u[:, :, :, -1])
    normed = (y * factor).view(b, s, g, -1)
    toward = weight.unflatten(2, (g, -1)).transpose(1, 2).flatten(3) @ normed.permute(1, 2, 3, 0)  # (s, g, d, b)
    return toward.permute(3, 0, 1, 2), u
