"""The scan's backward pass as compiled loops; conventions as in `_kernels`."""

from __future__ import annotations

import numba
import numpy as np

from ghostssm.ops._kernels import ROWS as _ROWS

# The backward pass works on a block: 32 rows and up to 128 columns of a head's state and, as further rows, sums over
# these, B_t and C_t. The number of rows and the distance between them are constant: a compiler sees that none overlap.
_COLUMNS = 128
_SUMS, _WRITE, _READ = _ROWS * _COLUMNS, (_ROWS + 1) * _COLUMNS, (_ROWS + 2) * _COLUMNS


@numba.njit(fastmath=True, cache=True)
def _advance(H, columns, decay, u, dy):  # type: ignore[no-untyped-def]
    """A block of states over one token, four rows at a time; its sums += dy^T (decay H). u and dy (rows,)."""
    for j in range(0, _ROWS, 4):
        row = j * _COLUMNS
        u0, u1, u2, u3 = u[j], u[j + 1], u[j + 2], u[j + 3]
        dy0, dy1, dy2, dy3 = dy[j], dy[j + 1], dy[j + 2], dy[j + 3]
        for k in range(columns):
            write = H[_WRITE + k]
            kept0 = H[row + k] * decay
            kept1 = H[row + _COLUMNS + k] * decay
            kept2 = H[row + 2 * _COLUMNS + k] * decay
            kept3 = H[row + 3 * _COLUMNS + k] * decay
            H[_SUMS + k] += dy0 * kept0 + dy1 * kept1 + dy2 * kept2 + dy3 * kept3
            H[row + k] = kept0 + u0 * write
            H[row + _COLUMNS + k] = kept1 + u1 * write
            H[row + 2 * _COLUMNS + k] = kept2 + u2 * write
            H[row + 3 * _COLUMNS + k] = kept3 + u3 * write


@numba.njit(fastmath=True, cache=True)
def _retreat(G, columns, decay, u, dy, du):  # type: ignore[no-untyped-def]
    """A block of gradients of states over one token backwards; its sums += u^T G, and du (rows,) = (decay G) B."""
    for j in range(0, _ROWS, 4):
        row = j * _COLUMNS
        u0, u1, u2, u3 = u[j], u[j + 1], u[j + 2], u[j + 3]
        dy0, dy1, dy2, dy3 = dy[j], dy[j + 1], dy[j + 2], dy[j + 3]
        du0 = du1 = du2 = du3 = G.dtype.type(0)
        for k in range(columns):
            write, read = G[_WRITE + k], G[_READ + k]
            kept0 = G[row + k] * decay
            kept1 = G[row + _COLUMNS + k] * decay
            kept2 = G[row + 2 * _COLUMNS + k] * decay
            kept3 = G[row + 3 * _COLUMNS + k] * decay
            du0 += kept0 * write
            du1 += kept1 * write
            du2 += kept2 * write
            du3 += kept3 * write
            kept0 += dy0 * read
            kept1 += dy1 * read
            kept2 += dy2 * read
            kept3 += dy3 * read
            G[_SUMS + k] += u0 * kept0 + u1 * kept1 + u2 * kept2 + u3 * kept3
            G[row + k] = kept0
            G[row + _COLUMNS + k] = kept1
            G[row + 2 * _COLUMNS + k] = kept2
            G[row + 3 * _COLUMNS + k] = kept3
        du[j], du[j + 1], du[j + 2], du[j + 3] = du0, du1, du2, du3


@numba.njit(fastmath=True, cache=True)
def _fill(block, state, place):  # type: ignore[no-untyped-def]
    """A block from a state (h, p, n); zeros make up its rows. Slices of arrays would take long to compile."""
    head, _, row, column, rows, columns = place
    for j in range(_ROWS):
        for k in range(columns):
            block[j * _COLUMNS + k] = state[head, row + j, column + k] if j < rows else 0


@numba.njit(fastmath=True, cache=True)
def _token(block, B, C, t, place):  # type: ignore[no-untyped-def]
    """B_t and C_t into a block, and zeros for its sums."""
    _, group, _, column, _, columns = place
    write, read = B[t, group, column : column + columns], C[t, group, column : column + columns]
    for k in range(columns):
        block[_SUMS + k] = 0
        block[_WRITE + k] = write[k]
        block[_READ + k] = read[k]


@numba.njit(fastmath=True, cache=True)
def _states(H, place, x, dt, A, B, C, dy, sums_C, flow, work):  # type: ignore[no-untyped-def]
    """A block of states over a sequence: adds to dC (l, n) and to flow (l + 1,), and returns the sum of dy x.

    place: the head, its group, the block's first row and column, how many rows and columns it has.
    """
    head, _, row, column, rows, columns = place
    u, out, _ = work
    zero = H.dtype.type(0)  # sums that begin with the literal 0 would be float64
    skip = 0.0
    for t in range(dt.shape[0]):
        step, skipped, carried = dt[t, head], zero, zero
        _token(H, B, C, t, place)
        values, outputs = x[t, head, row : row + rows], dy[t, head, row : row + rows]
        for j in range(rows):
            out[j] = outputs[j]
            u[j] = step * values[j]
            skipped += values[j] * outputs[j]
        _advance(H, columns, np.exp(step * A[head]), u, out)
        own, sums = step * skipped, sums_C[t, column : column + columns]
        for k in range(columns):
            sums[k] += H[_SUMS + k] + own * H[_WRITE + k]
            carried += H[_SUMS + k] * H[_READ + k]
        flow[t] += carried
        skip += skipped
    return skip


