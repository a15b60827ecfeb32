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

Where the machine has a tile that multiplies digits or pieces of numbers, ``weight_digits`` and ``weight_pieces`` have it, and this
is for what they leave. A depthwise convolution has microkernels of its own: channels-last arrays are read where they are, row by row and all
channels of a pixel at a time, others packed, 16 channels at a time.
"""

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels.native.blocking cimport (
    CHANNELS, DEPTHWISE_BYTES, DIRECT_BYTES, Block, Conv, View, ceil_div, cut, locate, make_conv, pack_image, pack_pixels,
    panel_vectors, part_cells, place_taps, run_tasks, tap_offsets,
)
from fastconv.kernels.native.depthwise cimport loads_once, rows_in_place
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, arena, fc_reduction, fc_reduction_over, fc_window
from fastconv.kernels.native.weight_chunks cimport (
    CHUNK_PIXELS, WEIGHT_ROWS, WEIGHT_TASKS, WeightPlan, WeightTask, add_bias, clear_sums, end_task, even_panels, plan_chunks, reduce_chunks,
    start_task, store_bias, store_weight, sum_pixels, want_bias,
)
from fastconv.kernels.native.weight_digits cimport digits_weight_grad
from fastconv.kernels.native.weight_pieces cimport split_weight_grad

cdef enum:
    PIXELS = 256            # that one brgemm reduces over: a panel's share of them stays in L1
    SUM_BYTES = 1 << 22     # of all chunks of rows of a depthwise layer: half of the promised workspace
    EXCHANGED = 512         # pixels of an image, at least, where gradients and image may change places


def conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options):
    """See ``fastconv.kernels``."""
    if dims.groups > 1 and grad_weight.shape[1] == 1:
        multiplier = grad_weight.shape[0] // dims.groups
        for j in range(multiplier):
            part = None if grad_bias is None else grad_bias[j::multiplier]
            _depthwise_weight(input, grad_output[:, j::multiplier], grad_weight[j::multiplier], part, dims, options)
        return
    x, y, w = input, grad_output, grad_weight
    if grad_bias is None and _exchange(dims):
        x, y, w = grad_output, input, grad_weight.swapaxes(0, 1)
    if digits_weight_grad(x, y, w, grad_bias, dims, options):
        return
    if not split_weight_grad(x, y, w, grad_bias, dims, options):
        _weight_grad(input, grad_output, grad_weight, grad_bias, dims, options)


cdef bint _exchange(dims):
    """Whether gradients and image had better change places, which are alike where each pixel sees itself.

    What takes the gradients' place is split where it lies, what takes the image's is turned. With few pixels, storing the
    weights the other way round takes longer. (Measured on AMX.)
    """
    if dims.taps * dims.groups * max(dims.stride) > 1 or dims.input_size != dims.output_size:
        return False
    many = dims.output_size[1] * dims.output_size[2] >= EXCHANGED
    return many and 4 * dims.out_channels >= 5 * dims.in_channels


# What all tasks of one call share.
ctypedef struct Plan:
    WeightPlan base
    Py_ssize_t part_bytes       # a channel block of the packed part of the image
    Py_ssize_t grad_bytes       # the packed gradients of a panel


cdef void _weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims, options) except *:
    cdef Plan plan
    cdef WeightPlan *base = &plan.base
    cdef Conv *c = &base.c
    make_conv(c, input, grad_weight, grad_output, dims, options)
    base.width = ceil_div(c.channels, ceil_div(c.channels, CHANNELS))  # even parts
    base.channel_blocks = min(ceil_div(c.channels, base.width), max(1, WEIGHT_ROWS // (c.taps * base.width)))
    base.task_panels = even_panels(c)
    cut(c, base.channel_blocks * base.width * c.item, DIRECT_BYTES, PIXELS, &base.blocks)
    plan.part_bytes = base.width * part_cells(c, base.blocks.rows, base.blocks.columns) * c.item
    plan.grad_bytes = c.panel * base.blocks.rows * base.blocks.columns * c.item
    plan_chunks(base, c.batch * base.blocks.count, grad_bias)
    reduce_chunks(base, _weight_task, &plan)


cdef int _weight_task(const void *shared, Py_ssize_t task) noexcept nogil:
    """Reduce one chunk of the blocks for one task's channels and filters."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const WeightPlan *base = &plan.base
    cdef const Conv *c = &base.c
    cdef WeightTask t
    if start_task(base, task, &t):
        return 1
    clear_sums(base, &t)
    cdef Py_ssize_t rows = c.taps * base.width
    cdef Py_ssize_t offset_bytes = (base.blocks.rows + rows + c.taps + 8) // 8 * 64
    cdef char *memory = arena(
        FC_ARENA_BLOCK, offset_bytes + t.channel_blocks * plan.part_bytes + t.panels * plan.grad_bytes
    )
    if memory == NULL:
        return 1
    cdef Py_ssize_t *row_offsets = <Py_ssize_t *>memory
    cdef Py_ssize_t *line_offsets = row_offsets + rows
    cdef Py_ssize_t *taps = line_offsets + base.blocks.rows
    cdef char *part = memory + offset_bytes
    cdef char *grads = part + t.channel_blocks * plan.part_bytes
    cdef Block block
    cdef Py_ssize_t unit
    for unit in range(t.first_unit, t.end_unit):
        locate(c, &base.blocks, unit, &block)
        _offsets(base, &block, row_offsets, line_offsets, taps)
        _pack_unit(plan, &t, &block, part, grads)
        _multiply_unit(plan, &t, &block, row_offsets, line_offsets, part, grads)
    end_task(base, &t)
    return 0


