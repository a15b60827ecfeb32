"""im2col: the patches that the filters see are gathered as a matrix, and convolution is a matrix product.

    patches[(c, t), o] = input[n, c, o * stride - pad + t * dilation]
    output[n, k, o]    = bias[k] + sum over (c, t) of  weight[k, (c, t)] * patches[(c, t), o]

                           pixels of a box
                         +-----------------+             for each box of output pixels (a task):
          (c, t)         |  patches        | (c, t)          gather its patches                          L2 cache
        +---------+      |                 |                 for each chunk of filters:
    K   | weights |      +-----------------+                     sums [filter][pixel] = bias
        | as they |      +-----------------+                     for each block of (c, t), each panel of pixels:
        | are     |      |  output         | K                       sums += weights * patches            L1 cache
        +---------+      +-----------------+                     output = activation(sums)

The textbook form gathers the whole matrix, taps times as large as the image; here only a panel of it exists, once for
each thread. Pixels are the tile's lanes and filters its rows, so that neither the weights nor the output of an NCHW
network must be transposed: good where the weights are many and the pixels few, and where the channels are few (a
network's first layer), for gathering makes long sums out of short ones. The gradient of the weights,

    grad_weight[k, (c, t)] = sum over n, o of  patches[(c, t), o] * grad_output[n, k, o]

has the (c, t) as rows, filters as lanes, and its reduction over pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..interleave import input_grad
from . import packing
from .blocking import GradTasks, Plan, im2col_plan
from .compile import jit, kernel
from .packing import OFFSET, Quad, Strided, clip_negative, contiguous_bias, copy_block, pack_patches, run_of, strided
from .threads import parallel, workspace, worthwhile
from .tile import BLOCK_BYTES, CHUNK, ROW_MULTIPLE, WIDE_BYTES, address, flat, multiply, pointer, shift
from .weight_grad import Addresses, Sums, add_products, pack_gradient, start_task, task_of, weight_grad


def conv_forward(
    input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, output: np.ndarray, dims: Any, options: Any
) -> None:
    """Fill ``output``."""
    dtype, threads = output.dtype, worthwhile(options.threads, dims.flops)
    plan = im2col_plan(dims, dtype.itemsize, threads)
    filters = _as_rows(weight)
    all_bias = contiguous_bias(bias, dims.out_channels, dtype)
    numbers, boxes = flat(plan), plan.box_count * plan.groups
    splits = min(-(-plan.filters // ROW_MULTIPLE), -(-threads // max(1, boxes)))  # few boxes: filters are shared

    def work(first: int, last: int) -> None:
        _forward(
            first, last, splits, strided(input), strided(filters), address(all_bias), strided(output),
            address(numbers), options.activation == "relu",
            workspace("box", plan.reduction * plan.pitch + plan.panel.lanes, dtype),
            workspace("sums", CHUNK * plan.pitch + plan.panel.lanes, dtype),
            workspace("offsets", CHUNK + plan.channels, OFFSET), dtype.type(0),
        )  # fmt: skip

    parallel(work, boxes * splits, threads)


def _as_rows(weight: np.ndarray) -> np.ndarray:
    """Return the weights as (K, C, 1, 1, taps), the last step one element: a view for OIHW, rotated or not."""
    filters = weight.reshape(*weight.shape[:2], 1, 1, -1)
    step = filters.strides[4 if filters.shape[4] > 1 else 1]
    return filters if abs(step) == filters.itemsize else np.ascontiguousarray(filters)


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
    plan = im2col_plan(dims, grad_weight.itemsize)
    elements = plan.reduction * plan.pitch
    threads = worthwhile(options.threads, dims.flops)
    weight_grad(_weight_grad, elements, input, grad_output, grad_weight, grad_bias, plan, threads)


@kernel
def _forward(
    first: int, last: int, splits: int, input: Strided, weight: Strided, bias: int, output: Strided,
    numbers: int, relu: bool, patches_address: int, sums_address: int, offsets: int, like: float,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``: a task is a part of the filters for one box of one group."""
    plan = packing.read_plan(numbers)
    rows = pointer(offsets, 0)
    channels = shift(rows, CHUNK)
    for channel in range(plan.channels):
        channels[channel] = channel * weight.c
    source, target = pointer(input.address, like), pointer(output.address, like)
    filters, biases = pointer(weight.address, like), pointer(bias, like)
    patches, sums = pointer(patches_address, like), pointer(sums_address, like)
    for task in range(first, last):
        split, group, number = task % splits, task // splits % plan.groups, task // (splits * plan.groups)
        origin, size = packing.box_of(plan, number)
        pack_patches(patches, source, input, plan, origin, size, group * plan.channels)
        pixels = size[0] * size[1] * size[2] * size[3]
        end = plan.filters * (split + 1) // splits
        for chunk in range(plan.filters * split // splits, end, CHUNK):
            count, filter0 = min(CHUNK, end - chunk), group * plan.filters + chunk
            for row in range(count):
                rows[row] = (filter0 + row) * weight.n
                _start_row(shift(sums, row * plan.pitch), biases[filter0 + row], pixels)
            packing.repeat_last(rows, count)
            _multiply_chunk(sums, filters, weight, rows, count, channels, patches, pixels, plan)
            _store(shift(target, filter0 * output.c), output, sums, plan, origin, size, count, relu)


@jit
def _multiply_chunk(
    sums: Any, filters: Any, weight: Strided, rows: Any, count: int, channels: Any,
    patches: Any, pixels: int, plan: Plan,
) -> None:  # fmt: skip
    """Add the whole reduction to the sums of a chunk of filters and all pixels, block by block of channels."""
    most = max(1, BLOCK_BYTES // (plan.taps * WIDE_BYTES))  # whatever the panel, which must not change the result
    step = weight.w if plan.taps > 1 else weight.c
    for channel in range(0, plan.channels, most):
        part = min(most, plan.channels - channel)
        # Where channels follow each other as their cells do, the reduction is one run; else one run for each channel.
        runs, depth = (1, part * plan.taps) if weight.c == plan.taps * step else (part, plan.taps)
        for pixel in range(0, pixels, plan.panel.lanes):
            multiply(
                shift(sums, pixel), plan.pitch, filters, rows, count, shift(channels, channel), runs, depth, step,
                shift(patches, channel * plan.taps * plan.pitch + pixel), depth * plan.pitch, plan.pitch, plan.panel,
            )  # fmt: skip


@jit
def _start_row(sums: Any, bias: float, count: int) -> None:
    """Let a row of sums start at the bias."""
    for i in range(count):
        sums[i] = bias


@jit
def _store(
    target: Any, output: Strided, sums: Any, plan: Plan, origin: Quad,
    size: Quad, count: int, relu: bool,
) -> None:  # fmt: skip
    """Store the sums of ``count`` filters through the activation."""
    pixel, pixels = 0, size[0] * size[1] * size[2] * size[3]
    if relu:
        for row in range(count):
            clip_negative(shift(sums, row * plan.pitch), pixels)
    while pixel < pixels:
        start, run = run_of(output, plan, origin, size, pixel, pixels)
        copy_block(shift(target, start), output.c, output.w, shift(sums, pixel), plan.pitch, 1, count, run)
        pixel += run


@kernel
def _weight_grad(
    first: int, last: int, tasks: GradTasks, input: Strided, grad_output: Strided, grad_weight: Strided, numbers: int,
    addresses: Addresses, like: float,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``; rows of C are (c, tap), and all pixels of a box are one line."""
    plan = packing.read_plan(numbers)
    rows = pointer(addresses.offsets, 0)
    only_line = shift(rows, plan.sum_rows)
    only_line[0] = 0
    image, gradient = pointer(input.address, like), pointer(grad_output.address, like)
    sums = Sums(pointer(addresses.sums, like), pointer(addresses.bias, like))
    patches, pixels = pointer(addresses.cells, like), pointer(addresses.pixels, like)
    for number in range(first, last):
        task = task_of(number, tasks, plan)
        start_task(sums, task, plan)
        for box_number in range(task.box0, task.box1):
            origin, size = packing.box_of(plan, box_number)
            pack_patches(patches, image, input, plan, origin, size, task.group * plan.channels)
            pack_gradient(pixels, gradient, grad_output, plan, task, sums, origin, size)
            count = size[0] * size[1] * size[2] * size[3]
            for row in range(plan.reduction):
                rows[row] = row * plan.pitch
            packing.repeat_last(rows, plan.reduction)
            add_products(
                sums, patches, rows, 0, plan.reduction, only_line, 1, count, 1, pixels, grad_weight, like, plan, task
            )
