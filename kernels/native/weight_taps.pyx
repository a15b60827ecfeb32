"""The gradient of the weights of few channels by the tile that multiplies pieces of numbers: taps are its rows.

    grad_weight[k][t] = sum over pixels p of  lines[t][p] * grad_output[k][p]

    for chunk of all images' blocks, group:                     in parallel
        for block of some rows of pixels:
            copy the planes that it sees
            for 32 pixels of a row: for row of planes, tap of a row: split the cells that it shows, a line
            for 32 pixels of each row: turn their gradients, and split them
            for panel of filters, tile of taps: brgemm over all pixels of the block

           lines, 32 pixels of each piece                  pairs of pixels
                       +----------------+
    row 0 of planes t0 | p0 | p1 | p2   |  -. taps of                +-------+
                    t1 |    |    |      |   | the first row   piece  | 16 k  | 16 pairs
    row 1           t0 |    |    |      |   | of pixels       0      |       |
                    t1 |    |    |      |  -'                        +-------+
    row 2           t0 |    |    |      |     (2 rows of 2 taps)

What a row of pixels sees is some lines, one after another, and the next row sees ``stride`` rows of planes further. The gradient of the
bias is that of a tap that shows ones.
"""

cimport numpy as cnp
from libc.string cimport memcpy, memset

from fastconv.kernels.native.blocking cimport (
    Block, Conv, View, ceil_div, divide, extent, locate, make_conv, panel_vectors, piece_tile, round_up, run_tasks, split_pays,
    taps_continue, use_tile,
)
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_HUGE, FC_TINY, arena, fc_reduction, fc_reduction_over, fc_ukernels,
)
from fastconv.kernels.native.planes cimport FEW_CHANNELS, SPLIT_PRODUCTS, Plan, fill_gaps, lay_out, pad_planes, tap_cell

cdef enum:
    LINE_BYTES = 1 << 19    # of the lines of a block ...
    GRAD_BYTES = 1 << 20    # ... and its gradients: they stay in L2
    MOST_BYTES = 1 << 21    # of either, where a block can't be cut as small
    SUM_BYTES = 1 << 22     # of all chunks together
    CHUNKS = 8
    BLOCK_PIXELS = 1 << 11  # at most, about: as many products are added up before sums go to memory
    CHUNK_PIXELS = 1 << 10  # at least

# What all tasks of one call share.
ctypedef struct TapsPlan:
    Plan base
    Py_ssize_t row_taps         # of a row, all channels and depths
    Py_ssize_t row_lines        # the same, and a tap of ones, if the gradient of the bias is wanted
    Py_ssize_t steps            # of 32 pixels, of a row
    Py_ssize_t lines            # rows of sums: all taps, in whole tiles
    const Py_ssize_t *cells     # of each tap of a row, where it is in the planes ...
    const Py_ssize_t *numbers   # ... and its number in the filter
    Py_ssize_t blocks, chunks
    Py_ssize_t sum_bytes        # of a group's sums, [panel][line][filter]
    char *totals                # [chunk][group]
    unsigned char *refused

# The memory of one task.
ctypedef struct Workspace:
    Py_ssize_t *rows            # where each line is, from the first that a row of pixels sees
    Py_ssize_t *taps            # for 32 pixels: where their lines begin, ...
    Py_ssize_t *pairs           # ... and their gradients
    float *ones
    float *turned
    char *lines                 # [32 pixels of a row][row of planes][tap]
    char *grads                 # [panel][vector][piece][pair]
    char *planes


cdef bint taps_weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims,
                           options) except -1:
    """Compute the gradients, if there is such a tile, shapes fill it and numbers can be split; return whether."""
    cdef TapsPlan plan
    cdef Conv *c = &plan.base.c
    cdef unsigned char refused = 0
    make_conv(c, input, grad_weight, grad_output, dims, options)
    cdef const fc_ukernels *kernels = piece_tile(c, options.precision, c.channels * c.taps)
    if kernels == NULL or not _suits(c, kernels):
        return False
    use_tile(c, kernels)
    plan.row_taps = c.channels * c.kernel[0] * c.kernel[2]
    plan.row_lines = plan.row_taps + (grad_bias is not None)
    plan.steps = ceil_div(c.out[2], <Py_ssize_t>c.kernels.depth_step)
    plan.lines = round_up(c.kernel[1] * plan.row_lines, c.kernels.tile_rows)
    plan.refused = &refused
    if not _cut(&plan):
        return False
    _share_out(&plan)
    run_tasks(_task, &plan, plan.chunks * c.groups, c.threads)
    if not refused:
        _store(&plan, grad_bias)
    return not refused


