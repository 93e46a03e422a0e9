"""One token of a mixer between its two projections, in place: convolution, recurrence, skip, gate and norm.

On a GPU with triton these are three kernels: one for B and C, which all heads of a group share, one for everything else
up to y, which reads the state once, writes it once and keeps all between in registers, and one for norm and gate.
Elsewhere `ghostssm.ops.step` does it step by step.

Shape letters as in `ghostssm.ops.ssd`; c is the number of the convolution's channels, and r the size of the state: n
without a projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostssm.ops import gpu
from ghostssm.ops.conv_norm import gated_rms_norm
from ghostssm.ops.ssd import ssd_step
from ghostssm.ops.state_format import FLOAT32_STORAGE, StateStorage
from ghostssm.ops.step import at_least_float32, conv_step_, project_streams, ssd_step_


@dataclass(frozen=True)
class StepWeights:
    """What a mixer's decode step multiplies with, in any floating-point dtypes.

    Attributes:
        taps: (c, width). bias: (c,) or None.
        dt_bias, A_log, D: (h,).
        groups: g. head_dim: p.
        B_maps, C_maps: (g, n, r), of B and C onto a smaller state after SiLU; both None for none.
    """

    taps: Tensor
    bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    groups: int
    head_dim: int
    B_maps: Tensor | None = None
    C_maps: Tensor | None = None

    def streams(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, h, p), B and C (b, g, r) from what the convolution gives, (b, c)."""
        inner = len(self.D) * self.head_dim
        half = (mixed.shape[1] - inner) // 2
        x, B, C = mixed.split([inner, half, half], dim=1)
        B, C = B.unflatten(1, (self.groups, -1)), C.unflatten(1, (self.groups, -1))
        if self.B_maps is not None and self.C_maps is not None:
            B, C = project_streams(B, self.B_maps), project_streams(C, self.C_maps)
        return x.unflatten(1, (-1, self.head_dim)), B, C


def decode_step_reference(
    window: Tensor, state: Tensor, xBC: Tensor, dt: Tensor, z: Tensor | None, weights: StepWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in the tensors' own precision; nothing is modified.

    Args:
        As `decode_step_` has them, all of one dtype.

    Returns:
        y (b, h * p), and the window and the state after the token.
    """
    window = torch.cat([window[..., 1:], xBC[..., None]], dim=-1)
    mixed = (window * weights.taps).sum(-1)
    x, B, C = weights.streams(F.silu(mixed if weights.bias is None else mixed + weights.bias))
    step = F.softplus(dt + weights.dt_bias)
    y, state = ssd_step(state, x, step, -torch.exp(weights.A_log), B, C, weights.D)
    y = y.flatten(1)
    return y if z is None else y * F.silu(z), window, state


def decode_step_(
    window: Tensor,
    state: Tensor,
    xBC: Tensor,
    dt: Tensor,
    z: Tensor | None,
    weights: StepWeights,
    storage: StateStorage = FLOAT32_STORAGE,
) -> Tensor:
    """One token, in place, in the fastest form at hand. As in every engine, dt is not limited.

    Args:
        window: (b, c, width), the convolution's last inputs, oldest first, as in transformers' cache; updated.
        state: (b, h, p, r), float32, or as `ghostssm.ops.state_format.quantise` gives it for ``storage``; updated.
        xBC: (b, c), the convolution's input. dt: (b, h), before its bias and softplus.
        z: (b, h * p), for the gate SiLU(z); None for none.

    Returns:
        y, (b, h * p), float32 or better. A state is rounded when it is stored; y is computed before that.
    """
    tensors = [value for value in vars(weights).values() if isinstance(value, Tensor)]
    fusable = not storage.rounds or (storage.format.name == "bfloat16" and not storage.stochastic)
    if fusable and gpu.usable(state, window, xBC, dt, z, *tensors) and state.is_contiguous() and window.is_contiguous():
        fused: Tensor = gpu.kernels("step").decode_step_(window, state, xBC, dt, z, weights)
        return fused
    mixed = conv_step_(window, xBC, weights.taps, weights.bias)
    x, B, C = weights.streams(at_least_float32(mixed))
    step = F.softplus(at_least_float32(dt + weights.dt_bias))
    A = -torch.exp(at_least_float32(weights.A_log))
    y = ssd_step_(state, x, step, A, B, C, at_least_float32(weights.D), storage).flatten(1)
    return y if z is None else y * F.silu(at_least_float32(z))


def block_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """RMS norm over the last axis in one kernel, in x's dtype; None where there is no kernel for it."""
    rows = x.flatten(0, -2)
    if not gpu.usable(rows, weight):
        return None
    fused: Tensor = gpu.kernels("norm").norm_step(rows, None, weight, eps, 1, x.dtype, gate_first=False)
    return fused.view_as(x)


def norm_step(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, dtype: torch.dtype, *, gate_first: bool
) -> Tensor:
    """RMS norm of each of ``groups`` equal parts of y, and the gate SiLU(z) before or after it.

    Args:
        y, z: (b, h * p). weight: (h * p,). dtype: of the result.
    """
    if gpu.usable(y, z, weight):
        fused: Tensor = gpu.kernels("norm").norm_step(y, z, weight, eps, groups, dtype, gate_first)
        return fused
    return gated_rms_norm(y, at_least_float32(z), weight, eps, groups, gate_first=gate_first).to(dtype)
