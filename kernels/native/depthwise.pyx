"""Depthwise convolution where channels are neighbours: vectors of them, tap by tap.

    output[p][c] = sum over taps t of  image[p * stride + t * dilation][c] * weight[t][c]

A channels-last image is read where it is:

    for rows of output pixels:                             in parallel
        for pixel: sums over the taps that are inside the image        in registers
        bias, activation

Where neighbouring pixels see neighbouring cells, a cell is loaded once for all taps of a row. Else pixels that see the same columns of taps
are taken together: those of the interior; one at the border is alone.

The gradient of its input is computed alike, from the gradient of the output: cells a stride apart are a class, and see the same windows.

Of others, a block of channels at a time is packed to be so:

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
    CHANNELS, DEPTHWISE_BYTES, Block, Blocks, Conv, View, bias_at, ceil_div, cut, locate, make_conv, pack_bias, pack_image, part_cells,
    pixel_offsets, round_up, run_tasks, store, tap_offsets,
)
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_DEPTHWISE_PIXELS, arena, fc_depthwise

cdef enum:
    TASK_PRODUCTS = 65_536      # at least: fewer are not worth a task of their own
    SEEN = 25                   # taps, at most, each of which loads a cell, for the image not to be worth packing
    FEW = 9                     # taps, at most, of which pixels at the border, one by one, don't take longer than packing

# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    bint backward               # in place: whether c.x is the gradient of the output and c.y that of the input
    Py_ssize_t classes[3]       # pixels so far apart along an axis see their cells alike ...
    Py_ssize_t step[3]          # ... so far apart
    Py_ssize_t rows, task_rows  # of pixels in all, of a task
    const Py_ssize_t *pixels    # the first cells of the pixels of a class in a row; packed: of a whole block, ...
    const Py_ssize_t *taps      # ... and where its taps are, and their weights
    Blocks blocks               # packed
    Py_ssize_t channel_blocks
    const char *weights         # packed
    const char *bias
    int relu

# Some pixels of a row, and one class: the first of them and how many; how many taps they see, if they see the same, but for how far the
# first one looks beyond the image, and the last one.
ctypedef struct Columns:
    Py_ssize_t residue, first, count, before, after
    int wide


def conv_forward(input, weight, bias, output, dims, options):
    """See ``fastconv.kernels``."""
    multiplier = weight.shape[0] // dims.groups
    for j in range(multiplier):  # filters j, j + multiplier, ... are one filter for each channel
        part = None if bias is None else bias[j::multiplier]
        _convolve(input, weight[j::multiplier], part, output[:, j::multiplier], dims, options)


def gradient_in_place(grad_output, weight, grad_input, dims, options):
    """Whether ``conv_input_grad`` had better do it."""
    cdef Conv c
    if weight.shape[0] != dims.groups:
        return False
    make_conv(&c, grad_output, weight, grad_input, dims, options)
    return _suits_in_place(&c)


cdef bint _suits_in_place(const Conv *c) noexcept nogil:
    """Whether images are channels-last, and their cells, apart as they are, not loaded so often that packing them pays. (Measured.)"""
    return c.groups >= c.kernels.lanes and rows_in_place(c) and (loads_once(c) or c.taps <= SEEN)


cdef bint rows_in_place(const Conv *c) noexcept nogil:
    """Whether images are channels-last, and most of a row's pixels are computed at once. (Measured.)"""
    cdef bint last = c.x.stride[1] == 1 and c.y.stride[1] == 1
    return last and (c.taps <= FEW or c.out[2] >= FC_DEPTHWISE_PIXELS)


cdef bint loads_once(const Conv *c) noexcept nogil:
    """Whether there is a microkernel that loads a cell once for all taps of a row."""
    cdef bint neighbours = c.stride[2] == c.dilation[2] == 1 and c.out[2] >= FC_DEPTHWISE_PIXELS
    return neighbours and (c.kernel[2] == 3 or c.kernel[2] == 5 or c.kernel[2] == 7)


