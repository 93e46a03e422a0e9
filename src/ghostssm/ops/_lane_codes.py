"""Codes of states in fewer bits as vectors of lanes, for numba's loops: `ghostssm.ops._lanes` has the vectors."""

from __future__ import annotations

import platform
import zlib
from functools import cache
from pathlib import Path

import numba
import numpy as np
from llvmlite import binding, ir
from numba import config, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from ghostssm.ops import _lanes
from ghostssm.ops._lanes import INT, Lanes, filled, floats, integers, place_of, shuffled
from ghostssm.ops.state_format import FLOAT16, FORMATS, FP8, INT4, INT8

LEAST_PEAK = np.float32(1e-30)
"""Rows whose largest magnitude is smaller are stored as zeros."""
NUMBER_TO_INTEGER = np.float32(1.5 * 2**23)
"""Added to a number of less than 2^22 it leaves the nearest integer in the lowest bits of the sum."""
_GOLDEN = 0x9E3779B1
_BYTE, _HALF = ir.IntType(8), ir.IntType(16)
_FORMS = {form.kind: form for form in FORMATS.values()}
_LARGEST_HALF = 65504.0
_LARGEST_CODES = {FLOAT16.kind: 0x7BFF, FP8.kind: 0x7E}
"""Of a positive number."""


