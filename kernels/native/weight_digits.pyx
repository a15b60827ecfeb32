"""The gradient of the weights by the tile that multiplies digits: half the time of ``weight_pieces``, for sums that are long.

    grad_weight[k][i][t] = sum over pixels p of  grad_output[k][p] * image[i][p + shift of t]

Tasks, units and rows are those of ``weight_pieces``. Of some units that are packed together, a panel's gradients have one scale, and
so does each vector of channels of the image:

    for chunk of all images' units, some channels, some panels of filters:  in parallel (``weight_chunks``)
        for some units:                                                     all that is packed stays in L2
            digits of their gradients, after one look at them for the scale
            for vector of channels: lay its cells, for the scale; their digits
                for some pixels: for half a panel:                          its gradients stay in L1
                    for tap: a tile

                   64 pixels                           16 channels
             +----+----+----+-- each of the     +---+----+----+----+
             | d0 | d1 | d2 |   digits         0 | 0 | 16 | 32 | 48 |   a word: the digit of four pixels, 16 apart,
    filters  |    |    |    |                  1 | 1 | 17 | 33 | 49 |   as it comes out of four vectors
             +----+----+----+                  2 | 2 | 18 | 34 | 50 |
                                             ... |...

There is a line for each cell, not just for 16 of 64, so that a tap may begin at any: each digit is stored four times, which is no
more than pieces are, and needs no more than whole vectors. Where there is one tap, or all taps see phases of their own, nothing is
shifted, and each digit is stored once.

Numbers that aren't alike, inf, NaN, and huge or tiny ones are left to ``weight_pieces``, and all others with them. What counts as
a long sum is what one image adds up, or those whose units are packed together, if they are whole (``digits.pyx``).
"""

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels.native.blocking cimport Block, Conv, View, ceil_div, locate, make_conv, round_up, use_tile
from fastconv.kernels.native.digits cimport products
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, arena, digit_ukernels, fc_reduction, fc_reduction_over, fc_scales, fc_spread, fc_tally, fc_ukernels,
)
from fastconv.kernels.native.weight_chunks cimport WeightPlan, WeightTask, clear_sums, end_task, reduce_chunks, start_task
from fastconv.kernels.native.weight_pieces cimport UNITS, Plan, lay_cells, phase_of, plan_units, size_rows, split_panel

cdef enum:
    FEW_CHANNELS = 16       # most of a vector
    FEW_PIXELS = 256        # summed: with fewer, chance decides whether digits are enough, and a refusal costs as much as it gains
    FEW_PRODUCTS = 128      # of each number: with fewer, making digits takes longer than they save
    SEGMENT = 384           # pixels whose gradients, of half a panel, stay in L1: 18 KB

# A task's workspace.
ctypedef struct Workspace:
    Py_ssize_t[UNITS] grad_units
    Py_ssize_t[UNITS] image_units
    fc_scales scales            # of a vector of channels
    char *image                 # digits of one, [unit][kernel depth][phase]
    char *grads                 # [unit][panel]
    char *floats                # numbers that are yet to be scaled
    float *grad_scale           # of each panel
    fc_spread *grad_spread      # the same


cdef int digits_weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims,
                            options) except -1:
    """Compute the gradients, if there is a tile for digits, and they are enough for these numbers; return whether."""
    cdef Plan plan
    cdef Conv *c = &plan.base.c
    make_conv(c, input, grad_weight, grad_output, dims, options)
    cdef const fc_ukernels *digits = digit_ukernels(c.item)
    if digits == NULL or options.precision != "highest" or c.channels < FEW_CHANNELS:
        return False
    if c.taps * min(c.channels, c.filters) < FEW_PRODUCTS:
        return False
    if c.y.stride[4] != 1 and c.y.stride[1] != 1:
        return False
    use_tile(c, digits)
    if not plan_units(&plan, _size, grad_bias) or _summed(&plan, plan.together) < FEW_PIXELS:
        return False
    return reduce_chunks(&plan.base, _weight_task, &plan)


