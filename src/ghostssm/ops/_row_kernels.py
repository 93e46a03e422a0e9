"""The compiled loops that decoding in fewer bits spends its time in: one for each format and size of a state.

A row of the state is one vector (`ghostssm.ops._lanes`), which stays in registers from the load to the store. Numbers
are rounded to the nearest after every token.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from ghostssm.ops._lanes import (
    load,
    load_row,
    multiply,
    multiply_add,
    peaks_of_two,
    prefetch,
    products_of_two,
    spread,
    store_row,
)
from ghostssm.ops._rounding_kernels import LEAST_PEAK
from ghostssm.ops.state_format import FORMATS

LANES = 16
"""A row has a multiple of so many lanes."""
LARGEST_SIZE = 256
"""Of a state: two longer rows do not fit the registers of any processor."""
_LINE = 64
"""Bytes of a cache line."""
_AHEAD = 16384
"""How many bytes ahead of a row memory is asked for: two heads of 64 rows in int8."""
_MOST_UNITS = np.float32(1e30)


def lanes_of(n: int) -> int:
    """In a row of ``n`` numbers."""
    return -(-n // LANES) * LANES


@numba.njit(inline="always", error_model="numpy")
def _two_scaled_rows(  # type: ignore[no-untyped-def]
    n, lanes, kind, largest, codes, at, other_codes, other_at, rate, other_rate, write, read
):
    """Update and round two rows; their products with C, and their largest magnitudes, in their units."""
    written = load(write, lanes)
    one = multiply_add(spread(rate, lanes), written, load_row(codes, at, lanes, n, kind))
    other = multiply_add(spread(other_rate, lanes), written, load_row(other_codes, other_at, lanes, n, kind))
    total, other_total = products_of_two(one, other, load(read, lanes))
    peak, other_peak = peaks_of_two(one, other)
    inverse, other_inverse = largest / max(peak, LEAST_PEAK), largest / max(other_peak, LEAST_PEAK)
    store_row(codes, at, multiply(one, spread(inverse, lanes)), n, kind)
    store_row(other_codes, other_at, multiply(other, spread(other_inverse, lanes)), n, kind)
    return total, other_total, peak, other_peak


@numba.njit(inline="always")
def _two_half_rows(  # type: ignore[no-untyped-def]
    n, lanes, kind, halves, at, other_halves, other_at, decay, added, other_added, write, read
):
    """Update and round two rows; their products with C."""
    written, kept = load(write, lanes), spread(decay, lanes)
    one = multiply_add(spread(added, lanes), written, multiply(kept, load_row(halves, at, lanes, n, kind)))
    stored = load_row(other_halves, other_at, lanes, n, kind)
    other = multiply_add(spread(other_added, lanes), written, multiply(kept, stored))
    store_row(halves, at, one, n, kind)
    store_row(other_halves, other_at, other, n, kind)
    return products_of_two(one, other, load(read, lanes))


@cache
def scaled_scan(kind: int, n: int) -> Any:
    """The loop for rows of ``n`` numbers in int8, fp8 or int4, compiled when it is first called, or taken from numba's
    cache.

    A row is worked on in units of its decayed scale: with codes q, scale s, and what is added, u B,

        s decay q + u B = unit (q + u / unit B),    unit = s decay,

    so that a number takes one multiplication and addition for its update, one for y, and one for its code.
    """
    form, lanes = next(form for form in FORMATS.values() if form.kind == kind), lanes_of(n)
    width, largest = form.row_bytes(n), np.float32(form.largest)
    lines = -(-2 * width // _LINE)

    @numba.njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
    def scan(codes, scales, first_scale, x, dt, A, B, C, D, y):  # type: ignore[no-untyped-def]
        """Arguments as `ghostssm.ops._rounding_kernels.stored_scan` has them, B and C with zeros up to whole lanes."""
        b, length, h, p = x.shape
        heads_per_group = h // B.shape[2]
        for index in numba.prange(b * h):
            i, head = index // h, index % h
            group = head // heads_per_group
            own, own_scales = codes[i, head], scales[i, head, first_scale:]
            # An odd row's partner is a spare one. Every allocation here costs as much as several rows.
            spare = np.zeros(lanes, np.int8) if p % 2 else own
            room = np.zeros((4, p + p % 2), np.float32)
            units, rates, totals, peaks = room[0], room[1], room[2], room[3]
            for t in range(length):
                inputs, outputs = x[i, t, head], y[i, t, head]
                write, read = B[i, t, group], C[i, t, group]
                step = dt[i, t, head]
                decay = np.exp(step * A[head])
                for j in range(p):
                    added = step * inputs[j]
                    # What a row held is lost in rounding where so much more is added.
                    least = max(abs(added) / _MOST_UNITS, LEAST_PEAK / largest)
                    units[j] = max(own_scales[j] * decay, least)
                    rates[j] = added / units[j]
                for j in range(0, p, 2):
                    for line in range(lines):
                        prefetch(own, j * width + _AHEAD + line * _LINE)
                    last = j + 1 == p
                    other, other_at = (spare, 0) if last else (own, (j + 1) * width)
                    totals[j], totals[j + 1], peaks[j], peaks[j + 1] = _two_scaled_rows(
                        n, lanes, kind, largest, own, j * width, other, other_at, rates[j], rates[j + 1], write, read
                    )
                for j in range(p):
                    outputs[j] = totals[j] * units[j] + D[head] * inputs[j]
                    own_scales[j] = peaks[j] * units[j] * (np.float32(1) / largest)

    return scan


@cache
def half_scan(kind: int, n: int) -> Any:
    """As `scaled_scan`, for bfloat16 and float16."""
    lanes = lanes_of(n)
    lines = -(-4 * n // _LINE)

    @numba.njit(parallel=True, fastmath=True, cache=True)
    def scan(halves, x, dt, A, B, C, D, y):  # type: ignore[no-untyped-def]
        """halves int16 (b, h, p * n) in place; the rest as `scaled_scan` has it."""
        b, length, h, p = x.shape
        heads_per_group = h // B.shape[2]
        for index in numba.prange(b * h):
            i, head = index // h, index % h
            group = head // heads_per_group
            own = halves[i, head]
            spare = np.zeros(n, np.int16) if p % 2 else own
            for t in range(length):
                inputs, outputs = x[i, t, head], y[i, t, head]
                write, read = B[i, t, group], C[i, t, group]
                step = dt[i, t, head]
                decay = np.exp(step * A[head])
                for j in range(0, p, 2):
                    for line in range(lines):
                        prefetch(own, j * n + (_AHEAD + line * _LINE) // 2)
                    last = j + 1 == p
                    other, other_at = (spare, 0) if last else (own, (j + 1) * n)
                    other_input = np.float32(0) if last else inputs[j + 1]
                    total, other_total = _two_half_rows(
                        n,
                        lanes,
                        kind,
                        own,
                        j * n,
                        other,
                        other_at,
                        decay,
                        step * inputs[j],
                        step * other_input,
                        write,
                        read,
                    )
                    outputs[j] = total + D[head] * inputs[j]
                    if not last:
                        outputs[j + 1] = other_total + D[head] * other_input

    return scan
