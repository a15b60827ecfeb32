"""Convolution by way of patches: a matrix product of the weights, where they are, and what each pixel sees.

    output[k][p] = bias[k] + sum over r of  weight[k][r] * patches[r][p],    r = (channel, tap)

    for image, group, box of output pixels, share of the filters:       in parallel
        for block of the reduction:
            gather the patches, padding included                        [reduction][pixels]: L2
            for chunk of filters: for panel of pixels:                  the panel's share of the patches in L1
                for tile of filters: brgemm                             weights from L2; to the output, if lanes fit it
        store the sums: activation, the caller's layout

                  r                 panel
             +---------+         +---+---+---+             +---+---+---+
    filters  | weights |      r  |   |   |   |    filters  |   |   |   |
             |         |    x    |   |   |   |      =      |   |   |   |
             +---------+         +---+---+---+             +---+---+---+
                                     pixels                    pixels

Pixels are the lanes, so that neither the weights nor the output of a channels-first network are transposed: good where that
would cost as much as the products, with few channels (a network's first layer) and with 1x1 filters. Only the patches of one box
and one block exist at a time; the full column matrix never does.

The gradient of the input goes by way of columns where pixels are few (``input_columns``), elsewhere it is a convolution forward.
The gradient of the weights gathers the same patches: grad_weight[r][k] = sum over p of patches[r][p] * grad_output[p][k].
"""

import math

import numpy as np

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels import interleave
from fastconv.kernels.native.blocking cimport (
    Block, Conv, View, bias_at, ceil_div, divide, locate, make_conv, pack_bias, pack_pixels, panel_vectors, run_tasks,
    share_out, start_sums,
)
from fastconv.kernels.native.input_columns cimport input_by_columns
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, arena, fc_epilogue, fc_reduction, ukernels
from fastconv.kernels.native.weight_chunks cimport (
    WEIGHT_ROWS, WeightPlan, WeightTask, add_bias, end_task, plan_chunks, start_task, sum_chunks,
)

cdef enum:
    REDUCTION = 256     # rows of patches gathered at a time: a panel's share is 16 KB in float32, half of L1
    CHUNK = 96          # filters whose share of the weights, 96 KB in float32, stays in L2 from panel to panel
    BOX_PANELS = 8      # panels of pixels in a box
    PIXELS = 256        # that the gradient of 1x1 weights reduces over at a time: a panel's gradients are 16 KB, half of L1
    COLUMN_PIXELS = 256 # with no more, the gradient of the input goes by way of columns
    SHARE = 512         # filters whose sums a task keeps: 256 KB in float32


def conv_forward(input, weight, bias, output, dims, options):
    """See ``fastconv.kernels``."""
    rows = weight.reshape(*weight.shape[:2], -1)  # (K, C, taps): a copy, if taps are not evenly spaced
    if abs(rows.strides[2 if rows.shape[2] > 1 else 1]) != rows.itemsize:  # a filter's cells are no neighbours
        rows = _turned(rows) if rows.shape[2] == 1 and rows.strides[0] == rows.itemsize else np.ascontiguousarray(rows)
    _forward(input, weight, rows, bias, output, dims, options)


def conv_input_grad(grad_output, weight, bias, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    if math.prod(dims.output_size) <= COLUMN_PIXELS:
        input_by_columns(grad_output, weight, bias, grad_input, dims, options)
    else:
        interleave.input_grad(conv_forward, grad_output, weight, bias, grad_input, dims, options)


def conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options):
    """See ``fastconv.kernels``."""
    _weight_grad(input, grad_output, grad_weight, grad_bias, dims, options)


cdef cnp.ndarray _turned(cnp.ndarray weight):
    """Return 1x1 weights whose filters are neighbours, as HWIO has them, with the channels as neighbours."""
    cdef cnp.ndarray rows = np.empty_like(weight, order="C")
    cdef Py_ssize_t item = cnp.PyArray_ITEMSIZE(weight)
    cdef Py_ssize_t filters = cnp.PyArray_DIM(weight, 0), channels = cnp.PyArray_DIM(weight, 1)
    ukernels(item).transpose(
        cnp.PyArray_BYTES(weight), cnp.PyArray_STRIDE(weight, 1) // item, 1, channels, filters, cnp.PyArray_BYTES(rows),
        channels,
    )
    return rows


# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    const char *weights         # where the caller has them, (filter, channel, tap)
    Py_ssize_t filter_step, channel_step, tap_step
    Py_ssize_t pixels           # in a box: whole panels
    Py_ssize_t boxes            # of one plane
    Py_ssize_t together         # channels gathered at a time
    Py_ssize_t shares           # tasks that share the filters of one box
    const char *bias
    int relu


# A panel of pixels: where the sums of its filters are, rows of so many lanes that are ``step`` apart.
ctypedef struct Panel:
    char *sums
    Py_ssize_t width, step
    int vectors
    bint in_place               # in the output


cdef void plane(const Conv *c, Py_ssize_t index, Block *block) noexcept nogil:
    """Make a block of a whole output plane, number ``index`` of the batch."""
    block.image = index // c.out[0]
    block.depth = index % c.out[0]
    block.top = block.left = 0
    block.rows = c.out[1]
    block.columns = c.out[2]


cdef void join_rows(Conv *c) noexcept nogil:
    """Make one row of all rows where a pixel sees just the cell that has its place, and rows continue one another."""
    cdef int axis
    for axis in range(1, 3):
        if c.kernel[axis] != 1 or c.stride[axis] != 1 or c.x.size[2 + axis] != c.out[axis]:
            return
    if c.x.stride[3] == c.out[2] * c.x.stride[4] and c.y.stride[3] == c.out[2] * c.y.stride[4]:
        c.x.size[4] = c.y.size[4] = c.out[2] = c.out[1] * c.out[2]
        c.x.size[3] = c.y.size[3] = c.out[1] = 1


# --------------------------------------------------------------------------------------------------------- forward

