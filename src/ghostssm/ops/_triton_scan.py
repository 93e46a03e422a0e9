"""Kernels over whole sequences, in which the state never leaves the registers: channel energies and the recurrence.

Importing this needs triton; `ghostssm.ops.energy` and `ghostssm.ops.ssd` are what to call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostssm.ops import gpu

STRETCH = 64
"""Tokens over which energies are summed in float32."""
_TILE = 1024
"""Numbers of the state that a program keeps, 32 per thread."""
_WARPS = 1
"""Of a program: a warp needs no barriers to share each token's numbers among its threads."""


@triton.jit
def energy_scan(
    x,
    x_batch,
    x_token,
    dt,
    dt_batch,
    dt_token,
    A,
    B,
    B_batch,
    B_token,
    C,
    C_batch,
    C_token,
    state,
    output,
    stored,
    length,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """Energies of some columns, over some rows of one head's state, for one sequence, token by token.

    Program (h * row blocks * column blocks, b). x (b, l, h, p), dt (b, l, h), B and C (b, l, g, n) with strides of
    batch and token; state (b, h, p, n) before the first token, or None for zeros; output and stored (b, h, row blocks,
    n), float64: sums over tokens and rows of C^2 H^2 and of H^2. Sums over a stretch of tokens are float32.
    """
    COLUMN_BLOCKS: tl.constexpr = (N + LANES - 1) // LANES
    ROW_BLOCKS: tl.constexpr = (P + ROWS - 1) // ROWS
    place = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    columns = (place % COLUMN_BLOCKS) * LANES + tl.arange(0, LANES)
    block = (place // COLUMN_BLOCKS) % ROW_BLOCKS
    head = place // (COLUMN_BLOCKS * ROW_BLOCKS)
    rows = block * ROWS + tl.arange(0, ROWS)

    x += sequence * x_batch + head * P + rows
    dt += sequence * dt_batch + head
    B += sequence * B_batch + (head // HEADS_PER_GROUP) * N + columns
    C += sequence * C_batch + (head // HEADS_PER_GROUP) * N + columns
    rate = tl.load(A + head)
    cells = (sequence * HEADS + head) * P * N + rows[:, None] * N + columns[None, :]
    H = tl.zeros((ROWS, LANES), tl.float32)
    if state is not None:
        H += tl.load(state + cells, mask=(rows[:, None] < P) & (columns[None, :] < N), other=0.0)

    # Every token's numbers are loaded while the one before it is worked on.
    now_x = tl.load(x, mask=rows < P, other=0.0)
    now_B = tl.load(B, mask=columns < N, other=0.0)
    now_C = tl.load(C, mask=columns < N, other=0.0)
    now_dt = tl.load(dt)
    total_output = tl.zeros((LANES,), tl.float64)
    total_stored = tl.zeros((LANES,), tl.float64)
    for first in range(0, length, STRETCH):
        out = tl.zeros((LANES,), tl.float32)
        kept = tl.zeros((LANES,), tl.float32)
        for t in range(first, tl.minimum(first + STRETCH, length)):
            ahead = tl.minimum(t + 1, length - 1).to(tl.int64)
            next_x = tl.load(x + ahead * x_token, mask=rows < P, other=0.0)
            next_B = tl.load(B + ahead * B_token, mask=columns < N, other=0.0)
            next_C = tl.load(C + ahead * C_token, mask=columns < N, other=0.0)
            next_dt = tl.load(dt + ahead * dt_token)
            H = H * tl.exp(now_dt * rate) + (now_x * now_dt)[:, None] * now_B[None, :]
            energy = tl.sum(H * H, axis=0)
            kept += energy
            out += energy * (now_C * now_C)
            now_x, now_B, now_C, now_dt = next_x, next_B, next_C, next_dt
        total_output += out.to(tl.float64)
        total_stored += kept.to(tl.float64)
    place_out = ((sequence * HEADS + head) * ROW_BLOCKS + block) * N + columns
    tl.store(output + place_out, total_output, mask=columns < N)
    tl.store(stored + place_out, total_stored, mask=columns < N)


@triton.jit
def ssd_scan(
    x,
    x_batch,
    x_token,
    dt,
    dt_batch,
    dt_token,
    A,
    B,
    B_batch,
    B_token,
    C,
    C_batch,
    C_token,
    D,
    state,
    y,
    final,
    length,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The recurrence for some rows of one head's state and one sequence, token by token.

    Program (h * row blocks, b). As `energy_scan`, and D (h,) or None; y (b, l, h, p) and final (b, h, p, n),
    dense.
    """
    ROW_BLOCKS: tl.constexpr = (P + ROWS - 1) // ROWS
    head = tl.program_id(0) // ROW_BLOCKS
    sequence = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) % ROW_BLOCKS) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, LANES)

    x += sequence * x_batch + head * P + rows
    dt += sequence * dt_batch + head
    B += sequence * B_batch + (head // HEADS_PER_GROUP) * N + columns
    C += sequence * C_batch + (head // HEADS_PER_GROUP) * N + columns
    y += (sequence * length * HEADS + head) * P + rows
    rate = tl.load(A + head)
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head)
    # Columns first: the sum over them then stays within threads but for one exchange.
    cells = (sequence * HEADS + head) * P * N + rows[None, :] * N + columns[:, None]
    inside = (rows[None, :] < P) & (columns[:, None] < N)
    H = tl.zeros((LANES, ROWS), tl.float32)
    if state is not None:
        H += tl.load(state + cells, mask=inside, other=0.0)

    now_x = tl.load(x, mask=rows < P, other=0.0)
    now_B = tl.load(B, mask=columns < N, other=0.0)
    now_C = tl.load(C, mask=columns < N, other=0.0)
    now_dt = tl.load(dt)
    for t in range(length):
        ahead = tl.minimum(t + 1, length - 1).to(tl.int64)
        next_x = tl.load(x + ahead * x_token, mask=rows < P, other=0.0)
        next_B = tl.load(B + ahead * B_token, mask=columns < N, other=0.0)
        next_C = tl.load(C + ahead * C_token, mask=columns < N, other=0.0)
        next_dt = tl.load(dt + ahead * dt_token)
        H = H * tl.exp(now_dt * rate) + (now_x * now_dt)[None, :] * now_B[:, None]
        out = tl.sum(H * now_C[:, None], axis=0) + skip * now_x
        tl.store(y + tl.cast(t, tl.int64) * (HEADS * P), out, mask=rows < P)
        now_x, now_B, now_C, now_dt = next_x, next_B, next_C, next_dt
    tl.store(final + cells, H, mask=inside)


def channel_energies(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums over tokens and head dim of C^2 H^2 and of H^2, float64, (b, h, n) each; arguments all float32."""
    b, length, heads, p = x.shape
    n = B.shape[3]
    rows, lanes = _piece(p, 8, 32), _piece(n, 16, 32)
    blocks = -(-p // rows)
    output = torch.empty(b, heads, blocks, n, dtype=torch.float64, device=x.device)
    stored = torch.empty_like(output)
    with gpu.on_device_of(x):
        energy_scan[(heads * blocks * -(-n // lanes), b)](
            *_streams(x, dt, A, B, C),
            None if state is None else state.contiguous(),
            output,
            stored,
            length,
            HEADS=heads,
            HEADS_PER_GROUP=heads // B.shape[2],
            P=p,
            N=n,
            ROWS=rows,
            LANES=lanes,
            STRETCH=STRETCH,
            num_warps=_WARPS,
        )
    return output.sum(2), stored.sum(2)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ghostssm.ops.ssd.ssd`; dt, A and D in float32."""
    b, length, heads, p = x.shape
    n = B.shape[3]
    y = torch.empty(b, length, heads, p, dtype=x.dtype, device=x.device)
    final = torch.empty(b, heads, p, n, dtype=torch.float32, device=x.device)
    lanes = max(16, triton.next_power_of_2(n))
    rows = _piece(p, 4, max(4, _TILE // lanes))
    with gpu.on_device_of(x):
        ssd_scan[(heads * -(-p // rows), b)](
            *_streams(x, dt, A, B, C),
            None if D is None else D.contiguous(),
            None if state is None else state.contiguous(),
            y,
            final,
            length,
            HEADS=heads,
            HEADS_PER_GROUP=heads // B.shape[2],
            P=p,
            N=n,
            ROWS=rows,
            LANES=lanes,
            num_warps=_WARPS,
        )
    return y, final


def _streams(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> list[Tensor | int]:
    """What both kernels take first: tensors that are dense but for batch and token, with the strides of these."""
    x, B, C = (with_dense_tokens(part) for part in (x, B, C))
    dt = dt if dt.stride(2) == 1 else dt.contiguous()
    return [
        x, x.stride(0), x.stride(1), dt, dt.stride(0), dt.stride(1), A.contiguous(),
        B, B.stride(0), B.stride(1), C, C.stride(0), C.stride(1),
    ]  # fmt: skip


def with_dense_tokens(tensor: Tensor) -> Tensor:
    """A tensor (b, l, h or g, size) that is dense but for batch and token."""
    return tensor if tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3] else tensor.contiguous()


def _piece(size: int, least: int, most: int) -> int:
    """The power of two to cut a size into: one that divides it, if there is one in the range."""
    exact = size & -size
    return min(exact, most) if exact >= least else min(most, max(least, triton.next_power_of_2(size)))
