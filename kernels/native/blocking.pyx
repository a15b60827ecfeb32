"""What the convolution drivers share: views, packing, the store of a finished chunk.

A driver cuts the output of each image into blocks of rows x columns pixels and packs what a block sees, padding included:

         columns                           wide = (columns - 1) * stride + (kernel - 1) * dilation + 1
        +-------+                         +-----------+
   rows | block |        sees       high  |  part of  |      packed as [channel block][kernel depth][high][wide][width]
        +-------+                         |   image   |      where width is the channels in a block
                                          +-----------+

Weights are packed into panels, [channel][tap][filters of the panel], in the order in which OIHW has them: packing is a
transposition of the K x (C * taps) matrix. (With few channels conv_direct folds a row of taps and the channels into one
reduction; then it is [panel][tap][channel].) Every copy is one call of the microkernel ``transpose``.
"""

import numpy as np

cimport numpy as cnp
from cython.parallel cimport prange
from libc.string cimport memset

from fastconv.kernels.native.machine cimport fc_epilogue, fc_fetch, fc_ukernels, split_ukernels, ukernels, usable_threads

cdef enum:
    TILES_PER_CHUNK = 16        # so that accumulators and a panel's share of weights stay in L1
    CHUNK_PIXELS = 1024         # the same for tiles that read a panel from L2 as fast as from L1: accumulators in L2
    SPLIT_CHANNELS = 16         # half a step of the tile that multiplies pieces: with fewer, most of it is padding
    SPLIT_RATE = 13             # products of pieces that it makes in the time of one product of numbers, about
    AHEAD = 4                   # channels whose weights are asked for before they are packed
    SPLIT_WEIGHT = 40           # products in the time that splitting a weight takes beyond packing it
    SERIAL_FLOPS = 4_000_000    # some 40 microseconds: less is not worth waking a thread


cdef void make_view(View *view, cnp.ndarray array):
    cdef int axis
    view.data = cnp.PyArray_BYTES(array)
    for axis in range(5):
        view.size[axis] = cnp.PyArray_DIM(array, axis)
        view.stride[axis] = cnp.PyArray_STRIDE(array, axis) // cnp.PyArray_ITEMSIZE(array)


cdef void make_conv(Conv *c, cnp.ndarray x, cnp.ndarray w, cnp.ndarray y, dims, options):
    """Unpack what the contract passes; ``w`` are the weights or their gradient."""
    cdef int axis
    cdef tuple stride, pad, dilation
    # Taken apart at once: looking up an attribute takes as long as all of this does.
    _, _, _, _, c.groups, _, _, stride, pad, _, dilation, _, _ = <tuple>dims
    c.item = cnp.PyArray_ITEMSIZE(x)
    make_view(&c.x, x)
    make_view(&c.w, w)
    make_view(&c.y, y)
    c.batch = c.x.size[0]
    c.channels = c.w.size[1]
    c.filters = c.w.size[0] // c.groups
    for axis in range(3):
        c.kernel[axis] = c.w.size[2 + axis]
        c.stride[axis] = stride[axis]
        c.pad[axis] = pad[axis]
        c.dilation[axis] = dilation[axis]
        c.out[axis] = c.y.size[2 + axis]
    c.taps = c.kernel[0] * c.kernel[1] * c.kernel[2]
    c.folded = False
    use_tile(c, ukernels(c.item))
    choose_threads(c, options.threads)


cdef void choose_threads(Conv *c, threads):
    """Take several threads where that is worth waking them."""
    cdef double flops = 2.0 * c.reduction * c.y.size[0] * c.y.size[1] * c.out[0] * c.out[1] * c.out[2]
    c.threads = usable_threads(threads) if flops > SERIAL_FLOPS else 1


