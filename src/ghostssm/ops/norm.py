"""The normalisations around a mixer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