@numba.njit
def mixed_word(word):
    """`ghostssm.ops.state_format._mix`."""
    word = np.uint32(np.uint32(word ^ (word >> np.uint32(16))) * np.uint32(0x7FEB352D))
    word = np.uint32(np.uint32(word ^ (word >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(word ^ (word >> np.uint32(16)))


@numba.njit
def next_word(word, number):
    return mixed_word(np.uint32(word + np.uint32(number)))


@cache
def converts_halves() -> bool:
    """Whether the processor that numba compiles for has instructions for float16; those with AVX2 and ARM's do."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    given = config.CPU_FEATURES  # empty for a processor that is called generic
    return bool(binding.get_host_cpu_features().get("f16c")) if given is None else "+f16c" in given


@cache
def made_of() -> int:
    """A checksum of this file and of `ghostssm.ops._lanes`.

    numba's cache knows a loop by its own file and by the values that it closes over. A loop that closes over this
    number is compiled again when one of the two files changes.
    """
    files = (__file__, _lanes.__file__)
    return zlib.crc32(b"".join(Path(file).read_bytes() for file in files))


class Words(types.Type):
    """numba's type of a vector of so many integers of 32 bits."""

    def __init__(self, count):
        self.count = count
        super().__init__(name=f"Words({count})")


@register_model(Words)
class _WordsModel(models.PrimitiveModel):
    def __init__(self, manager, words):
        super().__init__(manager, words, integers(words.count))


def _same(element, value, count):
    return ir.Constant(ir.VectorType(element, count), [value] * count)


def _constant(value, count):
    return _same(INT, value, count)


def _padded(builder, value, used, lanes):
    """The first ``used`` numbers of a vector, and zeros up to ``lanes``."""
    zeros = ir.Constant(value.type, [0] * value.type.count)
    return shuffled(builder, value, zeros, [*range(used), *([value.type.count] * (lanes - used))])


@intrinsic(prefer_literal=True)
def random_words(typing, keys, first, count, column):
    """A random word for one channel of ``count`` rows, whose keys are in an array of uint32."""
    lanes = count.literal_value

    def generate(context, builder, signature, arguments):
        place = place_of(context, builder, keys, arguments[0], arguments[1], integers(lanes))
        mixed = builder.mul(builder.trunc(arguments[3], INT), INT(_GOLDEN))
        return _mixed(builder, builder.xor(builder.load(place, align=4), _spread(builder, mixed, lanes)))

    return Words(lanes)(keys, types.intp, count, types.intp), generate


@intrinsic(prefer_literal=True)
def random_row(typing, key, count):
    """A random word for each of the first ``count`` channels of a row with this key."""
    lanes = count.literal_value

    def generate(context, builder, signature, arguments):
        columns = ir.Constant(integers(lanes), [column * _GOLDEN & 0xFFFFFFFF for column in range(lanes)])
        return _mixed(builder, builder.xor(_spread(builder, arguments[0], lanes), columns))

    return Words(lanes)(types.uint32, count), generate


def _spread(builder, word, lanes):
    nothing = ir.Constant(integers(lanes), ir.Undefined)
    return shuffled(builder, builder.insert_element(nothing, word, INT(0)), nothing, [0] * lanes)


def _mixed(builder, words):
    """`ghostssm.ops.state_format._mix`."""
    count = words.type.count
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        folded = builder.xor(words, builder.lshr(words, _constant(shift, count)))
        words = builder.mul(folded, _constant(factor, count))
    return builder.xor(words, builder.lshr(words, _constant(16, count)))


@intrinsic(prefer_literal=True)
def load_half_row(typing, halves, first, count, n, kind):
    """A stored row's ``n`` numbers in bfloat16 or float16, and zeros up to ``count`` lanes.

    Args:
        halves: int16. kind: of `ghostssm.ops.state_format.StateFormat`, as everywhere here.
    """
    lanes, used, form = count.literal_value, n.literal_value, _FORMS[kind.literal_value]

    def generate(context, builder, signature, arguments):
        place = place_of(context, builder, halves, arguments[0], arguments[1], ir.VectorType(_HALF, used))
        row = _padded(builder, builder.load(place, align=2), used, lanes)
        if form is FLOAT16:
            return _of_halves(builder, row)
        return builder.bitcast(builder.shl(builder.zext(row, integers(lanes)), _constant(16, lanes)), floats(lanes))

    return Lanes(lanes)(halves, types.intp, count, n, kind), generate


@intrinsic(prefer_literal=True)
def store_half_row(typing, halves, first, lanes, n, kind, words):
    """The first ``n`` lanes, rounded; halves, n and kind as `load_half_row` has them.

    Args:
        words: random ones, to round stochastically; None for the nearest, ties to even.
    """
    form = _FORMS[kind.literal_value]

    def generate(context, builder, signature, arguments):
        count, used = lanes.count, n.literal_value
        random = None if isinstance(words, types.NoneType) else arguments[5]
        place = place_of(context, builder, halves, arguments[0], arguments[1], _HALF)
        if form is FLOAT16 and random is None:
            codes = _to_halves(builder, _limited(builder, arguments[2], _LARGEST_HALF))
            _store(builder, shuffled(builder, codes, codes, range(used)), place)
            return context.get_dummy_value()
        if form is FLOAT16:
            codes = _random_codes(builder, arguments[2], form, random)
        else:  # Its exponents are float32's, so that also its smallest numbers are rounded as bits.
            bits = builder.bitcast(arguments[2], integers(count))
            added = _to_nearest(builder, bits, 16) if random is None else builder.lshr(random, _constant(16, count))
            codes = builder.lshr(builder.add(bits, added), _constant(16, count))
        _store_lowest(builder, codes, place, used, _HALF)
        return context.get_dummy_value()

    return types.void(halves, types.intp, lanes, n, kind, words), generate


@intrinsic(prefer_literal=True)
def load_codes(typing, codes, first, count, kind):
    """The numbers of ``count`` bytes in int8 or fp8, in units of their scale."""
    lanes, form = count.literal_value, _FORMS[kind.literal_value]

    def generate(context, builder, signature, arguments):
        place = place_of(context, builder, codes, arguments[0], arguments[1], ir.VectorType(_BYTE, lanes))
        stored = builder.load(place, align=1)
        if form is FP8:  # float16 has all of its numbers, 256 times smaller, and in the same bits
            bits = builder.shl(builder.sext(stored, ir.VectorType(_HALF, lanes)), _same(_HALF, 7, lanes))
            halves = builder.and_(bits, _same(_HALF, 0xBF80, lanes))
            return builder.fmul(_of_halves(builder, halves), filled(256.0, lanes), flags=("contract",))
        return builder.sitofp(builder.sext(stored, integers(lanes)), floats(lanes))

    return Lanes(lanes)(codes, types.intp, count, kind), generate


@intrinsic(prefer_literal=True)
def load_code_pairs(typing, codes, first, count):
    """The numbers of ``count`` bytes in int4, in units of their scale: of the lower halves, and of the upper."""
    lanes = count.literal_value

    def generate(context, builder, signature, arguments):
        place = place_of(context, builder, codes, arguments[0], arguments[1], ir.VectorType(_BYTE, lanes))
        stored = builder.sext(builder.load(place, align=1), integers(lanes))
        lower = builder.ashr(builder.shl(stored, _constant(28, lanes)), _constant(28, lanes))
        upper = builder.ashr(stored, _constant(4, lanes))
        both = [builder.sitofp(each, floats(lanes)) for each in (lower, upper)]
        return context.make_tuple(builder, signature.return_type, both)

    return types.UniTuple(Lanes(lanes), 2)(codes, types.intp, count), generate


@intrinsic(prefer_literal=True)
def store_codes(typing, codes, first, lanes, kind, words):
    """Numbers in units of their scale, rounded to int8 or fp8.

    Args:
        words: as `store_half_row` has them.
    """
    form = _FORMS[kind.literal_value]

    def generate(context, builder, signature, arguments):
        random = None if isinstance(words, types.NoneType) else arguments[4]
        place = place_of(context, builder, codes, arguments[0], arguments[1], _BYTE)
        if form is INT8:
            rounded = _integer_codes(builder, arguments[2], form, random)
        elif random is None:
            rounded = _nearest_fp8(builder, arguments[2])
        else:
            rounded = _random_codes(builder, arguments[2], form, random)
        _store_lowest(builder, rounded, place, lanes.count, _BYTE)
        return context.get_dummy_value()

    return types.void(codes, types.intp, lanes, kind, words), generate


@intrinsic
def store_code_pairs(typing, codes, first, lower, upper, lower_words, upper_words):
    """As `store_codes`, two vectors in int4, into the lower and upper halves of bytes."""

    def generate(context, builder, signature, arguments):
        count, parts = lower.count, []
        for lanes, words, kind in zip(arguments[2:4], arguments[4:], (lower_words, upper_words), strict=True):
            random = None if isinstance(kind, types.NoneType) else words
            parts.append(_integer_codes(builder, lanes, INT4, random))
        low = builder.and_(parts[0], _constant(15, count))
        packed = builder.or_(low, builder.shl(parts[1], _constant(4, count)))
        place = place_of(context, builder, codes, arguments[0], arguments[1], _BYTE)
        _store_lowest(builder, packed, place, count, _BYTE)
        return context.get_dummy_value()

    return types.void(codes, types.intp, lower, upper, lower_words, upper_words), generate


def _store(builder, numbers, place):
    builder.store(numbers, builder.bitcast(place, numbers.type.as_pointer()), align=numbers.type.element.width // 8)


def _store_lowest(builder, numbers, place, used, size):
    """The lowest bytes or halves of the first ``used`` integers of 32 bits."""
    parts = 32 // size.width
    every = builder.bitcast(numbers, ir.VectorType(size, parts * numbers.type.count))
    # As a shuffle and not as a truncation, which costs AVX-512 twice the instructions.
    _store(builder, shuffled(builder, every, every, range(0, parts * used, parts)), place)


def _of_halves(builder, bits):
    """The numbers of float16, given as integers."""
    count = bits.type.count
    return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), count)), floats(count))


