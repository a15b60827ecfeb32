"""Convolution with neighbouring pixels as lanes, for few channels or few filters: nothing is turned.

    output[k][row][x] = bias[k] + sum over (c, t) of  weight[k, c, t] * planes[c][row * stride + rows of t][x + columns of t]

    for image, some groups, block of output rows:               in parallel
        for group: for block of channels:
            copy the rows that the block sees, padding included [channel][kernel depth][row][phase of the stride]: L1, or L2
            for tile of filters: for row: for tile of pixels:   sums in registers
                store: bias, activation                         rows of the output, where they are

                         a row of a plane, twice                 sums
                       +------------------------+            +-----------+
     weights, packed   | c: cells that tap 0    |          k | 3 vectors |
     for a tile   x    |    sees, ...           |    =       | of pixels |
     of 4, or 8 k      |    ... that tap 1 sees |            +-----------+
                       +------------------------+

The cells that a vector of pixels sees through a tap are a vector of cells, anywhere in a row; with a stride, cells a stride apart are
made neighbours when they are copied. In the gradient of the input, with a stride, it is the output whose neighbours are of different
phases: where there is a single filter, their sums stay in L1 until they are interleaved, row by row. The first layer of a network, from three channels to many filters, is such a convolution, the gradient
of its input, and groups of few channels. So is a depthwise one. There, and for any single filter, a tile is a vector of pixels in
each of 7 rows: a cell that was loaded once serves a column of taps, and weights are read where the caller has them.

Where the machine has a tile that multiplies pieces of numbers, and sums are long enough for their products to take longer than storing
them, planes are split, and a vector of cells of two taps is a row of that tile (``amx_planes.h``).
"""

cimport numpy as cnp

from fastconv.kernels import interleave
from fastconv.kernels.native.blocking cimport (
    Block, Blocks, Conv, View, bias_at, ceil_div, choose_threads, divide, extent, locate, make_conv, pack_bias, part_cells,
    piece_tile, round_up, run_tasks, split_pays, use_tile,
)
from fastconv.kernels.native.digits cimport NUMBERS, PIECES
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_HUGE, FC_LAID_BYTES, FC_ORDINARY, FC_TINY, arena, fc_epilogue, fc_planes, fc_ukernels,
    ukernels,
)
from fastconv.kernels.native.planes cimport (
    FEW_CHANNELS, SPLIT_PRODUCTS, Plan, fill_gaps, lay_out, pad_planes, tap_cell, write_taps,
)

from fastconv.kernels.native.digits import by_forms
from fastconv.kernels.native.weight_planar import conv_weight_grad

cdef enum:
    NEAR_BYTES = 1 << 15        # of planes that a block sees: L1, if it has some rows then,
    PLANE_BYTES = 1 << 18       # else part of L2
    AHEAD_BYTES = 1 << 13       # of planes that are copied before any is read
    STRAND_BYTES = 3 << 12      # of sums that are interleaved while L1 has them
    LONG_ROW = 64               # pixels: longer ones may be cut
    LEAST_TOGETHER = 4          # channels that are at least added up before sums go to memory
    TERMS = 384                 # of a sum that are added up by themselves
    TASK_PIXELS = 1 << 12       # that are worth a task
    FEW_PIXELS = 8              # of a row: with a stride, making cells neighbours takes longer than turning them to channels
    LAID_BYTES = 3 << 17        # of planes, and what is laid of their pieces: part of L2


def conv_forward(input, weight, bias, output, dims, options):
    """See ``fastconv.kernels``."""
    by_forms(_forward, input, output, 0, (weight, bias, dims, options))


def suits(input, output, dims):
    """Whether a depthwise convolution had better be done here: pixels of a row are neighbours, and not too few."""
    near = input.strides[4] == input.itemsize and output.strides[4] in (input.itemsize, 2 * input.itemsize)
    few = FEW_PIXELS if dims.stride[2] > 1 else ukernels(input.itemsize).lanes // 2
    return near and dims.output_size[2] > few


def suits_gradient(grad_output, grad_input, dims):
    """The same for the gradient of its input."""
    few = 0 if max(dims.stride) > 1 else ukernels(grad_input.itemsize).lanes // 2
    return grad_output.strides[4] == grad_input.strides[4] == grad_input.itemsize and dims.input_size[2] > few