def conv_input_grad(grad_output, weight, bias, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    cdef Plan plan
    make_conv(&plan.c, grad_output, weight, grad_input, dims, options)
    plan.relu = options.activation == "relu"
    plan.backward = True
    _convolve_in_place(&plan, bias)


cdef void _convolve(cnp.ndarray input, cnp.ndarray weight, bias, cnp.ndarray output, dims, options):
    """One filter for each channel: weight (C, 1, ...), output (N, C, ...)."""
    cdef Plan plan
    cdef Conv *c = &plan.c
    make_conv(c, input, weight, output, dims, options)
    plan.relu = options.activation == "relu"
    plan.backward = False
    if _suits_in_place(c):
        _convolve_in_place(&plan, bias)
    else:
        _convolve_blocks(&plan, bias)


# -------------------------------------------------------------------------------------------------------- in place

cdef void _convolve_in_place(Plan *plan, bias) except *:
    """Convolve channels-last images where they are."""
    cdef Conv *c = &plan.c
    cdef Py_ssize_t list_bytes = round_up(c.out[2] * <Py_ssize_t>sizeof(Py_ssize_t), 64), x
    cdef char *memory = arena(FC_ARENA_WEIGHTS, list_bytes + c.groups * (c.taps + 1) * c.item)
    cdef int axis
    if memory == NULL:
        raise MemoryError("no memory for packed weights")
    for axis in range(3):
        plan.classes[axis] = c.stride[axis] if plan.backward else 1
        plan.step[axis] = 1 if plan.backward else c.stride[axis]
    for x in range(c.out[2]):
        (<Py_ssize_t *>memory)[x] = x * plan.step[2] * c.x.stride[4]
    plan.pixels = <Py_ssize_t *>memory
    _pack(c, 0, c.groups, c.groups, memory + list_bytes)
    plan.weights = memory + list_bytes
    plan.bias = pack_bias(c, bias, memory + list_bytes + c.groups * c.taps * c.item)
    plan.rows = c.batch * c.out[0] * c.out[1]
    plan.task_rows = 1 + TASK_PRODUCTS // (c.out[2] * c.groups * c.taps)
    run_tasks(_rows_task, plan, ceil_div(plan.rows, plan.task_rows), c.threads)


cdef int _rows_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t *taps = <Py_ssize_t *>arena(FC_ARENA_BLOCK, 2 * c.taps * <Py_ssize_t>sizeof(Py_ssize_t))
    cdef Py_ssize_t row
    for row in range(task * plan.task_rows, min(task * plan.task_rows + plan.task_rows, plan.rows)):
        if loads_once(c):
            _convolve_row(plan, row, taps)
        else:
            _convolve_classes(plan, row, taps)
    return 0


cdef void _convolve_row(const Plan *plan, Py_ssize_t row, Py_ssize_t *taps) noexcept nogil:
    """Compute all pixels of a row at once."""
    cdef const Conv *c = &plan.c
    cdef Columns columns
    cdef Py_ssize_t first = c.pad[2] - c.kernel[2] + 1 if plan.backward else -c.pad[2]
    columns.residue, columns.first, columns.count, columns.wide = 0, 0, c.out[2], <int>c.kernel[2]
    columns.before = max(<Py_ssize_t>0, -first)
    columns.after = max(<Py_ssize_t>0, c.out[2] + first + c.kernel[2] - 1 - c.x.size[4])
    _convolve_columns(plan, row, &columns, taps)


cdef void _convolve_classes(const Plan *plan, Py_ssize_t row, Py_ssize_t *taps) noexcept nogil:
    """Compute the pixels of a row class by class, those at the border one by one."""
    cdef const Conv *c = &plan.c
    cdef Columns inner, border
    cdef Py_ssize_t residue, x
    border.count, border.wide, border.before, border.after = 1, 0, 0, 0
    for residue in range(min(plan.classes[2], c.out[2])):
        _find_interior(plan, residue, &inner)
        if inner.count:
            _convolve_columns(plan, row, &inner, taps)
        border.residue = residue
        for x in range(ceil_div(c.out[2] - residue, plan.classes[2]) - inner.count):
            border.first = x if x < inner.first else x + inner.count
            _convolve_columns(plan, row, &border, taps)


cdef bint _sees(const Plan *plan, int axis, Py_ssize_t residue, Py_ssize_t t, Py_ssize_t *shift) noexcept nogil:
    """Whether a class of pixels has tap ``t``; how far it is from ``step`` times the pixel's number in the class."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t distance = t * c.dilation[axis] - c.pad[axis]
    shift[0] = (residue - distance) // c.stride[axis] if plan.backward else distance
    return not plan.backward or (residue - distance) % c.stride[axis] == 0


cdef bint _sees_cell(const Plan *plan, int axis, Py_ssize_t pixel, Py_ssize_t t, Py_ssize_t *cell) noexcept nogil:
    """Whether a pixel sees a cell of the image by tap ``t``, and which."""
    if not _sees(plan, axis, pixel % plan.classes[axis], t, cell):
        return False
    cell[0] += pixel // plan.classes[axis] * plan.step[axis]
    return 0 <= cell[0] < plan.c.x.size[2 + axis]


cdef void _find_interior(const Plan *plan, Py_ssize_t residue, Columns *inner) noexcept nogil:
    """Find the pixels of a class whose taps are all inside the image."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t t, shift, first = 0, last = ceil_div(c.out[2] - residue, plan.classes[2])
    inner.residue, inner.wide, inner.before, inner.after = residue, 0, 0, 0
    for t in range(c.kernel[2]):
        if _sees(plan, 2, residue, t, &shift):
            inner.wide += 1
            first = max(first, ceil_div(max(<Py_ssize_t>0, -shift), plan.step[2]))
            last = min(last, ceil_div(max(<Py_ssize_t>0, c.x.size[4] - shift), plan.step[2]))
    inner.first = min(first, last)
    inner.count = last - inner.first


cdef void _convolve_columns(const Plan *plan, Py_ssize_t row, const Columns *columns, Py_ssize_t *taps) noexcept nogil:
    """Compute some pixels of a row."""
    cdef const Conv *c = &plan.c
    cdef const View *x = &c.x
    cdef const View *y = &c.y
    cdef Py_ssize_t image = row // (c.out[0] * c.out[1]), depth = row // c.out[1] % c.out[0], high = row % c.out[1]
    cdef char *out = y.data + (
        image * y.stride[0] + depth * y.stride[2] + high * y.stride[3]
        + (columns.first * plan.classes[2] + columns.residue) * y.stride[4]
    ) * c.item
    cdef fc_depthwise seen
    _list_taps(plan, depth, high, columns, taps, &seen)
    seen.wide, seen.channels, seen.before, seen.after = columns.wide, c.groups, columns.before, columns.after
    seen.cell, seen.out_step = x.stride[4], plan.classes[2] * y.stride[4]
    seen.bias, seen.relu = plan.bias, plan.relu
    c.kernels.depthwise(
        &seen, x.data + image * x.stride[0] * c.item, plan.pixels + columns.first, columns.count, plan.weights, out
    )


cdef void _list_taps(const Plan *plan, Py_ssize_t depth, Py_ssize_t high, const Columns *columns, Py_ssize_t *taps,
                     fc_depthwise *seen) noexcept nogil:
    """List the taps of some pixels that are inside the image, for the first of them or another, in the order of their cells."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t *weights = taps + c.taps
    cdef Py_ssize_t i, j, k, d, h, w, z, y, x, first = columns.first * plan.step[2], n = 0
    for i in range(c.kernel[0]):
        d = c.kernel[0] - 1 - i if plan.backward else i
        if not _sees_cell(plan, 0, depth, d, &z):
            continue
        for j in range(c.kernel[1]):
            h = c.kernel[1] - 1 - j if plan.backward else j
            if not _sees_cell(plan, 1, high, h, &y):
                continue
            for k in range(c.kernel[2]):
                w = c.kernel[2] - 1 - k if plan.backward else k
                if _sees(plan, 2, columns.residue, w, &x) and (columns.before + columns.after or 0 <= x + first < c.x.size[4]):
                    taps[n] = z * c.x.stride[2] + y * c.x.stride[3] + x * c.x.stride[4]
                    weights[n] = ((d * c.kernel[1] + h) * c.kernel[2] + w) * c.groups
                    n += 1
    seen.taps, seen.weights, seen.n_taps = taps, weights, n


# ---------------------------------------------------------------------------------------------------------- packed

cdef void _convolve_blocks(Plan *plan, bias) except *:
    """Convolve blocks of channels that are packed."""
    cdef Conv *c = &plan.c
    cdef Py_ssize_t b, weight_bytes
    cdef char *weights
    cdef Block block
    plan.channel_blocks = (c.groups + CHANNELS - 1) // CHANNELS
    cut(c, CHANNELS * c.item, DEPTHWISE_BYTES, c.out[2], &plan.blocks)
    locate(c, &plan.blocks, 0, &block)
    weight_bytes = plan.channel_blocks * CHANNELS * (c.taps + 1) * c.item
    weights = arena(FC_ARENA_WEIGHTS, weight_bytes + _offsets_size(c, &block) * <Py_ssize_t>sizeof(Py_ssize_t))
    if weights == NULL:
        raise MemoryError("no memory for packed weights")
    for b in range(plan.channel_blocks):
        _pack(c, b * CHANNELS, min(<Py_ssize_t>CHANNELS, c.groups - b * CHANNELS), CHANNELS, weights + b * CHANNELS * c.taps * c.item)
    plan.weights = weights
    plan.bias = pack_bias(c, bias, weights + plan.channel_blocks * CHANNELS * c.taps * c.item)
    plan.taps = _list_offsets(c, &block, <Py_ssize_t *>(weights + weight_bytes))
    plan.pixels = plan.taps + 2 * c.taps
    run_tasks(_task, plan, c.batch * plan.blocks.count * plan.channel_blocks, c.threads)


cdef Py_ssize_t _offsets_size(const Conv *c, const Block *block) noexcept nogil:
    return 2 * c.taps + block.rows * block.columns


cdef const Py_ssize_t *_list_offsets(const Conv *c, const Block *block, Py_ssize_t *offsets) noexcept nogil:
    """List where the taps of a block are, their weights, and its pixels."""
    cdef Py_ssize_t t
    tap_offsets(c, block, CHANNELS, offsets)
    for t in range(c.taps):
        offsets[c.taps + t] = t * CHANNELS
    pixel_offsets(c, block, CHANNELS, offsets + 2 * c.taps)
    return offsets


cdef void _pack(const Conv *c, Py_ssize_t first, Py_ssize_t count, Py_ssize_t width, char *out) noexcept nogil:
    """Pack filters of some channels to [tap][channel], missing channels as zeros."""
    cdef const View *w = &c.w
    cdef Py_ssize_t rows = c.kernel[1], run = c.kernel[2], d, h
    if w.stride[3] == run * w.stride[4]:  # rows continue one another
        rows, run = 1, run * rows
    if count < width:
        memset(out, 0, <size_t>(c.taps * width * c.item))
    for d in range(c.kernel[0]):
        for h in range(rows):
            c.kernels.transpose(
                w.data + (first * w.stride[0] + d * w.stride[2] + h * w.stride[3]) * c.item, w.stride[0], w.stride[4], count,
                run, out, width,
            )
            out += run * width * c.item


cdef int _task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t first = task % plan.channel_blocks * CHANNELS
    cdef Py_ssize_t channels = min(<Py_ssize_t>CHANNELS, c.groups - first)
    cdef Block block
    locate(c, &plan.blocks, task // plan.channel_blocks, &block)

    cdef bint whole = block.rows == plan.blocks.rows and block.columns == plan.blocks.columns
    cdef Py_ssize_t pixels = block.rows * block.columns
    cdef Py_ssize_t offset_bytes = 0 if whole else round_up(_offsets_size(c, &block) * <Py_ssize_t>sizeof(Py_ssize_t), 64)
    cdef Py_ssize_t chunk_bytes = c.chunk * CHANNELS * c.item
    cdef char *memory = arena(
        FC_ARENA_BLOCK, offset_bytes + chunk_bytes + CHANNELS * part_cells(c, block.rows, block.columns) * c.item
    )
    if memory == NULL:
        return 1
    cdef char *accumulators = memory + offset_bytes
    cdef char *part = accumulators + chunk_bytes
    cdef const Py_ssize_t *taps = plan.taps if whole else _list_offsets(c, &block, <Py_ssize_t *>memory)
    cdef const Py_ssize_t *offsets = taps + 2 * c.taps
    cdef const char *bias = bias_at(plan.bias, first * c.item)
    cdef Py_ssize_t p, count
    cdef fc_depthwise seen
    seen.taps, seen.weights, seen.n_taps, seen.wide = taps, taps + c.taps, c.taps, <int>c.kernel[2]
    seen.channels = seen.cell = seen.out_step = CHANNELS
    seen.bias, seen.relu, seen.before, seen.after = NULL, False, 0, 0
    pack_image(c, &block, first, channels, CHANNELS, part)
    for p from 0 <= p < pixels by c.chunk:
        count = min(c.chunk, pixels - p)
        c.kernels.depthwise(&seen, part, offsets + p, count, plan.weights + first * c.taps * c.item, accumulators)
        store(c, &block, p, count, accumulators, CHANNELS, first, channels, bias, plan.relu)
    return 0
