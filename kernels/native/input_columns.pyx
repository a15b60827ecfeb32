"""The gradient of the input by way of columns, what each tap sends back from each pixel.

    columns[r][p] = sum over k of  weight[k][r] * grad_output[k][p],      r = (channel, tap)
    grad_input[channel][the cell that p sees by tap] += columns[channel, tap][p]

    for some of the images, or a strip of one's cells:                in parallel, if there are few channels
        for all their pixels, or a band of rows:
            copy the gradients, unless few channels use them          [group][filter][image][pixel]
            for group, some channels (a task):                        in parallel, if there are many
                turn the channels' weights                            [channel][tap][filter]: L2
                for panel of all images' pixels: brgemm               columns of some channels: L2
                for image: add the columns to the channels' planes

                  filters               panel                           panel
             +---------------+        +---+---+                       +---+---+
        r    |    weights    |      k |   |   |                   r   |   |   |
             |               |   x    |   |   |           =           |   |   |
             +---------------+        +---+---+                       +---+---+

A strip has cells that are neighbours along the rows of an image (or its depth), and pixels at its ends that the next strip computes again. A sum
runs from the first row of pixels that sees the cell to the last, however images are cut in strips and bands.

The weights, most of the memory there is to move, are read once and in the caller's order, whatever the stride: the phases of
a stride are not convolutions of their own, with a part of each filter. The columns of a few channels are all that ever exists.

Where the machine has a tile that multiplies pieces of numbers, (channel, tap) are its lanes: then weights are split where they
are, and only the gradients and the columns, fewer, are turned. Digits have a scale for each (channel, tap) and block of filters,
and one for an image's block of filters; lanes of a vector have as many products, and vectors are the same in any task.
"""

import math

import numpy as np

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels.native.blocking cimport (
    Conv, View, ceil_div, do_tasks, make_conv, piece_tile, round_up, run_tasks, split_pays, use_tile,
)
from fastconv.kernels.native.digits cimport DIGITS, NUMBERS, Scales, measure, products
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_HUGE, FC_ORDINARY, FC_TINY, arena, digit_ukernels, fc_reduction,
    fc_reduction_over, fc_scales, fc_spread, fc_tally, fc_ukernels,
)

from fastconv.kernels.native.digits import by_forms

cdef enum:
    ROWS = 96                   # (channel, tap) of a task, about: with 512 filters their weights take 192 KB
    PIXELS = 512                # of images that are done together, unless one has more: columns take 192 KB
    BAND = 1024                 # pixels of an image that are done together: 96 columns take 384 KB
    SPLIT_ROWS = 288            # and ...
    SPLIT_PIXELS = 128          # ... the same where numbers are split: whole panels of 32 rows for 1, 4, and 9 taps
    SPLIT_DEPTH = 256           # filters whose weights are split at a time: 442 KB of pieces, where L2 has 2 MB
    DIGIT_DEPTH = 512           # ... and of digits as many bytes
    FEW_ROWS = 32               # (channel, tap): gradients that so few use are read where they are
    SUMMED = 256                # filters whose products digits add up: with fewer, images are refused too often
    DIGIT_USES = 100            # of a weight: with fewer, measuring it takes as long as the products that digits save
    LANES = 16                  # of the tile that multiplies digits
    TASKS = 4                   # of channels, for each thread: with fewer, threads share strips
    STRIP = 256                 # pixels of a strip, at least
    USES = 32                   # of a number in products that make up for splitting it, about

# What all tasks of one call share.
ctypedef struct Plan:
    Conv c                      # x is the gradient of the input
    const char *weights         # where the caller has them, (filter, channel, tap)
    Py_ssize_t filter_step, channel_step, tap_step
    Py_ssize_t together         # channels of a task
    Py_ssize_t parts            # tasks of a group
    Py_ssize_t strips           # of an image
    int cut                     # the axis along which it is cut in strips
    Py_ssize_t low[3]           # the cells of a strip, ...
    Py_ssize_t high[3]
    Py_ssize_t strip_rows[2]    # ... the first row of the output that sees them, and the first thereafter that sees none
    Py_ssize_t band             # rows that are done together, ...
    Py_ssize_t row, rows        # ... the first of them, and how many
    Py_ssize_t pixels           # of a band
    Py_ssize_t most             # images that are done together: several if a band is all of an image
    Py_ssize_t first, images
    Py_ssize_t pitch            # from column to column, ...
    Py_ssize_t grad_pitch       # ... and from filter to filter
    bint in_place               # gradients are read where they are
    Py_ssize_t block            # filters whose weights are split at a time
    Py_ssize_t depth            # filters of split gradients, whole steps of the tile
    char *grads
    const char *bias
    bint relu
    unsigned char *refused      # images with numbers that can't be split; the last one stands for the weights
    const float *scale          # of digits, by image, group and block of filters
    const fc_spread *spread     # the same

