"""Winograd's convolution: a tile of outputs for fewer products, 36 instead of 144 for 4x4 outputs of a 3x3 filter.

    output tile = At [ sum over channels and slices of (G taps Gt) * (Bt inputs B) ] A          3x3 taps at most

    for some of the panels, whose transformed weights fit the memory (a pass; nearly always all of them):
        for each box of tiles (a task):
            for each block of channels:
                pack the image, transform it                      [point][block][slice][tile][channel]
            for some panels of filters:
                for each block of channels:                       their weights are transformed here if used only once
                    for each point, each panel, each slice:
                        sums += inputs of the point * panel       independent matrix products: the register tile
                for each panel:
                    output = activation(At sums A + bias)         the epilogue

      inputs of a point          panel                sums, [panel][point][tile][lane]
      +---------------+       +----------+            +----------+
      |    tiles x    |   x   | channels |     =      |  tiles x |
      |   channels    |       | x lanes  |            |   lanes  |
      +---------------+       +----------+            +----------+

How many outputs a tile has is the choice of ``kernels/winograd.py``. Filters of more taps than a tile's sides have are
cut into slices, filled up with zeros, whose products are summed like those of channels. The error is no larger than
that of summing all products one after another, since few are summed in a row: some channels, and then these sums.

To all code that packs, a tile of outputs is a pixel, of a convolution with larger filters and the tile's sides as its
stride. Sums of inputs can overflow, or make a NaN of two infinities, where single products would not: an image that
holds such numbers is left to conv_direct.

The gradient of the weights is in ``weight_winograd``, the transforms of both in ``winograd_tiles``.

A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..interleave import input_grad
from ..winograd import choose
from . import conv_direct, packing
from .blocking import WinogradPlan, winograd_plan
from .compile import jit, kernel
from .packing import OFFSET, SQUARE, Quad, Strided, strided
from .threads import parallel, workspace, worthwhile
from .tile import CHUNK, ROW_MULTIPLE, address, flat, multiply_apart, pointer, reader, shift
from .weight_winograd import conv_weight_grad as conv_weight_grad
from .winograd_tiles import LIMIT, all_below, make_transform, points

PANELS = 4  #: panels that one pass over the transformed inputs multiplies
SPARE_BYTES = 4 * 1024 * 1024  #: that transformed weights may take more than the weights

_transform_inputs = make_transform("inputs")
_transform_taps = make_transform("taps")
_transform_sums = make_transform("outputs", back=True)

_read_plan = reader(WinogradPlan)


class Weights(NamedTuple):
    """The weights as compiled code needs them; its pointers are to numbers of their type."""

    source: Any  #: the caller's
    weight: Strided
    part: Any  #: room for a panel's weights of some channels, not yet transformed
    rows: Any  #: room for ``pack_part``


def conv_forward(
    input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, output: np.ndarray, dims: Any, options: Any
) -> None:
    """Fill ``output``."""
    alone, refused = dims._replace(batch=1), _convolve(input, weight, bias, output, dims, options)
    if len(refused) == dims.batch:
        conv_direct.conv_forward(input, weight, bias, output, dims, options)
        return
    for image in refused:
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
    """Convolve; return the images whose output is to be computed otherwise.

    Those have numbers that are not below LIMIT. If there is no tile for a phase of a gradient, it is all images.
    """
    tile = choose(dims)
    if tile is None:
        return list(range(dims.batch))
    dtype, threads = output.dtype, worthwhile(options.threads, dims.flops)
    plan = winograd_plan(dims, dtype.itemsize, threads, tile)
    numbers = flat(plan)
    tiles, lanes, once = plan.tiles, plan.tiles.panel.lanes, plan.tiles.box_count == 1
    part_numbers = tiles.block * math.prod(plan.slices) * math.prod(plan.slice_taps) * lanes
    panel_numbers = plan.points * plan.weight_step
    most_tiles = -(-math.prod(tiles.box) // ROW_MULTIPLE) * ROW_MULTIPLE
    refused, limit = np.zeros(dims.batch, OFFSET), dtype.type(LIMIT)
    all_bias = packing.contiguous_bias(bias, dims.out_channels, dtype)

    def transform(first: int, last: int) -> None:
        part = workspace("part", part_numbers, dtype)
        rows = workspace("rows", SQUARE * dims.taps, OFFSET)
        if not _transform_weight(
            first, last, panel0, panel1, strided(weight), packed, part, rows, address(numbers), limit
        ):
            refused.fill(True)

    def work(first: int, last: int) -> None:
        _forward(
            first, last, splits, panel0, panel1, strided(input), strided(weight),
            packed or workspace("weight", PANELS * panel_numbers, dtype),
            address(all_bias), strided(output), address(numbers), options.activation == "relu", address(refused),
            workspace("part", part_numbers, dtype), workspace("rows", SQUARE * dims.taps, OFFSET),
            workspace("box", tiles.box_block, dtype), workspace("inputs", plan.points * plan.input_step, dtype),
            workspace("sums", PANELS * plan.points * plan.sum_step, dtype),
            workspace("pixels", 2 * CHUNK * lanes, dtype), workspace("offsets", tiles.block + most_tiles, OFFSET),
            limit,
        )  # fmt: skip

    most = (weight.size * dtype.itemsize + SPARE_BYTES) // (tiles.groups * panel_numbers * dtype.itemsize)
    passes = 1 if once else -(-tiles.panels // max(1, most))
    boxes = tiles.box_count * tiles.groups
    for number in range(passes):
        panel0, panel1 = (tiles.panels * n // passes for n in (number, number + 1))
        packed = 0 if once else workspace("weight", tiles.groups * (panel1 - panel0) * panel_numbers, dtype)
        if not once:
            parallel(transform, tiles.groups * (panel1 - panel0), threads)
        splits = min(-(-(panel1 - panel0) // PANELS), -(-threads // max(1, boxes)))  # few boxes: threads share them
        parallel(work, boxes * splits, threads)
    return [int(image) for image in np.flatnonzero(refused)]


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def _transform_weight(
    first: int, last: int, panel0: int, panel1: int, weight: Strided, packed: int, part: int, rows: int, numbers: int,
    limit: float,
) -> bool:  # fmt: skip
    """Pack and transform the panels ``first`` to ``last``, those from ``panel0`` to ``panel1`` of each group.

    Return whether all numbers are below the limit.
    """
    plan = _read_plan(numbers)
    weights = Weights(pointer(weight.address, limit), weight, pointer(part, limit), pointer(rows, 0))
    below = True
    for number in range(first, last):
        target = shift(pointer(packed, limit), number * plan.points * plan.weight_step)
        group, panel = number // (panel1 - panel0), panel0 + number % (panel1 - panel0)
        below &= _transform_panel(target, weights, group, panel, 0, plan.pixels.channels, plan, limit)
    return below


@jit
def _transform_panel(
    target: Any, weights: Weights, group: int, panel: int, first: int, channels: int, plan: WinogradPlan, limit: float
) -> bool:
    """Pack and transform some channels of one panel; return whether all are below the limit."""
    pixels, part, below = plan.pixels, weights.part, True
    lanes = pixels.panel.lanes
    wide = points(plan.column_side)
    taps_wide = plan.slices[2] * plan.slice_taps[2]
    for channel in range(0, channels, pixels.block):
        depth = min(pixels.block, channels - channel)
        tap = depth * lanes
        packing.pack_part(
            part, weights.source, weights.weight, weights.rows, pixels, group, panel, first + channel, depth
        )
        below &= all_below(part, pixels.taps * tap, limit)
        _fill_up(part, tap, plan)
        for number in range(plan.slice_count):
            d, h, w = _first_tap(number, plan)
            start = (d * plan.slices[1] * plan.slice_taps[1] + h) * taps_wide + w
            _transform_taps(
                plan.row_side, plan.column_side, tap,
                shift(target, (channel * plan.slice_count + number * depth) * lanes),
                wide * plan.weight_step, plan.weight_step, shift(part, start * tap), taps_wide * tap, tap,
            )  # fmt: skip
    return below


@jit
def _first_tap(number: int, plan: WinogradPlan) -> tuple[int, int, int]:
    """Return the (d, h, w) of a slice's first tap."""
    _, high, wide = plan.slices
    return number // (high * wide), number // wide % high * plan.slice_taps[1], number % wide * plan.slice_taps[2]