def _to_halves(builder, values):
    """Rounded to the nearest float16, ties to even; as integers."""
    count = values.type.count
    return builder.bitcast(builder.fptrunc(values, ir.VectorType(ir.HalfType(), count)), ir.VectorType(_HALF, count))


def _limited(builder, values, largest):
    """Numbers no further from zero than the largest."""
    for bound, operation in ((largest, "<"), (-largest, ">")):
        limit = filled(bound, values.type.count)
        values = builder.select(builder.fcmp_ordered(operation, values, limit), values, limit)
    return values


def _integer_codes(builder, values, form, random):
    """Integer codes, whose upper bits are of no meaning; ``random``, if given, moves them up or down before."""
    count = values.type.count
    if random is not None:
        unit = builder.sitofp(builder.lshr(random, _constant(8, count)), floats(count))
        noise = builder.fsub(builder.fmul(unit, filled(2.0**-24, count)), filled(0.5, count))
        values = _limited(builder, builder.fadd(values, noise), form.largest)
    number = builder.fadd(values, filled(float(NUMBER_TO_INTEGER), count), flags=("contract",))
    return builder.bitcast(number, integers(count))


def _nearest_fp8(builder, values):
    """The codes of numbers, none beyond the largest, rounded to the nearest, ties to even.

    Between two powers of two fp8 has 8 levels. A large number is added, with the exponent 20 above: float32 rounds the
    sum to whole levels, whose number is in the sum's lowest bits. Numbers below the smallest power of two have levels
    as wide as those above it, so that one rule does for both.
    """
    count, least = values.type.count, 128 - FP8.bias
    bits = builder.bitcast(values, integers(count))
    size = builder.and_(bits, _constant(0x7FFFFFFF, count))
    exponents, smallest = builder.and_(size, _constant(0x7F800000, count)), _constant(least << 23, count)
    exponents = builder.select(builder.icmp_signed(">", exponents, smallest), exponents, smallest)
    large = builder.add(exponents, _constant(((23 - FP8.mantissa) << 23) + 0x400000, count))
    total = builder.fadd(builder.bitcast(size, floats(count)), builder.bitcast(large, floats(count)))
    levels = builder.sub(builder.bitcast(total, integers(count)), large)
    power = builder.lshr(builder.sub(exponents, smallest), _constant(23 - FP8.mantissa, count))
    sign = builder.and_(builder.lshr(bits, _constant(24, count)), _constant(0x80, count))
    return builder.or_(builder.add(power, levels), sign)


