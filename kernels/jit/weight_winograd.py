"""The gradient of the weights by Winograd's tiles: the same transforms, multiplied and summed over tiles.

    grad_weight = Gt [ sum over tiles of (Bt inputs B) * (A gradients At) ] G          filters of one slice

    for a part of the boxes of tiles, a block of channels, some panels of filters (a task):
        for each box:
            pack and transform both                                [point][tile][channel], [point][panel][tile][lane]
            for each point, each panel:
                sums += inputs of the point * gradients            the register tile; its reduction runs over the tiles
        grad_weight, or the part's share of it = Gt sums G         [point][panel][channel][lane]: L2 cache
    grad_weight = sum of the parts of the boxes, in order

      inputs of a point          gradients              sums of a point
      +---------------+       +----------+            +----------+
      |   channels x  |   x   |  tiles x |     =      | channels |
      |     tiles     |       |   lanes  |            |  x lanes |
      +---------------+       +----------+            +----------+

To the code that packs, a tile is a pixel of two images: the input, where it sees all that its outputs see, and the
gradient of the output, where it sees its outputs. Numbers that can't be summed leave all of it to conv_direct.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..winograd import choose_for_weights
from . import conv_direct, packing
from .blocking import GradTasks, WinogradGradPlan, winograd_grad_plan, winograd_grad_tasks
from .compile import jit, kernel
from .packing import OFFSET, Quad, Strided, strided
from .threads import workspace, worthwhile
from .tile import ROW_MULTIPLE, address, flat, multiply_apart, pointer, reader, shift
from .weight_grad import Sums, Task, add_rows, do_tasks, panel_bias, panel_sums, start_task, store_rows, task_of
from .winograd_tiles import LIMIT, all_below, make_transform, points

_transform_inputs = make_transform("inputs")
_transform_grads = make_transform("outputs")
_transform_sums = make_transform("taps", back=True)

_read_plan = reader(WinogradGradPlan)


class Addresses(NamedTuple):
    """The workspace of a task, as the kernel gets it."""

    box: int  #: one block of channels, or one panel, not yet transformed
    inputs: int
    grads: int
    products: int  #: sums of the points
    offsets: int


class Rooms(NamedTuple):
    """The same as pointers."""

    box: Any
    inputs: Any
    grads: Any
    products: Any
    tiles: Any  #: where each tile of a box is
    channels: Any  #: ... each channel of a tile
    parts: Any  #: ... each run of tiles, of the transformed inputs


def conv_weight_grad(
    input: np.ndarray,
    grad_output: np.ndarray,
    grad_weight: np.ndarray,
    grad_bias: np.ndarray | None,
    dims: Any,
    options: Any,
) -> None:
    """Fill ``grad_weight``, and ``grad_bias`` where it is wanted."""
    if not _weight_grad_below(input, grad_output, grad_weight, grad_bias, dims, options):
        conv_direct.conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options)


def _weight_grad_below(
    input: np.ndarray,
    grad_output: np.ndarray,
    grad_weight: np.ndarray,
    grad_bias: np.ndarray | None,
    dims: Any,
    options: Any,
) -> bool:
    """Compute the gradient; return whether all numbers are below LIMIT, without which it is wrong."""
    tile = choose_for_weights(dims)
    assert tile is not None, "the registry has checked it"
    dtype, threads = grad_weight.dtype, worthwhile(options.threads, dims.flops)
    plan = winograd_grad_plan(dims, dtype.itemsize, tile)
    tasks, numbers = winograd_grad_tasks(plan, grad_bias is not None), flat(plan)
    most_tiles, below = math.prod(plan.inputs.box), list[bool]()

    def work(first: int, last: int, sums: int, bias: int) -> None:
        addresses = Addresses(
            workspace("box", max(plan.inputs.box_block, plan.grads.box_block), dtype),
            workspace("inputs", plan.points * plan.input_step, dtype),
            workspace("pixels", plan.points * plan.grad_step, dtype),
            workspace("products", plan.points * plan.sum_step, dtype),
            workspace("offsets", 2 * most_tiles + plan.inputs.block + ROW_MULTIPLE, OFFSET),
        )
        below.append(
            _weight_grad(
                first, last, tasks, strided(input), strided(grad_output), strided(grad_weight), address(numbers), sums,
                bias, addresses, dtype.type(LIMIT),
            )
        )  # fmt: skip

    do_tasks(work, tasks, grad_weight, grad_bias, plan.weights, threads)
    return all(below)


@kernel
def _weight_grad(
    first: int, last: int, tasks: GradTasks, input: Strided, grad_output: Strided, grad_weight: Strided, numbers: int,
    sums_address: int, bias_address: int, addresses: Addresses, limit: float,
) -> bool:  # fmt: skip
    """Do the tasks ``first`` to ``last``; return whether all numbers are below ``limit``: LIMIT in their type."""
    plan = _read_plan(numbers)
    sums, offsets = Sums(pointer(sums_address, limit), pointer(bias_address, limit)), pointer(addresses.offsets, 0)
    most_tiles = plan.inputs.box[0] * plan.inputs.box[1] * plan.inputs.box[2] * plan.inputs.box[3]
    rooms = Rooms(
        pointer(addresses.box, limit), pointer(addresses.inputs, limit), pointer(addresses.grads, limit),
        pointer(addresses.products, limit), offsets, shift(offsets, 2 * most_tiles), shift(offsets, most_tiles),
    )  # fmt: skip
    for part in range(-(-most_tiles // plan.summed)):
        rooms.parts[part] = part * plan.summed * plan.inputs.block
    for number in range(first, last):
        task = task_of(number, tasks, plan.inputs)
        start_task(sums, task, plan.weights)
        channel0 = task.block0 * plan.inputs.block
        channels = min(plan.inputs.block, plan.inputs.channels - channel0)
        for channel in range(channels):
            rooms.channels[channel] = channel
        packing.repeat_last(rooms.channels, channels)
        packing.fill(rooms.products, plan.points * plan.sum_step)
        for box_number in range(task.box0, task.box1):
            origin, size = packing.box_of(plan.inputs, box_number)
            if not (
                _add_inputs(rooms, pointer(input.address, limit), input, plan, task, origin, size, limit)
                and _add_grads(
                    rooms, pointer(grad_output.address, limit), grad_output, plan, task, sums, origin, size, limit
                )
            ):
                return False
            _multiply(rooms, size[0] * size[1] * size[2] * size[3], channels, task.panel1 - task.panel0, plan)
        _store(sums, rooms, pointer(grad_weight.address, limit), grad_weight, channel0, channels, plan, task)
    return True


@jit
def _add_inputs(
    rooms: Rooms, source: Any, input: Strided, plan: WinogradGradPlan, task: Task, origin: Quad, size: Quad,
    limit: float,
) -> bool:  # fmt: skip
    """Pack and transform a box of the input; return whether all its numbers are below the limit."""
    inputs, count = plan.inputs, size[0] * size[1] * size[2] * size[3]
    channel0 = task.block0 * inputs.block
    packing.pack_box(
        rooms.box, source, input, inputs, origin, size, task.group, channel0,
        min(channel0 + inputs.block, inputs.channels),
    )  # fmt: skip
    below: bool = all_below(rooms.box, inputs.box_block, limit)
    packing.pixel_offsets(rooms.tiles, inputs, size, 0, count, 1)
    for tile in range(count):
        _transform_inputs(
            plan.row_side, plan.column_side, inputs.block,
            shift(rooms.inputs, tile * inputs.block), points(plan.column_side) * plan.input_step, plan.input_step,
            shift(rooms.box, rooms.tiles[tile]), inputs.tap_step[1], inputs.tap_step[2],
        )  # fmt: skip
    return below


@jit
def _add_grads(
    rooms: Rooms, source: Any, grad_output: Strided, plan: WinogradGradPlan, task: Task, sums: Sums, origin: Quad,
    size: Quad, limit: float,
) -> bool:  # fmt: skip
    """Pack and transform a box of the gradient, panel by panel; return whether its numbers are below the limit."""
    grads, count, below = plan.grads, size[0] * size[1] * size[2] * size[3], True
    lanes = grads.block
    packing.pixel_offsets(rooms.tiles, grads, size, 0, count, 1)
    for panel in range(task.panel0, task.panel1):
        packing.pack_box(
            rooms.box, source, grad_output, grads, origin, size, task.group, panel * lanes,
            min((panel + 1) * lanes, grads.channels),
        )  # fmt: skip
        if task.bias:
            add_rows(panel_bias(sums, task, panel, plan.weights), rooms.box, grads.box_block // lanes, lanes)
        below &= all_below(rooms.box, grads.box_block, limit)
        target = shift(rooms.grads, (panel - task.panel0) * plan.grad_panel)
        for tile in range(count):
            _transform_grads(
                plan.row_side, plan.column_side, lanes,
                shift(target, tile * lanes), points(plan.column_side) * plan.grad_step, plan.grad_step,
                shift(rooms.box, rooms.tiles[tile]), grads.tap_step[1], grads.tap_step[2],
            )  # fmt: skip
    return below


@jit
def _multiply(rooms: Rooms, tiles: int, channels: int, panels: int, plan: WinogradGradPlan) -> None:
    """Add the products of a box to the sums of all points: those of a run of tiles at a time, and of those left."""
    panel, block, run = plan.inputs.panel, plan.inputs.block, plan.summed
    whole, rest = tiles // run, tiles % run
    done = whole * run
    for point in range(plan.points):
        for i in range(panels):
            to = shift(rooms.products, point * plan.sum_step + i * plan.sum_panel)
            cells = shift(rooms.inputs, point * plan.input_step)
            grads = shift(rooms.grads, point * plan.grad_step + i * plan.grad_panel)
            part = run * panel.lanes
            multiply_apart(to, cells, rooms.channels, channels, rooms.parts, whole, run, block, grads, part, panel)
            if rest:
                cells, grads = shift(cells, done * block), shift(grads, done * panel.lanes)
                multiply_apart(to, cells, rooms.channels, channels, rooms.parts, 1, rest, block, grads, part, panel)


@jit
def _store(
    sums: Sums, rooms: Rooms, target: Any, grad_weight: Strided, channel0: int, channels: int, plan: WinogradGradPlan,
    task: Task,
) -> None:  # fmt: skip
    """Transform the sums of all points back to those of the taps, and store these if there are no other parts."""
    weights, lanes = plan.weights, plan.weights.panel.lanes
    wide, row0 = weights.kernel_size[2], channel0 * weights.taps
    for panel in range(task.panel0, task.panel1):
        products = shift(rooms.products, (panel - task.panel0) * plan.sum_panel)
        taps = panel_sums(sums, task, task.panel0 if task.at_once else panel, row0, weights)
        for channel in range(channels):
            _transform_sums(
                plan.row_side, plan.column_side, lanes,
                shift(taps, channel * weights.taps * lanes), wide * lanes, lanes,
                shift(products, channel * lanes), points(plan.column_side) * plan.sum_step, plan.sum_step,
            )  # fmt: skip
        if task.at_once:
            filter0, filter_step, count = packing.filters_of(weights, task.group, panel)
            store_rows(
                shift(target, filter0 * grad_weight.n), grad_weight, taps, row0, channels * weights.taps, weights,
                filter_step * grad_weight.n, count,
            )  # fmt: skip