@numba.njit(fastmath=True, cache=True)
def _state_gradients(G, place, x, dt, A, B, C, dy, dx, sums_B, flow, written, work):  # type: ignore[no-untyped-def]
    """A block of gradients over a sequence backwards: adds to dx, dB (l, n), flow (l + 1,) and, in x du, written (l,).

    Returns the decay of the first token.
    """
    head, _, row, column, rows, columns = place
    u, out, du = work
    zero = G.dtype.type(0)
    decay = G.dtype.type(1)
    for t in range(dt.shape[0] - 1, -1, -1):
        step = dt[t, head]
        _token(G, B, C, t, place)
        values, outputs, of_x = (
            x[t, head, row : row + rows],
            dy[t, head, row : row + rows],
            dx[t, head, row : row + rows],
        )
        for j in range(rows):
            out[j] = outputs[j]
            u[j] = step * values[j]
        _retreat(G, columns, decay, u, out, du)
        alike, carried, own, sums = zero, zero, zero, sums_B[t, column : column + columns]
        for k in range(columns):
            sums[k] += G[_SUMS + k]
            alike += G[_WRITE + k] * G[_READ + k]
        for j in range(rows):
            whole = du[j] + alike * out[j]
            carried += u[j] * du[j]
            own += values[j] * whole
            of_x[j] += step * whole
        flow[t] -= carried
        written[t] += own
        decay = np.exp(step * A[head])
    return decay


@numba.njit(fastmath=True, cache=True)
def _backward_of_heads(  # type: ignore[no-untyped-def]
    heads, group, state, x, dt, A, B, C, dy, dstate, dx, ddt, dA, sums_B, sums_C, dD
):
    """`ssd_scan_backward` for some heads of one group of one sequence; no argument has an axis for sequences."""
    (length, _, p), n = x.shape, B.shape[2]
    block, of_rows = np.empty((_ROWS + 3) * _COLUMNS, x.dtype), np.empty((3, _ROWS), x.dtype)
    work = of_rows[0], of_rows[1], of_rows[2]
    for head in range(heads[0], heads[1]):
        flow, written = np.zeros(length + 1), np.zeros(length)
        for row in range(0, p, _ROWS):
            for column in range(0, n, _COLUMNS):
                rows, columns = min(_ROWS, p - row), min(_COLUMNS, n - column)
                place = head, group, row, column, rows, columns
                of_rows[:] = 0
                _fill(block, state, place)
                skip = _states(block, place, x, dt, A, B, C, dy, sums_C, flow, work)
                dD[head] += skip if column == 0 else 0
                for j in range(rows):
                    for k in range(columns):
                        flow[length] += dstate[head, row + j, column + k] * block[j * _COLUMNS + k]
                _fill(block, dstate, place)
                decay = _state_gradients(block, place, x, dt, A, B, C, dy, dx, sums_B, flow, written, work)
                for j in range(rows):
                    for k in range(columns):
                        dstate[head, row + j, column + k] = decay * block[j * _COLUMNS + k]
        log_decay = flow[length]
        for t in range(length - 1, -1, -1):
            log_decay += flow[t]
            ddt[t, head] = written[t] + A[head] * log_decay
            dA[head] += dt[t, head] * log_decay


@numba.njit(parallel=True, fastmath=True, cache=True)
def ssd_scan_backward(state, x, dt, A, B, C, dy, dstate, dx, ddt, dA, dB, dC, dD):  # type: ignore[no-untyped-def]
    """The gradients of `ssd_scan` without D, whose arguments stand first; and dD, the sum of dy x.

    state (b, h, p, n), before the first token. dy as y. dstate (b, h, p, n): the gradient of the state, from after to
    before. ddt as dt. What begins as zeros: dx as x; dA and dD (b, h), float64; dB and dC (b, g, parts, l, n), each
    part a sum over some heads.

    With u_t = dt_t x_t, H the state and G its gradient, each walks over the sequence once, in opposite directions:

        H_t = a_t H_{t-1} + u_t B_t^T           dC_t = H_t^T dy_t               du_t = G_t B_t
        G_t = a_{t+1} G_{t+1} + dy_t C_t^T      dB_t = G_t^T u_t                dx_t = dt_t du_t

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
            heads, group, state[i], x[i], dt[i], A, B[i], C[i], dy[i],
            dstate[i], dx[i], ddt[i], dA[i], dB[i, group, part], dC[i, group, part], dD[i],
        )  # fmt: skip
