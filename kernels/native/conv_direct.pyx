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
their channels are one contiguous run of the part, and are reduced as one. Where filters are neighbours in the output, the tile
finishes sums and stores them there; an image whose channels are neighbours is read where it is, if no tap sees padding. The gradient of the input is the same
loop on other views (``interleave``; with a stride see below), that of the weights is in ``weight_direct``. A depthwise convolution has no panels: it is in
``depthwise``, where channels are neighbours; where the pixels of a row are, in ``conv_planar``.

Where the machine has a tile that multiplies pieces of numbers (``split_numbers``), part and panels are split after packing. It
reads rows that are evenly spaced faster than others, and so a block's pixels are computed as one long row: what they see is
taken apart by the phases of the stride, in each of which neighbouring pixels see neighbouring cells, and so does the first
pixel of a row after some that only the halo's width comes to, which are computed and dropped.

       a b a b a b        a a a b b b        pixels p, q of an output row, and what follows them in memory
       c d c d c d        a a a b b b
       a b a b a b   ->   c c c d d d             p p p p . q q q q . p p p p         . is dropped
       c d c d c d        c c c d d d

In the gradient of the input, with a stride, each phase of the input's cells has taps of its own, and all see the same part of the
output's gradient. That is packed once, and a chunk has sums for each phase; when a panel is done they are stored together, for
a cell's neighbours are of other phases.

