"""The gradient of the weights by Winograd's tiles: the same transforms, multiplied and summed over tiles.

    grad_weight = Gt [ sum over tiles of (Bt inputs B) * (A gradients At) ] G          filters of one slice

    for chunk of the blocks of all images, block of channels, panels of filters:     in parallel
        pack and transform both, until there are enough tiles          [point][tile][width], [point][panel][tile][filter]
        for point: for panel: for tile of channels: brgemm             the reduction runs along the tiles
        transform the sums back                                        [point][panel][channel][filter]: L2

      inputs of a point          gradients              sums of a point
      +---------------+       +----------+            +----------+
      |   channels x  |   x   |  tiles x |     =      | channels |
      |     tiles     |       |  width   |            | x width  |
      +---------------+       +----------+            +----------+

Inputs or gradients with numbers that can't be summed leave all of it to ``weight_direct``.
"""

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels import winograd
from fastconv.kernels.native.blocking cimport (
    Block, Conv, ceil_div, locate, make_conv, pack_image, pack_pixels, panel_vectors, round_up,
)
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_INPUTS, FC_OUTPUTS, FC_SUM_LIMIT, FC_TAPS, arena, fc_reduction, fc_reduction_over, fc_tiles,
)
from fastconv.kernels.native.weight_chunks cimport (
    WEIGHT_PANELS, WeightPlan, WeightTask, add_bias, end_task, even_panels, plan_chunks, reduce_chunks, start_task,
)
from fastconv.kernels.native.winograd_tiles cimport (
    LINE_BYTES, Geometry, cut_taps, cut_tiles, place_tiles, tiles_at, whole_periods,
)

from fastconv.kernels.native import weight_direct

cdef enum:
    CHANNELS = 64               # of a task, at most: the panels' transformed gradients are used for all of them
    TILES = 64                  # that one brgemm reduces over, at most
    LEAST_RUN = 16              # of tiles whose products are summed by themselves: sums of sums have smaller errors


def conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options):
    """See ``fastconv.kernels``."""
    if not _weight_grad(input, grad_output, grad_weight, grad_bias, dims, options):
        weight_direct.conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options)


# What all tasks of one call share.
ctypedef struct GradPlan:
    WeightPlan w
    Geometry g
    Py_ssize_t point_bytes      # of transformed inputs
    Py_ssize_t grad_bytes       # of a point of transformed gradients
    Py_ssize_t panel_sums       # sums of a point and a panel, and ...
    Py_ssize_t sum_bytes        # ... what those of all its panels take

# One task: where its arrays are in the workspace.
ctypedef struct GradTask:
    WeightTask w
    Py_ssize_t tiles            # transformed so far
    Py_ssize_t *offsets         # of each tile
    Py_ssize_t *rows            # of each channel
    Py_ssize_t *parts           # of each run of tiles
    char *inputs                # [point][tile][channel]
    char *grads                 # [point][panel][tile][filter]
    char *sums                  # [point][panel][channel][filter]
    char *part                  # of the image or the gradients: not yet transformed


cdef bint _weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims, options):
    """Compute the gradient; return whether all numbers can be summed, and there is a tile."""
    cdef GradPlan plan
    cdef WeightPlan *w = &plan.w
    cdef Conv *c = &w.c
    make_conv(c, input, grad_weight, grad_output, dims, options)
    w.width = round_up(ceil_div(c.channels, ceil_div(c.channels, CHANNELS)), c.kernels.lanes)  # even parts
    w.channel_blocks = 1
    tile = winograd.choose_for_weights(dims, "fused" if c.kernels.fused else "rounded")
    if tile is None:
        return False
    cut_taps(c, tile, &plan.g)
    cut_tiles(c, &plan.g, TILES, &w.blocks)
    w.task_panels = even_panels(c)
    plan_chunks(w, c.batch * w.blocks.count, grad_bias)
    plan.point_bytes = TILES * w.width * c.item + LINE_BYTES
    plan.grad_bytes = WEIGHT_PANELS * TILES * c.panel * c.item + LINE_BYTES
    plan.panel_sums = ceil_div(w.width, c.kernels.tile_rows) * c.kernels.tile_rows * c.panel
    plan.sum_bytes = WEIGHT_PANELS * plan.panel_sums * c.item + LINE_BYTES
    return reduce_chunks(w, _weight_task, &plan)


