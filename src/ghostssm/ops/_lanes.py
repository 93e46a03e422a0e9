"""Vectors of float32 lanes for numba's loops: what the compiler does not find by itself.

numba turns a loop over a row into vector instructions, but keeps the row in memory between two such loops, and uses
256 bits of a register where a processor has 512. Here a whole row is one LLVM vector, which LLVM cuts into the
registers that there are: for 128 lanes 8 of AVX-512, 16 of AVX2, or 32 of NEON.

Sums may be taken in any order and products joined with sums, as under ``fastmath``; which it is, is fixed here and not
by the loop around it.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from ghostssm.ops._rounding_kernels import NUMBER_TO_INTEGER
from ghostssm.ops.state_format import BFLOAT16, FLOAT16, FORMATS, FP8, INT4, INT8

_FLOAT, _BYTE, _HALF, _INT = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)
_ANY_ORDER = ("reassoc", "contract", "nsz")
_FOLDED = 16
"""Lanes that two rows' sums or peaks are folded to before they are joined: half of them are each row's."""
_FORMS = {form.kind: form for form in FORMATS.values()}
_LARGEST_CODES = {FLOAT16.kind: 0x7BFF, FP8.kind: 0x7E}
"""Of a positive number."""


class Lanes(types.Type):
    """numba's type of a vector of so many float32."""

    def __init__(self, count):
        self.count = count
        super().__init__(name=f"Lanes({count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, ir.VectorType(_FLOAT, lanes.count))


def _floats(count):
    return ir.VectorType(_FLOAT, count)


def _integers(count):
    return ir.VectorType(_INT, count)


def _constant(value, count):
    return ir.Constant(_integers(count), [value] * count)


def _shuffled(builder, first, second, lanes):
    chosen = list(lanes)
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT, len(chosen)), chosen))


def _padded(builder, value, used, lanes):
    """The first ``used`` numbers of a vector, and zeros up to ``lanes``."""
    zeros = ir.Constant(value.type, [0] * value.type.count)
    return _shuffled(builder, value, zeros, [*range(used), *([value.type.count] * (lanes - used))])


def _place(context, builder, array, value, index, kind):
    data = context.make_array(array)(context, builder, value).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


@intrinsic(prefer_literal=True)
def load(typing, array, count):
    """The first ``count`` numbers of a contiguous float32 array."""

    def generate(context, builder, signature, arguments):
        kind = ir.VectorType(_FLOAT, count.literal_value)
        zero = ir.Constant(ir.IntType(64), 0)
        return builder.load(_place(context, builder, array, arguments[0], zero, kind), align=4)

    return Lanes(count.literal_value)(array, count), generate


@intrinsic(prefer_literal=True)
def spread(typing, value, count):
    """One number in ``count`` lanes."""
    kind = ir.VectorType(_FLOAT, count.literal_value)

    def generate(context, builder, signature, arguments):
        nothing = ir.Constant(kind, ir.Undefined)
        first = builder.insert_element(nothing, arguments[0], _INT(0))
        return _shuffled(builder, first, nothing, [0] * kind.count)

    return Lanes(kind.count)(types.float32, count), generate


