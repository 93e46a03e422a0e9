"""Energies of the state channels, summed over tokens and heads: what GHOST's score is made of.

For every token t, head h and channel n the energy is E_t[h, n] = sum_p H_t[h, p, n]^2. From the recurrence
H_t = a_t H_{t-1} + u_t B_t^T it obeys a scalar recurrence of its own,

    E_t[n] = a_t^2 E_{t-1}[n] + F_t[n],
    F_t[n] = 2 B_t[n] a_t r_t[n] + |u_t|^2 B_t[n]^2,      r_t[n] = sum_p u_t[p] H_{t-1}[p, n].

r reads the state with u over p where an SSD output reads it with C over n, so all of it has the chunked form of SSD and
no state is materialised at single tokens. Shape letters as in `ghostssm.ops.ssd`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostssm.ops import compiled, gpu
from ghostssm.ops.chunks import DEFAULT_CHUNK, Chunk, chunks_of, to_grouped_state
from ghostssm.ops.ssd import ssd_step


@dataclass(frozen=True)
class ChannelEnergies:
    """Sums over batch, tokens and the heads of each group, float64, each (g, n).

    Attributes:
        output: sum of C_t[n]^2 H_t[p, n]^2, the squared change of y when channel n alone is zeroed.
        state: sum of H_t[p, n]^2 (controllability).
        readout: sum of C_t[n]^2 (observability), over batch and tokens only.
    """

    output: Tensor
    state: Tensor
    readout: Tensor


def channel_energies_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> ChannelEnergies:
    """The definition, token by token with the state in hand. Same signature as `channel_energies`."""
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    state = x.new_zeros(b, h, p, n) if initial_state is None else initial_state
    output = x.new_zeros(g, n, dtype=torch.float64)
    stored = torch.zeros_like(output)
    for t in range(length):
        _, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t])
        energy = state.double().square().sum(2).unflatten(1, (g, h // g)).sum(2)
        stored += energy.sum(0)
        output += (C[:, t].double().square() * energy).sum(0)
    return ChannelEnergies(output, stored, C.double().square().sum((0, 1)))


def channel_energies(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> ChannelEnergies:
    """The energies in the fastest form at hand: a compiled loop over tokens on a CPU, a kernel on a GPU, else chunks.

    Args:
        x: (b, l, h, p), float32 or float64. dt: (b, l, h), after softplus and limits. A: (h,), negative.
        B, C: (b, l, g, n). initial_state: (b, h, p, n) or None for zeros.
    """
    b, _, h, p = x.shape
    g, n = B.shape[2:]
    if gpu.usable_in_float32(x, dt, A, B, C, initial_state):
        by_head = gpu.kernels("scan").channel_energies(x, dt, A, B, C, initial_state)
        output, stored = (part.sum(0).view(g, h // g, n).sum(1) for part in by_head)
        return ChannelEnergies(output, stored, C.double().square().sum((0, 1)))
    if not compiled.usable(x, dt, A, B, C, initial_state):
        return channel_energies_chunked(x, dt, A, B, C, initial_state)
    state = (
        torch.zeros(b, h, p, n, dtype=torch.float32)
        if initial_state is None
        else initial_state.clone(memory_format=torch.contiguous_format)
    )
    output = torch.zeros(b, h, compiled.kernels.row_blocks(p), n, dtype=torch.float64)
    stored = torch.zeros_like(output)
    loop, pieces = compiled.kernels.channel_energies, output[..., 0].numel()
    compiled.in_threads(loop, pieces, state, x, dt, A, B, C, output, stored)
    return ChannelEnergies(
        output.sum((0, 2)).view(g, h // g, n).sum(1),
        stored.sum((0, 2)).view(g, h // g, n).sum(1),
        C.double().square().sum((0, 1)),
    )


def channel_energies_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK,
) -> ChannelEnergies:
    """The energies by matrix products over chunks; arguments as `channel_energies` has them."""
    b, _, h, p = x.shape
    g, n = B.shape[2:]
    if initial_state is None:
        initial_state = x.new_zeros(b, h, p, n)
    state = to_grouped_state(initial_state, groups=g)
    energy = initial_state.square().sum(2).view(b, g, h // g, n)
    output = torch.zeros(g, n, dtype=torch.float64, device=x.device)
    stored = torch.zeros_like(output)
    for _, chunk in chunks_of(x, dt, A, B, C, chunk_size):
        energies = _energies_in(chunk, state, energy)
        by_token = energies.sum(2)
        output += (chunk.C.square() * by_token).sum((0, 2))
        stored += by_token.sum((0, 2))
        energy = energies[:, :, :, -1]
        state = chunk.advance(state)
    return ChannelEnergies(output, stored, C.double().square().sum((0, 1)))


def _energies_in(chunk: Chunk, state: Tensor, energy: Tensor) -> Tensor:
    """E_t for every token of a chunk, (b, g, k, q, n), from the state (b, g, n, k * p) and E (b, g, k, n) before it."""
    b, g, k, _, p = chunk.u.shape
    n = chunk.B.shape[-1]
    B = chunk.B[:, :, None]
    from_start = chunk.decay_from_start()[..., None]
    decay = chunk.pairwise_decay()
    inner = chunk.u @ chunk.u.transpose(-1, -2)
    squared_norm = inner.diagonal(dim1=-2, dim2=-1)[..., None]
    # a_t r_t: the part written earlier in this chunk (strictly before t), and the part carried in by the state.
    entering = state.view(b, g, n, k, p).permute(0, 1, 3, 4, 2)
    decayed_r = (inner * decay).tril(-1) @ B + from_start * (chunk.u @ entering)
    added = B * (2 * decayed_r + squared_norm * B)
    energies = decay.square() @ added + from_start.square() * energy[:, :, :, None]
    # A sum of squares; only rounding can make it negative.
    return energies.clamp_min(0)
