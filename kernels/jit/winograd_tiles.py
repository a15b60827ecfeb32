"""The transforms of Winograd's convolution, emitted for each tile of ``kernels/winograd.py``.

    Y = M X Nt      cells to points: M and N are the Bt of inputs, the G of taps or the A of outputs, of a tile's axes
    Y = Mt X N      points back to cells: outputs of the forward pass, taps of the gradient of the weights

An axis of m outputs and r taps has m + r - 1 points: 0, infinity, and pairs p and -p between them. There are no tiles
for stride 2: they gained nothing here, and a first call took 23 seconds with them instead of 17.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..winograd import ALONE, TERMS, Side
from .compile import jit
from .tile import MACHINE

LIMIT = 2.0**48  #: products of numbers below it can be summed without overflow
PAIRS = {4: (1.0,), 6: (0.625, 1.5)}  #: points beside 0 and infinity, each with its negative, of so many

Matrix = tuple[tuple[float, ...], ...]


class Axis(NamedTuple):
    """The matrices of one axis, with a row for each point; but a pair of points has its even part and its odd part.

    The values at p and -p are then even + odd and even - odd.
    """

    inputs: Matrix  #: Bt
    taps: Matrix  #: G
    outputs: Matrix  #: A


def _axis(side: Side) -> Axis:
    """Return the matrices for so many outputs and taps: Lagrange's interpolation; F(1, 1) leaves the axis alone."""
    if side == ALONE:
        return Axis(*[((1.0,),)] * 3)
    outputs, taps, pairs = side.outputs, side.taps, PAIRS[side.points]
    to_inputs, to_taps, to_outputs = [_product(pairs)], [_powers(0, taps) / _product(pairs)[0]], [_powers(0, outputs)]
    for p in pairs:
        others = _product([q for q in pairs if q != p])
        scale = 2 * p * p * math.prod(p * p - q * q for q in pairs if q != p)
        to_inputs += [np.convolve(others, (0, 0, 1)), np.convolve(others, (0, p))]  # times x (x + p)
        for parity in (0, 1):
            to_taps.append(_powers(p, taps, parity) / scale)
            to_outputs.append(_powers(p, outputs, parity))
    to_inputs.append(np.convolve(_product(pairs), (0, 1)))
    to_taps.append(_powers(0, taps)[::-1])
    to_outputs.append(_powers(0, outputs)[::-1])
    return Axis(_matrix(to_inputs), _matrix(to_taps), _matrix(to_outputs))


def _product(pairs: Any) -> np.ndarray:
    """Return the polynomial whose roots are p and -p for each of the pairs, lowest power first."""
    return reduce(np.convolve, [(-p * p, 0, 1) for p in pairs], np.ones(1))


def _powers(p: float, count: int, parity: int = 0) -> np.ndarray:
    """Return the even powers of p, or the odd ones, and zeros between them."""
    return np.array([p**i if i % 2 == parity else 0.0 for i in range(count)])


def _matrix(rows: list[np.ndarray]) -> Matrix:
    """Return the rows, filled up with zeros."""
    width = max(len(row) for row in rows)
    return tuple(tuple(float(number) for number in (*row, *[0.0] * (width - len(row)))) for row in rows)


SIDES = tuple(
    dict.fromkeys(sides for pair in TERMS for sides in (pair, pair[::-1]) if all(side.stride == 1 for side in sides))
)
AXES = {side: _axis(side) for pair in SIDES for side in pair}