cdef int _weight_task(const void *shared, Py_ssize_t number) noexcept nogil:
    """Sum one chunk of the blocks for one task's channels and filters."""
    cdef const GradPlan *plan = <const GradPlan *>shared
    cdef const WeightPlan *w = &plan.w
    cdef GradTask t
    cdef Block block, whole
    cdef Py_ssize_t unit, tiles
    if start_task(w, number, &t.w) or _place(plan, &t):
        return 1
    for unit in range(t.w.first_unit, t.w.end_unit):
        locate(&w.c, &w.blocks, unit, &block)
        whole = whole_periods(&w.c, &plan.g, &block)
        tiles = whole.rows // plan.g.rows * (whole.columns // plan.g.columns)
        if t.tiles + tiles > TILES:
            _sum_tiles(plan, &t)
        if not (_add_inputs(plan, &t, &whole, tiles) and _add_grads(plan, &t, &block, &whole, tiles)):
            w.refused[0] = 1
            break
        t.tiles += tiles
    _sum_tiles(plan, &t)
    _transform_sums(plan, &t)
    end_task(w, &t.w)
    return 0


cdef int _place(const GradPlan *plan, GradTask *t) noexcept nogil:
    """Find room for a task's arrays, clear its sums; return 1 if there is no memory."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef Py_ssize_t offset_bytes = (TILES + w.width + TILES // LEAST_RUN + 8) // 8 * 64
    cdef Py_ssize_t points = plan.g.points, i
    cdef Py_ssize_t high = (w.blocks.rows - 1) * c.stride[1] + (c.kernel[1] - 1) * c.dilation[1] + 1
    cdef Py_ssize_t wide = (w.blocks.columns - 1) * c.stride[2] + (c.kernel[2] - 1) * c.dilation[2] + 1
    cdef Py_ssize_t cells = max(high * wide * w.width, w.blocks.rows * w.blocks.columns * c.panel)
    cdef char *memory = arena(
        FC_ARENA_BLOCK, offset_bytes + points * (plan.point_bytes + plan.grad_bytes + plan.sum_bytes) + cells * c.item
    )
    if memory == NULL:
        return 1
    t.tiles = 0
    t.offsets = <Py_ssize_t *>memory
    t.rows = t.offsets + TILES
    t.parts = t.rows + w.width
    t.inputs = memory + offset_bytes
    t.grads = t.inputs + points * plan.point_bytes
    t.sums = t.grads + points * plan.grad_bytes
    t.part = t.sums + points * plan.sum_bytes
    for i in range(w.width):
        t.rows[i] = i
    for i in range(TILES // plan.g.run):
        t.parts[i] = i * plan.g.run * w.width
    memset(t.sums, 0, <size_t>(points * plan.sum_bytes))
    return 0


cdef bint _add_inputs(const GradPlan *plan, const GradTask *t, const Block *whole, Py_ssize_t count) noexcept nogil:
    """Pack and transform a block's inputs; return whether their numbers can be summed."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef fc_tiles tiles = tiles_at(
        &plan.g, t.offsets, count, c.dilation[1] * whole.wide * w.width, c.dilation[2] * w.width
    )
    pack_image(
        c, whole, t.w.group * c.channels + t.w.channel, min(w.width, c.channels - t.w.channel), w.width, t.part
    )
    if not c.kernels.all_below(t.part, w.width * whole.high * whole.wide, FC_SUM_LIMIT):
        return False
    place_tiles(
        c, &plan.g, whole.rows, whole.columns, c.stride[1] * whole.wide * w.width, c.stride[2] * w.width, t.offsets
    )
    c.kernels.winograd_transform(
        FC_INPUTS, &tiles, t.part, w.width, t.inputs + t.tiles * w.width * c.item, plan.point_bytes // c.item
    )
    return True