def _random_codes(builder, values, form, random):
    """The codes of numbers in a floating-point format, moved up by a random share of a level and rounded down.

    No further than the largest number. `ghostssm.ops._kernels_straight_through._narrowed` does the same.
    """
    count, shift = values.type.count, 23 - form.mantissa
    bits = builder.bitcast(values, integers(count))
    size = builder.and_(bits, _constant(0x7FFFFFFF, count))
    added = builder.lshr(random, _constant(9 + form.mantissa, count))
    fine = builder.fmul(builder.bitcast(size, floats(count)), filled(2.0 ** (form.bias + form.mantissa - 1), count))
    share = builder.fmul(builder.sitofp(added, floats(count)), filled(2.0**-shift, count))
    low = builder.fptosi(builder.fadd(fine, share), integers(count))
    high = builder.lshr(builder.add(size, added), _constant(shift, count))
    high = builder.sub(high, _constant((127 - form.bias) << form.mantissa, count))
    few = builder.icmp_signed("<", size, _constant((128 - form.bias) << 23, count))
    code, largest = builder.select(few, low, high), _constant(_LARGEST_CODES[form.kind], count)
    code = builder.select(builder.icmp_signed("<", code, largest), code, largest)
    sign = builder.and_(builder.lshr(bits, _constant(32 - form.bits, count)), _constant(1 << (form.bits - 1), count))
    return builder.or_(code, sign)


def _to_nearest(builder, bits, shift):
    """What is to be added to bits before the lowest are dropped, to come to the nearest number, ties to even."""
    count = bits.type.count
    odd = builder.and_(builder.lshr(bits, _constant(shift, count)), _constant(1, count))
    return builder.add(_constant((1 << (shift - 1)) - 1, count), odd)
