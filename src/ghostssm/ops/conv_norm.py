"""What stands around the recurrence in a mixer: the short depthwise causal convolution before it, norms after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostssm.ops import compiled


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
    if compiled.usable(x, weight, bias):
        out = torch.empty(x.shape, dtype=x.dtype)
        offset = torch.zeros(x.shape[2], dtype=x.dtype) if bias is None else bias.clone()
        compiled.kernels.causal_conv(*compiled.arrays(x, weight.t().contiguous(), offset, out))
        return out
    width, length = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    out = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
    for tap in range(width - 1):
        out = torch.addcmul(out, padded[:, tap : tap + length], weight[:, tap])
    return out


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
    gate = F.silu(z)
    if gate_first:
        return group_rms_norm(y * gate, weight, eps, groups)
    return group_rms_norm(y, weight, eps, groups) * gate
