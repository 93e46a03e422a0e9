"""Backward passes as compiled loops, of the scan and of what stands around it; conventions as in `_kernels`.

A loop works on the pieces from ``first`` up to ``last``; `ghostssm.ops.compiled.in_threads` gives each thread some.
"""

from __future__ import annotations

import numba
import numpy as np

# A walk works on a block: up to 64 rows and 64 columns of a head's state or of its gradient and, as further rows, sums
# over these, B_t and C_t. The distance between rows is constant: a compiler sees that none overlap.
_ROWS = _COLUMNS = 64
_SUMS, _WRITE, _OTHER = _ROWS * _COLUMNS, (_ROWS + 1) * _COLUMNS, (_ROWS + 2) * _COLUMNS


@numba.njit(fastmath=True)
def _step(H, size, decay, written, read):  # type: ignore[no-untyped-def]
    """A block over one token, four rows at a time: its sums = read^T (decay H), then H = decay H + written write^T.

    size: how many rows and columns it has. written and read: (rows,), zeros after the last.
    """
    for k in range(size[1]):
        H[_SUMS + k] = 0
    for j in range(0, _ROWS, 4):
        if j >= size[0]:
            break
        row = j * _COLUMNS
        w0, w1, w2, w3 = written[j], written[j + 1], written[j + 2], written[j + 3]
        r0, r1, r2, r3 = read[j], read[j + 1], read[j + 2], read[j + 3]
        for k in range(size[1]):
            write = H[_WRITE + k]
            kept0 = H[row + k] * decay
            kept1 = H[row + _COLUMNS + k] * decay
            kept2 = H[row + 2 * _COLUMNS + k] * decay
            kept3 = H[row + 3 * _COLUMNS + k] * decay
            H[_SUMS + k] += r0 * kept0 + r1 * kept1 + r2 * kept2 + r3 * kept3
            H[row + k] = kept0 + w0 * write
            H[row + _COLUMNS + k] = kept1 + w1 * write
            H[row + 2 * _COLUMNS + k] = kept2 + w2 * write
            H[row + 3 * _COLUMNS + k] = kept3 + w3 * write


@numba.njit(fastmath=True)
def _step_and_product(H, size, decay, written, read, product):  # type: ignore[no-untyped-def]
    """As `_step`; and product (rows,) = (decay H) other."""
    for k in range(size[1]):
        H[_SUMS + k] = 0
    for j in range(0, _ROWS, 4):
        if j >= size[0]:
            break
        row = j * _COLUMNS
        w0, w1, w2, w3 = written[j], written[j + 1], written[j + 2], written[j + 3]
        r0, r1, r2, r3 = read[j], read[j + 1], read[j + 2], read[j + 3]
        p0 = p1 = p2 = p3 = H.dtype.type(0)
        for k in range(size[1]):
            write, other = H[_WRITE + k], H[_OTHER + k]
            kept0 = H[row + k] * decay
            kept1 = H[row + _COLUMNS + k] * decay
            kept2 = H[row + 2 * _COLUMNS + k] * decay
            kept3 = H[row + 3 * _COLUMNS + k] * decay
            p0 += kept0 * other
            p1 += kept1 * other
            p2 += kept2 * other
            p3 += kept3 * other
            H[_SUMS + k] += r0 * kept0 + r1 * kept1 + r2 * kept2 + r3 * kept3
            H[row + k] = kept0 + w0 * write
            H[row + _COLUMNS + k] = kept1 + w1 * write
            H[row + 2 * _COLUMNS + k] = kept2 + w2 * write
            H[row + 3 * _COLUMNS + k] = kept3 + w3 * write
        product[j], product[j + 1], product[j + 2], product[j + 3] = p0, p1, p2, p3


@numba.njit(fastmath=True, inline="always")
def _fill(block, state, place):  # type: ignore[no-untyped-def]
    """A block from a state (h, p, n); zeros make up its rows. Slices of arrays would take long to compile."""
    head, _, row, column, rows, columns = place
    for j in range(_ROWS):
        for k in range(columns):
            block[j * _COLUMNS + k] = state[head, row + j, column + k] if j < rows else 0


