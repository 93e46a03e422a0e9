"""Compiled loops. Importing this needs numba; the functions beside it in this package are what to call.

``fastmath`` lets the compiler add up in vector lanes; sums differ from torch's by rounding only.
"""

from __future__ import annotations

import numba
import numpy as np

ROWS = 32
"""Rows of a head's state that are worked on at a time: with N = 128 they take 16 KiB, half a first-level cache."""
_STRETCH = 64
"""Tokens over which energies are summed in float32."""
_COLUMNS = 64
"""Columns of a head's state that are read at a time."""
_PRODUCT = 1 << 18
"""Multiplications in one matrix product; for more, BLAS would start threads of its own."""


def use_threads(count: int) -> None:
    """As many threads as torch uses, for the loops below."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


def row_blocks(head_dim: int) -> int:
    """Into how many blocks of rows a head's state is cut."""
    return -(-head_dim // ROWS)


def column_blocks(state_size: int) -> int:
    """Into how many blocks of columns a head's state is cut where it is read."""
    return -(-state_size // _COLUMNS)


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
def conv_step(windows, x, taps, bias, out):  # type: ignore[no-untyped-def]
    """windows (b, c, 4) in place, x (b, c), taps (c, 4), bias (c,), out (b, c), before SiLU: float32.

    Written out for the one width that models have, it runs in vector lanes over the channels. The order of the sum is
    that of `causal_conv`, so that a state that is rounded stochastically is the same by either way.
    """
    b, c, _ = windows.shape
    for i in numba.prange(b):
        window, new, mixed = windows[i], x[i], out[i]
        for j in range(c):
            first, second, third, last = window[j, 1], window[j, 2], window[j, 3], new[j]
            mixed[j] = bias[j] + last * taps[j, 3] + third * taps[j, 2] + second * taps[j, 1] + first * taps[j, 0]
            window[j, 0], window[j, 1], window[j, 2], window[j, 3] = first, second, third, last


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
def ssd_scan(state, x, dt, A, B, C, D, y):  # type: ignore[no-untyped-def]
    """state (b, h, p, n) from before to after, x and y (b, l, h, p), dt (b, l, h), A and D (h,), B and C (b, l, g, n).

    Token by token: a block of rows of the state stays in the first-level cache over the whole sequence, and three
    operations per number are all there is.
    """
    b, length, h, p = x.shape
    n = state.shape[3]
    heads_per_group = h // B.shape[2]
    blocks = (p + ROWS - 1) // ROWS
    for index in numba.prange(b * h * blocks):
        i, head, block = index // (h * blocks), (index // blocks) % h, index % blocks
        group = head // heads_per_group
        rows = state[i, head, block * ROWS : min(p, (block + 1) * ROWS)]
        for t in range(length):
            write, read = B[i, t, group], C[i, t, group]
            step = dt[i, t, head]
            decay = np.exp(step * A[head])
            for j in range(rows.shape[0]):
                row, value = rows[j], x[i, t, head, block * ROWS + j]
                added = step * value
                total = D[head] * value
                for k in range(n):
                    new = row[k] * decay + added * write[k]
                    row[k] = new
                    total += new * read[k]
                y[i, t, head, block * ROWS + j] = total


@numba.njit(parallel=True, fastmath=True, cache=True)
def ssd_scan_narrow(state, x, dt, A, B, C, D, y):  # type: ignore[no-untyped-def]
    """As `ssd_scan`, for n up to p: vector lanes run over p, so that they are full, and no sum runs across them."""
    b, length, h, p = x.shape
    n = state.shape[3]
    heads_per_group = h // B.shape[2]
    for index in numba.prange(b * h):
        i, head = index // h, index % h
        group = head // heads_per_group
        columns, added = np.empty((n, p), x.dtype), np.empty(p, x.dtype)
        for k in range(n):
            for j in range(p):
                columns[k, j] = state[i, head, j, k]
        for t in range(length):
            write, read = B[i, t, group], C[i, t, group]
            step, skip = dt[i, t, head], D[head]
            decay = np.exp(step * A[head])
            value, out = x[i, t, head], y[i, t, head]
            for j in range(p):
                added[j] = step * value[j]
                out[j] = skip * value[j]
            for k in range(n):
                column, written, weight = columns[k], write[k], read[k]
                for j in range(p):
                    new = column[j] * decay + added[j] * written
                    column[j] = new
                    out[j] += new * weight
        for k in range(n):
            for j in range(p):
                state[i, head, j, k] = columns[k, j]


@numba.njit(fastmath=True, cache=True, nogil=True)
def channel_energies(first, last, state, x, dt, A, B, C, output, stored):  # type: ignore[no-untyped-def]
    """As `ssd_scan`, with energies instead of y: output and stored (b, h, blocks, n), float64, are added to.

    output gets the sum over t of C_t^2 e_t, stored the sum of e_t, where e_t[n] is the sum over the block's rows of
    H_t[p, n]^2. Sums over a stretch of tokens are float32, sums of stretches float64.
    """
    _, length, h, _ = x.shape
    n = state.shape[3]
    heads_per_group = h // B.shape[2]
    blocks = output.shape[2]
    for index in range(first, last):
        i, head, block = index // (h * blocks), (index // blocks) % h, index % blocks
        group = head // heads_per_group
        rows = state[i, head, block * ROWS : min(x.shape[3], (block + 1) * ROWS)]
        energy, out, kept = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
        for begin in range(0, length, _STRETCH):
            out[:] = 0
            kept[:] = 0
            for t in range(begin, min(begin + _STRETCH, length)):
                write, read = B[i, t, group], C[i, t, group]
                step = dt[i, t, head]
                decay = np.exp(step * A[head])
                energy[:] = 0
                for j in range(rows.shape[0]):
                    row, added = rows[j], step * x[i, t, head, block * ROWS + j]
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


@numba.njit(fastmath=True, cache=True, nogil=True)
def rounding_costs(first, last, x, dt, A, B, C, weight, left_out, rounded):  # type: ignore[no-untyped-def]
    """`ghostssm.ops.rounding_costs`: left_out and rounded (b, h, blocks, n), float64, are added to.

    A row is walked forwards with its state and then backwards with its Gramian.
    """
    _, length, h, p = x.shape
    n = B.shape[3]
    heads_per_group = h // B.shape[2]
    blocks = left_out.shape[2]
    for index in range(first, last):
        i, head, block = index // (h * blocks), (index // blocks) % h, index % blocks
        group = head // heads_per_group
        row, cost, peaks = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(length, np.float32)
        for j in range(block * ROWS, min(p, (block + 1) * ROWS)):
            row[:] = 0
            cost[:] = 0
            for t in range(length):
                write, read = B[i, t, group], C[i, t, group]
                step, weighed = dt[i, t, head], weight[i, t, head, j]
                decay, added = np.exp(step * A[head]), step * x[i, t, head, j]
                peak = np.float32(0)
                for k in range(n):
                    new = row[k] * decay + added * write[k]
                    row[k] = new
                    cost[k] += weighed * (new * new) * (read[k] * read[k])
                    peak = max(peak, new * new)
                peaks[t] = peak
            for k in range(n):
                left_out[i, head, block, k] += cost[k]
            row[:] = 0
            cost[:] = 0
            for back in range(1, length):
                t = length - back
                read, weighed, peak = C[i, t, group], weight[i, t, head, j], peaks[t - 1]
                decay = np.exp(np.float32(2) * dt[i, t, head] * A[head])
                for k in range(n):
                    row[k] = decay * (row[k] + weighed * read[k] * read[k])
                    cost[k] += row[k] * peak
            for k in range(n):
                rounded[i, head, block, k] += cost[k]


@numba.njit(fastmath=True, cache=True)
def _add_product(u, rows, product, total, fresh):  # type: ignore[no-untyped-def]
    """total (d, width) gets u (d, p) times rows (p, width), added to what it has unless it is fresh."""
    d, at_once = u.shape[0], max(1, _PRODUCT // rows.size)
    for e in range(0, d, at_once):
        np.dot(u[e : e + at_once], rows, product[e : e + at_once])
    for e in range(d):
        for k in range(rows.shape[1]):
            total[e, k] = product[e, k] if fresh else total[e, k] + product[e, k]


@numba.njit(fastmath=True, cache=True, nogil=True)
def read_states(first, last, state, x, dt, A, B, u, at, reads):  # type: ignore[no-untyped-def]
    """state (b, h, p, n) from before to after; x (b, l, h, p), dt (b, l, h), A (h,), B (b, l, g, n), u (b, s, h, d, p),
    at (s,) int64; reads (s, b, g, d, n) is written.

    One head of a group after the other, so that its state stays in the cache and sums need no second thread. A state is
    read by BLAS, which is several times faster at a matrix product than loops are.
    """
    _, length, h, p = x.shape
    n, d = state.shape[3], u.shape[3]
    groups = B.shape[2]
    blocks = (n + _COLUMNS - 1) // _COLUMNS
    for index in range(first, last):
        i, group, column = index // (groups * blocks), (index // blocks) % groups, index % blocks * _COLUMNS
        width = min(n, column + _COLUMNS) - column
        rows, product = np.empty((p, width), np.float32), np.empty((d, width), np.float32)
        for head in range(group * (h // groups), (group + 1) * (h // groups)):
            sample = 0
            for j in range(p):
                for k in range(width):
                    rows[j, k] = state[i, head, j, column + k]
            for t in range(length):
                write, step = B[i, t, group, column : column + width], dt[i, t, head]
                decay = np.exp(step * A[head])
                for j in range(p):
                    row, added = rows[j], step * x[i, t, head, j]
                    for k in range(width):
                        row[k] = row[k] * decay + added * write[k]
                if sample < len(at) and at[sample] == t:
                    total = reads[sample, i, group, :, column : column + width]
                    _add_product(u[i, sample, head], rows, product, total, head == group * (h // groups))
                    sample += 1
            for j in range(p):
                for k in range(width):
                    state[i, head, j, column + k] = rows[j, k]


@numba.njit(parallel=True, fastmath=True, cache=True)
def read_and_pull(maps, directions, along, readouts, share, output, pull):  # type: ignore[no-untyped-def]
    """maps (s, g, d, n), directions (s, g, d), along, readouts and pull (s, g, n), share (1,), output (s, d):
    float32.

    Writes what the maps, less a share of directions along^T, make of the readouts, and what their transpose makes of
    that: so every map is fetched from memory once.
    """
    samples, groups, d, n = maps.shape
    amount = share[0]
    for i in numba.prange(samples):
        for e in range(d):
            output[i, e] = 0
        for group in range(groups):
            read, off = readouts[i, group], along[i, group]
            inner = np.float32(0)
            for k in range(n):
                inner += off[k] * read[k]
            for e in range(d):
                row, total = maps[i, group, e], -amount * inner * directions[i, group, e]
                for k in range(n):
                    total += row[k] * read[k]
                output[i, e] += total
        for group in range(groups):
            back, off = pull[i, group], along[i, group]
            inner = np.float32(0)
            for e in range(d):
                inner += amount * directions[i, group, e] * output[i, e]
            for k in range(n):
                back[k] = -inner * off[k]
            for e in range(d):
                row, weight = maps[i, group, e], output[i, e]
                for k in range(n):
                    back[k] += weight * row[k]