def make_transform(kind: str, back: bool = False) -> Any:
    """Return the function that transforms X to Y by the matrices of a ``kind``, neighbouring ``numbers`` at once.

    Rows and columns of X and Y are so many elements apart. Sides are known by their codes; a tile whose rows have the
    greater one has its axes exchanged, but for outputs stored row by row: ``conv_winograd`` lets rows overlap.
    """
    exchanged = not (kind == "outputs" and back)

    @intrinsic
    def emitted(
        typingctx: Any, rows: Any, columns: Any, numbers: Any, y: Any, y_row: Any, y_column: Any,
        x: Any, x_row: Any, x_column: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            lanes = MACHINE.vector_bytes // (y.dtype.bitwidth // 8)
            vectors = builder.udiv(args[2], args[2].type(lanes))
            vector_type = ir.VectorType(context.get_value_type(y.dtype), lanes)
            end = builder.append_basic_block("end")
            switch = builder.switch(builder.add(builder.mul(args[0], args[0].type(1000)), args[1]), end)
            for sides in (sides for sides in SIDES if not exchanged or sides[0].code <= sides[1].code):
                case = builder.append_basic_block("tile")
                switch.add_case(args[0].type(1000 * sides[0].code + sides[1].code), case)
                builder.position_at_end(case)
                with cgutils.for_range(builder, vectors) as vector:
                    lane = builder.mul(vector.index, vector.index.type(lanes))
                    to, start = builder.gep(args[3], [lane]), builder.gep(args[6], [lane])
                    matrices = [getattr(AXES[side], kind) for side in sides]
                    _emit_transform(builder, matrices, back, vector_type, to, args[4:6], start, args[7:9])
                builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        size = types.intp
        return types.void(size, size, size, y, size, size, x, size, size), generate

    @jit
    def transform(
        rows: int, columns: int, numbers: int, y: Any, y_row: int, y_column: int, x: Any, x_row: int, x_column: int
    ) -> None:
        if exchanged and rows > columns:
            rows, columns, y_row, y_column, x_row, x_column = columns, rows, y_column, y_row, x_column, x_row
        emitted(rows, columns, numbers, y, y_row, y_column, x, x_row, x_column)

    return transform


def _emit_transform(
    builder: ir.IRBuilder, matrices: list[Matrix], back: bool, vector: Any, y: Any, y_steps: Any, x: Any, x_steps: Any
) -> None:
    """Emit the loads, the transforms of columns and of rows, and the stores of one vector of each cell."""
    align = 4 if vector.element == ir.FloatType() else 8
    high, wide = (len(matrix) if back else len(matrix[0]) for matrix in matrices)

    def cell(start: Any, steps: Any, i: int, j: int) -> Any:
        offset = builder.add(*(builder.mul(step, step.type(n)) for step, n in zip(steps, (i, j), strict=True)))
        return builder.bitcast(builder.gep(start, [offset]), vector.as_pointer())

    half = [
        _emit_axis(
            builder, matrices[0], back, vector, [builder.load(cell(x, x_steps, i, j), align=align) for i in range(high)]
        )
        for j in range(wide)
    ]
    for i in range(len(half[0])):
        for j, result in enumerate(_emit_axis(builder, matrices[1], back, vector, [column[i] for column in half])):
            builder.store(result, cell(y, y_steps, i, j), align=align)


def _emit_axis(builder: ir.IRBuilder, matrix: Matrix, back: bool, vector: Any, vectors: list[Any]) -> list[Any]:
    """Emit the transform of one axis, to points or back."""
    name = f"llvm.fmuladd.v{vector.count}f{32 if vector.element == ir.FloatType() else 64}"
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)

    def combine(factors: tuple[float, ...]) -> Any:
        """Return the sum of factor * vector; one that needs no multiplication comes first."""
        total = None
        for factor, v in sorted(zip(factors, vectors, strict=True), key=lambda term: term[0] != 1):
            constant = ir.Constant(vector, [factor] * vector.count)
            if total is None and factor:
                total = v if factor == 1 else builder.fmul(v, constant)
            elif abs(factor) == 1:
                total = (builder.fadd if factor == 1 else builder.fsub)(total, v)
            elif factor:
                total = builder.call(fma, [v, constant, total])
        return total

    def add_and_subtract(parts: list[Any]) -> list[Any]:
        """Return a + b and a - b for each pair (a, b) of parts, or of points: all but the first and the last."""
        result = list(parts)
        for i in range(1, len(parts) - 2, 2):
            result[i : i + 2] = builder.fadd(*parts[i : i + 2]), builder.fsub(*parts[i : i + 2])
        return result

    if back:
        vectors = add_and_subtract(vectors)
        return [combine(factors) for factors in zip(*matrix, strict=True)]
    return add_and_subtract([combine(factors) for factors in matrix])


@jit
def points(side: int) -> int:
    """Return the points of the side of stride 1 with this code: ``winograd.Side.points``."""
    return side // 10 % 10 - 1 + side % 10


@jit
def all_below(numbers: Any, count: int, limit: float) -> bool:
    """Whether all numbers are below the limit in magnitude, which a NaN is not."""
    below = True
    for i in range(count):
        below &= (numbers[i] < limit) & (numbers[i] > -limit)
    return below
