"""Rows of a state to codes and back, and random words, for numba's loops.

No ``fastmath`` here: the order of operations is that of `ghostssm.ops.state_format`, bit for bit.
"""

from __future__ import annotations

import numba
import numpy as np

from ghostssm.ops.state_format import BFLOAT16, FLOAT16, FP8, INT8

_BFLOAT16, _FLOAT16, _INT8, _FP8 = BFLOAT16.kind, FLOAT16.kind, INT8.kind, FP8.kind
LEAST_PEAK = np.float32(1e-30)
NUMBER_TO_INTEGER = np.float32(1.5 * 2**23)
"""Added to a number of less than 2^22 it leaves the nearest integer in the lowest bits of the sum."""
_UNIT = np.float32(2.0**-24)
_HALF = np.float32(0.5)


@numba.njit
def _mix(word):  # type: ignore[no-untyped-def]
    """`ghostssm.ops.state_format._mix`."""
    word = np.uint32(np.uint32(word ^ (word >> np.uint32(16))) * np.uint32(0x7FEB352D))
    word = np.uint32(np.uint32(word ^ (word >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(word ^ (word >> np.uint32(16)))


@numba.njit
def next_word(word, number):  # type: ignore[no-untyped-def]
    return _mix(np.uint32(word + np.uint32(number)))


@numba.njit
def _word(key, column):  # type: ignore[no-untyped-def]
    return _mix(np.uint32(key ^ np.uint32(np.uint32(column) * np.uint32(0x9E3779B1))))


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