cdef void use_tile(Conv *c, const fc_ukernels *kernels) noexcept nogil:
    """Size channels, panels and chunks for a tile."""
    c.kernels = kernels
    c.packed = kernels.packed if kernels.pieces else c.item
    c.depth = round_up(c.channels, kernels.depth_step)
    c.reduction = c.depth * c.taps
    c.panel = 2 * kernels.lanes
    c.panels = (c.filters + c.panel - 1) // c.panel
    c.chunk = CHUNK_PIXELS if kernels.pieces else TILES_PER_CHUNK * kernels.tile_rows


cdef void split_numbers(Conv *c, str precision):
    """Change to the tile that multiplies pieces of numbers, if the machine has one and the shape fills it."""
    cdef const fc_ukernels *kernels = piece_tile(c, precision)
    if kernels == NULL or c.out[1] * c.out[2] < kernels.tile_rows:
        return
    cdef double few = 1 + SPLIT_WEIGHT / <double>(c.out[1] * c.out[2])
    if split_pays(kernels, few * round_up(c.channels, kernels.depth_step) / c.channels):
        use_tile(c, kernels)


cdef const fc_ukernels *piece_tile(const Conv *c, str precision, Py_ssize_t summed=0):
    """Return the tile that multiplies pieces of numbers; NULL where there is none, or a sum is short: the channels of a group,
    if it is not said how many numbers are ``summed``."""
    if (summed or c.channels) < SPLIT_CHANNELS:
        return NULL
    return split_ukernels(c.item, 3 if precision == "highest" else 2 if precision == "high" else 1)


cdef Py_ssize_t piece_products(const fc_ukernels *kernels) noexcept nogil:
    """Return the products of pieces that a product of numbers takes; 8 of digits take the time of 4."""
    return 4 if kernels.digits else kernels.pieces * (kernels.pieces + 1) // 2


cdef bint split_pays(const fc_ukernels *kernels, double padded):
    """Whether products of pieces, ``padded`` times as many as are needed, take less time than products of numbers."""
    return piece_products(kernels) * padded <= SPLIT_RATE


cdef Py_ssize_t share_out(Py_ssize_t tasks, Py_ssize_t parts, Py_ssize_t packing, int threads) noexcept nogil:
    """Return into how many shares of its parts to cut each task, so that the last thread is done first.

    Shares say who computes, never what. Each packs its task's part of the image again, as long as ``packing`` quarters of a
    part take; and where threads have several shares, one may be a quarter of a share late.
    """
    cdef Py_ssize_t shares, most, rounds, time, best = 1, least = 0
    if threads == 1:
        return 1
    for shares in range(1, min(parts, <Py_ssize_t>4 * threads) + 1):
        most = ceil_div(parts, shares)
        rounds = ceil_div(tasks * shares, threads)
        time = rounds * (4 * most + packing) + (most if rounds > 1 else 0)
        if shares == 1 or time < least:
            best, least = shares, time
    return best


cdef void run_tasks(TaskFunction task, const void *plan, Py_ssize_t tasks, int threads) except *:
    """Do all tasks of a plan, on so many threads; a task returns 1 if it lacks memory."""
    cdef Py_ssize_t failures
    with nogil:
        failures = do_tasks(task, plan, tasks, threads)
    if failures:
        raise MemoryError("no memory for workspace")


cdef Py_ssize_t do_tasks(TaskFunction task, const void *plan, Py_ssize_t tasks, int threads) noexcept nogil:
    """The same within a task; return how many lacked memory."""
    cdef Py_ssize_t number, failures = 0
    if threads == 1:  # a parallel region of one thread costs as much as a small convolution
        for number in range(tasks):
            failures += task(plan, number)
    else:
        for number in prange(tasks, num_threads=threads, schedule="dynamic"):
            failures += task(plan, number)
    return failures


# ---------------------------------------------------------------------------------------------------------- weights

cdef Py_ssize_t packed_weight_size(const Conv *c) noexcept nogil:
    """Elements of one group's packed weights."""
    return c.panels * c.panel * c.reduction


