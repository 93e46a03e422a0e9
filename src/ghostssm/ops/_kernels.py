"""Compiled loops. Importing this needs numba; the functions beside it in this package are what to call.

``fastmath`` lets the compiler add up in vector lanes; sums differ from torch's by rounding only.
"""

from __future__ import annotations

import numba
import numpy as np

_ROWS = 32
"""Rows of a head's state that are worked on at a time: with N = 128 they take 16 KiB, half a first-level cache."""
_STRETCH = 64
"""Tokens over which energies are summed in float32."""


def use_threads(count: int) -> None:
    """As many threads as torch uses, for the loops below."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


def row_blocks(head_dim: int) -> int:
    """Into how many blocks of rows a head's state is cut."""
    return -(-head_dim // _ROWS)


@numba.njit(parallel=True, fastmath=True, cache=True)
def causal_conv(x, taps, bias, out):  # type: ignore[no-untyped-def]
    """x and out (b, l, c), taps (width, c), bias (c,): float32."""
    b, length, c = x.shape
    width = taps.shape[0]
    for index in numba.prange(b * length):
        i, t = index // length, index % length
        row = out[i, t]
        for j in range(c):
            row[j] = bias[j] + x[i, t, j] * taps[width - 1, j]
        for back in range(1, min(width, t + 1)):
            earlier, tap = x[i, t - back], taps[width - 1 - back]
            for j in range(c):
                row[j] += earlier[j] * tap[j]


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
    """As `ssd_step`, with the state's bfloat16 numbers as their uint16 bit patterns."""
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


@numba.njit(parallel=True, fastmath=True, cache=True)
def ssd_scan(state, x, dt, A, B, C, D, y):  # type: ignore[no-untyped-def]
    """state (b, h, p, n) from before to after, x and y (b, l, h, p), dt (b, l, h), A and D (h,), B and C (b, l, g, n).

    Token by token: a block of rows of the state stays in the first-level cache over the whole sequence, and three
    operations per number are all there is.
    """
    b, length, h, p = x.shape
    n = state.shape[3]
    heads_per_group = h // B.shape[2]
    blocks = (p + _ROWS - 1) // _ROWS
    for index in numba.prange(b * h * blocks):
        i, head, block = index // (h * blocks), (index // blocks) % h, index % blocks
        group = head // heads_per_group
        rows = state[i, head, block * _ROWS : min(p, (block + 1) * _ROWS)]
        for t in range(length):
            write, read = B[i, t, group], C[i, t, group]
            step = dt[i, t, head]
            decay = np.exp(step * A[head])
            for j in range(rows.shape[0]):
                row, value = rows[j], x[i, t, head, block * _ROWS + j]
                added = step * value
                total = D[head] * value
                for k in range(n):
                    new = row[k] * decay + added * write[k]
                    row[k] = new
                    total += new * read[k]
                y[i, t, head, block * _ROWS + j] = total


@numba.njit(parallel=True, fastmath=True, cache=True)
def channel_energies(state, x, dt, A, B, C, output, stored):  # type: ignore[no-untyped-def]
    """As `ssd_scan`, with energies instead of y: output and stored (b, h, blocks, n), float64, are added to.

    output gets the sum over t of C_t^2 e_t, stored the sum of e_t, where e_t[n] is the sum over the block's rows of
    H_t[p, n]^2. Sums over a stretch of tokens are float32, sums of stretches float64.
    """
    b, length, h, _ = x.shape
    n = state.shape[3]
    heads_per_group = h // B.shape[2]
    blocks = output.shape[2]
    for index in numba.prange(b * h * blocks):
        i, head, block = index // (h * blocks), (index // blocks) % h, index % blocks
        group = head // heads_per_group
        rows = state[i, head, block * _ROWS : min(x.shape[3], (block + 1) * _ROWS)]
        energy, out, kept = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
        for first in range(0, length, _STRETCH):
            out[:] = 0
            kept[:] = 0
            for t in range(first, min(first + _STRETCH, length)):
                write, read = B[i, t, group], C[i, t, group]
                step = dt[i, t, head]
                decay = np.exp(step * A[head])
                energy[:] = 0
                for j in range(rows.shape[0]):
                    row, added = rows[j], step * x[i, t, head, block * _ROWS + j]
                    for k in range(n):
                        new = row[k] * decay + added * write[k]
                        row[k] = new
                        energy[k] += new * new
                for k in range(n):
                    kept[k] += energy[k]
                    out[k] += energy[k] * read[k] * read[k]
            for k in range(n):
                output[i, head, block, k] += out[k]
                stored[i, head, block, k] += kept[k]
