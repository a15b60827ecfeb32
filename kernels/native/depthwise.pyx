"""Depthwise convolution where channels are neighbours: vectors of them, tap by tap.

    output[p][c] = sum over taps t of  part[p * stride + t * dilation][c] * weight[t][c]

    for image, block of output pixels, 16 channels:        in parallel
        pack the part of the image that the block sees    [kernel depth][high][wide][16]
        for chunk of pixels: for pixel: sums over taps    in registers
            store: bias, activation, the caller's layout

       part of the image             weights             chunk
      +------------------+         +--------+          +--------+
      | pixel ->         |    x    | taps * |    =     | pixel  |
      |       16 channels|         |   16   |          |        |
      +------------------+         +--------+          +--------+

Channels are not summed, so that each is multiplied by a filter of its own and nothing else. Several filters for each channel are as many
convolutions.
"""

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels.native.blocking cimport (
    CHANNELS, DEPTHWISE_BYTES, Block, Blocks, Conv, View, bias_at, cut, locate, make_conv, pack_bias, pack_image, part_cells,
    pixel_offsets, run_tasks, store, tap_offsets,
)
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, arena

# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    Blocks blocks
    Py_ssize_t channel_blocks
    const char *weights         # packed
    const char *bias
    int relu


def conv_forward(input, weight, bias, output, dims, options):
    """See ``fastconv.kernels``."""
    multiplier = weight.shape[0] // dims.groups
    for j in range(multiplier):  # filters j, j + multiplier, ... are one filter for each channel
        part = None if bias is None else bias[j::multiplier]
        _convolve(input, weight[j::multiplier], part, output[:, j::multiplier], dims, options)


cdef void _convolve(cnp.ndarray input, cnp.ndarray weight, bias, cnp.ndarray output, dims, options):
    """One filter for each channel: weight (C, 1, ...), output (N, C, ...)."""
    cdef Plan plan
    cdef Conv *c = &plan.c
    cdef Py_ssize_t b, tasks
    cdef char *weights
    make_conv(c, input, weight, output, dims, options)
    plan.channel_blocks = (c.groups + CHANNELS - 1) // CHANNELS
    cut(c, CHANNELS * c.item, DEPTHWISE_BYTES, c.out[2], &plan.blocks)
    weights = arena(FC_ARENA_WEIGHTS, plan.channel_blocks * CHANNELS * (c.taps + 1) * c.item)
    if weights == NULL:
        raise MemoryError("no memory for packed weights")
    for b in range(plan.channel_blocks):
        _pack(c, b * CHANNELS, weights + b * CHANNELS * c.taps * c.item)
    plan.weights = weights
    plan.bias = pack_bias(c, bias, weights + plan.channel_blocks * CHANNELS * c.taps * c.item)
    plan.relu = options.activation == "relu"
    tasks = c.batch * plan.blocks.count * plan.channel_blocks
    run_tasks(_task, &plan, tasks, c.threads)


cdef void _pack(const Conv *c, Py_ssize_t first, char *out) noexcept nogil:
    """Pack a block of channels' filters to [tap][channel], missing channels as zeros."""
    cdef const View *w = &c.w
    cdef Py_ssize_t d, h, count = min(<Py_ssize_t>CHANNELS, c.groups - first)
    memset(out, 0, <size_t>(c.taps * CHANNELS * c.item))
    for d in range(c.kernel[0]):
        for h in range(c.kernel[1]):
            c.kernels.transpose(
                w.data + (first * w.stride[0] + d * w.stride[2] + h * w.stride[3]) * c.item,
                w.stride[0], w.stride[4], count, c.kernel[2], out, CHANNELS,
            )
            out += c.kernel[2] * CHANNELS * c.item


cdef int _task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t first = task % plan.channel_blocks * CHANNELS
    cdef Py_ssize_t channels = min(<Py_ssize_t>CHANNELS, c.groups - first)
    cdef Block block
    locate(c, &plan.blocks, task // plan.channel_blocks, &block)

    cdef Py_ssize_t pixels = block.rows * block.columns
    cdef Py_ssize_t offset_bytes = (pixels + c.taps + 8) // 8 * 64
    cdef Py_ssize_t chunk_bytes = c.chunk * CHANNELS * c.item
    cdef char *memory = arena(
        FC_ARENA_BLOCK, offset_bytes + chunk_bytes + CHANNELS * part_cells(c, block.rows, block.columns) * c.item
    )
    if memory == NULL:
        return 1
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory
    cdef Py_ssize_t *taps = offsets + pixels
    cdef char *accumulators = memory + offset_bytes
    cdef char *part = accumulators + chunk_bytes
    cdef const char *bias = bias_at(plan.bias, first * c.item)
    cdef Py_ssize_t p, count
    pixel_offsets(c, &block, CHANNELS, offsets)
    tap_offsets(c, &block, CHANNELS, taps)
    pack_image(c, &block, first, channels, CHANNELS, part)
    for p from 0 <= p < pixels by c.chunk:
        count = min(c.chunk, pixels - p)
        c.kernels.depthwise(
            taps, c.taps, <int>c.kernel[2], part, offsets + p, count, plan.weights + first * c.taps * c.item, CHANNELS,
            accumulators,
        )
        store(c, &block, p, count, accumulators, CHANNELS, first, channels, bias, plan.relu)
    return 0
