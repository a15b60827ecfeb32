"""The gradient of the weights by ``conv_planar``: neighbouring pixels are the lanes here, too, so that nothing is turned.

    grad_weight[k][i][t] = sum over rows, x of  grad_output[k][row][x] * planes[i][row * stride + rows of t][x + columns of t]

    for chunk of all images' units, some filters:               in parallel
        for unit of some rows: copy the planes that it sees
            for tile of filters and taps: for row, vector of pixels

                     pixels of a row                        lanes
                +--------------------+                  +-----------+
    6 filters   | gradients, where   |    x  4 taps     | 24 sums,  |
                | they are           |          =       | vectors   |
                +--------------------+                  +-----------+

A sum is a vector until its lanes are added up at the end. Gradients are read where they are, and so is the image if filters are of 1x1.
The gradient of the bias is the weight of a plane of ones. Where the machine has a tile that multiplies pieces of numbers, long sums are left to ``weight_taps``.
"""

cimport numpy as cnp
from libc.stdint cimport uintptr_t
from libc.string cimport memset

from fastconv.kernels.native.blocking cimport (
    Block, Conv, View, ceil_div, divide, extent, locate, make_conv, round_up, run_tasks, taps_continue,
)
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, arena, fc_epilogue, fc_planes
from fastconv.kernels.native.patches cimport join_rows, sees_one_cell
from fastconv.kernels.native.planes cimport SPLIT_PRODUCTS, Plan, lay_out, pad_planes, write_taps
from fastconv.kernels.native.weight_taps cimport taps_weight_grad

from fastconv.kernels.native.weight_direct import conv_weight_grad as turned_weight_grad
from fastconv.kernels.native.weight_im2col import conv_weight_grad as patches_weight_grad

cdef enum:
    UNIT_PIXELS = 1 << 10       # of a unit: the gradients of some filters are in L1
    UNIT_BYTES = 1 << 21        # of the planes that it sees, at most: what has more is left to other algorithms
    SUM_BYTES = 3 << 18         # of sums, each a vector, that a task has: they stay in L2
    CHUNK_PIXELS = 1 << 12      # of a chunk of the reduction, at least: adding up the lanes takes as long as a few hundred
    FAR_BYTES = 1 << 20         # of gradients: more come from beyond L2, and had better be fetched early
    CHUNKS = 16                 # for all tasks of a chunk together


# What all tasks of one call share: some groups, or some filters of one group, in one fixed chunk of the units of all images.
ctypedef struct WeightPlan:
    Plan base
    bint as_it_lies             # planes are the image's
    Py_ssize_t n_taps           # of all channels
    Py_ssize_t sums             # of a filter: one more if the gradient of the bias is wanted
    Py_ssize_t filters          # of a task, ...
    Py_ssize_t parts            # tasks of a chunk and group, or groups
    Py_ssize_t group_tasks
    Py_ssize_t units, chunks
    Py_ssize_t chunk_bytes
    char *totals                # [chunk][filter][sum]


def conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options):
    """See ``fastconv.kernels``."""
    near = input.strides[4] == input.itemsize and grad_output.strides[4] == input.itemsize
    done = near and taps_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options)
    if not done and not (near and _weight_grad(input, grad_output, grad_weight, grad_bias, dims, options)):
        other = turned_weight_grad if dims.depthwise or dims.reduction >= SPLIT_PRODUCTS else patches_weight_grad
        other(input, grad_output, grad_weight, grad_bias, dims, options)


