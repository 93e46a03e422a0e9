"""The backward pass of a scan whose state is rounded after every token; `ghostssm.ops.straight_through` calls it.

It walks forwards first, row by row, with the order of operations of `ghostssm.ops.state_format`. numba's cache knows a
loop by its own file only, so that all but the random words is here.
"""

from __future__ import annotations

import numba
import numpy as np

from ghostssm.ops._lane_codes import LEAST_PEAK, NUMBER_TO_INTEGER, mixed_word, next_word
from ghostssm.ops.state_format import BFLOAT16, FLOAT16, FP8, INT8

ROWS = 8
"""Rows of a head's state that are walked together: the codes of all tokens are kept for these alone."""
_BFLOAT16, _FLOAT16, _INT8, _FP8 = BFLOAT16.kind, FLOAT16.kind, INT8.kind, FP8.kind
_UNIT = np.float32(2.0**-24)
_HALF = np.float32(0.5)


@numba.njit
def _word(key, column):  # type: ignore[no-untyped-def]
    return mixed_word(np.uint32(key ^ np.uint32(np.uint32(column) * np.uint32(0x9E3779B1))))


@numba.njit
def _nearest_integer(value):  # type: ignore[no-untyped-def]
    return np.float32(value + NUMBER_TO_INTEGER).view(np.int32)


@numba.njit
def _rounded(value, inverse, largest, key, column, stochastic):  # type: ignore[no-untyped-def]
    """A scaled integer code."""
    scaled = np.float32(value * inverse)
    if stochastic:
        unit = np.float32(np.float32(np.int32(_word(key, column) >> np.uint32(8))) * _UNIT)
        scaled = np.float32(scaled + np.float32(unit - _HALF))
        scaled = scaled if scaled < largest else largest
        scaled = scaled if scaled > -largest else -largest
    return _nearest_integer(scaled)


@numba.njit
def _narrowed(value, mantissa, bias, key, column, stochastic):  # type: ignore[no-untyped-def]
    """The code of a number in a floating-point format without infinities."""
    bits = np.float32(value).view(np.int32)
    size = np.int32(bits & np.int32(0x7FFFFFFF))
    shift = np.int32(23 - mantissa)
    fine = np.float32(np.int32(size).view(np.float32) * np.float32(2.0 ** (bias + mantissa - 1)))
    if stochastic:
        word = _word(key, column)
        noise = np.int32(word >> np.uint32(9 + mantissa))
        low = np.int32(fine + np.float32(np.float32(noise) * np.float32(2.0 ** (mantissa - 23))))
        high = np.int32(np.int32(size + noise) >> shift)
    else:
        low = np.int32(_nearest_integer(fine) & np.int32(0xFFFF))
        even = np.int32(np.int32(size >> shift) & np.int32(1))
        high = np.int32(np.int32(size + np.int32((1 << (shift - 1)) - 1) + even) >> shift)
    code = np.int32(high - np.int32((127 - bias) << mantissa))
    code = low if size < np.int32((128 - bias) << 23) else code
    return code, np.int32(np.int32(bits >> np.int32(31)) & np.int32(1))


@numba.njit
def _widened(code, mantissa, bias):  # type: ignore[no-untyped-def]
    """The magnitude of a floating-point code without its sign."""
    shift = 23 - mantissa
    normal = np.int32(np.int32(code << np.int32(shift)) + np.int32((127 - bias) << 23)).view(np.float32)
    small = np.float32(np.float32(code) * np.float32(2.0 ** (1 - bias - mantissa)))
    return small if code < np.int32(1 << mantissa) else normal


@numba.njit
def read_row(kind, codes, halves, scale, values):  # type: ignore[no-untyped-def]
    """A stored row's numbers, n of them: its codes, or its halves, n of them."""
    n = values.shape[0]
    if kind == _BFLOAT16:
        for k in range(n):
            values[k] = np.int32(np.int32(halves[k]) << np.int32(16)).view(np.float32)
    elif kind == _FLOAT16:
        for k in range(n):
            code = np.int32(halves[k])
            size = _widened(np.int32(code & np.int32(0x7FFF)), 10, 15)
            values[k] = -size if code < np.int32(0) else size
    elif kind == _FP8:
        for k in range(n):
            code = np.int32(codes[k])
            size = np.float32(_widened(np.int32(code & np.int32(0x7F)), 3, 7) * scale)
            values[k] = -size if code < np.int32(0) else size
    elif kind == _INT8:
        for k in range(n):
            values[k] = np.float32(codes[k]) * scale
    else:
        lower, upper = values[: codes.shape[0]], values[codes.shape[0] :]
        for k in range(lower.shape[0]):
            lower[k] = np.float32(np.int32(np.int32(np.int32(codes[k]) << np.int32(28)) >> np.int32(28))) * scale
        for k in range(upper.shape[0]):
            upper[k] = np.float32(np.int32(np.int32(codes[k]) >> np.int32(4))) * scale


@numba.njit
def write_row(kind, codes, halves, inverse, values, key, stochastic):  # type: ignore[no-untyped-def]
    """Round a row's numbers and store them."""
    n = values.shape[0]
    if kind == _BFLOAT16:
        for k in range(n):
            # Its exponents are float32's, so that also its smallest numbers are rounded as bits.
            bits = np.float32(values[k]).view(np.int32)
            odd = np.int32(np.int32(bits >> np.int32(16)) & np.int32(1))
            added = np.int32(_word(key, k) >> np.uint32(16)) if stochastic else np.int32(np.int32(0x7FFF) + odd)
            halves[k] = np.int16(np.int32(bits + added) >> np.int32(16))
    elif kind == _FLOAT16:
        for k in range(n):
            code, sign = _narrowed(values[k], 10, 15, key, k, stochastic)
            code = code if code < np.int32(0x7BFF) else np.int32(0x7BFF)
            halves[k] = np.int16(code | (sign << 15))
    elif kind == _FP8:
        for k in range(n):
            code, sign = _narrowed(np.float32(values[k] * inverse), 3, 7, key, k, stochastic)
            code = code if code < np.int32(0x7E) else np.int32(0x7E)
            codes[k] = np.int8(code | (sign << 7))
    elif kind == _INT8:
        for k in range(n):
            codes[k] = np.int8(_rounded(values[k], inverse, np.float32(127), key, k, stochastic))
    else:
        half = codes.shape[0]
        lower, upper = values[:half], values[half:]
        for k in range(upper.shape[0]):
            low = _rounded(lower[k], inverse, np.float32(7), key, k, stochastic)
            high = _rounded(upper[k], inverse, np.float32(7), key, half + k, stochastic)
            codes[k] = np.int8((low & 15) | (high << 4))
        if 2 * half > n:
            codes[half - 1] = np.int8(_rounded(lower[half - 1], inverse, np.float32(7), key, half - 1, stochastic) & 15)


@numba.njit
def row_scale(peak, largest):  # type: ignore[no-untyped-def]
    """What a row is multiplied with before it is rounded, and afterwards."""
    if peak < LEAST_PEAK:
        return np.float32(0), np.float32(0)
    return np.float32(largest / peak), np.float32(peak * np.float32(np.float32(1) / largest))


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
