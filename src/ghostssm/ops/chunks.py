"""The recurrence of `ghostssm.ops.ssd` as matrix products over chunks of positions, forwards and backwards.

Shape letters as there. Here states are ``(b, g, n, k * p)``: then all heads of a group share one matrix product with B
or C, and B and C are never repeated over heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_CHUNK = 64


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
        heads: Tensor = product.unflatten(-1, (self.u.shape[2], -1))
        return heads.transpose(2, 3)

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


def chunks_of(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = DEFAULT_CHUNK, *, backwards: bool = False
) -> Iterator[tuple[slice, Chunk]]:
    """The chunks of a sequence, each made when its turn comes, and where they are."""
    starts = range(0, x.shape[1], chunk_size)
    for start in reversed(starts) if backwards else starts:
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
