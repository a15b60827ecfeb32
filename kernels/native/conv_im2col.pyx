"""Convolution by way of patches, for few channels: there a channel block is too short a reduction.

    output[p][k] = sum over r of  patches[r][p] * weight[r][k],    r = (channel, tap)

    for image, group, chunk of output pixels:               in parallel
        for block of the reduction:
            gather the patches, padding included            [reduction][pixels]: runs along image rows
            for panel of filters: for tile of pixels: brgemm
        store all panels of the chunk: bias, activation, the caller's layout

             pixels of a chunk                panel
            +-----------------+            +--------+
    block   |     patches     |  block  r  | weights|
    of r    +-----------------+            +--------+

Only the patches of one chunk and one block exist at a time; the full column matrix never does.

The gradient of the weights gathers the same patches: grad_weight[r][k] = sum over p of patches[r][p] * grad_output[p][k].
"""

cimport numpy as cnp
from cython.parallel cimport prange
from libc.string cimport memset

from fastconv.kernels import interleave
from fastconv.kernels.native.blocking cimport (
    Block, Conv, View, bias_at, make_conv, pack_bias, pack_pixels, pack_weights, packed_weight_size, panel_vectors, store,
)
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, arena, fc_reduction
from fastconv.kernels.native.weight_chunks cimport (
    WEIGHT_ROWS, WeightPlan, WeightTask, add_bias, end_task, plan_chunks, start_task, sum_chunks,
)

cdef enum:
    REDUCTION = 256     # rows of patches gathered at a time: with a panel's share of the weights they fit into L1 and L2


def conv_forward(input, weight, bias, output, dims, options):
    """See ``fastconv.kernels``."""
    _forward(input, weight, bias, output, dims, options)


def conv_input_grad(grad_output, weight, bias, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    interleave.input_grad(conv_forward, grad_output, weight, bias, grad_input, dims, options)


def conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options):
    """See ``fastconv.kernels``."""
    _weight_grad(input, grad_output, grad_weight, grad_bias, dims, options)


# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    Py_ssize_t plane_chunks     # chunks of the pixels of one depth
    const char *weights
    const char *bias
    int relu


cdef void plane(const Conv *c, Py_ssize_t index, Block *block) noexcept nogil:
    """Make a block of a whole output plane, number ``index`` of the batch."""
    block.image = index // c.out[0]
    block.depth = index % c.out[0]
    block.top = block.left = 0
    block.rows = c.out[1]
    block.columns = c.out[2]


# --------------------------------------------------------------------------------------------------------- forward

cdef void _forward(cnp.ndarray input, cnp.ndarray weight, bias, cnp.ndarray output, dims, options):
    cdef Plan plan
    cdef Conv *c = &plan.c
    cdef Py_ssize_t tasks, task, failures = 0
    make_conv(c, input, weight, output, dims, options)
    plan.plane_chunks = (c.out[1] * c.out[2] + c.chunk - 1) // c.chunk
    plan.weights = pack_weights(c)
    plan.bias = pack_bias(c, bias, <char *>plan.weights + c.groups * packed_weight_size(c) * c.item)
    plan.relu = options.activation == "relu"
    tasks = c.batch * c.out[0] * c.groups * plan.plane_chunks
    with nogil:
        for task in prange(tasks, num_threads=c.threads, schedule="dynamic"):
            failures += _forward_task(&plan, task)
    if failures:
        raise MemoryError("no memory for the workspace of a convolution")


