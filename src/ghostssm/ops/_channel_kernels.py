"""The compiled loop for states in int8, fp8, int4 and tiers.

Codes are stored channel by channel (`ghostssm.ops.state_format`), so that the rows of a head's state lie side by side.
They are the lanes of a vector (`ghostssm.ops._lanes`): a channel's codes come and go whole, every row has its sum and
its largest magnitude in a lane of its own, and a head may keep as many channels in 8 and in 4 bits as it likes.

A row is worked on in units of its decayed scale: with codes q, scale s, and what is added, u B,

    s decay q + u B = unit (q + u / unit B),    unit = s decay,

so that a number takes one multiplication and addition for its update, one for y, and one for its code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from ghostssm.ops._lane_codes import (
    LEAST_PEAK,
    load_code_pairs,
    load_codes,
    made_of,
    next_word,
    random_words,
    store_code_pairs,
    store_codes,
)
from ghostssm.ops._lanes import larger_magnitude, load, multiply, multiply_add, prefetch, spread, store
from ghostssm.ops.state_format import FORMATS, INT4, INT8

ROWS = 32
"""Lanes of a vector: 2 registers of AVX-512, 4 of AVX2."""
_AHEAD = 12288
"""How many bytes ahead memory is asked for: a head and a half of 64 rows and 128 channels in int8. Evenly, as the work
goes on: half the lines would come too late if all were asked for with the first rows."""
_MOST_UNITS = np.float32(1e30)
_LARGEST = {form.kind: np.float32(form.largest) for form in FORMATS.values() if form.largest is not None}
_WIDER = _LARGEST[INT8.kind] / _LARGEST[INT4.kind]
"""Levels of 8 bits in one of 4 bits, both of the same peak."""


@numba.njit(inline="always")
def _update(rows, kind, own, p, first, wide, narrow, rates, write, read, values, totals, peaks):  # type: ignore[no-untyped-def]
    """One token of some rows: their new numbers, products with C, and largest magnitudes, in their units."""
    half = (narrow + 1) // 2
    rate, total, peak = load(rates, first, rows), spread(np.float32(0), rows), spread(np.float32(0), rows)
    for k in range(wide):
        prefetch(own, first * (wide + half) + k * rows + _AHEAD)
        new = multiply_add(rate, spread(write[k], rows), load_codes(own, k * p + first, rows, kind))
        total = multiply_add(new, spread(read[k], rows), total)
        peak = larger_magnitude(new, peak)
        store(values, k * rows, new)
    # In units of 4 bits, which are wider: the code that comes of them takes the same factor.
    rate, wider = multiply(rate, spread(1 / _WIDER, rows)), spread(_WIDER, rows)
    other_total, other_peak = spread(np.float32(0), rows), spread(np.float32(0), rows)
    for k in range(half):
        place, k_low, k_high = wide + 2 * k, wide + k, wide + half + k
        paired = k_high < wide + narrow
        prefetch(own, first * (wide + half) + k_low * rows + _AHEAD)
        low, high = load_code_pairs(own, k_low * p + first, rows)
        low = multiply_add(rate, spread(write[k_low], rows), low)
        high = multiply_add(rate, spread(write[k_high] if paired else np.float32(0), rows), high)
        other_total = multiply_add(low, spread(read[k_low], rows), other_total)
        other_total = multiply_add(high, spread(read[k_high] if paired else np.float32(0), rows), other_total)
        other_peak = larger_magnitude(high, larger_magnitude(low, other_peak))
        store(values, place * rows, low)
        store(values, (place + 1) * rows, high)
    store(totals, first, multiply_add(other_total, wider, total))
    store(peaks, first, larger_magnitude(multiply(other_peak, wider), peak))


@numba.njit(inline="always")
def _round(rows, kind, stochastic, own, p, first, wide, narrow, inverses, values, keys):  # type: ignore[no-untyped-def]
    """Store what `_update` left of some rows."""
    half = (narrow + 1) // 2
    inverse = load(inverses, first, rows)
    for k in range(wide):
        number = multiply(load(values, k * rows, rows), inverse)
        words = random_words(keys, first, rows, k) if stochastic else None
        store_codes(own, k * p + first, number, kind, words)
    for k in range(half):
        low = multiply(load(values, (wide + 2 * k) * rows, rows), inverse)
        high = multiply(load(values, (wide + 2 * k + 1) * rows, rows), inverse)
        # Each tier draws its random numbers as if it were alone.
        low_words = random_words(keys, first, rows, k) if stochastic else None
        high_words = random_words(keys, first, rows, half + k) if stochastic else None
        store_code_pairs(own, (wide + k) * p + first, low, high, low_words, high_words)


@numba.njit(inline="always", error_model="numpy")
def _token(rows, kind, stochastic, largest, own, p, first, wide, narrow, write, read, work):  # type: ignore[no-untyped-def]
    """One token of some rows, from the ``first`` on."""
    rates, totals, tops, inverses, values, keys = work
    _update(rows, kind, own, p, first, wide, narrow, rates, write, read, values, totals, tops)
    for j in range(first, first + rows):
        inverses[j] = largest / max(tops[j], LEAST_PEAK)
    _round(rows, kind, stochastic, own, p, first, wide, narrow, inverses, values, keys)


@cache
def channel_scan(kind: int, rest: int, stochastic: bool) -> Any:
    """The loop, compiled when it is first called, or taken from numba's cache.

    Args:
        kind: of the numbers in 8 bits: int8 or fp8. rest: rows of a head that do not fill a vector.
    """
    largest, sources = _LARGEST[kind], made_of()

    @numba.njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
    def scan(tasks, codes, peaks, places, key, first_sequence, first_token, x, dt, A, B, C, D, y):  # type: ignore[no-untyped-def]
        """Token by token over a stored state, in place.

        codes int8 (b, bytes) and peaks float32 are the same memory; places (4, h) says where a head's codes and peaks
        begin in them, and how many channels it has in 8 and in 4 bits. x and y (b, l, h, p), dt (b, l, h), A and D
        (h,), B and C (b, l, g, n). The work is cut into ``tasks``.
        """
        _ = sources  # for numba's cache
        b, length, h, p = x.shape
        heads_per_group = h // B.shape[2]
        for task in numba.prange(tasks):
            # Once for many heads: an allocation costs as much as several rows.
            room, keys = np.empty((5, p), np.float32), np.empty(p, np.uint32)
            units, rates, totals, tops, inverses = room[0], room[1], room[2], room[3], room[4]
            values = np.empty((B.shape[3] + 1) * ROWS, np.float32)  # an odd channel in 4 bits has a partner
            for index in range(b * h * task // tasks, b * h * (task + 1) // tasks):
                i, head = index // h, index % h
                group, wide, narrow = head // heads_per_group, places[2, head], places[3, head]
                own, own_peaks = codes[i, places[0, head] :], peaks[i, places[1, head] :]
                own_key = next_word(np.uint32(key), first_sequence + i)
                for t in range(length):
                    inputs, outputs = x[i, t, head], y[i, t, head]
                    write, read = B[i, t, group], C[i, t, group]
                    step = dt[i, t, head]
                    decay = np.exp(step * A[head])
                    for j in range(p):
                        added = step * inputs[j]
                        # What a row held is lost in rounding where so much more is added.
                        least = max(abs(added) / _MOST_UNITS, LEAST_PEAK / largest)
                        units[j] = max(own_peaks[j] * decay / largest, least)
                        rates[j] = added / units[j]
                    if stochastic:
                        token_key = next_word(own_key, first_token + t)
                        for j in range(p):
                            keys[j] = next_word(token_key, head * p + j)
                    work = rates, totals, tops, inverses, values, keys
                    for first in range(0, p - rest, ROWS):
                        _token(ROWS, kind, stochastic, largest, own, p, first, wide, narrow, write, read, work)
                    if rest:
                        _token(rest, kind, stochastic, largest, own, p, p - rest, wide, narrow, write, read, work)
                    for j in range(p):
                        outputs[j] = totals[j] * units[j] + D[head] * inputs[j]
                        own_peaks[j] = tops[j] * units[j]

    return scan