cdef bint _suits(const Conv *c, const fc_ukernels *kernels):
    """Whether few channels' taps, filters and pixels of a row fill the tile, and weights are stored one after another."""
    cdef Py_ssize_t taps = c.channels * c.taps
    if c.channels > FEW_CHANNELS or taps < SPLIT_PRODUCTS or c.dilation[1] > 1:
        return False
    if not taps_continue(c) or c.w.stride[4] != 1 or (c.channels > 1 and c.w.stride[1] != c.taps):
        return False
    cdef double padded = round_up(taps, kernels.lanes) / <double>taps * round_up(c.filters, kernels.lanes) / c.filters
    return split_pays(kernels, padded * round_up(c.out[2], kernels.depth_step) / c.out[2])


cdef Py_ssize_t _line_bytes(const TapsPlan *plan, Py_ssize_t rows) noexcept nogil:
    """What the lines take that so many rows of pixels see."""
    cdef const Conv *c = &plan.base.c
    return plan.steps * extent(c, 1, rows) * plan.row_lines * c.kernels.depth_step * c.packed


cdef Py_ssize_t _grad_bytes(const TapsPlan *plan, Py_ssize_t rows) noexcept nogil:
    """What the gradients of so many rows take."""
    cdef const Conv *c = &plan.base.c
    return c.panels * c.panel * rows * plan.steps * c.kernels.depth_step * c.packed


cdef bint _cut(TapsPlan *plan) noexcept nogil:
    """Cut the output into blocks of some rows, and lay out their planes; return whether a block is small enough."""
    cdef Conv *c = &plan.base.c
    cdef Py_ssize_t rows = c.out[1]
    while rows > 1 and (
        _line_bytes(plan, rows) > LINE_BYTES or _grad_bytes(plan, rows) > GRAD_BYTES or rows * c.out[2] > BLOCK_PIXELS
    ):
        rows -= ceil_div(rows, 8)
    if rows < c.out[1]:
        rows = ceil_div(c.out[1], round_up(ceil_div(c.out[1], rows), 2))  # for threads to share
    divide(c, rows, c.out[2], &plan.base.blocks)
    plan.base.one = False
    plan.base.together = c.channels
    plan.base.high = extent(c, 1, plan.base.blocks.rows)
    lay_out(&plan.base)
    return max(_line_bytes(plan, plan.base.blocks.rows), _grad_bytes(plan, plan.base.blocks.rows)) <= MOST_BYTES


