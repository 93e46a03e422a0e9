"""The SSD recurrence of Mamba-2: token by token as the readable reference, in chunks, and compiled.

Per head, with the scalar decay ``a_t = exp(dt_t * A)`` and the input ``u_t = dt_t * x_t`` (Dao & Gu 2024, eq. 16-19):

    H_t = a_t H_{t-1} + u_t B_t^T          H: (p, n)
    y_t = H_t C_t + D x_t

Shape letters, always in this order: b batch, l length, q position in a chunk, g group, k heads of a group, h head
(h = g * k + index in the group), p head dim, n state size.

States are ``(b, h, p, n)``, the layout of every Mamba-2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ghostssm.ops import compiled, gpu
from ghostssm.ops.chunks import DEFAULT_CHUNK, chunks_of, from_grouped_state, to_grouped_state

_PARTS = 32
"""About how many pieces the compiled backward pass is cut into: by shapes, not threads, so that sums stay the same."""


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token: slow, and plainly right. Same signature as `ssd_chunked`."""
    state = _initial_state(x, B, initial_state)
    outputs = []
    for t in range(x.shape[1]):
        y, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        outputs.append(y)
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x), state


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence.

    Args:
        state: (b, h, p, n), the state before the token; not modified.
        x: (b, h, p). dt: (b, h), after softplus and limits. A: (h,), negative. B, C: (b, g, n). D: (h,) or None.

    Returns:
        y (b, h, p) and the state after the token (b, h, p, n).
    """
    b, h, p, n = state.shape
    g = B.shape[1]
    decay = torch.exp(dt * A).view(b, g, h // g, 1, 1)
    u = (x * dt[..., None]).view(b, g, h // g, p, 1)
    grouped = state.view(b, g, h // g, p, n) * decay + u * B[:, :, None, None, :]
    y = (grouped @ C[:, :, None, :, None]).view(b, h, p)
    if D is not None:
        y = y + D[:, None] * x
    return y, grouped.view(b, h, p, n)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in the fastest form at hand; arguments and results as `ssd_chunked` has them.

    On a CPU that is a compiled loop over tokens: a matrix product over a chunk does more arithmetic per token than the
    recurrence itself, and pays for it only where the recurrence can't be kept in a register or a first-level cache. On
    a GPU it is that loop as one kernel, which keeps the state in registers over the whole sequence.

    x, B and C may also be in half precision: then y is in x's dtype, and all arithmetic and the final state in float32.

    Differentiable once in every argument, whichever form serves the call. Gradients of B and C, which are sums over a
    group's heads, do not depend on the number of threads.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dt, A, initial_state = dt.to(wide), A.to(wide), None if initial_state is None else initial_state.to(wide)
    D = None if D is None else D.to(wide)
    y: Tensor
    state: Tensor
    if gpu.differentiable(x, dt, A, B, C, D, initial_state):
        y, state = FusedScan.apply(x, dt, A, B, C, D, initial_state)  # type: ignore[no-untyped-call]
        return y, state
    arguments = (x.to(wide), dt, A, B.to(wide), C.to(wide), D, initial_state)
    if compiled.differentiable(*arguments):
        y, state = CompiledScan.apply(*arguments)  # type: ignore[no-untyped-call]
    elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y, state = ChunkedScan.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        y, state = ssd_chunked(*arguments)
    return y.to(x.dtype), state


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK,
) -> tuple[Tensor, Tensor]:
    """The recurrence as matrix products over chunks of positions; differentiable.

    Args:
        x: (b, l, h, p), float32 or float64.
        dt: (b, l, h), the step size after softplus and limits.
        A: (h,), negative.
        B, C: (b, l, g, n), h divisible by g.
        D: (h,) or None.
        initial_state: (b, h, p, n) or None for zeros.
        chunk_size: positions per chunk; any value gives the same result, l need not be a multiple of it.

    Returns:
        y (b, l, h, p) and the final state (b, h, p, n).
    """
    state = to_grouped_state(_initial_state(x, B, initial_state), groups=B.shape[2])
    outputs = []
    for _, chunk in chunks_of(x, dt, A, B, C, chunk_size):
        outputs.append(chunk.output(state, D))
        state = chunk.advance(state)
    y = torch.cat(outputs, dim=1).flatten(2, 3) if outputs else torch.zeros_like(x)
    return y, from_grouped_state(state, heads=x.shape[2])


class CompiledScan(torch.autograd.Function):
    """The compiled loop, with a backward pass that keeps nothing but the arguments."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state)
        ctx.set_materialize_grads(False)
        state = _initial_state(x, B, initial_state).clone(memory_format=torch.contiguous_format)
        y = torch.empty(x.shape, dtype=x.dtype)
        skip = _skip(A, D)
        narrow = B.shape[-1] <= x.shape[-1]
        scan = compiled.kernels.ssd_scan_narrow if narrow else compiled.kernels.ssd_scan
        scan(*compiled.arrays(state, x, dt, A, B, C, skip, y))
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial_state = ctx.saved_tensors
        (b, length, h, _), (groups, n) = x.shape, B.shape[2:]
        state = _initial_state(x, B, initial_state)
        dy = torch.zeros_like(x) if dy is None else dy
        dstate = torch.zeros_like(state) if dstate is None else dstate.clone(memory_format=torch.contiguous_format)
        # What nothing asks for has no positions, by which the loop knows.
        dx = torch.empty((b, length if ctx.needs_input_grad[0] else 0, *x.shape[2:]), dtype=x.dtype)
        ddt, skip = torch.empty(dt.shape, dtype=x.dtype), _skip(A, D)
        dA, dD = torch.zeros(2, b, h, dtype=torch.float64)
        dB, dC = torch.zeros(2, b, groups, gradient_parts(b, h, groups), length, n, dtype=x.dtype)
        loop, pieces = compiled.backward_kernels.ssd_scan_backward, dB.shape[:3].numel()
        compiled.in_threads(loop, pieces, state, x, dt, A, B, C, skip, dy, dstate, dx, ddt, dA, dB, dC, dD)
        dB, dC = dB.sum(2).transpose(1, 2), dC.sum(2).transpose(1, 2)
        dD = None if D is None else dD.sum(0).to(D.dtype)
        gradients = ddt, dA.sum(0).to(A.dtype), dB, dC, dD, None if initial_state is None else dstate
        return (dx if ctx.needs_input_grad[0] else None), *gradients


