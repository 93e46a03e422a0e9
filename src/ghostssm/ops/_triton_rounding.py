"""Numbers of a state to codes and back, within kernels: the formats of `ghostssm.ops.state_format`, bit for bit.

That holds where no product is fused with a sum (``enable_fp_fusion=False``). Everything is arithmetic of float32 and of
32-bit integers, which every GPU has, and which triton's interpreter does alike.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(word):
    """A bijection of uint32."""
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def next_key(key, number):
    """Of uint32 or int32, uint32."""
    return _mix(key.to(tl.uint32) + number.to(tl.uint32))


@triton.jit
def _words(row_keys, columns):
    """A random word for every number of some rows."""
    return _mix(row_keys[:, None] ^ (columns.to(tl.uint32) * 0x9E3779B1)[None, :])


@triton.jit
def _nearest_integer(value):
    """Ties to even: 1.5 * 2^23 added to a number of less than 2^22 leaves it in the lowest bits of the sum."""
    return (value + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def integers(scaled, row_keys, columns, LARGEST: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The codes of scaled numbers in int8 or int4."""
    if STOCHASTIC:
        unit = (_words(row_keys, columns) >> 8).to(tl.float32) * 2.0**-24
        scaled = tl.minimum(tl.maximum(scaled + (unit - 0.5), -LARGEST), LARGEST)
    return _nearest_integer(scaled)


@triton.jit
def narrowed(
    values,
    row_keys,
    columns,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """The codes of numbers in a floating-point format; all bits above the others are the sign's."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = values.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    if STOCHASTIC:
        added = (_words(row_keys, columns) >> (9 + MANTISSA)).to(tl.int32)
    else:
        added = ((size >> SHIFT) & 1) + ((1 << (SHIFT - 1)) - 1)
    code = ((size + added) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    if BIAS < 127:  # Numbers without a leading one are multiples of the smallest number.
        small = tl.minimum(tl.abs(values), 2.0 ** (1 - BIAS))
        if STOCHASTIC:
            low = ((small * 2.0 ** (BIAS + 22)).to(tl.int32) + added) >> SHIFT
        else:
            low = _nearest_integer(small * 2.0 ** (BIAS + MANTISSA - 1))
        code = tl.where(size < ((128 - BIAS) << 23), low, code)
    return tl.minimum(code, LARGEST_CODE) | ((bits >> 31) << (BITS - 1))


@triton.jit
def numbers(codes, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """What codes with their sign in all bits above the others stand for, but for the scale."""
    if MANTISSA == 0:
        numbers = codes.to(tl.float32)
    else:
        size = (codes & ((1 << (BITS - 1)) - 1)) << (23 - MANTISSA)
        numbers = (size | (codes & -0x80000000)).to(tl.float32, bitcast=True) * 2.0 ** (127 - BIAS)
    return numbers


@triton.jit
def channels(n, LANES: tl.constexpr, PACKED: tl.constexpr):
    """The channel of every lane, n or more where there is none. Packed, every two lanes share a byte."""
    lanes = tl.arange(0, LANES)
    if PACKED:
        half = (n + 1) // 2
        lanes = tl.where(lanes // 2 < half, lanes // 2 + lanes % 2 * half, n)
    return lanes


@triton.jit
def _cells(row_starts, inside, n, STEP: tl.constexpr, LANES: tl.constexpr, PACKED: tl.constexpr):
    """Where the codes of some rows are, and whether they are there."""
    if PACKED:
        places = tl.arange(0, LANES // 2)[None, :]
        held = places < (n + 1) // 2
    else:
        places = tl.arange(0, LANES)[None, :]
        held = places < n
    return row_starts[:, None] + places * STEP, inside[:, None] & held


@triton.jit
def load_codes(
    row_starts, inside, n, STEP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, PACKED: tl.constexpr
):
    """Of some rows, (rows, lanes), int32; zeros where there are none. From one code to the next it is STEP codes."""
    cells, held = _cells(row_starts, inside, n, STEP, LANES, PACKED)
    codes = tl.load(cells, mask=held, other=0).to(tl.int32)
    if PACKED:
        codes = tl.join((codes << 28) >> 28, codes >> 4).reshape(ROWS, LANES)
    return codes


@triton.jit
def store_codes(
    row_starts, codes, inside, n, STEP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, PACKED: tl.constexpr
):
    cells, held = _cells(row_starts, inside, n, STEP, LANES, PACKED)
    if PACKED:
        lower, upper = tl.split(codes.reshape(ROWS, LANES // 2, 2))
        codes = (lower & 15) | (upper << 4)
    tl.store(cells, codes.to(row_starts.dtype.element_ty), mask=held)


@triton.jit
def largest_magnitudes(H):
    """The largest magnitude of each row; 0 for what is stored as zeros."""
    peak = tl.max(tl.abs(H), axis=1)
    return tl.where(peak >= 1e-30, peak, 0.0)


@triton.jit
def inverse(peak, LARGEST: tl.constexpr):
    """What a row is multiplied with before it is rounded."""
    return tl.where(peak > 0, tl.div_rn(tl.zeros_like(peak) + LARGEST, tl.maximum(peak, 1e-30)), 0.0)
