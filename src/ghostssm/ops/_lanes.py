"""Vectors of float32 lanes for numba's loops: what the compiler does not find by itself.

numba turns a loop over numbers into vector instructions, but keeps them in memory between two such loops, and uses
256 bits of a register where a processor has 512. Here so many numbers are one LLVM vector, which LLVM cuts into the
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

INT = ir.IntType(32)
_ANY_ORDER = ("reassoc", "contract", "nsz")
_FOLDED = 16
"""Lanes that two rows' sums are folded to before they are joined: half of them are each row's."""


class Lanes(types.Type):
    """numba's type of a vector of so many float32."""

    def __init__(self, count):
        self.count = count
        super().__init__(name=f"Lanes({count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, floats(lanes.count))


def floats(count):
    return ir.VectorType(ir.FloatType(), count)


def integers(count):
    return ir.VectorType(INT, count)


def filled(value, count):
    return ir.Constant(floats(count), [value] * count)


def shuffled(builder, first, second, lanes):
    chosen = list(lanes)
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT, len(chosen)), chosen))


def place_of(context, builder, array, value, index, kind):
    data = context.make_array(array)(context, builder, value).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


@intrinsic(prefer_literal=True)
def load(typing, array, first, count):
    """``count`` numbers of a contiguous float32 array."""

    def generate(context, builder, signature, arguments):
        kind = floats(count.literal_value)
        return builder.load(place_of(context, builder, array, arguments[0], arguments[1], kind), align=4)

    return Lanes(count.literal_value)(array, types.intp, count), generate


@intrinsic
def store(typing, array, first, lanes):
    """A vector's numbers, into a contiguous float32 array."""

    def generate(context, builder, signature, arguments):
        place = place_of(context, builder, array, arguments[0], arguments[1], arguments[2].type)
        builder.store(arguments[2], place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), generate


@intrinsic(prefer_literal=True)
def spread(typing, value, count):
    """One number in ``count`` lanes."""
    kind = floats(count.literal_value)

    def generate(context, builder, signature, arguments):
        nothing = ir.Constant(kind, ir.Undefined)
        first = builder.insert_element(nothing, arguments[0], INT(0))
        return shuffled(builder, first, nothing, [0] * kind.count)

    return Lanes(kind.count)(types.float32, count), generate


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
def larger_magnitude(typing, value, magnitude):
    """Lane by lane the larger of ``magnitude`` and the magnitude of ``value``."""

    def generate(context, builder, signature, arguments):
        kind = arguments[0].type
        absolute = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind]), f"llvm.fabs.v{kind.count}f32"
        )
        new = builder.call(absolute, arguments[:1])
        greater = builder.fcmp_ordered(">", new, arguments[1], flags=("nnan", "nsz"))
        return builder.select(greater, new, arguments[1])

    return value(value, magnitude), generate


@intrinsic
def products_of_two(typing, first, second, factor):
    """The inner products of two vectors with a third."""

    def generate(context, builder, signature, arguments):
        both = [builder.fmul(each, arguments[2], flags=_ANY_ORDER) for each in arguments[:2]]
        return context.make_tuple(builder, signature.return_type, _sums(builder, *both))

    return types.UniTuple(types.float32, 2)(first, second, factor), generate


def _sums(builder, first, second):
    """Of two vectors' lanes; the steps that are not whole registers are taken together."""
    half = _FOLDED // 2
    one, other = (_folded(builder, each) for each in (first, second))
    low = shuffled(builder, one, other, [*range(half), *range(_FOLDED, _FOLDED + half)])
    high = shuffled(builder, one, other, [*range(half, _FOLDED), *range(_FOLDED + half, 2 * _FOLDED)])
    joined = builder.fadd(low, high, flags=_ANY_ORDER)
    for distance in (4, 2, 1):
        moved = shuffled(builder, joined, joined, [lane ^ distance for lane in range(_FOLDED)])
        joined = builder.fadd(joined, moved, flags=_ANY_ORDER)
    return [builder.extract_element(joined, INT(lane)) for lane in (0, half)]


def _folded(builder, value):
    parts = [
        shuffled(builder, value, value, range(first, first + _FOLDED)) for first in range(0, value.type.count, _FOLDED)
    ]
    while len(parts) > 1:
        rest = parts[-1:] if len(parts) % 2 else []
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [builder.fadd(one, other, flags=_ANY_ORDER) for one, other in pairs] + rest
    return parts[0]


@intrinsic
def prefetch(typing, array, index):
    """Ask for the cache line of ``array[index]``, which may lie beyond the array."""

    def generate(context, builder, signature, arguments):
        place = place_of(context, builder, array, arguments[0], arguments[1], ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [place.type, INT, INT, INT])
        asked = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(asked, [place, INT(1), INT(3), INT(1)])  # to write, into all caches, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
