"""Convolution on packed channel blocks; every loop ends in the microkernel ``brgemm``.

    output[p][k] = sum over channel blocks b, taps t, channels i of  part[b][p * stride + t * dilation][i] * weight[b, i, t][k]

    for image, group, block of output pixels, share of the panels:         in parallel
        pack the part of the image that the block sees                     [channel block][kernel depth][high][wide][width]
        for chunk of pixels: for some panels of filters:                   their accumulators stay in L2
            for channel block:                                             the chunk's share of it stays in L1 and L2 ...
                for panel:                                                 ... and so does its share of the panel
                    for tile of pixels: brgemm over taps and channels
                    after the last block, store: bias, activation, the caller's layout

       part of the image             panel                  chunk
      +------------------+         +--------+            +--------+
      | tile of pixels ->|    x    | taps * |     +=     | tile   |
      |  width channels  |         | width  |            |        |
      +------------------+         +--------+            +--------+

A pixel's offset plus a tap's offset is all that padding, stride and dilation come to. With few channels, the taps of a row and
their channels are one contiguous run of the part, and are reduced as one. The gradient of the input is the same
loop on other views (``interleave``), that of the weights is in ``weight_direct``. A depthwise convolution has no panels: its own
microkernel multiplies channel by channel, where channels are neighbours; where the pixels of a row are, it is ``conv_planar``'s.

Where the machine has a tile that multiplies pieces of numbers (``split_numbers``), part and panels are split after packing.
Few channels would not fill its reduction: the patch of each pixel, all taps and channels, is laid out, and convolved with 1x1
filters. An image that holds inf, NaN or huge numbers, or a part with nothing but tiny ones, is computed without splitting.
"""

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels import interleave
from fastconv.kernels.native import conv_planar
from fastconv.kernels.native.blocking cimport (
    CHANNELS, DEPTHWISE_BYTES, DIRECT_BYTES, Block, Blocks, Conv, View, bias_at, ceil_div, cut, extent, locate,
    make_conv, pack_bias, pack_image, pack_panel, packed_weight_size, panel_vectors, part_cells, piece_tile,
    pixel_offsets, round_up, run_tasks, share_out, split_numbers, split_pays, store, tap_offsets,
    turn_weights, use_tile,
)
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_HUGE, FC_PATCH, FC_TINY, Memory, arena, fc_patches, fc_reduction, fc_ukernels,
)

from fastconv.kernels.native.weight_direct import conv_weight_grad

cdef enum:
    REDUCTION = 144             # channels of a block times taps: its share of a panel, 9 KB in float32, stays in L1
    FOLDED_CHANNELS = 8         # with fewer, too short a reduction: a row of taps joins them
    PATCH_CELLS = 64            # of a patch, and ...
    PATCH_FILTERS = 48          # ... that make up for laying it out, about
    PANELS = 32                 # whose accumulators for a chunk share L2 with the rest: 200 KB in float32


def conv_forward(input, weight, bias, output, dims, options):
    """See ``fastconv.kernels``."""
    if dims.depthwise and conv_planar.suits(input, output, dims):
        conv_planar.conv_forward(input, weight, bias, output, dims, options)
    elif dims.depthwise:
        multiplier = weight.shape[0] // dims.groups
        for j in range(multiplier):  # filters j, j + multiplier, ... are one filter for each channel
            part = None if bias is None else bias[j::multiplier]
            _depthwise(input, weight[j::multiplier], part, output[:, j::multiplier], dims, options)
    else:
        for image in _forward(input, weight, bias, output, dims, options, True):
            one = slice(image, image + 1)
            _forward(input[one], weight, bias, output[one], dims, options, False)


