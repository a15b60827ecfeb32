"""The gradient of the weights by ``conv_im2col``: the reduction runs over pixels.

    grad_weight[r][k] = sum over p of  patches[r][p] * grad_output[p][k],    r = (channel, tap)

    for chunk of all images' blocks, some channels, some panels:           in parallel (``weight_chunks``)
        for block of output pixels:
            gather their patches, unless they are the image itself         L2
            for panel: turn its gradients                                  L1
                for tile of r: brgemm over pixels

              pixels                    filters               filters
         +-------------+             +-----------+           +-------+
      r  |   patches   |     pixels  | gradients |        r  |  sums |
         |             |        x    |           |     =     |       |
         +-------------+             +-----------+           +-------+

Numbers are never split here: ``weight_pieces`` shares what it packs among more products.
"""

import numpy as np

cimport numpy as cnp

from fastconv.kernels.few_pixels import suits
from fastconv.kernels.native import few_pixels
from fastconv.kernels.native.blocking cimport (
    Block, Conv, ceil_div, divide, locate, make_conv, pack_pixels, panel_vectors, round_up,
)
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, arena, fc_reduction, fc_reduction_over
from fastconv.kernels.native.patches cimport first_cell, gather, join_rows, sees_one_cell
from fastconv.kernels.native.weight_chunks cimport (
    WEIGHT_ROWS, WeightPlan, WeightTask, add_bias, clear_sums, end_task, even_panels, plan_chunks, reduce_chunks,
    start_task,
)

cdef enum:
    PIXELS = 256        # that the gradient of 1x1 weights reduces over at a time: a panel's gradients are 16 KB, half of L1
    NARROW_PIXELS = 1024  # the same for a panel of one vector: rows of the image are read in longer runs, gradients from L2
    LANES = 16          # of a vector, at most
    TURN = 14           # products that are made while a number is turned


def conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options):
    """See ``fastconv.kernels``.

    Through 1x1 filters each pixel sees itself: image and gradients are alike, and what takes less to be turned is.
    """
    if suits("conv_weight_grad", dims, grad_weight):
        few_pixels.conv_weight_grad(input, grad_output, grad_weight, dims, options)
        if grad_bias is not None:
            np.sum(grad_output, axis=(0, 2, 3, 4), out=grad_bias)
        return
    channels, filters = dims.group_in_channels, dims.group_out_channels
    alike = input.shape[2:] == grad_output.shape[2:] and dims.taps == dims.groups == max(dims.stride) == 1 and grad_bias is None
    if alike and 5 * _turning(channels, filters) < 4 * _turning(filters, channels):
        input, grad_output, grad_weight = grad_output, input, grad_weight.swapaxes(0, 1)
    _weight_grad(input, grad_output, grad_weight, grad_bias, dims, options)


cdef Py_ssize_t _turning(Py_ssize_t turned, Py_ssize_t others) noexcept nogil:
    """Return the time for a pixel, in products: lanes are filled up."""
    return round_up(turned, LANES) * others + TURN * turned


