"""The compiled loops for states in bfloat16 and float16, one for each size of a state.

A row of the state is one vector (`ghostssm.ops._lanes`), which stays in registers from the load to the store.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from ghostssm.ops._lane_codes import load_half_row, made_of, next_word, random_row, store_half_row
from ghostssm.ops._lanes import load, multiply, multiply_add, prefetch, products_of_two, spread

LANES = 16
"""A row has a multiple of so many lanes."""
_LINE = 64
"""Bytes of a cache line."""
_AHEAD = 16384
"""How many bytes ahead of a row memory is asked for: a head of 64 rows and 128 channels."""


def lanes_of(n: int) -> int:
    """In a row of ``n`` numbers."""
    return -(-n // LANES) * LANES


@numba.njit(inline="always")
def _two_rows(  # type: ignore[no-untyped-def]
    n, lanes, kind, halves, at, other_halves, other_at, decay, added, other_added, write, read, words, other_words
):
    """Update and round two rows; their products with C."""
    written, kept = load(write, 0, lanes), spread(decay, lanes)
    one = multiply_add(spread(added, lanes), written, multiply(kept, load_half_row(halves, at, lanes, n, kind)))
    stored = load_half_row(other_halves, other_at, lanes, n, kind)
    other = multiply_add(spread(other_added, lanes), written, multiply(kept, stored))
    store_half_row(halves, at, one, n, kind, words)
    store_half_row(other_halves, other_at, other, n, kind, other_words)
    return products_of_two(one, other, load(read, 0, lanes))


@cache
def half_scan(kind: int, n: int, stochastic: bool) -> Any:
    """The loop for rows of ``n`` numbers, compiled when it is first called, or taken from numba's cache."""
    lanes, sources = lanes_of(n), made_of()
    lines = -(-4 * n // _LINE)

    @numba.njit(parallel=True, fastmath=True, cache=True)
    def scan(halves, key, first_sequence, first_token, x, dt, A, B, C, D, y):  # type: ignore[no-untyped-def]
        """Token by token over a stored state, in place.

        halves int16 (b, h, p * n). x and y (b, l, h, p), dt (b, l, h), A and D (h,), B and C (b, l, g, lanes), zeros
        behind the n numbers.
        """
        _ = sources  # for numba's cache
        b, length, h, p = x.shape
        heads_per_group = h // B.shape[2]
        for index in numba.prange(b * h):
            i, head = index // h, index % h
            group = head // heads_per_group
            own = halves[i, head]
            spare = np.zeros(n, np.int16) if p % 2 else own
            own_key = next_word(np.uint32(key), first_sequence + i)
            for t in range(length):
                inputs, outputs = x[i, t, head], y[i, t, head]
                write, read = B[i, t, group], C[i, t, group]
                step = dt[i, t, head]
                decay = np.exp(step * A[head])
                row_key = next_word(own_key, first_token + t)
                for j in range(0, p, 2):
                    for line in range(lines):
                        prefetch(own, j * n + (_AHEAD + line * _LINE) // 2)
                    last = j + 1 == p
                    other, other_at = (spare, 0) if last else (own, (j + 1) * n)
                    other_input = np.float32(0) if last else inputs[j + 1]
                    words = random_row(next_word(row_key, head * p + j), lanes) if stochastic else None
                    other_words = random_row(next_word(row_key, head * p + j + 1), lanes) if stochastic else None
                    total, other_total = _two_rows(
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
                        words,
                        other_words,
                    )
                    outputs[j] = total + D[head] * inputs[j]
                    if not last:
                        outputs[j + 1] = other_total + D[head] * other_input

    return scan