# Where a task has the weights of a block of filters, split, and of digits the scales, panel by panel.
ctypedef struct Pieces:
    fc_tally *tallies
    fc_scales *scales
    char *floats                # of a step of the tile
    char *weights

ctypedef fused real:
    float
    double


cdef void input_by_columns(cnp.ndarray grad_output, cnp.ndarray weight, bias, cnp.ndarray grad_input, dims, options):
    """See ``conv_input_grad`` in ``fastconv.kernels``."""
    by_forms(_input_by_columns, grad_output, grad_input, dims.group_out_channels, (weight, bias, dims, options))


def _input_by_columns(cnp.ndarray grad_output, cnp.ndarray grad_input, int form, cnp.ndarray weight, bias, dims, options):
    """Compute the gradients; return the images that were left out for their numbers don't have that form."""
    cdef Plan plan
    cdef Scales scales
    cdef Conv *c = &plan.c
    cdef bytearray refused
    cdef cnp.ndarray flat
    cdef int threads
    filters, channels = dims.out_channels, dims.group_in_channels
    cdef cnp.ndarray rows = weight.reshape(filters, channels, dims.taps)  # a copy, if taps are not evenly spaced
    make_conv(c, grad_input, weight, grad_output, dims, options)
    plan.pixels = c.out[0] * c.out[1] * c.out[2]
    if form != NUMBERS and rows[0].flags.c_contiguous:
        _split_numbers(&plan, options.precision, form)
    if form == DIGITS and not c.kernels.digits:
        return list(range(c.batch))
    plan.weights = cnp.PyArray_BYTES(rows)
    plan.filter_step = cnp.PyArray_STRIDE(rows, 0) // c.item
    plan.channel_step = cnp.PyArray_STRIDE(rows, 1) // c.item
    plan.tap_step = cnp.PyArray_STRIDE(rows, 2) // c.item
    plan.block = DIGIT_DEPTH if c.kernels.digits else SPLIT_DEPTH
    plan.depth = round_up(c.filters, c.kernels.depth_step)
    flat = None if bias is None else np.ascontiguousarray(bias)
    plan.bias = NULL if flat is None else cnp.PyArray_BYTES(flat)
    plan.relu = options.activation == "relu"
    refused = bytearray(c.batch + 1)
    plan.refused = <unsigned char *><char *>refused
    if c.kernels.digits:
        scales = measure(c, &c.y, c.filters, plan.block, c.filters, plan.refused)
        plan.scale, plan.spread = scales.scale, scales.spread
        if 0 not in refused[:c.batch]:
            return list(range(c.batch))
    threads = _share_out(&plan)
    run_tasks(_strip_task, &plan, ceil_div(c.batch, plan.most) * plan.strips, threads)
    return [image for image in range(c.batch) if refused[image] or refused[c.batch]]


