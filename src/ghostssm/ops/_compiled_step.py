"""The decode step as compiled loops. Importing this needs numba; :mod:`ghostssm.ops.step` is what to call.

``fastmath`` lets the compiler add up in vector lanes; sums differ from torch's by rounding only.
"""

from __future__ import annotations

import numba
import numpy as np


def use_threads(count: int) -> None:
    """As many threads as torch uses, for the loops below."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


@numba.njit(parallel=True, fastmath=True, cache=True)
def conv_step(window, x, weight, bias, out):  # type: ignore[no-untyped-def]
    """window (b, c, width) in place, x (b, c), weight (c, width), bias (c,), out (b, c): float32."""
    b, c, width = window.shape
    for i in numba.prange(b):
        for j in range(c):
            taps = window[i, j]
            total = bias[j] + x[i, j] * weight[j, width - 1]
            for k in range(width - 1):
                taps[k] = taps[k + 1]
                total += taps[k] * weight[j, k]
            taps[width - 1] = x[i, j]
            out[i, j] = total / (np.float32(1) + np.exp(-total))


@numba.njit(parallel=True, fastmath=True, cache=True)
def ssd_step(state, x, dt, A, B, C, D, y):  # type: ignore[no-untyped-def]
    """state (b, h, p, n) in place, x and y (b, h, p), dt (b, h), A and D (h,), B and C (b, g, n): float32."""
    b, h, p, n = state.shape
    heads_per_group = h // B.shape[1]
    for index in numba.prange(b * h):
        i, head = index // h, index % h
        write, read = B[i, head // heads_per_group], C[i, head // heads_per_group]
        step = dt[i, head]
        decay = np.exp(step * A[head])
        for j in range(p):
            row, value = state[i, head, j], x[i, head, j]
            added = step * value
            total = D[head] * value
            for k in range(n):
                new = row[k] * decay + added * write[k]
                row[k] = new
                total += new * read[k]
            y[i, head, j] = total


@numba.njit(parallel=True, fastmath=True, cache=True)
def ssd_step_bfloat16(state, x, dt, A, B, C, D, y):  # type: ignore[no-untyped-def]
    """As :func:`ssd_step`, with the state's bfloat16 numbers as their uint16 bit patterns."""
    b, h, p, n = state.shape
    heads_per_group = h // B.shape[1]
    for index in numba.prange(b * h):
        i, head = index // h, index % h
        write, read = B[i, head // heads_per_group], C[i, head // heads_per_group]
        step = dt[i, head]
        decay = np.exp(step * A[head])
        values = np.empty(n, np.float32)
        bits = values.view(np.uint32)
        for j in range(p):
            row, value = state[i, head, j], x[i, head, j]
            added = step * value
            total = D[head] * value
            for k in range(n):
                bits[k] = np.uint32(row[k]) << np.uint32(16)
            for k in range(n):
                values[k] = values[k] * decay + added * write[k]
                total += values[k] * read[k]
            y[i, head, j] = total
            for k in range(n):  # to the nearest, ties to even
                half = np.uint32(0x7FFF) + ((bits[k] >> np.uint32(16)) & np.uint32(1))
                row[k] = np.uint16((bits[k] + half) >> np.uint32(16))