class FusedScan(torch.autograd.Function):
    """Triton's loop, with a backward pass in chunks that keeps nothing but the arguments."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state)
        ctx.set_materialize_grads(False)
        y_and_state: tuple[Tensor, Tensor] = gpu.kernels("scan").ssd(x, dt, A, B, C, D, initial_state)
        return y_and_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial_state = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        gradients = gpu.kernels("chunks").ssd_backward(x, dt, A, B, C, D, initial_state, dy, dstate)
        return tuple(
            gradient if asked else None for gradient, asked in zip(gradients, ctx.needs_input_grad, strict=True)
        )


def gradient_parts(b: int, h: int, groups: int) -> int:
    """Sums over some of a group's heads each, in which a compiled backward pass computes the gradients of B and C."""
    heads_per_part = min(h // groups, -(-b * h // _PARTS))
    return -(-(h // groups) // heads_per_part)


class ChunkedScan(torch.autograd.Function):
    """`ssd_chunked` with a backward pass that keeps the arguments and the states between chunks, and nothing else.

    Chunks are walked from the end and computed anew, one after the other: what autograd would keep for `ssd_chunked`
    is several times as large as the model's other activations.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        state = to_grouped_state(_initial_state(x, B, initial_state), groups=B.shape[2])
        y, states = torch.empty(x.shape, dtype=x.dtype, device=x.device), []
        for span, chunk in chunks_of(x, dt, A, B, C):
            states.append(state)
            y[:, span] = chunk.output(state, D).flatten(2, 3)
            state = chunk.advance(state)
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, *states)
        return y, from_grouped_state(state, heads=x.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial_state, *states = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        dstate = torch.zeros_like(_initial_state(x, B, initial_state)) if dstate is None else dstate
        dstate = to_grouped_state(dstate, groups=B.shape[2])
        dx, dlog_decay = torch.empty_like(x), torch.empty(dt.shape, dtype=torch.float64, device=x.device)
        ddt, dB, dC = torch.empty_like(dt), torch.empty_like(B), torch.empty_like(C)
        for span, chunk in chunks_of(x, dt, A, B, C, backwards=True):
            dout = dy[:, span].unflatten(2, chunk.u.shape[1:3]).permute(0, 2, 3, 1, 4)
            gradients = chunk.backward(states.pop(), dout, dstate)
            du = gradients.du.permute(0, 3, 1, 2, 4).flatten(2, 3)
            dx[:, span] = du * dt[:, span, :, None]
            ddt[:, span] = (du * x[:, span]).sum(-1)
            dlog_decay[:, span] = gradients.dlog_decay.permute(0, 3, 1, 2).flatten(2)
            dB[:, span], dC[:, span] = gradients.dB.transpose(1, 2), gradients.dC.transpose(1, 2)
            dstate = gradients.dstate
        dA = (dlog_decay * dt).sum((0, 1)).to(A.dtype)
        ddt += (dlog_decay * A).to(dt.dtype)
        dD = None
        if D is not None:
            dD = (dy * x).sum((0, 1, 3)).to(D.dtype)
            dx += dy * D[:, None]
        dinitial = None if initial_state is None else from_grouped_state(dstate, heads=x.shape[2])
        return dx, ddt, dA, dB, dC, dD, dinitial


def _skip(A: Tensor, D: Tensor | None) -> Tensor:
    """D for a compiled loop: a copy, since D is a weight (`compiled.arrays`)."""
    return torch.zeros_like(A) if D is None else D.clone()


def _initial_state(x: Tensor, B: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(x.dtype)
    b, _, h, p = x.shape
    return x.new_zeros(b, h, p, B.shape[-1])