cdef void _forward(cnp.ndarray input, cnp.ndarray weight, cnp.ndarray rows, bias, cnp.ndarray output, dims, options):
    cdef Plan plan
    cdef Conv *c = &plan.c
    cdef Py_ssize_t tasks, pixels
    make_conv(c, input, weight, output, dims, options)
    plan.weights = cnp.PyArray_BYTES(rows)
    plan.filter_step = cnp.PyArray_STRIDE(rows, 0) // c.item
    plan.channel_step = cnp.PyArray_STRIDE(rows, 1) // c.item
    plan.tap_step = cnp.PyArray_STRIDE(rows, 2) // c.item
    join_rows(c)
    pixels = c.out[1] * c.out[2]
    plan.boxes = ceil_div(pixels, BOX_PANELS * c.panel)
    plan.pixels = ceil_div(ceil_div(pixels, plan.boxes), c.panel) * c.panel  # even parts
    plan.boxes = ceil_div(pixels, plan.pixels)
    plan.together = min(c.channels, max(1, REDUCTION // c.taps))
    plan.bias = pack_bias(c, bias, arena(FC_ARENA_WEIGHTS, c.groups * c.filters * c.item))
    plan.relu = options.activation == "relu"
    tasks = c.batch * c.out[0] * c.groups * plan.boxes
    plan.shares = max(ceil_div(c.filters, SHARE), share_out(tasks, ceil_div(c.filters, CHUNK), c.threads))
    run_tasks(_forward_task, &plan, tasks * plan.shares, c.threads)


cdef int _forward_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t share = task % plan.shares, group = task // plan.shares % c.groups
    cdef Py_ssize_t number = task // (plan.shares * c.groups)
    cdef Py_ssize_t first_pixel = number % plan.boxes * plan.pixels
    cdef Py_ssize_t pixels = min(plan.pixels, c.out[1] * c.out[2] - first_pixel)
    cdef Py_ssize_t filters = c.filters * (share + 1) // plan.shares - c.filters * share // plan.shares
    cdef Py_ssize_t first = group * c.filters + c.filters * share // plan.shares
    cdef Py_ssize_t pitch = plan.pixels | c.kernels.lanes  # an odd number of vectors, or few sets of L1 hold all rows
    cdef Py_ssize_t offset_bytes = (filters + plan.together + 8) // 8 * 64
    cdef Py_ssize_t sum_bytes = filters * plan.pixels * c.item
    cdef char *memory = arena(
        FC_ARENA_BLOCK, offset_bytes + sum_bytes + (plan.together * c.taps * pitch + c.panel) * c.item
    )
    if memory == NULL:
        return 1
    cdef Py_ssize_t *rows = <Py_ssize_t *>memory
    cdef Py_ssize_t *channel_offsets = rows + filters
    cdef char *sums = memory + offset_bytes
    cdef char *patches = sums + sum_bytes
    cdef Block block
    cdef Panel panel
    cdef Py_ssize_t i, channel
    cdef bint started
    plane(c, number // plan.boxes, &block)
    for i in range(filters):
        rows[i] = (first + i) * plan.filter_step
    for i in range(plan.together):
        channel_offsets[i] = i * plan.channel_step
    started = plan.bias != NULL
    if started:
        for i from 0 <= i < pixels by c.panel:
            panel = _place(plan, &block, first, filters, first_pixel, pixels, i, sums)
            start_sums(c, bias_at(plan.bias, first * c.item), filters, panel.width, panel.sums, panel.step)
    for channel from 0 <= channel < c.channels by plan.together:
        i = min(plan.together, c.channels - channel)
        gather(c, &block, group * c.channels + channel, i, first_pixel, pixels, pitch, patches)
        _multiply(
            plan, &block, channel, i, first_pixel, pixels, pitch, rows, first, filters, channel_offsets, patches, sums,
            started or channel > 0,
        )
    _store(plan, &block, first, filters, first_pixel, pixels, sums)
    return 0


cdef Panel _place(const Plan *plan, const Block *block, Py_ssize_t first, Py_ssize_t filters, Py_ssize_t first_pixel,
                  Py_ssize_t pixels, Py_ssize_t pixel, char *sums) noexcept nogil:
    """Return the panel that starts at ``pixel`` of a box, two vectors or a last one: in the output, where its pixels are
    neighbours there, else in ``sums``, [panel][filter][pixel of the panel]."""
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    cdef Py_ssize_t row = (first_pixel + pixel) // block.columns, column = (first_pixel + pixel) % block.columns
    cdef Panel panel
    panel.vectors = 1 if pixels - pixel <= c.kernels.lanes else 2
    panel.width = panel.vectors * c.kernels.lanes
    panel.in_place = (
        pixel + panel.width <= pixels and y.stride[4] == 1
        and (column + panel.width <= block.columns or y.stride[3] == block.columns)
    )
    if panel.in_place:
        panel.step = y.stride[1]
        panel.sums = y.data + (
            block.image * y.stride[0] + first * y.stride[1] + block.depth * y.stride[2] + row * y.stride[3] + column
        ) * c.item
    else:
        panel.step = panel.width
        panel.sums = sums + pixel * filters * c.item
    return panel


cdef void _multiply(const Plan *plan, const Block *block, Py_ssize_t channel, Py_ssize_t channels, Py_ssize_t first_pixel,
                    Py_ssize_t pixels, Py_ssize_t pitch, const Py_ssize_t *rows, Py_ssize_t first, Py_ssize_t filters,
                    const Py_ssize_t *channel_offsets, const char *patches, char *sums, bint accumulate) noexcept nogil:
    """Add weights x patches of some channels to the sums of all panels."""
    cdef const Conv *c = &plan.c
    cdef const char *weights = plan.weights + channel * plan.channel_step * c.item
    cdef Py_ssize_t chunk, pixel
    cdef Panel panel
    cdef fc_reduction reduction
    reduction.apart = 0
    reduction.taps = channel_offsets
    reduction.b_taps = NULL
    reduction.n_taps = channels
    reduction.depth = c.taps
    reduction.a_step = plan.tap_step
    reduction.b_tap = c.taps * pitch
    reduction.b_step = pitch
    if c.taps == 1 or plan.channel_step == c.taps * plan.tap_step:  # channels continue one another: one run
        reduction.n_taps = 1
        reduction.depth = channels * c.taps
        reduction.a_step = plan.channel_step if c.taps == 1 else plan.tap_step
    for chunk from 0 <= chunk < filters by CHUNK:
        for pixel from 0 <= pixel < pixels by c.panel:
            panel = _place(plan, block, first, filters, first_pixel, pixels, pixel, sums)
            reduction.c_step = panel.step
            c.kernels.brgemm(
                &reduction, weights, rows + chunk, min(<Py_ssize_t>CHUNK, filters - chunk), patches + pixel * c.item,
                panel.vectors, panel.sums + chunk * panel.step * c.item, accumulate,
            )


cdef void _store(const Plan *plan, const Block *block, Py_ssize_t first, Py_ssize_t filters, Py_ssize_t first_pixel,
                 Py_ssize_t pixels, char *sums) noexcept nogil:
    """Store a box's sums through the activation, panel by panel and row by row of the image."""
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    cdef fc_epilogue epilogue
    cdef Py_ssize_t pixel, end, row, column, run, done
    cdef Panel panel
    cdef bint one_run = y.stride[3] == block.columns * y.stride[4]
    cdef char *base = y.data + (block.image * y.stride[0] + first * y.stride[1] + block.depth * y.stride[2]) * c.item
    epilogue.bias = NULL
    epilogue.relu = plan.relu
    epilogue.pixel_stride = y.stride[1]  # the roles are exchanged: rows of the tile are filters
    epilogue.channel_stride = y.stride[4]
    for pixel from 0 <= pixel < pixels by c.panel:
        panel = _place(plan, block, first, filters, first_pixel, pixels, pixel, sums)
        if panel.in_place and not plan.relu:
            continue
        end = min(pixel + c.panel, pixels)
        done = pixel
        while done < end:
            row = (first_pixel + done) // block.columns
            column = (first_pixel + done) % block.columns
            run = end - done if one_run else min(end - done, block.columns - column)
            c.kernels.epilogue(
                &epilogue, panel.sums + (done - pixel) * c.item, panel.step, filters, run,
                base + (row * y.stride[3] + column * y.stride[4]) * c.item,
            )
            done += run


cdef void gather(const Conv *c, const Block *block, Py_ssize_t channel, Py_ssize_t channels, Py_ssize_t first_pixel,
                 Py_ssize_t pixels, Py_ssize_t pitch, char *out) noexcept nogil:
    """Gather what some channels' taps show to some pixels of a plane, [channel][tap][pixel], run by run along image rows."""
    cdef Py_ssize_t run, row, column, d, h, w, done = 0
    cdef char *target
    while done < pixels:
        row = (first_pixel + done) // c.out[2]
        column = (first_pixel + done) % c.out[2]
        run = min(pixels - done, c.out[2] - column)
        target = out + done * c.item
        for d in range(c.kernel[0]):
            for h in range(c.kernel[1]):
                for w in range(c.kernel[2]):
                    _gather_run(c, block, channel, channels, d, row * c.stride[1] - c.pad[1] + h * c.dilation[1],
                                column * c.stride[2] - c.pad[2] + w * c.dilation[2], run, c.taps * pitch, target)
                    target += pitch * c.item
        done += run


cdef void _gather_run(const Conv *c, const Block *block, Py_ssize_t channel, Py_ssize_t channels, Py_ssize_t d, Py_ssize_t y,
                      Py_ssize_t left, Py_ssize_t run, Py_ssize_t pitch, char *out) noexcept nogil:
    """Gather one tap's cells for a run of pixels, zeros in the padding, to rows that are ``pitch`` apart."""
    cdef const View *x = &c.x
    cdef Py_ssize_t step = c.stride[2], z = block.depth * c.stride[0] - c.pad[0] + d * c.dilation[0], i
    cdef Py_ssize_t start = 0, stop = 0  # the pixels of the run that see a cell inside the image
    if 0 <= z < x.size[2] and 0 <= y < x.size[3] and left < x.size[4]:
        start = 0 if left >= 0 else min((step - 1 - left) // step, run)
        stop = max(start, run if left + (run - 1) * step < x.size[4] else (x.size[4] - 1 - left) // step + 1)
    if stop - start < run:
        for i in range(channels):
            memset(out + i * pitch * c.item, 0, <size_t>(run * c.item))
    if stop > start:
        c.kernels.transpose(
            x.data + (
                block.image * x.stride[0] + channel * x.stride[1] + z * x.stride[2] + y * x.stride[3]
                + (left + start * step) * x.stride[4]
            ) * c.item,
            step * x.stride[4], x.stride[1], stop - start, channels, out + start * c.item, pitch,
        )


# -------------------------------------------------------------------------------------------- gradient of the weights

cdef void _weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims, options):
    cdef WeightPlan plan
    cdef Conv *c = &plan.c
    make_conv(c, input, grad_weight, grad_output, dims, options)
    join_rows(c)
    if _in_place(c):
        c.chunk = PIXELS
    plan.width = max(1, min(c.channels, WEIGHT_ROWS // c.taps))
    plan.channel_blocks = 1
    divide(c, max(1, c.chunk // c.out[2]), min(c.chunk, c.out[2]), &plan.blocks)
    plan_chunks(&plan, c.batch * plan.blocks.count, grad_bias)
    run_tasks(_weight_task, &plan, plan.chunks * plan.tasks, c.threads)
    sum_chunks(&plan)


cdef bint _in_place(const Conv *c) noexcept nogil:
    """Whether a pixel sees one cell, never in the padding: then the patches are the image as the caller has it."""
    cdef int axis
    for axis in range(3):
        if c.kernel[axis] != 1 or c.pad[axis] != 0 or (c.out[axis] - 1) * c.stride[axis] >= c.x.size[2 + axis]:
            return False
    return True


cdef int _weight_task(const void *shared, Py_ssize_t task) noexcept nogil:
    """Reduce one chunk of the units, which are blocks of output pixels, for one task's channels and filters."""
    cdef const WeightPlan *plan = <const WeightPlan *>shared
    cdef const Conv *c = &plan.c
    cdef WeightTask t
    if start_task(plan, task, &t):
        return 1
    cdef bint in_place = _in_place(c)
    cdef Py_ssize_t channels = min(plan.width, c.channels - t.channel)
    cdef Py_ssize_t rows = c.taps * plan.width
    cdef Py_ssize_t offset_bytes = (rows + plan.blocks.rows + 8) // 8 * 64
    cdef Py_ssize_t patch_bytes = 0 if in_place else rows * c.chunk * c.item
    cdef char *memory = arena(FC_ARENA_BLOCK, offset_bytes + patch_bytes + c.panel * c.chunk * c.item)
    cdef Block block
    cdef Py_ssize_t unit, panel, m
    if memory == NULL:
        return 1
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory
    cdef Py_ssize_t *lines = offsets + rows
    cdef const char *patches = memory + offset_bytes
    cdef char *grads = memory + offset_bytes + patch_bytes
    cdef fc_reduction reduction
    reduction.apart = 0
    reduction.taps = lines
    reduction.b_taps = NULL
    for m in range(rows):  # accumulators are [tap][channel], patches [channel][tap]; missing channels repeat the last
        offsets[m] = (min(m % plan.width, channels - 1) * c.taps + m // plan.width) * (c.x.stride[1] if in_place else c.chunk)
    for m in range(plan.blocks.rows):
        lines[m] = m * c.stride[1] * c.x.stride[3] if in_place else 0
    for unit in range(t.first_unit, t.end_unit):
        locate(c, &plan.blocks, unit, &block)
        if in_place:
            reduction.n_taps, reduction.depth, reduction.a_step = block.rows, block.columns, c.stride[2] * c.x.stride[4]
            patches = _first_cell(c, &block, t.group * c.channels + t.channel)
        else:
            reduction.n_taps, reduction.depth, reduction.a_step = 1, block.rows * block.columns, 1
            gather(
                c, &block, t.group * c.channels + t.channel, channels, block.top * c.out[2] + block.left,
                block.rows * block.columns, c.chunk, memory + offset_bytes,
            )
        for panel in range(t.panels):
            _weight_panel(
                plan, &block, &t, panel, &reduction, offsets, patches, grads,
                t.accumulators + panel * c.panel * rows * c.item,
            )
    end_task(plan, &t)
    return 0


cdef const char *_first_cell(const Conv *c, const Block *block, Py_ssize_t channel) noexcept nogil:
    """Return where the first pixel of a block looks, without padding."""
    cdef const View *x = &c.x
    return x.data + (
        block.image * x.stride[0] + channel * x.stride[1] + block.depth * c.stride[0] * x.stride[2]
        + block.top * c.stride[1] * x.stride[3] + block.left * c.stride[2] * x.stride[4]
    ) * c.item


cdef void _weight_panel(const WeightPlan *plan, const Block *block, const WeightTask *t, Py_ssize_t panel,
                        fc_reduction *reduction, const Py_ssize_t *offsets, const char *patches, char *grads,
                        char *accumulators) noexcept nogil:
    """Add patches x gradients of the output for one panel and one block of pixels."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, t.panel + panel)
    cdef Py_ssize_t width = vectors * c.kernels.lanes, first = (t.panel + panel) * c.panel
    cdef Py_ssize_t rows = c.taps * plan.width, pixels = block.rows * block.columns
    pack_pixels(c, block, t.group * c.filters + first, min(width, c.filters - first), width, 0, pixels, grads)
    add_bias(plan, t, panel, grads, pixels)
    reduction.b_tap = reduction.depth * width
    reduction.b_step = width
    reduction.c_step = width
    c.kernels.brgemm(reduction, patches, offsets, rows, grads, vectors, accumulators, 1)
