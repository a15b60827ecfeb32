"""The register tile: the one place where the multiplications of every convolution happen.

    C[m, n]  +=  sum over taps t and k < depth of  A[rows[m] + taps[t] + k * step] * B[b_taps[t] + k * b_step + n]

    A: reached by offsets                             B: rows of neighbours in memory, a panel of them wide

     rows[m] + taps[t] + k*step                        n ->
     +--+                                             +----------------+
   m |a0|  one number, broadcast                    k | b0 ........ bn |  a few vectors
   | |a1|                      times                  +----------------+
   v |..|                                                    |
     +--+                                                    v
                        C in registers: rows x vectors, e.g. 6 x 2 of 8 floats with AVX2

A compiler that sees plain loops keeps C in memory, and then moves three numbers for each multiplication. Here C stays
in registers over the whole sum, so that ``rows + vectors`` loads feed ``rows * vectors`` fused multiply-adds: that is
all there is to a fast matrix product. Since ``rows`` and ``taps`` are arbitrary offsets, the same tile serves a
convolution without a column matrix (rows are pixels, taps are the filter's cells), the gradient of its weights (rows
are the filter's cells, "taps" are rows of the image), an ordinary matrix product, and a convolution whose lanes are the
pixels of an image in place (rows are filters, ``b_taps`` the filter's cells). (Georganas et al., arXiv
1906.06440: a "batch-reduce GEMM".)

Numba has no vector types, so the tile is written in LLVM's language, as an ``intrinsic``: a function that emits
instructions into its caller. ``elementwise`` tiles multiply A[... + n] instead of a broadcast A[...]: depthwise
convolution.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from ctypes import c_ssize_t
from functools import lru_cache
from itertools import count, product
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from .compile import jit


class Shape(NamedTuple):
    """Registers of a tile: C is ``rows`` x ``vectors``, beside ``vectors`` of B and one of A."""

    rows: int
    vectors: int


class Machine(NamedTuple):
    """The tiles of an instruction set: as many sums as its registers hold, so that none waits for its last addition."""

    vector_bytes: int
    wide: Shape
    narrow: Shape  #: half as many lanes, for few channels
    flat: Shape  #: for few rows: C beside a vector of A for each row, and one of B at a time


# Rows divide ROW_MULTIPLE. More than 12 rows would leave too few of x86's integer registers for the addresses.
_AVX512 = Machine(64, Shape(12, 2), Shape(12, 1), Shape(3, 8))  # 32 registers
_AVX2 = Machine(32, Shape(6, 2), Shape(8, 1), Shape(3, 4))  # 16 registers
_NEON = Machine(16, Shape(6, 4), Shape(8, 2), Shape(3, 8))  # 32 registers
_SSE = Machine(16, Shape(4, 2), Shape(8, 1), Shape(3, 4))  # 16 registers
ROW_MULTIPLE = 24


def _find_machine() -> Machine:
    """Return the tiles for the CPU that Numba compiles for, or for less where FASTCONV_ISA caps it."""
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    cap = os.environ.get("FASTCONV_ISA")
    if platform.machine().lower() in ("arm64", "aarch64"):
        return _NEON
    if "+avx512f" in features and cap not in ("scalar", "avx2"):
        return _AVX512
    if "+avx2" in features and cap != "scalar":
        return _AVX2
    return _SSE


MACHINE = _find_machine()
CHUNK = 4 * ROW_MULTIPLE  #: rows that are multiplied by a block of B while it is in the L1 cache
WIDE_ROWS, NARROW_ROWS = MACHINE.wide.rows, MACHINE.narrow.rows
WIDE_BYTES = MACHINE.wide.vectors * MACHINE.vector_bytes
BLOCK_BYTES = 20 * 1024  #: such a block of B: it shares 32 KB of L1 with the rows of A


class Panel(NamedTuple):
    """What B's panels look like, and so which tile multiplies them."""

    lanes: int  #: numbers side by side: output channels, or pixels
    narrow: bool
    elementwise: bool  #: depthwise: lane n of A meets lane n of B


