"""Winograd's F(2x2, 3x3): 16 multiplications for what a 3x3 filter takes 36 for.

    output tile (2x2) = At [ sum over channels of (G g Gt) * (Bt d B) ] A,     d: 4x4 inputs, g: 3x3 filter

    for each box of tiles (a task):
        for each block of channels:
            pack the image, transform it                          [point of 16][block][tile][channel]
        for some panels of filters:
            for each block of channels:                           their weights are transformed here if used only once
                for each point, each panel:
                    sums += inputs of the point * panel           16 independent matrix products: the register tile
            for each panel:
                output = activation(At sums A)                    the epilogue

      inputs of a point          panel                sums, [panel][point][tile][lane]
      +---------------+       +----------+            +----------+
      |    tiles x    |   x   | channels |     =      |  tiles x |
      |   channels    |       | x lanes  |            |   lanes  |
      +---------------+       +----------+            +----------+

To all code that packs, a tile of outputs is a pixel, of a convolution with 4x4 filters and stride 2. Sums of inputs can
overflow, or make a NaN of two infinities, where single products would not: an image that holds such numbers is left to
conv_direct.

A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..interleave import input_grad
from . import conv_direct, packing
from .blocking import Plan, winograd_plans
from .compile import jit, kernel
from .packing import OFFSET, SQUARE, Quad, Strided, strided
from .threads import parallel, workspace, worthwhile
from .tile import CHUNK, MACHINE, ROW_MULTIPLE, Panel, address, flat, multiply, pointer, shift

POINTS = 16
BIAS_POINT = 5  #: whose sum is added once to all four outputs of a tile: it may as well start at the bias
PANELS = 4  #: panels that one pass over the transformed inputs multiplies
LIMIT = 2.0**48  #: products of numbers below it can be summed without overflow


class Weights(NamedTuple):
    """The weights as compiled code needs them; its pointers are to numbers of their type."""

    source: Any  #: the caller's
    weight: Strided
    part: Any  #: room for a panel's weights of some channels, not yet transformed
    rows: Any  #: room for ``pack_part``


class Steps(NamedTuple):
    """Elements between the points of an array: a cache line more than needed, lest all fall into one set of L1."""

    weight: int
    input: int
    sums: int


def conv_forward(
    input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, output: np.ndarray, dims: Any, options: Any
) -> None:
    """Fill ``output``."""
    alone = dims._replace(batch=1)
    for image in _convolve(input, weight, bias, output, dims, options):
        one = slice(image, image + 1)
        conv_direct.conv_forward(input[one], weight, bias, output[one], alone, options)


def conv_input_grad(
    grad_output: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    grad_input: np.ndarray,
    dims: Any,
    options: Any,
) -> None:
    """Fill ``grad_input``: stride-1 convolutions of ``grad_output``, see ``interleave``."""
    input_grad(conv_forward, grad_output, weight, bias, grad_input, dims, options)


def _convolve(
    input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, output: np.ndarray, dims: Any, options: Any
) -> list[int]:
    """Convolve; return the images with numbers that are not below LIMIT, whose output is to be computed otherwise."""
    dtype, threads = output.dtype, worthwhile(options.threads, dims.flops)
    tiles, pixels = winograd_plans(dims, dtype.itemsize, threads)
    lanes, panels, line = tiles.panel.lanes, tiles.groups * tiles.panels, 64 // dtype.itemsize
    once = tiles.box_count == 1  # each panel is used once: transformed where it is used
    most_tiles = -(-math.prod(tiles.box) // ROW_MULTIPLE) * ROW_MULTIPLE
    steps = Steps(
        tiles.channels * lanes + line, tiles.blocks * most_tiles * tiles.block + line, most_tiles * lanes + line
    )
    tile_numbers, pixel_numbers = flat(tiles), flat(pixels)
    refused, packed, limit = np.zeros(dims.batch, OFFSET), 0, dtype.type(LIMIT)

    def transform(first: int, last: int) -> None:
        part = workspace("part", tiles.block * dims.taps * lanes, dtype)
        rows = workspace("rows", SQUARE * dims.taps, OFFSET)
        if not _transform_weight(
            first, last, strided(weight), packed, part, rows, steps, address(pixel_numbers), limit
        ):
            refused.fill(True)

    if once:
        steps = steps._replace(weight=tiles.block * lanes + line)
    else:
        packed = workspace("weight", panels * POINTS * steps.weight, dtype)
        parallel(transform, panels, threads)
        if refused.any():
            return list(range(dims.batch))
    all_bias = packing.contiguous_bias(bias, dims.out_channels, dtype)
    boxes = tiles.box_count * tiles.groups
    splits = min(-(-tiles.panels // PANELS), -(-threads // max(1, boxes)))  # few boxes: threads share them

    def work(first: int, last: int) -> None:
        _forward(
            first, last, splits, strided(input), strided(weight), once,
            packed or workspace("weight", PANELS * POINTS * steps.weight, dtype),
            address(all_bias), strided(output), address(tile_numbers), address(pixel_numbers),
            options.activation == "relu", address(refused), steps,
            workspace("part", tiles.block * dims.taps * lanes, dtype), workspace("rows", SQUARE * dims.taps, OFFSET),
            workspace("box", tiles.box_block, dtype),
            workspace("inputs", POINTS * steps.input, dtype), workspace("sums", PANELS * POINTS * steps.sums, dtype),
            workspace("pixels", 2 * CHUNK * lanes, dtype), workspace("offsets", 1 + most_tiles, OFFSET), limit,
        )  # fmt: skip

    parallel(work, boxes * splits, threads)
    return [int(image) for image in np.flatnonzero(refused)]


# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------

_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))  # Bt
_WEIGHT = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))  # G
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))  # At


def _make_transform(matrix: tuple[tuple[float, ...], ...]) -> Any:
    """Return the function Y = matrix * X * transposed matrix, whose numbers are vectors: of neighbours in memory."""

    @intrinsic
    def transform(typingctx: Any, y: Any, y_row: Any, y_column: Any, x: Any, x_row: Any, x_column: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            _emit_transform(builder, matrix, context.get_value_type(y.dtype), y.dtype.bitwidth // 8, *args)
            return context.get_dummy_value()

        return types.void(y, types.intp, types.intp, x, types.intp, types.intp), generate

    return transform


def _emit_transform(
    builder: ir.IRBuilder, matrix: tuple[tuple[float, ...], ...], number: Any, itemsize: int,
    y: Any, y_row: Any, y_column: Any, x: Any, x_row: Any, x_column: Any,
) -> None:  # fmt: skip
    """Emit the loads, additions and stores of one transform; rows and columns are so many elements apart."""
    vector = ir.VectorType(number, MACHINE.vector_bytes // itemsize)
    half = ir.Constant(vector, [0.5] * vector.count)
    rows, columns = range(len(matrix)), range(len(matrix[0]))

    def cell(start: Any, row_step: Any, row: int, column_step: Any, column: int) -> Any:
        index = row_step.type
        offset = builder.add(builder.mul(row_step, index(row)), builder.mul(column_step, index(column)))
        return builder.bitcast(builder.gep(start, [offset]), vector.as_pointer())

    def combine(factors: tuple[float, ...], vectors: list[Any]) -> Any:
        """Return the sum of factor * vector; the factors that are not zero are all 1 or -1, or all a half or minus."""
        plus = [v for f, v in zip(factors, vectors, strict=True) if f > 0]
        minus = [v for f, v in zip(factors, vectors, strict=True) if f < 0]
        total = reduce(builder.fsub, minus, reduce(builder.fadd, plus))
        return builder.fmul(total, half) if 0.5 in factors else total

    cells = [[builder.load(cell(x, x_row, i, x_column, j), align=itemsize) for i in columns] for j in columns]
    halfway = [[combine(matrix[i], cells[j]) for j in columns] for i in rows]  # matrix * X
    for i in rows:
        for j in rows:
            builder.store(combine(matrix[j], halfway[i]), cell(y, y_row, i, y_column, j), align=itemsize)


_transform_input = _make_transform(_INPUT)
_transform_filter = _make_transform(_WEIGHT)
_transform_sums = _make_transform(_OUTPUT)


@kernel
def _transform_weight(
    first: int, last: int, weight: Strided, packed: int, part: int, rows: int, steps: Steps, numbers: int, limit: float
) -> bool:
    """Pack and transform the panels ``first`` to ``last`` of all groups; return whether all are below the limit."""
    pixels = packing.read_plan(numbers)
    weights = Weights(pointer(weight.address, limit), weight, pointer(part, limit), pointer(rows, 0))
    below = True
    for number in range(first, last):
        target = shift(pointer(packed, limit), number * POINTS * steps.weight)
        group, panel = number // pixels.panels, number % pixels.panels
        below &= _transform_panel(target, weights, group, panel, 0, pixels.channels, steps, pixels, limit)
    return below


@jit
def _transform_panel(
    target: Any, weights: Weights, group: int, panel: int, first: int, channels: int, steps: Steps, pixels: Plan,
    limit: float,
) -> bool:  # fmt: skip
    """Pack and transform some channels of one panel; return whether all are below the limit."""
    lanes, width, below = pixels.panel.lanes, MACHINE.vector_bytes // pixels.itemsize, True
    part = weights.part
    for channel in range(0, channels, pixels.block):
        depth = min(pixels.block, channels - channel)
        packing.pack_part(
            part, weights.source, weights.weight, weights.rows, pixels, group, panel, first + channel, depth
        )
        below &= _all_below(part, pixels.taps * depth * lanes, limit)
        tap = depth * lanes
        for i in range(0, depth * lanes, width):
            to = shift(target, channel * lanes + i)
            _transform_filter(to, 4 * steps.weight, steps.weight, shift(part, i), 3 * tap, tap)
    return below


@jit
def _all_below(numbers: Any, count: int, limit: float) -> bool:
    """Whether all numbers are below the limit in magnitude, which a NaN is not."""
    below = True
    for i in range(count):
        below &= (numbers[i] < limit) & (numbers[i] > -limit)
    return below


# ---------------------------------------------------------------------------------------------------------------------
# Boxes
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def _forward(
    first: int, last: int, splits: int, input: Strided, weight: Strided, once: bool, packed: int, bias: int,
    output: Strided, tile_numbers: int, pixel_numbers: int, relu: bool, refused: int, steps: Steps, part: int,
    part_rows: int, box_address: int, inputs_address: int, sums_address: int, rows_of_pixels: int, offsets: int,
    limit: float,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``: a task is one part of the panels of one box of one group.

    ``limit`` is LIMIT in the type of all numbers.
    """
    tiles, pixels = packing.read_plan(tile_numbers), packing.read_plan(pixel_numbers)
    source, target, box = pointer(input.address, limit), pointer(output.address, limit), pointer(box_address, limit)
    inputs, sums, some_rows = (
        pointer(inputs_address, limit),
        pointer(sums_address, limit),
        pointer(rows_of_pixels, limit),
    )
    own_weights = Weights(pointer(weight.address, limit), weight, pointer(part, limit), pointer(part_rows, 0))
    only_tap, refused_images = pointer(offsets, 0), pointer(refused, 0)
    rows = shift(only_tap, 1)
    only_tap[0] = 0
    for task in range(first, last):
        split, group, number = task % splits, task // splits % tiles.groups, task // (splits * tiles.groups)
        origin, size = packing.box_of(tiles, number)
        count = size[0] * size[1] * size[2] * size[3]
        packing.pixel_offsets(rows, tiles, size, 0, count, 1)
        for block in range(tiles.blocks):
            end = min((block + 1) * tiles.block, tiles.channels)
            packing.pack_box(box, source, input, tiles, origin, size, group, block * tiles.block, end)
            for n in range(size[0]):
                if not _all_below(shift(box, n * tiles.plane), tiles.plane, limit):
                    refused_images[origin[0] + n] = 1
            _transform_box(shift(inputs, block * count * tiles.block), box, rows, count, steps, tiles)
        for tile in range(count):
            rows[tile] = tile * tiles.block
        packing.repeat_last(rows, count)
        last_panel = tiles.panels * (split + 1) // splits
        for panel in range(tiles.panels * split // splits, last_panel, PANELS):
            panels = min(PANELS, last_panel - panel)
            for i in range(panels):
                filters = packing.filters_of(tiles, group, panel + i)
                _start(shift(sums, i * POINTS * steps.sums), pointer(bias, limit), filters, count, steps, tiles)
            for channel in range(0, tiles.channels, tiles.block):
                depth = min(tiles.block, tiles.channels - channel)
                place = (group * tiles.panels + panel) * POINTS * steps.weight + channel * tiles.panel.lanes
                weights = shift(pointer(packed, limit), 0 if once else place)
                if once:
                    for i in range(panels):
                        to = shift(weights, i * POINTS * steps.weight)
                        if not _transform_panel(
                            to, own_weights, group, panel + i, channel, depth, steps, pixels, limit
                        ):
                            for n in range(pixels.batch):
                                refused_images[n] = 1
                cells = shift(inputs, channel * count)
                _multiply(sums, cells, rows, count, only_tap, depth, weights, panels, steps, tiles.panel)
            for i in range(panels):
                some_sums = shift(sums, i * POINTS * steps.sums)
                filters = packing.filters_of(pixels, group, panel + i)
                _store(target, output, some_sums, some_rows, origin, size, filters, relu, steps, pixels)


@jit
def _transform_box(target: Any, box: Any, rows: Any, count: int, steps: Steps, tiles: Plan) -> None:
    """Transform one block of channels of a packed box, tile by tile."""
    width = MACHINE.vector_bytes // tiles.itemsize
    for tile in range(count):
        for i in range(0, tiles.block, width):
            to, source = shift(target, tile * tiles.block + i), shift(box, rows[tile] + i)
            _transform_input(to, 4 * steps.input, steps.input, source, tiles.tap_step[1], tiles.tap_step[2])


@jit
def _start(sums: Any, bias: Any, filters: tuple[int, int, int], count: int, steps: Steps, tiles: Plan) -> None:
    """Let the sums of one panel start at zero, and those of one point at the bias."""
    for point in range(POINTS):
        packing.fill(shift(sums, point * steps.sums), count * tiles.panel.lanes)
    packing.start_sums(shift(sums, BIAS_POINT * steps.sums), bias, filters, count, tiles.panel.lanes)


@jit
def _multiply(
    sums: Any, inputs: Any, rows: Any, count: int, only_tap: Any, depth: int, weights: Any, panels: int,
    steps: Steps, panel: Panel,
) -> None:  # fmt: skip
    """Add the products of one block of channels to the sums of all points of some panels."""
    for point in range(POINTS):
        for i in range(panels):
            number = i * POINTS + point
            multiply(
                shift(sums, number * steps.sums), panel.lanes, shift(inputs, point * steps.input), rows, count,
                only_tap, 1, depth, 1, shift(weights, number * steps.weight), 0, panel.lanes, panel,
            )  # fmt: skip


@jit
def _store(
    target: Any, output: Strided, sums: Any, some_rows: Any, origin: Quad, size: Quad, filters: tuple[int, int, int],
    relu: bool, steps: Steps, pixels: Plan,
) -> None:  # fmt: skip
    """Transform one panel's sums and store them, two output rows at a time."""
    lanes, width = pixels.panel.lanes, MACHINE.vector_bytes // pixels.itemsize
    n0, d0, h0, w0 = origin[0], origin[1], 2 * origin[2], 2 * origin[3]
    high, wide = min(2 * size[2], pixels.output_size[1] - h0), min(2 * size[3], pixels.output_size[2] - w0)
    for line in range(size[0] * size[1] * size[2]):
        # From right to left: where the width is odd, the tile's second column falls on the start of the next row.
        for tile in range(size[3] - 1, -1, -1):
            for i in range(0, lanes, width):
                source = shift(sums, (line * size[3] + tile) * lanes + i)
                to = shift(some_rows, 2 * tile * lanes + i)
                _transform_sums(to, wide * lanes, lanes, source, 4 * steps.sums, steps.sums)
        image, row = line // size[2], line % size[2] * 2
        packing.store_chunk(
            target, output, some_rows, pixels, (n0, d0, h0, w0), (size[0], size[1], high, wide),
            (image * high + row) * wide, min(2, high - row) * wide, filters, relu,
        )  # fmt: skip