@intrinsic(prefer_literal=True)
def load_row(typing, stored, first, count, n, kind):
    """A stored row's ``n`` numbers, in units of its scale, and zeros up to ``count`` lanes.

    Args:
        stored: int8, or int16 of a format without scales. first: where the row begins; of int8 as many bytes must be
            readable as ``count`` lanes take.
        kind: of `ghostssm.ops.state_format.StateFormat`.
    """
    lanes, used, form = count.literal_value, n.literal_value, _FORMS[kind.literal_value]

    def generate(context, builder, signature, arguments):
        codes = ir.VectorType(_BYTE, lanes * form.bits // 8) if form.scaled else ir.VectorType(_HALF, used)
        place = _place(context, builder, stored, arguments[0], arguments[1], codes)
        row = builder.load(place, align=1 if form.scaled else 2)
        if form is INT4:
            return _joined_halves(builder, builder.sext(row, _integers(lanes // 2)), used, lanes)
        if form is INT8:
            return _padded(builder, builder.sitofp(builder.sext(row, _integers(lanes)), _floats(lanes)), used, lanes)
        if form is FP8:
            return _padded(builder, _widened(builder, builder.zext(row, _integers(lanes)), form), used, lanes)
        bits = builder.zext(_padded(builder, row, used, lanes), _integers(lanes))
        if form is BFLOAT16:
            return builder.bitcast(builder.shl(bits, _constant(16, lanes)), _floats(lanes))
        return _widened(builder, bits, form)

    return Lanes(lanes)(stored, types.intp, count, n, kind), generate


@intrinsic(prefer_literal=True)
def store_row(typing, stored, first, lanes, n, kind):
    """The first ``n`` lanes, rounded to the nearest, ties to even; arguments as `load_row` has them.

    No lane is beyond a scaled format's largest number.
    """
    form = _FORMS[kind.literal_value]

    def generate(context, builder, signature, arguments):
        count, used = lanes.count, n.literal_value
        if form in (INT8, INT4):
            magic = ir.Constant(_floats(count), [float(NUMBER_TO_INTEGER)] * count)
            number = builder.fadd(arguments[2], magic, flags=("contract",))
            codes = builder.bitcast(number, _integers(count))
            if form is INT4:
                codes, used = _packed_halves(builder, codes, used), form.row_bytes(used)
        elif form is BFLOAT16:
            # Its exponents are float32's, so that also its smallest numbers are rounded as bits.
            codes = builder.lshr(
                _rounded_bits(builder, builder.bitcast(arguments[2], _integers(count)), 16), _constant(16, count)
            )
        else:
            codes = _narrowed(builder, arguments[2], form)
        size = _BYTE if form.scaled else _HALF
        parts = 32 // size.width
        every = builder.bitcast(codes, ir.VectorType(size, parts * codes.type.count))
        # As a shuffle and not as a truncation, which costs AVX-512 twice the instructions.
        lowest = _shuffled(builder, every, every, range(0, parts * used, parts))
        place = _place(context, builder, stored, arguments[0], arguments[1], lowest.type)
        builder.store(lowest, place, align=size.width // 8)
        return context.get_dummy_value()

    return types.void(stored, types.intp, lanes, n, kind), generate


def _joined_halves(builder, bytes_, used, lanes):
    """The numbers of int4: of so many bytes the lower halves, then the upper."""
    half, count = INT4.row_bytes(used), bytes_.type.count
    lower = builder.ashr(builder.shl(bytes_, _constant(28, count)), _constant(28, count))
    upper = builder.ashr(bytes_, _constant(4, count))
    lower, upper = builder.sitofp(lower, _floats(count)), builder.sitofp(upper, _floats(count))
    chosen = [*range(half), *range(count, count + used - half), *([0] * (lanes - used))]
    joined = _shuffled(builder, lower, upper, chosen)
    return _padded(builder, joined, used, lanes)


def _packed_halves(builder, codes, used):
    """The bytes of int4 codes, each in 32 bits; what an odd number of them lacks is a lane of zeros."""
    half = INT4.row_bytes(used)
    lower, upper = (_shuffled(builder, codes, codes, range(first, first + half)) for first in (0, half))
    return builder.or_(builder.and_(lower, _constant(15, half)), builder.shl(upper, _constant(4, half)))


def _widened(builder, codes, form):
    """`ghostssm.ops._rounding_kernels._widened`, with a sign in the highest of a code's bits."""
    count = codes.type.count
    shift, sign = 23 - form.mantissa, 1 << (form.bits - 1)
    size = builder.and_(codes, _constant(sign - 1, count))
    moved = builder.shl(size, _constant(shift, count))
    normal = builder.add(moved, _constant((127 - form.bias) << 23, count))
    factor = ir.Constant(_floats(count), [2.0 ** (1 - form.bias - form.mantissa)] * count)
    small = builder.bitcast(builder.fmul(builder.sitofp(size, _floats(count)), factor), _integers(count))
    few = builder.icmp_signed("<", size, _constant(1 << form.mantissa, count))
    signs = builder.shl(builder.and_(codes, _constant(sign, count)), _constant(32 - form.bits, count))
    return builder.bitcast(builder.or_(builder.select(few, small, normal), signs), _floats(count))


def _narrowed(builder, values, form):
    """`ghostssm.ops._rounding_kernels._narrowed` to the nearest, and no further than the largest number."""
    count, shift = values.type.count, 23 - form.mantissa
    bits = builder.bitcast(values, _integers(count))
    size = builder.and_(bits, _constant(0x7FFFFFFF, count))
    rounded = builder.lshr(_rounded_bits(builder, size, shift), _constant(shift, count))
    high = builder.sub(rounded, _constant((127 - form.bias) << form.mantissa, count))
    factor = ir.Constant(_floats(count), [2.0 ** (form.bias + form.mantissa - 1)] * count)
    magic = ir.Constant(_floats(count), [float(NUMBER_TO_INTEGER)] * count)
    fine = builder.fadd(builder.fmul(builder.bitcast(size, _floats(count)), factor), magic)
    low = builder.and_(builder.bitcast(fine, _integers(count)), _constant(0xFFFF, count))
    few = builder.icmp_signed("<", size, _constant((128 - form.bias) << 23, count))
    code, largest = builder.select(few, low, high), _constant(_LARGEST_CODES[form.kind], count)
    code = builder.select(builder.icmp_signed("<", code, largest), code, largest)
    sign = builder.and_(builder.lshr(bits, _constant(32 - form.bits, count)), _constant(1 << (form.bits - 1), count))
    return builder.or_(code, sign)


def _rounded_bits(builder, bits, shift):
    """Bits of which all but the lowest are those of the nearest number, ties to even; the lowest are to be dropped."""
    count = bits.type.count
    odd = builder.and_(builder.lshr(bits, _constant(shift, count)), _constant(1, count))
    return builder.add(builder.add(bits, _constant((1 << (shift - 1)) - 1, count)), odd)


@intrinsic
def multiply(typing, factor, other):
    def generate(context, builder, signature, arguments):
        return builder.fmul(*arguments, flags=("contract",))

    return factor(factor, other), generate


@intrinsic
def multiply_add(typing, factor, other, added):
    """``factor`` x ``other`` + ``added``, rounded once where the processor can."""

    def generate(context, builder, signature, arguments):
        product = builder.fmul(arguments[0], arguments[1], flags=("contract",))
        return builder.fadd(product, arguments[2], flags=("contract",))

    return factor(factor, other, added), generate


@intrinsic
def products_of_two(typing, first, second, factor):
    """The inner products of two vectors with a third."""

    def generate(context, builder, signature, arguments):
        both = [builder.fmul(each, arguments[2], flags=_ANY_ORDER) for each in arguments[:2]]
        sums = _joined(builder, both, lambda one, other: builder.fadd(one, other, flags=_ANY_ORDER))
        return context.make_tuple(builder, signature.return_type, sums)

    return types.UniTuple(types.float32, 2)(first, second, factor), generate


@intrinsic
def peaks_of_two(typing, first, second):
    """The largest magnitudes of two vectors."""

    def generate(context, builder, signature, arguments):
        kind = arguments[0].type
        absolute = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind]), f"llvm.fabs.v{kind.count}f32"
        )

        def larger(one, other):
            return builder.select(builder.fcmp_ordered(">", one, other, flags=("nnan", "nsz")), one, other)

        peaks = _joined(builder, [builder.call(absolute, [each]) for each in arguments], larger)
        return context.make_tuple(builder, signature.return_type, peaks)

    return types.UniTuple(types.float32, 2)(first, second), generate


def _joined(builder, both, operation):
    """Two vectors' lanes, each reduced to one number; the steps that are not whole registers are taken together."""
    half = _FOLDED // 2
    one, other = (_folded(builder, each, operation) for each in both)
    low = _shuffled(builder, one, other, [*range(half), *range(_FOLDED, _FOLDED + half)])
    high = _shuffled(builder, one, other, [*range(half, _FOLDED), *range(_FOLDED + half, 2 * _FOLDED)])
    joined = operation(low, high)
    for distance in (4, 2, 1):
        joined = operation(joined, _shuffled(builder, joined, joined, [lane ^ distance for lane in range(_FOLDED)]))
    return [builder.extract_element(joined, _INT(lane)) for lane in (0, half)]


def _folded(builder, value, operation):
    parts = [
        _shuffled(builder, value, value, range(first, first + _FOLDED)) for first in range(0, value.type.count, _FOLDED)
    ]
    while len(parts) > 1:
        rest = parts[-1:] if len(parts) % 2 else []
        parts = [operation(one, other) for one, other in zip(parts[::2], parts[1::2], strict=False)] + rest
    return parts[0]


@intrinsic
def prefetch(typing, array, index):
    """Ask for the cache line of ``array[index]``, which may lie beyond the array."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, array, arguments[0], arguments[1], _BYTE)
        kind = ir.FunctionType(ir.VoidType(), [place.type, _INT, _INT, _INT])
        asked = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(asked, [place, _INT(1), _INT(3), _INT(1)])  # to write, into all caches, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
