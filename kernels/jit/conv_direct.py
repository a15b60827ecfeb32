"""Direct convolution: the image is packed once, and the filter's taps are only addresses.

    output[n, k, o] = bias[k] + sum over c, t of  input[n, c, o * stride - pad + t * dilation] * weight[k, c, t]

    for each box of output pixels (a task):                       packed into [C/block][D][H][W][block]: L2 cache
        for each chunk of its pixels:
            for each panel of filters:
                sums [chunk][lanes] = bias                        L1 cache
                for each block of channels, and of taps:
                    sums += cells of the chunk * panel            the register tile; this part of the panel in L1
                                                                  (of few channels, a row of taps is reduced as one)
                output = activation(sums)                         the epilogue

The gradient of the input is that same convolution of grad_output, once for each phase of the stride. The gradient of
the weights,

    grad_weight[k, c, t] = sum over n, o of  input[n, c, o * stride - pad + t * dilation] * grad_output[n, k, o]

is the same tile the other way round: its rows are the (c, t), its reduction runs over pixels, its "taps" are rows of
pixels.

    for each part of the boxes, of the channels and of the panels (a task):
        for each box:                                             input packed as above, gradient [panel][pixel][lanes]
            for each few rows of its pixels:
                for each chunk of (c, t), each panel:
                    sums [panel][(c, t)][lanes] += cells * pixels
    grad_weight = sum of the parts of the boxes, in order

No sum is cut by the number of threads: every result has the same bits with one thread and with many.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..interleave import input_grad
from . import packing
from .blocking import GradTasks, Plan, forward_plan, weight_grad_plan
from .compile import jit, kernel
from .packing import Strided, strided
from .threads import parallel, workspace, worthwhile
from .tile import BLOCK_BYTES, CHUNK, address, flat, multiply, pointer, shift
from .weight_grad import Addresses, Sums, add_products, pack_gradient, start_task, task_of, weight_grad

MOST_JOINED = 16  #: channels; with more, the sums of a tap are long enough


class Weights(NamedTuple):
    """The weights as compiled code needs them; its pointers are to numbers of their type."""

    source: Any  #: the caller's
    weight: Strided
    packed: Any  #: all panels or, with ``once``, room for a part of one
    once: bool  #: each panel is used once, and packed where it is used
    rows: Any  #: room for ``pack_part``


def conv_forward(
    input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, output: np.ndarray, dims: Any, options: Any
) -> None:
    """Fill ``output``."""
    dtype, threads = output.dtype, worthwhile(options.threads, dims.flops)
    plan = forward_plan(dims, dtype.itemsize, threads)
    once = plan.batch * math.prod(plan.output_size) <= CHUNK  # each panel is used once: packed where it is used
    part = plan.block * plan.taps * plan.panel.lanes
    packed = 0 if once else packing.packed_weight(weight, plan, threads)
    all_bias = packing.contiguous_bias(bias, dims.out_channels, dtype)
    numbers, boxes = flat(plan), plan.box_count * plan.groups
    splits = min(plan.panels, -(-threads // max(1, boxes)))  # few boxes: threads share them, panel by panel

    def work(first: int, last: int) -> None:
        _forward(
            first, last, splits, strided(input), strided(weight),
            packed or workspace("weight", part, dtype), once, address(all_bias), strided(output),
            address(numbers), options.activation == "relu", workspace("box", plan.blocks * plan.box_block, dtype),
            workspace("sums", 2 * CHUNK * plan.panel.lanes, dtype),
            workspace("offsets", CHUNK + (1 + packing.SQUARE) * plan.taps, packing.OFFSET), dtype.type(0),
        )  # fmt: skip

    parallel(work, boxes * splits, threads)


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


def conv_weight_grad(
    input: np.ndarray,
    grad_output: np.ndarray,
    grad_weight: np.ndarray,
    grad_bias: np.ndarray | None,
    dims: Any,
    options: Any,
) -> None:
    """Fill ``grad_weight``, and ``grad_bias`` where it is wanted."""
    plan = weight_grad_plan(dims, grad_weight.itemsize)
    threads = worthwhile(options.threads, dims.flops)
    elements = plan.blocks * plan.box_block
    weight_grad(_weight_grad, elements, input, grad_output, grad_weight, grad_bias, plan, threads)


@kernel
def _forward(
    first: int, last: int, splits: int, input: Strided, weight: Strided, packed: int, once: bool, bias: int,
    output: Strided, numbers: int, relu: bool, box_address: int, sums_address: int, offsets: int, like: float,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``: a task is one part of the panels of one box of one group."""
    plan = packing.read_plan(numbers)
    rows = pointer(offsets, 0)
    taps = shift(rows, CHUNK)
    packing.tap_offsets(taps, plan, plan.kernel_size[2] if _joined(plan) else 1)
    source, target = pointer(input.address, like), pointer(output.address, like)
    box, sums = pointer(box_address, like), pointer(sums_address, like)
    weights = Weights(pointer(weight.address, like), weight, pointer(packed, like), once, shift(taps, plan.taps))
    for task in range(first, last):
        split, group, number = task % splits, task // splits % plan.groups, task // (splits * plan.groups)
        origin, size = packing.box_of(plan, number)
        packing.pack_box(box, source, input, plan, origin, size, group, 0, plan.channels)
        pixels = size[0] * size[1] * size[2] * size[3]
        chunk = packing.chunk_of(pixels)
        for pixel in range(0, pixels, chunk):
            count = min(chunk, pixels - pixel)
            packing.pixel_offsets(rows, plan, size, pixel, count, 1)
            packing.repeat_last(rows, count)
            for panel in range(plan.panels * split // splits, plan.panels * (split + 1) // splits):
                filters = packing.filters_of(plan, group, panel)
                packing.start_sums(sums, pointer(bias, like), filters, count, plan.panel.lanes)
                _multiply_chunk(sums, box, rows, count, taps, weights, group, panel, plan)
                packing.store_chunk(target, output, sums, plan, origin, size, pixel, count, filters, relu)


@jit
def _multiply_chunk(
    sums: Any, box: Any, rows: Any, count: int, taps: Any, weights: Weights, group: int, panel: int, plan: Plan
) -> None:
    """Add the whole reduction to the sums of a chunk of pixels and a panel, block by block."""
    lanes, joined = plan.panel.lanes, plan.kernel_size[2] if _joined(plan) else 1
    if plan.panel.elementwise:
        multiply(
            sums, lanes, box, rows, count, taps, plan.taps // joined, joined, plan.tap_step[2],
            _weights_of(weights, group, panel, 0, 1, plan), joined * lanes, lanes, plan.panel,
        )  # fmt: skip
        return
    for channel in range(0, plan.channels, plan.block):
        channels = min(plan.block, plan.channels - channel)
        cells = shift(box, channel // plan.block * plan.box_block)
        part = _weights_of(weights, group, panel, channel, channels, plan)
        depth, tap_count = channels * joined, plan.taps // joined
        most_taps = max(1, BLOCK_BYTES // (depth * lanes * plan.itemsize))
        for tap in range(0, tap_count, most_taps):
            multiply(
                sums, lanes, cells, rows, count, shift(taps, tap), min(most_taps, tap_count - tap), depth, 1,
                shift(part, tap * depth * lanes), depth * lanes, lanes, plan.panel,
            )  # fmt: skip


@jit
def _joined(plan: Plan) -> bool:
    """Whether a row of a filter's taps, each too short a sum, is reduced as one; ``taps`` are then these rows."""
    one_run = plan.blocks == 1 and plan.tap_step[2] == plan.block and plan.block <= MOST_JOINED
    return one_run or plan.panel.elementwise


@jit
def _weights_of(weights: Weights, group: int, panel: int, channel: int, depth: int, plan: Plan) -> Any:
    """Return where a panel's weights for ``depth`` channels are, packed before or just now."""
    if weights.once:
        packing.pack_part(
            weights.packed, weights.source, weights.weight, weights.rows, plan, group, panel, channel, depth
        )
        return weights.packed
    row = (group * plan.panels + panel) * plan.reduction + channel * plan.taps
    return shift(weights.packed, row * plan.panel.lanes)


@kernel
def _weight_grad(
    first: int, last: int, tasks: GradTasks, input: Strided, grad_output: Strided, grad_weight: Strided, numbers: int,
    addresses: Addresses, like: float,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``; rows of C are (c, tap), and a "tap" is a row of output pixels."""
    plan = packing.read_plan(numbers)
    rows = pointer(addresses.offsets, 0)
    taps, lines = shift(rows, plan.sum_rows), shift(rows, plan.sum_rows + plan.taps)
    packing.tap_offsets(taps, plan, 1)
    image, gradient = pointer(input.address, like), pointer(grad_output.address, like)
    sums = Sums(pointer(addresses.sums, like), pointer(addresses.bias, like))
    box, pixels = pointer(addresses.cells, like), pointer(addresses.pixels, like)
    for number in range(first, last):
        task = task_of(number, tasks, plan)
        start_task(sums, task, plan)
        channel0, channel1 = task.block0 * plan.block, min(task.block1 * plan.block, plan.channels)
        row_count = (1 if plan.panel.elementwise else channel1 - channel0) * plan.taps
        _row_offsets(rows, row_count, taps, plan)
        for box_number in range(task.box0, task.box1):
            origin, size = packing.box_of(plan, box_number)
            packing.pack_box(box, image, input, plan, origin, size, task.group, channel0, channel1)
            pack_gradient(pixels, gradient, grad_output, plan, task, sums, origin, size)
            line_count = size[0] * size[1] * size[2]
            packing.pixel_offsets(lines, plan, size, 0, line_count, size[3])
            add_products(
                sums, box, rows, channel0 * plan.taps, row_count, lines, line_count, size[3], plan.pixel_step[2],
                pixels, grad_weight, like, plan, task,
            )  # fmt: skip


@jit
def _row_offsets(rows: Any, count: int, taps: Any, plan: Plan) -> None:
    """Store where each (c, tap) sees the first output pixel of a box."""
    for row in range(count):
        channel, tap = row // plan.taps, row % plan.taps
        rows[row] = channel // plan.block * plan.box_block + channel % plan.block + taps[tap]
    packing.repeat_last(rows, count)