def conv_input_grad(grad_output, weight, bias, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    merged = None
    if dims.group_in_channels == 1 and grad_input.strides[4] == grad_input.itemsize:
        merged = interleave.merge(dims)
    if merged is not None:
        swapped = interleave.swap_channels(weight, dims.groups)
        _forward(grad_output, grad_input, NUMBERS, swapped, bias, dims, options, merged)
        return
    interleave.input_grad(conv_forward, grad_output, weight, bias, grad_input, dims, options)


def _forward(cnp.ndarray input, cnp.ndarray output, int form, cnp.ndarray weight, bias, dims, options, merged=None):
    """Convolve; return the images that were left out for their numbers don't have that form."""
    cdef Plan plan
    cdef Conv *c = &plan.c
    cdef bytearray refused = bytearray(input.shape[0] + 1)
    make_conv(c, input, weight, output, dims, options)
    _set_strands(&plan, merged, options.threads)
    if form == PIECES:
        _multiply_pieces(&plan, options.precision)
    _cut(&plan)
    plan.in_place = plan.strands == 0 and c.y.stride[4] == 1
    if c.y.stride[4] == 2 and plan.strands == 0 and c.kernels.pieces == 0:
        plan.in_place = plan.together == c.channels
    plan.planes.relu = options.activation == "relu"
    plan.refused = <unsigned char *><char *>refused
    _find_weights(&plan, bias)
    cdef Py_ssize_t tasks = c.batch * plan.blocks.count * ceil_div(c.groups, plan.groups)
    if not refused[c.batch]:
        run_tasks(_forward_task, &plan, tasks, c.threads)
    return [image for image in range(c.batch) if refused[image] or refused[c.batch]]


cdef void _multiply_pieces(Plan *plan, str precision):
    """Change to the tile that multiplies pieces of numbers, if the machine has one and filters, taps and pixels of a row fill it."""
    cdef Conv *c = &plan.c
    cdef const fc_ukernels *kernels = piece_tile(c, precision, c.channels * c.taps)
    if kernels == NULL or plan.strands or c.channels > FEW_CHANNELS or c.channels * c.taps < SPLIT_PRODUCTS or c.dilation[1] > 1:
        return
    cdef double padded = round_up(2 * _row_pairs(c) * c.kernel[1], kernels.depth_step) / <double>(c.channels * c.taps)
    padded *= round_up(c.filters, kernels.lanes) / <double>c.filters * round_up(c.out[2], kernels.lanes) / c.out[2]
    if split_pays(kernels, padded):
        use_tile(c, kernels)


cdef void _set_strands(Plan *plan, merged, threads):
    """Let a gradient of the input be a convolution with stride 1, whose output has a strand for each phase of the stride."""
    cdef Conv *c = &plan.c
    cdef Py_ssize_t[:, ::1] phases, seen
    cdef int axis
    plan.strands = 0
    if merged is None:
        return
    phases, seen = merged.phases, merged.taps  # which ``merged`` keeps
    plan.phase, plan.seen, plan.strands = &phases[0, 0], &seen[0, 0], phases.shape[0]
    for axis in range(3):
        plan.step[axis] = c.stride[axis]
        plan.count[axis] = merged.along[axis]
        c.out[axis], c.kernel[axis], c.pad[axis] = merged.positions[axis], merged.kernel[axis], merged.pad[axis]
        c.stride[axis] = c.dilation[axis] = 1
    choose_threads(c, threads)


cdef void _cut(Plan *plan) noexcept nogil:
    """Cut the output into blocks, and lay out the planes that one of them sees."""
    cdef Conv *c = &plan.c
    cdef Blocks *blocks = &plan.blocks
    cdef Py_ssize_t turned
    plan.one = c.filters == 1
    cdef Py_ssize_t rows = min(c.out[1], <Py_ssize_t>c.kernels.planar_rows)
    plan.together = max(LEAST_TOGETHER, min(TERMS // c.taps, NEAR_BYTES // (part_cells(c, rows, c.out[2]) * c.item)))
    plan.together = min(c.channels, max(1, plan.together))
    _divide(plan)
    plan.groups = max(1, min(c.groups, TASK_PIXELS // (blocks.rows * blocks.columns)))
    turned = 1 if c.x.stride[4] == 1 else ceil_div(c.kernels.lanes, c.channels)  # groups whose channels fill a vector
    plan.groups = min(c.groups, round_up(plan.groups, turned))
    plan.high = extent(c, 1, round_up(blocks.rows, c.kernels.planar_rows) if plan.one else blocks.rows)
    lay_out(plan)
    plan.ahead = 1
    if plan.together == c.channels and c.kernels.pieces == 0:
        plan.ahead = max(min(plan.groups, turned), min(plan.groups, AHEAD_BYTES // (c.channels * plan.plane * c.item)))
        if plan.strands:
            plan.ahead = min(plan.ahead, max(1, STRAND_BYTES // (plan.strands * blocks.rows * plan.columns * c.item)))


cdef void _divide(Plan *plan) noexcept nogil:
    """Cut the output into blocks of some rows: a multiple of what a tile of one filter has, and of parts of rows only if these are long."""
    cdef Conv *c = &plan.c
    cdef Py_ssize_t cell = plan.together * c.item, step = c.kernels.planar_rows
    cdef Py_ssize_t rows = c.out[1], columns = c.out[2]
    if c.kernels.pieces:
        _divide_split(plan)
        return
    while rows > step and part_cells(c, rows, columns) * cell > NEAR_BYTES:
        rows = round_up((rows + 1) // 2, step) if rows > 2 * step else step
    while columns > LONG_ROW and part_cells(c, rows, columns) * cell > PLANE_BYTES:
        columns = (columns + 1) // 2
    while rows > 1 and part_cells(c, rows, columns) * cell > PLANE_BYTES:
        rows = (rows + 1) // 2
    divide(c, rows, columns, &plan.blocks)
    if rows % step == 0:  # not of even size
        plan.blocks.rows = min(rows, c.out[1])
        plan.blocks.down = ceil_div(c.out[1], plan.blocks.rows)
        plan.blocks.count = c.out[0] * plan.blocks.down * plan.blocks.across


cdef void _divide_split(Plan *plan) noexcept nogil:
    """The same where pieces are multiplied: rows that planes, and what is laid of them, fit L2 with; some blocks, for threads to share."""
    cdef Conv *c = &plan.c
    cdef Py_ssize_t laid = _row_pairs(c) * 2 * c.kernels.lanes * c.packed, rows = c.out[1], columns = c.out[2]
    if rows * columns >= TASK_PIXELS // 4:
        rows = (rows + 1) // 2
    while rows > 1 and part_cells(c, rows, columns) * c.channels * c.item + extent(c, 1, rows) * laid > LAID_BYTES:
        rows = (rows + 1) // 2
    while columns > LONG_ROW and part_cells(c, rows, columns) * c.channels * c.item > LAID_BYTES:
        columns = (columns + 1) // 2
    divide(c, rows, columns, &plan.blocks)


cdef void _find_weights(Plan *plan, bias):
    """Pack weights and bias, and write where taps are."""
    cdef Conv *c = &plan.c
    cdef fc_planes *planes = &plan.planes
    cdef Py_ssize_t n = plan.together * c.taps, group
    plan.group_weights = 0 if plan.one else c.filters * c.channels * c.taps * c.item
    if c.kernels.pieces:
        plan.group_weights = round_up(c.filters, c.kernels.lanes) * round_up(2 * _row_pairs(c) * c.kernel[1], c.kernels.depth_step) * c.packed
    cdef Py_ssize_t tap_bytes = round_up(2 * n * sizeof(Py_ssize_t), 64)
    cdef char *memory = arena(FC_ARENA_WEIGHTS, tap_bytes + c.groups * (plan.group_weights + c.filters * c.item))
    if memory == NULL:
        raise MemoryError("no memory for packed weights")
    cdef Py_ssize_t *taps = <Py_ssize_t *>memory
    cdef char *weights = memory + tap_bytes
    planes.taps, planes.weight_taps = taps, taps + n
    if plan.strands:
        _strand_columns(plan, taps, taps + n)
        plan.weights = c.w.data
    elif plan.one or c.kernels.pieces:
        _columns(plan, taps, taps + n)
        planes.high, planes.weight_row = c.kernel[1], c.w.stride[3]
        plan.weights = c.w.data
        if c.kernels.pieces:
            plan.weights = weights
            _split_weights(plan, weights)
    else:
        write_taps(plan, taps)
        for group in range(c.groups):
            _pack_group(plan, group, weights + group * plan.group_weights)
        plan.weights = weights
    plan.bias = pack_bias(c, bias, weights + c.groups * plan.group_weights)


cdef void _columns(const Plan *plan, Py_ssize_t *taps, Py_ssize_t *weight_taps) noexcept nogil:
    """Write where the columns of taps of some channels are in their planes, and among the weights."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t channel, d, w, n = 0
    for channel in range(plan.together):
        for d in range(c.kernel[0]):
            for w in range(c.kernel[2]):
                taps[n] = tap_cell(plan, channel, d, w)
                weight_taps[n] = channel * c.w.stride[1] + d * c.w.stride[2] + w * c.w.stride[4]
                n += 1


cdef void _strand_columns(const Plan *plan, Py_ssize_t *taps, Py_ssize_t *weight_taps) noexcept nogil:
    """The same for each strand, one after another."""
    cdef const Conv *c = &plan.c
    cdef const View *filter = &c.w
    cdef const Py_ssize_t *phase
    cdef const Py_ssize_t *cell
    cdef Py_ssize_t s, channel, d, w, n, line = plan.padding.wide
    for s in range(plan.strands):
        phase = plan.phase + 4 * s
        n = plan.together * phase[0]
        for channel in range(plan.together):
            for d in range(phase[1]):
                for w in range(phase[3]):
                    cell = plan.seen + 4 * (phase[0] + d * phase[2] * phase[3] + w)
                    taps[n] = channel * plan.plane + (cell[0] * plan.high + cell[1]) * line + cell[2]
                    weight_taps[n] = channel * filter.stride[1] + _weight(plan, cell[3])
                    n += 1


cdef Py_ssize_t _weight(const Plan *plan, Py_ssize_t tap) noexcept nogil:
    """Where tap number ``tap`` is in a filter."""
    cdef const View *w = &plan.c.w
    cdef Py_ssize_t row = tap // w.size[4]
    return row // w.size[3] * w.stride[2] + row % w.size[3] * w.stride[3] + tap % w.size[4] * w.stride[4]


cdef void _pack_group(const Plan *plan, Py_ssize_t group, char *out) noexcept nogil:
    """Pack a group's weights, [block of channels][tile of filters][channel][tap][filter]."""
    cdef const Conv *c = &plan.c
    cdef const View *w = &c.w
    cdef Py_ssize_t first, channel, filter, filters, d, h
    cdef const char *base
    for first from 0 <= first < c.channels by plan.together:
        for filter from 0 <= filter < c.filters by c.kernels.planar_filters:
            filters = min(<Py_ssize_t>c.kernels.planar_filters, c.filters - filter)
            for channel in range(first, min(first + plan.together, c.channels)):
                base = w.data + ((group * c.filters + filter) * w.stride[0] + channel * w.stride[1]) * c.item
                for d in range(c.kernel[0]):
                    for h in range(c.kernel[1]):
                        c.kernels.transpose(
                            base + (d * w.stride[2] + h * w.stride[3]) * c.item, w.stride[0], w.stride[4], filters,
                            c.kernel[2], out, filters,
                        )
                        out += c.kernel[2] * filters * c.item


cdef Py_ssize_t _row_pairs(const Conv *c) noexcept nogil:
    """Pairs of taps in a row of a filter, of all channels and depths; the last may have but one."""
    return ceil_div(c.channels * c.kernel[0] * c.kernel[2], 2)


cdef void _split_weights(const Plan *plan, char *out) except *:
    """Split all groups' weights, [filter][row of taps][channel, depth, column], an even number in each row."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t taps = c.channels * c.kernel[0] * c.kernel[2], pitch = 2 * _row_pairs(c), n = c.kernel[1] * pitch
    cdef Py_ssize_t filter_bytes = round_up(n, c.kernels.depth_step) * c.packed, filter, h, t
    cdef float *numbers = <float *>arena(FC_ARENA_BLOCK, n * c.item)
    cdef const float *row
    cdef char *pieces
    if numbers == NULL:
        raise MemoryError("no memory for packed weights")
    for filter in range(c.groups * c.filters):
        for h in range(c.kernel[1]):
            row = <const float *>c.w.data + filter * c.w.stride[0] + h * c.w.stride[3]
            numbers[(h + 1) * pitch - 1] = 0
            for t in range(taps):
                numbers[h * pitch + t] = row[plan.planes.weight_taps[t]]
        pieces = out + filter // c.filters * plan.group_weights + filter % c.filters * filter_bytes
        if c.kernels.split_rows(numbers, 1, 0, n, c.kernels.pieces, pieces) & FC_HUGE:
            plan.refused[c.batch] = 1


# ------------------------------------------------------------------------------------------------------------ tasks

cdef int _forward_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t parts = ceil_div(c.groups, plan.groups), group = task % parts * plan.groups
    cdef Block block
    locate(c, &plan.blocks, task // parts, &block)
    cdef Py_ssize_t plane_bytes = plan.ahead * plan.together * plan.plane * c.item
    cdef Py_ssize_t strands = max(<Py_ssize_t>1, plan.strands)
    cdef Py_ssize_t sum_bytes = 0 if plan.in_place else plan.ahead * c.filters * strands * block.rows * plan.columns * c.item
    cdef Py_ssize_t laid_bytes = 0
    if c.kernels.pieces:
        laid_bytes = FC_LAID_BYTES(plan.high * _row_pairs(c), c.filters)
    cdef char *memory = arena(FC_ARENA_BLOCK, laid_bytes + sum_bytes + plane_bytes + 4 * c.kernels.lanes * c.item)
    if memory == NULL:
        return 1
    cdef char *sums = memory + laid_bytes
    cdef char *cells = sums + sum_bytes
    cdef Py_ssize_t end = min(group + plan.groups, c.groups), count, channel, channels
    cdef fc_planes planes = plan.planes
    planes.rows, planes.columns = block.rows, block.columns
    planes.out_row = c.y.stride[3] if plan.in_place else plan.columns
    planes.out_column = c.y.stride[4] if plan.in_place else 1
    planes.out_filter = c.y.stride[1] if plan.in_place else strands * block.rows * plan.columns
    planes.laid, planes.ahead = memory if laid_bytes else NULL, 0
    planes.weight_group, planes.cell_group = c.w.stride[0], c.channels * plan.plane
    for group from group <= group < end by plan.ahead:
        count = min(plan.ahead, end - group)
        for channel from 0 <= channel < c.channels by plan.together:
            channels = min(plan.together, c.channels - channel)
            pad_planes(plan, &block, group * c.channels + channel, count * channels, cells)
            fill_gaps(plan, count * channels, cells)
            if not _multiply(plan, &block, &planes, group, count, channel, channels, cells, sums):
                plan.refused[block.image] = 1
                break
    return 0


cdef bint _multiply(const Plan *plan, const Block *block, fc_planes *planes, Py_ssize_t group, Py_ssize_t groups,
                    Py_ssize_t channel, Py_ssize_t channels, const char *cells, char *sums) noexcept nogil:
    """Add the products of some channels to some groups' sums for a block of pixels; store them after the last channels.

    Return whether numbers can be split, if that is what the tile multiplies.
    """
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    cdef Py_ssize_t first = group * c.filters, i
    cdef int sizes = FC_ORDINARY
    cdef bint last = channel + channels == c.channels
    cdef char *out = y.data + (
        block.image * y.stride[0] + first * y.stride[1] + block.depth * y.stride[2]
        + block.top * y.stride[3] + block.left * y.stride[4]
    ) * c.item
    cdef char *target = out if plan.in_place else sums
    planes.accumulate = channel > 0
    planes.relu = plan.planes.relu and last
    planes.bias = bias_at(plan.bias, first * c.item) if last else NULL
    if plan.strands:
        _multiply_strands(
            plan, block, planes, groups, channels, plan.weights + (first * c.w.stride[0] + channel * c.w.stride[1]) * c.item,
            cells, sums,
        )
        if last:
            _interleave(plan, block, planes, first, groups, sums)
        return True
    if c.kernels.pieces:
        planes.n_taps = c.channels * c.kernel[0] * c.kernel[2]
        c.kernels.enter()
        sizes = c.kernels.planar_split(planes, plan.weights + group * plan.group_weights, c.filters, cells, target)
        c.kernels.leave()
    elif plan.one:
        planes.n_taps = channels * c.kernel[0] * c.kernel[2]
        c.kernels.planar_one(
            planes, groups, plan.weights + (first * c.w.stride[0] + channel * c.w.stride[1]) * c.item, cells, target
        )
    else:
        planes.n_taps = channels * c.taps
        for i in range(groups):
            planes.bias = bias_at(plan.bias, (first + i * c.filters) * c.item) if last else NULL
            c.kernels.planar(
                planes, plan.weights + (group + i) * plan.group_weights + channel * c.filters * c.taps * c.item, c.filters,
                cells + i * planes.cell_group * c.item, target + i * c.filters * planes.out_filter * c.item,
            )
    if last and not plan.in_place:
        _store(plan, block, planes, groups * c.filters, sums, out)
    return not sizes & FC_HUGE and sizes != FC_TINY


cdef void _multiply_strands(const Plan *plan, const Block *block, fc_planes *planes, Py_ssize_t groups, Py_ssize_t channels,
                            const char *weights, const char *cells, char *sums) noexcept nogil:
    """Add the products of some channels to the sums of each strand, [group][strand][row][pixel]."""
    cdef const Conv *c = &plan.c
    cdef const Py_ssize_t *phase
    cdef const Py_ssize_t *cell
    cdef Py_ssize_t s
    for s in range(plan.strands):
        phase = plan.phase + 4 * s
        cell = plan.seen + 4 * phase[0]
        planes.taps = plan.planes.taps + plan.together * phase[0]
        planes.weight_taps = plan.planes.weight_taps + plan.together * phase[0]
        planes.n_taps = channels * phase[1] * phase[3]
        planes.high = phase[2]
        planes.tap_row, planes.weight_row = planes.cell_row, 0
        if planes.high > 1:
            planes.tap_row = (cell[4 * phase[3] + 1] - cell[1]) * plan.padding.wide
            planes.weight_row = _weight(plan, cell[4 * phase[3] + 3]) - _weight(plan, cell[3])
        c.kernels.planar_one(planes, groups, weights, cells, sums + s * block.rows * plan.columns * c.item)


cdef void _interleave(const Plan *plan, const Block *block, const fc_planes *planes, Py_ssize_t first, Py_ssize_t groups,
                      const char *sums) noexcept nogil:
    """Store rows of some channels, whose cells are from one strand after another."""
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    cdef Py_ssize_t group, d, h, z, rows, plane = block.rows * plan.columns, left = block.left * plan.step[2]
    cdef Py_ssize_t cells = min(block.columns * plan.step[2], y.size[4] - left), across = plan.count[2]
    for group in range(groups):
        for d in range(plan.count[0]):
            z = block.depth * plan.step[0] + d
            for h in range(plan.count[1] if z < y.size[2] else 0):
                rows = min(block.rows, ceil_div(y.size[3] - h, plan.step[1]) - block.top)
                c.kernels.zip(
                    sums + (group * planes.out_filter + (d * plan.count[1] + h) * across * plane) * c.item, across, plane,
                    rows, plan.columns, cells, y.data + (
                        block.image * y.stride[0] + (first + group) * y.stride[1] + z * y.stride[2]
                        + (block.top * plan.step[1] + h) * y.stride[3] + left
                    ) * c.item, plan.step[1] * y.stride[3],
                )


cdef void _store(const Plan *plan, const Block *block, const fc_planes *planes, Py_ssize_t filters, const char *sums,
                 char *out) noexcept nogil:
    """Store the sums of a block, [filter][row][pixel], row by row."""
    cdef const Conv *c = &plan.c
    cdef fc_epilogue epilogue
    cdef Py_ssize_t row
    epilogue.bias = NULL
    epilogue.relu = False
    epilogue.pixel_stride = c.y.stride[1]  # the roles are exchanged: rows of the sums are filters
    epilogue.channel_stride = c.y.stride[4]
    for row in range(block.rows):
        c.kernels.epilogue(
            &epilogue, sums + row * planes.out_row * c.item, planes.out_filter, filters, block.columns,
            out + row * c.y.stride[3] * c.item,
        )
