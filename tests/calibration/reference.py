"""What calibration measures, from its definition: every state in hand, token by token, in float64, and
decisions by being applied."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ghostssm.calibration.open_block import OpenBlock
from ghostssm.calibration.samples import OutputSamples
from ghostssm.models.families import mixers_of
from ghostssm.models.mixer import Mixer, Streams, mixer_forward, mixer_streams
from ghostssm.ops.ssd import ssd_reference
from ghostssm.plan.decision import Decision
from tests.conftest import tiny_model
from tests.families.tiny import tiny_hybrid


def mixer_and_streams(n_groups: int = 2, length: int = 24, case: str | None = None) -> tuple[Mixer, Streams]:
    model = tiny_hybrid(case) if case else tiny_model(n_groups=n_groups)
    mixer = mixers_of(model.double().requires_grad_(False))[1]
    hidden = torch.randn(2, length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return mixer, mixer_streams(mixer, hidden)


def reference_states(mixer: Mixer, s: Streams) -> Tensor:
    """(l, b, h, p, n), token by token."""
    states = []
    for t in range(s.dt.shape[1]):
        span = slice(0, t + 1)
        states.append(ssd_reference(s.x[:, span], s.dt[:, span], mixer.A, s.B[:, span], s.C[:, span])[1])
    return torch.stack(states)


def reference_maps(mixer: Mixer, s: Streams) -> Tensor:
    """(l * b, g, d, n): what each state channel adds to the output when it is read with 1, the norm's rms held fixed.

    For mixers whose gate comes before the norm.
    """
    assert mixer.norm is not None
    assert mixer.norm.gate_first
    groups = mixer.layout.n_groups
    maps = []
    for t, state in enumerate(reference_states(mixer, s)):
        for window, by_head in enumerate(state):
            heads = by_head.unflatten(0, (groups, -1))  # (g, k, p, n)
            y = torch.einsum("gkpn,gn->gkp", heads, s.C[window, t]) + (mixer.D[:, None] * s.x[window, t]).view(
                heads.shape[:3]
            )
            gate = torch.nn.functional.silu(s.z[window, t]).view_as(y)
            rms = ((y * gate).square().mean((1, 2), keepdim=True) + mixer.norm.eps).sqrt()
            scale = gate / rms * mixer.norm.weight.view_as(y)
            columns = mixer.out_proj.weight.view(-1, *y.shape)
            maps.append(torch.einsum("dgkp,gkp,gkpn->gdn", columns, scale, heads))
    return torch.stack(maps)


def reference_samples(mixer: Mixer, s: Streams, positions: Sequence[int], maps: Tensor) -> OutputSamples:
    """Samples with given random maps (s, d, hidden_size), from the state in hand at each position."""
    groups, states = mixer.layout.n_groups, reference_states(mixer, s)
    samples = []
    for position, drawn in zip(positions, maps, strict=True):
        weight = drawn @ mixer.out_proj.weight / math.sqrt(len(drawn))
        if mixer.norm is not None:
            weight = weight * mixer.norm.weight
        weight = weight.view(-1, groups, weight.shape[1] // groups).transpose(0, 1)  # (g, d, k * p)
        state = states[position].reshape(len(s.x), groups, -1, mixer.layout.state_size)
        C = s.C[:, position]
        y = (state @ C[..., None])[..., 0] + (mixer.D[:, None] * s.x[:, position]).view(state.shape[:3])
        gate = torch.nn.functional.silu(s.z[:, position]).view_as(y)
        before, after = (gate, torch.ones_like(gate))
        if mixer.norm is None:
            rms, along = y.new_ones(len(y), groups, 1), C * 0
        else:
            before, after = (before, after) if mixer.norm.gate_first else (after, before)
            rms = ((y * before).square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt()
            along = ((y * before**2 / rms**2)[:, :, None] @ state)[:, :, 0] / y.shape[-1]
        weight = weight * after[:, :, None]
        maps_here = (weight * (before / rms)[:, :, None]) @ state
        samples.append((maps_here, C, (weight @ (y * before / rms)[..., None])[..., 0], along))
    return OutputSamples(*(torch.cat(part) for part in zip(*samples, strict=True)))


def change_when_applied(block: OpenBlock, decision: Decision) -> float:
    """Mean squared change of the output of a block's mixer, from copies of the block with and without it."""
    whole, sliced = (OpenBlock(block.walk, block.index, block.original, copy.deepcopy(block._block)) for _ in range(2))
    after = sliced.prune(decision).present_mixer
    with torch.inference_mode():
        inputs = torch.cat(list(whole.inputs()))
        changes = mixer_forward(after, inputs) - mixer_forward(whole.present_mixer, inputs)
    return changes.square().sum(-1).mean().item()
