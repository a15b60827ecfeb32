"""Convolution with pixels as lanes, for few filters: these would leave most lanes of a panel of filters empty.

    output[k][p] = bias[k] + sum over (c, t) of  weight[k, c, t] * planes[c][p + offset of t]

    for image, group, block of output rows:                     in parallel
        copy the planes that the block sees, padding included   [channel][kernel depth][high][wide]: L2
        for tile of filters x pixels:
            sums = bias
            for block of channels: brgemm over taps, channels   their share of the planes in L1
              (with few channels: over channels and rows of taps, taps of a row)
            store: activation, the caller's layout

                         planes, flattened                      sums
                       +--------------------+            +----------------+
     weights, where    |   c: rows of the   |          k |  f f f | h |   |   f: pixels of the block
     they are     x    |   image, one after |    =       |  f f f | h |   |   h: halo, computed and
                       |   the other        |            +----------------+      dropped at the store
                       +--------------------+

With stride 1, the output pixels of a block are neighbours wherever their cells are, rows and all: a tile may run from one row
into the next. Weights are read in place, whatever their strides. The gradient of the input of a network's first layer, with its
three channels, is such a convolution.
"""

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels import interleave
from fastconv.kernels.native.blocking cimport (
    Block, Blocks, Conv, View, bias_at, ceil_div, cut, locate, make_conv, pack_bias, part_cells, run_tasks, start_sums,
    tap_offsets,
)
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_FLAT_ROWS, arena, fc_epilogue, fc_reduction,
)

cdef enum:
    PLANE_BYTES = 1 << 18       # of a block: with what else there is, half of L2
    SHARE_BYTES = 3 << 13       # of the planes that a tile sees, and the next one again: L1
    LINE_BYTES = 64
    TILE_BYTES = 2048           # of sums, at most


def conv_forward(input, weight, bias, output, dims, options):
    """See ``fastconv.kernels``."""
    _forward(input, weight, bias, output, dims, options)


