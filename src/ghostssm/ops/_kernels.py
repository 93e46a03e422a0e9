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


@numba.njit(fastmath=True, cache=True)
def _advance(H, decay, u, dy, B, gathered):  # type: ignore[no-untyped-def]
    """H (rows, n) over one token; gathered (n,) += dy^T (decay H). Rows in fours; u and dy (rows,), B (n,)."""
    for j in range(0, H.shape[0], 4):
        row0, row1, row2, row3 = H[j], H[j + 1], H[j + 2], H[j + 3]
        u0, u1, u2, u3 = u[j], u[j + 1], u[j + 2], u[j + 3]
        dy0, dy1, dy2, dy3 = dy[j], dy[j + 1], dy[j + 2], dy[j + 3]
        for k in range(B.shape[0]):
            kept0, kept1, kept2, kept3 = row0[k] * decay, row1[k] * decay, row2[k] * decay, row3[k] * decay
            write = B[k]
            gathered[k] += dy0 * kept0 + dy1 * kept1 + dy2 * kept2 + dy3 * kept3
            row0[k] = kept0 + u0 * write
            row1[k] = kept1 + u1 * write
            row2[k] = kept2 + u2 * write
            row3[k] = kept3 + u3 * write


@numba.njit(fastmath=True, cache=True)
def _retreat(G, decay, u, dy, B, C, gathered, du):  # type: ignore[no-untyped-def]
    """G (rows, n), the gradient of H, over one token backwards; gathered (n,) += u^T G, du (rows,) = (decay G) B."""
    for j in range(0, G.shape[0], 4):
        row0, row1, row2, row3 = G[j], G[j + 1], G[j + 2], G[j + 3]
        u0, u1, u2, u3 = u[j], u[j + 1], u[j + 2], u[j + 3]
        dy0, dy1, dy2, dy3 = dy[j], dy[j + 1], dy[j + 2], dy[j + 3]
        du0 = du1 = du2 = du3 = G.dtype.type(0)
        for k in range(B.shape[0]):
            write, read = B[k], C[k]
            kept0, kept1, kept2, kept3 = row0[k] * decay, row1[k] * decay, row2[k] * decay, row3[k] * decay
            du0 += kept0 * write
            du1 += kept1 * write
            du2 += kept2 * write
            du3 += kept3 * write
            kept0 += dy0 * read
            kept1 += dy1 * read
            kept2 += dy2 * read
            kept3 += dy3 * read
            gathered[k] += u0 * kept0 + u1 * kept1 + u2 * kept2 + u3 * kept3
            row0[k] = kept0
            row1[k] = kept1
            row2[k] = kept2
            row3[k] = kept3
        du[j], du[j + 1], du[j + 2], du[j + 3] = du0, du1, du2, du3


@numba.njit(fastmath=True, cache=True)
def _fill(block, state, place):  # type: ignore[no-untyped-def]
    """Rows of a head's state to a block, whose last four are made up with zeros; slices would take long to compile."""
    head, _, first, count = place
    for j in range(block.shape[0]):
        for k in range(block.shape[1]):
            block[j, k] = state[head, first + j, k] if j < count else 0


@numba.njit(fastmath=True, cache=True)
def _states(H, place, x, dt, A, B, C, dy, sums_C, flow, work):  # type: ignore[no-untyped-def]
    """H (rows, n) over a sequence: adds to dC (l, n) and to flow (l + 1,), and returns the sum of dy x.

    place: the head, its group, its first row here and how many rows there are.
    """
    head, group, first, count = place
    u, out, _, gathered = work
    zero = H.dtype.type(0)  # sums that begin with the literal 0 would be float64
    skip = 0.0
    for t in range(dt.shape[0]):
        write, read, step, sums = B[t, group], C[t, group], dt[t, head], sums_C[t]
        skipped = zero
        for j in range(count):
            value = x[t, head, first + j]
            out[j] = dy[t, head, first + j]
            u[j] = step * value
            skipped += value * out[j]
        own, carried = step * skipped, zero
        gathered[:] = 0
        _advance(H, np.exp(step * A[head]), u, out, write, gathered)
        for k in range(write.shape[0]):
            sums[k] += gathered[k] + own * write[k]
            carried += gathered[k] * read[k]
        flow[t] += carried
        skip += skipped
    return skip


