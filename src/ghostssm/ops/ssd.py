"""The SSD recurrence of Mamba-2: token by token as the readable reference, in chunks, and compiled.

Per head, with the scalar decay ``a_t = exp(dt_t * A)`` and the input ``u_t = dt_t * x_t`` (Dao & Gu 2024, eq. 16-19):

    H_t = a_t H_{t-1} + u_t B_t^T          H: (p, n)
    y_t = H_t C_t + D x_t

Shape letters, always in this order: b batch, l length, q position in a chunk, g group, k heads of a group, h head
(h = g * k + index in the group), p head dim, n state size.

States cross the public functions as ``(b, h, p, n)``, the layout of every Mamba-2 cache. Inside the chunked form they
are ``(b, g, n, k * p)``: then all heads of a group share one matrix product with B or C, and B and C are never
repeated over heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ghostssm.ops import compiled, gpu

DEFAULT_CHUNK = 64


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
    """
    initial_state = None if initial_state is None else initial_state.to(x.dtype)
    arguments = (x, dt, A, B, C, D, initial_state)
    found: tuple[Tensor, Tensor]
    if gpu.usable_in_float32(*arguments):
        found = gpu.scan_kernels().ssd(*arguments)
    elif compiled.usable(*arguments):
        state = _initial_state(x, B, initial_state).clone(memory_format=torch.contiguous_format)
        y = torch.empty(x.shape, dtype=x.dtype)
        skip = torch.zeros_like(A) if D is None else D
        compiled.kernels.ssd_scan(*compiled.arrays(state, x, dt, A, B, C, skip, y))
        found = y, state
    elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found = DifferentiableScan.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        found = ssd_chunked(*arguments)
    return found


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
    for _, chunk in _chunks(x, dt, A, B, C, chunk_size):
        outputs.append(chunk.output(state, D))
        state = chunk.advance(state)
    y = torch.cat(outputs, dim=1).flatten(2, 3) if outputs else torch.zeros_like(x)
    return y, from_grouped_state(state, heads=x.shape[2])


