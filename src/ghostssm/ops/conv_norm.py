"""What stands around the recurrence in a mixer: the short depthwise causal convolution before it, norms after it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ghostssm.ops import compiled

_PARTS = 16
"""Pieces that a sum over tokens is cut into: not by threads, so that it stays the same."""


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution along the length.

    In the (b, l, c) layout that in_proj delivers: as one compiled loop on a CPU, as a sum of shifted copies elsewhere.
    Neither needs transposes, and both are several times faster on a CPU than a depthwise ``conv1d``.

    Args:
        x: (b, l, c).
        weight: (c, width); the last tap multiplies the current position.
        bias: (c,) or None.

    Returns:
        (b, l, c); positions before the start count as zero.
    """
    if compiled.differentiable(x, weight, bias):
        offset = torch.zeros(x.shape[2], dtype=x.dtype) if bias is None else bias
        convolved: Tensor = CompiledConv.apply(x, weight, offset)  # type: ignore[no-untyped-call]
        return convolved
    width, length = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    out = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
    for tap in range(width - 1):
        out = torch.addcmul(out, padded[:, tap : tap + length], weight[:, tap])
    return out


class CompiledConv(torch.autograd.Function):
    """`causal_conv` with both passes as one loop each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = torch.empty(x.shape, dtype=x.dtype)
        compiled.kernels.causal_conv(*compiled.arrays(x, weight.t().contiguous(), bias.clone(), out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype)
        dtaps = torch.zeros(_PARTS, *weight.t().shape, dtype=x.dtype)
        loop = compiled.backward_kernels.causal_conv_backward
        compiled.in_threads(loop, _PARTS, x, weight.t().contiguous(), dout, dx, dtaps)
        return dx, dtaps.sum(0).t(), dout.sum((0, 1))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis: x / sqrt(mean(x^2) + eps) * weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def group_rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """`rms_norm` of each of ``groups`` equal parts of the last axis. weight: (c,), as x's last axis."""
    return rms_norm(x.unflatten(-1, (groups, -1)), weight.view(groups, -1), eps).flatten(-2)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, *, gate_first: bool = True) -> Tensor:
    """Gate with SiLU(z), and RMS-normalise each of ``groups`` equal parts of the last axis (Mamba-2's gated norm).

    Args:
        y, z: (b, l, c). weight: (c,).
        gate_first: what is normalised is the gated y; otherwise y itself, which is gated afterwards.
    """
    return multiplied_rms_norm(y, F.silu(z), weight, eps, groups, gate_first=gate_first)


def multiplied_rms_norm(
    y: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int, *, gate_first: bool = True
) -> Tensor:
    """`gated_rms_norm` of a gate that SiLU has been applied to already."""
    if torch.is_grad_enabled() and compiled.differentiable(y, gate) and any(t.requires_grad for t in (y, gate, weight)):
        normed: Tensor = CompiledNorm.apply(y, gate, weight.to(y.dtype), eps, groups, gate_first)  # type: ignore[no-untyped-call]
        return normed
    if gate_first:
        return group_rms_norm(y * gate, weight, eps, groups)
    return group_rms_norm(y, weight, eps, groups) * gate


class CompiledNorm(torch.autograd.Function):
    """`multiplied_rms_norm` with both passes as one loop each; autograd's own take a dozen, and keep five tensors."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int, gate_first: bool) -> Tensor:
        ctx.save_for_backward(y, gate, weight)
        ctx.constants = eps, groups, gate_first
        out = torch.empty(y.shape, dtype=y.dtype)
        rows = [part.reshape(-1, groups, y.shape[-1] // groups) for part in (y, gate, out)]
        by_group = weight.reshape(groups, -1).clone()
        loop = compiled.backward_kernels.gated_norm
        compiled.in_threads(loop, rows[0].shape[0], *rows[:2], by_group, eps, gate_first, rows[2])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, weight = ctx.saved_tensors
        eps, groups, gate_first = ctx.constants
        dy = torch.empty(y.shape, dtype=y.dtype)
        dgate = torch.empty(y.shape if ctx.needs_input_grad[1] else (0, y.shape[-1]), dtype=y.dtype)
        rows = [part.reshape(-1, groups, y.shape[-1] // groups) for part in (y, gate, dout, dy, dgate)]
        dweight = torch.zeros(_PARTS, groups, y.shape[-1] // groups, dtype=y.dtype)
        by_group = weight.reshape(groups, -1).clone()
        loop = compiled.backward_kernels.gated_norm_backward
        compiled.in_threads(loop, _PARTS, *rows[:3], by_group, eps, gate_first, *rows[3:], dweight)
        return dy, dgate if ctx.needs_input_grad[1] else None, dweight.sum(0).view_as(weight), None, None, None
