"""How a convolution is cut into pieces that fit the caches: sizes only, no data.

    output of one group:  (N, OD, OH, OW) pixels, cut into boxes   x   K filters, cut into panels of ``lanes``
    what a box needs:     C channels, cut into blocks              x   the cells of the input that its taps reach

A box's cells are packed into [C/block][N][D][H][W][block], padding included. Cells that no tap reaches are left out
where a dimension allows it: ``unit`` is the distance in the input between neighbouring packed cells.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from .. import winograd
from ..winograd import Tile
from .tile import BLOCK_BYTES, CHUNK, MACHINE, ROW_MULTIPLE, Panel, panel_for

Triple = tuple[int, int, int]

BOX_BYTES = 1024 * 1024  #: a packed box: about the L2 cache
PATCH_BYTES = 2 * 1024 * 1024  #: a panel of patches
IM2COL_PIXELS = 512  #: most columns of one
WINOGRAD_BYTES = 5 * 512 * 1024  #: a box's transformed inputs
WINOGRAD_TILES = 72  #: most tiles of one
WINOGRAD_CHANNELS = 64  #: a block of a panel's transformed weights is 64 KB in float32, and 144 KB for 4x4 tiles: L2
WINOGRAD_GRAD_TILES = 64  #: most tiles of a box in the gradient of the weights, ...
WINOGRAD_GRAD_BYTES = 512  #: ... filters of a task, of one tile: inputs are transformed once for all of them, ...
WINOGRAD_LEAST_TILES = 96  #: ... and tiles of a task, which pay for transforming its sums back


class Plan(NamedTuple):
    """One convolution and its cutting; triples are (depth, height, width).

    Depthwise convolution is the case of ``panel.elementwise``: its groups are ``lanes`` channels wide, and panel p
    holds the p-th filter of each of these channels.
    """

    itemsize: int  #: bytes of a number
    batch: int
    groups: int
    in_channels: int  #: of all groups together
    channels: int  #: of one group (the last may have fewer)
    filters: int  #: of one group; depthwise: of one channel
    input_size: Triple
    kernel_size: Triple
    stride: Triple
    pad: Triple
    dilation: Triple
    output_size: Triple
    panel: Panel
    panels: int  #: of one group
    block: int  #: channels side by side in the packed image
    blocks: int  #: of one group
    box: tuple[int, int, int, int]  #: output images, depths, rows and columns of a full box
    packed: Triple  #: cells of a packed box along depth, height, width
    unit: Triple
    pixel_step: Triple  #: elements between the packed cells of neighbouring output pixels
    tap_step: Triple  #: elements between the packed cells of neighbouring taps
    taps: int  #: cells of a filter, without channels
    reduction: int  #: rows of a panel of weights: products summed for one output element
    sum_rows: int  #: the same in whole tiles: rows of a panel of sums in the gradient of the weights
    box_count: int
    plane: int  #: elements of one image and one block in the packed box
    box_block: int  #: elements of one block in the packed box
    pitch: int  #: im2col: elements between the rows of a matrix with a box's pixels as columns


@lru_cache(maxsize=512)
def forward_plan(dims: Any, itemsize: int, threads: int) -> Plan:
    """Return the cutting for the forward pass; it depends on ``threads``, but no result does."""
    # The reduction is summed in blocks of about 200 products; a channel's neighbours share its cache lines.
    block = min(dims.group_in_channels, -(-max(16, 192 // dims.taps) // 16) * 16)
    pixels = math.prod(dims.output_size) * dims.batch * dims.groups
    return _plan(dims, itemsize, block, most_pixels=max(CHUNK, -(-pixels // threads)), most_columns=dims.output_size[2])


@lru_cache(maxsize=512)
def weight_grad_plan(dims: Any, itemsize: int) -> Plan:
    """Return the cutting for the gradient of the weights, where the boxes are summed: the shape alone decides."""
    # A block of ROW_MULTIPLE channels makes whole tiles of rows, whatever the taps.
    block = min(dims.group_in_channels, ROW_MULTIPLE)
    panel = panel_for(dims.group_out_channels, False, itemsize)
    columns = BLOCK_BYTES // (panel.lanes * itemsize)
    filters = -(-dims.group_out_channels // panel.lanes) * panel.lanes
    pixels = max(columns, BOX_BYTES // (filters * itemsize))  # the packed gradient of a box stays in the L2 cache, too
    return _plan(dims, itemsize, block, most_pixels=pixels, most_columns=columns)


@lru_cache(maxsize=512)
def im2col_plan(dims: Any, itemsize: int, threads: int | None = None) -> Plan:
    """Return the cutting for im2col: a box's patches are a matrix [C * taps][pixels], rather than a packed image.

    With ``threads`` it is for the forward pass, whose panels are pixels; without, for the gradient of the weights,
    which sums the boxes in panels of filters.
    """
    pixels = max(CHUNK, min(IM2COL_PIXELS, PATCH_BYTES // (dims.reduction * itemsize)))
    if threads is None:
        pixels = min(pixels, BLOCK_BYTES // (panel_for(dims.group_out_channels, False, itemsize).lanes * itemsize))
    else:
        pixels = min(pixels, max(CHUNK, -(-math.prod(dims.output_size) * dims.batch * dims.groups // threads)))
    plan = _plan(dims, itemsize, 1, most_pixels=pixels, most_columns=pixels, depthwise=False)
    return plan if threads is None else plan._replace(panel=panel_for(math.prod(plan.box), False, itemsize))


class WinogradPlan(NamedTuple):
    """Two views of one cutting, and what the transforms work on."""

    tiles: Plan  #: a tile of outputs as a pixel, which sees all cells that its outputs see
    pixels: Plan  #: the real ones
    rows: int  #: outputs of a tile
    columns: int
    row_side: int  #: the codes of its sides
    column_side: int
    points: int
    slices: Triple  #: of a filter along depth, height and width
    slice_taps: Triple  #: of each of them
    slice_count: int
    summed: int  #: channels that are summed by themselves, lest errors grow
    weight_step: int  #: elements between the points of an array: a cache line more than needed,
    input_step: int  #: lest all points fall into one set of L1
    sum_step: int


@lru_cache(maxsize=512)
def winograd_plan(dims: Any, itemsize: int, threads: int, tile: Tile) -> WinogradPlan:
    """Return the cutting for tiles; it depends on ``threads``, but no result does."""
    rows, columns, points = tile.rows, tile.columns, tile.points
    slice_taps, slices = (1, rows.taps, columns.taps), winograd.slices(dims, rows, columns)
    slice_count = math.prod(slices)
    seen = ((n - 1) * s for n, s in zip((1, rows.outputs, columns.outputs), dims.stride, strict=True))
    cells: Any = tuple(first + count * taps for first, count, taps in zip(seen, slices, slice_taps, strict=True))
    tiles = _tiled(dims, tile, cells)
    channels = -(-dims.group_in_channels // 16) * 16  # whole vectors
    most = min(WINOGRAD_TILES, WINOGRAD_BYTES // (points * slice_count * channels * itemsize))
    most = max(ROW_MULTIPLE, min(most, -(-math.prod(tiles.output_size) * dims.batch * dims.groups // threads)))
    plan = _plan(tiles, itemsize, min(WINOGRAD_CHANNELS, channels), most, most_columns=CHUNK // 4, depthwise=False)
    line, lanes = 64 // itemsize, plan.panel.lanes
    most_rows = -(-math.prod(plan.box) // ROW_MULTIPLE) * ROW_MULTIPLE
    weights = plan.block if plan.box_count == 1 else plan.channels  # used by one task, which transforms them by blocks
    return WinogradPlan(
        plan, plan._replace(kernel_size=dims.kernel_size, taps=dims.taps, output_size=dims.output_size),
        rows.outputs, columns.outputs, rows.code, columns.code, points, slices, slice_taps, slice_count,
        min(tile.run, plan.block),
        weights * slice_count * lanes + line, plan.blocks * slice_count * most_rows * plan.block + line,
        most_rows * lanes + line,
    )  # fmt: skip


class WinogradGradPlan(NamedTuple):
    """The cutting for the gradient of the weights: the same boxes of tiles in two images."""

    inputs: Plan  #: a tile of outputs as a pixel, which sees all cells that its outputs see
    grads: Plan  #: the same of the gradient of the output, whose panels are the blocks of channels: it sees its outputs
    weights: Plan  #: the real filters
    row_side: int  #: of a tile: the codes of its sides
    column_side: int
    points: int
    summed: int  #: tiles that are summed by themselves, lest errors grow
    input_step: int  #: elements between the points of the transformed inputs, ...
    grad_panel: int  #: ... between the panels of a point of the transformed gradients, ...
    grad_step: int  #: ... between their points: all points are a cache line more than needed apart, see WinogradPlan
    sum_panel: int  #: the same of the sums
    sum_step: int


@lru_cache(maxsize=512)
def winograd_grad_plan(dims: Any, itemsize: int, tile: Tile) -> WinogradGradPlan:
    """Return the cutting for tiles, where the boxes are summed: the shape alone decides."""
    channels, vector, line = dims.group_in_channels, MACHINE.vector_bytes // itemsize, 64 // itemsize
    block = -(-channels // (-(-channels // WINOGRAD_CHANNELS) * vector)) * vector  # even parts, of whole vectors
    tiles = _tiled(dims, tile, (1, tile.rows.points, tile.columns.points))
    box = _fit_box(tiles, BOX_BYTES // (block * itemsize), WINOGRAD_GRAD_TILES, WINOGRAD_GRAD_TILES)
    inputs = _cut(tiles, itemsize, block, box)
    lanes, count = inputs.panel.lanes, math.prod(box)
    image = dims._replace(
        in_channels=dims.out_channels, input_size=dims.output_size, stride=(1, 1, 1), pad_before=(0, 0, 0),
        dilation=(1, 1, 1),
    )  # fmt: skip
    grads = _cut(_tiled(image, tile, (1, tile.rows.outputs, tile.columns.outputs)), itemsize, lanes, box)
    weights = inputs._replace(
        kernel_size=dims.kernel_size, taps=dims.taps, reduction=dims.reduction, sum_rows=dims.reduction
    )
    panels, points = -(-inputs.panels // _panel_parts(inputs)), tile.points
    sum_panel = -(-block // ROW_MULTIPLE) * ROW_MULTIPLE * lanes
    return WinogradGradPlan(
        inputs, grads, weights, tile.rows.code, tile.columns.code, points, tile.run, count * block + line,
        count * lanes, panels * count * lanes + line, sum_panel, panels * sum_panel + line,
    )  # fmt: skip


def _panel_parts(plan: Plan) -> int:
    """Return how many parts the panels are cut into in the gradient of the weights."""
    return -(-plan.panels // max(1, WINOGRAD_GRAD_BYTES // (plan.panel.lanes * plan.itemsize)))


def _tiled(dims: Any, tile: Tile, cells: Triple) -> Any:
    """Return the convolution whose pixels are tiles of outputs, each of which sees so many cells."""
    sides = 1, tile.rows.outputs, tile.columns.outputs
    return dims._replace(
        kernel_size=cells,
        stride=tuple(stride * side for stride, side in zip(dims.stride, sides, strict=True)),
        output_size=tuple(-(-outputs // side) for outputs, side in zip(dims.output_size, sides, strict=True)),
    )


class GradTasks(NamedTuple):
    """How the gradient of the weights is shared out."""

    splits: int  #: parts of the boxes, each with sums of its own: fixed by the shape, for they change the result
    panel_parts: int
    channel_parts: int
    bias: bool  #: whether the gradient of the bias is wanted, too
    at_once: bool  #: whether products are complete when a task has them, and need no sums


def grad_tasks(plan: Plan, threads: int, bias: bool) -> GradTasks:
    """Return enough tasks for ``threads``; where the weights are few, the boxes are split for up to 32."""
    chunks = plan.groups * plan.panels * -(-plan.reduction // CHUNK)
    splits = max(1, min(plan.box_count, -(-32 // chunks)))
    shares = -(-threads // (splits * plan.groups))
    panel_parts = min(plan.panels, shares)
    # Parts must not share a tile of rows, and so are made of blocks of ROW_MULTIPLE channels.
    channel_parts = min(plan.blocks, -(-shares // panel_parts)) if plan.block % ROW_MULTIPLE == 0 else 1
    at_once = plan.box_count == 1 and math.prod(plan.box) * plan.panel.lanes * plan.itemsize <= BLOCK_BYTES
    return GradTasks(splits, panel_parts, channel_parts, bias, at_once)


def winograd_grad_tasks(plan: WinogradGradPlan, bias: bool) -> GradTasks:
    """Return tasks of a block of channels and a few panels; where they are few, the boxes are split for up to 32."""
    inputs = plan.inputs
    panel_parts = _panel_parts(inputs)
    tiles = inputs.batch * math.prod(inputs.output_size)
    most = 32 // (inputs.groups * panel_parts * inputs.blocks)
    splits = max(1, min(inputs.box_count, most, tiles // WINOGRAD_LEAST_TILES))
    return GradTasks(splits, panel_parts, inputs.blocks, bias, splits == 1)


def _plan(
    dims: Any, itemsize: int, block: int, most_pixels: int, most_columns: int, depthwise: bool | None = None
) -> Plan:
    depthwise = dims.depthwise if depthwise is None else depthwise
    block = panel_for(dims.in_channels, True, itemsize).lanes if depthwise else block
    channels = block if depthwise else -(-dims.group_in_channels // block) * block
    box = _fit_box(dims, BOX_BYTES // (channels * itemsize), most_pixels, most_columns)
    return _cut(dims, itemsize, block, box, depthwise)


def _cut(dims: Any, itemsize: int, block: int, box: tuple[int, int, int, int], depthwise: bool = False) -> Plan:
    """Return the cutting into such boxes; blocks of depthwise convolution are its panels' lanes."""
    channels, filters, groups = dims.group_in_channels, dims.group_out_channels, dims.groups
    if depthwise:
        panel, channels = panel_for(dims.in_channels, True, itemsize), block
        groups, panels, blocks = -(-dims.in_channels // channels), filters, 1
    else:
        panel = panel_for(filters, False, itemsize)
        panels, blocks = -(-filters // panel.lanes), -(-channels // block)
    units, packed, pixel_cells, tap_cells = zip(*(_extent(dims, axis, box[1 + axis]) for axis in range(3)), strict=True)
    steps = (packed[1] * packed[2] * block, packed[2] * block, block)
    taps = dims.taps
    reduction = taps if panel.elementwise else taps * channels
    box_count = math.prod(-(-n // b) for n, b in zip((dims.batch, *dims.output_size), box, strict=True))
    plane = math.prod(packed) * block
    line, lanes = 64 // itemsize, panel_for(math.prod(box), False, itemsize).lanes
    columns = -(-math.prod(box) // lanes) * lanes  # whole panels, whatever a line holds of one
    pitch = (-(-columns // line) | 1) * line  # an odd number of cache lines, or few cache sets hold all rows
    return Plan(
        itemsize, dims.batch, groups, dims.in_channels, channels, filters,
        dims.input_size, dims.kernel_size, dims.stride, dims.pad_before, dims.dilation, dims.output_size,
        panel, panels, block, blocks, box, packed, units,
        _times(pixel_cells, steps), _times(tap_cells, steps),
        taps, reduction, -(-reduction // ROW_MULTIPLE) * ROW_MULTIPLE, box_count, plane, box[0] * plane, pitch,
    )  # fmt: skip


def _times(a: Triple, b: Triple) -> Triple:
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


def _extent(dims: Any, axis: int, outputs: int) -> tuple[int, int, int, int]:
    """Return unit, packed cells, and cells between output pixels and between taps, for a box of ``outputs``."""
    taps, stride, dilation = dims.kernel_size[axis], dims.stride[axis], dims.dilation[axis]
    if taps == 1:
        dilation = stride  # a step that is never taken may as well fit the other
    elif outputs == 1:
        stride = dilation
    unit = math.gcd(stride, dilation)
    stride, dilation = stride // unit, dilation // unit
    return unit, (outputs - 1) * stride + (taps - 1) * dilation + 1, stride, dilation


def _fit_box(dims: Any, most_cells: int, most_pixels: int, most_columns: int) -> tuple[int, int, int, int]:
    """Return the largest box within the limits: whole rows first, then whole planes, volumes, and several images."""
    sizes = (dims.batch, *dims.output_size)
    box = [1, 1, 1, 1]
    for axis in (3, 2, 1, 0):
        size = sizes[axis]
        for parts in range(1, size + 1):
            box[axis] = -(-size // parts)  # parts of equal size, so that no last one is a sliver
            cells = box[0] * math.prod(_extent(dims, a, box[1 + a])[1] for a in range(3))
            if cells <= most_cells and math.prod(box) <= most_pixels and box[3] <= most_columns:
                break
        if box[axis] < size:
            break
    return box[0], box[1], box[2], box[3]
