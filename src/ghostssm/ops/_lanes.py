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

_FLOAT, _BYTE, _HALF, _INT = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)
_ANY_ORDER = ("reassoc", "contract", "nsz")
_FOLDED = 16
"""Lanes that two rows' sums or peaks are folded to before they are joined: half of them are each row's."""


class Lanes(types.Type):
    """numba's type of a vector of so many float32."""

    def __init__(self, count):
        self.count = count
        super().__init__(name=f"Lanes({count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, ir.VectorType(_FLOAT, lanes.count))


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
def load_codes(typing, codes, first, count, n):
    """``n`` int8 from ``first`` on as floats, and zeros up to ``count`` lanes; so many bytes must be readable."""
    lanes, used = count.literal_value, n.literal_value

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, codes, arguments[0], arguments[1], ir.VectorType(_BYTE, lanes))
        wide = builder.sext(builder.load(place, align=1), ir.VectorType(_INT, lanes))
        values = builder.sitofp(wide, ir.VectorType(_FLOAT, lanes))
        return _padded(builder, values, used, lanes)

    return Lanes(lanes)(codes, types.intp, count, n), generate


@intrinsic(prefer_literal=True)
def store_low_bytes(typing, codes, first, lanes, n):
    """The lowest byte of each of the first ``n`` lanes' bits, into int8 from ``first`` on."""

    def generate(context, builder, signature, arguments):
        every = builder.bitcast(arguments[2], ir.VectorType(_BYTE, 4 * lanes.count))
        # As a shuffle and not as a truncation, which costs AVX-512 twice the instructions.
        lowest = _shuffled(builder, every, every, range(0, 4 * n.literal_value, 4))
        builder.store(lowest, _place(context, builder, codes, arguments[0], arguments[1], lowest.type), align=1)
        return context.get_dummy_value()

    return types.void(codes, types.intp, lanes, n), generate


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
def load_bfloat16(typing, halves, first, count, n):
    """``n`` bfloat16 as int16 from ``first`` on, and zeros up to ``count`` lanes."""
    lanes, used = count.literal_value, n.literal_value

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, halves, arguments[0], arguments[1], ir.VectorType(_HALF, used))
        stored = builder.load(place, align=2)
        wide = builder.zext(_padded(builder, stored, used, lanes), ir.VectorType(_INT, lanes))
        return builder.bitcast(builder.shl(wide, _constant(16, lanes)), ir.VectorType(_FLOAT, lanes))

    return Lanes(lanes)(halves, types.intp, count, n), generate


def _constant(value, lanes):
    return ir.Constant(ir.VectorType(_INT, lanes), [value] * lanes)


@intrinsic(prefer_literal=True)
def store_bfloat16(typing, halves, first, lanes, n):
    """The first ``n`` lanes, rounded to the nearest, ties to even, into int16 from ``first`` on."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[2], ir.VectorType(_INT, lanes.count))
        odd = builder.and_(builder.lshr(bits, _constant(16, lanes.count)), _constant(1, lanes.count))
        rounded = builder.add(builder.add(bits, _constant(0x7FFF, lanes.count)), odd)
        every = builder.bitcast(rounded, ir.VectorType(_HALF, 2 * lanes.count))
        upper = _shuffled(builder, every, every, range(1, 2 * n.literal_value, 2))
        builder.store(upper, _place(context, builder, halves, arguments[0], arguments[1], upper.type), align=2)
        return context.get_dummy_value()

    return types.void(halves, types.intp, lanes, n), generate


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
