"""The gradient of the weights by ``conv_direct``: rows of the tile are (tap, channel), the reduction runs over pixels.

    grad_weight[t, i][k] = sum over pixels p of  part[p * stride + t * dilation][i] * grad_output[p][k]

    for chunk of all images' blocks, some channels, some panels:           in parallel (``weight_chunks``)
        for block of output pixels:
            pack the part of the image that it sees, and its gradients     both stay in L2
            for panel: for channel block: for some lines of pixels:        the panel's share of them stays in L1
                for tile of (tap, channel): brgemm over lines and pixels

                  pixels                  filters               filters
             +--------------+          +-----------+          +---------+
      taps * | cells of the |   pixels | gradients |   taps * |  sums   |
    channels |     image    |     x    |           | channels |         |
             +--------------+          +-----------+          +---------+

A tile that multiplies pieces of numbers reads 32 pixels of a (tap, channel) as one cache line. For it the image is packed
in lines of pixels, channel by channel, and once for each column of taps: shifted and thinned out as that column sees it.

    [column of taps][kernel depth][line][channel][pixel]     lines start at cache lines, whatever the tap and the stride

    long rows:  a line is one row of pixels; rows of taps share lines, which are packed once for each column of taps
    short rows: a line is all rows of a block, one after the other; it is packed once for each tap

      +-----------+---+-----------+---+-----------+---+-----+      A line of gradients. Rows are filled up to a
      |   row 0   | 0 |   row 1   | 0 |   row 2   | 0 |  0  |      multiple of 8, lines to one of 32: with zeros, so
      +-----------+---+-----------+---+-----------+---+-----+      that what the image has there need only be finite.

How many zeros there are, and how many copies, decides between long and short, and whether the tile is used at all.
If there are inf, NaN or huge numbers, or a part has nothing but tiny ones, all is computed without splitting. The
gradient of the bias is summed before splitting. A depthwise convolution has a microkernel of its own.
"""

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels.native.blocking cimport (
    CHANNELS, DEPTHWISE_BYTES, DIRECT_BYTES, Block, Blocks, Conv, View, ceil_div, cut, divide, locate, make_conv,
    pack_image, pack_pixels, panel_vectors, part_cells, piece_tile, round_up, run_tasks, split_pays, tap_offsets,
    use_tile,
)
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_HUGE, FC_TINY, arena, fc_lines, fc_reduction, fc_ukernels,
)
from fastconv.kernels.native.weight_chunks cimport (
    WEIGHT_PANELS, WEIGHT_ROWS, WeightPlan, WeightTask, add_bias, end_task, plan_chunks, reduce_chunks, start_task,
    store_bias, store_weight, sum_pixels, want_bias,
)

cdef enum:
    PIXELS = 256            # that one brgemm reduces over: a panel's share of them, in float32, stays in L1
    PACKED_BYTES = 3 << 19  # lines and split gradients of a block: with the sums inside L2, 2 MB where there is AMX
    MOST_BYTES = 1 << 22    # the same where a block can't be cut as small: half of the promised workspace
    COLUMNS = 64            # of a block of long rows: then it has some rows, which see the same rows of the image
    ROW_STEP = 8            # pixels of a short row, filled up, are a multiple: ``lay_pixels`` moves so many
    USES = 40               # with fewer products for each number, splitting it takes longer than it saves, about
    COPY = 32               # products in the time that laying a pixel takes, about


def conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options):
    """See ``fastconv.kernels``."""
    if dims.groups > 1 and grad_weight.shape[1] == 1:
        multiplier = grad_weight.shape[0] // dims.groups
        for j in range(multiplier):
            part = None if grad_bias is None else grad_bias[j::multiplier]
            _depthwise_weight(input, grad_output[:, j::multiplier], grad_weight[j::multiplier], part, dims, options)
    elif not _weight_grad(input, grad_output, grad_weight, grad_bias, dims, options, True):
        _weight_grad(input, grad_output, grad_weight, grad_bias, dims, options, False)


