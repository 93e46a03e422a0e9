"""Bits per channel: which channels of each head are stored in 8 bits, which in 4 and which not at all.

Two costs are known of every channel of a head (`ghostssm.ops.rounding_costs`), both mean squared changes of the block's
output: of leaving it out, and of rounding it after every token, in levels of its row's largest magnitude over 127 or 7.
The second adds up over the tokens that a head remembers, so that a head that forgets slowly needs more bits.

Bits go where they buy most, over all channels of all heads and layers: at the end no channel would gain more from a bit
than another, which is reverse water-filling (Cover & Thomas, ch. 10) where each bit divides an error by four, as there.
Channels are those of the balanced basis, in which a channel says nothing of another (transform coding), scaled to
states of equal energy, so that one scale per row suits them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostssm.calibration.open_block import OpenBlock
from ghostssm.calibration.samples import output_factors
from ghostssm.calibration.walk import LayerWalk
from ghostssm.methods.balanced import balanced_maps
from ghostssm.models.mixer import Mixer, Projection
from ghostssm.ops.rounding_costs import rounding_costs
from ghostssm.ops.state_format import INT4, INT8, Tiers, tier_bytes
from ghostssm.ops.step import at_least_float32
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.progress import Progress, silent
from ghostssm.text.windows import Windows

_TOKENS = 4096
"""On which the costs are measured: the order of channels is needed, not a forecast."""
_RIDGE = 1e-6
_BITS = 3
"""Per channel: so wide is the state that bits are divided over, since some heads will leave their last channels out."""


def tiered_bytes(size: int) -> int:
    """The fewest bytes per row that are divided over a state of this size."""
    return -(-size * _BITS // 8) + INT8.scale_bytes


def widest_tiered(row_bytes: float, sizes: Sequence[int]) -> int | None:
    """The size of the state to divide so many bytes per row over; None if nothing fits."""
    return max((size for size in sizes if tiered_bytes(size) <= row_bytes), default=None)


def in_tiers(
    model: PreTrainedModel, plan: Plan, windows: Windows, state_bytes: int, progress: Progress = silent
) -> Plan:
    """A plan's projected states in tiers that take at most so many bytes per sequence.

    Args:
        model: that the plan is for. plan: with a projection of every mixer.
        windows: to measure costs on; the first of them.
        state_bytes: over all layers, scales included.
    """
    few = windows.part(slice(0, max(1, _TOKENS // windows.length)))
    with pruned(model, plan) as smaller:
        measured = _measured(smaller, few, progress)
    costs = [costs for _, costs in measured.values()]
    divided = divide(costs, state_bytes)
    decisions = {}
    for (name, decision), tiers in zip(plan.decisions.items(), divided, strict=True):
        assert decision.projection is not None
        basis = measured[name][0]
        kept = max(1, *(wide + narrow for wide, narrow in tiers))
        maps = Projection(decision.projection.B @ basis.B[..., :kept], decision.projection.C @ basis.C[..., :kept])
        decisions[name] = replace(decision, projection=maps, tiers=tiers)
    return replace(plan, decisions=decisions)


@dataclass(frozen=True)
class Costs:
    """Of one mixer's channels, as shares of the energy of the hidden states after its block.

    Attributes:
        left_out: (h, n), of not storing them. rounded: (h, n), of storing them in levels as far apart as their row's
            largest magnitude. head_dim: rows per head.
    """

    left_out: Tensor
    rounded: Tensor
    head_dim: int


def divide(costs: Sequence[Costs], state_bytes: int) -> list[Tiers]:
    """The tiers of each mixer: at most so many bytes in all, where they buy most.

    Within a head the first channels get most bits; how many get them is decided as if any could.
    """
    steps: list[tuple[float, int, int, int]] = []  # what a byte of a row buys, mixer, head, bits
    for index, each in enumerate(costs):
        gains = _gains(each)
        for bits in (INT4.bits, INT8.bits):
            for head, row in enumerate(gains[bits].tolist()):
                steps += [(gain, index, head, bits) for gain in row if gain > 0]
    counts = [[[0, 0] for _ in each.left_out] for each in costs]
    taken = [[0 for _ in each.left_out] for each in costs]
    room = state_bytes
    for _, index, head, bits in sorted(steps, key=lambda step: (-step[0], step[3])):  # of equal ones 4 bits first
        wide, narrow = counts[index][head]
        new = [wide + 1, max(0, narrow - 1)] if bits == INT8.bits else [wide, narrow + 1]
        more = (tier_bytes(*new) - taken[index][head]) * costs[index].head_dim
        if sum(new) <= costs[index].left_out.shape[1] and more <= room:
            counts[index][head], taken[index][head] = new, tier_bytes(*new)
            room -= more
    return [tuple((wide, narrow) for wide, narrow in heads) for heads in counts]


def _gains(costs: Costs) -> dict[int, Tensor]:
    """What each half byte buys: the first one of a channel, and the second, (h, n) each."""
    assert INT4.largest is not None
    assert INT8.largest is not None
    four, eight = (costs.rounded / largest**2 for largest in (INT4.largest, INT8.largest))
    first, second = costs.left_out - four, four - eight
    both = (costs.left_out - eight) / 2
    # A channel whose second half byte buys more than its first takes both at once.
    together = second > first
    return {
        INT4.bits: torch.where(together, both, first) / costs.head_dim,
        INT8.bits: torch.where(together, both, second) / costs.head_dim,
    }


def _measured(model: PreTrainedModel, windows: Windows, progress: Progress) -> dict[str, tuple[Projection, Costs]]:
    """For each mixer the basis, (g, r, r), and what its channels cost there."""
    measured: dict[str, tuple[Projection, Costs]] = {}
    walk = LayerWalk(model, windows)
    for block in walk.blocks():
        progress("tiers", block.index, len(walk))
        if block.mixer is None:
            block.advance()
            continue
        mixer = block.mixer
        basis = _basis(block)
        left_out, rounded = _costs_in(block, mixer, basis)
        block.advance()
        energy = walk.hidden.double().square().sum()
        measured[mixer.name] = basis, Costs(left_out / energy, rounded / energy, mixer.layout.head_dim)
    progress("tiers", len(walk), len(walk))
    return measured


def _basis(block: OpenBlock) -> Projection:
    """The balanced basis of a block's states, (g, r, r), exact; as much energy in all of a group's channels."""
    samples = block.samples(seed=0)
    W_c, W_o = samples.controllability(), samples.observability()
    B, C, S = balanced_maps(W_c, W_o, W_c.shape[-1], _RIDGE)
    energies = S[:, None]  # of the states, in a balanced basis
    return Projection((B * energies.rsqrt()).to(samples.maps), (C * energies.sqrt()).to(samples.maps))


def _costs_in(block: OpenBlock, mixer: Mixer, basis: Projection) -> tuple[Tensor, Tensor]:
    """`Costs`, summed over tokens, not yet as shares."""
    layout, norm = mixer.layout, mixer.norm
    columns = at_least_float32(mixer.out_proj.weight.detach()).square().sum(0)
    if norm is not None:
        columns = columns * at_least_float32(norm.weight.detach()).square()
    left_out = rounded = columns.new_zeros((), dtype=torch.float64)
    for streams, y in block.scanned_streams():
        with torch.inference_mode():
            factor = output_factors(mixer, y, streams.z)[-1]
            weight = factor.square() * columns.view(layout.num_heads, layout.head_dim)
            s = streams.project(basis)
            costs = rounding_costs(s.x, s.dt, mixer.A, s.B, s.C, weight)
            left_out, rounded = left_out + costs[0], rounded + costs[1]
    return left_out, rounded
