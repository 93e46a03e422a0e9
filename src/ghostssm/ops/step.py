"""One token of a mixer's convolution and recurrence, in place: the state is read once and written once.

With numba installed (extra ``cpu``) the loops are compiled; without it, or off the CPU, the same is
done by torch operations, on the CPU one sequence at a time so that its state stays in the cache between the passes.
Shape letters as in `ghostssm.ops.ssd`; the readable reference is `ghostssm.ops.ssd.ssd_step`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostssm.ops import compiled
from ghostssm.ops.state_format import FLOAT32_STORAGE, StateStorage
from ghostssm.ops.stored import stored_scan_

_COMPILED_WIDTH = 4
"""Of the convolution, in every published model."""


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def project_streams(stream: Tensor, maps: Tensor) -> Tensor:
    """B or C (..., g, n) through maps (g, n, r): (..., g, r).

    A batched product, also of one group: what a plain one gives in the last bit depends on where the tensors lie.
    """
    return torch.einsum("...gn,gnr->...gr", stream, maps.to(stream.dtype))


def conv_step_(window: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shift a token into the convolution's window, in place, and return SiLU of the convolution there.

    Args:
        window: (b, c, width), the last inputs, oldest first; updated.
        x: (b, c). weight: (c, width). bias: (c,) or None.

    Returns:
        (b, c), float32 or better.
    """
    if compiled.usable(window, x, weight, bias) and window.is_contiguous() and window.shape[2] == _COMPILED_WIDTH:
        out = torch.empty(x.shape, dtype=x.dtype)
        offset = torch.zeros(x.shape[1], dtype=x.dtype) if bias is None else bias
        compiled.kernels.conv_step(*compiled.arrays(window, x, weight, offset, out))
        return F.silu(out, inplace=True)
    window.copy_(torch.cat([window[..., 1:], x[..., None].to(window.dtype)], dim=-1))
    wide = torch.promote_types(x.dtype, torch.float32)  # half precision would round after every tap
    mixed = (window.to(wide) * weight).sum(-1)
    return F.silu(mixed if bias is None else mixed + bias)


def ssd_step_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    storage: StateStorage = FLOAT32_STORAGE,
) -> Tensor:
    """One token of the recurrence, in place.

    Args:
        state: (b, h, p, n), float32, or as `ghostssm.ops.state_format.quantise` gives it for ``storage``; updated.
        x: (b, h, p). dt: (b, h), after softplus. A: (h,), negative. B, C: (b, g, n). D: (h,). All float32.

    Returns:
        y: (b, h, p), float32, of the state before it is rounded.
    """
    if storage.rounds:
        x, dt, B, C = (part.unsqueeze(1) for part in (x, dt, B, C))
        return stored_scan_(state, storage, x, dt, A, B, C, D)[:, 0]
    if compiled.usable(state, x, dt, A, B, C, D) and state.is_contiguous():
        y = torch.empty(x.shape, dtype=x.dtype)
        compiled.kernels.ssd_step(*compiled.arrays(state, x, dt, A, B, C, D, y))
        return y
    return _ssd_step_torch(state, x, dt, A, B, C, D)


def _ssd_step_torch(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    b, h, p, n = state.shape
    g = B.shape[1]
    grouped = state.view(b, g, h // g, p, n)
    decay = torch.exp(dt * A).view(b, g, h // g, 1, 1)
    u = (x * dt[..., None]).view(b, g, h // g, p, 1)
    y = torch.empty_like(u)
    # A sequence's state fits a processor's cache, a batch of them does not.
    spans = [slice(i, i + 1) for i in range(b)] if state.device.type == "cpu" else [slice(0, b)]
    for span in spans:
        new = grouped[span].to(u.dtype).mul_(decay[span]) if state.dtype != u.dtype else grouped[span].mul_(decay[span])
        new.addcmul_(u[span], B[span, :, None, None])
        y[span] = torch.matmul(new, C[span, :, None, :, None])  # `out=` refuses to record a gradient
        if state.dtype != u.dtype:
            grouped[span] = new
    return torch.addcmul(y.view(b, h, p), D[:, None], x)