Few channels would not fill its reduction: the patch of each pixel, all taps and channels, is laid out, and convolved with 1x1
filters. Long sums multiply digits of fixed-point numbers instead of pieces (``digits``), packed and split in the same places. Images are tried
in the form of digits, those refused as pieces: one that holds inf, NaN or huge numbers, or a part with nothing but tiny ones, is
computed without splitting.
"""

cimport numpy as cnp
from libc.string cimport memmove, memset

from fastconv.kernels import interleave
from fastconv.kernels.native import conv_planar, depthwise
from fastconv.kernels.native.blocking cimport (
    CHANNELS, DIRECT_BYTES, Block, Blocks, Conv, View, bias_at, ceil_div, choose_threads, cut, divide, extent, locate,
    make_conv, output_run, pack_bias, pack_image, pack_panel, pack_rows, packed_weight_size, panel_vectors, part_cells, piece_tile,
    pixel_offsets, place_pixels, place_taps, round_up, run_tasks, share_out, split_numbers, split_pays, store, tap_offsets,
    turn_weights, use_tile,
)
from fastconv.kernels.native.digits cimport DIGITS, NUMBERS, PIECES, Scales, digit_tile, measure, products
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_HUGE, FC_PATCH, FC_TINY, Memory, arena, fc_epilogue, fc_patches, fc_reduction,
    fc_reduction_over, fc_scales, fc_spread, fc_ukernels,
)
from fastconv.kernels.native.patches cimport first_cell

from fastconv.kernels.native.digits import by_forms
from fastconv.kernels.native.weight_direct import conv_weight_grad

cdef enum:
    REDUCTION = 144             # channels of a block times taps, at most: longer sums are no more exact than plain ones
    SPLIT_REDUCTION = 576       # the same where pieces are multiplied: sums are loaded and stored more seldom
    SPLIT_BYTES = 3 << 20       # of a part then, of which L2 needs a channel block at a time, ...
    SUM_BYTES = 3 << 18         # ... a panel of weights, and so much of sums
    STRIP_APART = 1 << 11       # bytes from channel to channel, from which on 1x1 weights whose filters are neighbours are read ...
    STRIP = 4                   # ... several panels at a time
    STRIP_STEP = 80             # from channel to channel of theirs: an odd number of lines, or they share few sets of L1
    KEPT_BYTES = 1 << 20        # of a part that L2 keeps from panel to panel
    BLOCK_PIXELS = 512          # of a block, if there are as many, ...
    CHUNK_PIXELS = 1024         # ... or where its weights are ...
    RESIDENT_BYTES = 1 << 20    # ... more than stay in L2
    BAND_BYTES = 3 << 13        # numbers that are packed, and split while they are in L1
    FOLDED_CHANNELS = 8         # with fewer, too short a reduction: a row of taps joins them
    PATCH_CELLS = 64            # of a patch, and ...
    PATCH_FILTERS = 48          # ... that make up for laying it out, about, or ...
    SHORT_SUM = 24              # products of a sum that take less time, as numbers, than copying it
    READY_PRODUCTS = 64         # of a number, about, that save the time of splitting it if it could be read where it is
    DIGIT_PRODUCTS = 640        # ... of a row of taps, where it is digits
    STRANDS = 16                # phases of a stride whose sums for a chunk share L2: as many as ``interleave`` merges
    APART = 1 << 15             # weights of a group: to copy so many takes longer than a call for each group
    PANELS = 32                 # whose accumulators for a chunk share L2 with the rest: 200 KB in float32


def conv_forward(input, cnp.ndarray weight, bias, output, dims, options):
    """See ``fastconv.kernels``."""
    if not dims.depthwise:
        by_forms(_forward, input, output, cnp.PyArray_SIZE(weight) // cnp.PyArray_DIM(weight, 0), (weight, bias, dims, options))
    elif conv_planar.suits(input, output, dims):
        conv_planar.conv_forward(input, weight, bias, output, dims, options)
    else:
        depthwise.conv_forward(input, weight, bias, output, dims, options)


def conv_input_grad(grad_output, weight, bias, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    if dims.depthwise and conv_planar.suits_gradient(grad_output, grad_input, dims):
        conv_planar.conv_input_grad(grad_output, weight, bias, grad_input, dims, options)
        return
    if dims.depthwise and depthwise.gradient_in_place(grad_output, weight, grad_input, dims, options):
        depthwise.conv_input_grad(grad_output, weight, bias, grad_input, dims, options)
        return
    if dims.groups > 1 and weight.size >= dims.groups * APART and options.packed is None:
        for group in interleave.each_group(grad_output, weight, bias, grad_input, dims):
            conv_input_grad(*group, options)
        return
    merged = None if dims.depthwise else interleave.merge(dims)
    if merged is None:
        interleave.input_grad(conv_forward, grad_output, turn_weights(weight, dims), bias, grad_input, dims, options)
        return
    swapped = interleave.swap_channels(weight, dims.groups)
    by_forms(_forward, grad_output, grad_input, dims.group_out_channels * dims.taps, (swapped, bias, dims, options, merged))


# --------------------------------------------------------------------------------------------------------- forward

# What all tasks of one call share.
ctypedef struct Plan:
    Conv of                     # the convolution ...
    Conv c                      # ... as the tile sees it: the same, or one of its patches with 1x1 filters
    bint patches
    bint in_place               # its part of the image is where the caller has it
    Blocks blocks
    Py_ssize_t width            # channels in a block
    Py_ssize_t channel_blocks
    Py_ssize_t phases[2]        # of rows and columns, that a part is taken apart by; 0: its pixels are no long row
    Py_ssize_t slots            # phases of the output that have taps, each its own; 0: all of the output has the same
    Py_ssize_t strands[3]       # phases along each axis, with taps or without, ...
    Py_ssize_t step[3]          # ... and cells from one of a phase to the next
    const Py_ssize_t *phase     # of each phase: its first tap, and how many, (d, h, w)
    const Py_ssize_t *seen      # of each tap: the cell that it sees, (d, h, w), and its number in a filter; ...
    Py_ssize_t seen_taps        # ... of so many: phases that a small image doesn't have leave theirs out
    Py_ssize_t shares           # tasks that share the panels of one block
    char *weights               # packed; NULL: each task packs what it uses ...
    bint strips                 # ... and reads several panels' at a time
    const char *bias
    int relu
    unsigned char *refused      # images with numbers that can't be split; the last one stands for the weights
    const float *scale          # of digits, by image, group and channel block
    const fc_spread *spread     # the same
    Py_ssize_t summed           # products of a sum of them, on average

# What the tile sees of one block.
ctypedef struct Grid:
    Py_ssize_t high, wide       # rows and columns of each phase of its part of the image
    Py_ssize_t cells            # of all phases, for one channel block
    Py_ssize_t beyond           # cells of padding that no row follows
    Py_ssize_t pitch            # pixels from one row to the next ...
    Py_ssize_t pixels           # ... and in all
    Py_ssize_t run              # of them, in one of which a chunk is: whole rows, or one
    Py_ssize_t chunk            # of them, whose sums for ...
    Py_ssize_t panels           # ... so many panels share L2 with the rest
    Py_ssize_t sum_bytes        # of one panel, or of a strand of it
    Py_ssize_t zero_bytes       # the same for strands without taps, if there are any

# The memory of one task.
ctypedef struct Workspace:
    Py_ssize_t *offsets         # of each pixel's first tap in the part
    Py_ssize_t *taps
    Py_ssize_t *weight_taps     # where the weights of each tap are in a panel, if there are strands
    char *zeros                 # sums of a strand without taps
    char *weights               # of a panel and a channel block, where they are used once
    char *sums
    const char *part
    char *floats                # numbers that are yet to be split


def _forward(cnp.ndarray input, cnp.ndarray output, int form, cnp.ndarray weight, bias, dims, options, merged=None):
    """Convolve; return the images that were left out for their numbers don't have that form."""
    cdef Plan plan
    cdef Scales scales
    cdef Conv *c = &plan.c
    cdef int axis
    cdef Py_ssize_t tasks, step, most, taps, part_bytes, packing
    cdef bytearray refused
    make_conv(&plan.of, input, weight, output, dims, options)
    if merged is None:
        _skip_unseen(&plan.of)
    _set_strands(&plan, merged, options.threads)
    plan.of.folded = plan.slots == 0 and plan.of.channels <= FOLDED_CHANNELS and plan.of.dilation[2] == 1
    plan.patches = form != NUMBERS and _multiply_patches(&plan, options.precision, form)
    if not plan.patches:
        if form == DIGITS and not _use_digits(&plan, options.precision):
            return list(range(plan.of.batch))
        if form == PIECES and not _sums_are_short(&plan):
            split_numbers(&plan.of, options.precision)
        c[0] = plan.of
    for axis in range(3 if plan.slots else 0):
        c.kernel[axis], c.pad[axis] = merged.kernel[axis], merged.pad[axis]
    step = max(<Py_ssize_t>CHANNELS, c.kernels.depth_step)
    taps = ceil_div(c.taps, max(<Py_ssize_t>1, plan.slots))
    if plan.patches:
        plan.width = c.depth
    elif c.kernels.pieces:
        plan.width = round_up(ceil_div(c.depth, max(1, c.depth * taps // SPLIT_REDUCTION)), step)
    else:
        most = max(step, REDUCTION // taps // step * step)
        plan.width = min(c.depth, round_up(ceil_div(c.depth, ceil_div(c.depth, most)), step))
    plan.channel_blocks = ceil_div(c.depth, plan.width)
    part_bytes = SPLIT_BYTES if c.kernels.pieces and not plan.patches else DIRECT_BYTES
    cut(c, plan.channel_blocks * plan.width * c.packed, part_bytes, c.out[2], &plan.blocks)
    _cut_large_blocks(&plan)
    _choose_phases(&plan)
    plan.in_place = _lies_ready(&plan, c)
    plan.relu = options.activation == "relu"
    refused = bytearray(c.batch + 1)
    plan.refused = <unsigned char *><char *>refused
    if c.kernels.digits:
        scales = measure(
            &plan.of, &plan.of.x, plan.of.channels, min(plan.width, plan.of.channels), plan.summed, plan.refused
        )
        plan.scale, plan.spread = scales.scale, scales.spread
        if 0 not in refused[:c.batch]:
            return list(range(c.batch))
    _pack_weights(&plan, bias, options.packed)
    tasks = c.batch * c.groups * plan.blocks.count
    packing = 1
    if c.kernels.pieces:
        packing = max(1, (20 if c.kernels.digits else 10) * c.stride[1] * c.stride[2] // c.taps)
    plan.shares = share_out(tasks, c.panels, packing, c.threads)
    tasks *= plan.shares
    run_tasks(_forward_task, &plan, tasks, c.threads)
    return [image for image in range(c.batch) if refused[image] or refused[c.batch]]


cdef bint _lies_ready(const Plan *plan, const Conv *c) noexcept nogil:
    """Whether the image is, where the caller has it, as good as packed: no tap sees padding, and a pixel's channels are neighbours."""
    cdef int axis
    if c.kernels.pieces or plan.slots or c.x.stride[1] != 1 or (c.folded and c.x.stride[4] != c.channels):
        return False
    for axis in range(3):
        if c.pad[axis] > 0 or extent(c, axis, c.out[axis]) > c.x.size[2 + axis]:
            return False
    return True


cdef void _skip_unseen(Conv *c) noexcept nogil:
    """Take cells that no tap sees out of the image, along axes where filters have one tap: a stride skips them."""
    cdef int axis
    for axis in range(3 if c.x.stride[1] == 1 else 2):  # neighbours in memory stay neighbours
        if c.kernel[axis] == 1 and c.pad[axis] == 0 and (c.out[axis] - 1) * c.stride[axis] < c.x.size[2 + axis]:
            c.x.stride[2 + axis] *= c.stride[axis]
            c.x.size[2 + axis] = c.out[axis]
            c.stride[axis] = 1


cdef bint _sums_are_short(const Plan *plan) noexcept nogil:
    """Whether to multiply numbers, that are read or whose sums are stored where they belong: splitting those, and copying these,
    takes longer than products of pieces save."""
    cdef const Conv *of = &plan.of
    cdef Py_ssize_t beyond = of.channels * of.taps - SHORT_SUM
    if _lies_ready(plan, of) and of.filters * beyond <= READY_PRODUCTS * of.channels * of.stride[1] * of.stride[2]:
        return True
    return beyond <= 0 and of.y.stride[1] == 1 and of.filters % of.kernels.lanes == 0


cdef bint _use_digits(Plan *plan, str precision):
    """Change to the tile that multiplies digits; return whether there is one for such a layer."""
    cdef Conv *c = &plan.of
    cdef const fc_ukernels *kernels
    if _sums_are_short(plan):
        return False
    plan.summed = c.channels * c.taps
    if plan.slots:
        plan.summed = plan.summed // (plan.strands[0] * plan.strands[1] * plan.strands[2])
    kernels = digit_tile(c, precision, plan.summed)
    if kernels != NULL:
        _use_tile(c, kernels)
    return kernels != NULL


cdef void _use_tile(Conv *c, const fc_ukernels *kernels) noexcept nogil:
    """Change to a tile; panels of one that multiplies digits are one vector, so that L1 has them while they are turned, measured and split."""
    use_tile(c, kernels)
    if kernels.digits:
        c.panel = kernels.lanes
        c.panels = ceil_div(c.filters, c.panel)


cdef void _set_strands(Plan *plan, merged, threads):
    """Let a gradient of the input be a convolution with stride 1, whose output has a strand for each phase of the stride."""
    cdef Conv *of = &plan.of
    cdef Py_ssize_t[:, ::1] phases, seen
    cdef Py_ssize_t s
    cdef int axis
    plan.slots = 0
    if merged is None:
        return
    phases, seen = merged.phases, merged.taps  # which ``merged`` keeps
    plan.phase, plan.seen, plan.seen_taps = &phases[0, 0], &seen[0, 0], seen.shape[0]
    for s in range(phases.shape[0]):
        plan.slots += _strand_taps(plan, s) > 0
    for axis in range(3):
        plan.step[axis] = of.stride[axis]
        plan.strands[axis] = merged.along[axis]
        of.out[axis] = merged.positions[axis]
        of.stride[axis] = of.dilation[axis] = 1
    choose_threads(of, threads)


cdef Py_ssize_t _strand_taps(const Plan *plan, Py_ssize_t s) noexcept nogil:
    """Taps of a strand."""
    return plan.phase[4 * s + 1] * plan.phase[4 * s + 2] * plan.phase[4 * s + 3]


cdef void _cut_large_blocks(Plan *plan) noexcept nogil:
    """Cut blocks into several, for threads to share: not where much of them would be rows that neighbours pack, too.

    Whatever the number of threads: whether numbers are too small to be split is asked of a block. Weights that don't fit L2
    are read anew for each.
    """
    cdef const Conv *c = &plan.c
    cdef Blocks *blocks = &plan.blocks
    cdef Py_ssize_t bytes = packed_weight_size(c) * c.packed, halo = (c.kernel[1] - 1) * c.dilation[1] // c.stride[1]
    cdef Py_ssize_t pixels = BLOCK_PIXELS if bytes <= RESIDENT_BYTES else CHUNK_PIXELS
    cdef Py_ssize_t rows = max(ceil_div(pixels, blocks.columns), 4 * halo), down = ceil_div(c.out[1], rows)
    if blocks.rows > rows:
        divide(c, ceil_div(c.out[1], round_up(down, 2)), blocks.columns, blocks)


cdef void _choose_phases(Plan *plan) noexcept nogil:
    """Let pixels be one long row, unless there is a single row, or most of it would be dropped."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t rows = plan.blocks.rows, columns = plan.blocks.columns, unit = c.kernels.tile_rows
    cdef Py_ssize_t pitch = ceil_div(_row_cells(plan, columns), c.stride[2])
    plan.phases[0] = plan.phases[1] = 0
    if not c.kernels.pieces or plan.patches or rows == 1:
        return
    if 2 * ceil_div(rows * pitch, unit) > 3 * ceil_div(rows * columns, unit):
        return
    plan.phases[0], plan.phases[1] = c.stride[1], c.stride[2]


cdef Py_ssize_t _row_cells(const Plan *plan, Py_ssize_t columns) noexcept nogil:
    """Cells from a row of a part to the next: what its pixels see, without the padding that the next row begins with."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t seen = extent(c, 2, columns), right = seen - c.pad[2] - c.x.size[4]
    if columns < c.out[2] or c.stride[1] * c.stride[2] > 1 or right <= 0 or right > c.pad[2] or seen - right < columns:
        return seen
    return seen - right


cdef bint _multiply_patches(Plan *plan, str precision, int form):
    """Return whether to multiply pieces, or digits, of patches; then the tile sees 1x1 filters, with a channel for each cell of a
    patch."""
    cdef Conv *c = &plan.c
    cdef int axis
    if not plan.of.folded or plan.of.channels * plan.of.taps < PATCH_CELLS:
        return False
    c[0] = plan.of
    c.channels *= c.taps
    c.taps = 1
    c.folded = False
    for axis in range(3):
        c.kernel[axis] = c.stride[axis] = c.dilation[axis] = 1
        c.pad[axis] = 0
    cdef const fc_ukernels *kernels
    plan.summed = c.channels
    kernels = digit_tile(c, precision, plan.summed) if form == DIGITS else piece_tile(c, precision)
    if kernels == NULL:
        return False
    if form == DIGITS and c.filters * plan.of.kernel[2] * plan.of.channels < DIGIT_PRODUCTS:
        return False
    if form == PIECES and c.filters < PATCH_FILTERS:
        return False
    _use_tile(c, kernels)
    if c.depth > FC_PATCH or c.out[1] * c.out[2] < kernels.tile_rows or not split_pays(kernels, c.depth / <double>c.channels):
        return False
    _use_tile(&plan.of, kernels)
    return True


cdef void _pack_weights(Plan *plan, bias, kept) except *:
    """Pack bias and weights; what is ``kept`` from call to call is packed once, what is used once only where it is used."""
    cdef Conv *c = &plan.c
    cdef Py_ssize_t weight_bytes = c.groups * (
        packed_weight_size(c) * c.packed + plan.channel_blocks * c.panels * _scale_bytes(plan)
    )
    cdef bint once = kept is None and c.batch * plan.blocks.count == 1 and c.out[1] * c.out[2] <= c.chunk
    cdef bint here = kept is None and not once
    cdef char *memory = arena(FC_ARENA_WEIGHTS, (weight_bytes if here else 0) + c.groups * c.filters * c.item + 64)
    cdef Memory mine
    cdef tuple form
    if memory == NULL:
        raise MemoryError("no memory for packed weights")
    plan.bias = pack_bias(c, bias, memory + (weight_bytes if here else 0))
    plan.weights = memory if here else NULL
    plan.strips = once and _filters_are_neighbours(plan) and plan.of.w.stride[1] * c.item >= STRIP_APART
    if kept is not None:
        form = ("direct", c.item, c.kernels.pieces, c.kernels.digits, plan.width)
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


cdef Py_ssize_t _scale_bytes(const Plan *plan) noexcept nogil:
    """What the scales of a panel's channel block take."""
    return sizeof(fc_scales) if plan.c.kernels.digits else 0


cdef char *_packed_block(const Plan *plan, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t b) noexcept nogil:
    """Where a channel block of a panel is among the packed weights: in the order in which a chunk reads them."""
    cdef const Conv *c = &plan.c
    return plan.weights + (
        group * packed_weight_size(c) + b * plan.width * c.taps * c.panels * c.panel
        + panel * c.panel * min(plan.width, c.depth - b * plan.width) * c.taps
    ) * c.packed + ((group * plan.channel_blocks + b) * c.panels + panel) * _scale_bytes(plan)


cdef bint _pack_block(const Plan *plan, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t b, char *floats,
                      char *out) noexcept nogil:
    """Pack a channel block of a panel, by way of ``floats`` where it is to be split; return whether it can be."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t channels = min(plan.width, c.channels - b * plan.width)
    if c.kernels.pieces == 0:
        pack_panel(&plan.of, group, panel, b * plan.width, channels, out)
        return True
    if _lies_packed(plan, panel):
        floats = plan.of.w.data + (
            group * c.filters + panel * c.panel + b * plan.width * plan.of.w.stride[1]
        ) * c.item
        return _split_block(plan, panel, b, floats, plan.of.w.stride[1], out)
    pack_panel(&plan.of, group, panel, b * plan.width, min(channels, plan.of.channels), floats)
    return _split_block(plan, panel, b, floats, c.taps * panel_vectors(c, panel) * c.kernels.lanes, out)


cdef bint _split_block(const Plan *plan, Py_ssize_t panel, Py_ssize_t b, const char *floats, Py_ssize_t step,
                       char *out) noexcept nogil:
    """Split a channel block of a panel, whose channels are ``step`` apart; return whether it can be."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t channels = min(plan.width, c.channels - b * plan.width)
    cdef int vectors = panel_vectors(c, panel), usable
    cdef fc_scales *scales
    if not c.kernels.digits:
        return c.kernels.split_weights(floats, step, channels, c.taps, vectors, c.kernels.pieces, out) != FC_HUGE
    scales = _scales_of(plan, panel, b, out)
    usable = c.kernels.spread_weights(floats, channels * c.taps, step // c.taps, vectors, scales)
    c.kernels.digits_weights(floats, step, channels, c.taps, vectors, scales, out)
    return usable


cdef bint _pack_from_strip(const Plan *plan, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t b, Py_ssize_t number, char *strip,
                           char *out) noexcept nogil:
    """Pack a channel block of panel ``number`` of a strip, which the first of them reads for all: what they have of a channel is
    neighbours."""
    cdef const Conv *c = &plan.c
    cdef const View *w = &plan.of.w
    cdef Py_ssize_t channels = min(plan.width, c.channels - b * plan.width), first = panel * c.panel
    cdef Py_ssize_t filters = min(STRIP * c.panel, c.filters - first)
    if number == 0:
        if filters % c.panel:
            memset(strip, 0, <size_t>(channels * STRIP_STEP * c.item))
        c.kernels.transpose(
            w.data + (group * c.filters + first + b * plan.width * w.stride[1]) * c.item, 1, w.stride[1], filters, channels,
            strip, STRIP_STEP,
        )
    return _split_block(plan, panel, b, strip + number * c.panel * c.item, STRIP_STEP, out)


cdef bint _lies_packed(const Plan *plan, Py_ssize_t panel) noexcept nogil:
    """Whether a panel of 1x1 filters, which are neighbours, is where the caller has it as it would be packed."""
    return _filters_are_neighbours(plan) and (panel + 1) * plan.of.panel <= plan.of.filters


cdef bint _filters_are_neighbours(const Plan *plan) noexcept nogil:
    """Whether digits are made of 1x1 filters that are neighbours in memory."""
    return plan.c.kernels.digits and plan.of.taps == 1 and plan.of.w.stride[0] == 1


cdef fc_scales *_scales_of(const Plan *plan, Py_ssize_t panel, Py_ssize_t b, const char *weights) noexcept nogil:
    """Where the scales of a panel's channel block are: behind its packed weights."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t channels = min(plan.width, c.depth - b * plan.width)
    return <fc_scales *>(weights + channels * c.taps * panel_vectors(c, panel) * c.kernels.lanes * c.packed)


cdef bint _pack_part(const Plan *plan, const Block *block, Py_ssize_t group, const Grid *grid, Py_ssize_t *offsets,
                     Py_ssize_t *taps, char *floats, char *part) noexcept nogil:
    """Pack a part of the image, by way of ``floats`` where it is to be split; return whether it can be.

    Write where each pixel's first tap and each tap, or row of taps, are in it, too.
    """
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t t
    cdef int sizes
    if plan.in_place:
        place_pixels(c, block, c.x.stride[3], c.x.stride[4], offsets)
        place_taps(c, c.dilation[0] * c.x.stride[2], c.x.stride[3], c.x.stride[4], taps)
        if c.folded:
            _first_of_rows(c, taps)
        return True
    if plan.patches:
        sizes = _pack_patches(plan, block, group, offsets, taps, floats, part)
    else:
        sizes = _pack_channels(plan, block, group, grid, floats, part)
    if plan.phases[0]:
        for t in range(grid.pixels):
            offsets[t] = t * plan.width
    else:
        pixel_offsets(c, block, plan.width, offsets)
    if plan.slots:
        _strand_offsets(plan, grid, taps)
    elif plan.phases[0]:
        _grid_offsets(plan, grid, taps)
    else:
        tap_offsets(c, block, plan.width, taps)
    if c.folded:
        _first_of_rows(c, taps)
    return not sizes & FC_HUGE and sizes != FC_TINY


cdef int _pack_channels(const Plan *plan, const Block *block, Py_ssize_t group, const Grid *grid, char *floats,
                        char *part) noexcept nogil:
    """Pack what a block sees, channel block by channel block; return the sizes of its numbers, if they are split."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t b, channels, first
    cdef int sizes = 0
    for b in range(plan.channel_blocks):
        channels = min(plan.width, c.channels - b * plan.width)
        first = group * c.channels + b * plan.width
        if c.kernels.pieces:
            sizes |= _split_part(plan, block, grid, group, b, floats, part)
        else:
            pack_image(c, block, first, channels, plan.width, part)
        part += grid.cells * plan.width * c.packed
    return sizes


cdef int _split_part(const Plan *plan, const Block *block, const Grid *grid, Py_ssize_t group, Py_ssize_t b,
                     char *floats, char *part) noexcept nogil:
    """Pack a few rows of one channel block at a time, and split them; return the sizes of the numbers."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t first = group * c.channels + b * plan.width, channels = min(plan.width, c.channels - b * plan.width)
    cdef float scale = 0
    if c.kernels.digits:
        scale = plan.scale[(block.image * c.groups + group) * plan.channel_blocks + b]
    cdef Py_ssize_t down = max(<Py_ssize_t>1, plan.phases[0]), across = max(<Py_ssize_t>1, plan.phases[1])
    cdef Py_ssize_t row_bytes = block.wide * plan.width * c.item, cell_bytes = plan.width * c.packed
    cdef Py_ssize_t band = _band_rows(plan, block), d, h, y, x, rows, cell
    cdef int sizes = 0
    for d in range(c.kernel[0]):
        for h from 0 <= h < block.high by band:
            rows = min(band, block.high - h)
            pack_rows(c, block, d, h, rows, first, channels, plan.width, floats)
            if down == 1 and across == 1:
                cell = (d * grid.high + h) * grid.wide
                sizes |= _split_rows(c, floats, 1, 0, rows * block.wide * plan.width, scale, part + cell * cell_bytes)
                continue
            for y in range(h, h + rows):
                for x in range(across):
                    cell = (((d * down + y % down) * across + x) * grid.high + y // down) * grid.wide
                    sizes |= _split_rows(
                        c, floats + (y - h) * row_bytes + x * plan.width * c.item, (block.wide - x + across - 1) // across,
                        across * plan.width, plan.width, scale, part + cell * cell_bytes,
                    )
    return sizes


cdef int _split_rows(const Conv *c, const char *floats, Py_ssize_t rows, Py_ssize_t step, Py_ssize_t n, float scale,
                     char *out) noexcept nogil:
    """Split rows of n numbers into pieces, or digits; return the sizes of the numbers."""
    if not c.kernels.digits:
        return c.kernels.split_rows(floats, rows, step, n, c.kernels.pieces, out)
    c.kernels.digits_rows(floats, rows, step, n, scale, out)
    return 0


cdef Py_ssize_t _band_rows(const Plan *plan, const Block *block) noexcept nogil:
    """Rows of a part that are packed, and then split, together."""
    return max(<Py_ssize_t>1, min(block.high, BAND_BYTES // (block.wide * plan.width * plan.c.item)))


cdef void _grid_offsets(const Plan *plan, const Grid *grid, Py_ssize_t *taps) noexcept nogil:
    """Write where the taps are in a part that is taken apart."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t d, h, w, y, x, plane, t = 0
    for d in range(c.kernel[0]):
        for h in range(c.kernel[1]):
            for w in range(c.kernel[2]):
                y, x = h * c.dilation[1], w * c.dilation[2]
                plane = (d * plan.phases[0] + y % plan.phases[0]) * plan.phases[1] + x % plan.phases[1]
                taps[t] = ((plane * grid.high + y // plan.phases[0]) * grid.wide + x // plan.phases[1]) * plan.width
                t += 1


cdef void _strand_offsets(const Plan *plan, const Grid *grid, Py_ssize_t *taps) noexcept nogil:
    """Write where the cell is that each tap of each strand sees."""
    cdef const Py_ssize_t *cell = plan.seen
    cdef Py_ssize_t t
    for t in range(plan.seen_taps):
        taps[t] = ((cell[0] * grid.high + cell[1]) * grid.wide + cell[2]) * plan.width
        cell += 4


cdef Py_ssize_t _patch_bytes(const Plan *plan, const Block *block) noexcept nogil:
    """What the part of the image that patches are taken from takes: numbers, pieces, and as much as is read beyond them."""
    return _seen_cells(plan, block) * (plan.c.item + plan.c.packed) + 2 * (plan.c.depth + plan.c.kernels.depth_step)


cdef Py_ssize_t _seen_cells(const Plan *plan, const Block *block) noexcept nogil:
    """Cells that a block's patches are taken from, in whole steps of the tile."""
    cdef const Conv *of = &plan.of
    return round_up(part_cells(of, block.rows, block.columns) * of.channels, of.kernels.depth_step)


cdef int _pack_patches(const Plan *plan, const Block *block, Py_ssize_t group, Py_ssize_t *offsets, Py_ssize_t *taps,
                       char *floats, char *part) noexcept nogil:
    """Split what a block sees and lay out the patch of each pixel; return the sizes of its numbers."""
    cdef const Conv *of = &plan.of
    cdef Block seen = block[0]
    cdef Py_ssize_t n = _seen_cells(plan, block), step_bytes = of.kernels.depth_step * of.item
    cdef int sizes = 0
    cdef char *split = floats + n * of.item
    cdef fc_patches patches
    seen.high, seen.wide = extent(of, 1, block.rows), extent(of, 2, block.columns)
    memset(split - step_bytes, 0, <size_t>step_bytes)  # cells that fill up the last step
    pack_image(of, &seen, group * of.channels, of.channels, of.channels, floats)
    if of.kernels.digits:
        of.kernels.digits_run(floats, n, plan.scale[block.image * of.groups + group], split, n)
    else:
        sizes = of.kernels.split_runs(floats, n, n, of.kernels.pieces, split)
    memset(split + n * of.packed, 0, <size_t>(2 * (plan.c.depth + plan.c.kernels.depth_step)))
    pixel_offsets(of, &seen, of.channels, offsets)
    tap_offsets(of, &seen, of.channels, taps)
    _first_of_rows(of, taps)
    patches.rows = taps
    patches.n_rows, patches.run = of.kernel[0] * of.kernel[1], of.kernel[2] * of.channels
    patches.plane, patches.depth = n, plan.c.depth
    of.kernels.lay_patches(&patches, split, offsets, block.rows * block.columns, of.kernels.pieces, part)
    return sizes


cdef void _first_of_rows(const Conv *c, Py_ssize_t *taps) noexcept nogil:
    """Keep the offsets of the taps that rows of taps start with."""
    cdef Py_ssize_t row
    for row in range(c.kernel[0] * c.kernel[1]):
        taps[row] = taps[row * c.kernel[2]]


cdef void _lay_grid(const Plan *plan, Block *block, Grid *grid) noexcept nogil:
    """Size the phases of what a block sees, its long row of pixels, and the chunks of it."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t down = max(<Py_ssize_t>1, plan.phases[0]), across = max(<Py_ssize_t>1, plan.phases[1])
    cdef Py_ssize_t slots = max(<Py_ssize_t>1, plan.slots), chunk = c.chunk
    if plan.slots and c.kernels.pieces:
        chunk = min(chunk, max(<Py_ssize_t>c.kernels.tile_rows, SUM_BYTES // (slots * c.panel * c.item)))
    grid.beyond = block.wide
    if plan.phases[0]:
        block.wide = _row_cells(plan, block.columns)
    grid.beyond -= block.wide
    grid.high, grid.wide = ceil_div(block.high, down), ceil_div(block.wide, across)
    grid.cells = c.kernel[0] * down * across * grid.high * grid.wide
    grid.pitch = block.columns
    grid.pixels = block.rows * block.columns
    if plan.phases[0]:
        grid.pitch = grid.wide
        grid.pixels = (block.rows - 1) * grid.wide + block.columns
    _choose_chunk(plan, block, chunk, grid)
    grid.sum_bytes = round_up(grid.chunk, c.kernels.tile_rows) * c.panel * c.item
    grid.panels = min(c.panels, <Py_ssize_t>PANELS)
    if c.kernels.pieces:
        grid.panels = min(grid.panels, max(<Py_ssize_t>1, SUM_BYTES // (slots * grid.sum_bytes)))
        if _reads_along_filters(plan) and plan.channel_blocks * plan.width * grid.cells * c.packed <= KEPT_BYTES:
            grid.panels = 1
    grid.zero_bytes = grid.sum_bytes if plan.slots and plan.slots < plan.strands[0] * plan.strands[1] * plan.strands[2] else 0


cdef void _choose_chunk(const Plan *plan, const Block *block, Py_ssize_t most, Grid *grid) noexcept nogil:
    """Cut a block's pixels into even chunks, of ``most`` about: where numbers are multiplied whole rows or parts of one, for tiles
    whose pixels are evenly spaced are faster."""
    cdef const fc_ukernels *kernels = plan.c.kernels
    cdef Py_ssize_t unit = kernels.tile_rows if kernels.pieces else kernels.even_rows
    cdef Py_ssize_t rows = max(<Py_ssize_t>1, most // block.columns)
    grid.run = grid.pixels
    if kernels.pieces and not plan.phases[0]:
        rows = 0
    elif not kernels.pieces and block.columns > most:
        rows = 0
        grid.run = block.columns
    if rows:
        grid.chunk = ceil_div(block.rows, ceil_div(block.rows, rows)) * grid.pitch
    else:
        grid.chunk = round_up(ceil_div(grid.run, ceil_div(grid.run, most)), unit)


cdef bint _reads_along_filters(const Plan *plan) noexcept nogil:
    """Whether weights, which are read once, had better be read panel by panel: a filter's channel blocks are neighbours in memory."""
    return plan.weights == NULL and plan.of.w.stride[0] > plan.of.w.stride[1]


cdef int _forward_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t share = task % plan.shares
    cdef Py_ssize_t group = task // plan.shares % c.groups
    cdef Block block
    cdef Grid grid
    locate(c, &plan.blocks, task // (plan.shares * c.groups), &block)
    _lay_grid(plan, &block, &grid)

    cdef Py_ssize_t offset_bytes = (grid.pixels + 2 * plan.of.taps + 8) // 8 * 64
    cdef Py_ssize_t all_sums = grid.panels * max(<Py_ssize_t>1, plan.slots) * grid.sum_bytes
    cdef Py_ssize_t weight_bytes = plan.width * c.taps * c.panel * c.packed + _scale_bytes(plan)
    cdef Py_ssize_t part_bytes = 0 if plan.in_place else plan.channel_blocks * plan.width * grid.cells * c.packed
    cdef Py_ssize_t beyond_bytes = grid.beyond * plan.width * c.packed, float_bytes = 0
    if plan.patches:
        float_bytes = max(plan.width * c.panel * c.item, _patch_bytes(plan, &block))
    elif c.kernels.pieces:
        float_bytes = plan.width * max(STRIP_STEP if plan.strips else c.taps * c.panel, _band_rows(plan, &block) * block.wide) * c.item
    cdef char *memory = arena(
        FC_ARENA_BLOCK, offset_bytes + weight_bytes + all_sums + grid.zero_bytes + part_bytes + beyond_bytes + float_bytes
    )
    if memory == NULL:
        return 1
    if plan.refused[block.image] or plan.refused[c.batch]:
        return 0
    cdef Workspace space
    space.offsets = <Py_ssize_t *>memory
    space.taps = space.offsets + grid.pixels
    space.weight_taps = space.taps + plan.of.taps
    space.weights = memory + offset_bytes
    space.sums = space.weights + weight_bytes
    space.zeros = space.sums + all_sums
    cdef char *part = space.zeros + grid.zero_bytes
    space.part = first_cell(c, &block, group * c.channels) if plan.in_place else part
    space.floats = part + part_bytes + beyond_bytes
    memset(part + part_bytes, 0, <size_t>beyond_bytes)
    cdef Py_ssize_t p = 0, p_end, panel, end = c.panels * (share + 1) // plan.shares
    if not _pack_part(plan, &block, group, &grid, space.offsets, space.taps, space.floats, part):
        plan.refused[block.image] = 1
        return 0
    memset(space.zeros, 0, <size_t>grid.zero_bytes)
    if c.kernels.pieces:
        c.kernels.enter()
    while p < grid.pixels:
        p_end = min(p + grid.chunk, (p // grid.run + 1) * grid.run)
        panel = c.panels * share // plan.shares
        while panel < end and not plan.refused[block.image]:
            _chunk(plan, &block, group, &grid, &space, panel, min(panel + grid.panels, end), p, p_end)
            panel += grid.panels
        p = p_end
    if c.kernels.pieces:
        c.kernels.leave()
    return 0


cdef void _chunk(const Plan *plan, const Block *block, Py_ssize_t group, const Grid *grid, const Workspace *space,
                 Py_ssize_t first, Py_ssize_t end, Py_ssize_t first_pixel, Py_ssize_t end_pixel) noexcept nogil:
    """Compute and store the filters of some panels for a chunk of pixels."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t b, panel
    cdef const char *weights = space.weights
    cdef char *sums
    cdef bint usable
    cdef fc_reduction reduction
    for b in range(plan.channel_blocks):
        for panel in range(first, end):
            sums = space.sums + (panel - first) * max(<Py_ssize_t>1, plan.slots) * grid.sum_bytes
            if plan.weights != NULL:
                weights = _packed_block(plan, group, panel, b)
            else:
                if plan.strips:
                    usable = _pack_from_strip(plan, group, panel, b, (panel - first) % STRIP, space.floats, space.weights)
                else:
                    usable = _pack_block(plan, group, panel, b, space.floats, space.weights)
                if not usable:
                    plan.refused[c.batch] = 1
            if not _start(plan, block.image, group, panel, b, weights, &reduction):
                plan.refused[block.image] = 1
                return
            if plan.slots:
                _multiply_strands(plan, panel, b, grid, space, first_pixel, end_pixel, weights, &reduction, sums)
            elif _fills_lines(plan, panel):
                _multiply_in_place(plan, block, group, panel, b, grid, space, first_pixel, end_pixel, weights, &reduction)
                continue
            else:
                _multiply(plan, panel, b, grid, space, first_pixel, end_pixel, weights, &reduction, sums)
            if b < plan.channel_blocks - 1:
                continue
            if plan.slots:
                _store_strands(plan, block, group, grid, panel, first_pixel, end_pixel, sums, space.zeros)
                continue
            _store_panel(plan, block, group, grid, panel, first_pixel, end_pixel, sums)


cdef bint _fills_lines(const Plan *plan, Py_ssize_t panel) noexcept nogil:
    """Whether a panel's filters are neighbours in the output, whole vectors of them: sums are there from the first block on."""
    cdef const Conv *c = &plan.c
    return (
        not c.kernels.pieces and c.y.stride[1] == 1
        and panel * c.panel + panel_vectors(c, panel) * c.kernels.lanes <= c.filters
    )


cdef void _multiply_in_place(const Plan *plan, const Block *block, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t b,
                             const Grid *grid, const Workspace *space, Py_ssize_t pixel, Py_ssize_t end,
                             const char *weights, fc_reduction *reduction) noexcept nogil:
    """Add one channel block's products to the output for a chunk of pixels, and finish it with the last block's."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t filter = group * c.filters + panel * c.panel, run, at
    cdef fc_epilogue epilogue
    epilogue.bias = bias_at(plan.bias, filter * c.item)
    epilogue.relu = plan.relu
    reduction.finish = &epilogue if b == plan.channel_blocks - 1 else NULL
    reduction.c_step = c.y.stride[4]
    while pixel < end:
        run = output_run(c, block, pixel, end, &at)
        _multiply(
            plan, panel, b, grid, space, pixel, pixel + run, weights, reduction, c.y.data + (filter + at) * c.item
        )
        pixel += run


cdef void _store_panel(const Plan *plan, const Block *block, Py_ssize_t group, const Grid *grid, Py_ssize_t panel,
                       Py_ssize_t first_pixel, Py_ssize_t end_pixel, char *sums) noexcept nogil:
    """Finish a panel's sums for a chunk of pixels, and store them: without the halo, row by row where rows are long."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t filter = group * c.filters + panel * c.panel, width = panel_vectors(c, panel) * c.kernels.lanes
    cdef Py_ssize_t pixel = first_pixel // grid.pitch * block.columns + first_pixel % grid.pitch
    cdef Py_ssize_t rows = 1, pixels, row
    if grid.pitch > block.columns >= 2 * c.kernels.lanes and block.columns % c.kernels.lanes == 0:
        rows, pixels = ceil_div(end_pixel - first_pixel, grid.pitch), block.columns
    else:
        pixels = _drop_halo(block, grid, end_pixel - first_pixel, width * c.item, sums)
    for row in range(rows):
        store(
            c, block, pixel + row * pixels, pixels, sums + row * grid.pitch * width * c.item, width, filter,
            min(width, c.filters - panel * c.panel), bias_at(plan.bias, filter * c.item), plan.relu,
        )


cdef Py_ssize_t _drop_halo(const Block *block, const Grid *grid, Py_ssize_t pixels, Py_ssize_t pixel_bytes,
                           char *sums) noexcept nogil:
    """Move the rows of a long row's pixels together; return how many are left."""
    cdef Py_ssize_t rows = ceil_div(pixels, grid.pitch), row
    if grid.pitch == block.columns:
        return pixels
    for row in range(1, rows):
        memmove(
            sums + row * block.columns * pixel_bytes, sums + row * grid.pitch * pixel_bytes,
            <size_t>(block.columns * pixel_bytes),
        )
    return rows * block.columns


cdef bint _start(const Plan *plan, Py_ssize_t image, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t b,
                 const char *weights, fc_reduction *reduction) noexcept nogil:
    """Set up what all reductions of a panel's channel block share; return whether digits are enough, if it is them."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t number = (image * c.groups + group) * plan.channel_blocks + b
    reduction[0] = fc_reduction_over(NULL, 0, 0)
    reduction.c_step = panel_vectors(c, panel) * c.kernels.lanes
    if not c.kernels.digits:
        return True
    reduction.scales = _scales_of(plan, panel, b, weights)
    reduction.scale = &plan.scale[number]
    reduction.scale_step = 0
    reduction.products = products(&plan.spread[number], &reduction.scales.spread, plan.summed)
    return reduction.products > 0


cdef void _multiply(const Plan *plan, Py_ssize_t panel, Py_ssize_t b, const Grid *grid, const Workspace *space,
                    Py_ssize_t first_pixel, Py_ssize_t end_pixel, const char *weights, fc_reduction *reduction,
                    char *sums) noexcept nogil:
    """Add one channel block's products with one panel for a chunk of pixels, tile by tile."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, panel)
    cdef Py_ssize_t width = vectors * c.kernels.lanes
    cdef Py_ssize_t channels = min(plan.width, c.depth - b * plan.width), taps, most, t
    reduction.taps = space.taps
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
    taps = most = reduction.n_taps
    if c.kernels.digits:  # so many that a vector of weights stays in L1
        most = ceil_div(taps, ceil_div(taps * reduction.depth, <Py_ssize_t>SPLIT_REDUCTION))
    for t from 0 <= t < taps by most:
        reduction.n_taps = min(most, taps - t)
        reduction.taps = space.taps + t
        c.kernels.brgemm(
            reduction, space.part + b * plan.width * (1 if plan.in_place else grid.cells) * c.packed, space.offsets + first_pixel,
            end_pixel - first_pixel, weights + t * reduction.b_tap * c.packed, vectors, sums, b > 0 or t > 0,
        )


cdef void _multiply_strands(const Plan *plan, Py_ssize_t panel, Py_ssize_t b, const Grid *grid, const Workspace *space,
                            Py_ssize_t first_pixel, Py_ssize_t end_pixel, const char *weights, fc_reduction *reduction,
                            char *sums) noexcept nogil:
    """The same for each strand: by its taps."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, panel)
    cdef Py_ssize_t width = vectors * c.kernels.lanes, channels = min(plan.width, c.depth - b * plan.width)
    cdef Py_ssize_t tap = channels * width if c.kernels.pieces else width, s, t
    reduction.depth = channels
    reduction.b_step = width if c.kernels.pieces else c.taps * width
    for t in range(plan.seen_taps):
        space.weight_taps[t] = plan.seen[4 * t + 3] * tap
    for s in range(plan.strands[0] * plan.strands[1] * plan.strands[2]):
        t = plan.phase[4 * s]
        reduction.taps, reduction.b_taps, reduction.n_taps = space.taps + t, space.weight_taps + t, _strand_taps(plan, s)
        if reduction.n_taps == 0:
            continue
        c.kernels.brgemm(
            reduction, space.part + b * grid.cells * plan.width * c.packed, space.offsets + first_pixel,
            end_pixel - first_pixel, weights, vectors, sums, b > 0,
        )
        sums += grid.sum_bytes


cdef void _store_strands(const Plan *plan, const Block *block, Py_ssize_t group, const Grid *grid, Py_ssize_t panel,
                         Py_ssize_t first_pixel, Py_ssize_t end_pixel, const char *sums, const char *zeros) noexcept nogil:
    """Finish a panel's sums for a chunk of pixels of all strands, and store them where these lie, row by row."""
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    cdef Py_ssize_t width = panel_vectors(c, panel) * c.kernels.lanes, filter = group * c.filters + panel * c.panel
    cdef Py_ssize_t pixel = first_pixel, end, row, column, d, h, s, z, x
    cdef const char *strands[STRANDS]
    cdef const char *rows[STRANDS]
    cdef fc_epilogue epilogue
    epilogue.bias = bias_at(plan.bias, filter * c.item)
    epilogue.relu = plan.relu
    epilogue.pixel_stride = plan.step[2] * y.stride[4]
    epilogue.channel_stride = y.stride[1]
    for s in range(plan.strands[0] * plan.strands[1] * plan.strands[2]):
        strands[s] = zeros
        if _strand_taps(plan, s):
            strands[s] = sums
            sums += grid.sum_bytes
    while pixel < end_pixel:
        row, column = pixel // grid.pitch, pixel % grid.pitch
        end = min(end_pixel, pixel + grid.pitch - column)
        for d in range(plan.strands[0]):
            for h in range(plan.strands[1]):
                z, x = block.depth * plan.step[0] + d, (block.top + row) * plan.step[1] + h
                if column >= block.columns or z >= y.size[2] or x >= y.size[3]:
                    continue
                for s in range(plan.strands[2]):
                    rows[s] = strands[(d * plan.strands[1] + h) * plan.strands[2] + s]
                    rows[s] += (pixel - first_pixel) * width * c.item
                _store_row(
                    plan, &epilogue, rows, width, block.left + column, min(end - pixel, block.columns - column),
                    min(width, c.filters - panel * c.panel), y.data + (
                        block.image * y.stride[0] + filter * y.stride[1] + z * y.stride[2] + x * y.stride[3]
                    ) * c.item,
                )
        pixel = end


cdef void _store_row(const Plan *plan, const fc_epilogue *epilogue, const char **strands, Py_ssize_t width, Py_ssize_t first,
                     Py_ssize_t pixels, Py_ssize_t filters, char *out) noexcept nogil:
    """Store some pixels of the strands of a row, from ``first`` on."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t left = first * plan.step[2], cells = min(pixels * plan.step[2], c.y.size[4] - left), s
    out += left * c.y.stride[4] * c.item
    if c.y.stride[4] == 1 and plan.step[2] > 1 and plan.strands[2] == plan.step[2]:
        c.kernels.weave(epilogue, <const void **>strands, plan.step[2], width, cells, filters, out)
        return
    for s in range(plan.strands[2]):
        c.kernels.epilogue(
            epilogue, strands[s], width, ceil_div(cells - s, plan.step[2]), filters, out + s * c.y.stride[4] * c.item
        )
