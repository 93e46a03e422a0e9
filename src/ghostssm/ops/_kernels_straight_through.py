"""The backward pass of a scan whose state is rounded after every token; `ghostssm.ops.straight_through` calls it."""

from __future__ import annotations

import numba
import numpy as np

from ghostssm.ops._rounding_kernels import next_word, read_row, row_scale, write_row

ROWS = 8
"""Rows of a head's state that are walked together: the codes of all tokens are kept for these alone."""


@numba.njit(fastmath=True)
def _update(values, decay, added, write, dy, dread):  # type: ignore[no-untyped-def]
    """One row's token, and what it adds to the gradient of C; gives the row's largest magnitude."""
    peak = np.int32(0)
    for k in range(values.shape[0]):
        new = values[k] * decay + added * write[k]
        values[k] = new
        dread[k] += dy * new
        peak = max(peak, np.int32(np.float32(new).view(np.int32) & np.int32(0x7FFFFFFF)))
    return np.int32(peak).view(np.float32)


@numba.njit(fastmath=True)
def _update_gradient(gradient, decay, dy, read, write, added, before, dwrite):  # type: ignore[no-untyped-def]
    """The gradient of a row's state, a token back, and what it adds to that of B.

    Gives its products with B and with the state before the token.
    """
    along_write, along_state = np.float32(0), np.float32(0)
    for k in range(gradient.shape[0]):
        new = gradient[k] * decay + dy * read[k]
        gradient[k] = new
        along_write += new * write[k]
        along_state += new * before[k]
        dwrite[k] += added * new
    return along_write, along_state


@numba.njit(inline="always")
def _walk(rows, head, group, form, key, kept, decays, x, dt, B, C, D, dy, dx, ddt, log_decays, dB, dC):  # type: ignore[no-untyped-def]
    """Some rows of a head, forwards and backwards over one sequence.

    form: kind, largest, stochastic. kept: codes int8 (l + 1, ROWS, width), halves (l + 1, ROWS, n), and scales (l +
    1, ROWS), of which the first token's are zeros. decays (l + 1,), of the tokens, then 1. Adds to ddt (l, h),
    log_decays (l,), dB and dC (l, n).
    """
    kind, largest, stochastic = form
    codes, halves, scales, work = kept
    first, last = rows
    length = dB.shape[0]
    values, gradients = work[ROWS], work[:ROWS]
    gradients[:] = 0
    for t in range(length):
        token_key = next_word(key, t)
        for j in range(first, last):
            row, added = j - first, dt[t, head] * x[t, head, j]
            read_row(kind, codes[t, row], halves[t, row], scales[t, row], values)
            peak = _update(values, decays[t], added, B[t, group], dy[t, head, j], dC[t])
            inverse = np.float32(0)
            scales[t + 1, row] = np.float32(1)
            if largest > 0:
                inverse, scales[t + 1, row] = row_scale(peak, largest)
            row_key = next_word(token_key, head * x.shape[2] + j)
            write_row(kind, codes[t + 1, row], halves[t + 1, row], inverse, values, row_key, stochastic)
    for t in range(length - 1, -1, -1):
        for j in range(first, last):
            row, added = j - first, dt[t, head] * x[t, head, j]
            read_row(kind, codes[t, row], halves[t, row], scales[t, row], values)
            along_write, along_state = _update_gradient(
                gradients[row], decays[t + 1], dy[t, head, j], C[t, group], B[t, group], added, values, dB[t]
            )
            dx[t, head, j] = dt[t, head] * along_write + D[head] * dy[t, head, j]
            ddt[t, head] += along_write * x[t, head, j]
            log_decays[t] += decays[t] * along_state


@numba.njit(inline="always")
def _backward_of_heads(heads, group, form, key, kept, x, dt, A, B, C, D, dy, dx, ddt, dA, dB, dC, dD):  # type: ignore[no-untyped-def]
    """`straight_through_backward` for some heads of one group of one sequence; no argument has an axis for these."""
    length, _, p = x.shape
    decays, log_decays = np.ones(length + 1, np.float32), np.empty(length)
    for head in range(heads[0], heads[1]):
        log_decays[:] = 0
        for t in range(length):
            decays[t] = np.exp(dt[t, head] * A[head])
        for first in range(0, p, ROWS):
            rows = first, min(first + ROWS, p)
            _walk(rows, head, group, form, key, kept, decays, x, dt, B, C, D, dy, dx, ddt, log_decays, dB, dC)
        for t in range(length):
            ddt[t, head] += A[head] * log_decays[t]
            dA[head] += dt[t, head] * log_decays[t]
            for j in range(p):
                dD[head] += x[t, head, j] * dy[t, head, j]


@numba.njit(cache=True, nogil=True)
def straight_through_backward(  # type: ignore[no-untyped-def]
    first, last, codes, halves, scales, work, form, key, first_sequence, first_token,
    x, dt, A, B, C, D, dy, dx, ddt, dA, dB, dC, dD,
):  # fmt: skip
    """The gradients of `ghostssm.ops.stored.stored_scan_` from a state of zeros, rounding left out of them.

    codes int8 (workers, l + 1, ROWS, width), halves int16 (workers, l + 1, ROWS, n), of which the format has one, and
    scales (workers, l + 1, ROWS) begin as zeros; work (workers, ROWS + 1, n). form: kind, largest, stochastic. dx and
    ddt as x and dt. What begins as zeros: ddt; dA and dD (b, h), float64; dB and dC (b, g, parts, l, n), each part a
    sum over some heads.

    With u_t = dt_t x_t, H the state before and R that after it is rounded, and G the gradient of both:

        H_t = a_t R_{t-1} + u_t B_t^T           dC_t = H_t^T dy_t               du_t = G_t B_t
        G_t = a_{t+1} G_{t+1} + dy_t C_t^T      dB_t = G_t^T u_t                dlog a_t = a_t <G_t, R_{t-1}>

    The last product is no difference of sums here, as it is in `ssd_scan_backward`: what rounding adds to the state
    breaks the sums. So the codes of R are kept for some rows at a time, and read again on the way back. They come from
    outside, since slices of arrays that are made here would be counted as references, which takes most of the time.
    """
    groups, parts, workers = dB.shape[1], dB.shape[2], codes.shape[0]
    heads_per_group = x.shape[2] // groups
    heads_per_part = (heads_per_group + parts - 1) // parts
    for worker in range(first, last):
        kept = codes[worker], halves[worker], scales[worker], work[worker]
        for index in range(worker, x.shape[0] * groups * parts, workers):
            i, group, part = index // (groups * parts), (index // parts) % groups, index % parts
            head = group * heads_per_group + part * heads_per_part
            heads = head, min(head + heads_per_part, (group + 1) * heads_per_group)
            own_key = np.uint32(next_word(np.uint32(key), first_sequence + i) + np.uint32(first_token))
            _backward_of_heads(
                heads, group, form, own_key, kept, x[i], dt[i], A, B[i], C[i], D, dy[i],
                dx[i], ddt[i], dA[i], dB[i, group, part], dC[i, group, part], dD[i],
            )  # fmt: skip
