"""The gradient of the weights by the tile that multiplies pieces of numbers: rows are filters, lanes are channels.

    grad_weight[k][i][t] = sum over pixels p of  grad_output[k][p] * image[i][p + shift of t]

    for chunk of all images' units, some channels, some panels of filters:  in parallel (``weight_chunks``)
        for some units, each a block of output pixels:                      all that is packed stays in L2
            split their gradients
            for channel block: split the part of the image that they see
                for panel: for tap: brgemm over the pixels

              pixels                   channels               channels
          +-----------+             +------------+          +----------+
  filters | gradients |     pixels  |   image,   |  filters |   sums   |
          |           |        x    |  shifted   |     =    | of a tap |
          +-----------+             +------------+          +----------+

A block's rows are laid one after another, ``pitch`` cells apart, so that a tap is one shift for all pixels:

      +------------+------+------------+------+------------+        +-----------+---+-----------+---+-----------+
      |   cells    | gap  |   cells    | gap  |   cells    |   x    | gradients | 0 | gradients | 0 | gradients |
      +------------+------+------------+------+------------+        +-----------+---+-----------+---+-----------+

The gap is what a row of taps sees beyond the pixels; where it is padding, the end of one row and the beginning of the next share
it. The tile reads pairs of pixels: the image is packed twice, [vector of channels][piece][pair][channel][2], with pairs that begin
at even and at odd cells, unless all shifts are even. With a stride, cells that some taps see form a phase each, an image of its own:

    tap h sees phase h % period, shifted by h / period * step rows;   period = stride / gcd(stride, dilation)

If there are inf, NaN or huge numbers, or a unit has nothing but tiny ones, all is computed without splitting.
"""

cimport numpy as cnp
from libc.string cimport memcpy, memset

from fastconv.kernels.native.blocking cimport (
    Block, Blocks, Conv, View, ceil_div, divide, locate, make_conv, pack_pixels, panel_vectors, piece_tile, round_up, use_tile,
)
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_HUGE, FC_ORDINARY, FC_TINY, arena, fc_reduction, fc_reduction_over, fc_ukernels,
)
from fastconv.kernels.native.patches cimport join_rows
from fastconv.kernels.native.weight_chunks cimport (
    CHUNK_PIXELS, WeightPlan, WeightTask, add_bias, clear_sums, end_task, plan_chunks, reduce_chunks, start_task,
)

cdef enum:
    FEWEST_SUMS = 104 << 10     # of a task, so that there are some tasks; ...
    MOST_SUMS = 150 << 10       # ... with packed units they stay in L2
    UNIT_BYTES = 5 << 18        # of all that is packed at a time
    MOST_BYTES = 1 << 22        # the same where a unit can't be cut as small: half of the promised workspace
    FEWEST_TASKS = 2            # with fewer, some threads are idle
    CELLS = 256                 # of an image that are turned and split at a time: they stay in L1
    FILTERS = 8                 # the same
    RATE = 3                    # products that it makes in the time of one of numbers, about
    IMAGE_COST = 2              # time of packing a number of the image in that of a gradient


# A task's workspace.
ctypedef struct Workspace:
    Py_ssize_t[32] rows         # where each filter's gradients are
    Py_ssize_t[UNITS] grad_units
    Py_ssize_t[UNITS] image_units
    char *image                 # of a channel block, [unit][kernel depth][phase][copy]
    char *grads                 # [unit][panel]
    char *floats


cdef int split_weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims,
                           options) except -1:
    """Compute the gradients, if there is a tile for pieces, the shape fills it, and all numbers can be split; return whether."""
    cdef Plan plan
    cdef WeightPlan *base = &plan.base
    cdef Conv *c = &base.c
    make_conv(c, input, grad_weight, grad_output, dims, options)
    cdef const fc_ukernels *pieces = piece_tile(c, options.precision)
    if pieces == NULL:
        return False
    use_tile(c, pieces)
    return plan_units(&plan, _size, grad_bias) and reduce_chunks(base, _weight_task, &plan)


