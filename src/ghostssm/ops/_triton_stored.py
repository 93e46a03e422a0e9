"""The recurrence over a state that is stored rounded, in place. Importing this needs triton; `ghostssm.ops.stored` is
what to call, `ghostssm.ops.state_format` has the formats.

From the same numbers these kernels store the same codes and scales as the reference, bit for bit: no product and sum
are fused (``enable_fp_fusion``), and quotients are rounded correctly. Only the decay is a GPU's own exponential, which
may differ in its last bits, so that a number on the edge between two levels may fall to either side.

Between tokens a program keeps codes and scales in its registers, and loads every token's numbers while the one before
it is worked on. A single token makes triton compile the loop away.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostssm.ops import gpu
from ghostssm.ops._triton_scan import _piece, _streams
from ghostssm.ops.state_format import StateFormat, StateStorage, TieredFormat

_TILE = 2048
"""Numbers of the state that a program keeps, 32 per thread."""
_WARPS = 2
_LEAST_ROWS = 4
_LEAST_LANES = 16
_VARYING = ["key", "first_sequence", "first_token"]
"""Arguments for whose values no kernel is compiled anew."""


@triton.jit
def _mix(word):
    """`ghostssm.ops.state_format._mix`, of uint32."""
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _words(row_keys, columns):
    """A random word for every number of some rows."""
    return _mix(row_keys[:, None] ^ (columns.to(tl.uint32) * 0x9E3779B1)[None, :])


@triton.jit
def _nearest_integer(value):
    """Ties to even: 1.5 * 2^23 added to a number of less than 2^22 leaves it in the lowest bits of the sum."""
    return (value + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _integers(scaled, row_keys, columns, LARGEST: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The codes of scaled numbers in int8 or int4."""
    if STOCHASTIC:
        unit = (_words(row_keys, columns) >> 8).to(tl.float32) * 2.0**-24
        scaled = tl.minimum(tl.maximum(scaled + (unit - 0.5), -LARGEST), LARGEST)
    return _nearest_integer(scaled)