cdef void _offsets(const WeightPlan *plan, const Block *block, Py_ssize_t *row_offsets, Py_ssize_t *line_offsets,
                   Py_ssize_t *taps) noexcept nogil:
    """Write where each row of the sums, (tap, channel), and each line of pixels begins in a packed part."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t width = plan.width, row, line
    tap_offsets(c, block, width, taps)
    for row in range(c.taps * width):
        row_offsets[row] = taps[row // width] + row % width
    for line in range(block.rows):
        line_offsets[line] = line * c.stride[1] * block.wide * width


cdef void _pack_unit(const Plan *plan, const WeightTask *t, const Block *block, char *part, char *grads) noexcept nogil:
    """Pack a block's part of the image and its gradients, and add these to that of the bias."""
    cdef const WeightPlan *base = &plan.base
    cdef const Conv *c = &base.c
    cdef Py_ssize_t b, first, panel, filter, pixels = block.rows * block.columns
    for b in range(t.channel_blocks):
        first = t.channel + b * base.width
        pack_image(
            c, block, t.group * c.channels + first, min(base.width, c.channels - first), base.width, part + b * plan.part_bytes
        )
    for panel in range(t.panels):
        filter = (t.panel + panel) * c.panel
        pack_pixels(
            c, block, t.group * c.filters + filter, min(c.panel, c.filters - filter),
            panel_vectors(c, t.panel + panel) * c.kernels.lanes, 0, pixels, grads + panel * plan.grad_bytes,
        )
        add_bias(base, t, panel, grads + panel * plan.grad_bytes, pixels)


cdef void _multiply_unit(const Plan *plan, const WeightTask *t, const Block *block, const Py_ssize_t *row_offsets,
                         const Py_ssize_t *line_offsets, const char *part, const char *grads) noexcept nogil:
    """Add a block's products to all sums of a task."""
    cdef const WeightPlan *base = &plan.base
    cdef const Conv *c = &base.c
    cdef Py_ssize_t panel, b
    for panel in range(t.panels):
        for b in range(t.channel_blocks):
            _multiply(
                plan, block, panel_vectors(c, t.panel + panel), row_offsets, line_offsets, part + b * plan.part_bytes,
                grads + panel * plan.grad_bytes,
                t.accumulators + (panel * base.channel_blocks + b) * c.panel * c.taps * base.width * c.item,
            )


