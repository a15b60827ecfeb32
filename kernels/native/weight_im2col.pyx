"""The gradient of the weights by ``conv_im2col``: the reduction runs over pixels.

    grad_weight[r][k] = sum over p of  patches[r][p] * grad_output[p][k],    r = (channel, tap)

    for chunk of all images' blocks, some channels, some panels:           in parallel (``weight_chunks``)
        for block of output pixels:
            gather their patches, unless they are the image itself         L2
            for panel: turn its gradients, unless they are neighbours      L1
                for tile of r: brgemm over pixels

              pixels                    filters               filters
         +-------------+             +-----------+           +-------+
      r  |   patches   |     pixels  | gradients |        r  |  sums |
         |             |        x    |           |     =     |       |
         +-------------+             +-----------+           +-------+

Through 1x1 filters each pixel sees itself: image and gradients are alike, and may change places. Channels-last, both are read where they
are. Numbers are never split here: ``weight_pieces`` shares what it packs among more products.
"""

cimport numpy as cnp

from fastconv.kernels.few_pixels import suits
from fastconv.kernels.native import few_pixels
from fastconv.kernels.native.blocking cimport (
    Block, Conv, View, ceil_div, divide, first_output, locate, make_conv, pack_pixels, panel_vectors, round_up,
)
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, arena, fc_reduction, fc_reduction_over
from fastconv.kernels.native.patches cimport first_cell, gather, join_rows, sees_one_cell
from fastconv.kernels.native.weight_chunks cimport (
    WEIGHT_ROWS, WeightPlan, WeightTask, add_bias, add_pixels, clear_sums, end_task, even_panels, plan_chunks, reduce_chunks,
    start_task, sum_gradients,
)

cdef enum:
    PIXELS = 256        # that the gradient of 1x1 weights reduces over at a time: a panel's gradients are 16 KB, half of L1
    NARROW_PIXELS = 1024  # the same for a panel of one vector: rows of the image are read in longer runs, gradients from L2
    READY_PIXELS = 128  # the same for gradients that are read where they are, with others of their lines and pages in between
    AHEAD = 16          # pixels until those whose gradients are fetched ahead then
    LANES = 16          # of a vector, at most
    TURN = 14           # products that are made while a number is turned


def conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options):
    """See ``fastconv.kernels``."""
    if suits("conv_weight_grad", dims, grad_weight):
        few_pixels.conv_weight_grad(input, grad_output, grad_weight, dims, options)
        sum_gradients(grad_output, grad_bias, options)
        return
    last = _channels_are_neighbours(input) and _channels_are_neighbours(grad_output)
    if last and dims.taps == 1 and max(dims.stride) > 1 and not any(dims.pad_before + dims.pad_after):
        input, dims = _seen(input, dims)
    if _exchange(input, grad_output, dims, last):
        sum_gradients(grad_output, grad_bias, options)
        input, grad_output, grad_weight, grad_bias = grad_output, input, grad_weight.swapaxes(0, 1), None
    _weight_grad(input, grad_output, grad_weight, grad_bias, dims, options)


cdef _seen(input, dims):
    """Return the cells that 1x1 filters see, and the convolution of these, without the stride that skips the others."""
    depth, height, width = dims.stride
    return input[:, :, ::depth, ::height, ::width], dims._replace(stride=(1, 1, 1), input_size=dims.output_size)


cdef bint _channels_are_neighbours(cnp.ndarray array):
    return cnp.PyArray_STRIDE(array, 1) == cnp.PyArray_ITEMSIZE(array)


cdef bint _exchange(input, grad_output, dims, bint last):
    """Whether image and gradients had better change places, which are alike where each pixel sees itself: what is the lanes is turned,
    unless channels are neighbours, and the more of them the better."""
    channels, filters = dims.group_in_channels, dims.group_out_channels
    if dims.taps * dims.groups * max(dims.stride) > 1 or input.shape[2:] != grad_output.shape[2:]:
        return False
    return channels > filters if last else 5 * _turning(channels, filters) < 4 * _turning(filters, channels)


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
    if c.y.stride[1] == 1:
        c.chunk = READY_PIXELS
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
    cdef const char *grads
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
        grads = _panel_gradients(plan, t, block, panel, space, &reduction)
        _weight_panel(plan, t, panel, &reduction, space.offsets, patches, grads)


cdef void _row_offsets(const WeightPlan *plan, Py_ssize_t channels, Py_ssize_t pitch, Py_ssize_t *offsets) noexcept nogil:
    """Sums are [tap][channel], patches [channel][tap]; missing channels repeat the last."""
    cdef Py_ssize_t m
    for m in range(plan.c.taps * plan.width):
        offsets[m] = (min(m % plan.width, channels - 1) * plan.c.taps + m // plan.width) * pitch


cdef const char *_panel_gradients(const WeightPlan *plan, const WeightTask *t, const Block *block, Py_ssize_t panel,
                                  const Workspace *space, fc_reduction *reduction) noexcept nogil:
    """Return a panel's gradients of a block, once they are added to that of the bias: where the caller has them, if they are neighbours
    there and fill the panel's vectors, else packed."""
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    cdef Py_ssize_t width = panel_vectors(c, t.panel + panel) * c.kernels.lanes, first = (t.panel + panel) * c.panel
    cdef Py_ssize_t pixels = block.rows * block.columns, filter = t.group * c.filters + first, row
    cdef bint evenly = reduction.n_taps == block.rows or y.stride[3] == block.columns * y.stride[4]
    cdef const char *grads
    if y.stride[1] == 1 and first + width <= c.filters and evenly:
        reduction.b_tap, reduction.b_step, reduction.ahead = y.stride[3], y.stride[4], AHEAD * y.stride[4]
        grads = first_output(c, block, filter)
        for row in range(block.rows):
            add_pixels(plan, t, panel, grads + row * y.stride[3] * c.item, y.stride[4], block.columns)
        return grads
    reduction.b_tap, reduction.b_step, reduction.ahead = reduction.depth * width, width, 0
    pack_pixels(c, block, filter, min(width, c.filters - first), width, 0, pixels, space.grads)
    add_bias(plan, t, panel, space.grads, pixels)
    return space.grads


cdef void _weight_panel(const WeightPlan *plan, const WeightTask *t, Py_ssize_t panel, fc_reduction *reduction,
                        const Py_ssize_t *offsets, const char *patches, const char *grads) noexcept nogil:
    """Add patches x gradients of the output for one panel and one block of pixels."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, t.panel + panel)
    cdef Py_ssize_t width = vectors * c.kernels.lanes, rows = c.taps * plan.width
    reduction.c_step = width
    c.kernels.brgemm(
        reduction, patches, offsets, rows, grads, vectors, t.accumulators + panel * c.panel * rows * c.item, 1
    )
