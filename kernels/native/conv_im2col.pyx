"""Convolution by way of patches: a matrix product of the weights, where they are, and what each pixel sees.

    output[k][p] = bias[k] + sum over r of  weight[k][r] * patches[r][p],    r = (channel, tap)

    for image, group, box of output pixels, share of the filters:       in parallel
        for block of the reduction: nearly always there is one, and sums stay in registers
            gather the patches, padding included                        [reduction][pixels]: L2
            for chunk of filters: for panel of pixels:                  a filter's pixels are stored one panel after another
                for tile of filters: brgemm                             weights from L2; to the output, if lanes fit it
                after the last block: store the sums: activation, the caller's layout

                  r                 panel
             +---------+         +---+---+---+             +---+---+---+
    filters  | weights |      r  |   |   |   |    filters  |   |   |   |
             |         |    x    |   |   |   |      =      |   |   |   |
             +---------+         +---+---+---+             +---+---+---+
                                     pixels                    pixels

Pixels are the lanes, so that neither the weights nor the output of a channels-first network are transposed: good where that
would cost as much as the products, with few channels (a network's first layer) and with 1x1 filters. Only the patches of one box
and one block exist at a time; the full column matrix never does.

The gradient of the input goes by way of columns (``input_columns``); that of 1x1 filters for many pixels is a convolution
forward. That of the weights gathers the same ``patches``: it is in ``weight_im2col``. Where an image has few pixels nothing is
turned at all, in either direction (``few_pixels``).

Where the machine has a tile that multiplies pieces of numbers, weights and patches are split after they were gathered; those of
1x1 filters where they are, and those of all blocks first where weights come from beyond L2; into digits of fixed-point numbers (``digits``) where sums are long. An image that holds inf, NaN or huge numbers, or a box with nothing but tiny ones, is computed
without splitting.
"""

import math

import numpy as np

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels import interleave
from fastconv.kernels.few_pixels import suits
from fastconv.kernels.native.blocking cimport (
    Block, Conv, View, bias_at, ceil_div, make_conv, pack_bias, piece_products, piece_tile, round_up, run_tasks, share_out,
    start_sums, use_tile,
)
from fastconv.kernels.native.digits cimport DIGITS, NUMBERS, PIECES, Scales, digit_tile, measure, products
from fastconv.kernels.native.input_columns cimport input_by_columns
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_HUGE, FC_ORDINARY, FC_TINY, Memory, arena, fc_epilogue, fc_reduction,
    fc_reduction_over, fc_scales, fc_spread, fc_tally, fc_ukernels, ukernels,
)
from fastconv.kernels.native.patches cimport first_cell, gather, join_rows, sees_one_cell
from fastconv.kernels.native.pointwise cimport convolve_rows, suits_rows

from fastconv.kernels.native import few_pixels
from fastconv.kernels.native.digits import by_forms
from fastconv.kernels.native.weight_im2col import conv_weight_grad

cdef enum:
    REDUCTION = 256     # rows of patches gathered at a time: a panel's share is 16 KB in float32, half of L1
    SPLIT_REDUCTION = 512  # the same where numbers are split: from L2 they come fast enough, sums from the output do not
    CHUNK = 48          # filters, at most, whose rows of the output are written side by side
    PATCH_BYTES = 256 << 10  # patches of a box: half of an L2 of 512 KB
    SPLIT_PATCH_BYTES = 512 << 10  # the same where there is AMX, and an L2 of 2 MB
    BOX = 1024          # pixels of a box, at most
    LAID_BYTES = 800_000    # patches of all channels, that share L2 with what else is needed, while ...
    MANY_WEIGHTS = 1 << 20  # ... more than so many bytes of weights are read once, filter by filter
    FLOAT_BYTES = 32 << 10  # patches gathered to be split
    COLUMN_PIXELS = 256 # with no more, the gradient of the input of strided 1x1 filters, too, goes by way of columns
    FEW_PIXELS = 64     # ... and if they are not
    ROW_COLUMNS = 1 << 20  # numbers in the columns of one channel and one row of pixels, at most: a band is whole rows
    SUM_BYTES = 512 << 10  # sums that a task keeps from block to block of the reduction

    # In products of numbers:
    SPLIT_RATE = 11     # products of pieces that are made in the time of one
    SPLIT_PATCH = 20    # what it takes to split a number of the patches and to lay it as the tile wants it, ...
    COUNT_PATCH = 10    # ... to count how large it is, for digits, ...
    SPLIT_WEIGHT = 8    # ... to split one of the weights, ...
    STORE_SUM = 5       # ... and to store a sum that comes from the tile


