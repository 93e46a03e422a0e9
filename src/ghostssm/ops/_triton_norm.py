"""RMS norms, and what the kernels share. Importing this needs triton; `ghostssm.ops.decode` is what to call."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostssm.ops import gpu


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def group_norm(
    y,
    z,
    z_stride,
    weight,
    out,
    eps,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    LANES: tl.constexpr,
):
    """RMS norm of one group and one sequence, and the gate SiLU(z) before or after it. Program (g, b).

    y (b, GROUPS * SIZE), z (b, GROUPS * SIZE) with a row stride or None for no gate, weight (GROUPS * SIZE,).
    """
    sequence = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, LANES)
    inside = lanes < SIZE
    cells = tl.program_id(0) * SIZE + lanes
    value = tl.load(y + sequence * GROUPS * SIZE + cells, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + cells, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        gate = silu(tl.load(z + sequence * z_stride + cells, mask=inside, other=0.0).to(tl.float32))
        if GATE_FIRST:
            value *= gate
        else:
            scale *= gate
    normed = value * tl.rsqrt(tl.sum(value * value) / SIZE + eps) * scale
    tl.store(out + sequence * GROUPS * SIZE + cells, normed.to(out.dtype.element_ty), mask=inside)


def norm_step(
    y: Tensor, z: Tensor | None, weight: Tensor, eps: float, groups: int, dtype: torch.dtype, gate_first: bool
) -> Tensor:
    """`ghostssm.ops.decode.norm_step`."""
    batch, width = y.shape
    out = torch.empty(batch, width, dtype=dtype, device=y.device)
    size = width // groups
    lanes = triton.next_power_of_2(size)
    z, warps = None if z is None else with_dense_rows(z), min(16, max(1, lanes // 512))
    with gpu.on_device_of(y):
        group_norm[(groups, batch)](
            y.contiguous(),
            z,
            stride_of(z),
            weight,
            out,
            eps,
            GROUPS=groups,
            SIZE=size,
            GATE_FIRST=gate_first,
            LANES=lanes,
            num_warps=warps,
        )
    return out


def with_dense_rows(tensor: Tensor) -> Tensor:
    """A tensor whose last axis is dense."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def stride_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)