@numba.njit(fastmath=True, cache=True)
def _state_gradients(G, place, x, dt, A, B, C, D, dy, dx, sums_B, flow, written, work):  # type: ignore[no-untyped-def]
    """G (rows, n) over a sequence backwards: sets dx, adds to dB (l, n), flow (l + 1,) and, in x du, written (l,)."""
    head, group, first, count = place
    u, out, du, gathered = work
    zero = G.dtype.type(0)
    decay = G.dtype.type(1)
    for t in range(dt.shape[0] - 1, -1, -1):
        write, read, step, sums = B[t, group], C[t, group], dt[t, head], sums_B[t]
        for j in range(count):
            out[j] = dy[t, head, first + j]
            u[j] = step * x[t, head, first + j]
        gathered[:] = 0
        _retreat(G, decay, u, out, write, read, gathered, du)
        alike, carried, own = zero, zero, zero
        for k in range(write.shape[0]):
            sums[k] += gathered[k]
            alike += write[k] * read[k]
        for j in range(count):
            whole = du[j] + alike * out[j]
            carried += u[j] * du[j]
            own += x[t, head, first + j] * whole
            dx[t, head, first + j] = step * whole + D[head] * out[j]
        flow[t] -= carried
        written[t] += own
        decay = np.exp(step * A[head])
    for j in range(count):
        for k in range(G.shape[1]):
            G[j, k] *= decay


@numba.njit(fastmath=True, cache=True)
def _backward_of_heads(  # type: ignore[no-untyped-def]
    heads, group, state, x, dt, A, B, C, D, dy, dstate, dx, ddt, dA, sums_B, sums_C, dD
):
    """`ssd_scan_backward` for some heads of one group of one sequence; no argument has an axis for sequences."""
    (length, _, p), n = x.shape, B.shape[2]
    rows, of_rows = np.empty((_ROWS, n), x.dtype), np.empty((3, _ROWS), x.dtype)
    work = of_rows[0], of_rows[1], of_rows[2], np.empty(n, x.dtype)
    for head in range(heads[0], heads[1]):
        flow, written = np.zeros(length + 1), np.zeros(length)
        for first in range(0, p, _ROWS):
            place = head, group, first, min(_ROWS, p - first)
            block = rows[: (place[3] + 3) // 4 * 4]
            of_rows[:] = 0
            _fill(block, state, place)
            dD[head] += _states(block, place, x, dt, A, B, C, dy, sums_C, flow, work)
            for j in range(place[3]):
                for k in range(n):
                    flow[length] += dstate[head, first + j, k] * block[j, k]
            _fill(block, dstate, place)
            _state_gradients(block, place, x, dt, A, B, C, D, dy, dx, sums_B, flow, written, work)
            for j in range(place[3]):
                for k in range(n):
                    dstate[head, first + j, k] = block[j, k]
        log_decay = flow[length]
        for t in range(length - 1, -1, -1):
            log_decay += flow[t]
            ddt[t, head] = written[t] + A[head] * log_decay
            dA[head] += dt[t, head] * log_decay


@numba.njit(parallel=True, fastmath=True, cache=True)
def ssd_scan_backward(state, x, dt, A, B, C, D, dy, dstate, dx, ddt, dA, dB, dC, dD):  # type: ignore[no-untyped-def]
    """The gradients of `ssd_scan`, whose arguments stand first.

    state (b, h, p, n), before the first token. dy as y. dstate (b, h, p, n): the gradient of the state, from after to
    before. dx, ddt as x, dt. dA, dD (b, h), float64, and dB, dC (b, g, parts, l, n), each part
    a sum over some heads, begin as zeros.

    With u_t = dt_t x_t, H the state and G its gradient, each walks over the sequence once, in opposite directions:

        H_t = a_t H_{t-1} + u_t B_t^T           dC_t = H_t^T dy_t               du_t = G_t B_t
        G_t = a_{t+1} G_{t+1} + dy_t C_t^T      dB_t = G_t^T u_t                dx_t = dt_t du_t + D dy_t

    so that no state is kept. The gradient of log a_t is q_t = a_t <G_t, H_{t-1}>, and needs no product of the two:

        q_t = q_{t+1} + dy_t^T (a_t H_{t-1}) C_t - u_t^T (a_{t+1} G_{t+1}) B_t

    What a token writes and reads itself is on both sides, and left out lest q drown in its rounding.
    """
    groups, parts = dB.shape[1], dB.shape[2]
    heads_per_group = x.shape[2] // groups
    heads_per_part = (heads_per_group + parts - 1) // parts
    for index in numba.prange(x.shape[0] * groups * parts):
        i, group, part = index // (groups * parts), (index // parts) % groups, index % parts
        first = group * heads_per_group + part * heads_per_part
        heads = first, min(first + heads_per_part, (group + 1) * heads_per_group)
        _backward_of_heads(
            heads, group, state[i], x[i], dt[i], A, B[i], C[i], D, dy[i],
            dstate[i], dx[i], ddt[i], dA[i], dB[i, group, part], dC[i, group, part], dD[i],
        )  # fmt: skip