cdef int panel_vectors(const Conv *c, Py_ssize_t panel) noexcept nogil:
    """Vectors in a panel: two, or one where panels, or what is left for the last, are no more than that."""
    return 1 if min(c.panel, c.filters - panel * c.panel) <= c.kernels.lanes else 2


cdef bint taps_continue(const Conv *c) noexcept nogil:
    """Whether the taps of one channel of a filter are all ``stride[4]`` apart in memory."""
    cdef const View *w = &c.w
    cdef bint rows = c.kernel[1] == 1 or w.stride[3] == c.kernel[2] * w.stride[4]
    return rows and (c.kernel[0] == 1 or w.stride[2] == c.kernel[1] * c.kernel[2] * w.stride[4])


cdef cnp.ndarray turn_weights(cnp.ndarray weight, dims):
    """Return weights with the channels as neighbours, if a gradient of the input needs some taps for each phase."""
    cdef Py_ssize_t item = cnp.PyArray_ITEMSIZE(weight), k
    cdef Py_ssize_t filters = cnp.PyArray_DIM(weight, 0), channels = cnp.PyArray_DIM(weight, 1)
    cdef Py_ssize_t taps = cnp.PyArray_SIZE(weight) // (filters * channels)
    cdef const fc_ukernels *kernels = ukernels(item)
    cdef cnp.ndarray turned
    if max(dims.stride) == 1 or taps == 1 or dims.groups > 1 or not cnp.PyArray_IS_C_CONTIGUOUS(weight):
        return weight
    shape = (<object>weight).shape
    turned = np.empty((shape[0], *shape[2:], shape[1]), weight.dtype)
    for k in range(filters):
        kernels.transpose(
            cnp.PyArray_BYTES(weight) + k * channels * taps * item, taps, 1, channels, taps,
            cnp.PyArray_BYTES(turned) + k * channels * taps * item, channels,
        )
    return np.moveaxis(turned, -1, 1)


cdef void pack_panel(const Conv *c, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t channel, Py_ssize_t channels,
                     char *out) noexcept nogil:
    """Pack (filters of the panel, some channels, taps) to [channel][tap][filter], missing filters as zeros.

    Folded, to [tap][channel][filter].
    """
    cdef const View *w = &c.w
    cdef Py_ssize_t width = panel_vectors(c, panel) * c.kernels.lanes
    cdef Py_ssize_t first = panel * c.panel
    cdef Py_ssize_t filters = min(width, c.filters - first)
    cdef const char *base = w.data + ((group * c.filters + first) * w.stride[0] + channel * w.stride[1]) * c.item
    cdef Py_ssize_t step = w.stride[4]  # from tap to tap
    cdef bint planes = taps_continue(c)  # dimensions that continue one another are one
    cdef Py_ssize_t i, d, h, t, run
    if filters < width:
        memset(out, 0, <size_t>(width * channels * c.taps * c.item))
    if (w.stride[0] == 1 or (w.stride[1] == 1 and c.taps > 1)) and not c.folded:  # filters or channels are neighbours: tap by tap
        for d in range(c.kernel[0]):
            for h in range(c.kernel[1]):
                for t in range(c.kernel[2]):
                    c.kernels.transpose(
                        base + (d * w.stride[2] + h * w.stride[3] + t * w.stride[4]) * c.item,
                        w.stride[0], w.stride[1], filters, channels, out, c.taps * width,
                    )
                    out += width * c.item
        return
    if c.folded:
        for d in range(c.kernel[0]):
            for h in range(c.kernel[1]):
                for i in range(channels):
                    c.kernels.transpose(
                        base + (i * w.stride[1] + d * w.stride[2] + h * w.stride[3]) * c.item,
                        w.stride[0], step, filters, c.kernel[2], out + i * width * c.item, channels * width,
                    )
                out += c.kernel[2] * channels * width * c.item
        return
    if c.taps == 1 or (planes and w.stride[1] == c.taps * step):
        step = w.stride[1] if c.taps == 1 else step
        c.kernels.transpose(base, w.stride[0], step, filters, channels * c.taps, out, width)
        return
    run = c.taps if planes else c.kernel[2]
    for i in range(channels):
        if i + AHEAD < channels and w.stride[0] == c.taps:  # of swapped channels, whose runs are too short for the hardware to see
            fc_fetch(base + (i + AHEAD) * w.stride[1] * c.item, filters * c.taps * c.item)
        for d in range(1 if planes else c.kernel[0]):
            for h in range(1 if planes else c.kernel[1]):
                c.kernels.transpose(
                    base + (i * w.stride[1] + d * w.stride[2] + h * w.stride[3]) * c.item,
                    w.stride[0], step, filters, run, out, width,
                )
                out += run * width * c.item