cdef bint _weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims, options) except *:
    """Compute the gradients, unless a unit sees too much; return whether."""
    cdef WeightPlan plan
    cdef Conv *c = &plan.base.c
    make_conv(c, input, grad_weight, grad_output, dims, options)
    plan.base.one = False
    plan.base.together = c.channels
    plan.as_it_lies = sees_one_cell(c) and c.stride[1] == c.stride[2] == 1 and <uintptr_t>c.x.data % c.item == 0
    if plan.as_it_lies:
        join_rows(c)
        plan.as_it_lies = grad_bias is None or c.out[1] == 1  # else rows are where packed ones aren't
    divide(c, max(1, UNIT_PIXELS // c.out[2]), min(c.out[2], UNIT_PIXELS), &plan.base.blocks)
    plan.base.high = extent(c, 1, plan.base.blocks.rows)
    lay_out(&plan.base)
    if plan.as_it_lies:
        plan.base.planes.cell_row = c.x.stride[3]
    elif c.channels * plan.base.plane * c.item > UNIT_BYTES:
        return False
    plan.n_taps = c.channels * c.taps
    plan.sums = plan.n_taps + (grad_bias is not None)
    _share_weights(&plan)
    run_tasks(_weight_task, &plan, plan.chunks * plan.group_tasks * plan.parts, c.threads)
    _store_weights(&plan, grad_bias)
    return True


cdef void _share_weights(WeightPlan *plan) except *:
    """Share out filters, which the bits don't depend on, and chunks, which depend on the shape alone."""
    cdef Conv *c = &plan.base.c
    cdef Py_ssize_t row_bytes = plan.sums * c.kernels.lanes * c.item, pixels = c.batch * c.out[0] * c.out[1] * c.out[2]
    plan.filters = max(<Py_ssize_t>1, min(c.filters, SUM_BYTES // row_bytes))
    plan.parts = ceil_div(c.filters, plan.filters)
    plan.group_tasks = min(c.groups, <Py_ssize_t>CHUNKS)
    plan.filters = ceil_div(c.filters, plan.parts)  # even parts
    plan.units = c.batch * plan.base.blocks.count
    plan.chunks = max(<Py_ssize_t>1, min(min(plan.units, pixels // CHUNK_PIXELS), CHUNKS // (plan.parts * plan.group_tasks)))
    if c.threads > 1 and plan.chunks * plan.group_tasks * plan.parts < 2 * c.threads:
        plan.parts = min(c.filters, plan.parts * 2 * c.threads)
        plan.filters = ceil_div(c.filters, plan.parts)
        plan.parts = ceil_div(c.filters, plan.filters)
    plan.chunk_bytes = round_up(c.groups * c.filters * plan.sums, c.kernels.lanes) * c.item
    plan.totals = arena(FC_ARENA_WEIGHTS, plan.chunks * plan.chunk_bytes)
    if plan.totals == NULL:
        raise MemoryError("no memory for the gradient of the weights")


cdef int _weight_task(const void *shared, Py_ssize_t number) noexcept nogil:
    """Sum up some filters, of one or more groups, over one chunk of the units."""
    cdef const WeightPlan *plan = <const WeightPlan *>shared
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t chunk = number // (plan.group_tasks * plan.parts), task = number // plan.parts % plan.group_tasks
    cdef Py_ssize_t first = number % plan.parts * plan.filters, filters = min(plan.filters, c.filters - first), group
    cdef Py_ssize_t tap_bytes = round_up(plan.sums * sizeof(Py_ssize_t), 64)
    cdef Py_ssize_t sum_bytes = filters * plan.sums * c.kernels.lanes * c.item
    cdef Py_ssize_t ones_bytes = plan.base.plane * c.item if plan.sums > plan.n_taps else 0
    cdef Py_ssize_t plane_bytes = 0 if plan.as_it_lies else c.channels * plan.base.plane * c.item
    cdef char *memory = arena(FC_ARENA_BLOCK, tap_bytes + sum_bytes + ones_bytes + plane_bytes)
    if memory == NULL:
        return 1
    cdef char *sums = memory + tap_bytes
    cdef char *ones = sums + sum_bytes
    if ones_bytes:
        _fill_ones(c, plan.base.plane, ones)
    for group in range(c.groups * task // plan.group_tasks, c.groups * (task + 1) // plan.group_tasks):
        memset(sums, 0, <size_t>sum_bytes)
        _sum_units(plan, group, first, filters, chunk, <Py_ssize_t *>memory, ones, sums)
        c.kernels.sum_lanes(
            sums, filters * plan.sums,
            plan.totals + chunk * plan.chunk_bytes + (group * c.filters + first) * plan.sums * c.item,
        )
    return 0


cdef void _fill_ones(const Conv *c, Py_ssize_t n, char *out) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        if c.item == 4:
            (<float *>out)[i] = 1
        else:
            (<double *>out)[i] = 1


cdef void _sum_units(const WeightPlan *plan, Py_ssize_t group, Py_ssize_t first, Py_ssize_t filters, Py_ssize_t chunk,
                     Py_ssize_t *taps, char *ones, char *sums) noexcept nogil:
    """Add a chunk's products for some filters of a group. Planes are behind the ones, if there are, or in the image."""
    cdef const Conv *c = &plan.base.c
    cdef const View *x = &c.x
    cdef const View *y = &c.y
    cdef Py_ssize_t unit, i
    cdef char *laid = ones + (plan.base.plane * c.item if plan.sums > plan.n_taps else 0)
    cdef const char *cells = laid
    cdef Block block
    cdef fc_planes planes = plan.base.planes
    planes.taps, planes.n_taps = taps, plan.sums
    planes.out_row, planes.out_filter = y.stride[3], y.stride[1]
    planes.ahead = 0
    if c.groups * c.filters * c.out[1] * c.out[2] * c.item > FAR_BYTES:
        planes.ahead = plan.base.blocks.columns if plan.base.blocks.across > 1 else plan.base.blocks.rows * y.stride[3]
    if plan.as_it_lies:
        for i in range(plan.n_taps):
            taps[i] = i * x.stride[1]
    else:
        write_taps(&plan.base, taps)
    for unit in range(plan.units * chunk // plan.chunks, plan.units * (chunk + 1) // plan.chunks):
        locate(c, &plan.base.blocks, unit, &block)
        planes.rows, planes.columns = block.rows, block.columns
        if plan.as_it_lies:
            cells = x.data + (
                block.image * x.stride[0] + group * c.channels * x.stride[1] + block.depth * c.stride[0] * x.stride[2]
                + block.top * x.stride[3] + block.left
            ) * c.item
        else:
            pad_planes(&plan.base, &block, group * c.channels, c.channels, laid)
        if plan.sums > plan.n_taps:
            taps[plan.n_taps] = (ones - cells) // c.item
        c.kernels.planar_weight(
            &planes, filters,
            y.data + (
                block.image * y.stride[0] + (group * c.filters + first) * y.stride[1] + block.depth * y.stride[2]
                + block.top * y.stride[3] + block.left
            ) * c.item,
            cells, sums,
        )


cdef void _store_weights(const WeightPlan *plan, grad_bias):
    """Add up the chunks in their order, and store what they come to."""
    cdef const Conv *c = &plan.base.c
    cdef const View *w = &c.w
    cdef Py_ssize_t chunk, filter, d, h, filters = c.groups * c.filters
    cdef fc_epilogue epilogue
    cdef const char *sums
    for chunk in range(1, plan.chunks):
        c.kernels.add(plan.totals, plan.totals + chunk * plan.chunk_bytes, plan.chunk_bytes // c.item)
    if grad_bias is not None:
        c.kernels.transpose(
            plan.totals + plan.n_taps * c.item, plan.sums, 1, filters, 1, cnp.PyArray_BYTES(grad_bias),
            cnp.PyArray_STRIDE(grad_bias, 0) // c.item,
        )
    if taps_continue(c) and w.stride[4] == 1 and (c.channels == 1 or w.stride[1] == c.taps):  # OIHW
        c.kernels.transpose(plan.totals, 1, plan.sums, plan.n_taps, filters, w.data, w.stride[0])
        return
    epilogue.bias, epilogue.relu = NULL, False
    epilogue.pixel_stride, epilogue.channel_stride = w.stride[1], w.stride[4]
    for filter in range(filters):
        sums = plan.totals + filter * plan.sums * c.item
        for d in range(c.kernel[0]):
            for h in range(c.kernel[1]):
                c.kernels.epilogue(
                    &epilogue, sums, c.taps, c.channels, c.kernel[2],
                    w.data + (filter * w.stride[0] + d * w.stride[2] + h * w.stride[3]) * c.item,
                )
                sums += c.kernel[2] * c.item
