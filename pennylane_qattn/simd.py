"""Vectors of numbers in the kernels of the CPU: what Numba's compiler is told to do with several numbers at once.

Left to itself it keeps sums in memory, as it cannot know that two arrays do not overlap, and it gains little from short
loops. A vector here is a value that lives in registers, `lanes` numbers wide: 16 of float32, 8 of float64. Processors
with narrower registers take several for it. Without Numba nothing here may be called.
"""

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

from pennylane_qattn.kernels import inlined, numba

#: Bits of a vector.
BITS = 512
#: Sums may be added up in any order, and products added in one step.
_FLAGS = ("contract", "reassoc")


def _unavailable(name: str) -> Callable:
    def missing(*_: Any) -> None:
        raise RuntimeError(f"{name} is a part of kernels, which need Numba: install the extra 'fast'")

    return missing


if numba is None:
    names = "rows_at lanes load store item splat total dot largest maximum exp where_first"
    rows_at, lanes, load, store, item, splat, total, dot, largest, maximum, exp, where_first = map(
        _unavailable, names.split()
    )
else:
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.core.datamodel import models
    from numba.core.typing import signature as make_signature
    from numba.extending import intrinsic as numba_intrinsic
    from numba.extending import lower_builtin, register_model, type_callable

    class VectorType(types.Type):
        """So many numbers of a dtype."""

        def __init__(self, dtype: types.Float):
            self.dtype = dtype
            super().__init__(name=f"Vector({dtype})")

        @property
        def lanes(self) -> int:
            """How many."""
            return BITS // self.dtype.bitwidth

    @register_model(VectorType)
    class _VectorModel(models.PrimitiveModel):
        def __init__(self, manager, kind):
            super().__init__(manager, kind, ir.VectorType(manager.lookup(kind.dtype).get_value_type(), kind.lanes))

    def intrinsic(function: Callable) -> Callable:
        """A part of kernels that writes its own instructions."""
        # tests wrap every function of the package to check its shapes; Numba wants the function itself
        return numba_intrinsic(inspect.unwrap(function))

    def _constant(kind: ir.VectorType, numbers) -> ir.Constant:
        return ir.Constant(kind, [ir.Constant(kind.element, number) for number in numbers])

    def _fill(kind: ir.VectorType, number: float | int) -> ir.Constant:
        return _constant(kind, [number] * kind.count)

    def _spread(builder, number, count: int):
        kind, places = ir.VectorType(number.type, count), ir.VectorType(ir.IntType(32), count)
        nothing = ir.Constant(kind, ir.Undefined)
        return builder.shuffle_vector(
            builder.insert_element(nothing, number, ir.IntType(32)(0)), nothing, _fill(places, 0)
        )

    def _place(context, builder, kind, array, row, column):
        made = context.make_array(kind)(context, builder, array)
        shape, strides = (cgutils.unpack_tuple(builder, part) for part in (made.shape, made.strides))
        return cgutils.get_item_pointer2(
            context, builder, made.data, shape, strides, kind.layout, (row, column), wraparound=False, boundscheck=False
        )

    def _pointer(context, builder, kind, *place):
        value = context.get_value_type(VectorType(kind.dtype))
        return builder.bitcast(_place(context, builder, kind, *place), value.as_pointer()), kind.dtype.bitwidth // 8

    @intrinsic
    def _numbers_at(typing, address, like):
        kind = types.CPointer(like)

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(kind))

        return kind(types.intp, like), generate

    @inlined
    def rows_at(address, number, width, like):
        """The array of so many rows that begins at an address in memory, its numbers of the dtype of another one."""
        return numba.carray(_numbers_at(address, like), (number, width))

    @intrinsic
    def lanes(typing, array):
        """How many numbers of the array's dtype make up a vector."""
        count = VectorType(array.dtype).lanes

        def generate(context, builder, signature, arguments):
            return context.get_constant(types.intp, count)

        return types.intp(array), generate

    @intrinsic
    def load(typing, array, row, column):
        """The vector that begins at `array[row, column]`; numbers of a row stand side by side."""

        def generate(context, builder, signature, arguments):
            at, align = _pointer(context, builder, array, *arguments)
            return builder.load(at, align=align)

        return VectorType(array.dtype)(array, types.intp, types.intp), generate

    @intrinsic
    def store(typing, array, row, column, vector):
        """Writes a vector to where `load` would read it."""

        def generate(context, builder, signature, arguments):
            at, align = _pointer(context, builder, array, *arguments[:3])
            builder.store(arguments[3], at, align=align)
            return context.get_dummy_value()

        return types.void(array, types.intp, types.intp, vector), generate

    @intrinsic
    def item(typing, array, row, column):
        """`array[row, column]`, without the question whether an index counts from the end."""

        def generate(context, builder, signature, arguments):
            return builder.load(_place(context, builder, array, *arguments))

        return array.dtype(array, types.intp, types.intp), generate

    @intrinsic
    def splat(typing, number):
        """One number in every lane."""
        kind = VectorType(number)

        def generate(context, builder, signature, arguments):
            return _spread(builder, arguments[0], kind.lanes)

        return kind(number), generate

    def _halves(builder, vector, join: Callable):
        """All lanes joined to one number, half with half."""
        while (count := vector.type.count) > 1:
            nothing, places = ir.Constant(vector.type, ir.Undefined), ir.VectorType(ir.IntType(32), count // 2)
            low, high = (
                builder.shuffle_vector(vector, nothing, _constant(places, range(first, first + count // 2)))
                for first in (0, count // 2)
            )
            vector = join(low, high)
        return builder.extract_element(vector, ir.IntType(32)(0))

    @intrinsic
    def total(typing, vector):
        """The sum of all lanes."""

        def generate(context, builder, signature, arguments):
            return _halves(builder, arguments[0], lambda a, b: builder.fadd(a, b, flags=_FLAGS))

        return vector.dtype(vector), generate

    @inlined
    def dot(a, i, b, j, nothing):
        """The product of row `i` of an array with row `j` of another, as wide; `nothing` is a vector of zeros."""
        width, step = a.shape[1], lanes(a)
        whole, sums = width // step * step, nothing
        for c in range(0, whole, step):
            sums = sums + load(a, i, c) * load(b, j, c)
        product = total(sums)
        for c in range(whole, width):
            product += item(a, i, c) * item(b, j, c)
        return product

    def _greater(builder, a, b):
        return builder.select(builder.fcmp_ordered("<", a, b), b, a)  # `a` where it is no number

    @intrinsic
    def largest(typing, vector):
        """The largest of all lanes."""

        def generate(context, builder, signature, arguments):
            return _halves(builder, arguments[0], lambda a, b: _greater(builder, a, b))

        return vector.dtype(vector), generate

    @intrinsic
    def maximum(typing, a, b):
        """The larger of two in every lane; `a` where that is no number."""

        def generate(context, builder, signature, arguments):
            return _greater(builder, *arguments)

        return a(a, b), generate

    @intrinsic
    def where_first(typing, number, a, b):
        """`a` in the first `number` lanes, `b` in the others."""

        def generate(context, builder, signature, arguments):
            count, lane = a.lanes, ir.IntType(32)
            last, first = (context.get_constant(types.intp, n) for n in (count, 0))
            number = arguments[0]
            number = builder.select(builder.icmp_signed(">", number, last), last, number)
            number = builder.select(builder.icmp_signed("<", number, first), first, number)
            numbers = _spread(builder, builder.trunc(number, lane), count)
            chosen = builder.icmp_signed("<", _constant(ir.VectorType(lane, count), range(count)), numbers)
            return builder.select(chosen, *arguments[1:])

        return a(types.intp, a, b), generate

    @intrinsic
    def exp(typing, vector):
        """The exponential, to the last or last but one bit; exponents lie where it is a normal number, or are NaN."""
        bits = vector.dtype.bitwidth
        mantissa, bias, degree = {32: (23, 127, 6), 64: (52, 1023, 12)}[bits]
        # the logarithm of 2 in two parts, the first with so few digits that its multiples are exact
        digits = 2.0 ** (mantissa - 12)
        coarse = math.floor(math.log(2) * digits) / digits
        fine = math.log(2) - coarse + 2.3190468138462996e-17  # the last is what is missing to `math.log(2)`

        def generate(context, builder, signature, arguments):
            (x,) = arguments
            kind, whole = x.type, ir.VectorType(ir.IntType(bits), vector.lanes)
            letters = {32: "f32", 64: "f64"}[bits]
            rint = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(kind, [kind]), f"llvm.rint.v{vector.lanes}{letters}"
            )

            def plus_product(sum_, a, b):
                return builder.fadd(sum_, builder.fmul(a, b, flags=("contract",)), flags=("contract",))

            doublings = builder.call(rint, [builder.fmul(x, _fill(kind, 1 / math.log(2)))])
            rest = plus_product(x, doublings, _fill(kind, -coarse))
            rest = plus_product(rest, doublings, _fill(kind, -fine))
            series = _fill(kind, 1 / math.factorial(degree))
            for power in reversed(range(degree)):
                series = plus_product(_fill(kind, 1 / math.factorial(power)), series, rest)
            small = builder.fptosi(doublings, ir.VectorType(ir.IntType(32), vector.lanes))
            exponent = builder.add(builder.sext(small, whole) if bits > 32 else small, _fill(whole, bias))
            return builder.fmul(series, builder.bitcast(builder.shl(exponent, _fill(whole, mantissa)), kind))

        return vector(vector), generate

    def _make_operator(which: Callable, instruction: str) -> None:
        def typed(context):
            def of(a, b):
                return make_signature(a, a, b) if isinstance(a, VectorType) and a == b else None

            return of

        def lowered(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments, flags=_FLAGS)

        type_callable(which)(typed)
        lower_builtin(which, VectorType, VectorType)(lowered)

    for _which, _instruction in (
        (operator.add, "fadd"),
        (operator.sub, "fsub"),
        (operator.mul, "fmul"),
        (operator.truediv, "fdiv"),
    ):
        _make_operator(_which, _instruction)
