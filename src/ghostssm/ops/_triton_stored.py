"""The recurrence over a state that is stored rounded, in place. Importing this needs triton; `ghostssm.ops.stored` is
what to call, `ghostssm.ops.state_format` has the formats.

From the same numbers these kernels store the same codes and scales as the reference, bit for bit: no product and sum
are fused (``enable_fp_fusion``), and quotients are rounded correctly. Only the decay is a GPU's own exponential, which
may differ in its last bits, so that a number on the edge between two levels may fall to either side.

Between tokens a program keeps codes and peaks in its registers. For a single token the loop is compiled away.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostssm.ops import gpu
from ghostssm.ops._triton_rounding import (
    channels,
    integers,
    inverse,
    largest_magnitudes,
    load_codes,
    narrowed,
    next_key,
    numbers,
    store_codes,
)
from ghostssm.ops._triton_scan import _piece, _streams
from ghostssm.ops.state_format import StateFormat, StateStorage, TieredFormat

TILE, WARPS = 2048, 2
"""Numbers of a state in half precision that a program keeps, 32 per thread."""
CODES_TILE, CODES_WARPS = 8192, 8
"""The same of a state in codes, of which it takes whole heads, row beside row."""
ROWS_PER_THREAD: tl.constexpr = tl.constexpr(4)
"""That a thread loads at a time. More would be fewer loads, but what is computed once per row, its quotients above all,
every thread computes for all rows that it has."""
_LEAST_ROWS = 4
_LEAST_LANES = 16
_VARYING = ["key", "first_sequence", "first_token"]
"""Arguments for whose values no kernel is compiled anew."""


@triton.jit(do_not_specialize=_VARYING)
def stored_scan(
    codes,
    peaks,
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
    ROW_STEP: tl.constexpr,
    CODE_STEP: tl.constexpr,
    HEAD_CODES: tl.constexpr,
    FIRST_PEAK: tl.constexpr,
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

    Program (h * row blocks, b). codes and peaks are the same memory; from a row to the next it is ROW_STEP codes, from
    a channel to the next CODE_STEP, from a head to the next HEAD_CODES, and a head's first peak is at FIRST_PEAK; peaks
    is None for none. x (b, l, h, p), dt (b, l, h), B and C (b, l, g, n) with strides of batch and token; A, D (h,); y
    (b, l, h, p), dense.
    """
    PACKED: tl.constexpr = BITS == 4
    BLOCKS: tl.constexpr = (P + ROWS - 1) // ROWS
    head = tl.program_id(0) // BLOCKS
    sequence = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) % BLOCKS) * ROWS + tl.max_contiguous(tl.arange(0, ROWS), ROWS_PER_THREAD)
    inside = rows < P
    columns = channels(N, LANES, PACKED)
    row_starts = codes + (sequence * HEADS + head) * HEAD_CODES + rows * ROW_STEP

    held = load_codes(row_starts, inside, N, CODE_STEP, ROWS, LANES, PACKED)
    if peaks is not None:
        tl.debug_barrier()  # All loads of codes are under way before anything is waited for.
    peak, scale = tl.full((ROWS,), 1.0, tl.float32), tl.full((ROWS,), 1.0, tl.float32)
    if peaks is not None:
        row_peaks = peaks + (sequence * HEADS + head) * (HEAD_CODES // 4) + FIRST_PEAK + rows
        peak = tl.load(row_peaks, mask=inside, other=0.0)
        scale = peak * (1 / LARGEST)
    x += sequence * x_batch + head * P + rows
    dt += sequence * dt_batch + head
    B += sequence * B_batch + (head // HEADS_PER_GROUP) * N + columns
    C += sequence * C_batch + (head // HEADS_PER_GROUP) * N + columns
    y += (sequence * length * HEADS + head) * P + rows
    rate = tl.load(A + head)
    skip = tl.load(D + head)
    sequence_key = next_key(key, first_sequence + sequence)

    for t in range(length):
        now = tl.cast(t, tl.int64)
        now_x = tl.load(x + now * x_token, mask=inside, other=0.0)
        now_dt = tl.load(dt + now * dt_token)
        write = tl.load(B + now * B_token, mask=columns < N, other=0.0)[None, :]
        read = tl.load(C + now * C_token, mask=columns < N, other=0.0)[None, :]
        H = numbers(held, BITS, MANTISSA, BIAS) * scale[:, None]
        H = H * tl.exp(now_dt * rate) + (now_x * now_dt)[:, None] * write
        tl.store(y + now * (HEADS * P), tl.sum(H * read, axis=1) + skip * now_x, mask=inside)

        row_keys = next_key(next_key(sequence_key, first_token + t), head * P + rows)
        if peaks is not None:
            peak = largest_magnitudes(H)
            scale = peak * (1 / LARGEST)
            H *= inverse(peak, LARGEST)[:, None]
        if MANTISSA == 0:
            held = integers(H, row_keys, columns, LARGEST, STOCHASTIC)
        else:
            held = narrowed(H, row_keys, columns, BITS, MANTISSA, BIAS, LARGEST_CODE, STOCHASTIC)
    tl.debug_barrier()
    store_codes(row_starts, held, inside, N, CODE_STEP, ROWS, LANES, PACKED)
    if peaks is not None:
        tl.store(row_peaks, peak, mask=inside)


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
    rows = (tl.program_id(0) % BLOCKS) * ROWS + tl.max_contiguous(tl.arange(0, ROWS), ROWS_PER_THREAD)
    inside = rows < P
    wide = tl.load(places + 2 * HEADS + head)
    narrow = tl.load(places + 3 * HEADS + head)
    columns = tl.arange(0, WIDE_LANES)
    others = channels(narrow, NARROW_LANES, True)
    row_starts = codes + sequence * STATE_BYTES + tl.multiple_of(tl.load(places + head), 16) + rows
    row_peaks = peaks + sequence * (STATE_BYTES // 4) + tl.multiple_of(tl.load(places + HEADS + head), 4) + rows

    held = load_codes(row_starts, inside, wide, P, ROWS, WIDE_LANES, False)
    held_others = load_codes(row_starts + wide * P, inside, narrow, P, ROWS, NARROW_LANES, True)
    tl.debug_barrier()  # As in `stored_scan`.
    peak = tl.load(row_peaks, mask=inside, other=0.0)
    x += sequence * x_batch + head * P + rows
    dt += sequence * dt_batch + head
    B += sequence * B_batch + (head // HEADS_PER_GROUP) * N
    C += sequence * C_batch + (head // HEADS_PER_GROUP) * N
    y += (sequence * length * HEADS + head) * P + rows
    rate = tl.load(A + head)
    skip = tl.load(D + head)
    sequence_key = next_key(key, first_sequence + sequence)
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

        row_keys = next_key(next_key(sequence_key, first_token + t), head * P + rows)
        peak = tl.maximum(largest_magnitudes(H), largest_magnitudes(others_H))
        held = integers(H * inverse(peak, 127.0)[:, None], row_keys, columns, 127.0, STOCHASTIC)
        held_others = integers(others_H * inverse(peak, 7.0)[:, None], row_keys, others, 7.0, STOCHASTIC)
    tl.debug_barrier()
    store_codes(row_starts, held, inside, wide, P, ROWS, WIDE_LANES, False)
    store_codes(row_starts + wide * P, held_others, inside, narrow, P, ROWS, NARROW_LANES, True)
    tl.store(row_peaks, peak, mask=inside)


def stored_scan_(
    stored: Tensor, storage: StateStorage, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """`ghostssm.ops.stored.stored_scan_`; stored is contiguous."""
    b, length, heads, p = x.shape
    n, form = B.shape[3], storage.format
    y = torch.empty(b, length, heads, p, dtype=torch.float32, device=x.device)
    kernel, memory, sizes = (
        _tiered_call(stored, form, p) if isinstance(form, TieredFormat) else _stored_call(stored, form, p, n)
    )
    with gpu.on_device_of(x):
        kernel[(heads * -(-p // sizes["ROWS"]), b)](
            *memory,
            *_streams(x, dt, A, B, C),
            D.contiguous(),
            y,
            length,
            *_drawn(storage),
            HEADS=heads,
            HEADS_PER_GROUP=heads // B.shape[2],
            P=p,
            N=n,
            STOCHASTIC=storage.stochastic,
            **sizes,
            enable_fp_fusion=False,
        )
    return y


def _stored_call(stored: Tensor, form: StateFormat, p: int, n: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel, the state's parts as it takes them, and sizes."""
    codes = stored.flatten(2).view(torch.int8 if form.bits < 16 else torch.int16)
    lanes = _lanes(n)
    return (
        stored_scan,
        (codes, codes.view(torch.float32) if form.scaled else None),
        {
            # Codes lie channel by channel, numbers in half precision row by row.
            "ROW_STEP": 1 if form.scaled else n,
            "CODE_STEP": p if form.scaled else 1,
            "HEAD_CODES": codes.shape[2],
            "FIRST_PEAK": form.places(1, p, n)[1][0] // 4 if form.scaled else 0,
            "BITS": form.bits,
            "MANTISSA": form.mantissa,
            "BIAS": form.bias,
            "LARGEST": form.largest or 0.0,
            "LARGEST_CODE": _largest_code(form),
            **_rows(p, lanes, form.scaled),
            "LANES": lanes,
        },
    )


def _tiered_call(stored: Tensor, form: TieredFormat, p: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """`_stored_call` of a state in tiers."""
    assert form.tiers is not None
    wide, narrow = (_lanes(max(tier)) for tier in zip(*form.tiers, strict=True))
    return (
        tiered_scan,
        (stored.view(torch.int8), stored.view(torch.float32), _places(form, p, stored.device)),
        {
            "STATE_BYTES": stored.shape[1],
            **_rows(p, _lanes(wide + narrow), True),
            "WIDE_LANES": wide,
            "NARROW_LANES": narrow,
        },
    )


def _lanes(n: int) -> int:
    lanes: int = max(_LEAST_LANES, triton.next_power_of_2(n))
    return lanes


def _rows(p: int, lanes: int, in_codes: bool) -> dict[str, int]:
    """That a program takes, and its warps: fewer where a head is small."""
    tile, warps = (CODES_TILE, CODES_WARPS) if in_codes else (TILE, WARPS)
    rows = _piece(p, _LEAST_ROWS, max(_LEAST_ROWS, tile // lanes))
    return {"ROWS": rows, "num_warps": max(1, min(warps, warps * rows * lanes // tile))}


@functools.cache
def _places(form: TieredFormat, p: int, device: torch.device) -> Tensor:
    """What `tiered_scan` wants to know of every head."""
    assert form.tiers is not None
    codes, peaks = form.places(len(form.tiers), p, 0)
    wide, narrow = zip(*form.tiers, strict=True)
    return torch.tensor([codes, [place // 4 for place in peaks], wide, narrow], dtype=torch.int32, device=device)


@functools.cache
def _largest_code(form: StateFormat) -> int:
    """Of a floating-point format; 0 for another."""
    if not form.mantissa:
        return 0
    assert form.dtype is not None
    largest = torch.tensor([torch.finfo(form.dtype).max], dtype=form.dtype)
    return int(largest.view(torch.int8 if form.bits == 8 else torch.int16))


def _drawn(storage: StateStorage) -> tuple[int, int, int]:
    """What random numbers depend on: key, as a signed number of 32 bits, first sequence and first token."""
    if not storage.stochastic:
        return 0, 0, 0
    return storage.key - (storage.key >> 31 << 32), storage.sequence, storage.token