@jit
def _fill_up(part: Any, tap: int, plan: WinogradPlan) -> None:
    """Move the taps of a packed filter, of so many numbers each, apart in place, so that zeros fill up the slices."""
    _, kh, kw = plan.pixels.kernel_size
    high, wide = plan.slices[1] * plan.slice_taps[1], plan.slices[2] * plan.slice_taps[2]
    if (kh, kw) == (high, wide):
        return
    for number in range(plan.slices[0] * high * wide - 1, -1, -1):
        d, h, w = number // (high * wide), number // wide % high, number % wide
        target = shift(part, number * tap)
        if h < kh and w < kw:
            packing.copy_row(target, shift(part, ((d * kh + h) * kw + w) * tap), tap)
        else:
            packing.fill(target, tap)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def _forward(
    first: int, last: int, splits: int, panel0: int, panel1: int, input: Strided, weight: Strided, packed: int,
    bias: int, output: Strided, numbers: int, relu: bool, refused: int, part: int, part_rows: int, box_address: int,
    inputs_address: int, sums_address: int, rows_of_pixels: int, offsets: int, limit: float,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``: a share of the panels ``panel0`` to ``panel1`` of one box of a group.

    ``limit`` is LIMIT in the type of all numbers.
    """
    plan = _read_plan(numbers)
    tiles, once = plan.tiles, plan.tiles.box_count == 1
    source, target, box = pointer(input.address, limit), pointer(output.address, limit), pointer(box_address, limit)
    inputs, sums, some_rows = (
        pointer(inputs_address, limit),
        pointer(sums_address, limit),
        pointer(rows_of_pixels, limit),
    )
    own_weights = Weights(pointer(weight.address, limit), weight, pointer(part, limit), pointer(part_rows, 0))
    parts, refused_images = pointer(offsets, 0), pointer(refused, 0)
    rows = shift(parts, tiles.block)
    for part_number in range(-(-tiles.block // plan.summed)):
        parts[part_number] = part_number * plan.summed
    for task in range(first, last):
        split, group, number = task % splits, task // splits % tiles.groups, task // (splits * tiles.groups)
        origin, size = packing.box_of(tiles, number)
        count = size[0] * size[1] * size[2] * size[3]
        packing.pixel_offsets(rows, tiles, size, 0, count, 1)
        for block in range(tiles.blocks):
            end = min((block + 1) * tiles.block, tiles.channels)
            packing.pack_box(box, source, input, tiles, origin, size, group, block * tiles.block, end)
            for n in range(size[0]):
                if not all_below(shift(box, n * tiles.plane), tiles.plane, limit):
                    refused_images[origin[0] + n] = 1
            _transform_box(shift(inputs, block * plan.slice_count * count * tiles.block), box, rows, count, plan)
        for tile in range(count):
            rows[tile] = tile * tiles.block
        packing.repeat_last(rows, count)
        first_panel = panel0 + (panel1 - panel0) * split // splits
        last_panel = panel0 + (panel1 - panel0) * (split + 1) // splits
        for panel in range(first_panel, last_panel, PANELS):
            panels = min(PANELS, last_panel - panel)
            for number_of_sums in range(panels * plan.points):
                packing.fill(shift(sums, number_of_sums * plan.sum_step), count * tiles.panel.lanes)
            for channel in range(0, tiles.channels, tiles.block):
                depth = min(tiles.block, tiles.channels - channel)
                weights = pointer(packed, limit)
                if once:
                    for i in range(panels):
                        to = shift(weights, i * plan.points * plan.weight_step)
                        if not _transform_panel(to, own_weights, group, panel + i, channel, depth, plan, limit):
                            for n in range(tiles.batch):
                                refused_images[n] = 1
                else:
                    place = (group * (panel1 - panel0) + panel - panel0) * plan.points * plan.weight_step
                    weights = shift(weights, place + channel * plan.slice_count * tiles.panel.lanes)
                cells = shift(inputs, channel * plan.slice_count * count)
                _multiply(sums, cells, rows, count, parts, depth, weights, panels, plan)
            for i in range(panels):
                some_sums = shift(sums, i * plan.points * plan.sum_step)
                filters = packing.filters_of(tiles, group, panel + i)
                _store(target, output, some_sums, some_rows, origin, size, filters, pointer(bias, limit), relu, plan)


@jit
def _transform_box(target: Any, box: Any, rows: Any, count: int, plan: WinogradPlan) -> None:
    """Transform one block of channels of a packed box: slice by slice, and tile by tile."""
    tiles = plan.tiles
    wide = points(plan.column_side)
    for number in range(plan.slice_count):
        d, h, w = _first_tap(number, plan)
        cells = shift(box, d * tiles.tap_step[0] + h * tiles.tap_step[1] + w * tiles.tap_step[2])
        for tile in range(count):
            _transform_inputs(
                plan.row_side, plan.column_side, tiles.block, shift(target, (number * count + tile) * tiles.block),
                wide * plan.input_step, plan.input_step,
                shift(cells, rows[tile]), tiles.tap_step[1], tiles.tap_step[2],
            )  # fmt: skip


@jit
def _multiply(
    sums: Any, inputs: Any, rows: Any, count: int, parts: Any, depth: int, weights: Any, panels: int,
    plan: WinogradPlan,
) -> None:  # fmt: skip
    """Add the products of one block of channels to the sums of all points of some panels: part by part of the channels.

    What is left of the channels after whole parts is a last, smaller one.
    """
    panel, block, whole = plan.tiles.panel, plan.tiles.block, depth // plan.summed
    rest = depth - whole * plan.summed
    for point in range(plan.points):
        for i in range(panels):
            number = i * plan.points + point
            to = shift(sums, number * plan.sum_step)
            for slice_number in range(plan.slice_count):
                cells = shift(inputs, point * plan.input_step + slice_number * count * block)
                taps = shift(weights, number * plan.weight_step + slice_number * depth * panel.lanes)
                part = plan.summed * panel.lanes
                multiply_apart(to, cells, rows, count, parts, whole, plan.summed, 1, taps, part, panel)
                if rest:
                    cells, taps = shift(cells, depth - rest), shift(taps, whole * part)
                    multiply_apart(to, cells, rows, count, parts, 1, rest, 1, taps, part, panel)


@jit
def _store(
    target: Any, output: Strided, sums: Any, some_rows: Any, origin: Quad, size: Quad, filters: tuple[int, int, int],
    bias: Any, relu: bool, plan: WinogradPlan,
) -> None:  # fmt: skip
    """Transform one panel's sums and store them: rows of tiles, in pieces of CHUNK pixels at most."""
    pixels, rows, columns = plan.pixels, plan.rows, plan.columns
    lanes, most = pixels.panel.lanes, CHUNK // (rows * columns)
    for line in range(size[0] * size[1] * size[2]):
        n, d, h, _ = packing.position(line * size[3], size)
        row = (origin[2] + h) * rows
        high = min(rows, pixels.output_size[1] - row)
        for first in range(0, size[3], most):
            last, column = min(first + most, size[3]), (origin[3] + first) * columns
            wide = min((last - first) * columns, pixels.output_size[2] - column)
            # From right to left: what the last tile has beyond the width falls on the start of the next row.
            for tile in range(last - 1, first - 1, -1):
                _transform_sums(
                    plan.row_side, plan.column_side, lanes,
                    shift(some_rows, (tile - first) * columns * lanes), wide * lanes, lanes,
                    shift(sums, (line * size[3] + tile) * lanes), points(plan.column_side) * plan.sum_step,
                    plan.sum_step,
                )  # fmt: skip
            _add_bias(some_rows, bias, filters, high * wide, lanes)
            packing.store_chunk(
                target, output, some_rows, pixels, (origin[0] + n, origin[1] + d, row, column), (1, 1, high, wide),
                0, high * wide, filters, relu,
            )  # fmt: skip


@jit
def _add_bias(pixels: Any, bias: Any, filters: tuple[int, int, int], count: int, lanes: int) -> None:
    """Add the bias of the filters that there are to so many pixels."""
    for pixel in range(count):
        for lane in range(filters[2]):
            pixels[pixel * lanes + lane] += bias[filters[0] + lane]