@dataclass(frozen=True)
class Chunk:
    """One chunk of positions, laid out by group, with what its matrix products share.

    Attributes:
        x: (b, g, k, q, p). u: the same, dt * x.
        B, C: (b, g, q, n).
        log_decay: (b, g, k, q), float64: sum of dt * A from the start of the chunk up to and including each position.
            These sums grow to hundreds where decay is fast, and small differences of them matter.
    """

    x: Tensor
    u: Tensor
    B: Tensor
    C: Tensor
    log_decay: Tensor

    @classmethod
    def of(cls, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Chunk:
        """From the streams of one chunk: x (b, q, h, p), dt (b, q, h), A (h,), B and C (b, q, g, n)."""
        b, q, h, p = x.shape
        g = B.shape[2]
        heads = (b, q, g, h // g, p)
        u = (x * dt[..., None]).view(heads).permute(0, 2, 3, 1, 4)
        log_decay = torch.cumsum((dt * A).double(), dim=1).view(b, q, g, h // g).permute(0, 2, 3, 1)
        return cls(x.reshape(heads).permute(0, 2, 3, 1, 4), u, B.transpose(1, 2), C.transpose(1, 2), log_decay)

    def pairwise_decay(self) -> Tensor:
        """(b, g, k, q, q): the decay from position s to position t; 0 where s > t."""
        q = self.u.shape[3]
        future = torch.ones(q, q, dtype=torch.bool, device=self.u.device).triu(1)
        difference = self.log_decay[..., :, None] - self.log_decay[..., None, :]
        return difference.to(self.u.dtype).masked_fill_(future, float("-inf")).exp_()

    def decay_from_start(self) -> Tensor:
        """(b, g, k, q): what is left at each position of the state that entered the chunk."""
        return torch.exp(self.log_decay).to(self.u.dtype)

    def output(self, state: Tensor, D: Tensor | None = None) -> Tensor:
        """y, (b, q, g, k, p), given the state (b, g, n, k * p) that enters the chunk."""
        b, g, k, q, p = self.u.shape
        scores = (self.C @ self.B.transpose(-1, -2))[:, :, None] * self.pairwise_decay()
        carried = (self.C @ state).view(b, g, q, k, p).transpose(2, 3)
        y = torch.addcmul(scores @ self.u, self.decay_from_start()[..., None], carried)
        if D is not None:
            y = torch.addcmul(y, D.view(g, k, 1, 1), self.x)
        return y.permute(0, 3, 1, 2, 4)

    def advance(self, state: Tensor) -> Tensor:
        """The state (b, g, n, k * p) that leaves the chunk, given the one that enters it."""
        b, g, k, q, p = self.u.shape
        total = self.log_decay[..., -1:]
        to_end = self.u * torch.exp(total - self.log_decay).to(self.u.dtype)[..., None]
        added = to_end.transpose(2, 3).reshape(b * g, q, k * p)
        kept = state.view(b, g, -1, k, p) * torch.exp(total).to(self.u.dtype)[:, :, None]
        B = self.B.reshape(b * g, q, -1).transpose(-1, -2)
        return torch.baddbmm(kept.view(b * g, -1, k * p), B, added).view_as(state)

    def backward(self, state: Tensor, dy: Tensor, dstate: Tensor) -> ChunkGradients:
        """The gradients of what `output` (without D) and `advance` return.

        state: (b, g, n, k * p), as it entered the chunk. dy: (b, g, k, q, p). dstate: the gradient of the state that
        leaves the chunk, as state.
        """
        decay, scores = self.pairwise_decay(), self.C @ self.B.transpose(-1, -2)
        paired = (dy @ self.u.transpose(-1, -2)).mul_(decay)
        dscores = paired.sum(2)
        # A decay's gradient is what passes over it. A position's own part does not, and would only leave its rounding.
        paired.diagonal(dim1=-2, dim2=-1).zero_()
        paired.mul_(scores[:, :, None])
        passing = paired.sum(-1) - paired.sum(-2)
        du = decay.mul_(scores[:, :, None]).transpose(-1, -2) @ dy

        total = self.log_decay[..., -1:]
        to_end = torch.exp(total - self.log_decay).to(dy.dtype)[..., None]
        kept = torch.exp(total).to(dy.dtype)
        faded_dy, faded_u = dy * self.decay_from_start()[..., None], self.u * to_end
        from_state, from_dstate = self._by_head(self.C @ state), self._by_head(self.B @ dstate)
        du += to_end * from_dstate
        into_end = (faded_u * from_dstate).sum(-1)
        passing += (faded_dy * from_state).sum(-1) - into_end
        through = (self._by_head(state) * self._by_head(dstate)).sum((-1, -2))[..., None] * kept
        dlog_decay = passing.double().flip(-1).cumsum(-1).flip(-1) + (through + into_end.sum(-1, keepdim=True))

        faded_dy, faded_u = self._by_group(faded_dy), self._by_group(faded_u)
        dB = dscores.transpose(-1, -2) @ self.C + faded_u @ dstate.transpose(-1, -2)
        dC = dscores @ self.B + faded_dy @ state.transpose(-1, -2)
        entering = self._by_group(self._by_head(dstate) * kept[..., None]) + self.C.transpose(-1, -2) @ faded_dy
        return ChunkGradients(du, dlog_decay, dB, dC, entering)

    def _by_head(self, product: Tensor) -> Tensor:
        """(b, g, anything, k * p) to (b, g, k, anything, p)."""
        return product.unflatten(-1, (self.u.shape[2], -1)).transpose(2, 3)

    def _by_group(self, product: Tensor) -> Tensor:
        """(b, g, k, anything, p) to (b, g, anything, k * p)."""
        return product.transpose(2, 3).flatten(-2)


@dataclass(frozen=True)
class ChunkGradients:
    """Gradients of one chunk.

    Attributes:
        du: (b, g, k, q, p). dlog_decay: (b, g, k, q), of each position's own dt * A, float64. dB, dC: (b, g, q, n).
        dstate: (b, g, n, k * p), of the state that enters the chunk.
    """

    du: Tensor
    dlog_decay: Tensor
    dB: Tensor
    dC: Tensor
    dstate: Tensor


class DifferentiableScan(torch.autograd.Function):
    """`ssd_chunked` with a backward pass that keeps the arguments and the states between chunks, and nothing else.

    Chunks are walked from the end and computed anew, one after the other: what autograd would keep for `ssd_chunked`
    is several times as large as the model's other activations.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, initial_state = arguments
        ctx.set_materialize_grads(False)
        state = to_grouped_state(_initial_state(x, B, initial_state), groups=B.shape[2])
        y, states = torch.empty(x.shape, dtype=x.dtype, device=x.device), []
        for span, chunk in _chunks(x, dt, A, B, C):
            states.append(state)
            y[:, span] = chunk.output(state, D).flatten(2, 3)
            state = chunk.advance(state)
        ctx.save_for_backward(*arguments, *states)
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
        for (span, chunk), state in reversed(list(zip(_chunks(x, dt, A, B, C), states, strict=True))):
            dout = dy[:, span].unflatten(2, chunk.u.shape[1:3]).permute(0, 2, 3, 1, 4)
            found = chunk.backward(state, dout, dstate)
            du = found.du.permute(0, 3, 1, 2, 4).flatten(2, 3)
            dx[:, span] = du * dt[:, span, :, None]
            ddt[:, span] = (du * x[:, span]).sum(-1)
            dlog_decay[:, span] = found.dlog_decay.permute(0, 3, 1, 2).flatten(2)
            dB[:, span], dC[:, span] = found.dB.transpose(1, 2), found.dC.transpose(1, 2)
            dstate = found.dstate
        dA = (dlog_decay * dt).sum((0, 1)).to(A.dtype)
        ddt += (dlog_decay * A).to(dt.dtype)
        dD = None
        if D is not None:
            dD = (dy * x).sum((0, 1, 3)).to(D.dtype)
            dx += dy * D[:, None]
        dinitial = None if initial_state is None else from_grouped_state(dstate, heads=x.shape[2])
        return dx, ddt, dA, dB, dC, dD, dinitial


def _chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = DEFAULT_CHUNK
) -> Iterator[tuple[slice, Chunk]]:
    """The chunks of a sequence and where they are."""
    for start in range(0, x.shape[1], chunk_size):
        span = slice(start, start + chunk_size)
        yield span, Chunk.of(x[:, span], dt[:, span], A, B[:, span], C[:, span])


def to_grouped_state(state: Tensor, groups: int) -> Tensor:
    """(b, h, p, n) to the internal (b, g, n, k * p)."""
    b, h, p, n = state.shape
    return state.view(b, groups, h // groups, p, n).permute(0, 1, 4, 2, 3).reshape(b, groups, n, -1)


def from_grouped_state(state: Tensor, heads: int) -> Tensor:
    """The internal (b, g, n, k * p) to (b, h, p, n)."""
    b, g, n, _ = state.shape
    return state.view(b, g, n, heads // g, -1).permute(0, 1, 3, 4, 2).reshape(b, heads, -1, n)


def _initial_state(x: Tensor, B: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(x.dtype)
    b, _, h, p = x.shape
    return x.new_zeros(b, h, p, B.shape[-1])
