"""The compiled loops that decoding in int8 or bfloat16 spends its time in: one for each size of a state.

A row of the state is one vector (`ghostssm.ops._lanes`), which stays in registers from the load to the store. Numbers
are rounded to the nearest after every token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import numba
import numpy as np

from ghostssm.ops._lanes import (
    load,
    load_bfloat16,
    load_codes,
    multiply,
    multiply_add,
    peaks_of_two,
    prefetch,
    products_of_two,
    spread,
    store_bfloat16,
    store_low_bytes,
)
from ghostssm.ops._rounding_kernels import LEAST_PEAK, NUMBER_TO_INTEGER

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


class RowLoop:
    """A loop over heads, compiled for one thread, and for several once there are several, which takes thrice as long.

    Both give the same bits: `ghostssm.ops._lanes` fixes the order of every sum.

    Attributes:
        alone: numba's function for one thread.
    """

    def __init__(self, loop: Callable[..., None], **options: Any):
        self.alone = numba.njit(cache=True, **options)(loop)
        split = FunctionType(loop.__code__, loop.__globals__, loop.__name__, None, loop.__closure__)
        split.__qualname__ = f"{loop.__qualname__}_in_threads"  # numba's cache tells functions apart by their names
        self._in_threads = numba.njit(cache=True, parallel=True, **options)(split)

    def __call__(self, *arguments: object) -> None:
        (self._in_threads if numba.get_num_threads() > 1 else self.alone)(*arguments)


@numba.njit(inline="always", error_model="numpy")
def _two_int8_rows(n, lanes, codes, at, other_codes, other_at, rate, other_rate, write, read):  # type: ignore[no-untyped-def]
    """Update and round two rows; their products with C, and their largest magnitudes, in their units."""
    written = load(write, lanes)
    one = multiply_add(spread(rate, lanes), written, load_codes(codes, at, lanes, n))
    other = multiply_add(spread(other_rate, lanes), written, load_codes(other_codes, other_at, lanes, n))
    total, other_total = products_of_two(one, other, load(read, lanes))
    peak, other_peak = peaks_of_two(one, other)
    integer = spread(NUMBER_TO_INTEGER, lanes)
    inverse, other_inverse = np.float32(127) / max(peak, LEAST_PEAK), np.float32(127) / max(other_peak, LEAST_PEAK)
    store_low_bytes(codes, at, multiply_add(one, spread(inverse, lanes), integer), n)
    store_low_bytes(other_codes, other_at, multiply_add(other, spread(other_inverse, lanes), integer), n)
    return total, other_total, peak, other_peak


@numba.njit(inline="always")
def _two_bfloat16_rows(n, lanes, halves, at, other_halves, other_at, decay, added, other_added, write, read):  # type: ignore[no-untyped-def]
    """Update and round two rows; their products with C."""
    written, kept = load(write, lanes), spread(decay, lanes)
    one = multiply_add(spread(added, lanes), written, multiply(kept, load_bfloat16(halves, at, lanes, n)))
    other = multiply_add(
        spread(other_added, lanes), written, multiply(kept, load_bfloat16(other_halves, other_at, lanes, n))
    )
    store_bfloat16(halves, at, one, n)
    store_bfloat16(other_halves, other_at, other, n)
    return products_of_two(one, other, load(read, lanes))


@cache
def int8_scan(n: int) -> RowLoop:
    """The loop for rows of ``n`` numbers, compiled when it is first called, or taken from numba's cache.

    A row is worked on in units of its decayed scale: with codes q, scale s, and what is added, u B,

        s decay q + u B = unit (q + u / unit B),    unit = s decay,

    so that a number takes one multiplication and addition for its update, one for y, and one for its code.
    """
    lanes = lanes_of(n)
    lines = -(-2 * n // _LINE)

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
                    least = max(abs(added) / _MOST_UNITS, LEAST_PEAK / np.float32(127))
                    units[j] = max(own_scales[j] * decay, least)
                    rates[j] = added / units[j]
                for j in range(0, p, 2):
                    for line in range(lines):
                        prefetch(own, j * n + _AHEAD + line * _LINE)
                    last = j + 1 == p
                    other, other_at = (spare, 0) if last else (own, (j + 1) * n)
                    totals[j], totals[j + 1], peaks[j], peaks[j + 1] = _two_int8_rows(
                        n, lanes, own, j * n, other, other_at, rates[j], rates[j + 1], write, read
                    )
                for j in range(p):
                    outputs[j] = totals[j] * units[j] + D[head] * inputs[j]
                    own_scales[j] = peaks[j] * units[j] * (np.float32(1) / np.float32(127))

    return RowLoop(scan, fastmath=True, error_model="numpy")


@cache
def bfloat16_scan(n: int) -> RowLoop:
    """As `int8_scan`; a number is the upper half of a float32."""
    lanes = lanes_of(n)
    lines = -(-4 * n // _LINE)

    def scan(halves, x, dt, A, B, C, D, y):  # type: ignore[no-untyped-def]
        """halves int16 (b, h, p * n) in place; the rest as `int8_scan` has it."""
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
                    total, other_total = _two_bfloat16_rows(
                        n, lanes, own, j * n, other, other_at, decay, step * inputs[j], step * other_input, write, read
                    )
                    outputs[j] = total + D[head] * inputs[j]
                    if not last:
                        outputs[j + 1] = other_total + D[head] * other_input

    return RowLoop(scan, fastmath=True)