def conv_input_grad(grad_output, weight, bias, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    interleave.input_grad(conv_forward, grad_output, turn_weights(weight, dims), bias, grad_input, dims, options)


# --------------------------------------------------------------------------------------------------------- forward

# What all tasks of one call share.
ctypedef struct Plan:
    Conv of                     # the convolution ...
    Conv c                      # ... as the tile sees it: the same, or one of its patches with 1x1 filters
    bint patches
    Blocks blocks
    Py_ssize_t width            # channels in a block
    Py_ssize_t channel_blocks
    Py_ssize_t shares           # tasks that share the panels of one block
    char *weights               # packed; NULL: each task packs what it uses
    const char *bias
    int relu
    unsigned char *refused      # images with numbers that can't be split; the last one stands for the weights


cdef list _forward(cnp.ndarray input, cnp.ndarray weight, bias, cnp.ndarray output, dims, options, bint split):
    """Convolve; return the images that were left out for their numbers can't be split."""
    cdef Plan plan
    cdef Conv *c = &plan.c
    cdef Py_ssize_t tasks, step
    cdef unsigned char[::1] refused
    make_conv(&plan.of, input, weight, output, dims, options)
    plan.of.folded = plan.of.channels <= FOLDED_CHANNELS and plan.of.dilation[2] == 1
    plan.patches = split and _multiply_patches(&plan, options.precision)
    if not plan.patches:
        if split:
            split_numbers(&plan.of, options.precision)
        c[0] = plan.of
    step = max(<Py_ssize_t>CHANNELS, c.kernels.depth_step)
    plan.width = c.depth if plan.patches else min(c.depth, max(step, round_up(REDUCTION // c.taps, step)))
    plan.channel_blocks = ceil_div(c.depth, plan.width)
    cut(c, plan.channel_blocks * plan.width * c.packed, DIRECT_BYTES, c.out[2], &plan.blocks)
    plan.relu = options.activation == "relu"
    refused = bytearray(c.batch + 1)
    plan.refused = &refused[0]
    _pack_weights(&plan, bias, options.packed)
    tasks = c.batch * c.groups * plan.blocks.count
    plan.shares = share_out(tasks, c.panels, c.threads)
    tasks *= plan.shares
    run_tasks(_forward_task, &plan, tasks, c.threads)
    return [image for image in range(c.batch) if refused[image] or refused[c.batch]]


cdef bint _multiply_patches(Plan *plan, str precision):
    """Return whether to multiply pieces of patches; then the tile sees 1x1 filters, with a channel for each cell of a patch."""
    cdef Conv *c = &plan.c
    cdef int axis
    c[0] = plan.of
    c.channels *= c.taps
    c.taps = 1
    c.folded = False
    for axis in range(3):
        c.kernel[axis] = c.stride[axis] = c.dilation[axis] = 1
        c.pad[axis] = 0
    cdef const fc_ukernels *kernels = piece_tile(c, precision)
    if kernels == NULL or not plan.of.folded or c.channels < PATCH_CELLS or c.filters < PATCH_FILTERS:
        return False
    use_tile(c, kernels)
    if c.depth > FC_PATCH or c.out[1] * c.out[2] < kernels.tile_rows or not split_pays(kernels, c.depth / <double>c.channels):
        return False
    use_tile(&plan.of, kernels)
    return True


cdef void _pack_weights(Plan *plan, bias, kept) except *:
    """Pack bias and weights; what is ``kept`` from call to call is packed once, what is used once only where it is used."""
    cdef Conv *c = &plan.c
    cdef Py_ssize_t weight_bytes = c.groups * packed_weight_size(c) * c.packed
    cdef bint once = kept is None and c.batch * c.out[0] * c.out[1] * c.out[2] <= c.chunk
    cdef bint here = kept is None and not once
    cdef char *memory = arena(FC_ARENA_WEIGHTS, (weight_bytes if here else 0) + c.groups * c.filters * c.item + 64)
    cdef Memory mine
    cdef tuple form
    if memory == NULL:
        raise MemoryError("no memory for packed weights")
    plan.bias = pack_bias(c, bias, memory + (weight_bytes if here else 0))
    plan.weights = memory if here else NULL
    if kept is not None:
        form = ("direct", c.item, c.kernels.pieces, plan.width)
        mine = kept.get(form)
        if mine is None:
            mine = Memory(weight_bytes)
            plan.weights = mine.data
            run_tasks(_pack_panel, plan, c.groups * c.panels, c.threads)
            mine.refused = plan.refused[c.batch]
            kept[form] = mine
        plan.weights = mine.data
        plan.refused[c.batch] = mine.refused
    elif here:
        run_tasks(_pack_panel, plan, c.groups * c.panels, c.threads)


cdef int _pack_panel(const void *shared, Py_ssize_t number) noexcept nogil:
    """Pack all channel blocks of a panel."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t group = number // c.panels, panel = number % c.panels, b
    cdef char *floats = arena(FC_ARENA_BLOCK, plan.width * c.taps * c.panel * c.item)
    if floats == NULL:
        return 1
    for b in range(plan.channel_blocks):
        if not _pack_block(plan, group, panel, b, floats, _packed_block(plan, group, panel, b)):
            plan.refused[c.batch] = 1
    return 0


cdef char *_packed_block(const Plan *plan, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t b) noexcept nogil:
    """Where a channel block of a panel is among the packed weights: in the order in which a chunk reads them."""
    cdef const Conv *c = &plan.c
    return plan.weights + (
        group * packed_weight_size(c) + b * plan.width * c.taps * c.panels * c.panel
        + panel * c.panel * min(plan.width, c.depth - b * plan.width) * c.taps
    ) * c.packed


cdef bint _pack_block(const Plan *plan, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t b, char *floats,
                      char *out) noexcept nogil:
    """Pack a channel block of a panel, by way of ``floats`` where it is to be split; return whether it can be."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t channels = min(plan.width, c.channels - b * plan.width)
    cdef int vectors = panel_vectors(c, panel), pieces = c.kernels.pieces
    if pieces == 0:
        pack_panel(c, group, panel, b * plan.width, channels, out)
        return True
    pack_panel(&plan.of, group, panel, b * plan.width, min(channels, plan.of.channels), floats)
    return c.kernels.split_weights(
        floats, c.taps * vectors * c.kernels.lanes, channels, c.taps, vectors, pieces, out
    ) != FC_HUGE


cdef bint _pack_part(const Plan *plan, const Block *block, Py_ssize_t group, Py_ssize_t *offsets, Py_ssize_t *taps,
                     char *floats, char *part) noexcept nogil:
    """Pack a part of the image, by way of ``floats`` where it is to be split; return whether it can be.

    Write where each pixel's first tap and each tap, or row of taps, are in it, too.
    """
    cdef const Conv *c = &plan.c
    cdef int sizes
    if plan.patches:
        sizes = _pack_patches(plan, block, group, offsets, taps, floats, part)
    else:
        sizes = _pack_channels(plan, block, group, floats, part)
    pixel_offsets(c, block, plan.width, offsets)
    tap_offsets(c, block, plan.width, taps)
    if c.folded:
        first_of_rows(c, taps)
    return not sizes & FC_HUGE and sizes != FC_TINY


cdef int _pack_channels(const Plan *plan, const Block *block, Py_ssize_t group, char *floats, char *part) noexcept nogil:
    """Pack what a block sees, channel block by channel block; return the sizes of its numbers, if they are split."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t b, channels, n = plan.width * part_cells(c, block.rows, block.columns)
    cdef int sizes = 0
    for b in range(plan.channel_blocks):
        channels = min(plan.width, c.channels - b * plan.width)
        pack_image(
            c, block, group * c.channels + b * plan.width, channels, plan.width, floats if c.kernels.pieces else part
        )
        if c.kernels.pieces:
            sizes |= c.kernels.split_rows(floats, 1, 0, n, c.kernels.pieces, part)
        part += n * c.packed
    return sizes


cdef Py_ssize_t patch_bytes(const Plan *plan, const Block *block) noexcept nogil:
    """What the part of the image that patches are taken from takes: numbers, pieces, and as much as is read beyond them."""
    return seen_cells(plan, block) * (plan.c.item + plan.c.packed) + 2 * (plan.c.depth + plan.c.kernels.depth_step)


cdef Py_ssize_t seen_cells(const Plan *plan, const Block *block) noexcept nogil:
    """Cells that a block's patches are taken from, in whole vectors."""
    cdef const Conv *of = &plan.of
    return round_up(part_cells(of, block.rows, block.columns) * of.channels, of.kernels.lanes)


cdef int _pack_patches(const Plan *plan, const Block *block, Py_ssize_t group, Py_ssize_t *offsets, Py_ssize_t *taps,
                       char *floats, char *part) noexcept nogil:
    """Split what a block sees and lay out the patch of each pixel; return the sizes of its numbers."""
    cdef const Conv *of = &plan.of
    cdef Block seen = block[0]
    cdef Py_ssize_t n = seen_cells(plan, block)
    cdef char *split = floats + n * of.item
    cdef fc_patches patches
    seen.high, seen.wide = extent(of, 1, block.rows), extent(of, 2, block.columns)
    memset(split - of.kernels.lanes * of.item, 0, <size_t>(of.kernels.lanes * of.item))  # cells that fill up the last vector
    pack_image(of, &seen, group * of.channels, of.channels, of.channels, floats)
    cdef int sizes = of.kernels.split_runs(floats, n, n, of.kernels.pieces, split)
    memset(split + n * of.packed, 0, <size_t>(2 * (plan.c.depth + plan.c.kernels.depth_step)))
    pixel_offsets(of, &seen, of.channels, offsets)
    tap_offsets(of, &seen, of.channels, taps)
    first_of_rows(of, taps)
    patches.rows = taps
    patches.n_rows, patches.run = of.kernel[0] * of.kernel[1], of.kernel[2] * of.channels
    patches.plane, patches.depth = n, plan.c.depth
    of.kernels.lay_patches(&patches, split, offsets, block.rows * block.columns, of.kernels.pieces, part)
    return sizes


cdef void first_of_rows(const Conv *c, Py_ssize_t *taps) noexcept nogil:
    """Keep the offsets of the taps that rows of taps start with."""
    cdef Py_ssize_t row
    for row in range(c.kernel[0] * c.kernel[1]):
        taps[row] = taps[row * c.kernel[2]]


cdef int _forward_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t share = task % plan.shares
    cdef Py_ssize_t group = task // plan.shares % c.groups
    cdef Block block
    locate(c, &plan.blocks, task // (plan.shares * c.groups), &block)

    cdef Py_ssize_t pixels = block.rows * block.columns
    cdef Py_ssize_t cells = part_cells(c, block.rows, block.columns)
    cdef Py_ssize_t offset_bytes = (pixels + plan.of.taps + 8) // 8 * 64
    cdef Py_ssize_t panels = min(c.panels, <Py_ssize_t>PANELS)
    cdef Py_ssize_t sum_bytes = panels * c.chunk * c.panel * c.item
    cdef Py_ssize_t weight_bytes = plan.width * c.taps * c.panel * c.packed
    cdef Py_ssize_t part_bytes = plan.width * cells * c.packed
    cdef Py_ssize_t float_bytes = plan.width * max(cells, c.taps * c.panel) * c.item if c.kernels.pieces else 0
    if plan.patches:
        float_bytes = max(plan.width * c.panel * c.item, patch_bytes(plan, &block))
    cdef char *memory = arena(
        FC_ARENA_BLOCK, offset_bytes + weight_bytes + sum_bytes + plan.channel_blocks * part_bytes + float_bytes
    )
    if memory == NULL:
        return 1
    if plan.refused[block.image] or plan.refused[c.batch]:
        return 0
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory
    cdef Py_ssize_t *taps = offsets + pixels
    cdef char *weights = memory + offset_bytes
    cdef char *accumulators = weights + weight_bytes
    cdef char *part = accumulators + sum_bytes
    cdef char *floats = part + plan.channel_blocks * part_bytes
    cdef Py_ssize_t p, panel, chunk, end = c.panels * (share + 1) // plan.shares
    if not _pack_part(plan, &block, group, offsets, taps, floats, part):
        plan.refused[block.image] = 1
        return 0
    if c.kernels.pieces:
        c.kernels.enter()
    chunk = ceil_div(ceil_div(pixels, ceil_div(pixels, c.chunk)), c.kernels.tile_rows) * c.kernels.tile_rows  # even parts
    for p from 0 <= p < pixels by chunk:
        panel = c.panels * share // plan.shares
        while panel < end:
            _chunk(
                plan, &block, group, panel, min(panel + panels, end), p, min(p + chunk, pixels), offsets, taps, part,
                part_bytes, floats, weights, accumulators,
            )
            panel += panels
    if c.kernels.pieces:
        c.kernels.leave()
    return 0


cdef void _chunk(const Plan *plan, const Block *block, Py_ssize_t group, Py_ssize_t first, Py_ssize_t end,
                 Py_ssize_t first_pixel, Py_ssize_t end_pixel, const Py_ssize_t *offsets, const Py_ssize_t *taps,
                 const char *part, Py_ssize_t part_bytes, char *floats, char *own_weights,
                 char *accumulators) noexcept nogil:
    """Compute and store the filters of some panels for a chunk of pixels."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t panel_bytes = c.chunk * c.panel * c.item, b, panel, filter, width
    cdef const char *weights = own_weights
    for b in range(plan.channel_blocks):
        for panel in range(first, end):
            if plan.weights != NULL:
                weights = _packed_block(plan, group, panel, b)
            elif not _pack_block(plan, group, panel, b, floats, own_weights):
                plan.refused[c.batch] = 1
            _multiply(plan, panel, b, first_pixel, end_pixel, offsets, taps, part + b * part_bytes, weights,
                      accumulators + (panel - first) * panel_bytes)
            if b < plan.channel_blocks - 1:
                continue
            filter = group * c.filters + panel * c.panel
            width = panel_vectors(c, panel) * c.kernels.lanes
            store(
                c, block, first_pixel, end_pixel - first_pixel, accumulators + (panel - first) * panel_bytes, width,
                filter, min(width, c.filters - panel * c.panel), bias_at(plan.bias, filter * c.item), plan.relu,
            )


cdef void _multiply(const Plan *plan, Py_ssize_t panel, Py_ssize_t b, Py_ssize_t first_pixel, Py_ssize_t end_pixel,
                    const Py_ssize_t *offsets, const Py_ssize_t *taps, const char *part, const char *weights,
                    char *accumulators) noexcept nogil:
    """Add one channel block's products with one panel for a chunk of pixels, tile by tile."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, panel)
    cdef Py_ssize_t width = vectors * c.kernels.lanes
    cdef Py_ssize_t channels = min(plan.width, c.depth - b * plan.width)
    cdef fc_reduction reduction
    reduction.apart = 0
    reduction.taps = taps
    reduction.b_taps = NULL
    reduction.a_step = 1
    reduction.c_step = width
    if c.folded:  # neighbours along a row of taps are neighbours in memory, too
        reduction.n_taps = c.kernel[0] * c.kernel[1]
        reduction.depth = c.kernel[2] * channels
        reduction.b_tap = reduction.depth * width
        reduction.b_step = width
    else:
        reduction.n_taps = c.taps
        reduction.depth = channels
        reduction.b_tap = channels * width if c.kernels.pieces else width
        reduction.b_step = width if c.kernels.pieces else c.taps * width
    c.kernels.brgemm(
        &reduction, part, offsets + first_pixel, end_pixel - first_pixel, weights, vectors, accumulators, b > 0
    )


# -------------------------------------------------------------------------------------------------------- depthwise

cdef void _depthwise(cnp.ndarray input, cnp.ndarray weight, bias, cnp.ndarray output, dims, options):
    """One filter for each channel: weight (C, 1, ...), output (N, C, ...)."""
    cdef Plan plan
    cdef Conv *c = &plan.c
    cdef Py_ssize_t b, tasks
    cdef char *weights
    make_conv(c, input, weight, output, dims, options)
    plan.width = CHANNELS
    plan.channel_blocks = (c.groups + CHANNELS - 1) // CHANNELS
    cut(c, CHANNELS * c.item, DEPTHWISE_BYTES, c.out[2], &plan.blocks)
    weights = arena(FC_ARENA_WEIGHTS, plan.channel_blocks * CHANNELS * (c.taps + 1) * c.item)
    if weights == NULL:
        raise MemoryError("no memory for packed weights")
    for b in range(plan.channel_blocks):
        _pack_depthwise(c, b * CHANNELS, weights + b * CHANNELS * c.taps * c.item)
    plan.weights = weights
    plan.bias = pack_bias(c, bias, weights + plan.channel_blocks * CHANNELS * c.taps * c.item)
    plan.relu = options.activation == "relu"
    tasks = c.batch * plan.blocks.count * plan.channel_blocks
    run_tasks(_depthwise_task, &plan, tasks, c.threads)


cdef void _pack_depthwise(const Conv *c, Py_ssize_t first, char *out) noexcept nogil:
    """Pack a block of channels' filters to [tap][channel], missing channels as zeros."""
    cdef const View *w = &c.w
    cdef Py_ssize_t d, h, count = min(<Py_ssize_t>CHANNELS, c.groups - first)
    memset(out, 0, <size_t>(c.taps * CHANNELS * c.item))
    for d in range(c.kernel[0]):
        for h in range(c.kernel[1]):
            c.kernels.transpose(
                w.data + (first * w.stride[0] + d * w.stride[2] + h * w.stride[3]) * c.item,
                w.stride[0], w.stride[4], count, c.kernel[2], out, CHANNELS,
            )
            out += c.kernel[2] * CHANNELS * c.item


cdef int _depthwise_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t first = task % plan.channel_blocks * CHANNELS
    cdef Py_ssize_t channels = min(<Py_ssize_t>CHANNELS, c.groups - first)
    cdef Block block
    locate(c, &plan.blocks, task // plan.channel_blocks, &block)

    cdef Py_ssize_t pixels = block.rows * block.columns
    cdef Py_ssize_t offset_bytes = (pixels + c.taps + 8) // 8 * 64
    cdef Py_ssize_t chunk_bytes = c.chunk * CHANNELS * c.item
    cdef char *memory = arena(
        FC_ARENA_BLOCK, offset_bytes + chunk_bytes + CHANNELS * part_cells(c, block.rows, block.columns) * c.item
    )
    if memory == NULL:
        return 1
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory
    cdef Py_ssize_t *taps = offsets + pixels
    cdef char *accumulators = memory + offset_bytes
    cdef char *part = accumulators + chunk_bytes
    cdef const char *bias = bias_at(plan.bias, first * c.item)
    cdef Py_ssize_t p, count
    pixel_offsets(c, &block, CHANNELS, offsets)
    tap_offsets(c, &block, CHANNELS, taps)
    pack_image(c, &block, first, channels, CHANNELS, part)
    for p from 0 <= p < pixels by c.chunk:
        count = min(c.chunk, pixels - p)
        c.kernels.depthwise(
            taps, c.taps, <int>c.kernel[2], part, offsets + p, count, plan.weights + first * c.taps * c.item, CHANNELS,
            accumulators,
        )
        store(c, &block, p, count, accumulators, CHANNELS, first, channels, bias, plan.relu)
    return 0
