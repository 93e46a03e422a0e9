"""One Mamba-2 mixer, seen the same way in every model family, and its forward pass in our own ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostssm.models.layout import SSDLayout
from ghostssm.ops.conv_norm import causal_conv, multiplied_rms_norm
from ghostssm.ops.ssd import ssd
from ghostssm.ops.state_format import Tiers
from ghostssm.ops.step import at_least_float32, project_streams
from ghostssm.values import Value

_REPLACEABLE = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "out_proj")
"""Parts of a view that every family's mixer module has under the same name."""


@dataclass(frozen=True, repr=False, eq=False)
class Projection(Value):
    """Maps from the n state channels that B and C have to the r that the recurrence runs on.

    B' = B_map^T B and C' = C_map^T C, after the convolution and SiLU.

    Attributes:
        B: (g, n, r), the map of B.
        C: (g, n, r), the map of C.
    """

    B: Tensor
    C: Tensor


@dataclass(frozen=True)
class Norm:
    """The RMS norm between the recurrence and out_proj; every group of heads is normalised on its own.

    Attributes:
        weight: (h * p,).
        gate_first: the gate SiLU(z) acts before the norm, or else after it.
    """

    weight: Tensor
    eps: float
    gate_first: bool = True


@dataclass(frozen=True)
class Mixer:
    """A view of a model's mixer: its parts under the field's names. Holds no copies.

    Attributes:
        name: dotted path of the mixer in its model. layer_index: of its layer, as the model's cache counts.
        module: the mixer itself.
        dt_bias, A_log, D: (h,).
        norm: None where y is gated only.
        dt_limit: bounds of dt after softplus.
        input_multiplier: of in_proj's input. row_multipliers: (in_proj_rows,), of its output; None for none.
        projection: of B and C onto a smaller state, if there is one.
        tiers: how many channels each head keeps in how many bits, if the model says so.
    """

    name: str
    layer_index: int
    module: nn.Module
    layout: SSDLayout
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Norm | None
    out_proj: nn.Linear
    dt_limit: tuple[float, float]
    input_multiplier: float = 1.0
    row_multipliers: Tensor | None = None
    projection: Projection | None = None
    tiers: Tiers | None = None

    @property
    def A(self) -> Tensor:
        """(h,), negative, float32 or better."""
        return -torch.exp(at_least_float32(self.A_log))

    @property
    def state_size(self) -> int:
        """The size of the recurrent state: r if there is a projection, else n."""
        return self.layout.state_size if self.projection is None else self.projection.B.shape[-1]

    def current(self) -> Mixer:
        """The view of what the module holds now: adapters are put around layers, and loaders swap tensors."""
        module: Any = self.module
        swapped = {name: part for name in _REPLACEABLE if (part := getattr(module, name)) is not getattr(self, name)}
        if self.norm is not None and module.norm.weight is not self.norm.weight:
            swapped["norm"] = replace(self.norm, weight=module.norm.weight)
        own_map = getattr(module, "B_projection", None)  # a projection that is tried out is not the module's own
        if self.projection is not None and own_map is not None and own_map is not self.projection.B:
            swapped["projection"] = Projection(own_map, module.C_projection)
        return replace(self, **swapped) if swapped else self

    def project_in(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, the convolution's input xBC, and dt, from (b, l, hidden_size)."""
        projected = self.in_proj(self.scaled_input(hidden))
        if self.row_multipliers is not None:
            projected = projected * self.row_multipliers.to(projected)  # the model may have moved since
        return self.layout.split_in_proj(projected)

    def scaled_input(self, hidden: Tensor) -> Tensor:
        """The input of in_proj."""
        return hidden if self.input_multiplier == 1 else hidden * self.input_multiplier

    def with_state_size(self, state_size: int) -> Mixer:
        """The view to use once the module's tensors have another state size."""
        return replace(self, layout=self.layout.with_state_size(state_size))


@dataclass(frozen=True)
class Streams:
    """What the recurrence of one mixer works on, after conv, SiLU, softplus and limits.

    Attributes:
        x: (b, l, h, p). B, C: (b, l, g, n), or (b, l, g, r) if they are projected. dt: (b, l, h). z: (b, l, h * p).
            All but z in float32 or better.
    """

    x: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor
    z: Tensor

    def select(self, kept: Sequence[Sequence[int]]) -> Streams:
        """The streams of a mixer whose group g keeps only the state channels ``kept[g]``; -1 is a channel of zeros."""
        index = torch.tensor(kept, device=self.B.device)[None, None].expand(*self.B.shape[:2], -1, -1)
        B, C = (part.gather(-1, index.clamp_min(0)).masked_fill(index < 0, 0) for part in (self.B, self.C))
        return replace(self, B=B, C=C)

    def project(self, projection: Projection) -> Streams:
        """The streams of a mixer with a projected state."""
        return replace(self, B=project_streams(self.B, projection.B), C=project_streams(self.C, projection.C))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(part.numel() * part.element_size() for part in (self.x, self.B, self.C, self.dt, self.z))


def mixer_streams(mixer: Mixer, hidden: Tensor) -> Streams:
    """The first half of a mixer: in_proj, conv, SiLU, softplus. ``hidden``: (b, l, hidden_size), already normalised."""
    z, xBC, dt = mixer.project_in(hidden)
    return split_streams(mixer, xBC, dt, z)


def split_streams(mixer: Mixer, xBC: Tensor, dt: Tensor, z: Tensor, mask: Tensor | None = None) -> Streams:
    """The steps of `mixer_streams` after in_proj.

    Args:
        xBC: (b, m, conv_dim), m >= l: the convolution's input, with as many earlier positions before it as are known.
        dt: (b, l, h). z: (b, l, h * p).
        mask: (b, l), 0 where a position is padding: it then writes nothing into the state.
    """
    length = dt.shape[1]
    # Half precision would round after every tap.
    weight, bias = at_least_float32(mixer.conv1d.weight.squeeze(1)), mixer.conv1d.bias
    xBC = F.silu(causal_conv(at_least_float32(xBC), weight, bias))[:, -length:]
    if mask is not None:
        xBC = xBC * mask[..., None].to(xBC.dtype)
    x, B, C = mixer.layout.split_conv(xBC)
    dt = F.softplus(at_least_float32(dt + mixer.dt_bias)).clamp(*mixer.dt_limit)
    streams = Streams(x, B, C, dt, z)
    return streams if mixer.projection is None else streams.project(mixer.projection)


def gated_norm(norm: Norm | None, y: Tensor, z: Tensor, groups: int) -> Tensor:
    """Gate and norm, (b, l, h * p). ``y``: (b, l, h, p), with the D term."""
    return multiplied_norm(norm, y, F.silu(at_least_float32(z)), groups)


def multiplied_norm(norm: Norm | None, y: Tensor, gate: Tensor, groups: int) -> Tensor:
    """`gated_norm` of a gate that SiLU has been applied to already, (b, l, h * p)."""
    y = y.flatten(-2)
    if norm is None:
        return y * gate
    return multiplied_rms_norm(y, gate, norm.weight, norm.eps, groups, gate_first=norm.gate_first)


def mixer_output(mixer: Mixer, y: Tensor, z: Tensor) -> Tensor:
    """The second half of a mixer: gate, norm, out_proj. ``y``: (b, l, h, p), with the D term."""
    normed = gated_norm(mixer.norm, y, z, mixer.layout.n_groups)
    projected: Tensor = mixer.out_proj(normed.to(mixer.out_proj.weight.dtype))
    return projected


def mixer_forward(mixer: Mixer, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
    """The whole mixer on whole sequences, (b, l, hidden_size) to the same; differentiable.

    ``gate`` (g, n), if given, multiplies C: 0 removes a state channel, 1 leaves it.
    """
    streams = mixer_streams(mixer, hidden)
    if gate is not None:
        streams = replace(streams, C=streams.C * gate)
    return output_of_streams(mixer, streams)


def scanned(mixer: Mixer, s: Streams) -> Tensor:
    """y (b, l, h, p) of the recurrence from a state of zeros, with the D term."""
    return ssd(s.x, s.dt, mixer.A, s.B, s.C, at_least_float32(mixer.D))[0]


def output_of_streams(mixer: Mixer, s: Streams) -> Tensor:
    """The rest of the mixer after `mixer_streams`, from a state of zeros."""
    return mixer_output(mixer, scanned(mixer, s), s.z)


def normed_output(mixer: Mixer, s: Streams) -> Tensor:
    """The input of out_proj, (b, l, h * p), from a state of zeros."""
    return gated_norm(mixer.norm, scanned(mixer, s), s.z, mixer.layout.n_groups)