# What all tasks of one call share.
ctypedef struct Plan:
    WeightPlan base
    Py_ssize_t part_bytes       # a channel block of the packed part of the image
    Py_ssize_t grad_bytes       # the packed gradients of a panel
    Py_ssize_t float_bytes      # of numbers to be split, and of the pieces of an image row
    fc_lines lines              # of a channel block; this and the rest is for a tile of pieces only
    Py_ssize_t line_rows        # output rows in a line: one, or all of a block
    Py_ssize_t row_pitch        # pixels of a line from one row to the next
    Py_ssize_t line_count       # lines for one column of taps and kernel depth


cdef bint _weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims, options,
                       bint split) except *:
    """Compute the gradients; return whether there were only numbers that can be split, if they were to be."""
    cdef Plan plan
    cdef WeightPlan *base = &plan.base
    cdef Conv *c = &base.c
    make_conv(c, input, grad_weight, grad_output, dims, options)
    if not split or not _plan_lines(&plan, options.precision):
        _plan_cells(&plan)
    plan_chunks(base, c.batch * base.blocks.count, grad_bias)
    return reduce_chunks(base, _weight_task, &plan)


cdef void _plan_cells(Plan *plan) noexcept nogil:
    """Plan for the tile that multiplies numbers."""
    cdef WeightPlan *base = &plan.base
    cdef Conv *c = &base.c
    cdef Blocks *blocks = &base.blocks
    base.width = ceil_div(c.channels, ceil_div(c.channels, CHANNELS))  # even parts
    base.channel_blocks = min(ceil_div(c.channels, base.width), max(1, WEIGHT_ROWS // (c.taps * base.width)))
    cut(c, base.channel_blocks * base.width * c.item, DIRECT_BYTES, PIXELS, blocks)
    plan.part_bytes = base.width * part_cells(c, blocks.rows, blocks.columns) * c.item
    plan.grad_bytes = c.panel * blocks.rows * blocks.columns * c.item
    plan.float_bytes = 0
    plan.line_rows = 1


# ------------------------------------------------------------------------------------------------------------- lines

cdef bint _plan_lines(Plan *plan, str precision):
    """Plan for the tile that multiplies pieces of numbers; return whether there is one and the shape fills it."""
    cdef WeightPlan *base = &plan.base
    cdef Conv *c = &base.c
    cdef const fc_ukernels *numbers = c.kernels
    cdef const fc_ukernels *pieces = piece_tile(c, precision)
    cdef Py_ssize_t channels = round_up(c.channels, CHANNELS), workspace
    cdef double padded
    if pieces == NULL or min(c.channels, c.filters) * c.taps < USES:
        return False
    use_tile(c, pieces)
    base.width = CHANNELS
    if channels % (2 * CHANNELS) == 0 and 2 * CHANNELS * c.taps <= WEIGHT_ROWS:
        base.width = 2 * CHANNELS  # whole tiles
    base.channel_blocks = max(1, min(channels, WEIGHT_ROWS // c.taps) // base.width)
    _cut_lines(plan)
    _size_lines(plan)
    padded = <double>_line_pixels(plan) * channels / (c.out[1] * c.out[2] * c.channels)
    workspace = base.channel_blocks * plan.part_bytes + plan.float_bytes
    workspace += min(c.panels, <Py_ssize_t>WEIGHT_PANELS) * plan.grad_bytes
    if split_pays(pieces, padded) and workspace <= MOST_BYTES:
        return True
    use_tile(c, numbers)
    return False


cdef void _cut_lines(Plan *plan) noexcept nogil:
    """Cut the output into blocks, and these into lines of one row or of all rows, whichever takes less time."""
    cdef Conv *c = &plan.base.c
    cdef Blocks *blocks = &plan.base.blocks
    cdef Blocks long_rows
    cdef Py_ssize_t filters = min(WEIGHT_PANELS * c.panel, c.filters)
    cdef Py_ssize_t channels = plan.base.channel_blocks * plan.base.width
    cdef Py_ssize_t pixels = min(<Py_ssize_t>PIXELS, PACKED_BYTES // ((c.taps * channels + filters) * c.packed))
    cdef Py_ssize_t together = pixels // round_up(c.out[2], ROW_STEP)
    cdef Block block
    cdef double time
    cut(c, (c.kernel[2] * channels + filters) * c.packed, PACKED_BYTES, COLUMNS, &long_rows)
    long_rows.columns = round_up(long_rows.columns, c.kernels.depth_step)  # only the last block is filled up
    long_rows.across = ceil_div(c.out[2], long_rows.columns)
    long_rows.count = c.out[0] * long_rows.down * long_rows.across
    blocks[0] = long_rows
    plan.line_rows = 1
    if together < 2 or c.out[1] == 1:
        return
    locate(c, blocks, 0, &block)
    time = _line_pixels(plan) * (filters + <double>COPY * block.high / (block.rows * c.kernel[1]))
    divide(c, together, c.out[2], blocks)
    plan.line_rows = blocks.rows
    if time <= _line_pixels(plan) * <double>(filters + COPY):
        blocks[0] = long_rows
        plan.line_rows = 1


cdef Py_ssize_t _pitch(const Plan *plan) noexcept nogil:
    """Pixels of a line, filled up."""
    cdef const Blocks *blocks = &plan.base.blocks
    if plan.line_rows == 1:
        return blocks.columns
    return round_up(plan.line_rows * round_up(blocks.columns, ROW_STEP), plan.base.c.kernels.depth_step)


cdef Py_ssize_t _line_pixels(const Plan *plan) noexcept nogil:
    """Pixels of all lines of an output plane, filled up."""
    cdef const Conv *c = &plan.base.c
    if plan.line_rows == 1:
        return c.out[1] * round_up(c.out[2], c.kernels.depth_step)
    return plan.base.blocks.down * _pitch(plan)


cdef void _size_lines(Plan *plan) noexcept nogil:
    """Size lines and workspace."""
    cdef const Conv *c = &plan.base.c
    cdef fc_lines *lines = &plan.lines
    cdef bint long_rows = plan.line_rows == 1
    cdef Block block
    locate(c, &plan.base.blocks, 0, &block)
    lines.channels = plan.base.width
    lines.step = c.stride[2]
    lines.pitch = _pitch(plan)
    plan.row_pitch = lines.pitch if long_rows else round_up(block.columns, ROW_STEP)
    plan.line_count = block.high if long_rows else c.kernel[1]
    lines.run = round_up(plan.row_pitch * c.stride[2] + (c.kernel[2] - 1) * c.dilation[2], c.kernels.lanes)
    plan.part_bytes = c.kernel[2] * c.kernel[0] * plan.line_count * lines.channels * lines.pitch * c.packed
    plan.grad_bytes = ceil_div(block.rows, plan.line_rows) * lines.pitch * c.panel * c.packed
    plan.float_bytes = max(lines.channels * lines.run * (c.item + c.packed), lines.pitch * c.panel * c.item)


cdef int _lay_part(const Plan *plan, const Block *block, Py_ssize_t first, Py_ssize_t count, char *floats,
                   char *out) noexcept nogil:
    """Split channels ``first`` to ``first + count`` of a block's part of the image and lay them; return their sizes."""
    cdef const Conv *c = &plan.base.c
    cdef const fc_lines *lines = &plan.lines
    cdef bint long_rows = plan.line_rows == 1, fresh
    cdef Py_ssize_t line_bytes = lines.channels * lines.pitch * c.packed, d, y, h, w, r, line
    cdef char *pieces = floats + lines.channels * lines.run * c.item
    cdef int sizes = 0
    for d in range(c.kernel[0]):
        for y in range(block.high):
            fresh = True
            for h in range(c.kernel[1]):
                r = y - h * c.dilation[1]  # then the output row that sees it, if one does
                if r < 0 or r % c.stride[1] or r // c.stride[1] >= block.rows:
                    continue
                if fresh:
                    sizes |= _split_row(plan, block, first, count, d, y, floats, pieces)
                    fresh = False
                line = d * plan.line_count + (y if long_rows else h)
                for w in range(c.kernel[2]):
                    c.kernels.lay_pixels(
                        lines, pieces, w * c.dilation[2], plan.row_pitch, c.kernels.pieces,
                        out + (w * c.kernel[0] * plan.line_count + line) * line_bytes,
                        0 if long_rows else r // c.stride[1] * plan.row_pitch,
                    )
                if long_rows:
                    break
    return sizes


cdef int _split_row(const Plan *plan, const Block *block, Py_ssize_t first, Py_ssize_t count, Py_ssize_t d,
                    Py_ssize_t y, char *floats, char *pieces) noexcept nogil:
    """Split row ``y`` of a part of the image, padding included, to [channel][piece][run]; return the numbers' sizes."""
    cdef const Conv *c = &plan.base.c
    cdef const View *x = &c.x
    cdef Py_ssize_t run = plan.lines.run, channels = plan.lines.channels
    cdef Py_ssize_t left = block.left * c.stride[2] - c.pad[2]
    cdef Py_ssize_t start = min(max(0, -left), block.wide)
    cdef Py_ssize_t stop = max(start, min(block.wide, x.size[4] - left))
    memset(floats, 0, <size_t>(channels * run * c.item))
    d = block.depth * c.stride[0] - c.pad[0] + d * c.dilation[0]
    y += block.top * c.stride[1] - c.pad[1]
    if 0 <= d < x.size[2] and 0 <= y < x.size[3]:
        c.kernels.transpose(
            x.data + (
                block.image * x.stride[0] + first * x.stride[1] + d * x.stride[2] + y * x.stride[3]
                + (left + start) * x.stride[4]
            ) * c.item,
            x.stride[4], x.stride[1], stop - start, count, floats + start * c.item, run,
        )
    return c.kernels.split_runs(floats, channels * run, run, c.kernels.pieces, pieces)


cdef int _split_panel(const Plan *plan, const WeightTask *t, const Block *block, Py_ssize_t panel, char *floats,
                      char *out) noexcept nogil:
    """Split a panel's gradients, line by line, and add them to that of the bias; return the numbers' sizes."""
    cdef const Conv *c = &plan.base.c
    cdef int vectors = panel_vectors(c, t.panel + panel), sizes = 0
    cdef Py_ssize_t width = vectors * c.kernels.lanes, pitch = plan.lines.pitch, line, end, row, pixel, next_pixel
    cdef Py_ssize_t filter = (t.panel + panel) * c.panel, filters = min(width, c.filters - filter)
    for line from 0 <= line < block.rows by plan.line_rows:
        end = min(line + plan.line_rows, block.rows)
        for row in range(line, end):
            pixel = (row - line) * plan.row_pitch
            pack_pixels(
                c, block, t.group * c.filters + filter, filters, width, row * block.columns, block.columns,
                floats + pixel * width * c.item,
            )
            next_pixel = pixel + plan.row_pitch if row + 1 < end else pitch
            pixel += block.columns
            memset(floats + pixel * width * c.item, 0, <size_t>((next_pixel - pixel) * width * c.item))
        add_bias(&plan.base, t, panel, floats, pitch)
        sizes |= c.kernels.split_weights(floats, width, pitch, 1, vectors, c.kernels.pieces, out)
        out += pitch * width * c.packed
    return sizes


cdef void _line_taps(const Plan *plan, Py_ssize_t *taps) noexcept nogil:
    """Write where each tap's lines are in a packed part, from those of the first tap."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t d, h, w, t = 0, step = c.dilation[1] if plan.line_rows == 1 else 1
    for d in range(c.kernel[0]):
        for h in range(c.kernel[1]):
            for w in range(c.kernel[2]):
                taps[t] = ((w * c.kernel[0] + d) * plan.line_count + h * step) * plan.lines.channels * plan.lines.pitch
                t += 1


# ------------------------------------------------------------------------------------------------------------- tasks

cdef int _weight_task(const void *shared, Py_ssize_t task) noexcept nogil:
    """Reduce one chunk of the blocks for one task's channels and filters."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const WeightPlan *base = &plan.base
    cdef const Conv *c = &base.c
    cdef WeightTask t
    if start_task(base, task, &t):
        return 1
    cdef Py_ssize_t rows = c.taps * base.width
    cdef Py_ssize_t offset_bytes = (base.blocks.rows + rows + c.taps + 8) // 8 * 64
    cdef char *memory = arena(
        FC_ARENA_BLOCK,
        offset_bytes + t.channel_blocks * plan.part_bytes + t.panels * plan.grad_bytes + plan.float_bytes,
    )
    if memory == NULL:
        return 1
    cdef Py_ssize_t *row_offsets = <Py_ssize_t *>memory
    cdef Py_ssize_t *line_offsets = row_offsets + rows
    cdef Py_ssize_t *taps = line_offsets + base.blocks.rows
    cdef char *part = memory + offset_bytes
    cdef char *grads = part + t.channel_blocks * plan.part_bytes
    cdef char *floats = grads + t.panels * plan.grad_bytes
    cdef Block block
    cdef Py_ssize_t unit
    if plan.line_rows > 1:  # nothing ever fills the gaps between rows
        memset(part, 0, <size_t>(t.channel_blocks * plan.part_bytes))
    for unit in range(t.first_unit, t.end_unit):
        if base.refused[0]:
            return 0
        locate(c, &base.blocks, unit, &block)
        _offsets(plan, &block, row_offsets, line_offsets, taps)
        if not _pack_unit(plan, &t, &block, part, grads, floats):
            base.refused[0] = 1
            return 0
        _multiply_unit(plan, &t, &block, row_offsets, line_offsets, part, grads)
    end_task(base, &t)
    return 0


cdef void _offsets(const Plan *plan, const Block *block, Py_ssize_t *row_offsets, Py_ssize_t *line_offsets,
                   Py_ssize_t *taps) noexcept nogil:
    """Write where each row of the sums, (tap, channel), and each line of pixels begins in a packed part."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t width = plan.base.width, channel_step = 1, line_step = block.wide * width, row, line
    if c.kernels.pieces:
        _line_taps(plan, taps)
        channel_step = plan.lines.pitch
        line_step = width * channel_step
    else:
        tap_offsets(c, block, width, taps)
    for row in range(c.taps * width):
        row_offsets[row] = taps[row // width] + row % width * channel_step
    for line in range(ceil_div(block.rows, plan.line_rows)):
        line_offsets[line] = line * c.stride[1] * line_step


cdef bint _pack_unit(const Plan *plan, const WeightTask *t, const Block *block, char *part, char *grads,
                     char *floats) noexcept nogil:
    """Pack a block's part of the image and its gradients; return whether they can be split, if they are to be."""
    cdef const WeightPlan *base = &plan.base
    cdef const Conv *c = &base.c
    cdef bint split = c.kernels.pieces > 0
    cdef Py_ssize_t b, first, count, panel
    cdef int sizes = 0, panel_sizes
    for b in range(t.channel_blocks):
        first = t.channel + b * base.width
        count = min(base.width, c.channels - first)
        first += t.group * c.channels
        if split:
            sizes |= _lay_part(plan, block, first, count, floats, part + b * plan.part_bytes)
        else:
            pack_image(c, block, first, count, base.width, part + b * plan.part_bytes)
    for panel in range(t.panels):
        if split:
            panel_sizes = _split_panel(plan, t, block, panel, floats, grads + panel * plan.grad_bytes)
            if panel_sizes & FC_HUGE or panel_sizes == FC_TINY:
                return False
        else:
            _pack_panel(plan, t, block, panel, grads + panel * plan.grad_bytes)
    return not sizes & FC_HUGE and sizes != FC_TINY


cdef void _pack_panel(const Plan *plan, const WeightTask *t, const Block *block, Py_ssize_t panel,
                      char *out) noexcept nogil:
    """Pack a panel's gradients, and add them to that of the bias."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t filter = (t.panel + panel) * c.panel, pixels = block.rows * block.columns
    pack_pixels(
        c, block, t.group * c.filters + filter, min(c.panel, c.filters - filter),
        panel_vectors(c, t.panel + panel) * c.kernels.lanes, 0, pixels, out,
    )
    add_bias(&plan.base, t, panel, out, pixels)


cdef void _multiply_unit(const Plan *plan, const WeightTask *t, const Block *block, const Py_ssize_t *row_offsets,
                         const Py_ssize_t *line_offsets, const char *part, const char *grads) noexcept nogil:
    """Add a block's products to all sums of a task."""
    cdef const WeightPlan *base = &plan.base
    cdef const Conv *c = &base.c
    cdef Py_ssize_t panel, b
    if c.kernels.pieces:
        c.kernels.enter()
    for panel in range(t.panels):
        for b in range(t.channel_blocks):
            _multiply(
                plan, block, panel_vectors(c, t.panel + panel), row_offsets, line_offsets, part + b * plan.part_bytes,
                grads + panel * plan.grad_bytes,
                t.accumulators + (panel * base.channel_blocks + b) * c.panel * c.taps * base.width * c.item,
            )
    if c.kernels.pieces:
        c.kernels.leave()


cdef void _multiply(const Plan *plan, const Block *block, int vectors, const Py_ssize_t *row_offsets,
                    const Py_ssize_t *line_offsets, const char *part, const char *grads,
                    char *accumulators) noexcept nogil:
    """Add one block's pixels to (taps x channels of a block) x (filters of a panel), some lines at a time."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t rows = c.taps * plan.base.width, width = vectors * c.kernels.lanes, line, together
    cdef Py_ssize_t count = ceil_div(block.rows, plan.line_rows)
    cdef Py_ssize_t pitch = plan.lines.pitch if c.kernels.pieces else block.columns
    cdef fc_reduction reduction
    reduction.apart = 0
    reduction.depth = pitch if plan.line_rows > 1 else round_up(block.columns, c.kernels.depth_step)
    reduction.a_step = 1 if c.kernels.pieces else c.stride[2] * plan.base.width
    reduction.b_taps = NULL
    reduction.b_tap = pitch * width
    reduction.b_step = width
    reduction.c_step = width
    together = max(1, PIXELS * c.item // (c.packed * pitch))
    for line from 0 <= line < count by together:
        reduction.taps = line_offsets + line
        reduction.n_taps = min(together, count - line)
        c.kernels.brgemm(
            &reduction, part, row_offsets, rows, grads + line * reduction.b_tap * c.packed, vectors, accumulators, 1
        )


# --------------------------------------------------------------------------------------------------------- depthwise

cdef void _depthwise_weight(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, cnp.ndarray grad_bias,
                            dims, options):
    """One filter for each channel: a task has a block of channels and all images."""
    cdef WeightPlan plan
    cdef Conv *c = &plan.c
    make_conv(c, input, grad_weight, grad_output, dims, options)
    plan.channel_blocks = (c.groups + CHANNELS - 1) // CHANNELS
    cut(c, CHANNELS * c.item, DEPTHWISE_BYTES, c.out[2], &plan.blocks)
    want_bias(&plan, grad_bias)
    run_tasks(_depthwise_weight_task, &plan, plan.channel_blocks, c.threads)


cdef int _depthwise_weight_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const WeightPlan *plan = <const WeightPlan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t first = task * CHANNELS
    cdef Py_ssize_t channels = min(<Py_ssize_t>CHANNELS, c.groups - first)
    cdef Py_ssize_t part_bytes = CHANNELS * part_cells(c, plan.blocks.rows, plan.blocks.columns) * c.item
    cdef Py_ssize_t tap_bytes = (c.taps + 8) // 8 * 64
    cdef Py_ssize_t sum_bytes = (c.taps + 1) * CHANNELS * c.item
    cdef char *memory = arena(
        FC_ARENA_BLOCK,
        tap_bytes + sum_bytes + part_bytes + CHANNELS * plan.blocks.rows * plan.blocks.columns * c.item,
    )
    if memory == NULL:
        return 1
    cdef Py_ssize_t *taps = <Py_ssize_t *>memory
    cdef char *accumulators = memory + tap_bytes
    cdef char *bias_sums = accumulators + c.taps * CHANNELS * c.item
    cdef char *part = accumulators + sum_bytes
    cdef char *grads = part + part_bytes
    cdef Block block
    cdef Py_ssize_t unit, r
    memset(accumulators, 0, <size_t>sum_bytes)
    for unit in range(c.batch * plan.blocks.count):
        locate(c, &plan.blocks, unit, &block)
        tap_offsets(c, &block, CHANNELS, taps)
        pack_image(c, &block, first, channels, CHANNELS, part)
        pack_pixels(c, &block, first, channels, CHANNELS, 0, block.rows * block.columns, grads)
        if plan.bias != NULL:
            sum_pixels(c, grads, block.rows * block.columns, CHANNELS, bias_sums)
        for r in range(block.rows):
            c.kernels.depthwise_weight(
                taps, c.taps, part + r * c.stride[1] * block.wide * CHANNELS * c.item, c.stride[2] * CHANNELS,
                grads + r * block.columns * CHANNELS * c.item, block.columns, CHANNELS, accumulators,
            )
    store_weight(c, first, 0, channels, 1, 1, CHANNELS, accumulators)
    store_bias(plan, first, channels, bias_sums)
    return 0