cdef void _share_out(TapsPlan *plan) except *:
    """Cut the blocks into chunks, whose number depends on the shape alone, and write where taps are."""
    cdef Conv *c = &plan.base.c
    cdef Py_ssize_t pixels = c.batch * c.out[0] * c.out[1] * c.out[2], channel, d, w, phase, n = 0
    cdef Py_ssize_t tap_bytes = round_up(2 * plan.row_taps * sizeof(Py_ssize_t), 64)
    plan.blocks = c.batch * plan.base.blocks.count
    plan.chunks = max(<Py_ssize_t>1, min(min(plan.blocks, <Py_ssize_t>CHUNKS), pixels // CHUNK_PIXELS))
    plan.sum_bytes = c.panels * plan.lines * c.panel * c.item
    plan.chunks = max(<Py_ssize_t>1, min(plan.chunks, SUM_BYTES // (c.groups * plan.sum_bytes)))
    cdef char *memory = arena(FC_ARENA_WEIGHTS, tap_bytes + (plan.chunks * c.groups + 1) * plan.sum_bytes)
    if memory == NULL:
        raise MemoryError("no memory for the gradient of the weights")
    cdef Py_ssize_t *cells = <Py_ssize_t *>memory
    cdef Py_ssize_t *numbers = cells + plan.row_taps
    plan.cells, plan.numbers, plan.totals = cells, numbers, memory + tap_bytes
    for channel in range(c.channels):
        for d in range(c.kernel[0]):
            for phase in range(c.stride[2]):  # neighbours in a plane one after another
                for w in range(c.kernel[2]):
                    if w * c.dilation[2] % c.stride[2] == phase:
                        cells[n] = tap_cell(&plan.base, channel, d, w)
                        numbers[n] = channel * c.taps + d * c.kernel[1] * c.kernel[2] + w
                        n += 1


# ------------------------------------------------------------------------------------------------------------- tasks

cdef int _task(const void *shared, Py_ssize_t number) noexcept nogil:
    """Sum up one chunk of the blocks for one group."""
    cdef const TapsPlan *plan = <const TapsPlan *>shared
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t chunk = number // c.groups, group = number % c.groups, unit
    cdef Py_ssize_t first = plan.blocks * chunk // plan.chunks, end = plan.blocks * (chunk + 1) // plan.chunks
    cdef char *sums = plan.totals + number * plan.sum_bytes
    cdef Block block
    cdef Workspace space
    if _find_memory(plan, &space):
        return 1
    if first == end:  # of no images
        memset(sums, 0, <size_t>plan.sum_bytes)
    for unit in range(first, end):
        if plan.refused[0]:
            return 0
        locate(c, &plan.base.blocks, unit, &block)
        pad_planes(&plan.base, &block, group * c.channels, c.channels, space.planes)
        fill_gaps(&plan.base, plan.base.c.channels, space.planes)
        if not _lay_lines(plan, &block, &space) or not _turn_grads(plan, &block, group, &space):
            plan.refused[0] = 1
            return 0
        _multiply(plan, &block, &space, unit > first, sums)
    return 0


cdef bint _find_memory(const TapsPlan *plan, Workspace *space) noexcept nogil:
    """Lay out a task's workspace; return whether there is none."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t rows = plan.base.blocks.rows, pixels = rows * plan.steps, step = c.kernels.depth_step, i
    cdef Py_ssize_t offset_bytes = round_up((plan.lines + 2 * pixels) * sizeof(Py_ssize_t), 64)
    cdef Py_ssize_t line_bytes = _line_bytes(plan, rows), grad_bytes = _grad_bytes(plan, rows)
    cdef Py_ssize_t plane_bytes = (c.channels * plan.base.plane + 4 * c.kernels.lanes) * c.item
    cdef Py_ssize_t number_bytes = (step + step * c.kernels.lanes) * c.item
    cdef char *memory = arena(FC_ARENA_BLOCK, offset_bytes + number_bytes + line_bytes + grad_bytes + plane_bytes)
    if memory == NULL:
        return True
    space.rows = <Py_ssize_t *>memory
    space.taps = space.rows + plan.lines
    space.pairs = space.taps + pixels
    space.ones = <float *>(memory + offset_bytes)
    space.turned = space.ones + step
    space.lines = memory + offset_bytes + number_bytes
    space.grads = space.lines + line_bytes
    space.planes = space.grads + grad_bytes
    for i in range(plan.lines):
        space.rows[i] = i * step
    for i in range(step):
        space.ones[i] = 1
    return False


cdef bint _lay_lines(const TapsPlan *plan, const Block *block, Workspace *space) noexcept nogil:
    """Split what each tap of a row shows of each row of planes, 32 pixels at a time; return whether it can be split."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t line_bytes = c.kernels.depth_step * c.packed, step, row, n, run
    cdef const float *cells
    cdef char *out = space.lines
    cdef int sizes = 0
    for step in range(plan.steps):
        for row in range(extent(c, 1, block.rows)):
            cells = <const float *>space.planes + row * plan.base.planes.tap_row + step * c.kernels.depth_step
            n = 0
            while n < plan.row_taps:
                run = 1
                while n + run < plan.row_taps and plan.cells[n + run] == plan.cells[n] + run:
                    run += 1
                sizes |= c.kernels.split_rows(cells + plan.cells[n], run, 1, c.kernels.depth_step, c.kernels.pieces, out)
                out += run * line_bytes
                n += run
            if plan.row_lines > plan.row_taps:
                c.kernels.split_rows(space.ones, 1, 0, c.kernels.depth_step, c.kernels.pieces, out)
                out += line_bytes
    return not sizes & FC_HUGE and sizes != FC_TINY


cdef bint _turn_grads(const TapsPlan *plan, const Block *block, Py_ssize_t group, Workspace *space) noexcept nogil:
    """Turn a block's gradients to pairs of pixels, and split them; return whether they can be."""
    cdef const Conv *c = &plan.base.c
    cdef const View *y = &c.y
    cdef Py_ssize_t lanes = c.kernels.lanes, step = c.kernels.depth_step, plane = block.rows * plan.steps * step * lanes
    cdef Py_ssize_t first, filters, row, column, pixels
    cdef char *out = space.grads
    cdef int sizes = 0
    for first from 0 <= first < c.filters by lanes:
        filters = min(lanes, c.filters - first)
        for row in range(block.rows):
            for column from 0 <= column < c.out[2] by step:
                pixels = min(step, c.out[2] - column)
                if filters < lanes or pixels < step:
                    memset(space.turned, 0, <size_t>(step * lanes * c.item))
                c.kernels.transpose(
                    y.data + (
                        block.image * y.stride[0] + (group * c.filters + first) * y.stride[1] + block.depth * y.stride[2]
                        + (block.top + row) * y.stride[3] + column
                    ) * c.item, y.stride[1], 1, filters, pixels, space.turned, lanes,
                )
                sizes |= c.kernels.split_pairs(
                    space.turned, step, c.kernels.pieces, out + (row * plan.steps * step + column) * lanes * 2, NULL, plane
                )
        out += plane * c.packed
    return not sizes & FC_HUGE and sizes != FC_TINY


cdef void _multiply(const TapsPlan *plan, const Block *block, const Workspace *space, bint accumulate,
                    char *sums) noexcept nogil:
    """Add a block's products to the sums."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t step = c.kernels.depth_step, high = extent(c, 1, block.rows), row, s, n = 0, panel
    cdef Py_ssize_t plane = block.rows * plan.steps * step * c.kernels.lanes
    cdef const char *grads = space.grads
    cdef fc_reduction reduction
    for row in range(block.rows):
        for s in range(plan.steps):
            space.taps[n] = (s * high + row * c.stride[1]) * plan.row_lines * step
            space.pairs[n] = n * step * c.kernels.lanes
            n += 1
    reduction = fc_reduction_over(space.taps, n, step)
    reduction.b_taps, reduction.c_step = space.pairs, c.panel
    c.kernels.enter()
    for panel in range(c.panels):
        c.kernels.brgemm_pairs(
            &reduction, space.lines, space.rows, c.kernel[1] * plan.row_lines, grads, plane, panel_vectors(c, panel),
            sums + panel * plan.lines * c.panel * c.item, accumulate,
        )
        grads += 2 * plane * c.packed
    c.kernels.leave()


# ------------------------------------------------------------------------------------------------------------- store

cdef void _store(const TapsPlan *plan, grad_bias):
    """Add up the chunks in their order, and store what they come to."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t group_bytes = c.groups * plan.sum_bytes, chunk, group, panel, filters, first
    cdef char *natural = plan.totals + plan.chunks * group_bytes
    cdef const char *sums = plan.totals
    for chunk in range(1, plan.chunks):
        c.kernels.add(plan.totals, plan.totals + chunk * group_bytes, group_bytes // c.item)
    for group in range(c.groups):
        for panel in range(c.panels):
            filters = min(c.panel, c.filters - panel * c.panel)
            first = group * c.filters + panel * c.panel
            _put_in_order(plan, sums, natural)
            c.kernels.transpose(
                natural, c.panel, 1, c.channels * c.taps, filters, c.w.data + first * c.w.stride[0] * c.item, c.w.stride[0],
            )
            if grad_bias is not None:
                c.kernels.transpose(
                    sums + plan.row_taps * c.panel * c.item, 0, 1, 1, filters,
                    cnp.PyArray_BYTES(grad_bias) + first * cnp.PyArray_STRIDE(grad_bias, 0),
                    cnp.PyArray_STRIDE(grad_bias, 0) // c.item,
                )
            sums += plan.lines * c.panel * c.item


cdef void _put_in_order(const TapsPlan *plan, const char *sums, char *out) noexcept nogil:
    """Copy a panel's sums of each tap to where it is in a filter."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t row_bytes = c.panel * c.item, h, t
    for h in range(c.kernel[1]):
        for t in range(plan.row_taps):
            memcpy(
                out + (plan.numbers[t] + h * c.kernel[2]) * row_bytes, sums + (h * plan.row_lines + t) * row_bytes,
                <size_t>row_bytes,
            )