cdef void _multiply(const Plan *plan, const Block *block, int vectors, const Py_ssize_t *row_offsets,
                    const Py_ssize_t *line_offsets, const char *part, const char *grads,
                    char *accumulators) noexcept nogil:
    """Add one block's pixels to (taps x channels of a block) x (filters of a panel), some lines at a time."""
    cdef const Conv *c = &plan.base.c
    cdef Py_ssize_t rows = c.taps * plan.base.width, width = vectors * c.kernels.lanes, line, together
    cdef fc_reduction reduction = fc_reduction_over(NULL, 0, block.columns)
    reduction.a_step = c.stride[2] * plan.base.width
    reduction.b_tap = block.columns * width
    reduction.b_step = width
    reduction.c_step = width
    together = max(1, PIXELS // block.columns)
    for line from 0 <= line < block.rows by together:
        reduction.taps = line_offsets + line
        reduction.n_taps = min(together, block.rows - line)
        c.kernels.brgemm(
            &reduction, part, row_offsets, rows, grads + line * reduction.b_tap * c.item, vectors, accumulators, 1
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
    if rows_in_place(c) and c.groups >= CHANNELS:
        _sum_in_place(&plan)
    else:
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
            sum_pixels(c, grads, CHANNELS, block.rows * block.columns, CHANNELS, bias_sums)
        for r in range(block.rows):
            c.kernels.depthwise_weight(
                taps, c.taps, part + r * c.stride[1] * block.wide * CHANNELS * c.item, c.stride[2] * CHANNELS,
                grads + r * block.columns * CHANNELS * c.item, CHANNELS, block.columns, CHANNELS, accumulators,
            )
    store_weight(c, first, 0, channels, 1, 1, CHANNELS, accumulators)
    store_bias(plan, first, channels, bias_sums)
    return 0


# Which are inside the image: of the taps along an axis, or of the columns of pixels all of whose taps are.
ctypedef struct Range:
    Py_ssize_t first, end


# Of channels-last arrays, where they are: sums of whole vectors of channels, [tap][channel], and of the last channels, which overlap these.
ctypedef struct InPlace:
    WeightPlan base
    Py_ssize_t rows, chunks     # of pixels, and what they are summed in
    Py_ssize_t first[2]         # channel of either, ...
    Py_ssize_t count[2]         # ... how many, ...
    Py_ssize_t offset[2]        # ... and where their sums are in those of a chunk
    Py_ssize_t chunk_bytes
    char *sums
    Py_ssize_t *taps
    bint at_once                # a row's cells are loaded once for all of its pixels
    Py_ssize_t *starts          # of the rows of taps, then
    fc_window window


cdef void _sum_in_place(const WeightPlan *base) except *:
    """Sum chunks of rows of pixels by themselves, and all of them in their order."""
    cdef InPlace plan
    cdef const Conv *c = &base.c
    cdef Py_ssize_t t, chunk, part, tap_bytes = (2 * c.taps + 8) // 8 * 64
    plan.base = base[0]
    plan.rows = c.batch * c.out[0] * c.out[1]
    plan.first[0], plan.first[1] = 0, c.groups - CHANNELS
    plan.count[0] = c.groups // CHANNELS * CHANNELS
    plan.count[1] = CHANNELS if c.groups % CHANNELS else 0
    plan.offset[0], plan.offset[1] = 0, plan.count[0] * (c.taps + 1) * c.item
    plan.chunk_bytes = plan.offset[1] + plan.count[1] * (c.taps + 1) * c.item
    plan.chunks = min(min(<Py_ssize_t>WEIGHT_TASKS, SUM_BYTES // plan.chunk_bytes), plan.rows * c.out[2] // CHUNK_PIXELS)
    plan.chunks = max(1, min(plan.chunks, plan.rows))
    cdef char *memory = arena(FC_ARENA_WEIGHTS, tap_bytes + plan.chunks * plan.chunk_bytes)
    if memory == NULL:
        raise MemoryError("no memory for the gradient of the weights")
    plan.taps, plan.sums = <Py_ssize_t *>memory, memory + tap_bytes
    place_taps(c, c.dilation[0] * c.x.stride[2], c.x.stride[3], c.x.stride[4], plan.taps)
    _set_window(&plan)
    run_tasks(_chunk_in_place, &plan, plan.chunks, c.threads)
    for chunk in range(1, plan.chunks):
        c.kernels.add(plan.sums, plan.sums + chunk * plan.chunk_bytes, plan.chunk_bytes // c.item)
    for part in range(2 if plan.count[1] else 1):
        t = plan.count[part]
        store_weight(c, plan.first[part], 0, t, 1, 1, t, plan.sums + plan.offset[part])
        store_bias(base, plan.first[part], t, plan.sums + plan.offset[part] + c.taps * t * c.item)


cdef void _set_window(InPlace *plan) noexcept nogil:
    """Say what a row of pixels sees, and whether its pixels are taken at once."""
    cdef const Conv *c = &plan.base.c
    cdef fc_window *window = &plan.window
    cdef Py_ssize_t row
    window.wide, window.pixels, window.cell_step, window.grad_step = c.kernel[2], c.out[2], c.x.stride[4], c.y.stride[4]
    window.before, window.to = c.pad[2], c.x.size[4] + c.pad[2]
    plan.at_once = loads_once(c) and window.before <= window.wide and window.to >= window.pixels
    plan.starts = plan.taps + c.taps
    for row in range(c.kernel[0] * c.kernel[1]):
        plan.starts[row] = plan.taps[row * c.kernel[2]]


cdef int _chunk_in_place(const void *shared, Py_ssize_t chunk) noexcept nogil:
    """Sum a chunk of rows."""
    cdef const InPlace *plan = <const InPlace *>shared
    cdef char *sums = plan.sums + chunk * plan.chunk_bytes
    cdef Py_ssize_t row, part
    memset(sums, 0, <size_t>plan.chunk_bytes)
    for row in range(plan.rows * chunk // plan.chunks, plan.rows * (chunk + 1) // plan.chunks):
        for part in range(2 if plan.count[1] else 1):
            _sum_row(plan, row, plan.first[part], plan.count[part], sums + plan.offset[part])
    return 0


cdef void _sum_row(const InPlace *plan, Py_ssize_t row, Py_ssize_t channel, Py_ssize_t channels, char *sums) noexcept nogil:
    """Add what a row of pixels has: the taps of rows inside the image, of inner columns all at once."""
    cdef const Conv *c = &plan.base.c
    cdef const View *x = &c.x
    cdef const View *y = &c.y
    cdef Py_ssize_t image = row // (c.out[0] * c.out[1]), depth = row // c.out[1] % c.out[0], high = row % c.out[1], d, h, t, column
    cdef Py_ssize_t z = depth * c.stride[0] - c.pad[0], top = high * c.stride[1] - c.pad[1]
    cdef Py_ssize_t cells = image * x.stride[0] + z * x.stride[2] + top * x.stride[3] - c.pad[2] * x.stride[4] + channel
    cdef const char *grads = y.data + (
        image * y.stride[0] + depth * y.stride[2] + high * y.stride[3] + channel
    ) * c.item
    cdef fc_window window = plan.window
    window.channels = channels
    cdef Range depths = _taps_inside(c, 0, z), rows = _taps_inside(c, 1, top), inner = _inner_columns(c), wide, alone
    for d in range(depths.first, depths.end):
        t = (d * c.kernel[1] + rows.first) * c.kernel[2]
        if plan.at_once:
            c.kernels.depthwise_weight_rows(
                &window, plan.starts + d * c.kernel[1] + rows.first, rows.end - rows.first, c.x.data + cells * c.item, grads,
                sums + t * channels * c.item,
            )
            continue
        if rows.end > rows.first:
            _sum_columns(c, cells, grads, &inner, plan.taps, t, (rows.end - rows.first) * c.kernel[2], channels, sums)
        for column in range(c.out[2]):
            if inner.first <= column < inner.end:
                continue
            wide = _taps_inside(c, 2, column * c.stride[2] - c.pad[2])
            alone.first, alone.end = column, column + 1
            for h in range(rows.first, rows.end):
                t = (d * c.kernel[1] + h) * c.kernel[2] + wide.first
                _sum_columns(c, cells, grads, &alone, plan.taps, t, wide.end - wide.first, channels, sums)
    sums += c.taps * channels * c.item
    for channel from 0 <= channel < (channels if plan.base.bias != NULL else 0) by CHANNELS:
        sum_pixels(c, grads + channel * c.item, y.stride[4], c.out[2], CHANNELS, sums + channel * c.item)


cdef inline void _sum_columns(const Conv *c, Py_ssize_t cells, const char *grads, const Range *columns, const Py_ssize_t *taps,
                              Py_ssize_t first, Py_ssize_t count, Py_ssize_t channels, char *sums) noexcept nogil:
    """Add what some columns of a row have, of some taps."""
    cdef Py_ssize_t step = c.stride[2] * c.x.stride[4]
    if columns.end > columns.first and count > 0:
        c.kernels.depthwise_weight(
            taps + first, count, c.x.data + (cells + columns.first * step) * c.item, step,
            grads + columns.first * c.y.stride[4] * c.item, c.y.stride[4], columns.end - columns.first, channels,
            sums + first * channels * c.item,
        )


cdef inline Range _taps_inside(const Conv *c, int axis, Py_ssize_t start) noexcept nogil:
    """Return the taps that see the image from where the first one is."""
    cdef Range inside
    cdef Py_ssize_t before = max(<Py_ssize_t>0, -start), room = max(<Py_ssize_t>0, c.x.size[axis + 2] - start)
    inside.first = min(c.kernel[axis], ceil_div(before, c.dilation[axis]))
    inside.end = max(inside.first, min(c.kernel[axis], ceil_div(room, c.dilation[axis])))
    return inside


cdef inline Range _inner_columns(const Conv *c) noexcept nogil:
    """Return the columns of pixels all of whose taps are inside the image."""
    cdef Range inner
    cdef Py_ssize_t room = c.x.size[4] + c.pad[2] - 1 - (c.kernel[2] - 1) * c.dilation[2]
    inner.first = min(c.out[2], ceil_div(c.pad[2], c.stride[2]))
    inner.end = max(inner.first, min(c.out[2], room // c.stride[2] + 1)) if room >= 0 else inner.first
    return inner