cdef bint _add_grads(const GradPlan *plan, const GradTask *t, const Block *block, const Block *whole,
                     Py_ssize_t count) noexcept nogil:
    """Pack and transform a block's gradients, panel by panel; return whether their numbers can be summed."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef Py_ssize_t panel, width, filter, row, cells = whole.rows * whole.columns
    cdef fc_tiles tiles
    for panel in range(t.w.panels):
        width = panel_vectors(c, t.w.panel + panel) * c.kernels.lanes
        filter = (t.w.panel + panel) * c.panel
        if block.rows * block.columns < cells:
            memset(t.part, 0, <size_t>(cells * width * c.item))
        for row in range(block.rows):
            pack_pixels(
                c, block, t.w.group * c.filters + filter, min(width, c.filters - filter), width, row * block.columns,
                block.columns, t.part + row * whole.columns * width * c.item,
            )
        if not c.kernels.all_below(t.part, cells * width, FC_SUM_LIMIT):
            return False
        add_bias(w, &t.w, panel, t.part, cells)
        place_tiles(c, &plan.g, whole.rows, whole.columns, whole.columns * width, width, t.offsets)
        tiles = tiles_at(&plan.g, t.offsets, count, c.dilation[1] * whole.columns * width, c.dilation[2] * width)
        c.kernels.winograd_transform(
            FC_OUTPUTS, &tiles, t.part, width,
            t.grads + (panel * TILES * c.panel + t.tiles * width) * c.item, plan.grad_bytes // c.item,
        )
    return True


cdef void _sum_tiles(const GradPlan *plan, GradTask *t) noexcept nogil:
    """Add the products of all tiles that are transformed to the sums, those of a run of tiles at a time."""
    cdef Py_ssize_t run = plan.g.run, whole = t.tiles // run * run
    if whole > 0:
        _add_products(plan, t, 0, run, whole // run)
    if whole < t.tiles:
        _add_products(plan, t, whole, t.tiles - whole, 1)
    t.tiles = 0


cdef void _add_products(const GradPlan *plan, const GradTask *t, Py_ssize_t first, Py_ssize_t depth,
                        Py_ssize_t parts) noexcept nogil:
    """Add the products of so many parts of ``depth`` tiles, from tile ``first`` on, to the sums."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef Py_ssize_t point, panel, width
    cdef const char *inputs
    cdef const char *grads
    cdef char *sums
    cdef fc_reduction reduction = fc_reduction_over(t.parts, parts, depth)
    reduction.apart = 1
    reduction.a_step = w.width
    for point in range(plan.g.points):
        inputs = t.inputs + point * plan.point_bytes + first * w.width * c.item
        for panel in range(t.w.panels):
            width = panel_vectors(c, t.w.panel + panel) * c.kernels.lanes
            reduction.b_step = width
            reduction.c_step = width
            reduction.b_tap = depth * width
            grads = t.grads + point * plan.grad_bytes + (panel * TILES * c.panel + first * width) * c.item
            sums = t.sums + point * plan.sum_bytes + panel * plan.panel_sums * c.item
            c.kernels.brgemm(&reduction, inputs, t.rows, w.width, grads, <int>(width // c.kernels.lanes), sums, 1)


cdef void _transform_sums(const GradPlan *plan, const GradTask *t) noexcept nogil:
    """Transform the sums back to what ``weight_chunks`` adds up and stores."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef Py_ssize_t zero = 0, panel, size
    cdef fc_tiles taps
    for panel in range(t.w.panels):
        size = w.width * panel_vectors(c, t.w.panel + panel) * c.kernels.lanes
        taps = tiles_at(&plan.g, &zero, 1, c.kernel[2] * size, size)
        c.kernels.winograd_gather(
            FC_TAPS, &taps, t.sums + panel * plan.panel_sums * c.item, plan.sum_bytes // c.item, size,
            t.w.accumulators + panel * c.panel * w.width * c.taps * c.item,
        )