def conv_forward(input, weight, bias, output, dims, options):
    """See ``fastconv.kernels``."""
    if suits("conv_forward", dims, weight):
        few_pixels.conv_forward(input, weight, bias, output, dims, options)
        return
    rows = weight.reshape(*weight.shape[:2], -1)  # (K, C, taps): a copy, if taps are not evenly spaced
    if abs(rows.strides[2 if rows.shape[2] > 1 else 1]) != rows.itemsize:  # a filter's cells are no neighbours
        rows = _turned(rows) if rows.shape[2] == 1 and rows.strides[0] == rows.itemsize else np.ascontiguousarray(rows)
    by_forms(_forward, input, output, dims.reduction, (weight, rows, bias, dims, options))


def conv_input_grad(grad_output, weight, bias, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    plain = bias is None and options.activation is None
    if plain and suits("conv_input_grad", dims, weight):
        few_pixels.conv_input_grad(grad_output, weight, grad_input, dims, options)
        return
    most = FEW_PIXELS if max(dims.stride) == 1 else COLUMN_PIXELS
    if (dims.taps > 1 or math.prod(dims.output_size) <= most) and dims.taps * dims.output_size[2] <= ROW_COLUMNS:
        input_by_columns(grad_output, weight, bias, grad_input, dims, options)
    else:
        interleave.input_grad(conv_forward, grad_output, weight, bias, grad_input, dims, options)


cdef cnp.ndarray _turned(cnp.ndarray weight):
    """Return 1x1 weights whose filters are neighbours, as HWIO has them, with the channels as neighbours."""
    cdef cnp.ndarray rows = np.empty_like(weight, order="C")
    cdef Py_ssize_t item = cnp.PyArray_ITEMSIZE(weight)
    cdef Py_ssize_t filters = cnp.PyArray_DIM(weight, 0), channels = cnp.PyArray_DIM(weight, 1)
    ukernels(item).transpose(
        cnp.PyArray_BYTES(weight), cnp.PyArray_STRIDE(weight, 1) // item, 1, channels, filters, cnp.PyArray_BYTES(rows),
        channels,
    )
    return rows


# The weights of a filter and a block of channels, as digits.
ctypedef struct Filter:
    float scale
    fc_spread spread

# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    const char *weights         # where the caller has them, (filter, channel, tap)
    Py_ssize_t filter_step, channel_step, tap_step
    Py_ssize_t pixels           # in a box: whole panels
    Py_ssize_t boxes            # of one plane
    Py_ssize_t chunk            # filters multiplied at a time
    Py_ssize_t together         # channels gathered at a time
    Py_ssize_t run              # of them, those that are split at a time: their cells fill whole steps of the tile
    Py_ssize_t laid             # channels whose patches exist at a time: those gathered together, or all
    Py_ssize_t shares           # tasks that share the filters of one box
    const char *bias
    int relu
    bint in_place               # patches are the image as the caller has it
    char *pieces                # of the weights, [block of channels][filter][cell]; NULL: each task splits what it uses
    Filter *scales              # of digits, [block of channels][filter]
    unsigned char *refused      # images with numbers that can't be split; the last one stands for the weights
    const float *scale          # of digits, by image, group and block of channels
    const fc_spread *spread     # the same


# One task: a box of pixels, a share of the filters, and its workspace.
ctypedef struct Task:
    Block block
    Py_ssize_t group
    Py_ssize_t first_pixel, pixels
    Py_ssize_t first, filters
    Py_ssize_t pitch            # from row to row of patches
    Py_ssize_t *rows            # where the weights of a chunk's filters are, from the first
    Py_ssize_t *channel_offsets
    char *sums                  # of panels that are not in place
    char *patches
    char *floats                # a panel's patches before they are split
    char *weights               # pieces of a chunk's weights
    Filter *scales


# A panel of pixels: where the sums of a chunk's filters are, rows of so many lanes that are ``step`` apart.
ctypedef struct Panel:
    char *sums
    Py_ssize_t width, step
    int vectors
    bint in_place               # in the output


# --------------------------------------------------------------------------------------------------------- forward

def _forward(cnp.ndarray input, cnp.ndarray output, int form, cnp.ndarray weight, cnp.ndarray rows, bias, dims, options):
    """Convolve; return the images that were left out for their numbers don't have that form."""
    cdef Plan plan
    cdef Scales scales
    cdef Conv *c = &plan.c
    cdef Py_ssize_t tasks, pixels, most, made, packing
    cdef bint split
    cdef unsigned char[::1] refused
    make_conv(c, input, weight, output, dims, options)
    plan.in_place = sees_one_cell(c) and c.stride[2] * c.x.stride[4] == 1
    join_rows(c)
    split = form != NUMBERS and _split_numbers(&plan, options.precision, form)
    if form == DIGITS and not split:
        return list(range(c.batch))
    if split:
        if not rows[0].flags.c_contiguous:
            rows = np.ascontiguousarray(rows)
    elif suits_rows(c):
        convolve_rows(c, bias, options.activation == "relu")
        return []
    plan.weights = cnp.PyArray_BYTES(rows)
    plan.filter_step = cnp.PyArray_STRIDE(rows, 0) // c.item
    plan.channel_step = cnp.PyArray_STRIDE(rows, 1) // c.item
    plan.tap_step = cnp.PyArray_STRIDE(rows, 2) // c.item
    plan.chunk = max(1, CHUNK // c.kernels.tile_rows) * c.kernels.tile_rows
    plan.together = _channels_together(c)
    plan.run = min(plan.together, c.kernels.depth_step // math.gcd(c.taps, c.kernels.depth_step))
    pixels = c.out[1] * c.out[2]
    most = (SPLIT_PATCH_BYTES if c.kernels.pieces else PATCH_BYTES) // (_depth(c, plan.together) * c.packed)
    plan.boxes = ceil_div(pixels, min(<Py_ssize_t>BOX, max(1, most // c.panel) * c.panel))
    plan.pixels = round_up(ceil_div(pixels, plan.boxes), c.panel)  # even parts
    plan.boxes = ceil_div(pixels, plan.pixels)
    plan.relu = options.activation == "relu"
    refused = bytearray(c.batch + 1)
    plan.refused = &refused[0]
    if c.kernels.digits:
        scales = measure(c, &c.x, c.channels, plan.together, c.channels * c.taps, plan.refused)
        plan.scale, plan.spread = scales.scale, scales.spread
        if 0 not in refused[:c.batch]:
            return list(range(c.batch))
    _prepare_weights(&plan, bias, options.packed)
    _lay_all_channels(&plan)
    tasks = c.batch * c.out[0] * c.groups * plan.boxes
    made = piece_products(c.kernels)
    packing = 4 * SPLIT_PATCH * SPLIT_RATE // (made * plan.chunk) if made else 1  # quarters of a chunk
    plan.shares = share_out(tasks, ceil_div(c.filters, plan.chunk), packing, c.threads)
    if plan.laid < c.channels:
        plan.shares = max(plan.shares, ceil_div(c.filters * plan.pixels * c.item, <Py_ssize_t>SUM_BYTES))
    run_tasks(_forward_task, &plan, tasks * plan.shares, c.threads)
    return [image for image in range(c.batch) if refused[image] or refused[c.batch]]


cdef void _lay_all_channels(Plan *plan) noexcept nogil:
    """Lay out all channels' patches first where many weights are split where they are used: then they are read filter by filter."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t blocks = ceil_div(c.channels, plan.together), weights = c.filters * c.channels * c.taps
    cdef bint fit = blocks * _depth(c, plan.together) * plan.pixels * c.packed <= LAID_BYTES
    plan.laid = plan.together
    if c.kernels.pieces and plan.pieces == NULL and fit and weights * c.item > MANY_WEIGHTS:
        plan.laid = c.channels


cdef Py_ssize_t _channels_together(const Conv *c) noexcept nogil:
    """Return how many channels are gathered at a time: even parts."""
    cdef Py_ssize_t most = SPLIT_REDUCTION if c.kernels.pieces else REDUCTION
    return ceil_div(c.channels, ceil_div(c.channels, max(1, most // c.taps)))


cdef Py_ssize_t _depth(const Conv *c, Py_ssize_t channels) noexcept nogil:
    """Return how many cells of some channels the tile reduces over."""
    return round_up(channels * c.taps, c.kernels.depth_step)


cdef int _forward_task(const void *shared, Py_ssize_t number) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Task t
    cdef Py_ssize_t first, end, channel, chunk
    cdef int sizes = FC_ORDINARY
    _locate_task(plan, number, &t)
    if plan.refused[t.block.image] or plan.refused[c.batch]:
        return 0
    if _find_memory(plan, &t):
        return 1
    if c.kernels.pieces:
        c.kernels.enter()
        sizes = FC_ORDINARY if c.kernels.digits else 0
    for first from 0 <= first < c.channels by plan.laid:
        end = min(first + plan.laid, c.channels)
        for channel from first <= channel < end by plan.together:
            sizes |= _lay_patches(plan, &t, channel)
        for chunk from 0 <= chunk < t.filters by plan.chunk:
            for channel from first <= channel < end by plan.together:
                _multiply(plan, &t, channel, chunk)
    if c.kernels.pieces:
        c.kernels.leave()
    if sizes & FC_HUGE or sizes == FC_TINY:
        plan.refused[t.block.image] = 1
    return 0


cdef int _lay_patches(const Plan *plan, const Task *t, Py_ssize_t channel) noexcept nogil:
    """Gather the patches of a block of channels, or split them; return the numbers' sizes then."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t channels = min(plan.together, c.channels - channel)
    if c.kernels.pieces:
        return _split_patches(plan, t, channel, channels)
    if channel == 0:
        _fill_vectors(c, plan.together * c.taps, t.pixels, t.pitch, t.patches)
    gather(c, &t.block, t.group * c.channels + channel, channels, t.first_pixel, t.pixels, t.pitch, t.patches)
    return 0


cdef char *_patches_at(const Plan *plan, const Task *t, Py_ssize_t channel) noexcept nogil:
    """Where the patches of a block of channels are."""
    cdef const Conv *c = &plan.c
    return t.patches + channel % plan.laid // plan.together * _depth(c, plan.together) * plan.pixels * c.packed


cdef void _fill_vectors(const Conv *c, Py_ssize_t rows, Py_ssize_t pixels, Py_ssize_t pitch, char *out) noexcept nogil:
    """Fill the last vector of each row with zeros: what was there may be subnormal, which takes a hundred times as long."""
    cdef Py_ssize_t row, beyond = round_up(pixels, c.kernels.lanes) - pixels
    for row in range(rows if beyond else 0):
        memset(out + (row * pitch + pixels) * c.item, 0, <size_t>(beyond * c.item))


cdef void _plane(const Conv *c, Py_ssize_t index, Block *block) noexcept nogil:
    """Make a block of a whole output plane, number ``index`` of the batch."""
    block.image = index // c.out[0]
    block.depth = index % c.out[0]
    block.top = block.left = 0
    block.rows = c.out[1]
    block.columns = c.out[2]


cdef void _locate_task(const Plan *plan, Py_ssize_t number, Task *t) noexcept nogil:
    """Find task number ``number``."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t share = number % plan.shares, unit = c.kernels.tile_rows, units = ceil_div(c.filters, unit), first, box
    t.group = number // plan.shares % c.groups
    box = number // (plan.shares * c.groups)
    _plane(c, box // plan.boxes, &t.block)
    t.first_pixel = box % plan.boxes * plan.pixels
    t.pixels = min(plan.pixels, c.out[1] * c.out[2] - t.first_pixel)
    first = units * share // plan.shares * unit  # whole tiles
    t.first = t.group * c.filters + first
    t.filters = min(units * (share + 1) // plan.shares * unit, c.filters) - first


cdef bint _find_memory(const Plan *plan, Task *t) noexcept nogil:
    """Lay out a task's workspace; return whether there is none."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t depth = _depth(c, plan.together), patch_bytes, sum_bytes = plan.chunk * c.panel
    cdef Py_ssize_t offset_bytes = (plan.chunk + plan.together + 8) // 8 * 64
    cdef Py_ssize_t float_bytes = 0, weight_bytes = 0
    if plan.together < c.channels:
        sum_bytes = _filters_summed(plan, t) * plan.pixels
    sum_bytes *= c.item
    if c.kernels.pieces:
        t.pitch = _pixels_split(plan)
        patch_bytes = ceil_div(plan.laid, plan.together) * depth * plan.pixels * c.packed
        float_bytes = plan.run * c.taps * t.pitch * c.item
        weight_bytes = 0 if plan.pieces else plan.chunk * depth * c.packed
    else:
        t.pitch = plan.pixels | c.kernels.lanes  # an odd number of vectors, or few sets of L1 hold all rows
        patch_bytes = round_up((depth * t.pitch + c.panel) * c.item, 64)
    cdef char *memory = arena(FC_ARENA_BLOCK, offset_bytes + sum_bytes + patch_bytes + float_bytes + weight_bytes
                              + plan.chunk * sizeof(Filter))
    t.rows = <Py_ssize_t *>memory
    t.channel_offsets = t.rows + plan.chunk
    t.sums = memory + offset_bytes
    t.patches = t.sums + sum_bytes
    t.floats = t.patches + patch_bytes
    t.weights = t.floats + float_bytes
    t.scales = <Filter *>(t.weights + weight_bytes)
    return memory == NULL


cdef Py_ssize_t _filters_summed(const Plan *plan, const Task *t) noexcept nogil:
    """Return how many filters have sums that wait for the next block of channels: of a chunk, where that comes at once."""
    return plan.chunk if plan.laid == plan.c.channels else round_up(t.filters, plan.c.kernels.tile_rows)


cdef Panel _place(const Plan *plan, const Task *t, Py_ssize_t pixel, Py_ssize_t chunk, Py_ssize_t count) noexcept nogil:
    """Return the panel that starts at ``pixel`` of a box, two vectors or a last one, for ``count`` filters: in the output,
    where its pixels are neighbours there, else in the task's sums. Those of several blocks of the reduction are
    [panel][filter][pixel of the panel]."""
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    cdef Py_ssize_t row = (t.first_pixel + pixel) // t.block.columns, column = (t.first_pixel + pixel) % t.block.columns
    cdef Panel panel
    panel.vectors = 1 if t.pixels - pixel <= c.kernels.lanes else 2
    panel.width = panel.vectors * c.kernels.lanes
    panel.in_place = (
        pixel + panel.width <= t.pixels and y.stride[4] == 1
        and (column + panel.width <= t.block.columns or y.stride[3] == t.block.columns)
        and (c.kernels.digits or not c.kernels.pieces or count % (c.kernels.tile_rows // 2) == 0)  # or it stores more rows
    )
    panel.step = panel.width
    panel.sums = t.sums
    if panel.in_place:
        panel.step = y.stride[1]
        panel.sums = y.data + (
            t.block.image * y.stride[0] + (t.first + chunk) * y.stride[1] + t.block.depth * y.stride[2] + row * y.stride[3]
            + column
        ) * c.item
    elif plan.together < c.channels:
        panel.sums += (pixel * _filters_summed(plan, t) + (chunk if plan.laid < c.channels else 0) * panel.step) * c.item
    return panel


cdef void _multiply(const Plan *plan, const Task *t, Py_ssize_t channel, Py_ssize_t chunk) noexcept nogil:
    """Add weights x patches of a block of channels to a chunk's sums of all panels; store them after the last block."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t channels = min(plan.together, c.channels - channel), count = min(plan.chunk, t.filters - chunk)
    cdef Py_ssize_t pixel, i, depth = _depth(c, channels)
    cdef bint first = channel == 0, last = channel + channels == c.channels, started
    cdef const char *weights
    cdef const char *patches = _patches_at(plan, t, channel)
    cdef const Filter *filters
    cdef Panel panel
    cdef fc_reduction reduction
    cdef fc_scales scales
    cdef Py_ssize_t number
    if plan.refused[t.block.image]:
        return
    if c.kernels.digits:
        number = _one_scale(plan, t, channel, &scales)
    reduction = fc_reduction_over(t.channel_offsets, channels, c.taps)
    reduction.scales = &scales
    reduction.scale_step = sizeof(Filter) // sizeof(float)
    reduction.a_step = plan.tap_step
    if c.kernels.pieces or c.taps == 1 or plan.channel_step == c.taps * plan.tap_step:  # one run of all channels' taps
        reduction.n_taps = 1
        reduction.depth = depth
        reduction.a_step = 1 if c.kernels.pieces else plan.channel_step if c.taps == 1 else plan.tap_step
    for i in range(reduction.n_taps):
        t.channel_offsets[i] = i * plan.channel_step
    for i in range(count):
        t.rows[i] = i * (depth if c.kernels.pieces else plan.filter_step)
    if c.kernels.pieces:
        weights = _pieces(plan, t, channel, channels, t.first + chunk, count, &filters)
        if c.kernels.digits and not _enough_digits(plan, filters, count, &plan.spread[number]):
            plan.refused[t.block.image] = 1
            return
    else:
        weights = plan.weights + ((t.first + chunk) * plan.filter_step + channel * plan.channel_step) * c.item
    for pixel from 0 <= pixel < t.pixels by c.panel:
        panel = _place(plan, t, pixel, chunk, count)
        started = not first or start_sums(
            c, bias_at(plan.bias, (t.first + chunk) * c.item), count, panel.width, panel.sums, panel.step
        )
        reduction.b_step = panel.width if c.kernels.pieces else t.pitch
        reduction.b_tap = c.taps * reduction.b_step
        reduction.c_step = panel.step
        if c.kernels.digits:
            _multiply_digits(plan, &reduction, filters, &plan.spread[number], weights, t.rows, count, patches, &panel, started)
        else:
            c.kernels.brgemm(&reduction, weights, t.rows, count, patches, panel.vectors, panel.sums, started)
        patches += c.panel * (depth * c.packed if c.kernels.pieces else c.item)
        if last and (plan.relu or not panel.in_place):
            _store(plan, t, &panel, pixel, chunk, count)


cdef void _store(const Plan *plan, const Task *t, const Panel *panel, Py_ssize_t pixel, Py_ssize_t chunk,
                 Py_ssize_t count) noexcept nogil:
    """Store the sums of some filters through the activation, row by row of the image."""
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    cdef fc_epilogue epilogue
    cdef Py_ssize_t end = min(pixel + c.panel, t.pixels), done = pixel, row, column, run
    cdef bint one_run = y.stride[3] == t.block.columns * y.stride[4]
    cdef char *base = y.data + (
        t.block.image * y.stride[0] + (t.first + chunk) * y.stride[1] + t.block.depth * y.stride[2]
    ) * c.item
    epilogue.bias = NULL
    epilogue.relu = plan.relu
    epilogue.pixel_stride = y.stride[1]  # the roles are exchanged: rows of the tile are filters
    epilogue.channel_stride = y.stride[4]
    while done < end:
        row = (t.first_pixel + done) // t.block.columns
        column = (t.first_pixel + done) % t.block.columns
        run = end - done if one_run else min(end - done, t.block.columns - column)
        c.kernels.epilogue(
            &epilogue, panel.sums + (done - pixel) * c.item, panel.step, count, run,
            base + (row * y.stride[3] + column * y.stride[4]) * c.item,
        )
        done += run


# ---------------------------------------------------------------------------------------------------------- pieces

cdef bint _split_numbers(Plan *plan, str precision, int form):
    """Change to the tile that multiplies pieces of numbers, or digits, if the machine has one and the shape fills it."""
    cdef Conv *c = &plan.c
    cdef const fc_ukernels *numbers = c.kernels
    cdef const fc_ukernels *pieces
    cdef Py_ssize_t pixels = c.out[1] * c.out[2], together, blocks, filters, rest
    cdef double padded, patch = SPLIT_PATCH + (COUNT_PATCH if form == DIGITS else 0)
    if form == DIGITS:
        pieces = digit_tile(c, precision, c.channels * c.taps)
    else:
        pieces = piece_tile(c, precision, c.channels * c.taps)
    if pieces == NULL:
        return False
    use_tile(c, pieces)
    together = _channels_together(c)
    blocks = c.channels // together
    filters = c.filters // pieces.tile_rows * pieces.tile_rows
    rest = c.filters - filters
    if rest > 0:  # half a tile takes longer than half the time: each product waits for the one before
        rest = pieces.tile_rows if rest > pieces.tile_rows // 2 else pieces.tile_rows * 13 // 16
    padded = blocks * _depth(c, together) + _depth(c, c.channels - blocks * together)
    padded *= (filters + rest) * <double>round_up(pixels, pieces.lanes)
    padded *= piece_products(pieces) / (<double>c.channels * c.taps * c.filters * pixels)
    if padded / SPLIT_RATE + patch / c.filters + SPLIT_WEIGHT / <double>pixels + STORE_SUM / <double>(c.channels * c.taps) < 1:
        return True
    use_tile(c, numbers)
    return False


cdef void _prepare_weights(Plan *plan, bias, kept) except *:
    """Pack the bias, and split the weights, unless they are used once only; what is ``kept`` is split once for all calls."""
    cdef Conv *c = &plan.c
    cdef Py_ssize_t filters = c.groups * c.filters, blocks = ceil_div(c.channels, plan.together)
    cdef Py_ssize_t piece_bytes = blocks * filters * _depth(c, plan.together) * c.packed
    cdef Py_ssize_t all_bytes = piece_bytes + round_up(blocks * filters * sizeof(Filter), 64)
    cdef bint once = kept is None and c.batch * c.out[0] * plan.boxes == 1
    cdef Memory mine
    cdef tuple form
    if c.kernels.pieces == 0 or once or kept is not None:
        plan.bias = pack_bias(c, bias, arena(FC_ARENA_WEIGHTS, filters * c.item))
        plan.pieces = NULL
    else:
        plan.pieces = arena(FC_ARENA_WEIGHTS, all_bytes + filters * c.item)
        if plan.pieces == NULL:
            raise MemoryError("no memory for packed weights")
        plan.bias = pack_bias(c, bias, plan.pieces + all_bytes)
        plan.scales = <Filter *>(plan.pieces + piece_bytes)
        run_tasks(_split_task, plan, blocks * ceil_div(filters, plan.chunk), c.threads)
    if c.kernels.pieces and kept is not None:
        form = ("im2col", c.item, c.kernels.pieces, c.kernels.digits)
        mine = kept.get(form)
        if mine is None:
            mine = Memory(all_bytes)
            plan.pieces = mine.data
            plan.scales = <Filter *>(plan.pieces + piece_bytes)
            run_tasks(_split_task, plan, blocks * ceil_div(filters, plan.chunk), c.threads)
            mine.refused = plan.refused[c.batch]
            kept[form] = mine
        plan.pieces = mine.data
        plan.scales = <Filter *>(plan.pieces + piece_bytes)
        plan.refused[c.batch] = mine.refused


cdef int _split_task(const void *shared, Py_ssize_t number) noexcept nogil:
    """Split the weights of some filters and one block of channels."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t chunks = ceil_div(c.groups * c.filters, plan.chunk), channel = number // chunks * plan.together
    cdef Py_ssize_t first = number % chunks * plan.chunk, channels = min(plan.together, c.channels - channel)
    _split_filters(
        plan, channel, channels, first, min(plan.chunk, c.groups * c.filters - first),
        _piece_at(plan, channel, channels, first), _scale_at(plan, channel, first),
    )
    return 0


cdef char *_piece_at(const Plan *plan, Py_ssize_t channel, Py_ssize_t channels, Py_ssize_t filter) noexcept nogil:
    """Where the pieces of a filter's block of channels are."""
    cdef const Conv *c = &plan.c
    return plan.pieces + (
        channel // plan.together * c.groups * c.filters * _depth(c, plan.together) + filter * _depth(c, channels)
    ) * c.packed


cdef Filter *_scale_at(const Plan *plan, Py_ssize_t channel, Py_ssize_t filter) noexcept nogil:
    """Where the scale of a filter's block of channels is."""
    return plan.scales + channel // plan.together * plan.c.groups * plan.c.filters + filter


cdef const char *_pieces(const Plan *plan, const Task *t, Py_ssize_t channel, Py_ssize_t channels, Py_ssize_t filter,
                         Py_ssize_t count, const Filter **scales) noexcept nogil:
    """Return the pieces of some filters' weights, which the task splits if no one has, and where their scales are."""
    if plan.pieces != NULL:
        scales[0] = _scale_at(plan, channel, filter)
        return _piece_at(plan, channel, channels, filter)
    _split_filters(plan, channel, channels, filter, count, t.weights, t.scales)
    scales[0] = t.scales
    return t.weights


cdef void _multiply_digits(const Plan *plan, fc_reduction *reduction, const Filter *filters, const fc_spread *image,
                           const char *weights, const Py_ssize_t *rows, Py_ssize_t count, const char *patches,
                           const Panel *panel, bint started) noexcept nogil:
    """Multiply tiles of filters that need as many products: whatever other filters the task has."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t first = 0, end, unit = c.kernels.tile_rows
    cdef int made = _tile_products(plan, filters, count, 0, image)
    while first < count:
        reduction.products, reduction.scale = made, &filters[first].scale
        end = first
        while end < count and made == reduction.products:
            end += unit
            made = _tile_products(plan, filters, count, end, image) if end < count else 0
        end = min(end, count)
        c.kernels.brgemm(
            reduction, weights, rows + first, end - first, patches, panel.vectors, panel.sums + first * panel.step * c.item,
            started,
        )
        first = end


cdef bint _enough_digits(const Plan *plan, const Filter *filters, Py_ssize_t count, const fc_spread *image) noexcept nogil:
    """Whether digits are enough for some filters."""
    cdef Py_ssize_t first
    for first from 0 <= first < count by plan.c.kernels.tile_rows:
        if _tile_products(plan, filters, count, first, image) == 0:
            return False
    return True


cdef int _tile_products(const Plan *plan, const Filter *filters, Py_ssize_t count, Py_ssize_t first,
                        const fc_spread *image) noexcept nogil:
    """Return how many products of digits are enough for a tile of filters; 0 if more were needed."""
    cdef fc_spread worst = filters[first].spread
    cdef Py_ssize_t i
    for i in range(first + 1, min(count, first + plan.c.kernels.tile_rows)):
        worst.peak, worst.density = max(worst.peak, filters[i].spread.peak), min(worst.density, filters[i].spread.density)
    return products(image, &worst, plan.c.channels * plan.c.taps)


cdef Py_ssize_t _one_scale(const Plan *plan, const Task *t, Py_ssize_t channel, fc_scales *scales) noexcept nogil:
    """Return the number of an image's block of channels; all its pixels have the same scale."""
    cdef Py_ssize_t blocks = ceil_div(plan.c.channels, plan.together), i
    cdef Py_ssize_t number = (t.block.image * plan.c.groups + t.group) * blocks + channel // plan.together
    for i in range(2 * plan.c.kernels.lanes):
        scales.scale[i] = plan.scale[number]
    return number


cdef void _split_filters(const Plan *plan, Py_ssize_t channel, Py_ssize_t channels, Py_ssize_t filter, Py_ssize_t count,
                         char *out, Filter *scales) noexcept nogil:
    """Split the weights of some filters and channels, [filter][cell]."""
    cdef const Conv *c = &plan.c
    cdef const char *weights = plan.weights + (filter * plan.filter_step + channel * c.taps) * c.item
    cdef Py_ssize_t n = channels * c.taps, i
    cdef fc_tally tally
    if not c.kernels.digits:
        if c.kernels.split_rows(weights, count, plan.filter_step, n, c.kernels.pieces, out) & FC_HUGE:
            plan.refused[c.batch] = 1
        return
    for i in range(count):
        memset(&tally, 0, sizeof(tally))
        c.kernels.tally(weights + i * plan.filter_step * c.item, 1, plan.filter_step, n, &tally)
        scales[i].spread.peak, scales[i].spread.density = 0, 1
        scales[i].scale = c.kernels.spread(&tally, n, &scales[i].spread)
        if scales[i].scale == 0:
            plan.refused[c.batch] = 1
            return
        c.kernels.digits_rows(
            weights + i * plan.filter_step * c.item, 1, 0, n, scales[i].scale, out + i * _depth(c, channels) * c.packed
        )


cdef Py_ssize_t _pixels_split(const Plan *plan) noexcept nogil:
    """Return the pixels, whole panels, whose patches are split together: reading them runs along the image's rows."""
    cdef const Conv *c = &plan.c
    return min(plan.pixels, max(1, FLOAT_BYTES // (plan.run * c.taps * c.panel * c.item)) * c.panel)


cdef int _split_patches(const Plan *plan, const Task *t, Py_ssize_t channel, Py_ssize_t channels) noexcept nogil:
    """Split what some channels' taps show to a box's pixels, panel by panel; return the numbers' sizes."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t first, count, start = 0, pixels, whole = t.pixels - t.pixels % c.panel
    cdef bint in_place = plan.in_place and t.block.rows == 1
    cdef Block block = t.block
    cdef int sizes = 0
    while start < t.pixels:
        if in_place and start < whole:
            pixels = whole
        else:
            pixels = min(t.pitch, t.pixels - start)
        for first from 0 <= first < channels by plan.run:
            count = min(plan.run, channels - first)
            block.left = t.first_pixel + start
            if in_place and start < whole:
                sizes |= _split_run(
                    plan, t, channel, first_cell(c, &block, t.group * c.channels + channel + first), c.x.stride[1], start, pixels,
                    first, count, channels,
                )
            else:
                _fill_vectors(c, count * c.taps, pixels, t.pitch, t.floats)
                gather(
                    c, &t.block, t.group * c.channels + channel + first, count, t.first_pixel + start, pixels, t.pitch, t.floats
                )
                sizes |= _split_run(plan, t, channel, t.floats, t.pitch, start, pixels, first, count, channels)
        start += pixels
    return sizes


cdef int _split_run(const Plan *plan, const Task *t, Py_ssize_t channel, const char *source, Py_ssize_t step,
                    Py_ssize_t start, Py_ssize_t pixels, Py_ssize_t first, Py_ssize_t count, Py_ssize_t channels) noexcept nogil:
    """Split the rows of ``count`` channels from ``first`` on, of the block of ``channels`` that begins with ``channel``; return
    the numbers' sizes."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t pixel, width, depth = _depth(c, channels)
    cdef char *patches = _patches_at(plan, t, channel)
    cdef char *out
    cdef int sizes = 0, vectors
    cdef fc_scales scales
    if c.kernels.digits:
        _one_scale(plan, t, channel, &scales)
    for pixel from start <= pixel < start + pixels by c.panel:
        vectors = 1 if t.pixels - pixel <= c.kernels.lanes else 2
        width = vectors * c.kernels.lanes
        out = patches + (pixel * depth + first * c.taps * width) * c.packed
        if c.kernels.digits:
            c.kernels.digits_weights(source, step, count * c.taps, 1, vectors, &scales, out)
        else:
            sizes |= c.kernels.split_weights(source, step, count * c.taps, 1, vectors, c.kernels.pieces, out)
        source += width * c.item
    return sizes