cdef void _weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims, options) except *:
    cdef WeightPlan plan
    cdef Conv *c = &plan.c
    make_conv(c, input, grad_weight, grad_output, dims, options)
    join_rows(c)
    plan.width = ceil_div(c.channels, ceil_div(c.channels, max(1, WEIGHT_ROWS // c.taps)))  # even parts
    plan.channel_blocks = 1
    if sees_one_cell(c):
        c.chunk = PIXELS if c.filters > c.kernels.lanes else NARROW_PIXELS
    divide(c, max(1, c.chunk // c.out[2]), min(c.chunk, c.out[2]), &plan.blocks)
    plan.task_panels = even_panels(c)
    plan_chunks(&plan, c.batch * plan.blocks.count, grad_bias)
    reduce_chunks(&plan, _weight_task, &plan)


# A task's workspace.
ctypedef struct Workspace:
    Py_ssize_t *offsets         # where the patches of each row of the sums are
    Py_ssize_t *lines
    char *patches
    char *grads


cdef int _weight_task(const void *shared, Py_ssize_t task) noexcept nogil:
    """Reduce one chunk of the units, which are blocks of output pixels, for one task's channels and filters."""
    cdef const WeightPlan *plan = <const WeightPlan *>shared
    cdef const Conv *c = &plan.c
    cdef WeightTask t
    if start_task(plan, task, &t):
        return 1
    clear_sums(plan, &t)
    cdef bint in_place = sees_one_cell(c)
    cdef Py_ssize_t rows = c.taps * plan.width, pixels = plan.blocks.rows * plan.blocks.columns, unit
    cdef Py_ssize_t offset_bytes = (rows + plan.blocks.rows + 8) // 8 * 64
    cdef Py_ssize_t patch_bytes = 0 if in_place else round_up(rows * pixels * c.item, 64)
    cdef char *memory = arena(FC_ARENA_BLOCK, offset_bytes + patch_bytes + c.panel * pixels * c.item)
    cdef Workspace space
    cdef Block block
    if memory == NULL:
        return 1
    space.offsets = <Py_ssize_t *>memory
    space.lines = space.offsets + rows
    space.patches = memory + offset_bytes
    space.grads = space.patches + patch_bytes
    for unit in range(t.first_unit, t.end_unit):
        locate(c, &plan.blocks, unit, &block)
        _weight_unit(plan, &t, &block, in_place, &space)
    end_task(plan, &t)
    return 0


cdef void _weight_unit(const WeightPlan *plan, const WeightTask *t, const Block *block, bint in_place,
                       const Workspace *space) noexcept nogil:
    """Add a block's products to a task's sums."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t channels = min(plan.width, c.channels - t.channel), pixels = block.rows * block.columns, panel, m
    cdef Py_ssize_t first = t.group * c.channels + t.channel
    cdef const char *patches = space.patches
    cdef fc_reduction reduction = fc_reduction_over(space.lines, 1, pixels)
    _row_offsets(plan, channels, c.x.stride[1] if in_place else pixels, space.offsets)
    for m in range(block.rows):
        space.lines[m] = m * c.stride[1] * c.x.stride[3] if in_place else 0
    if in_place:
        reduction.n_taps, reduction.depth, reduction.a_step = block.rows, block.columns, c.stride[2] * c.x.stride[4]
        patches = first_cell(c, block, first)
    else:
        gather(c, block, first, channels, block.top * c.out[2] + block.left, pixels, pixels, space.patches)
    for panel in range(t.panels):
        _pack_panel(plan, t, block, panel, space.grads)
        _weight_panel(plan, t, panel, &reduction, space.offsets, patches, space.grads)


cdef void _row_offsets(const WeightPlan *plan, Py_ssize_t channels, Py_ssize_t pitch, Py_ssize_t *offsets) noexcept nogil:
    """Sums are [tap][channel], patches [channel][tap]; missing channels repeat the last."""
    cdef Py_ssize_t m
    for m in range(plan.c.taps * plan.width):
        offsets[m] = (min(m % plan.width, channels - 1) * plan.c.taps + m // plan.width) * pitch


cdef void _pack_panel(const WeightPlan *plan, const WeightTask *t, const Block *block, Py_ssize_t panel,
                      char *grads) noexcept nogil:
    """Pack a panel's gradients of a block, and add them to that of the bias."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t width = panel_vectors(c, t.panel + panel) * c.kernels.lanes, first = (t.panel + panel) * c.panel
    cdef Py_ssize_t pixels = block.rows * block.columns
    pack_pixels(c, block, t.group * c.filters + first, min(width, c.filters - first), width, 0, pixels, grads)
    add_bias(plan, t, panel, grads, pixels)


cdef void _weight_panel(const WeightPlan *plan, const WeightTask *t, Py_ssize_t panel, fc_reduction *reduction,
                        const Py_ssize_t *offsets, const char *patches, const char *grads) noexcept nogil:
    """Add patches x gradients of the output for one panel and one block of pixels."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, t.panel + panel)
    cdef Py_ssize_t width = vectors * c.kernels.lanes, rows = c.taps * plan.width
    reduction.b_tap = reduction.depth * width
    reduction.b_step = width
    reduction.c_step = width
    c.kernels.brgemm(
        reduction, patches, offsets, rows, grads, vectors, t.accumulators + panel * c.panel * rows * c.item, 1
    )
