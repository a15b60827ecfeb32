"""Planar convolution, for few filters: the tile's rows are filters, and its lanes are pixels, in place.

    output[n, k, o] = bias[k] + sum over c, t of  weight[k, c, t] * input[n, c, o * stride - pad + t * dilation]

    for each box of some output rows (a task):
        sums [filter][pixel] = bias                                   L2 cache
        for each block of channels:
            pack their planes, padding included                       [channel][kd][high][wide]: L2 cache
            for each panel of pixels, each three filters:
                sums += weights * pixels                              the register tile
        output = activation(sums)

      plane of a channel, rows one after the other              sums
      +--------------------+                                    +--------------------+
      |. . . . . . . . . . |   pixel p = row * wide + column    |                    |  filters
      |. a a a b b b c c c |   sees tap (h, w) at               +--------------------+
      |. a a a b b b c c c |   p + h * wide + w                  pixels, as in the plane

With pixels as lanes even three filters fill the tile, where a panel of filters would be mostly empty: the gradient of
the input of a network's first layer, above all. Rows run on across the edge of the image; what is computed there, for
the columns of the padding, is dropped at the end. That takes a stride of 1 along height and width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..interleave import input_grad
from .blocking import Triple
from .compile import jit, kernel
from .packing import OFFSET, Strided, clip_negative, contiguous_bias, copy_block, fill, strided
from .threads import LINE, parallel, workspace, worthwhile
from .tile import MACHINE, address, flat, flat_tile, pointer, reader, shift

ROWS = MACHINE.flat.rows
PLANE_BYTES = 256 * 1024  #: packed planes
SUM_BYTES = 128 * 1024


class Planar(NamedTuple):
    """One convolution and its cutting; triples are (depth, height, width)."""

    batch: int
    groups: int
    channels: int  #: of one group
    filters: int  #: of one group
    input_size: Triple
    kernel_size: Triple
    depth_stride: int
    pad: Triple
    dilation: Triple
    output_size: Triple
    taps: int
    lanes: int  #: pixels of a tile
    block: int  #: channels packed at a time
    rows: int  #: output rows of a box
    boxes: int  #: of one depth
    high: int  #: rows of a packed plane
    wide: int  #: columns of a packed plane
    plane: int  #: elements between the packed planes of two channels
    pitch: int  #: elements between the sums of two filters


@lru_cache(maxsize=512)
def _plan(dims: Any, itemsize: int, threads: int) -> Planar:
    (kd, kh, kw), (_, dilation_h, dilation_w) = dims.kernel_size, dims.dilation
    depth, height, width = dims.output_size
    block = min(dims.group_in_channels, max(4, 192 // dims.taps))  # products summed in one go: see ``forward_plan``
    wide, more = width + (kw - 1) * dilation_w, (kh - 1) * dilation_h
    tasks = dims.batch * dims.groups * depth
    most = min(
        PLANE_BYTES // (block * kd * wide * itemsize) - more,
        SUM_BYTES // (ROWS * wide * itemsize),
        -(-height // -(-threads // max(1, tasks))),
    )
    boxes = -(-height // max(1, most))
    rows = -(-height // boxes)
    lanes, line = MACHINE.flat.vectors * MACHINE.vector_bytes // itemsize, LINE // itemsize
    pitch = -(-rows * wide // lanes) * lanes
    # The last panel reads beyond the last row. An odd number of cache lines, or few cache sets hold all planes.
    plane = (-(-(kd * (rows + more) * wide + lanes + (kw - 1) * dilation_w) // line) | 1) * line
    return Planar(
        dims.batch, dims.groups, dims.group_in_channels, dims.group_out_channels,
        dims.input_size, dims.kernel_size, dims.stride[0], dims.pad_before, dims.dilation, dims.output_size, dims.taps,
        lanes, block, rows, boxes, rows + more, wide, plane, pitch,
    )  # fmt: skip


_read_plan = reader(Planar)


def conv_forward(
    input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, output: np.ndarray, dims: Any, options: Any
) -> None:
    """Fill ``output``."""
    dtype, threads = output.dtype, worthwhile(options.threads, dims.flops)
    plan = _plan(dims, dtype.itemsize, threads)
    numbers, all_bias = flat(plan), contiguous_bias(bias, dims.out_channels, dtype)
    filters = -(-plan.filters // ROWS) * ROWS

    def work(first: int, last: int) -> None:
        _forward(
            first, last, strided(input), strided(weight), address(all_bias), strided(output), address(numbers),
            options.activation == "relu", workspace("box", plan.block * plan.plane, dtype),
            workspace("sums", filters * plan.pitch, dtype), workspace("offsets", filters + 2 * plan.taps, OFFSET),
            dtype.type(0),
        )  # fmt: skip

    parallel(work, plan.batch * plan.groups * plan.output_size[0] * plan.boxes, threads)


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


@kernel
def _forward(
    first: int, last: int, input: Strided, weight: Strided, bias: int, output: Strided, numbers: int, relu: bool,
    box: int, sums_address: int, offsets: int, like: float,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``: a task is one box of rows, of one image and one group."""
    plan = _read_plan(numbers)
    source, target, weights = pointer(input.address, like), pointer(output.address, like), pointer(weight.address, like)
    planes, sums, biases = pointer(box, like), pointer(sums_address, like), pointer(bias, like)
    weight_taps = pointer(offsets, 0)
    plane_taps = shift(weight_taps, plan.taps)
    rows = shift(plane_taps, plan.taps)
    _tap_offsets(weight_taps, plane_taps, weight, plan)
    depth, height, _ = plan.output_size
    for task in range(first, last):
        row, d = task % plan.boxes * plan.rows, task // plan.boxes % depth
        n, group = task // (plan.boxes * depth * plan.groups), task // (plan.boxes * depth) % plan.groups
        filter0, channel0 = group * plan.filters, group * plan.channels
        for k in range(plan.filters):
            rows[k] = (filter0 + k) * weight.n
            for pixel in range(plan.pitch):
                sums[k * plan.pitch + pixel] = biases[filter0 + k]
        for k in range(plan.filters, -(-plan.filters // ROWS) * ROWS):
            rows[k] = rows[plan.filters - 1]
        for channel in range(0, plan.channels, plan.block):
            count = min(plan.block, plan.channels - channel)
            image = shift(source, n * input.n + (channel0 + channel) * input.c)
            _pack_planes(planes, image, input, plan, d, row, count)
            part = shift(weights, channel * weight.c)
            for pixel in range(0, plan.pitch, plan.lanes):
                for k in range(0, plan.filters, ROWS):
                    flat_tile(
                        shift(sums, k * plan.pitch + pixel), plan.pitch, part, shift(rows, k),
                        weight_taps, plan.taps, count, weight.c, shift(planes, pixel), plane_taps, plan.plane,
                    )  # fmt: skip
        out = shift(target, n * output.n + filter0 * output.c + d * output.d + row * output.h)
        _store(out, output, sums, plan, min(plan.rows, height - row), relu)


@jit
def _tap_offsets(weight_taps: Any, plane_taps: Any, weight: Strided, plan: Planar) -> None:
    """Store how far taps are from the first, in a filter and in the packed planes."""
    _, kh, kw = plan.kernel_size
    for tap in range(plan.taps):
        d, h, w = tap // (kh * kw), tap // kw % kh, tap % kw
        weight_taps[tap] = d * weight.d + h * weight.h + w * weight.w
        plane_taps[tap] = (d * plan.high + h * plan.dilation[1]) * plan.wide + w * plan.dilation[2]


@jit
def _pack_planes(planes: Any, image: Any, input: Strided, plan: Planar, d: int, row: int, channels: int) -> None:
    """Pack what the output rows from ``row`` on see of some channels."""
    depth, height, width = plan.input_size
    begin, end = min(plan.wide, plan.pad[2]), min(plan.wide, plan.pad[2] + width)
    for tap_d in range(plan.kernel_size[0]):
        cell_d = d * plan.depth_stride - plan.pad[0] + tap_d * plan.dilation[0]
        for line in range(plan.high):
            cell_h = row - plan.pad[1] + line
            target = shift(planes, (tap_d * plan.high + line) * plan.wide)
            inside = 0 <= cell_d < depth and 0 <= cell_h < height
            for c in range(channels):
                fill(shift(target, c * plan.plane), begin if inside else plan.wide)
                fill(shift(target, c * plan.plane + end), plan.wide - end)
            if inside:
                cells = shift(image, cell_d * input.d + cell_h * input.h)
                to = shift(target, begin)
                copy_block(to, plan.plane, 1, cells, input.c, input.w, channels, end - begin)


@jit
def _store(target: Any, output: Strided, sums: Any, plan: Planar, rows: int, relu: bool) -> None:
    """Store some rows of the sums through the activation."""
    if relu:
        clip_negative(sums, plan.filters * plan.pitch)
    for row in range(rows):
        to, cells = shift(target, row * output.h), shift(sums, row * plan.wide)
        copy_block(to, output.c, output.w, cells, plan.pitch, 1, plan.filters, plan.output_size[2])