cdef bint plan_units(Plan *plan, SizeFunction size, grad_bias) except -1:
    """Complete a plan whose tile is chosen; return whether that pays."""
    cdef WeightPlan *base = &plan.base
    cdef Conv *c = &base.c
    join_rows(c)
    for axis in range(3):
        _plan_axis(c, axis, &plan.axes[axis])
    _plan_task(plan)
    _cut_units(plan, size)
    if not _pays(plan) or _unit_bytes(plan) > MOST_BYTES:
        return False
    plan_chunks(base, c.batch * base.blocks.count, grad_bias)
    base.filters_first = True
    plan.together = max(1, min(min(<Py_ssize_t>UNITS, ceil_div(base.units, base.chunks)), UNIT_BYTES // _unit_bytes(plan)))
    return True


cdef bint _pays(const Plan *plan) noexcept nogil:
    """Whether the products, padding included, and packing take less time than products of numbers do."""
    cdef const Conv *c = &plan.base.c
    cdef double padded = <double>plan.pixels * plan.base.blocks.down * plan.base.blocks.across / (c.out[1] * c.out[2])
    cdef double channels = round_up(c.channels, c.kernels.lanes), filters = round_up(c.filters, c.kernels.lanes)
    return padded * channels * filters <= RATE * c.channels * c.filters


cdef void _plan_axis(const Conv *c, int axis, Axis *a) noexcept nogil:
    cdef Py_ssize_t divisor = c.stride[axis], rest = c.dilation[axis]
    while rest:
        divisor, rest = rest, divisor % rest
    a.period = c.stride[axis] // divisor
    a.step = c.dilation[axis] // divisor
    a.phases = min(c.kernel[axis], a.period)
    a.reach = (c.kernel[axis] - 1) // a.period * a.step


cdef void _plan_task(Plan *plan) noexcept nogil:
    """Choose the channels and filters of a task: sums that stay in L2, and little that is packed by several tasks."""
    cdef WeightPlan *base = &plan.base
    cdef const Conv *c = &base.c
    cdef Py_ssize_t block = c.panel * c.panel * c.taps, blocks = ceil_div(c.channels, c.panel)
    cdef Py_ssize_t most = max(<Py_ssize_t>FEWEST_SUMS, min(<Py_ssize_t>MOST_SUMS, c.groups * c.panels * blocks * block // 4))
    cdef Py_ssize_t panels, tasks, cost, least = 0
    base.width = c.panel
    for tasks in range(1, c.panels + 1):
        panels = ceil_div(c.panels, tasks)
        cost = IMAGE_COST * tasks * c.channels + ceil_div(blocks, max(1, min(blocks, most // (panels * block)))) * c.filters
        if tasks == 1 or cost < least:
            least = cost
            base.task_panels = panels
            base.channel_blocks = max(1, min(blocks, most // (panels * block)))
    base.channel_blocks = ceil_div(blocks, ceil_div(blocks, base.channel_blocks))  # even parts


cdef void _cut_units(Plan *plan, SizeFunction size) noexcept nogil:
    """Cut the output into blocks: whole rows, or parts of one."""
    cdef Conv *c = &plan.base.c
    cdef Blocks *blocks = &plan.base.blocks
    cdef Py_ssize_t rows = c.out[1], columns = c.out[2], step = c.kernels.depth_step, parts = 1
    cdef Py_ssize_t tasks = c.groups * max(1, c.panels // plan.base.task_panels)
    tasks *= max(1, c.channels // (plan.base.channel_blocks * c.panel))
    divide(c, rows, columns, blocks)
    size(plan)
    while (rows > 1 or columns > 2 * step) and (
        _unit_bytes(plan) > UNIT_BYTES
        or (tasks * c.batch * blocks.count < FEWEST_TASKS and blocks.rows * blocks.columns >= 2 * CHUNK_PIXELS)
    ):
        if rows > 1:
            rows = plan.base.blocks.rows - ceil_div(plan.base.blocks.rows, 8)
        else:
            parts += 1
            columns = round_up(ceil_div(c.out[2], parts), step)  # only the last is filled up
        divide(c, rows, columns, blocks)
        if rows == 1 and columns < c.out[2]:
            blocks.columns = columns
            blocks.across = ceil_div(c.out[2], columns)
            blocks.count = c.out[0] * blocks.down * blocks.across
        size(plan)


cdef void size_rows(Plan *plan, Py_ssize_t align) noexcept nogil:
    """Lay the rows of a unit one after another; those of a single column of taps begin at a multiple of ``align``."""
    cdef const Conv *c = &plan.base.c
    cdef const Blocks *blocks = &plan.base.blocks
    cdef Py_ssize_t high = plan.axes[1].reach, wide = plan.axes[2].reach, shared = 0
    if blocks.across == 1 and plan.axes[2].period == 1:
        shared = max(0, min(min(wide, c.pad[2]), blocks.columns + wide - c.pad[2] - c.x.size[4]))
    plan.pitch = blocks.columns + wide - shared
    if wide == 0:
        plan.pitch = round_up(plan.pitch, align)
    plan.pixels = round_up((blocks.rows - 1) * plan.pitch + blocks.columns, c.kernels.depth_step)
    plan.cells = round_up(high * plan.pitch + wide + plan.pixels + 1, 2)


cdef void _size(Plan *plan) noexcept nogil:
    """Size what is packed for a unit: two copies, unless all shifts are even."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t wide = plan.axes[2].reach, pieces = c.kernels.pieces
    size_rows(plan, 2)
    plan.plane = (plan.cells // 2 | 1) * c.panel  # an odd number of lines: pieces are not in the same sets of L1
    plan.copy_bytes = 4 * pieces * plan.plane
    plan.phase_bytes = plan.copy_bytes * (2 if wide else 1)
    plan.block_bytes = c.kernel[0] * plan.axes[1].phases * plan.axes[2].phases * plan.phase_bytes
    plan.grad_row = plan.pixels * c.packed
    plan.grad_bytes = c.panel * plan.grad_row
    plan.float_bytes = max((2 * CELLS + 1) * c.kernels.lanes, plan.pixels * c.panel) * c.item


cdef Py_ssize_t _unit_bytes(const Plan *plan) noexcept nogil:
    """Bytes of a task's share of a unit, packed."""
    return plan.block_bytes + plan.base.task_panels * plan.grad_bytes


# ------------------------------------------------------------------------------------------------------------- tasks

cdef int _weight_task(const void *shared, Py_ssize_t task) noexcept nogil:
    """Reduce one chunk of the units for one task's channels and filters."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const WeightPlan *base = &plan.base
    cdef WeightTask t
    cdef Workspace space
    cdef Py_ssize_t unit, count, b, i, grad_bytes = base.task_panels * plan.grad_bytes
    if start_task(base, task, &t):
        return 1
    if t.first_unit == t.end_unit:  # of no images
        clear_sums(base, &t)
    space.image = arena(FC_ARENA_BLOCK, plan.together * (plan.block_bytes + grad_bytes) + plan.float_bytes)
    if space.image == NULL:
        return 1
    space.grads = space.image + plan.together * plan.block_bytes
    space.floats = space.grads + plan.together * grad_bytes
    for i in range(32):
        space.rows[i] = i * plan.pixels
    for i in range(plan.together):
        space.grad_units[i] = i * grad_bytes // base.c.packed
        space.image_units[i] = i * plan.block_bytes // 2
    for unit from t.first_unit <= unit < t.end_unit by plan.together:
        count = min(plan.together, t.end_unit - unit)
        if base.refused[0]:
            return 0
        if not _split_grads(plan, &t, unit, count, &space):
            base.refused[0] = 1
            return 0
        for b in range(t.channel_blocks):
            if not _split_block(plan, &t, unit, count, b, &space):
                base.refused[0] = 1
                return 0
            _multiply(plan, &t, &space, count, b, unit > t.first_unit)
    end_task(base, &t)
    return 0


cdef bint _split_grads(const Plan *plan, const WeightTask *t, Py_ssize_t unit, Py_ssize_t count,
                       const Workspace *space) noexcept nogil:
    """Split the gradients of some units; return whether they can be split."""
    cdef Py_ssize_t i, panel
    cdef Block block
    cdef int sizes
    for i in range(count):
        locate(&plan.base.c, &plan.base.blocks, unit + i, &block)
        for panel in range(t.panels):
            sizes = split_panel(
                plan, t, &block, panel, 0, space.floats, space.grads + (i * plan.base.task_panels + panel) * plan.grad_bytes
            )
            if sizes & FC_HUGE or sizes == FC_TINY:
                return False
    return True


cdef bint _split_block(const Plan *plan, const WeightTask *t, Py_ssize_t unit, Py_ssize_t count, Py_ssize_t b,
                       const Workspace *space) noexcept nogil:
    """Split a block of channels of some units' parts of the image; return whether they can be split."""
    cdef Py_ssize_t i
    cdef Block block
    cdef int sizes
    for i in range(count):
        locate(&plan.base.c, &plan.base.blocks, unit + i, &block)
        sizes = _split_image(
            plan, t, &block, t.channel + b * plan.base.width, space.floats, space.image + i * plan.block_bytes
        )
        if sizes & FC_HUGE or sizes == FC_TINY:
            return False
    return True


cdef int _split_image(const Plan *plan, const WeightTask *t, const Block *block, Py_ssize_t channel, char *floats,
                      char *out) noexcept nogil:
    """Split all phases of a block of channels, and return the sizes of the numbers."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t vector_bytes = 2 * c.kernels.pieces * plan.plane, d, h, w, v
    cdef int sizes = 0
    for d in range(c.kernel[0]):
        for h in range(plan.axes[1].phases):
            for w in range(plan.axes[2].phases):
                for v in range(ceil_div(min(c.panel, c.channels - channel), c.kernels.lanes)):
                    sizes |= _split_phase(
                        plan, t, block, channel + v * c.kernels.lanes, d, h, w, floats, out + v * vector_bytes
                    )
                out += plan.phase_bytes
    return sizes


cdef int _split_phase(const Plan *plan, const WeightTask *t, const Block *block, Py_ssize_t channel, Py_ssize_t d,
                      Py_ssize_t h, Py_ssize_t w, char *floats, char *out) noexcept nogil:
    """Split the cells of a phase of a vector of channels, as many at a time as stay in L1; return the numbers' sizes."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t cell_bytes = c.kernels.lanes * c.item, first, count
    cdef char *cells = floats + cell_bytes  # after the cell before
    cdef int sizes = 0
    memset(floats, 0, <size_t>cell_bytes)
    for first from 0 <= first < plan.cells by CELLS:
        count = min(<Py_ssize_t>CELLS, plan.cells - first)
        lay_cells(plan, t, block, channel, d, h, w, first, count, cells, cells + CELLS * cell_bytes)
        sizes |= c.kernels.split_pairs(
            cells, count, c.kernels.pieces, out, out + plan.copy_bytes if plan.axes[2].reach else NULL, plan.plane
        )
        out += count // 2 * c.panel * 2
        memcpy(floats, floats + count * cell_bytes, <size_t>cell_bytes)
    return sizes


cdef Py_ssize_t lay_cells(const Plan *plan, const WeightTask *t, const Block *block, Py_ssize_t channel, Py_ssize_t d,
                          Py_ssize_t h, Py_ssize_t w, Py_ssize_t first, Py_ssize_t count, char *out, char *row) noexcept nogil:
    """Lay some cells of a phase, [cell][vector of channels], zeros in padding and gaps; ``row`` is room for as many.

    Return how many cells are the image's.
    """
    cdef const Conv *c = &plan.base.c
    cdef const View *x = &c.x
    cdef Py_ssize_t lanes = c.kernels.lanes, step = c.stride[2], done = 0, laid = 0, r, y, at, end
    cdef Py_ssize_t channels = min(lanes, c.channels - channel)
    cdef Py_ssize_t z = block.depth * c.stride[0] - c.pad[0] + d * c.dilation[0]
    cdef Py_ssize_t top = block.top * c.stride[1] - c.pad[1] + h * c.dilation[1]
    cdef Py_ssize_t left = block.left * step - c.pad[2] + w * c.dilation[2]
    cdef Py_ssize_t start = 0 if left >= 0 else (step - 1 - left) // step  # cells of a row that are not padding
    cdef Py_ssize_t stop = 0 if left >= x.size[4] else (x.size[4] - 1 - left) // step + 1
    cdef const char *image = x.data + (
        block.image * x.stride[0] + (t.group * c.channels + channel) * x.stride[1] + z * x.stride[2]
        + top * x.stride[3] + left * x.stride[4]
    ) * c.item
    stop = min(stop, block.columns + plan.axes[2].reach)
    if channels < lanes:
        memset(out, 0, <size_t>(count * lanes * c.item))
    if 0 <= z < x.size[2] and stop > start:
        for r in range(max(0, first // plan.pitch - 1), min(block.rows + plan.axes[1].reach, (first + count) // plan.pitch + 1)):
            at = max(0, r * plan.pitch + start - first)
            end = min(count, r * plan.pitch + stop - first)
            y = top + r * c.stride[1]
            if end <= at or y < 0 or y >= x.size[3]:
                continue
            memset(out + done * lanes * c.item, 0, <size_t>((at - done) * lanes * c.item))
            done = end
            laid += end - at
            _turn_cells(
                c, image + (r * c.stride[1] * x.stride[3] + (first + at - r * plan.pitch) * step * x.stride[4]) * c.item,
                channels, end - at, out + at * lanes * c.item, row,
            )
    memset(out + done * lanes * c.item, 0, <size_t>((count - done) * lanes * c.item))
    return laid


cdef void _turn_cells(const Conv *c, const char *cells, Py_ssize_t channels, Py_ssize_t count, char *out,
                      char *row) noexcept nogil:
    """Turn cells of an image's row to [cell][vector of channels]; those of a stride in two steps, which vectors make."""
    cdef Py_ssize_t cell_step = c.stride[2] * c.x.stride[4], channel_step = c.x.stride[1]
    if cell_step != 1 and channel_step != 1:
        c.kernels.transpose(cells, cell_step, channel_step, count, channels, row, count)
        cells = row
        channel_step = count
        cell_step = 1
    c.kernels.transpose(cells, channel_step, cell_step, channels, count, out, c.kernels.lanes)


cdef int split_panel(const Plan *plan, const WeightTask *t, const Block *block, Py_ssize_t panel, float scale, char *floats,
                     char *out) noexcept nogil:
    """Split a panel's gradients, add them to that of the bias, and return the sizes of the numbers."""
    cdef const Conv *c = &plan.base.c
    cdef const View *y = &c.y
    cdef Py_ssize_t filter = (t.panel + panel) * c.panel, filters = min(c.panel, c.filters - filter), count, row
    cdef int sizes = 0
    cdef Py_ssize_t pixels = (block.rows - 1) * plan.pitch + block.columns
    cdef const char *first = y.data + (
        block.image * y.stride[0] + (t.group * c.filters + filter) * y.stride[1] + block.depth * y.stride[2]
        + block.top * y.stride[3] + block.left * y.stride[4]
    ) * c.item
    if plan.base.bias != NULL and t.channel == 0:
        pack_pixels(
            c, block, t.group * c.filters + filter, filters, panel_vectors(c, t.panel + panel) * c.kernels.lanes, 0,
            block.rows * block.columns, floats,
        )
        add_bias(&plan.base, t, panel, floats, block.rows * block.columns)
    memset(  # a tile reads half a panel
        out + filters * plan.grad_row, 0, <size_t>((round_up(filters, c.panel // 2) - filters) * plan.grad_row)
    )
    if y.stride[4] == 1 and (block.rows == 1 or (block.columns == plan.pitch and y.stride[3] == plan.pitch)):
        if round_up(pixels, c.kernels.depth_step) == plan.pixels:  # without a gap: as they are
            return _split_rows(plan, first, filters, y.stride[1], pixels, scale, out)
    memset(floats, 0, <size_t>(FILTERS * plan.pixels * c.item))
    for filter from 0 <= filter < filters by FILTERS:
        count = min(<Py_ssize_t>FILTERS, filters - filter)
        for row in range(block.rows):
            c.kernels.transpose(
                first + (filter * y.stride[1] + row * y.stride[3]) * c.item, y.stride[4], y.stride[1], block.columns, count,
                floats + row * plan.pitch * c.item, plan.pixels,
            )
        sizes |= _split_rows(plan, floats, count, plan.pixels, plan.pixels, scale, out + filter * plan.grad_row)
    return sizes


cdef int _split_rows(const Plan *plan, const char *numbers, Py_ssize_t rows, Py_ssize_t step, Py_ssize_t n, float scale,
                     char *out) noexcept nogil:
    """Split rows of n numbers into pieces, or digits; return the sizes of the numbers."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t row
    if not c.kernels.digits:
        return c.kernels.split_rows(numbers, rows, step, n, c.kernels.pieces, out)
    for row in range(rows):
        c.kernels.digits_rows(numbers + row * step * c.item, 1, 0, n, scale, out + row * plan.grad_row)
    return FC_ORDINARY


cdef void _multiply(const Plan *plan, const WeightTask *t, const Workspace *space, Py_ssize_t units, Py_ssize_t b,
                    bint accumulate) noexcept nogil:
    """Add some units' products to the sums of a block of channels; sums are [panel][tap][filter][channel of all blocks]."""
    cdef const WeightPlan *base = &plan.base
    cdef const Conv *c = &base.c
    cdef Py_ssize_t panel, filters
    cdef int vectors = 1 if c.channels - t.channel - b * c.panel <= c.kernels.lanes else 2
    cdef fc_reduction reduction = fc_reduction_over(space.grad_units, units, plan.pixels)
    reduction.b_taps = space.image_units
    reduction.c_step = base.channel_blocks * c.panel
    c.kernels.enter()
    for panel in range(t.panels):
        filters = round_up(min(c.panel, c.filters - (t.panel + panel) * c.panel), c.panel // 2)
        _multiply_taps(
            plan, &reduction, space.grads + panel * plan.grad_bytes, space.rows, filters, space.image, vectors,
            t.accumulators + (panel * c.taps * c.panel * reduction.c_step + b * c.panel) * c.item, accumulate,
        )
    c.kernels.leave()


cdef void _multiply_taps(const Plan *plan, const fc_reduction *reduction, const char *grads, const Py_ssize_t *rows,
                         Py_ssize_t filters, const char *image, int vectors, char *sums, bint accumulate) noexcept nogil:
    """Add the products of a panel and a block of channels, tap by tap."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t d, h, w, phase, shift
    for d in range(c.kernel[0]):
        for h in range(c.kernel[1]):
            for w in range(c.kernel[2]):
                phase = phase_of(plan, d, h, w, &shift)
                c.kernels.brgemm_pairs(
                    reduction, grads, rows, filters,
                    image + phase * plan.phase_bytes + shift % 2 * plan.copy_bytes + (shift + 1) // 2 * c.panel * 2, plan.plane,
                    vectors, sums, accumulate,
                )
                sums += c.panel * reduction.c_step * c.item


cdef Py_ssize_t phase_of(const Plan *plan, Py_ssize_t d, Py_ssize_t h, Py_ssize_t w, Py_ssize_t *shift) noexcept nogil:
    """Return the phase that a tap sees, and how far it is shifted."""
    cdef const Axis *high = &plan.axes[1]
    cdef const Axis *wide = &plan.axes[2]
    shift[0] = h // high.period * high.step * plan.pitch + w // wide.period * wide.step
    return (d * high.phases + h % high.period) * wide.phases + w % wide.period