cdef char *pack_bias(const Conv *c, bias, char *out):
    """Return the bias as contiguous elements at ``out``, NULL if there is none."""
    cdef cnp.ndarray array
    if bias is None:
        return NULL
    array = bias
    c.kernels.transpose(
        cnp.PyArray_BYTES(array), cnp.PyArray_STRIDE(array, 0) // c.item, 1, cnp.PyArray_DIM(array, 0), 1, out, 0
    )
    return out


cdef bint start_sums(const Conv *c, const char *bias, Py_ssize_t filters, Py_ssize_t width, char *sums,
                     Py_ssize_t step) noexcept nogil:
    """Let sums, a row of ``width`` for each filter, start at the bias; return whether there is one."""
    cdef Py_ssize_t row, i
    if bias == NULL:
        return False
    for row in range(filters):
        for i in range(width):
            if c.item == 4:
                (<float *>sums)[row * step + i] = (<const float *>bias)[row]
            else:
                (<double *>sums)[row * step + i] = (<const double *>bias)[row]
    return True


# ----------------------------------------------------------------------------------------------------------- blocks

cdef Py_ssize_t extent(const Conv *c, int axis, Py_ssize_t pixels) noexcept nogil:
    """Cells of the image that a run of output pixels sees."""
    return (pixels - 1) * c.stride[axis] + (c.kernel[axis] - 1) * c.dilation[axis] + 1


cdef Py_ssize_t part_cells(const Conv *c, Py_ssize_t rows, Py_ssize_t columns) noexcept nogil:
    """Cells, without channels, of the part of the image that a block sees."""
    return c.kernel[0] * extent(c, 1, rows) * extent(c, 2, columns)