@numba.njit(fastmath=True)
def _walk(block, place, backwards, x, dt, B, C, dy, dx, sums, decays, skipped, dots, work):  # type: ignore[no-untyped-def]
    """A block of states over a sequence, or, backwards, one of gradients; which leaves of x and dy, B and C, and of the
    two what is scaled by dt, change roles.

    Adds to sums (l, n), which are dC or backwards dB; to dots (l,), the products of a block's sums with C or backwards
    B, before dt; and backwards to dx, if there is one.

    place: the head, its group, the block's first row and column, how many rows and columns it has.
    decays: (l + 1,), of the tokens, then 1. skipped: (l,), the sums of x dy.
    """
    head, group, row, column, rows, columns = place
    written, read, product = work
    entering, leaving = (dy, x) if backwards else (x, dy)
    write, other = (C, B) if backwards else (B, C)
    length, size = dt.shape[0], (rows, columns)
    zero, one = x.dtype.type(0), x.dtype.type(1)  # literals would make float64 of what they meet
    products = backwards and dx.shape[0] > 0
    # Unsigned indices can't count from an array's end, and slices in their place would be counted as references.
    row, column, rows, columns = np.uint64(row), np.uint64(column), np.uint64(rows), np.uint64(columns)
    of_sums, of_write, of_other = np.uint64(_SUMS), np.uint64(_WRITE), np.uint64(_OTHER)
    for index in range(length):
        t = length - 1 - index if backwards else index
        step = dt[t, head]
        before, after = (one, step) if backwards else (step, one)
        for j in range(rows):
            written[j] = before * entering[t, head, row + j]
            read[j] = leaving[t, head, row + j]
        for k in range(columns):
            block[of_write + k] = write[t, group, column + k]
            block[of_other + k] = other[t, group, column + k]
        if products:
            _step_and_product(block, size, decays[t + 1], written, read, product)
            for j in range(rows):
                dx[t, head, row + j] += step * product[j]
        else:
            _step(block, size, decays[t + backwards], written, read)
        own, carried = step * skipped[t] if row == 0 else zero, zero
        for k in range(columns):
            sums[t, column + k] += after * block[of_sums + k] + own * block[of_write + k]
            carried += block[of_sums + k] * block[of_other + k]
        dots[t] += carried


@numba.njit(fastmath=True, inline="always")
def _tokens(head, x, dt, A, D, dy, alike, decays, skipped, dx):  # type: ignore[no-untyped-def]
    """What a head's tokens are by themselves: decays, skipped and what they add to dx; returns the sum of x dy."""
    whole = 0.0
    for t in range(dt.shape[0]):
        total = x.dtype.type(0)
        for j in range(x.shape[2]):
            total += x[t, head, j] * dy[t, head, j]
        decays[t] = np.exp(dt[t, head] * A[head])
        skipped[t] = total
        whole += total
        if dx.shape[0]:
            factor = D[head] + dt[t, head] * alike[t]
            for j in range(x.shape[2]):
                dx[t, head, j] = factor * dy[t, head, j]
    return whole


@numba.njit(fastmath=True, inline="always")
def _backward_of_heads(  # type: ignore[no-untyped-def]
    heads, group, state, x, dt, A, B, C, D, dy, dstate, dx, ddt, dA, sums_B, sums_C, dD
):
    """`ssd_scan_backward` for some heads of one group of one sequence; no argument has an axis for sequences."""
    (length, _, p), n = x.shape, B.shape[2]
    block, of_rows = np.empty((_ROWS + 3) * _COLUMNS, x.dtype), np.empty((3, _ROWS), x.dtype)
    work = of_rows[0], of_rows[1], of_rows[2]
    alike, decays, skipped = np.empty(length, x.dtype), np.ones(length + 1, x.dtype), np.empty(length, x.dtype)
    for t in range(length):
        total = x.dtype.type(0)
        for k in range(n):
            total += B[t, group, k] * C[t, group, k]
        alike[t] = total
    for head in range(heads[0], heads[1]):
        read_C, written_B, log_decay = np.zeros(length), np.zeros(length), 0.0
        dD[head] += _tokens(head, x, dt, A, D, dy, alike, decays, skipped, dx)
        for row in range(0, p, _ROWS):
            for column in range(0, n, _COLUMNS):
                rows, columns = min(_ROWS, p - row), min(_COLUMNS, n - column)
                place = head, group, row, column, rows, columns
                of_rows[:] = 0
                _fill(block, state, place)
                _walk(block, place, False, x, dt, B, C, dy, dx, sums_C, decays, skipped, read_C, work)
                for j in range(rows):
                    for k in range(columns):
                        log_decay += dstate[head, row + j, column + k] * block[j * _COLUMNS + k]
                _fill(block, dstate, place)
                _walk(block, place, True, x, dt, B, C, dy, dx, sums_B, decays, skipped, written_B, work)
                for j in range(rows):
                    for k in range(columns):
                        dstate[head, row + j, column + k] = decays[0] * block[j * _COLUMNS + k]
        for t in range(length - 1, -1, -1):
            log_decay += read_C[t] - dt[t, head] * written_B[t]
            ddt[t, head] = written_B[t] + alike[t] * skipped[t] + A[head] * log_decay
            dA[head] += dt[t, head] * log_decay