cdef int _forward_task(const Plan *plan, Py_ssize_t task) noexcept nogil:
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t first_pixel = task % plan.plane_chunks * c.chunk
    cdef Py_ssize_t group = task // plan.plane_chunks % c.groups
    cdef Py_ssize_t pixels = min(c.chunk, c.out[1] * c.out[2] - first_pixel)
    cdef Py_ssize_t depth = min(<Py_ssize_t>REDUCTION, c.reduction)
    cdef Py_ssize_t offset_bytes = (c.chunk + 8) // 8 * 64
    cdef Py_ssize_t panel_bytes = c.chunk * c.panel * c.item
    cdef char *memory = arena(FC_ARENA_BLOCK, offset_bytes + c.panels * panel_bytes + depth * c.chunk * c.item)
    cdef Block block
    cdef Py_ssize_t p, first, panel, filter, width
    if memory == NULL:
        return 1
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory
    cdef char *accumulators = memory + offset_bytes
    cdef char *patches = accumulators + c.panels * panel_bytes
    plane(c, task // (plan.plane_chunks * c.groups), &block)
    for p in range(pixels):
        offsets[p] = p
    for first from 0 <= first < c.reduction by depth:
        gather(c, &block, group, first, min(depth, c.reduction - first), first_pixel, pixels, patches)
        for panel in range(c.panels):
            _multiply(plan, group, panel, first, min(depth, c.reduction - first), pixels, offsets, patches,
                      accumulators + panel * panel_bytes)
    for panel in range(c.panels):
        filter = group * c.filters + panel * c.panel
        width = panel_vectors(c, panel) * c.kernels.lanes
        store(
            c, &block, first_pixel, pixels, accumulators + panel * panel_bytes, width, filter,
            min(width, c.filters - panel * c.panel), bias_at(plan.bias, filter * c.item), plan.relu,
        )
    return 0


cdef void _multiply(const Plan *plan, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t first, Py_ssize_t depth,
                    Py_ssize_t pixels, const Py_ssize_t *offsets, const char *patches, char *accumulators) noexcept nogil:
    """Add patches x weights for one panel and one block of the reduction."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, panel), tile_rows = c.kernels.tile_rows
    cdef Py_ssize_t width = vectors * c.kernels.lanes, m, zero = 0
    cdef const char *weights = plan.weights + (
        group * packed_weight_size(c) + panel * c.panel * c.reduction + first * width
    ) * c.item
    cdef fc_reduction reduction
    reduction.taps = &zero
    reduction.n_taps = 1
    reduction.depth = depth
    reduction.a_step = c.chunk
    reduction.b_taps = NULL
    reduction.b_tap = 0
    reduction.b_step = width
    for m from 0 <= m < pixels by tile_rows:
        c.kernels.brgemm(
            &reduction, patches, offsets + m, <int>min(tile_rows, pixels - m), weights, vectors,
            accumulators + m * width * c.item, first > 0,
        )


cdef void gather(const Conv *c, const Block *block, Py_ssize_t group, Py_ssize_t first, Py_ssize_t count,
                 Py_ssize_t first_pixel, Py_ssize_t pixels, char *out) noexcept nogil:
    """Gather rows ``first`` to ``first + count`` of the patches of some pixels of a plane: [count][chunk]."""
    cdef Py_ssize_t run, row, column, end = first_pixel + pixels
    while first_pixel < end:  # run by run along the output rows
        row = first_pixel // block.columns
        column = first_pixel % block.columns
        run = min(end - first_pixel, block.columns - column)
        gather_run(c, block, group, first, count, row, column, run, out)
        out += run * c.item
        first_pixel += run


cdef void gather_run(const Conv *c, const Block *block, Py_ssize_t group, Py_ssize_t first, Py_ssize_t count,
                     Py_ssize_t row, Py_ssize_t column, Py_ssize_t run, char *out) noexcept nogil:
    """Gather what (channel, tap) number ``first`` and the following show to a run of pixels, zeros in the padding."""
    cdef const View *x = &c.x
    cdef Py_ssize_t step = c.stride[2], r, z, y, left, start, stop
    cdef Py_ssize_t channel = group * c.channels + first // c.taps
    cdef Py_ssize_t d = first % c.taps // (c.kernel[1] * c.kernel[2])
    cdef Py_ssize_t h = first // c.kernel[2] % c.kernel[1]
    cdef Py_ssize_t w = first % c.kernel[2]
    cdef const char *image = x.data + block.image * x.stride[0] * c.item
    for r in range(count):
        z = block.depth * c.stride[0] - c.pad[0] + d * c.dilation[0]
        y = row * c.stride[1] - c.pad[1] + h * c.dilation[1]
        left = column * step - c.pad[2] + w * c.dilation[2]
        start = stop = 0  # the pixels of the run that see a cell inside the image
        if 0 <= z < x.size[2] and 0 <= y < x.size[3] and left < x.size[4]:
            start = 0 if left >= 0 else min((step - 1 - left) // step, run)
            stop = max(start, run if left + (run - 1) * step < x.size[4] else (x.size[4] - 1 - left) // step + 1)
        if start > 0:
            memset(out, 0, <size_t>(start * c.item))
        if stop > start:
            c.kernels.transpose(
                image + (
                    channel * x.stride[1] + z * x.stride[2] + y * x.stride[3] + (left + start * step) * x.stride[4]
                ) * c.item,
                step * x.stride[4], 0, stop - start, 1, out + start * c.item, 0,
            )
        if stop < run:
            memset(out + stop * c.item, 0, <size_t>((run - stop) * c.item))
        out += c.chunk * c.item
        w += 1
        if w == c.kernel[2]:
            w = 0
            h += 1
            if h == c.kernel[1]:
                h = 0
                d += 1
                if d == c.kernel[0]:
                    d = 0
                    channel += 1


# -------------------------------------------------------------------------------------------- gradient of the weights

cdef void _weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims, options):
    cdef WeightPlan plan
    cdef Conv *c = &plan.c
    cdef Py_ssize_t task, failures = 0
    make_conv(c, input, grad_weight, grad_output, dims, options)
    plan.width = max(1, min(c.channels, WEIGHT_ROWS // c.taps))
    plan.channel_blocks = 1
    plan.blocks.count = (c.out[1] * c.out[2] + c.chunk - 1) // c.chunk
    plan_chunks(&plan, c.batch * c.out[0] * plan.blocks.count, grad_bias)
    with nogil:
        for task in prange(plan.chunks * plan.tasks, num_threads=c.threads, schedule="dynamic"):
            failures += _weight_task(&plan, task)
    sum_chunks(&plan, failures)


cdef int _weight_task(const WeightPlan *plan, Py_ssize_t task) noexcept nogil:
    """Reduce one chunk of the units, which are runs of output pixels, for one task's channels and filters."""
    cdef const Conv *c = &plan.c
    cdef WeightTask t
    if start_task(plan, task, &t):
        return 1
    cdef Py_ssize_t channels = min(plan.width, c.channels - t.channel)
    cdef Py_ssize_t rows = c.taps * plan.width
    cdef Py_ssize_t offset_bytes = (rows + 8) // 8 * 64
    cdef Py_ssize_t patch_bytes = rows * c.chunk * c.item
    cdef char *memory = arena(FC_ARENA_BLOCK, offset_bytes + patch_bytes + c.panel * c.chunk * c.item)
    cdef Block block
    cdef Py_ssize_t unit, panel, first_pixel, pixels, m
    if memory == NULL:
        return 1
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory
    cdef char *patches = memory + offset_bytes
    cdef char *grads = patches + patch_bytes
    for m in range(rows):  # accumulators are [tap][channel], patches [channel][tap]; missing channels repeat the last
        offsets[m] = (min(m % plan.width, channels - 1) * c.taps + m // plan.width) * c.chunk
    for unit in range(t.first_unit, t.end_unit):
        plane(c, unit // plan.blocks.count, &block)
        first_pixel = unit % plan.blocks.count * c.chunk
        pixels = min(c.chunk, block.rows * block.columns - first_pixel)
        gather(c, &block, t.group, t.channel * c.taps, channels * c.taps, first_pixel, pixels, patches)
        for panel in range(t.panels):
            _weight_panel(
                plan, &block, &t, panel, first_pixel, pixels, offsets, patches, grads,
                t.accumulators + panel * c.panel * rows * c.item,
            )
    end_task(plan, &t)
    return 0


cdef void _weight_panel(const WeightPlan *plan, const Block *block, const WeightTask *t, Py_ssize_t panel,
                        Py_ssize_t first_pixel, Py_ssize_t pixels, const Py_ssize_t *offsets, const char *patches,
                        char *grads, char *accumulators) noexcept nogil:
    """Add patches x gradients of the output for one panel and one run of pixels."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, t.panel + panel), tile_rows = c.kernels.tile_rows
    cdef Py_ssize_t width = vectors * c.kernels.lanes, first = (t.panel + panel) * c.panel
    cdef Py_ssize_t rows = c.taps * plan.width, m, zero = 0
    cdef fc_reduction reduction
    reduction.taps = &zero
    reduction.n_taps = 1
    reduction.depth = pixels
    reduction.a_step = 1
    reduction.b_taps = NULL
    reduction.b_tap = 0
    reduction.b_step = width
    pack_pixels(
        c, block, t.group * c.filters + first, min(width, c.filters - first), width, first_pixel, pixels, grads
    )
    add_bias(plan, t, panel, grads, pixels)
    for m from 0 <= m < rows by tile_rows:
        c.kernels.brgemm(
            &reduction, patches, offsets + m, <int>min(tile_rows, rows - m), grads, vectors,
            accumulators + m * width * c.item, 1,
        )