cdef void cut(const Conv *c, Py_ssize_t cell_bytes, Py_ssize_t block_bytes, Py_ssize_t column_limit,
              Blocks *blocks) noexcept nogil:
    """Choose blocks whose part of the image, ``cell_bytes`` a cell, fits ``block_bytes``: whole rows, or parts of one."""
    cdef Py_ssize_t rows = c.out[1], columns = min(c.out[2], column_limit)
    while rows > 1 and part_cells(c, rows, columns) * cell_bytes > block_bytes:
        rows -= max(1, rows // 4)
    if rows == 1:
        while columns > c.chunk and part_cells(c, 1, columns) * cell_bytes > block_bytes:
            columns = (columns + 1) // 2
    divide(c, rows, columns, blocks)


cdef void divide(const Conv *c, Py_ssize_t rows, Py_ssize_t columns, Blocks *blocks) noexcept nogil:
    """Cut planes into blocks of about equal size, of so many rows and columns at most."""
    blocks.down = ceil_div(c.out[1], rows)
    blocks.across = ceil_div(c.out[2], columns)
    blocks.rows = ceil_div(c.out[1], blocks.down)
    blocks.columns = ceil_div(c.out[2], blocks.across)
    blocks.down = ceil_div(c.out[1], blocks.rows)
    blocks.across = ceil_div(c.out[2], blocks.columns)
    blocks.count = c.out[0] * blocks.down * blocks.across


cdef void locate(const Conv *c, const Blocks *blocks, Py_ssize_t index, Block *block) noexcept nogil:
    """Find block number ``index`` of the batch."""
    block.left = index % blocks.across * blocks.columns
    index = index // blocks.across
    block.top = index % blocks.down * blocks.rows
    index = index // blocks.down
    block.depth = index % c.out[0]
    block.image = index // c.out[0]
    block.rows = min(blocks.rows, c.out[1] - block.top)
    block.columns = min(blocks.columns, c.out[2] - block.left)
    block.high = extent(c, 1, block.rows)
    block.wide = extent(c, 2, block.columns)


cdef void pack_image(const Conv *c, const Block *block, Py_ssize_t first, Py_ssize_t count, Py_ssize_t width,
                     char *out) noexcept nogil:
    """Pack channels ``first`` to ``first + count`` of the block's part of the image to [kernel depth][high][wide][width]."""
    cdef Py_ssize_t d
    for d in range(c.kernel[0]):
        pack_rows(c, block, d, 0, block.high, first, count, width, out)
        out += block.high * block.wide * width * c.item


cdef void pack_rows(const Conv *c, const Block *block, Py_ssize_t d, Py_ssize_t first_row, Py_ssize_t high, Py_ssize_t first,
                    Py_ssize_t count, Py_ssize_t width, char *out) noexcept nogil:
    """Pack some rows, of kernel depth ``d``, of the block's part of the image to [row][wide][width]."""
    cdef const View *x = &c.x
    cdef const char *base = x.data + (block.image * x.stride[0] + first * x.stride[1]) * c.item
    cdef Py_ssize_t left = block.left * c.stride[2] - c.pad[2]
    cdef Py_ssize_t start = min(max(0, -left), block.wide)
    cdef Py_ssize_t stop = max(start, min(block.wide, x.size[4] - left))
    cdef Py_ssize_t row_bytes = block.wide * width * c.item
    cdef Py_ssize_t top = block.top * c.stride[1] - c.pad[1] + first_row
    cdef Py_ssize_t z = block.depth * c.stride[0] - c.pad[0] + d * c.dilation[0]
    # Rows that continue one another, without padding between them, are one.
    cdef bint one_row = (
        stop - start == block.wide and x.stride[3] == block.wide * x.stride[4] and top >= 0 and top + high <= x.size[3]
    )
    cdef Py_ssize_t rows = 1 if one_row else high, run = (stop - start) * (high // rows), y
    row_bytes *= high // rows
    for y in range(top, top + rows):
        if run == 0 or z < 0 or z >= x.size[2] or y < 0 or y >= x.size[3]:
            memset(out, 0, <size_t>row_bytes)
        else:
            if count < width:
                memset(out, 0, <size_t>row_bytes)
            elif run < block.wide:
                memset(out, 0, <size_t>(start * width * c.item))
                memset(out + stop * width * c.item, 0, <size_t>((block.wide - stop) * width * c.item))
            c.kernels.transpose(
                base + (z * x.stride[2] + y * x.stride[3] + (left + start) * x.stride[4]) * c.item,
                x.stride[1], x.stride[4], count, run, out + start * width * c.item, width,
            )
        out += row_bytes


cdef const char *first_output(const Conv *c, const Block *block, Py_ssize_t channel) noexcept nogil:
    """Return where a block's first pixel is in the output."""
    cdef const View *y = &c.y
    return y.data + (
        block.image * y.stride[0] + channel * y.stride[1] + block.depth * y.stride[2] + block.top * y.stride[3]
        + block.left * y.stride[4]
    ) * c.item


cdef void pack_pixels(const Conv *c, const Block *block, Py_ssize_t first, Py_ssize_t count, Py_ssize_t width,
                      Py_ssize_t first_pixel, Py_ssize_t pixels, char *out) noexcept nogil:
    """Pack channels ``first`` to ``first + count`` of a block's output pixels to [pixel][width], missing ones as zeros."""
    cdef const View *y = &c.y
    cdef const char *base = first_output(c, block, first)
    cdef Py_ssize_t end = first_pixel + pixels, row, column, run
    if count < width:
        memset(out, 0, <size_t>(pixels * width * c.item))
    while first_pixel < end:
        row = first_pixel // block.columns
        column = first_pixel % block.columns
        run = min(end - first_pixel, block.columns - column)
        c.kernels.transpose(
            base + (row * y.stride[3] + column * y.stride[4]) * c.item, y.stride[1], y.stride[4], count, run, out, width
        )
        out += run * width * c.item
        first_pixel += run


cdef void tap_offsets(const Conv *c, const Block *block, Py_ssize_t width, Py_ssize_t *taps) noexcept nogil:
    """Write where each tap is in a packed part of the image, from the first tap."""
    place_taps(c, block.high * block.wide * width, block.wide * width, width, taps)


cdef void place_taps(const Conv *c, Py_ssize_t slab, Py_ssize_t row, Py_ssize_t cell, Py_ssize_t *taps) noexcept nogil:
    """Write where each tap is, from the first tap: kernel depths, rows and cells are so far apart."""
    cdef Py_ssize_t d, h, w, t = 0
    for d in range(c.kernel[0]):
        for h in range(c.kernel[1]):
            for w in range(c.kernel[2]):
                taps[t] = d * slab + h * c.dilation[1] * row + w * c.dilation[2] * cell
                t += 1


cdef void pixel_offsets(const Conv *c, const Block *block, Py_ssize_t width, Py_ssize_t *pixels) noexcept nogil:
    """Write where the first tap of each output pixel of the block is in a packed part of the image."""
    place_pixels(c, block, block.wide * width, width, pixels)


cdef void place_pixels(const Conv *c, const Block *block, Py_ssize_t row, Py_ssize_t cell, Py_ssize_t *pixels) noexcept nogil:
    """Write where the first tap of each output pixel of the block is: rows and cells are so far apart."""
    cdef Py_ssize_t down = c.stride[1] * row, across = c.stride[2] * cell, columns = block.columns, r, q
    for r in range(block.rows):
        for q in range(columns):
            pixels[q] = r * down + q * across
        pixels += columns


cdef Py_ssize_t output_run(const Conv *c, const Block *block, Py_ssize_t pixel, Py_ssize_t end, Py_ssize_t *at) noexcept nogil:
    """Return how many of a block's pixels, from ``pixel`` on, are evenly spaced in the output; write where its first channel is."""
    cdef const View *y = &c.y
    cdef Py_ssize_t row = pixel // block.columns, column = pixel % block.columns
    cdef bint one_run = block.columns == c.out[2] and y.stride[3] == c.out[2] * y.stride[4]  # rows continue one another
    at[0] = (
        block.image * y.stride[0] + block.depth * y.stride[2] + (block.top + row) * y.stride[3]
        + (block.left + column) * y.stride[4]
    )
    return end - pixel if one_run else min(end - pixel, block.columns - column)


cdef void store(const Conv *c, const Block *block, Py_ssize_t first_pixel, Py_ssize_t pixels, const char *accumulators,
                Py_ssize_t width, Py_ssize_t channel, Py_ssize_t channels, const char *bias,
                int relu) noexcept nogil:
    """Finish accumulators, [pixel][width], and store them as ``channels`` channels from ``channel`` on."""
    cdef fc_epilogue epilogue
    cdef Py_ssize_t end = first_pixel + pixels, run, at
    epilogue.bias = bias
    epilogue.relu = relu
    epilogue.pixel_stride = c.y.stride[4]
    epilogue.channel_stride = c.y.stride[1]
    while first_pixel < end:
        run = output_run(c, block, first_pixel, end, &at)
        c.kernels.epilogue(
            &epilogue, accumulators, width, run, channels, c.y.data + (channel * c.y.stride[1] + at) * c.item
        )
        accumulators += run * width * c.item
        first_pixel += run