@triton.jit
def _narrowed(
    values,
    row_keys,
    columns,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """The codes of numbers in a floating-point format; all bits above the others are the sign's."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = values.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    if STOCHASTIC:
        added = (_words(row_keys, columns) >> (9 + MANTISSA)).to(tl.int32)
    else:
        added = ((size >> SHIFT) & 1) + ((1 << (SHIFT - 1)) - 1)
    code = ((size + added) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    if BIAS < 127:  # Numbers without a leading one are multiples of the smallest number.
        small = tl.minimum(tl.abs(values), 2.0 ** (1 - BIAS))
        if STOCHASTIC:
            low = ((small * 2.0 ** (BIAS + 22)).to(tl.int32) + added) >> SHIFT
        else:
            low = _nearest_integer(small * 2.0 ** (BIAS + MANTISSA - 1))
        code = tl.where(size < ((128 - BIAS) << 23), low, code)
    return tl.minimum(code, LARGEST_CODE) | ((bits >> 31) << (BITS - 1))


@triton.jit
def _numbers(codes, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """What codes with their sign in all bits above the others stand for, but for the scale."""
    if MANTISSA == 0:
        numbers = codes.to(tl.float32)
    else:
        size = (codes & ((1 << (BITS - 1)) - 1)) << (23 - MANTISSA)
        numbers = (size | (codes & -0x80000000)).to(tl.float32, bitcast=True) * 2.0 ** (127 - BIAS)
    return numbers


@triton.jit
def _channels(n, LANES: tl.constexpr, PACKED: tl.constexpr):
    """The channel of every lane, n or more where there is none. Packed, every two lanes share a byte."""
    lanes = tl.arange(0, LANES)
    if PACKED:
        half = (n + 1) // 2
        lanes = tl.where(lanes // 2 < half, lanes // 2 + lanes % 2 * half, n)
    return lanes


@triton.jit
def _cells(row_starts, inside, n, LANES: tl.constexpr, PACKED: tl.constexpr):
    """Where the codes of some rows are, and whether they are there."""
    if PACKED:
        places = tl.arange(0, LANES // 2)[None, :]
        held = places < (n + 1) // 2
    else:
        places = tl.arange(0, LANES)[None, :]
        held = places < n
    return row_starts[:, None] + places, inside[:, None] & held


@triton.jit
def _load_codes(row_starts, inside, n, ROWS: tl.constexpr, LANES: tl.constexpr, PACKED: tl.constexpr):
    """Of some rows, (rows, lanes), int32; zeros where there are none."""
    cells, held = _cells(row_starts, inside, n, LANES, PACKED)
    codes = tl.load(cells, mask=held, other=0).to(tl.int32)
    if PACKED:
        codes = tl.join((codes << 28) >> 28, codes >> 4).reshape(ROWS, LANES)
    return codes


@triton.jit
def _store_codes(row_starts, codes, inside, n, ROWS: tl.constexpr, LANES: tl.constexpr, PACKED: tl.constexpr):
    cells, held = _cells(row_starts, inside, n, LANES, PACKED)
    if PACKED:
        lower, upper = tl.split(codes.reshape(ROWS, LANES // 2, 2))
        codes = (lower & 15) | (upper << 4)
    tl.store(cells, codes.to(row_starts.dtype.element_ty), mask=held)


@triton.jit
def _peaks(H):
    """The largest magnitude of each row; 0 for what is stored as zeros."""
    peak = tl.max(tl.abs(H), axis=1)
    return tl.where(peak >= 1e-30, peak, 0.0)


@triton.jit
def _inverse(peak, LARGEST: tl.constexpr):
    """What a row is multiplied with before it is rounded."""
    return tl.where(peak > 0, tl.div_rn(tl.zeros_like(peak) + LARGEST, tl.maximum(peak, 1e-30)), 0.0)


@triton.jit(do_not_specialize=_VARYING)
def stored_scan(
    codes,
    scales,
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
    y,
    length,
    key,
    first_sequence,
    first_token,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_CODES: tl.constexpr,
    HEAD_SCALES: tl.constexpr,
    FIRST_SCALE: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Some rows of one head's state and one sequence, token by token: read, updated in float32, rounded.

    Program (h * row blocks, b). codes and scales are the same memory, a row has WIDTH codes, a head so many codes and
    float32 numbers, of which the first scale is at FIRST_SCALE; scales is None for none. x (b, l, h, p), dt
    (b, l, h), B and C (b, l, g, n) with strides of batch and token; A, D (h,); y (b, l, h, p), dense.
    """
    PACKED: tl.constexpr = BITS == 4
    BLOCKS: tl.constexpr = (P + ROWS - 1) // ROWS
    head = tl.program_id(0) // BLOCKS
    sequence = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) % BLOCKS) * ROWS + tl.arange(0, ROWS)
    inside = rows < P
    columns = _channels(N, LANES, PACKED)
    row_starts = codes + (sequence * HEADS + head) * HEAD_CODES + rows * WIDTH

    held = _load_codes(row_starts, inside, N, ROWS, LANES, PACKED)
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if scales is not None:
        row_scales = scales + (sequence * HEADS + head) * HEAD_SCALES + FIRST_SCALE + rows
        scale = tl.load(row_scales, mask=inside, other=0.0)
    x += sequence * x_batch + head * P + rows
    dt += sequence * dt_batch + head
    B += sequence * B_batch + (head // HEADS_PER_GROUP) * N + columns
    C += sequence * C_batch + (head // HEADS_PER_GROUP) * N + columns
    y += (sequence * length * HEADS + head) * P + rows
    rate = tl.load(A + head)
    skip = tl.load(D + head)
    sequence_key = _mix(key.to(tl.uint32) + (first_sequence + sequence).to(tl.uint32))

    now_x = tl.load(x, mask=inside, other=0.0)
    now_B = tl.load(B, mask=columns < N, other=0.0)
    now_C = tl.load(C, mask=columns < N, other=0.0)
    now_dt = tl.load(dt)
    for t in range(length):
        ahead = tl.minimum(t + 1, length - 1).to(tl.int64)
        next_x = tl.load(x + ahead * x_token, mask=inside, other=0.0)
        next_B = tl.load(B + ahead * B_token, mask=columns < N, other=0.0)
        next_C = tl.load(C + ahead * C_token, mask=columns < N, other=0.0)
        next_dt = tl.load(dt + ahead * dt_token)
        H = _numbers(held, BITS, MANTISSA, BIAS) * scale[:, None]
        H = H * tl.exp(now_dt * rate) + (now_x * now_dt)[:, None] * now_B[None, :]
        out = tl.sum(H * now_C[None, :], axis=1) + skip * now_x
        tl.store(y + tl.cast(t, tl.int64) * (HEADS * P), out, mask=inside)
        now_x, now_B, now_C, now_dt = next_x, next_B, next_C, next_dt

        row_keys = _mix(_mix(sequence_key + (first_token + t).to(tl.uint32)) + (head * P + rows).to(tl.uint32))
        if scales is not None:
            peak = _peaks(H)
            scale = peak * (1 / LARGEST)
            H *= _inverse(peak, LARGEST)[:, None]
        if MANTISSA == 0:
            held = _integers(H, row_keys, columns, LARGEST, STOCHASTIC)
        else:
            held = _narrowed(H, row_keys, columns, BITS, MANTISSA, BIAS, LARGEST_CODE, STOCHASTIC)
    tl.debug_barrier()
    _store_codes(row_starts, held, inside, N, ROWS, LANES, PACKED)
    if scales is not None:
        tl.store(row_scales, scale, mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def tiered_scan(
    codes,
    peaks,
    places,
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
    y,
    length,
    key,
    first_sequence,
    first_token,
    STATE_BYTES: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE_LANES: tl.constexpr,
    NARROW_LANES: tl.constexpr,
):
    """`stored_scan` of a state in tiers, each a tile of its own: a head's first channels in 8 bits, its next in 4.

    codes int8 (b, STATE_BYTES) and peaks float32 are the same memory; places int32 (4, h) says where a head's codes and
    peaks begin in them, and how many channels it has in 8 and in 4 bits.
    """
    BLOCKS: tl.constexpr = (P + ROWS - 1) // ROWS
    head = tl.program_id(0) // BLOCKS
    sequence = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) % BLOCKS) * ROWS + tl.arange(0, ROWS)
    inside = rows < P
    wide = tl.load(places + 2 * HEADS + head)
    narrow = tl.load(places + 3 * HEADS + head)
    columns = tl.arange(0, WIDE_LANES)
    others = _channels(narrow, NARROW_LANES, True)
    width = wide + (narrow + 1) // 2
    row_starts = codes + sequence * STATE_BYTES + tl.load(places + head) + rows * width
    row_peaks = peaks + sequence * (STATE_BYTES // 4) + tl.load(places + HEADS + head) + rows

    held = _load_codes(row_starts, inside, wide, ROWS, WIDE_LANES, False)
    held_others = _load_codes(row_starts + wide, inside, narrow, ROWS, NARROW_LANES, True)
    peak = tl.load(row_peaks, mask=inside, other=0.0)
    x += sequence * x_batch + head * P + rows
    dt += sequence * dt_batch + head
    B += sequence * B_batch + (head // HEADS_PER_GROUP) * N
    C += sequence * C_batch + (head // HEADS_PER_GROUP) * N
    y += (sequence * length * HEADS + head) * P + rows
    rate = tl.load(A + head)
    skip = tl.load(D + head)
    sequence_key = _mix(key.to(tl.uint32) + (first_sequence + sequence).to(tl.uint32))
    for t in range(length):
        now = tl.cast(t, tl.int64)
        now_x = tl.load(x + now * x_token, mask=inside, other=0.0)
        now_dt = tl.load(dt + now * dt_token)
        decay = tl.exp(now_dt * rate)
        added = (now_x * now_dt)[:, None]
        write = tl.load(B + now * B_token + columns, mask=columns < wide, other=0.0)[None, :]
        read = tl.load(C + now * C_token + columns, mask=columns < wide, other=0.0)[None, :]
        write_others = tl.load(B + now * B_token + wide + others, mask=others < narrow, other=0.0)[None, :]
        read_others = tl.load(C + now * C_token + wide + others, mask=others < narrow, other=0.0)[None, :]
        H = held.to(tl.float32) * (peak * (1 / 127.0))[:, None] * decay + added * write
        others_H = held_others.to(tl.float32) * (peak * (1 / 7.0))[:, None] * decay + added * write_others
        out = tl.sum(H * read, axis=1) + tl.sum(others_H * read_others, axis=1) + skip * now_x
        tl.store(y + now * (HEADS * P), out, mask=inside)

        row_keys = _mix(_mix(sequence_key + (first_token + t).to(tl.uint32)) + (head * P + rows).to(tl.uint32))
        peak = tl.maximum(_peaks(H), _peaks(others_H))
        held = _integers(H * _inverse(peak, 127.0)[:, None], row_keys, columns, 127.0, STOCHASTIC)
        held_others = _integers(others_H * _inverse(peak, 7.0)[:, None], row_keys, others, 7.0, STOCHASTIC)
    tl.debug_barrier()
    _store_codes(row_starts, held, inside, wide, ROWS, WIDE_LANES, False)
    _store_codes(row_starts + wide, held_others, inside, narrow, ROWS, NARROW_LANES, True)
    tl.store(row_peaks, peak, mask=inside)


def stored_scan_(
    stored: Tensor, storage: StateStorage, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """`ghostssm.ops.stored.stored_scan_`; stored is contiguous."""
    b, length, heads, p = x.shape
    n, form = B.shape[3], storage.format
    y = torch.empty(b, length, heads, p, dtype=torch.float32, device=x.device)
    codes = stored.flatten(2).view(torch.int8 if form.bits < 16 else torch.int16)
    scales = codes.view(torch.float32) if form.scaled else None
    lanes = max(16, triton.next_power_of_2(n))
    rows = _piece(p, _LEAST_ROWS, max(_LEAST_ROWS, _TILE // lanes))
    with gpu.on_device_of(x):
        stored_scan[(heads * -(-p // rows), b)](
            codes,
            scales,
            *_streams(x, dt, A, B, C),
            D.contiguous(),
            y,
            length,
            *_drawn(storage),
            HEADS=heads,
            HEADS_PER_GROUP=heads // B.shape[2],
            P=p,
            N=n,
            WIDTH=form.row_bytes(n) * 8 // max(8, form.bits),
            HEAD_CODES=codes.shape[2],
            HEAD_SCALES=codes.shape[2] // 4,
            FIRST_SCALE=form.code_bytes(p, n) // 4,
            BITS=form.bits,
            MANTISSA=form.mantissa,
            BIAS=form.bias,
            LARGEST=form.largest or 0.0,
            LARGEST_CODE=_largest_code(form),
            STOCHASTIC=storage.stochastic,
            ROWS=rows,
            LANES=lanes,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return y


def _drawn(storage: StateStorage) -> tuple[int, int, int]:
    """What random numbers depend on: key, as a signed number of 32 bits, first sequence and first token."""
    if not storage.stochastic:
        return 0, 0, 0
    return storage.key - (storage.key >> 31 << 32), storage.sequence, storage.token


@functools.cache
def _largest_code(form: StateFormat) -> int:
    """Of a floating-point format; 0 for another."""
    if not form.mantissa:
        return 0
    assert form.dtype is not None
    largest = torch.tensor([torch.finfo(form.dtype).max], dtype=form.dtype)
    return int(largest.view(torch.int8 if form.bits == 8 else torch.int16))
