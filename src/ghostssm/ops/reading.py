"""The states of a recurrence, read in many directions at some of its tokens.

Where an SSD output reads the state over n with C, this reads it over heads and head dim with directions u:

    M_t[d, n] = sum_(h in g, p) u_t[h, d, p] H_t[h, p, n].

So it has the chunked form of SSD too: what entered before the chunk, and what was written in it, weighted by decay.
Shape letters as in `ghostssm.ops.ssd`; s sampled token, d direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghostssm.ops import compiled, gpu
from ghostssm.ops.chunks import DEFAULT_CHUNK, Chunk, from_grouped_state, to_grouped_state


def read_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, u: Tensor, positions: Sequence[int], state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Read the states right after some tokens: a compiled loop over tokens on a CPU, matrix products elsewhere.

    On a GPU these are kernels that keep the states between chunks of tokens, and no others.

    Args:
        x: (b, l, h, p), float32 or float64. dt: (b, l, h), after softplus and limits. A: (h,), negative.
        B: (b, l, g, n).
        u: (b, s, h, d, p), the directions at each of the tokens. positions: s of them, ascending, less than l.
        state: (b, h, p, n) before the first token, or None for zeros; not modified.

    Returns:
        M, (b, s, g, d, n), and the state after the last token, (b, h, p, n).
    """
    if len(positions) and gpu.usable_in_float32(x, dt, A, B, u, state):
        read: tuple[Tensor, Tensor] = gpu.kernels("chunks").read_states(
            x, dt, A, B, u, torch.tensor(positions, device=x.device), state
        )
        return read
    if not compiled.usable(x, dt, A, B, u, state):
        return read_states_chunked(x, dt, A, B, u, positions, state)
    (b, _, h, p), (g, n) = x.shape, B.shape[2:]
    after = x.new_zeros(b, h, p, n) if state is None else state.clone(memory_format=torch.contiguous_format)
    reads = x.new_empty(len(positions), b, g, u.shape[3], n)
    loop, pieces = compiled.kernels.read_states, b * g * compiled.kernels.column_blocks(n)
    compiled.in_threads(loop, pieces, after, x, dt, A, B, u, torch.tensor(positions), reads)
    return reads.transpose(0, 1), after


def read_states_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    u: Tensor,
    positions: Sequence[int],
    state: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK,
) -> tuple[Tensor, Tensor]:
    """`read_states` by matrix products over chunks of tokens."""
    (b, length, h, p), (g, n), d = x.shape, B.shape[2:], u.shape[3]
    grouped = to_grouped_state(x.new_zeros(b, h, p, n) if state is None else state, groups=g)
    at = torch.tensor(positions, dtype=torch.int64, device=x.device)
    by_group = u.view(b, len(positions), g, h // g, d, p).permute(0, 2, 3, 1, 4, 5)
    reads, done = [x.new_zeros(b, 0, g, d, n)], 0
    for start in range(0, length, chunk_size):
        span = slice(start, start + chunk_size)
        chunk = Chunk.of(x[:, span], dt[:, span], A, B[:, span], B[:, span])
        count = sum(start <= position < span.stop for position in positions)
        inside = at[done : done + count] - start
        reads.append(_reads_in(chunk, grouped, by_group[:, :, :, done : done + count], inside))
        done += count
        grouped = chunk.advance(grouped)
    return torch.cat(reads, dim=1), from_grouped_state(grouped, heads=h)


def _reads_in(chunk: Chunk, state: Tensor, u: Tensor, at: Tensor) -> Tensor:
    """M at some tokens of a chunk, (b, s, g, d, n), from the state (b, g, n, k * p) before it; u (b, g, k, s, d, p)."""
    b, g, k, s, d, p = u.shape
    inner = (u.flatten(3, 4) @ chunk.u.transpose(-1, -2)).unflatten(3, (s, d))
    written = torch.einsum("bgksdq,bgksq->bgsdq", inner, chunk.pairwise_decay()[:, :, :, at])
    entered = u * chunk.decay_from_start()[:, :, :, at, None, None]
    rows = entered.permute(0, 1, 3, 4, 2, 5).reshape(b, g, s * d, k * p)
    reads = rows @ state.transpose(-1, -2) + written.flatten(2, 3) @ chunk.B
    return reads.view(b, g, s, d, state.shape[2]).transpose(1, 2)


def read_and_pull(
    maps: Tensor, directions: Tensor, along: Tensor, readouts: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """What linear maps make of vectors, and what the maps' transposes make of that.

    A map is maps - share * directions along^T. On a CPU each is fetched from memory once.

    Args:
        maps: (s, g, d, n). directions: (s, g, d). along, readouts: (s, g, n).

    Returns:
        output (s, d), summed over groups, and pull (s, g, n), half the gradient of |output|^2.
    """
    output, pull = maps.new_empty(maps.shape[0], maps.shape[2]), torch.empty_like(along)
    if compiled.usable(maps, directions, along, readouts):
        parts = compiled.arrays(maps, directions, along, readouts, maps.new_tensor([share]), output, pull)
        compiled.kernels.read_and_pull(*parts)
        return output, pull
    inner = (along * readouts).sum(-1)
    output = torch.einsum("sgdn,sgn->sd", maps, readouts) - share * torch.einsum("sgd,sg->sd", directions, inner)
    back = torch.einsum("sgd,sd->sg", directions, output)
    return output, torch.einsum("sgdn,sd->sgn", maps, output) - share * back[..., None] * along
