"""The recurrence in chunks of tokens, as matrix products: its gradients, and its states read at some tokens.

Importing this needs triton; `ghostssm.ops.ssd` and `ghostssm.ops.reading` are what to call.

With u_t = dt_t x_t, L_t the sum of a chunk's log decays up to and including token t, E that up to its end, and H the
state that enters the chunk (state-space duality, Dao & Gu 2024, section 6):

    y_t  = sum_(s <= t) exp(L_t - L_s) (C_t . B_s) u_s + exp(L_t) H C_t
    dC_t = sum_(s <= t) exp(L_t - L_s) (dy_t . u_s) B_s + exp(L_t) H^T dy_t

and backwards in time, with G the gradient of the state that leaves the chunk,

    du_t = sum_(s >= t) exp(L_s - L_t) (B_t . C_s) dy_s + exp(E - L_t) G B_t
    dB_t = sum_(s >= t) exp(L_s - L_t) (u_t . dy_s) C_s + exp(E - L_t) G^T u_t

These are one form, queries that meet keys and values, so one kernel makes all four. A reading of states is a dC whose
queries are directions instead of dy. H and G are of one form too, and each is kept between chunks only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ghostssm.ops import gpu
from ghostssm.ops._triton_scan import with_dense_tokens

CHUNK = 64
_LANES = 64
"""The most rows or columns of a tile of a state; half of them on other GPUs than a Hopper, whose tensor cores take
their factors from shared memory: elsewhere these are in registers, which would spill."""
_KEYS = 32
"""The most numbers of a query and a key that are worked on at a time; with more, registers spill."""
_HEADS = 8
"""The most heads whose gradients of B and C one program sums; what programs have is summed by PyTorch, in order."""
_WARPS = 4


@triton.jit
def _tile(matrix, rows, rows_end, stride, columns, columns_end):
    """Rows and columns of a matrix with dense rows, in float32; zeros from its ends on.

    rows (r, 1) and columns (1, c), or for the transpose (1, r) and (c, 1): some hundreds, so that 32 bits do for them.
    """
    inside = (rows < rows_end) & (columns < columns_end)
    return tl.load(matrix + (rows * stride + columns), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _decays(log_decay, at, tokens, OWN: tl.constexpr, BACKWARDS: tl.constexpr, CHUNK: tl.constexpr):
    """Of one head: from a chunk's tokens to where its rows are, (rows, tokens), and from the chunk's start, (rows,).

    Backwards both ways round, and from the chunk's end. OWN: whether a token reaches itself.
    """
    here = tl.load(log_decay + at)
    there = tl.load(log_decay + tokens)
    if BACKWARDS:
        passes = tokens[None, :] > at[:, None] - OWN
        between = there[None, :] - here[:, None]
        outside = tl.load(log_decay + CHUNK - 1) - here
    else:
        passes = tokens[None, :] < at[:, None] + OWN
        between = here[:, None] - there[None, :]
        outside = here
    return tl.exp(tl.where(passes, between, float("-inf")).to(tl.float32)), tl.exp(outside.to(tl.float32))


@triton.jit
def _rows(block, positions, length, ROWS: tl.constexpr, DIRECTIONS: tl.constexpr, CHUNK: tl.constexpr):
    """Of a block of a query's rows: their chunk, the first, how many there are from it on, and their tokens (rows,)."""
    if positions is None:
        first = tl.cast(block, tl.int64) * CHUNK
        return block, first, length - first, tl.arange(0, ROWS)
    else:
        BLOCKS: tl.constexpr = (DIRECTIONS + ROWS - 1) // ROWS
        token = tl.load(positions + block // BLOCKS).to(tl.int32)
        first = tl.cast(block // BLOCKS, tl.int64) * DIRECTIONS + block % BLOCKS * ROWS
        at = token % CHUNK + tl.zeros((ROWS,), tl.int32)
        return token // CHUNK, first, DIRECTIONS - block % BLOCKS * ROWS, at


@triton.jit
def chunk_states(
    u,
    u_batch,
    u_token,
    B,
    B_batch,
    B_token,
    log_decay,
    state,
    states,
    length,
    BACKWARDS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some rows and columns of one head's state between the chunks of one sequence, or of its gradient backwards.

    Program (h * row blocks * column blocks, b). u (b, l, h, p) and B (b, l, g, n) with strides of batch and token,
    backwards dy and C; log_decay (b, h, chunks * CHUNK), float64, L above; state (b, h, p, n) before the first token,
    backwards after the last, or None for zeros; states (b, chunks + 1, h, p, n).
    """
    ROW_BLOCKS: tl.constexpr = (P + ROWS - 1) // ROWS
    COLUMN_BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    place = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    columns = (place % COLUMN_BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    rows = (place // COLUMN_BLOCKS) % ROW_BLOCKS * ROWS + tl.arange(0, ROWS)
    head = place // (COLUMN_BLOCKS * ROW_BLOCKS)
    tokens = tl.arange(0, CHUNK)
    chunks = tl.cdiv(length, CHUNK)

    u += sequence * u_batch + head * P
    B += sequence * B_batch + (head // HEADS_PER_GROUP) * N
    log_decay += (sequence * HEADS + head) * chunks * CHUNK
    states += (sequence * (chunks + 1) * HEADS + head) * P * N
    cells = rows[:, None] * N + columns[None, :]
    inside = (rows[:, None] < P) & (columns[None, :] < N)
    H = tl.zeros((ROWS, COLUMNS), tl.float32)
    if state is not None:
        H += tl.load(state + (sequence * HEADS + head) * P * N + cells, mask=inside, other=0.0)
    tl.store(states + BACKWARDS * tl.cast(chunks, tl.int64) * (HEADS * P * N) + cells, H, mask=inside)
    for index in range(chunks):
        chunk = chunks - 1 - index if BACKWARDS else index
        first = tl.cast(chunk, tl.int64) * CHUNK
        here = tl.load(log_decay + first + tokens)
        end = tl.load(log_decay + first + CHUNK - 1)
        fading = here if BACKWARDS else end - here
        written = _tile(u + first * u_token, tokens[None, :], length - first, u_token, rows[:, None], P)
        written *= tl.exp(fading.to(tl.float32))[None, :]
        write = _tile(B + first * B_token, tokens[:, None], length - first, B_token, columns[None, :], N)
        H = H * tl.exp(end.to(tl.float32)) + tl.dot(written, write, input_precision=PRECISION)
        after = tl.cast(chunk, tl.int64) + 1 - BACKWARDS
        tl.store(states + after * (HEADS * P * N) + cells, H, mask=inside)


@triton.jit
def chunk_products(
    query,
    query_batch,
    query_row,
    key,
    key_batch,
    key_token,
    value,
    value_batch,
    value_token,
    log_decay,
    states,
    positions,
    out,
    length,
    out_rows,
    BACKWARDS: tl.constexpr,
    SUMMED: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    HEADS_PER_PART: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One of the sums above for the tokens of a chunk, or for the directions at one token, of one sequence.

    Program (row blocks * parts * column blocks, b). If SUMMED, queries and keys (b, rows or l, h, p) belong to heads,
    values (b, l, g, n) to groups, and each part is a sum over some of a group's heads. Otherwise queries and keys
    (b, l, g, n) belong to groups, values (b, l, h, p) to heads, which are the parts, and what a token writes and reads
    itself is left out. log_decay and states as in `chunk_states`. positions (s,), int64, with DIRECTIONS rows of
    query at each, or None where every token is a row. out (b, rows, parts, values' size), dense.
    """
    COLUMN_BLOCKS: tl.constexpr = (VALUE_SIZE + COLUMNS - 1) // COLUMNS
    PARTS: tl.constexpr = (HEADS_PER_GROUP + HEADS_PER_PART - 1) // HEADS_PER_PART  # of a group
    ALL_PARTS: tl.constexpr = HEADS // HEADS_PER_GROUP * PARTS
    place = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    columns = (place % COLUMN_BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    part = (place // COLUMN_BLOCKS) % ALL_PARTS
    block = place // (COLUMN_BLOCKS * ALL_PARTS)
    group = part // PARTS
    first = group * HEADS_PER_GROUP + part % PARTS * HEADS_PER_PART
    last = tl.minimum(first + HEADS_PER_PART, (group + 1) * HEADS_PER_GROUP)
    chunks = tl.cdiv(length, CHUNK)

    chunk, first_row, rows_end, at = _rows(block, positions, length, ROWS, DIRECTIONS, CHUNK)
    rows, tokens = tl.arange(0, ROWS), tl.arange(0, CHUNK)
    first_token = tl.cast(chunk, tl.int64) * CHUNK
    tokens_end = length - first_token
    query += sequence * query_batch + first_row * query_row
    key += sequence * key_batch + first_token * key_token
    value += sequence * value_batch + first_token * value_token
    log_decay += sequence * HEADS * chunks * CHUNK + first_token
    states += (sequence * (chunks + 1) + chunk + BACKWARDS) * (HEADS * KEY_SIZE * VALUE_SIZE)
    weights = tl.zeros((ROWS, CHUNK), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for head in range(first, last):
        decay, fade = _decays(log_decay + head * chunks * CHUNK, at, tokens, SUMMED, BACKWARDS, CHUNK)
        asker = (head if SUMMED else group) * KEY_SIZE
        scores = tl.zeros((ROWS, CHUNK), tl.float32)
        for start in range(0, KEY_SIZE, KEYS):
            inner = start + tl.arange(0, KEYS)
            q = _tile(query + asker, rows[:, None], rows_end, query_row, inner[None, :], KEY_SIZE)
            k = _tile(key + asker, tokens[None, :], tokens_end, key_token, inner[:, None], KEY_SIZE)
            scores += tl.dot(q, k, input_precision=PRECISION)
        weights += scores * decay
        state = states + head * KEY_SIZE * VALUE_SIZE
        for start in range(0, KEY_SIZE, KEYS):
            inner = start + tl.arange(0, KEYS)
            q = _tile(query + asker, rows[:, None], rows_end, query_row, inner[None, :], KEY_SIZE)
            if SUMMED:
                H = _tile(state, inner[:, None], KEY_SIZE, VALUE_SIZE, columns[None, :], VALUE_SIZE)
            else:
                H = _tile(state, columns[None, :], VALUE_SIZE, KEY_SIZE, inner[:, None], KEY_SIZE)
            total += tl.dot(q * fade[:, None], H, input_precision=PRECISION)
    value += (group if SUMMED else first) * VALUE_SIZE
    v = _tile(value, tokens[:, None], tokens_end, value_token, columns[None, :], VALUE_SIZE)
    total += tl.dot(weights, v, input_precision=PRECISION)
    out += ((sequence * out_rows + first_row) * ALL_PARTS + part) * VALUE_SIZE
    cells = rows[:, None] * (ALL_PARTS * VALUE_SIZE) + columns[None, :]
    tl.store(out + cells, total, mask=(rows[:, None] < rows_end) & (columns[None, :] < VALUE_SIZE))


def ssd_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    dy: Tensor,
    dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `ghostssm.ops.ssd.ssd`, from those of y and of the final state; dt, A, D and states in float32.

    The gradient of log a_t is q_t = a_t <G_t, H_{t-1}>. At a chunk's end it is the product of what passes there, and
    before that

        q_t = q_{t+1} + dy_t^T (a_t H_{t-1}) C_t - u_t^T (a_{t+1} G_{t+1}) B_t

    What a token writes and reads itself is on both sides, and left out lest q drown in its rounding.

    Returns:
        dx, ddt, dA, dB, dC, dD and the initial state's.
    """
    precision, dy = _precision(x), dy.float()
    u, log_decay = x * dt[..., None], _log_decay(dt, A)
    H = _states(u, B, log_decay, state, precision)
    G = _states(dy, C, log_decay, dstate, precision, backwards=True)
    dC = _products(dy, u, B, log_decay, H, precision, summed=True)
    dB = _products(u, dy, C, log_decay, G, precision, summed=True, backwards=True)
    read = (_products(C, B, u, log_decay, H, precision) * dy).sum(-1)
    du = _products(B, C, dy, log_decay, G, precision, backwards=True)
    carried, own = (x * du).sum(-1), (x * dy).sum(-1)
    alike = (B.float() * C).sum(-1).repeat_interleave(x.shape[2] // B.shape[2], dim=2)

    q = _by_chunk((read - dt * carried).double()).flip(2).cumsum(2).flip(2)
    dinitial = G[:, 0].clone()
    q += G[:, 1:].mul_(H[:, 1:]).sum((-1, -2))[:, :, None]
    q = q.flatten(1, 2)[:, : x.shape[1]]
    dx = (du + alike[..., None] * dy) * dt[..., None]
    if D is not None:
        dx += dy * D[:, None]
    ddt = carried + alike * own + (q * A).float()
    return dx, ddt, (q * dt).sum((0, 1)).float(), dB, dC, own.sum((0, 1)), dinitial


def read_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, u: Tensor, positions: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ghostssm.ops.reading.read_states`; positions (s,), int64, on the device; the others all float32."""
    written, log_decay, precision = x * dt[..., None], _log_decay(dt, A), _precision(x)
    H = _states(written, B, log_decay, state, precision)
    query = u.transpose(2, 3).flatten(1, 2)
    reads = _products(query, written, B, log_decay, H, precision, summed=True, positions=positions)
    return reads.unflatten(1, u.shape[1:4:2]).transpose(2, 3), H[:, -1].clone()


def _states(
    u: Tensor, B: Tensor, log_decay: Tensor, state: Tensor | None, precision: str, *, backwards: bool = False
) -> Tensor:
    """H, or from dy, C and the final state's gradient G: before the first chunk, between chunks, after the last.

    (b, chunks + 1, h, p, n).
    """
    u, B = with_dense_tokens(u), with_dense_tokens(B)
    b, length, heads, p = u.shape
    n = B.shape[3]
    rows, columns = _lanes(p, u), _lanes(n, u)
    states = torch.empty(b, log_decay.shape[2] // CHUNK + 1, heads, p, n, device=u.device)
    with gpu.on_device_of(u):
        chunk_states[(heads * -(-p // rows) * -(-n // columns), b)](
            *_stream(u), *_stream(B), log_decay,
            None if state is None else state.contiguous(),
            states, length,
            BACKWARDS=int(backwards), HEADS=heads, HEADS_PER_GROUP=heads // B.shape[2], P=p, N=n,
            ROWS=rows, COLUMNS=columns, CHUNK=CHUNK, PRECISION=precision, num_warps=_WARPS, num_stages=2,
        )  # fmt: skip
    return states


def _products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    states: Tensor,
    precision: str,
    *,
    summed: bool = False,
    backwards: bool = False,
    positions: Tensor | None = None,
) -> Tensor:
    """One of the sums above, as `chunk_products` has them, over all tokens or at the positions.

    (b, l, h, p), or (b, rows, g, n) if summed over a group's heads.
    """
    query, key, value = (with_dense_tokens(part) for part in (query, key, value))
    b, length, heads, groups = *key.shape[:2], states.shape[2], value.shape[2] if summed else key.shape[2]
    rows, size, columns = query.shape[1], value.shape[3], _lanes(value.shape[3], value)
    keys, heads_per_part = min(_KEYS, _lanes(key.shape[3], key)), min(_HEADS, heads // groups) if summed else 1
    parts = -(-(heads // groups) // heads_per_part)
    directions = 1 if positions is None else rows // len(positions)
    tile = CHUNK if positions is None else _lanes(directions, query)
    blocks = -(-rows // CHUNK) if positions is None else len(positions) * -(-directions // tile)
    out = torch.empty(b, rows, groups * parts, size, device=key.device)
    with gpu.on_device_of(key):
        chunk_products[(blocks * groups * parts * -(-size // columns), b)](
            *_stream(query), *_stream(key), *_stream(value), log_decay, states, positions, out, length, rows,
            BACKWARDS=int(backwards), SUMMED=int(summed), DIRECTIONS=directions,
            HEADS=heads, HEADS_PER_GROUP=heads // groups, HEADS_PER_PART=heads_per_part,
            KEY_SIZE=key.shape[3], VALUE_SIZE=size, ROWS=tile, KEYS=keys, COLUMNS=columns, CHUNK=CHUNK,
            PRECISION=precision, num_warps=_WARPS, num_stages=1,
        )  # fmt: skip
    return out.unflatten(2, (groups, parts)).sum(3) if summed else out


def _log_decay(dt: Tensor, A: Tensor) -> Tensor:
    """L, (b, h, chunks * CHUNK), float64; what makes up the last chunk has no decay of its own."""
    return _by_chunk((dt * A).double()).cumsum(2).flatten(1, 2).transpose(1, 2).contiguous()


def _by_chunk(tokens: Tensor) -> Tensor:
    """(b, l, h) to (b, chunks, CHUNK, h), with zeros at the end."""
    padded: Tensor = F.pad(tokens, (0, 0, 0, -tokens.shape[1] % CHUNK))
    return padded.reshape(len(tokens), -1, CHUNK, tokens.shape[2])


def _precision(x: Tensor) -> str:
    """Of products: as float32, by three products of tensor cores, or one where half precision came in.

    AMD's tensor cores take float32 as it is; few of them take TF32.
    """
    if gpu.generation(x)[0] == "hip":
        return "ieee"
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _lanes(size: int, tensor: Tensor) -> int:
    """The side of tiles that cover a size, where the tensor is; tensor cores take no less than 16."""
    most = _LANES if gpu.generation(tensor) == ("cuda", 9) else _LANES // 2
    return min(most, max(16, int(triton.next_power_of_2(size))))


def _stream(part: Tensor) -> list[Tensor | int]:
    """A tensor with its strides of batch and token."""
    return [part, part.stride(0), part.stride(1)]