cdef Py_ssize_t _summed(const Plan *plan, Py_ssize_t units) noexcept nogil:
    """Products of a sum that one image has, or whole images that are measured together: the gradients of all others may be zeros."""
    cdef const Conv *c = &plan.base.c
    return c.out[0] * c.out[1] * c.out[2] * max(<Py_ssize_t>1, units // plan.base.blocks.count)


cdef bint _shifted(const Plan *plan) noexcept nogil:
    """Whether some taps see the same phase."""
    return plan.axes[1].reach > 0 or plan.axes[2].reach > 0


cdef Py_ssize_t _phases(const Plan *plan) noexcept nogil:
    return plan.base.c.kernel[0] * plan.axes[1].phases * plan.axes[2].phases


cdef void _size(Plan *plan) noexcept nogil:
    """Size what is packed for a unit."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t step = c.kernels.depth_step
    size_rows(plan, 1)
    plan.phase_bytes = (plan.cells if _shifted(plan) else plan.pixels // 4) * step * c.packed
    plan.block_bytes = _phases(plan) * plan.phase_bytes
    plan.grad_row = (plan.pixels // step | 1) * step * c.packed  # an odd number of lines: rows are not in the same sets of L1
    plan.grad_bytes = c.panel * plan.grad_row
    plan.float_bytes = plan.cells * c.kernels.lanes * c.item


# ------------------------------------------------------------------------------------------------------------- tasks

cdef int _weight_task(const void *shared, Py_ssize_t task) noexcept nogil:
    """Reduce one chunk of the units for one task's channels and filters."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const WeightPlan *base = &plan.base
    cdef WeightTask t
    cdef Workspace space
    cdef Py_ssize_t unit, count, v, channels, part, parts, units
    if start_task(base, task, &t):
        return 1
    if t.first_unit == t.end_unit:  # of no images
        clear_sums(base, &t)
    if not _make_workspace(plan, &space):
        return 1
    channels = min(base.channel_blocks * base.width, base.c.channels - t.channel)
    units = t.end_unit - t.first_unit
    parts = ceil_div(units, plan.together)
    for part in range(parts):  # even ones: a short sum may be refused
        unit = t.first_unit + units * part // parts
        count = t.first_unit + units * (part + 1) // parts - unit
        if base.refused[0]:
            return 0
        if not _split_grads(plan, &t, unit, count, &space):
            base.refused[0] = 1
            return 0
        for v in range(ceil_div(channels, base.c.kernels.lanes)):
            if not _split_vector(plan, &t, unit, count, v, &space) or not _multiply(
                plan, &t, &space, count, v, unit > t.first_unit
            ):
                base.refused[0] = 1
                return 0
    end_task(base, &t)
    return 0


cdef bint _make_workspace(const Plan *plan, Workspace *space) noexcept nogil:
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t panels = plan.base.task_panels, grad_bytes = panels * plan.grad_bytes, i
    cdef Py_ssize_t float_bytes = max(
        (plan.together * _phases(plan) + 1) * plan.float_bytes, plan.pixels * c.panel * c.item  # + 1: to turn a row
    )
    space.image = arena(
        FC_ARENA_BLOCK,
        plan.together * (plan.block_bytes + grad_bytes) + float_bytes + panels * (sizeof(float) + sizeof(fc_spread)),
    )
    if space.image == NULL:
        return False
    space.grads = space.image + plan.together * plan.block_bytes
    space.floats = space.grads + plan.together * grad_bytes
    space.grad_scale = <float *>(space.floats + float_bytes)
    space.grad_spread = <fc_spread *>(space.grad_scale + panels)
    for i in range(plan.together):
        space.grad_units[i] = i * grad_bytes // c.packed
        space.image_units[i] = i * plan.block_bytes // c.packed
    return True


cdef bint _split_grads(const Plan *plan, const WeightTask *t, Py_ssize_t unit, Py_ssize_t count, Workspace *space) noexcept nogil:
    """Make digits of some units' gradients, of one scale for each panel; return whether they have one."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t i, panel, filters, pixels
    cdef Block block
    cdef fc_tally tally
    for panel in range(t.panels):
        filters = min(c.panel, c.filters - (t.panel + panel) * c.panel)
        memset(&tally, 0, sizeof(tally))
        pixels = 0
        for i in range(count):
            locate(c, &plan.base.blocks, unit + i, &block)
            _tally_grads(c, &block, t.group * c.filters + (t.panel + panel) * c.panel, filters, &tally)
            pixels += block.rows * block.columns
        space.grad_spread[panel].peak, space.grad_spread[panel].density = 0, 1
        space.grad_scale[panel] = c.kernels.spread(&tally, filters * pixels, &space.grad_spread[panel])
        if space.grad_scale[panel] == 0:
            return False
        for i in range(count):
            locate(c, &plan.base.blocks, unit + i, &block)
            split_panel(
                plan, t, &block, panel, space.grad_scale[panel], space.floats,
                space.grads + (i * plan.base.task_panels + panel) * plan.grad_bytes,
            )
    return True


cdef void _tally_grads(const Conv *c, const Block *block, Py_ssize_t filter, Py_ssize_t filters, fc_tally *tally) noexcept nogil:
    cdef const View *y = &c.y
    cdef Py_ssize_t row, rows = block.rows, columns = block.columns
    cdef const char *first = y.data + (
        block.image * y.stride[0] + filter * y.stride[1] + block.depth * y.stride[2]
        + block.top * y.stride[3] + block.left * y.stride[4]
    ) * c.item
    if y.stride[4] == 1 and y.stride[3] == columns:  # rows that continue one another
        columns *= rows
        rows = 1
    for row in range(rows):
        if y.stride[4] == 1:
            c.kernels.tally(first + row * y.stride[3] * c.item, filters, y.stride[1], columns, tally)
        else:
            c.kernels.tally(first + row * y.stride[3] * c.item, columns, y.stride[4], filters, tally)


cdef bint _split_vector(const Plan *plan, const WeightTask *t, Py_ssize_t unit, Py_ssize_t count, Py_ssize_t v,
                        Workspace *space) noexcept nogil:
    """Make digits of a vector of channels of some units' parts of the image, of one scale; return whether they have one."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t lanes = c.kernels.lanes, channel = t.channel + v * lanes, i, d, h, w, cells = 0
    cdef char *floats = space.floats + plan.float_bytes
    cdef char *out = space.image
    cdef Block block
    cdef fc_tally tally
    memset(&tally, 0, sizeof(tally))
    for i in range(count):
        locate(c, &plan.base.blocks, unit + i, &block)
        for d in range(c.kernel[0]):
            for h in range(plan.axes[1].phases):
                for w in range(plan.axes[2].phases):
                    cells += lay_cells(plan, t, &block, channel, d, h, w, 0, plan.cells, floats, space.floats)
                    c.kernels.tally(floats, plan.cells, lanes, lanes, &tally)
                    floats += plan.float_bytes
    space.scales.spread.peak, space.scales.spread.density = 0, 1
    space.scales.scale[0] = c.kernels.spread(&tally, cells * min(lanes, c.channels - channel), &space.scales.spread)
    for i in range(1, lanes):
        space.scales.scale[i] = space.scales.scale[0]
    floats = space.floats + plan.float_bytes
    cells = plan.cells if _shifted(plan) else plan.pixels
    for i in range(count * _phases(plan) if space.scales.scale[0] != 0 else 0):
        c.kernels.digits_cells(floats, cells, space.scales.scale[0], _shifted(plan), out)
        floats += plan.float_bytes
        out += plan.phase_bytes
    return space.scales.scale[0] != 0


cdef bint _multiply(const Plan *plan, const WeightTask *t, const Workspace *space, Py_ssize_t units, Py_ssize_t v,
                    bint accumulate) noexcept nogil:
    """Add some units' products to the sums of a vector of channels; return whether digits are enough.

    Sums are [panel][tap][filter][channel of all blocks].
    """
    cdef const WeightPlan *base = &plan.base
    cdef const Conv *c = &base.c
    cdef Py_ssize_t panel, together = max(<Py_ssize_t>1, SEGMENT // plan.pixels), first, unit, half = c.panel // 2
    cdef Py_ssize_t depth = round_up(ceil_div(plan.pixels, ceil_div(plan.pixels, <Py_ssize_t>SEGMENT)), c.kernels.depth_step)
    cdef Py_ssize_t line = c.packed * (c.kernels.depth_step if _shifted(plan) else c.kernels.lanes)  # of a pixel
    cdef fc_reduction reduction = fc_reduction_over(space.grad_units, 0, 0)
    cdef bint enough = True
    reduction.b_taps = space.image_units
    reduction.a_step = plan.grad_row // c.packed
    reduction.c_step = base.channel_blocks * c.panel
    reduction.scales = &space.scales
    c.kernels.enter()
    for unit from 0 <= unit < units by together:
        reduction.n_taps = min(together, units - unit)
        for first from 0 <= first < plan.pixels by depth:
            reduction.depth = min(depth, plan.pixels - first)
            for panel in range(2 * t.panels):  # halves
                reduction.scale = &space.grad_scale[panel // 2]
                reduction.products = products(&space.scales.spread, &space.grad_spread[panel // 2], _summed(plan, units))
                enough = enough and reduction.products > 0
                if not enough or (t.panel * 2 + panel) * half >= c.filters:
                    break
                _multiply_taps(
                    plan, &reduction,
                    space.grads + unit * base.task_panels * plan.grad_bytes + panel * half * plan.grad_row + first * c.packed,
                    space.image + unit * plan.block_bytes + first * line,
                    t.accumulators
                    + ((panel // 2 * c.taps * c.panel + panel % 2 * half) * reduction.c_step + v * c.kernels.lanes) * c.item,
                    accumulate or unit > 0 or first > 0,
                )
    c.kernels.leave()
    return enough


cdef void _multiply_taps(const Plan *plan, const fc_reduction *reduction, const char *grads, const char *image, char *sums,
                         bint accumulate) noexcept nogil:
    """Add the products of half a panel and a vector of channels, tap by tap."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t line = c.kernels.depth_step * c.packed, d, h, w, phase, shift
    cdef Py_ssize_t block_bytes = (c.kernels.depth_step if _shifted(plan) else c.kernels.tile_rows) * line
    for d in range(c.kernel[0]):
        for h in range(c.kernel[1]):
            for w in range(c.kernel[2]):
                phase = phase_of(plan, d, h, w, &shift)
                c.kernels.brgemm_cells(
                    reduction, grads, image + phase * plan.phase_bytes + shift * line, block_bytes, sums, accumulate
                )
                sums += c.panel * reduction.c_step * c.item