def conv_input_grad(grad_output, weight, bias, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    interleave.input_grad(conv_forward, grad_output, weight, bias, grad_input, dims, options)


# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    Blocks blocks
    Py_ssize_t together         # channels that one brgemm reduces over
    bint by_rows                # innermost along the taps of a row, not along fewer channels
    const char *bias
    int relu


cdef void _forward(cnp.ndarray input, cnp.ndarray weight, bias, cnp.ndarray output, dims, options):
    cdef Plan plan
    cdef Conv *c = &plan.c
    make_conv(c, input, weight, output, dims, options)
    cut(c, c.channels * c.item, PLANE_BYTES, c.out[2], &plan.blocks)
    plan.together = max(1, SHARE_BYTES // (c.kernel[0] * c.kernel[1] * 3 * LINE_BYTES))
    plan.by_rows = c.channels < c.kernel[2]
    if plan.by_rows:
        plan.together = c.channels
    plan.bias = pack_bias(c, bias, arena(FC_ARENA_WEIGHTS, c.groups * c.filters * c.item))
    plan.relu = options.activation == "relu"
    run_tasks(_forward_task, &plan, c.batch * c.groups * plan.blocks.count, c.threads)


cdef int _forward_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t group = task % c.groups
    cdef Block block
    locate(c, &plan.blocks, task // c.groups, &block)

    cdef Py_ssize_t tap_bytes = (c.taps + 8) // 8 * 64
    # An odd number of cache lines: planes a power of two apart would fall into the same few sets of L1.
    cdef Py_ssize_t plane_bytes = (
        ceil_div(part_cells(c, block.rows, block.columns) * c.item, LINE_BYTES) | 1
    ) * LINE_BYTES
    cdef Py_ssize_t over = 2 * TILE_BYTES  # what a last tile reads beyond the last plane
    cdef char *memory = arena(FC_ARENA_BLOCK, tap_bytes * 2 + TILE_BYTES + c.channels * plane_bytes + over)
    if memory == NULL:
        return 1
    cdef Py_ssize_t *a_taps = <Py_ssize_t *>memory
    cdef Py_ssize_t *b_taps = <Py_ssize_t *>(memory + tap_bytes)
    cdef char *sums = memory + 2 * tap_bytes
    cdef char *planes = sums + TILE_BYTES
    if plan.by_rows:
        row_offsets(c, &block, plane_bytes // c.item, a_taps, b_taps)
    else:
        weight_offsets(c, a_taps)
        tap_offsets(c, &block, 1, b_taps)
    pack_planes(c, &block, group * c.channels, plane_bytes // c.item, planes)
    memset(planes + c.channels * plane_bytes, 0, <size_t>over)
    cdef Py_ssize_t filter = 0, filters
    while filter < c.filters:
        filters = min(c.filters - filter, <Py_ssize_t>c.kernels.tile_rows)
        _filters(plan, &block, group * c.filters + filter, filters, a_taps, b_taps, planes, plane_bytes, sums)
        filter += filters
    return 0


cdef void weight_offsets(const Conv *c, Py_ssize_t *taps) noexcept nogil:
    """Write where each tap of a filter is, from the first."""
    cdef const View *w = &c.w
    cdef Py_ssize_t i, j, k, t = 0
    for i in range(c.kernel[0]):
        for j in range(c.kernel[1]):
            for k in range(c.kernel[2]):
                taps[t] = i * w.stride[2] + j * w.stride[3] + k * w.stride[4]
                t += 1


cdef void row_offsets(const Conv *c, const Block *block, Py_ssize_t plane, Py_ssize_t *rows,
                      Py_ssize_t *lines) noexcept nogil:
    """Write where each channel's rows of taps are, from a filter's first, and the lines of the planes that they see."""
    cdef const View *w = &c.w
    cdef Py_ssize_t channel, d, h, n = 0
    for channel in range(c.channels):
        for d in range(c.kernel[0]):
            for h in range(c.kernel[1]):
                rows[n] = channel * w.stride[1] + d * w.stride[2] + h * w.stride[3]
                lines[n] = channel * plane + (d * block.high + h * c.dilation[1]) * block.wide
                n += 1


cdef void pack_planes(const Conv *c, const Block *block, Py_ssize_t first, Py_ssize_t plane, char *out) noexcept nogil:
    """Copy what the block sees of a group's channels, from ``first`` on, to [channel][kernel depth][high][wide]."""
    cdef const View *x = &c.x
    cdef const char *base = x.data + (block.image * x.stride[0] + first * x.stride[1]) * c.item
    cdef Py_ssize_t left = block.left - c.pad[2], top = block.top - c.pad[1]
    cdef Py_ssize_t start = min(max(0, -left), block.wide)
    cdef Py_ssize_t stop = max(start, min(block.wide, x.size[4] - left))
    cdef Py_ssize_t d, h, z, y, channel, begin, end
    for d in range(c.kernel[0]):
        z = block.depth * c.stride[0] - c.pad[0] + d * c.dilation[0]
        for h in range(block.high):
            y = top + h
            begin, end = start, stop
            if z < 0 or z >= x.size[2] or y < 0 or y >= x.size[3]:
                begin = end = block.wide
            if begin > 0 or end < block.wide:
                for channel in range(c.channels):
                    memset(out + channel * plane * c.item, 0, <size_t>(begin * c.item))
                    memset(out + (channel * plane + end) * c.item, 0, <size_t>((block.wide - end) * c.item))
            if end > begin:
                c.kernels.transpose(
                    base + (z * x.stride[2] + y * x.stride[3] + (left + begin) * x.stride[4]) * c.item,
                    x.stride[4], x.stride[1], end - begin, c.channels, out + begin * c.item, plane,
                )
            out += block.wide * c.item


cdef void _filters(const Plan *plan, const Block *block, Py_ssize_t first, Py_ssize_t filters, const Py_ssize_t *a_taps,
                   const Py_ssize_t *b_taps, const char *planes, Py_ssize_t plane_bytes, char *sums) noexcept nogil:
    """Compute and store a tile's rows of filters for all pixels of a block."""
    cdef const Conv *c = &plan.c
    cdef int vectors = 8 if filters == 1 else 4 if filters <= FC_FLAT_ROWS else 2
    cdef Py_ssize_t width = vectors * c.kernels.lanes, pixel, channel, row
    cdef Py_ssize_t pixels = (block.rows - 1) * block.wide + block.columns
    cdef Py_ssize_t rows[16]
    cdef bint started
    cdef fc_reduction reduction
    for row in range(filters):
        rows[row] = (first + row) * c.w.stride[0]
    reduction.apart = 0
    reduction.taps = a_taps
    reduction.b_taps = b_taps
    reduction.n_taps = c.channels * c.kernel[0] * c.kernel[1] if plan.by_rows else c.taps
    reduction.a_step = c.w.stride[4] if plan.by_rows else c.w.stride[1]
    reduction.b_tap = 0
    reduction.b_step = c.dilation[2] if plan.by_rows else plane_bytes // c.item
    reduction.c_step = width
    for pixel from 0 <= pixel < pixels by width:
        started = start_sums(c, bias_at(plan.bias, first * c.item), filters, width, sums, width)
        for channel from 0 <= channel < c.channels by plan.together:
            reduction.depth = c.kernel[2] if plan.by_rows else min(plan.together, c.channels - channel)
            c.kernels.brgemm(
                &reduction, c.w.data + channel * c.w.stride[1] * c.item, rows, filters,
                planes + channel * plane_bytes + pixel * c.item, vectors, sums, started or channel > 0,
            )
        _store_tile(plan, block, first, filters, pixel, min(pixel + width, pixels), width, sums)


cdef void _store_tile(const Plan *plan, const Block *block, Py_ssize_t first, Py_ssize_t filters, Py_ssize_t pixel,
                      Py_ssize_t end, Py_ssize_t width, const char *sums) noexcept nogil:
    """Store a tile's sums, [filter][pixel], through the activation, row by row of the image."""
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    cdef fc_epilogue epilogue
    cdef Py_ssize_t row, column, run
    cdef char *base = y.data + (
        block.image * y.stride[0] + first * y.stride[1] + block.depth * y.stride[2]
        + block.top * y.stride[3] + block.left * y.stride[4]
    ) * c.item
    epilogue.bias = NULL
    epilogue.relu = plan.relu
    epilogue.pixel_stride = y.stride[1]  # the roles are exchanged: rows of the tile are filters
    epilogue.channel_stride = y.stride[4]
    while pixel < end:
        row = pixel // block.wide
        column = pixel % block.wide
        run = min(end - pixel, block.wide - column)
        if column < block.columns:
            c.kernels.epilogue(
                &epilogue, sums, width, filters, min(run, block.columns - column),
                base + (row * y.stride[3] + column * y.stride[4]) * c.item,
            )
        sums += run * c.item
        pixel += run