@numba.njit(fastmath=True, cache=True, nogil=True)
def ssd_scan_backward(first, last, state, x, dt, A, B, C, D, dy, dstate, dx, ddt, dA, dB, dC, dD):  # type: ignore[no-untyped-def]
    """The gradients of `ssd_scan`, whose arguments stand first; pieces are sequences times groups times parts.

    state (b, h, p, n), before the first token. dy as y. dstate (b, h, p, n): the gradient of the state, from after to
    before. dx as x, or with no positions where it is not wanted. ddt as dt. What begins as zeros: dA and dD (b, h),
    float64; dB and dC (b, g, parts, l, n), each part a sum over some heads.

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
    for index in range(first, last):
        i, group, part = index // (groups * parts), (index // parts) % groups, index % parts
        head = group * heads_per_group + part * heads_per_part
        heads = head, min(head + heads_per_part, (group + 1) * heads_per_group)
        _backward_of_heads(
            heads, group, state[i], x[i], dt[i], A, B[i], C[i], D, dy[i],
            dstate[i], dx[i], ddt[i], dA[i], dB[i, group, part], dC[i, group, part], dD[i],
        )  # fmt: skip


@numba.njit(fastmath={"contract"}, cache=True, nogil=True)
def causal_conv_backward(first, last, x, taps, dout, dx, dtaps):  # type: ignore[no-untyped-def]
    """The gradients of `causal_conv` but the bias's: x, dout and dx (b, l, c), taps (width, c).

    dtaps (parts, width, c) begins as zeros; each part is a sum over some tokens.
    """
    b, length, c = x.shape
    parts, width = dtaps.shape[0], taps.shape[0]
    tokens = (b * length + parts - 1) // parts
    for part in range(first, last):
        for index in range(part * tokens, min((part + 1) * tokens, b * length)):
            i, t = index // length, index % length
            for j in range(c):
                dx[i, t, j] = 0
            for back in range(min(width, length - t)):
                tap = width - 1 - back
                for j in range(c):
                    dx[i, t, j] += dout[i, t + back, j] * taps[tap, j]
            for back in range(min(width, t + 1)):
                tap = width - 1 - back
                for j in range(c):
                    dtaps[part, tap, j] += dout[i, t, j] * x[i, t - back, j]


# With fastmath in the norm's loops that write, code from numba's cache rounds otherwise than code just compiled. A run
# has to be repeatable bit by bit, so only sums have fastmath here.
@numba.njit(fastmath=True)
def _square(y, gate, gate_first):  # type: ignore[no-untyped-def]
    """The sum of squares of what is normalised."""
    total = y.dtype.type(0)
    if gate_first:
        for j in range(y.shape[0]):
            total += y[j] * gate[j] * (y[j] * gate[j])
    else:
        for j in range(y.shape[0]):
            total += y[j] * y[j]
    return total


@numba.njit(fastmath=True)
def _along(y, gate, dout, weight):  # type: ignore[no-untyped-def]
    """The sum of products of what is normalised and of its scaled gradient."""
    total = y.dtype.type(0)
    for j in range(y.shape[0]):
        total += dout[j] * weight[j] * y[j] * gate[j]
    return total


@numba.njit(cache=True, nogil=True)
def gated_norm(first, last, y, gate, weight, eps, gate_first, out):  # type: ignore[no-untyped-def]
    """y, gate and out (m, g, c), weight (g, c): the RMS norm of y, times weight; y is gated before it or after.

    Pieces are rows.
    """
    _, groups, c = y.shape
    one, count, small = y.dtype.type(1), y.dtype.type(c), y.dtype.type(eps)
    for i in range(first, last):
        for group in range(groups):
            square = _square(y[i, group], gate[i, group], gate_first)
            scale = one / np.sqrt(square / count + small)
            for j in range(c):
                out[i, group, j] = y[i, group, j] * gate[i, group, j] * (scale * weight[group, j])


@numba.njit(cache=True, nogil=True)
def gated_norm_backward(first, last, y, gate, dout, weight, eps, gate_first, dy, dgate, dweight):  # type: ignore[no-untyped-def]
    """The gradients of `gated_norm`. dgate has no rows where it is not wanted. dweight (parts, g, c) begins as zeros;
    each part is a sum over some rows.

    With v what is normalised, s = 1 / sqrt(mean(v^2) + eps) and e the gradient of v s: dv = s e - s^3 v mean(e v).
    """
    m, groups, c = y.shape
    one, count, small = y.dtype.type(1), y.dtype.type(c), y.dtype.type(eps)
    parts = dweight.shape[0]
    rows = (m + parts - 1) // parts
    for part in range(first, last):
        for i in range(part * rows, min((part + 1) * rows, m)):
            for group in range(groups):
                square = _square(y[i, group], gate[i, group], gate_first)
                along = _along(y[i, group], gate[i, group], dout[i, group], weight[group])
                scale = one / np.sqrt(square / count + small)
                pull = scale * scale * scale * along / count
                for j in range(c):
                    value, factor, gradient = y[i, group, j], gate[i, group, j], dout[i, group, j]
                    dweight[part, group, j] += gradient * value * factor * scale
                    of_out = gradient * weight[group, j] * scale
                    if gate_first:
                        dy[i, group, j] = (of_out - pull * value * factor) * factor
                    else:
                        dy[i, group, j] = of_out * factor - pull * value
                if dgate.shape[0]:
                    for j in range(c):
                        value, of_out = y[i, group, j], dout[i, group, j] * weight[group, j] * scale
                        if gate_first:
                            of_out -= pull * value * gate[i, group, j]
                        dgate[i, group, j] = of_out * value