cdef int _share_out(Plan *plan):
    """Choose channels, images, rows that are done together; return how many threads share images and strips: one, where channels are shared."""
    cdef Conv *c = &plan.c
    cdef Py_ssize_t all_rows = c.out[0] * c.out[1], most_channels = max(1, (SPLIT_ROWS if c.kernels.pieces else ROWS) // c.taps)
    cdef Py_ssize_t images, strips
    cdef int sharing = 1
    plan.most = max(1, min(c.batch, (SPLIT_PIXELS if c.kernels.pieces else PIXELS) // plan.pixels))
    plan.cut = 0 if c.out[0] > 1 else 1
    plan.strips = 1
    if c.threads > 1 and c.groups * ceil_div(c.channels, most_channels) < c.threads * TASKS:
        images = ceil_div(c.batch, plan.most)
        strips = max(1, min(ceil_div(c.threads, images), c.x.size[2 + plan.cut] // 2, plan.pixels // STRIP))
        if strips * images >= c.threads:
            plan.strips, sharing, c.threads = strips, c.threads, 1
    plan.together = min(ceil_div(c.channels, c.threads), most_channels)
    if c.kernels.digits:
        plan.together = round_up(plan.together, _channels_of_panels(c))
    plan.parts = ceil_div(c.channels, plan.together)
    plan.band = ceil_div(all_rows, ceil_div(plan.pixels, <Py_ssize_t>BAND))
    plan.pixels = plan.band * c.out[2]
    plan.pitch = round_up(plan.most * plan.pixels, c.kernels.lanes) | c.kernels.lanes  # an odd number of vectors: L1's sets
    plan.in_place = c.kernels.pieces == 0 and plan.most == 1 and c.channels * c.taps <= FEW_ROWS and _whole_vectors(plan)
    plan.grad_pitch = c.y.stride[1] if plan.in_place else plan.pitch
    return sharing


cdef bint _whole_vectors(const Plan *plan) noexcept nogil:
    """Whether the pixels of every band are neighbours, and fill whole vectors."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t rows = 1 if plan.strips > 1 else plan.band, all_rows = c.out[0] * c.out[1], lanes = c.kernels.lanes
    return (
        c.y.stride[4] == 1 and _rows_are_one(c) and rows * c.out[2] % lanes == 0 and all_rows * c.out[2] % lanes == 0
    )


cdef bint _rows_are_one(const Conv *c) noexcept nogil:
    """Whether all rows of an image's gradients follow one another, as far apart as pixels are."""
    cdef const View *y = &c.y
    cdef Py_ssize_t row = c.out[2] * y.stride[4]
    return (c.out[1] == 1 or y.stride[3] == row) and (c.out[0] == 1 or y.stride[2] == c.out[1] * row)


cdef void _split_numbers(Plan *plan, str precision, int form):
    """Change to the tile that multiplies pieces of numbers, or digits, if the machine has one and the shape fills it."""
    cdef Conv *c = &plan.c
    cdef const fc_ukernels *pieces = _digit_tile(c, precision) if form == DIGITS else piece_tile(c, precision)
    cdef Py_ssize_t rows = c.channels * c.taps, least
    cdef double padded
    if pieces == NULL or min(plan.pixels, c.filters, rows) < USES:
        return
    least = pieces.tile_rows if pieces.digits else pieces.tile_rows // 2
    padded = round_up(c.filters, pieces.depth_step) * <double>round_up(plan.pixels, least)
    padded *= round_up(rows, pieces.lanes) / (<double>c.filters * plan.pixels * rows)
    if not split_pays(pieces, padded):
        return
    use_tile(c, pieces)
    if pieces.digits:
        c.panel = pieces.lanes  # which decide together how many products are enough


cdef const fc_ukernels *_digit_tile(const Conv *c, str precision):
    """Return the tile that multiplies digits; NULL where there is none, or sums are short, or a task would have too many taps."""
    cdef const fc_ukernels *kernels = digit_ukernels(c.item)
    if kernels == NULL or precision != "highest" or c.filters < SUMMED or c.out[0] * c.out[1] * c.out[2] < DIGIT_USES:
        return NULL
    if c.y.stride[4] != 1 and c.y.stride[1] != 1:
        return NULL
    return kernels if _channels_of_panels(c) * c.taps <= 2 * SPLIT_ROWS else NULL


cdef Py_ssize_t _channels_of_panels(const Conv *c):
    """Return how many channels fill whole panels of 16 (channel, tap): so these are the same in any task."""
    return LANES // math.gcd(c.taps, LANES)


cdef int _strip_task(const void *shared, Py_ssize_t number) noexcept nogil:
    """Compute the gradients of a strip of one image, or of all of some images, band by band."""
    cdef Plan plan = (<const Plan *>shared)[0]
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t row, failures = 0, grad_bytes = c.groups * c.filters * plan.pitch * c.item
    if c.kernels.pieces:
        grad_bytes = c.groups * plan.depth * plan.most * plan.pixels * c.packed
    if not plan.in_place:
        plan.grads = arena(FC_ARENA_WEIGHTS, grad_bytes)
        if plan.grads == NULL:
            return 1
    plan.first = number // plan.strips * plan.most
    plan.images = min(plan.most, c.batch - plan.first)
    _find_strip(&plan, number % plan.strips)
    for row from plan.strip_rows[0] <= row < plan.strip_rows[1] by plan.band:
        plan.row = row
        plan.rows = min(plan.band, plan.strip_rows[1] - plan.row)
        plan.pixels = plan.rows * c.out[2]
        if c.kernels.pieces:
            failures += do_tasks(_split_grads_task, &plan, plan.images, c.threads)
        elif not plan.in_place:
            _copy_grads(&plan)
        failures += do_tasks(_channels_task, &plan, c.groups * plan.parts, c.threads)
    return failures > 0


cdef void _find_strip(Plan *plan, Py_ssize_t strip) noexcept nogil:
    """Choose a strip's cells, and the rows of pixels that see them."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t size = c.x.size[2 + plan.cut], step = c.out[1] if plan.cut == 0 else 1, first
    cdef int axis
    for axis in range(3):
        plan.low[axis], plan.high[axis] = 0, c.x.size[2 + axis]
    plan.strip_rows[0], plan.strip_rows[1] = 0, c.out[0] * c.out[1]
    if plan.strips > 1:
        plan.low[plan.cut], plan.high[plan.cut] = strip * size // plan.strips, (strip + 1) * size // plan.strips
        first = min(_first_pixel(plan, plan.cut, c.kernel[plan.cut] - 1), c.out[plan.cut] - 1)  # if only to fill cells that none sees
        plan.strip_rows[0], plan.strip_rows[1] = first * step, max(first + 1, _end_pixel(plan, plan.cut, 0)) * step


cdef void _copy_grads(const Plan *plan) noexcept nogil:
    """Copy some images' gradients, in runs of rows that follow one another, and zeros to fill the last panel."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t filters = c.groups * c.filters, pixels = plan.images * plan.pixels, row, k
    cdef Py_ssize_t together = plan.rows if _rows_are_one(c) else 1
    cdef char *out = plan.grads
    for row from 0 <= row < plan.images * plan.rows by together:
        c.kernels.transpose(
            _grad_row(plan, row // plan.rows, row % plan.rows), c.y.stride[4], c.y.stride[1], together * c.out[2], filters,
            out, plan.pitch,
        )
        out += together * c.out[2] * c.item
    for k in range(filters):
        memset(plan.grads + (k * plan.pitch + pixels) * c.item, 0, <size_t>((plan.pitch - pixels) * c.item))


cdef const char *_grad_row(const Plan *plan, Py_ssize_t image, Py_ssize_t row) noexcept nogil:
    """Return where a row of a band starts."""
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    row += plan.row
    return y.data + (
        (plan.first + image) * y.stride[0] + row // c.out[1] * y.stride[2] + row % c.out[1] * y.stride[3]
    ) * c.item


cdef Py_ssize_t _block_depth(const Plan *plan, Py_ssize_t filter) noexcept nogil:
    """Return how many filters, whole steps of the tile, the block has that begins with ``filter``."""
    return round_up(min(plan.block, plan.c.filters - filter), plan.c.kernels.depth_step)


cdef char *_grads_at(const Plan *plan, Py_ssize_t group, Py_ssize_t filter) noexcept nogil:
    """Where the split gradients of a block of filters begin."""
    return plan.grads + (group * plan.depth + filter) * plan.images * plan.pixels * plan.c.packed


cdef Py_ssize_t _scale_number(const Plan *plan, Py_ssize_t image, Py_ssize_t group, Py_ssize_t filter) noexcept nogil:
    """The number of the scale of an image and a block of filters."""
    return ((plan.first + image) * plan.c.groups + group) * ceil_div(plan.c.filters, plan.block) + filter // plan.block


cdef int _split_grads_task(const void *shared, Py_ssize_t image) noexcept nogil:
    """Turn an image's gradients and split them, [group][block of filters][image][pixel][filter].

    A row with nothing but tiny numbers is refused, and the image with it: rows are the same in any strip and band.
    """
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t group, row
    cdef int sizes
    cdef char *floats = arena(FC_ARENA_BLOCK, c.out[2] * c.filters * c.item)
    if floats == NULL:
        return 1
    for row in range(plan.rows):
        sizes = FC_ORDINARY if c.kernels.digits else 0
        for group in range(c.groups):
            sizes |= _split_row(plan, image, group, row, floats)
        if sizes & FC_HUGE or sizes == FC_TINY:
            plan.refused[plan.first + image] = 1
    return 0


cdef int _split_row(const Plan *plan, Py_ssize_t image, Py_ssize_t group, Py_ssize_t row, char *floats) noexcept nogil:
    """Turn and split a row of a group's gradients; return the numbers' sizes."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t k, n
    cdef int sizes = 0
    cdef char *out
    c.kernels.transpose(
        _grad_row(plan, image, row) + group * c.filters * c.y.stride[1] * c.item,
        c.y.stride[1], c.y.stride[4], c.filters, c.out[2], floats, c.filters,
    )
    for k from 0 <= k < c.filters by plan.block:
        n = min(plan.block, c.filters - k)
        out = _grads_at(plan, group, k) + (image * plan.pixels + row * c.out[2]) * _block_depth(plan, k) * c.packed
        if c.kernels.digits:
            c.kernels.digits_rows(
                floats + k * c.item, c.out[2], c.filters, n, plan.scale[_scale_number(plan, image, group, k)], out
            )
        else:
            sizes |= c.kernels.split_rows(floats + k * c.item, c.out[2], c.filters, n, c.kernels.pieces, out)
    return sizes


cdef int _channels_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t group = task // plan.parts, channel = task % plan.parts * plan.together, image, m
    cdef Py_ssize_t channels = min(plan.together, c.channels - channel)
    if plan.refused[c.batch]:
        return 0
    cdef Py_ssize_t rows = round_up(channels * c.taps, max(<Py_ssize_t>c.kernels.tile_rows, c.panel))
    cdef char *columns = arena(FC_ARENA_BLOCK, rows * plan.pitch * c.item + _workspace(plan, channels * c.taps))
    if columns == NULL:
        return 1
    if c.kernels.pieces:
        _multiply_pieces(plan, group, channel, channels, columns + rows * plan.pitch * c.item, columns)
    else:
        _multiply(plan, group, channel, channels, columns + rows * plan.pitch * c.item, columns)
    for m in range(channels):
        for image in range(plan.images):
            _add_channel(plan, plan.first + image, group * c.channels + channel + m,
                         columns + (m * c.taps * plan.pitch + image * plan.pixels) * c.item)
    return 0


cdef Py_ssize_t _workspace(const Plan *plan, Py_ssize_t rows) noexcept nogil:
    """Bytes of what a task needs beside the columns."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t pixels = round_up(plan.images * plan.pixels, c.kernels.tile_rows)
    if c.kernels.pieces == 0:
        return round_up(rows * <Py_ssize_t>sizeof(Py_ssize_t), 64) + rows * (c.filters | 16) * c.item
    cdef Pieces pieces
    rows = round_up(rows, c.panel)
    return (
        _lay_out(plan, rows // c.panel, NULL, &pieces) - <char *>NULL + rows * pixels * c.item
        + pixels * <Py_ssize_t>sizeof(Py_ssize_t)
    )


cdef void _multiply(const Plan *plan, Py_ssize_t group, Py_ssize_t channel, Py_ssize_t channels, char *memory,
                    char *columns) noexcept nogil:
    """Compute the columns of some channels: weights x gradients."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t rows = channels * c.taps, pixels = plan.images * plan.pixels, depth = c.filters | 16, zero = 0, m, pixel
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory
    cdef char *weights = memory + round_up(rows * <Py_ssize_t>sizeof(Py_ssize_t), 64)
    cdef const char *grads = plan.grads + group * c.filters * plan.pitch * c.item
    if plan.in_place:
        grads = _grad_row(plan, 0, 0) + group * c.filters * plan.grad_pitch * c.item
    cdef fc_reduction reduction = fc_reduction_over(&zero, 1, c.filters)
    reduction.ahead = c.panel if plan.in_place else 0
    reduction.b_step, reduction.c_step = plan.grad_pitch, plan.pitch
    for m in range(rows):
        offsets[m] = m * depth
    _turn_weights(plan, group, channel, channels, depth, weights)
    for pixel from 0 <= pixel < pixels by c.panel:
        c.kernels.brgemm(
            &reduction, weights, offsets, rows, grads + pixel * c.item, 1 if pixels - pixel <= c.kernels.lanes else 2,
            columns + pixel * c.item, 0,
        )


cdef void _multiply_pieces(const Plan *plan, Py_ssize_t group, Py_ssize_t channel, Py_ssize_t channels, char *memory,
                           char *columns) noexcept nogil:
    """Compute the columns of some channels, turned: gradients x weights, by panels of (channel, tap)."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t rows = channels * c.taps, width = c.panel, panels = ceil_div(rows, width), zero = 0
    cdef Py_ssize_t pixels = plan.images * plan.pixels, k, p, sum_bytes = round_up(pixels, c.kernels.tile_rows) * width * c.item
    cdef Pieces pieces
    cdef char *sums = _lay_out(plan, panels, memory, &pieces)
    cdef Py_ssize_t *offsets = <Py_ssize_t *>(sums + panels * sum_bytes)
    cdef int sizes = 0
    cdef fc_reduction reduction = fc_reduction_over(&zero, 1, 0)
    reduction.b_step = reduction.c_step = width
    c.kernels.enter()
    for k from 0 <= k < c.filters by plan.block:
        reduction.depth = _block_depth(plan, k)
        for p in range(pixels):
            offsets[p] = p * reduction.depth
        if c.kernels.digits and not _measure_weights(plan, group, k, channel * c.taps, panels, &pieces):
            sizes = FC_HUGE
            break
        sizes |= _split_weights(plan, group, k, channel * c.taps, panels, &pieces)
        for p in range(panels):
            _multiply_panel(plan, &reduction, group, k, p, offsets, &pieces, sums + p * sum_bytes)
    c.kernels.leave()
    for p in range(panels):
        c.kernels.transpose(
            sums + p * sum_bytes, width, 1, pixels, width, columns + p * width * plan.pitch * c.item, plan.pitch
        )
    if sizes & FC_HUGE:
        plan.refused[c.batch] = 1


cdef char *_lay_out(const Plan *plan, Py_ssize_t panels, char *memory, Pieces *pieces) noexcept nogil:
    """Find room for pieces of a block's weights; return where it ends."""
    cdef const Conv *c = &plan.c
    pieces.tallies = <fc_tally *>memory
    if c.kernels.digits:
        memory += panels * <Py_ssize_t>sizeof(fc_tally)
    pieces.scales = <fc_scales *>memory
    if c.kernels.digits:
        memory += panels * <Py_ssize_t>sizeof(fc_scales)
    pieces.floats = memory
    pieces.weights = memory + c.kernels.depth_step * c.panel * c.item
    return pieces.weights + panels * plan.block * c.panel * c.packed


cdef void _multiply_panel(const Plan *plan, fc_reduction *reduction, Py_ssize_t group, Py_ssize_t filter, Py_ssize_t panel,
                          const Py_ssize_t *offsets, const Pieces *pieces, char *sums) noexcept nogil:
    """Add the products of a block of filters to the sums of a panel: of digits, as many as each image needs."""
    cdef const Conv *c = &plan.c
    cdef const char *weights = pieces.weights + panel * reduction.depth * c.panel * c.packed
    cdef const char *grads = _grads_at(plan, group, filter)
    cdef Py_ssize_t image, number
    if not c.kernels.digits:
        c.kernels.brgemm(reduction, grads, offsets, plan.images * plan.pixels, weights, 2, sums, filter > 0)
        return
    reduction.scales = &pieces.scales[panel]
    reduction.scale_step = 0
    for image in range(plan.images):
        number = _scale_number(plan, image, group, filter)
        reduction.scale = &plan.scale[number]
        reduction.products = products(&plan.spread[number], &reduction.scales.spread, c.filters)
        if reduction.products == 0:
            plan.refused[plan.first + image] = 1
        if plan.refused[plan.first + image]:
            continue
        c.kernels.brgemm(
            reduction, grads, offsets + image * plan.pixels, plan.pixels, weights, 1,
            sums + image * plan.pixels * c.panel * c.item, filter > 0,
        )


cdef bint _measure_weights(const Plan *plan, Py_ssize_t group, Py_ssize_t filter, Py_ssize_t first, Py_ssize_t panels,
                           Pieces *pieces) noexcept nogil:
    """Choose the scales of a block's weights, one for each (channel, tap); return whether there are any."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t filters = min(plan.block, c.filters - filter), unit = c.kernels.depth_step, k, p, count, step
    cdef const char *weights
    cdef bint usable = True
    memset(pieces.tallies, 0, <size_t>panels * sizeof(fc_tally))
    for k from 0 <= k < filters by unit:
        count = min(unit, filters - k)
        for p in range(panels):
            weights = _weights_at(plan, group, filter + k, count, first + p * c.panel, pieces.floats, &step)
            c.kernels.tally(weights, count, step, c.panel, &pieces.tallies[p])
    for p in range(panels):
        pieces.scales[p].spread.peak, pieces.scales[p].spread.density = 0, 1
        usable &= c.kernels.spread_lanes(&pieces.tallies[p], filters, pieces.scales[p].scale, &pieces.scales[p].spread)
    return usable


cdef int _split_weights(const Plan *plan, Py_ssize_t group, Py_ssize_t filter, Py_ssize_t first, Py_ssize_t panels,
                        Pieces *pieces) noexcept nogil:
    """Split the weights of a block of filters for panels of (channel, tap) from ``first`` on, a step of filters at a time: a
    filter's weights are read one panel after another. Return the numbers' sizes."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t filters = min(plan.block, c.filters - filter), depth = _block_depth(plan, filter)
    cdef Py_ssize_t unit = c.kernels.depth_step, k, p, count, step
    cdef const char *weights
    cdef char *out
    cdef int sizes = 0
    for k from 0 <= k < filters by unit:
        count = min(unit, filters - k)
        for p in range(panels):
            weights = _weights_at(plan, group, filter + k, count, first + p * c.panel, pieces.floats, &step)
            out = pieces.weights + (p * depth + k) * c.panel * c.packed
            if c.kernels.digits:
                c.kernels.digits_weights(weights, step, count, 1, 1, &pieces.scales[p], out)
            else:
                sizes |= c.kernels.split_weights(weights, step, count, 1, 2, c.kernels.pieces, out)
    return sizes


cdef const char *_weights_at(const Plan *plan, Py_ssize_t group, Py_ssize_t filter, Py_ssize_t count, Py_ssize_t r, char *floats,
                             Py_ssize_t *step) noexcept nogil:
    """Return where a panel of ``count`` filters' weights is: the last one, beyond which there may be nothing, is copied."""
    cdef const Conv *c = &plan.c
    cdef const char *weights = plan.weights + ((group * c.filters + filter) * plan.filter_step + r) * c.item
    step[0] = plan.filter_step
    if r + c.panel <= c.channels * c.taps:
        return weights
    memset(floats, 0, <size_t>(count * c.panel * c.item))
    c.kernels.transpose(weights, 1, step[0], c.channels * c.taps - r, count, floats, c.panel)
    step[0] = c.panel
    return floats


cdef void _turn_weights(const Plan *plan, Py_ssize_t group, Py_ssize_t channel, Py_ssize_t channels, Py_ssize_t depth,
                        char *out) noexcept nogil:
    """Make rows of the filters' weights for each of some channels and taps."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t i, rows = c.taps
    cdef const char *weights = plan.weights + (
        group * c.filters * plan.filter_step + channel * plan.channel_step
    ) * c.item
    if plan.channel_step == c.taps * plan.tap_step:  # channels continue one another
        rows *= channels
        channels = 1
    for i in range(channels):
        c.kernels.transpose(
            weights + i * plan.channel_step * c.item, plan.filter_step, plan.tap_step, c.filters, rows,
            out + i * rows * depth * c.item, depth,
        )


cdef void _add_channel(const Plan *plan, Py_ssize_t image, Py_ssize_t channel, const char *columns) noexcept nogil:
    """Let a channel's plane start at the bias, add its columns, apply the activation."""
    cdef const View *x = &plan.c.x
    cdef char *cells = x.data + (image * x.stride[0] + channel * x.stride[1]) * plan.c.item
    if plan.c.item == 4:
        _add_columns(plan, <float *>cells, <const float *>columns, (<const float *>plan.bias)[channel] if plan.bias else 0)
    else:
        _add_columns(plan, <double *>cells, <const double *>columns, (<const double *>plan.bias)[channel] if plan.bias else 0)


cdef void _add_columns(const Plan *plan, real *x, const real *columns, real bias) noexcept nogil:
    """Add a band's columns of a channel to the cells of the strip, from the last tap to the first: a cell's pixels in their order."""
    cdef const Conv *c = &plan.c
    cdef const View *v = &c.x
    cdef Py_ssize_t d, h, w, tap = c.taps, depth, left, top, end, first, z, y, i, step = c.stride[2] * v.stride[4]
    cdef real *cells
    if plan.row == plan.strip_rows[0]:
        _fill(plan, x, bias)
    for d in range(c.kernel[0] - 1, -1, -1):
        for h in range(c.kernel[1] - 1, -1, -1):
            for w in range(c.kernel[2] - 1, -1, -1):
                tap -= 1
                left = _first_pixel(plan, 2, w)
                for depth in range(_first_pixel(plan, 0, d), _end_pixel(plan, 0, d)):
                    first = depth * c.out[1] - plan.row  # this plane's first row, in the band
                    top = max(_first_pixel(plan, 1, h), -first)
                    end = min(_end_pixel(plan, 1, h), plan.rows - first)
                    if top < end:
                        cells = x + _cell(c, 0, d, depth) * v.stride[2] + _cell(c, 1, h, top) * v.stride[3]
                        _add_plane(
                            c, cells + _cell(c, 2, w, left) * v.stride[4], c.stride[1] * v.stride[3], step,
                            columns + tap * plan.pitch + (first + top) * c.out[2] + left, end - top, _end_pixel(plan, 2, w) - left,
                        )
    if not plan.relu or plan.row + plan.rows < plan.strip_rows[1]:
        return
    for z in range(plan.low[0], plan.high[0]):
        for y in range(plan.low[1], plan.high[1]):
            cells = x + z * v.stride[2] + y * v.stride[3]
            for i in range(v.size[4]):
                if cells[i * v.stride[4]] < 0:  # a NaN stays one
                    cells[i * v.stride[4]] = 0


cdef void _fill(const Plan *plan, real *x, real value) noexcept nogil:
    """Fill a strip of a plane."""
    cdef const View *v = &plan.c.x
    cdef Py_ssize_t z, y, i
    cdef real *cells
    for z in range(plan.low[0], plan.high[0]):
        for y in range(plan.low[1], plan.high[1]):
            cells = x + z * v.stride[2] + y * v.stride[3]
            if v.stride[4] == 1:
                for i in range(v.size[4]):
                    cells[i] = value
            else:
                for i in range(v.size[4]):
                    cells[i * v.stride[4]] = value


cdef inline Py_ssize_t _cell(const Conv *c, int axis, Py_ssize_t tap, Py_ssize_t pixel) noexcept nogil:
    """The cell that a pixel sees by a tap."""
    return pixel * c.stride[axis] - c.pad[axis] + tap * c.dilation[axis]


cdef inline Py_ssize_t _first_pixel(const Plan *plan, int axis, Py_ssize_t tap) noexcept nogil:
    """The first pixel that sees a cell of the strip by a tap, not of the padding or the strip before."""
    return ceil_div(max(0, plan.low[axis] - _cell(&plan.c, axis, tap, 0)), plan.c.stride[axis])


cdef inline Py_ssize_t _end_pixel(const Plan *plan, int axis, Py_ssize_t tap) noexcept nogil:
    """The first pixel thereafter that sees none."""
    cdef const Conv *c = &plan.c
    return min(c.out[axis], ceil_div(max(0, plan.high[axis] - _cell(c, axis, tap, 0)), c.stride[axis]))


cdef inline void _add_plane(const Conv *c, real *cells, Py_ssize_t row_step, Py_ssize_t cell_step, const real *columns,
                            Py_ssize_t rows, Py_ssize_t n) noexcept nogil:
    """Add rows of n columns to the cells that their pixels see."""
    cdef Py_ssize_t row, i
    for row in range(rows):
        if n < 16:  # a call takes as long as so short a row
            for i in range(n):
                cells[i * cell_step] += columns[i]
        else:
            c.kernels.add_apart(cells, cell_step, columns, n)
        cells += row_step
        columns += c.out[2]
