"""im2col: the patches that the filters see are gathered as a matrix, and convolution is a matrix product.

    patches[(c, t), o] = input[n, c, o * stride - pad + t * dilation]
    output[n, k, o]    = bias[k] + sum over (c, t) of  weight[k, (c, t)] * patches[(c, t), o]

                        pixels of a box
                      +-----------------+
    panel:            |  patches: L2    | (c, t)             for each box of output pixels (a task):
    lanes filters     |                 |                        gather its patches
        +---------+   +-----------------+                        for each chunk of its pixels, each panel of filters:
        | weights |   +-----------------+                            sums = bias
        | (c, t)  |   |  output         | lanes                      for each block of (c, t): sums += patches * weights
        +---------+   +-----------------+                            output = activation(sums)

The textbook form gathers the whole matrix, taps times as large as the image; here only the panel of the matrix that the caches
hold exists, once for each thread. For few channels (a network's first layer) gathering is cheap and makes long sums out of
short ones. The gradient of the weights is the same product with its reduction over pixels:

    grad_weight[k, (c, t)] = sum over n, o of  patches[(c, t), o] * grad_output[n, k, o]
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..interleave import input_grad
from . import packing
from .blocking import GradTasks, Plan, im2col_plan
from .compile import jit, kernel
from .packing import Strided, strided
from .threads import parallel, workspace
from .tile import BLOCK_BYTES, CHUNK, data, multiply, pointer, shift
from .weight_grad import Sums, add_products, pack_gradient, task_of, weight_grad


def conv_forward(
    input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, output: np.ndarray, dims: Any, options: Any
) -> None:
    """Fill ``output``."""
    dtype = output.dtype
    plan = im2col_plan(dims, dtype.itemsize)
    packed = packing.packed_weight(weight, plan, dtype, options.threads)
    all_bias = packing.contiguous_bias(bias, dims.out_channels, dtype)

    def work(first: int, last: int) -> None:
        _forward(
            first, last, strided(input), packed, all_bias, strided(output), plan, options.activation == "relu",
            workspace("box", plan.reduction * math.prod(plan.box), dtype), workspace("sums", 2 * CHUNK * plan.panel.lanes, dtype),
            np.zeros(CHUNK + 1, np.int64),
        )  # fmt: skip

    parallel(work, plan.box_count * plan.groups, options.threads)


def conv_input_grad(
    grad_output: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, grad_input: np.ndarray, dims: Any, options: Any
) -> None:
    """Fill ``grad_input``: stride-1 convolutions of ``grad_output``, see ``interleave``."""
    input_grad(conv_forward, grad_output, weight, bias, grad_input, dims, options)


def conv_weight_grad(
    input: np.ndarray, grad_output: np.ndarray, grad_weight: np.ndarray, grad_bias: np.ndarray | None, dims: Any, options: Any
) -> None:
    """Fill ``grad_weight``, and ``grad_bias`` where it is wanted."""
    plan = im2col_plan(dims, grad_weight.itemsize)
    elements = plan.reduction * math.prod(plan.box)
    weight_grad(_weight_grad, elements, input, grad_output, grad_weight, grad_bias, plan, options)


@kernel
def _forward(
    first: int, last: int, input: Strided, packed: np.ndarray, bias: np.ndarray, output: Strided,
    plan: Plan, relu: bool, patches: np.ndarray, sums: np.ndarray, offsets: np.ndarray,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``: a task is one box of one group."""
    rows, only_tap = data(offsets), shift(data(offsets), CHUNK)
    source, target = pointer(input.address, patches), pointer(output.address, patches)
    for task in range(first, last):
        group, number = task % plan.groups, task // plan.groups
        origin, size = packing.box_of(plan, number)
        packing.pack_patches(data(patches), source, input, plan, origin, size, group * plan.channels)
        pixels = size[0] * size[1] * size[2] * size[3]
        chunk = packing.chunk_of(pixels)
        for pixel in range(0, pixels, chunk):
            count = min(chunk, pixels - pixel)
            for i in range(count):
                rows[i] = pixel + i
            packing.repeat_last(rows, count)
            for panel in range(plan.panels):
                filters = packing.filters_of(plan, group, panel)
                packing.start_sums(data(sums), data(bias), filters, count, plan.panel.lanes)
                weights = shift(data(packed), (group * plan.panels + panel) * plan.reduction * plan.panel.lanes)
                _multiply_chunk(data(sums), patches, pixels, rows, count, only_tap, weights, plan)
                packing.store_chunk(target, output, data(sums), plan, origin, size, pixel, count, filters, relu)


@jit
def _multiply_chunk(
    sums: Any, patches: np.ndarray, pixels: int, rows: Any, count: int, only_tap: Any, weights: Any, plan: Plan
) -> None:
    """Add the whole reduction to the sums of a chunk of pixels and a panel, block by block."""
    most = BLOCK_BYTES // (plan.panel.lanes * patches.itemsize)
    for row in range(0, plan.reduction, most):
        depth = min(most, plan.reduction - row)
        a, b = shift(data(patches), row * pixels), shift(weights, row * plan.panel.lanes)
        multiply(sums, a, rows, count, only_tap, 1, depth, pixels, b, plan.panel)


@kernel
def _weight_grad(
    first: int, last: int, tasks: GradTasks, input: Strided, grad_output: Strided, plan: Plan,
    sums: Sums, patches: np.ndarray, pixels: np.ndarray, offsets: np.ndarray,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``; rows of C are (c, tap), and all pixels of a box are one line."""
    rows, only_line = data(offsets), shift(data(offsets), plan.sum_rows)
    image, gradient = pointer(input.address, patches), pointer(grad_output.address, patches)
    for number in range(first, last):
        task = task_of(number, tasks, plan)
        for box_number in range(task.box0, task.box1):
            origin, size = packing.box_of(plan, box_number)
            packing.pack_patches(data(patches), image, input, plan, origin, size, task.group * plan.channels)
            pack_gradient(pixels, gradient, grad_output, plan, task, sums, origin, size)
            count = size[0] * size[1] * size[2] * size[3]
            for row in range(plan.reduction):
                rows[row] = row * count
            packing.repeat_last(rows, plan.reduction)
            add_products(sums, patches, rows, 0, plan.reduction, only_line, 1, count, 1, pixels, plan, task)