def panel_for(count: int, elementwise: bool, itemsize: int) -> Panel:
    """Return the panel that wastes least on ``count`` output channels or pixels."""
    wide, narrow = (shape.vectors * MACHINE.vector_bytes // itemsize for shape in (MACHINE.wide, MACHINE.narrow))
    return Panel(narrow, True, elementwise) if count <= narrow else Panel(wide, False, elementwise)


# ---------------------------------------------------------------------------------------------------------------------
# Memory as pointers. Kernels get addresses and element strides, so that one compiled version per dtype serves every
# layout, read-only arrays included. Who makes a pointer keeps the array alive.
# ---------------------------------------------------------------------------------------------------------------------


def address(array: np.ndarray) -> int:
    """Return where an array's data is: ``array.ctypes.data``, which takes as long as a small layer's arithmetic.

    It is the first field of NumPy's C struct for arrays, and follows what every Python object begins with.
    """
    return c_ssize_t.from_address(id(array) + object.__basicsize__).value


@intrinsic
def pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """Return ``address`` as a pointer to numbers of the type of ``like``; ``p[i]`` reads and writes."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.unliteral(like))(types.intp, like), generate


@intrinsic
def shift(typingctx: Any, start: Any, elements: Any) -> Any:
    """Return the pointer ``elements`` after ``start``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return start(start, types.intp), generate


def reader(kind: type) -> Any:
    """Return the function that reads a named tuple of this kind from the address where ``flat`` has put it.

    As arguments of a kernel its many numbers would be checked and unpacked at every call.
    """
    numba_kind = _numba_type(kind)

    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            start, positions = builder.inttoptr(args[0], ir.IntType(64).as_pointer()), count()

            def value(part: Any) -> Any:
                if isinstance(part, types.BaseTuple):
                    return context.make_tuple(builder, part, [value(field) for field in part.types])
                number = builder.load(builder.gep(start, [ir.IntType(64)(next(positions))]))
                return builder.trunc(number, context.get_value_type(part)) if part == types.boolean else number

            return value(numba_kind)

        return numba_kind(types.intp), generate

    return read


def _numba_type(hint: Any) -> Any:
    """Return Numba's type for int, bool, tuples and named tuples of them."""
    if hint in (int, bool):
        return types.int64 if hint is int else types.boolean
    fields = get_type_hints(hint).values() if hasattr(hint, "_fields") else get_args(hint)
    named = hint if hasattr(hint, "_fields") else None
    return types.BaseTuple.from_types([_numba_type(field) for field in fields], named)


@lru_cache(maxsize=512)
def flat(values: tuple[Any, ...]) -> np.ndarray:
    """Return the numbers of nested tuples one after the other."""
    return np.array([*_numbers(values)], np.int64)


def _numbers(values: tuple[Any, ...]) -> Iterator[int]:
    for value in values:
        if isinstance(value, tuple):
            yield from _numbers(value)
        else:
            yield value


def shuffle(builder: ir.IRBuilder, a: Any, b: Any, lanes: list[int]) -> Any:
    """Emit the choice of lanes: those of ``a`` are numbered from 0 on, those of ``b`` follow."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


def splat(builder: ir.IRBuilder, value: Any, vector: Any) -> Any:
    """Emit a vector with ``value`` in all lanes; integers are cut to its width."""
    if value.type != vector.element:
        value = builder.trunc(value, vector.element)
    undefined = ir.Constant(vector, ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, value, ir.IntType(64)(0)), undefined, [0] * vector.count)


# ---------------------------------------------------------------------------------------------------------------------
# The tile
# ---------------------------------------------------------------------------------------------------------------------


def _make_tile(shape: Shape, elementwise: bool = False, apart: bool = False) -> Any:
    """Return the tile of the given shape; see the formula at the head of this file.

    Where taps are summed ``apart``, the sum of each is added to C by itself: sums of sums have smaller errors.
    """

    @intrinsic
    def tile(
        typingctx: Any, c: Any, c_step: Any, a: Any, rows: Any, taps: Any, tap_count: Any, depth: Any, step: Any,
        b: Any, b_taps: Any, b_step: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            _emit_tile(context, builder, shape, elementwise, apart, c.dtype, *args)
            return context.get_dummy_value()

        offsets = types.CPointer(types.int64)
        size = types.intp
        return types.void(c, size, a, offsets, offsets, size, size, size, b, b_taps, size), generate

    return tile


def _emit_tile(
    context: Any, builder: ir.IRBuilder, shape: Shape, elementwise: bool, apart: bool, dtype: Any,
    c: Any, c_step: Any, a: Any, rows: Any, taps: Any, tap_count: Any, depth: Any, step: Any,
    b: Any, b_taps: Any, b_step: Any,
) -> None:  # fmt: skip
    """Emit the loops over taps and depth around ``rows * vectors`` multiply-adds."""
    width = MACHINE.vector_bytes * 8 // dtype.bitwidth
    vector = ir.VectorType(context.get_value_type(dtype), width)
    # "fmuladd" is one instruction where the CPU has it, a multiplication and an addition elsewhere.
    name = f"llvm.fmuladd.v{width}f{dtype.bitwidth}"
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
    index, align = ir.IntType(64), dtype.bitwidth // 8
    tile_rows, columns = range(shape.rows), range(shape.vectors)
    order = sorted(product(tile_rows, columns), key=lambda cell: cell if shape.rows > shape.vectors else cell[::-1])

    def load(start: Any, offset: Any) -> Any:
        return builder.load(builder.bitcast(builder.gep(start, [offset]), vector.as_pointer()), align=align)

    def add_to_c() -> None:
        for m in tile_rows:
            c_row = builder.gep(c, [builder.mul(c_step, index(m))])
            for v in columns:
                target = builder.gep(c_row, [index(v * width)])
                total = builder.fadd(load(target, index(0)), builder.load(sums[m][v]))
                builder.store(total, builder.bitcast(target, vector.as_pointer()), align=align)
                builder.store(zero, sums[m][v])

    # LLVM turns these variables into registers.
    zero = ir.Constant(vector, None)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in columns] for _ in tile_rows]
    starts = [builder.gep(a, [builder.load(builder.gep(rows, [index(m)]))]) for m in tile_rows]
    with cgutils.for_range(builder, tap_count) as tap:
        table = isinstance(b_taps.type, ir.PointerType)
        b_start = builder.load(builder.gep(b_taps, [tap.index])) if table else builder.mul(b_taps, tap.index)
        panel = cgutils.alloca_once_value(builder, builder.gep(b, [b_start]))
        position = cgutils.alloca_once_value(builder, builder.load(builder.gep(taps, [tap.index])))
        with cgutils.for_range(builder, depth):
            here, b_row = builder.load(position), builder.load(panel)
            a_rows, a_vectors, b_vectors = {}, {}, {}
            for m, v in order:  # each vector is loaded when it is first needed
                if m not in a_rows:
                    a_rows[m] = builder.gep(starts[m], [here])
                    a_vectors[m] = None if elementwise else splat(builder, builder.load(a_rows[m]), vector)
                if v not in b_vectors:
                    b_vectors[v] = load(b_row, index(v * width))
                a_vector = load(a_rows[m], index(v * width)) if elementwise else a_vectors[m]
                builder.store(builder.call(fma, [a_vector, b_vectors[v], builder.load(sums[m][v])]), sums[m][v])
            builder.store(builder.add(here, step), position)
            builder.store(builder.gep(b_row, [b_step]), panel)

        if apart:
            add_to_c()
    if not apart:
        add_to_c()


_wide = _make_tile(MACHINE.wide)
_narrow = _make_tile(MACHINE.narrow)
_wide_elementwise = _make_tile(MACHINE.wide, elementwise=True)
_narrow_elementwise = _make_tile(MACHINE.narrow, elementwise=True)
_wide_apart = _make_tile(MACHINE.wide, apart=True)
_narrow_apart = _make_tile(MACHINE.narrow, apart=True)
flat_tile = _make_tile(MACHINE.flat)


@jit
def multiply(
    c: Any, c_step: int, a: Any, rows: Any, count: int, taps: Any, tap_count: int, depth: int, step: int,
    b: Any, b_taps: Any, b_step: int, panel: Panel,
) -> None:  # fmt: skip
    """Add the formula above to ``count`` rows of C, tile after tile; a number as ``b_taps`` means t * b_taps.

    Rows of B and C are ``b_step`` and ``c_step`` apart. The last tile may be taller than what is left: ``rows`` and C
    go on up to a multiple of ROW_MULTIPLE.
    """
    tile_rows = NARROW_ROWS if panel.narrow else WIDE_ROWS
    for row in range(0, count, tile_rows):
        c_row, a_rows = shift(c, row * c_step), shift(rows, row)
        if panel.elementwise and panel.narrow:
            _narrow_elementwise(c_row, c_step, a, a_rows, taps, tap_count, depth, step, b, b_taps, b_step)
        elif panel.elementwise:
            _wide_elementwise(c_row, c_step, a, a_rows, taps, tap_count, depth, step, b, b_taps, b_step)
        elif panel.narrow:
            _narrow(c_row, c_step, a, a_rows, taps, tap_count, depth, step, b, b_taps, b_step)
        else:
            _wide(c_row, c_step, a, a_rows, taps, tap_count, depth, step, b, b_taps, b_step)


@jit
def multiply_apart(
    c: Any, a: Any, rows: Any, count: int, taps: Any, tap_count: int, depth: int, step: int, b: Any, b_taps: int,
    panel: Panel,
) -> None:  # fmt: skip
    """Do the same with the sum of each tap added to C by itself; rows of B and C follow each other."""
    tile_rows = NARROW_ROWS if panel.narrow else WIDE_ROWS
    for row in range(0, count, tile_rows):
        c_row, a_rows = shift(c, row * panel.lanes), shift(rows, row)
        if panel.narrow:
            _narrow_apart(c_row, panel.lanes, a, a_rows, taps, tap_count, depth, step, b, b_taps, panel.lanes)
        else:
            _wide_apart(c_row, panel.lanes, a, a_rows, taps, tap_count, depth, step, b, b_taps, panel.lanes)
