"""The compiled loops for states in bfloat16 and float16, one for each size of a state.

A row of the state is one vector (`ghostssm.ops._lanes`), which stays in registers from the load to the store. Numbers
are rounded to the nearest after every token.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from ghostssm.ops._lane_codes import load_half_row, store_half_row
from ghostssm.ops._lanes import load, multiply, multiply_add, prefetch, products_of_two, spread

LANES = 16
"""A row has a multiple of so many lanes."""
LARGEST_SIZE = 256
"""Of a state: two longer rows do not fit the registers of any processor."""
_LINE = 64
"""Bytes of a cache line."""
_AHEAD = 16384
"""How many bytes ahead of a row memory is asked for: a head of 64 rows and 128 channels."""


def lanes_of(n: int) -> int:
    """In a row of ``n`` numbers."""
    return -(-n // LANES) * LANES


@numba.njit(inline="always")
def _two_half_rows(  # type: ignore[no-untyped-def]
    n, lanes, kind, halves, at, other_halves, other_at, decay, added, other_added, write, read
):
    """Update and round two rows; their products with C."""
    written, kept = load(write, 0, lanes), spread(decay, lanes)
    one = multiply_add(spread(added, lanes), written, multiply(kept, load_half_row(halves, at, lanes, n, kind)))
    stored = load_half_row(other_halves, other_at, lanes, n, kind)
    other = multiply_add(spread(other_added, lanes), written, multiply(kept, stored))
    store_half_row(halves, at, one, n, kind)
    store_half_row(other_halves, other_at, other, n, kind)
    return products_of_two(one, other, load(read, 0, lanes))


@cache
def half_scan(kind: int, n: int) -> Any:
    """The loop for rows of ``n`` numbers, compiled when it is first called, or taken from numba's cache."""
    lanes = lanes_of(n)
    lines = -(-4 * n // _LINE)

    @numba.njit(parallel=True, fastmath=True, cache=True)
    def scan(halves, x, dt, A, B, C, D, y):  # type: ignore[no-untyped-def]
        """Arguments as `ghostssm.ops._rounding_kernels.half_scan` has them, B and C with zeros up to whole lanes."""
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
