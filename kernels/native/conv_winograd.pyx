"""Winograd's convolution: a tile of outputs for fewer multiplications than its products, 36 instead of 144 for 4x4 outputs.

    output tile = At [ sum over channels, slices of (G taps Gt) * (Bt inputs B) ] A        ukernels/winograd.h

    transform the weights, all or (where they are large) some of the panels at a time, unless each is used by one task
    for image, group, block of tiles, share of the panels:                 in parallel
        pack the part of the image that the block sees                     as conv_direct does
        transform it, once for each slice of the filters                   [point][channel block][slice][tile][width]
        for some panels of filters:
            for some channel blocks (all, or what fits L2):                transform weights that only this task uses
                for point: for panel: brgemm over slices, some at a time   independent matrix products, one for each point
            for panel: transform back, store: bias, activation, layout

      inputs of a point          panel                products, [panel][point][tile][filter]
      +---------------+       +----------+            +----------+
      |    tiles x    |   x   | channels |     =      |  tiles x |
      |   channels    |       | x width  |            |  width   |
      +---------------+       +----------+            +----------+

``kernels/winograd.py`` chooses the tile, ``winograd_tiles`` says where tiles are. The gradient of the input is the same loop
on other views (``interleave``), that of the weights is in ``weight_winograd``.

The error is no larger than that of summing all products one after another, since few are summed in a row: the channels of a
block, and then the blocks (docs/performance.md). But sums of inputs can overflow, or make a NaN of two infinities, where
single products would not: an image that holds such numbers is left to conv_direct. Where the machine has a tile that
multiplies pieces of numbers (``split_numbers``), transformed inputs and weights are split; parts of nothing but tiny
numbers, and products of fewer than three pieces, are left to conv_direct, too.

A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
"""

cimport numpy as cnp

from fastconv.kernels import interleave, winograd
from fastconv.kernels.native.blocking cimport (
    Block, Blocks, Conv, bias_at, ceil_div, locate, make_conv, pack_bias, pack_image, pack_panel, panel_vectors, round_up,
    run_tasks, share_out, split_numbers, store, turn_weights,
)
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_HUGE, FC_INPUTS, FC_OUTPUTS, FC_SUM_LIMIT, FC_TAPS, FC_TINY, Memory, arena,
    fc_reduction, fc_reduction_over, fc_tiles,
)
from fastconv.kernels.native.winograd_tiles cimport (
    LINE_BYTES, Geometry, cut_taps, cut_tiles, place_tiles, tiles_at, whole_periods,
)

from fastconv.kernels.native import conv_direct
from fastconv.kernels.native.weight_winograd import conv_weight_grad

cdef enum:
    CHANNELS = 32               # channel block, at most
    REDUCTION = 256             # channels that one brgemm reduces over: a panel's share is 16 KB of L1 in float32
    TILES = 64                  # of a block, about; fewer where there are many channels
    SPLIT_TILES = 256           # the same where weights are split, and together more than ...
    SPLIT_BYTES = 1 << 20       # ... what L2 holds of them beside inputs and sums: who reads them anew should use them often
    INPUT_BYTES = 4 << 20       # transformed inputs of a block, at most
    SPACE_BYTES = 6 << 20       # the same of split inputs, and their sums
    PANELS = 4                  # panels that one pass over the transformed inputs multiplies
    WEIGHT_BYTES = 5 << 17      # transformed weights of those panels, where they are used once: mostly in L2
    FEW_TILES = 6               # that are transformed, and split while they are in L1
    SPARE_BYTES = 7 << 19       # that transformed weights may take more than the weights
    FEW_TASKS = 2               # that transform the weights anew, each for itself, rather than the inputs in each pass


def conv_forward(input, weight, bias, output, dims, options):
    """See ``fastconv.kernels``."""
    cdef Py_ssize_t image
    refused = _forward(input, weight, bias, output, dims, options)
    if len(refused) == len(input):
        conv_direct.conv_forward(input, weight, bias, output, dims, options)
        return
    for image in refused:
        one = slice(image, image + 1)
        conv_direct.conv_forward(input[one], weight, bias, output[one], dims, options)


def conv_input_grad(grad_output, weight, bias, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    interleave.input_grad(conv_forward, grad_output, turn_weights(weight, dims), bias, grad_input, dims, options)


# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    Geometry g
    Blocks blocks               # of whole periods
    Py_ssize_t width            # channels in a block
    Py_ssize_t channel_blocks
    Py_ssize_t whole            # of them have all their channels
    Py_ssize_t run              # channel blocks that are summed in a row; what is cut otherwise is cut between runs
    Py_ssize_t most_taps        # channel blocks that one brgemm reduces over
    bint ready                  # the weights were kept from an earlier call
    bint once                   # each panel's weights are used by one task, or few: they transform them themselves
    Py_ssize_t together         # channel blocks whose weights are transformed together
    Py_ssize_t first_panel      # of a pass: the panels whose weights are transformed
    Py_ssize_t end_panel
    Py_ssize_t shares           # tasks that share the panels of one block
    Py_ssize_t panel_bytes      # of transformed weights
    Py_ssize_t space            # of a block's inputs and sums, in bytes
    char *weights               # [group][panel of the pass][tap point][channel block][slice][channel][filter]
    const char *bias
    int relu
    unsigned char *refused      # images with numbers that are not below FC_SUM_LIMIT; the last one stands for the weights

# One task: its block, and where its arrays are in the workspace.
ctypedef struct Task:
    Block block
    Block whole                 # the same in whole periods: what is not there is computed, and not stored
    Py_ssize_t group
    Py_ssize_t tiles
    Py_ssize_t point_bytes      # of transformed inputs
    Py_ssize_t product_bytes    # of a point and a panel
    Py_ssize_t *offsets         # of each tile
    Py_ssize_t *taps            # of each slice of a channel block
    Py_ssize_t *cells           # of each tile in a row of periods, in the output
    char *inputs                # [point][channel block][slice][tile][width]
    char *weights               # [panel][tap point][channel block][slice][channel][filter]: its own, if they are used once
    char *products              # [panel][point][tile][filter]
    char *floats                # transformed numbers that are yet to be split
    char *part                  # of the image, the weights or the output: not yet, or no longer, transformed


cdef list _forward(cnp.ndarray input, cnp.ndarray weight, bias, cnp.ndarray output, dims, options):
    """Convolve; return the images that were left out: all, if there is no tile for a phase of a gradient.

    And all where fewer pieces are multiplied: larger errors leave no room for those of transforms, which take longer than such
    products.
    """
    cdef Plan plan
    cdef Conv *c = &plan.c
    cdef Py_ssize_t most, bias_bytes
    cdef bytearray refused
    cdef Memory mine = None
    cdef tuple form
    make_conv(c, input, weight, output, dims, options)
    split_numbers(c, options.precision)
    if 0 < c.kernels.pieces < 3:
        return list(range(c.batch))
    products = "split" if c.kernels.pieces else "fused" if c.kernels.fused else "rounded"
    tile = winograd.choose(dims, products)
    if tile is None:
        return list(range(c.batch))
    cut_taps(c, tile, &plan.g)
    _plan_blocks(&plan)
    kept = options.packed
    _plan_weights(&plan, kept is None)
    passes = 1 if plan.once or kept is not None else _count_passes(&plan)
    bias_bytes = c.groups * c.filters * c.item
    most = 0 if plan.once or kept is not None else c.groups * ceil_div(c.panels, passes) * plan.panel_bytes
    plan.weights = arena(FC_ARENA_WEIGHTS, most + bias_bytes + LINE_BYTES)
    if plan.weights == NULL:
        raise MemoryError("no memory for packed weights")
    plan.bias = pack_bias(c, bias, plan.weights + most)
    plan.relu = options.activation == "relu"
    refused = bytearray(c.batch + 1)
    plan.refused = <unsigned char *><char *>refused
    plan.ready = False
    if kept is not None:
        form = ("winograd", c.item, c.kernels.pieces, plan.width, plan.g.sides[0], plan.g.sides[1])
        mine = kept.get(form)
        plan.ready = mine is not None
        if not plan.ready:
            mine = Memory(c.groups * c.panels * plan.panel_bytes)
        plan.weights = mine.data
        refused[c.batch] = mine.refused
    for number in range(passes):
        plan.first_panel = c.panels * number // passes
        plan.end_panel = c.panels * (number + 1) // passes
        _run_pass(&plan)
    if kept is not None and not plan.ready:
        mine.refused = refused[c.batch]
        kept[form] = mine
    return [image for image in range(c.batch) if refused[image] or refused[c.batch]]


cdef void _run_pass(Plan *plan) except *:
    """Compute the panels of one pass."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t panels = 0 if plan.once or plan.ready else c.groups * (plan.end_panel - plan.first_panel)
    cdef Py_ssize_t tasks = c.batch * c.groups * plan.blocks.count
    run_tasks(_transform_panel, plan, panels, c.threads)
    plan.shares = share_out(tasks, ceil_div(plan.end_panel - plan.first_panel, PANELS), 1, c.threads)
    run_tasks(_forward_task, plan, tasks * plan.shares, c.threads)


cdef Py_ssize_t _count_passes(const Plan *plan) noexcept nogil:
    """Return in how many parts the weights are transformed, for that takes up to six times their memory."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t bytes = c.groups * _transformed_bytes(plan)
    return min(c.panels, ceil_div(bytes, max(<Py_ssize_t>1, _weight_bytes(c) + SPARE_BYTES + SPACE_BYTES - plan.space)))


cdef Py_ssize_t _transformed_bytes(const Plan *plan) noexcept nogil:
    """What the transformed weights of a group take."""
    cdef const Conv *c = &plan.c
    return plan.g.tap_points * plan.g.count * c.depth * c.panels * c.panel * c.packed


cdef Py_ssize_t _weight_bytes(const Conv *c) noexcept nogil:
    """What the weights take as they come."""
    return c.groups * c.filters * c.channels * c.taps * c.item


cdef void _plan_blocks(Plan *plan) noexcept nogil:
    """Choose channel blocks, and blocks of about TILES tiles."""
    cdef const Conv *c = &plan.c
    cdef const Geometry *g = &plan.g
    cdef Py_ssize_t step = max(c.kernels.lanes, c.kernels.depth_step), tiles, tile_bytes, sum_bytes, all_tiles
    cdef Py_ssize_t most = min(g.run, <int>CHANNELS)
    plan.width = round_up(ceil_div(c.channels, ceil_div(c.channels, most)), step)  # even parts
    plan.channel_blocks = ceil_div(c.channels, plan.width)
    plan.whole = c.depth // plan.width
    plan.run = max(1, g.run // plan.width)
    plan.most_taps = REDUCTION // plan.width // plan.run * plan.run
    tile_bytes = g.points * g.count * plan.channel_blocks * plan.width * c.packed
    all_tiles = ceil_div(c.out[1], g.rows) * ceil_div(c.out[2], g.columns)
    plan.space = SPACE_BYTES
    if c.kernels.pieces == 0:
        tiles = min(<Py_ssize_t>TILES, INPUT_BYTES // tile_bytes)
    else:
        sum_bytes = g.points * min(<Py_ssize_t>PANELS, c.panels) * c.panel * c.item
        tiles = SPLIT_TILES if _transformed_bytes(plan) > SPLIT_BYTES else TILES
        tile_bytes += sum_bytes
        if _count_passes(plan) == 1:
            tiles = min(tiles, SPACE_BYTES // tile_bytes, max(<Py_ssize_t>TILES, all_tiles // 2))
        else:  # each pass transforms the inputs anew, or each block the weights
            tiles = min(tiles, (SPACE_BYTES + _weight_bytes(c)) // tile_bytes)
    cut_tiles(c, g, max(<Py_ssize_t>min(c.kernels.tile_rows, 16), tiles), &plan.blocks)
    if c.kernels.pieces:
        plan.space = max(plan.space, plan.blocks.rows // g.rows * (plan.blocks.columns // g.columns) * tile_bytes)


cdef void _plan_weights(Plan *plan, bint anew) noexcept nogil:
    """Choose where weights are transformed, if they are ``anew`` for each call: of one block of tiles, each panel is used by one task.

    This may look at the batch, for sums are added up in the order of the channels, however the weights are cut.
    """
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t row_bytes = plan.g.tap_points * plan.g.count * c.panel * c.packed  # of a channel
    plan.once = anew and c.batch * plan.blocks.count <= (1 if _count_passes(plan) == 1 else FEW_TASKS)
    plan.together = plan.channel_blocks
    if plan.once:
        plan.together = min(
            plan.together, max(1, WEIGHT_BYTES // (PANELS * plan.run * plan.width * row_bytes)) * plan.run
        )
    plan.panel_bytes = min(c.depth, plan.together * plan.width) * row_bytes + plan.g.tap_points * LINE_BYTES


# ---------------------------------------------------------------------------------------------------------- weights

cdef int _transform_panel(const void *shared, Py_ssize_t number) noexcept nogil:
    """Transform the weights of one panel of the pass; return 1 if there is no memory."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t pass_panels = plan.end_panel - plan.first_panel
    cdef Py_ssize_t part_bytes = _weight_part_bytes(plan)
    cdef char *part = arena(FC_ARENA_BLOCK, part_bytes + plan.g.tap_points * _weight_float_bytes(plan))
    if part == NULL:
        return 1
    _transform_weights(
        plan, number // pass_panels, plan.first_panel + number % pass_panels, 0, part, part + part_bytes,
        plan.weights + number * plan.panel_bytes,
    )
    return 0


cdef Py_ssize_t _weight_part_bytes(const Plan *plan) noexcept nogil:
    """What the weights of a panel take that are transformed together."""
    return min(plan.c.channels, plan.together * plan.width) * plan.c.taps * plan.c.panel * plan.c.item


cdef Py_ssize_t _weight_float_bytes(const Plan *plan) noexcept nogil:
    """What one point of a slice takes until it is split."""
    return plan.width * plan.c.panel * plan.c.item + LINE_BYTES if plan.c.kernels.pieces else 0


cdef void _transform_weights(const Plan *plan, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t first, char *part,
                             char *floats, char *out) noexcept nogil:
    """Pack and transform weights of a panel, from channel block ``first`` on; to be split, by way of ``floats``."""
    cdef const Conv *c = &plan.c
    cdef const Geometry *g = &plan.g
    cdef Py_ssize_t width = panel_vectors(c, panel) * c.kernels.lanes, b, d, h, w, channels, depth
    cdef Py_ssize_t end = min(first + plan.together, plan.channel_blocks)
    channels = min(c.channels, end * plan.width) - first * plan.width
    pack_panel(c, group, panel, first * plan.width, channels, part)
    if not c.kernels.all_below(part, channels * c.taps * width, FC_SUM_LIMIT):
        plan.refused[c.batch] = 1
    for b in range(first, end):
        channels = min(plan.width, c.channels - b * plan.width)
        depth = min(plan.width, c.depth - b * plan.width)
        for d in range(g.slices[0]):
            for h in range(g.slices[1]):
                for w in range(g.slices[2]):
                    _transform_slice(plan, panel, channels, d, h * g.taps[1], w * g.taps[2], part, floats, out)
                    out += depth * width * c.packed
        part += channels * c.taps * width * c.item


cdef void _transform_slice(const Plan *plan, Py_ssize_t panel, Py_ssize_t channels, Py_ssize_t d, Py_ssize_t h,
                           Py_ssize_t w, const char *part, char *floats, char *out) noexcept nogil:
    """Transform the slice of a channel block's weights, [channel][tap][filter], that starts at tap (d, h, w)."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, panel), pieces = c.kernels.pieces
    cdef Py_ssize_t width = vectors * c.kernels.lanes, point, n
    cdef Py_ssize_t point_bytes = plan.panel_bytes // plan.g.tap_points, float_bytes = _weight_float_bytes(plan)
    cdef Py_ssize_t[CHANNELS] at
    for n in range(channels):
        at[n] = (((n * c.kernel[0] + d) * c.kernel[1] + h) * c.kernel[2] + w) * width
    cdef fc_tiles tiles = tiles_at(&plan.g, at, channels, c.kernel[2] * width, width)
    tiles.high, tiles.wide = <int>(c.kernel[1] - h), <int>(c.kernel[2] - w)
    if plan.g.sides[0] > plan.g.sides[1]:
        tiles.high, tiles.wide = tiles.wide, tiles.high
    if pieces == 0:
        c.kernels.winograd_transform(FC_TAPS, &tiles, part, width, out, point_bytes // c.item)
        return
    c.kernels.winograd_transform(FC_TAPS, &tiles, part, width, floats, float_bytes // c.item)
    for point in range(plan.g.tap_points):
        c.kernels.split_weights(
            floats + point * float_bytes, width, channels, 1, vectors, pieces, out + point * point_bytes
        )


# ------------------------------------------------------------------------------------------------------------ tasks

cdef int _forward_task(const void *shared, Py_ssize_t number) noexcept nogil:
    """Compute a share of the panels for one block; return 1 if there is no memory."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Task t
    cdef Py_ssize_t share = number % plan.shares, panels = plan.end_panel - plan.first_panel, panel
    cdef Py_ssize_t end = plan.first_panel + panels * (share + 1) // plan.shares
    if _start_task(plan, number // plan.shares, &t):
        return 1
    if plan.refused[t.block.image] or plan.refused[c.batch]:
        return 0
    if not _fill_inputs(plan, &t):
        plan.refused[t.block.image] = 1
        return 0
    if c.kernels.pieces:
        c.kernels.enter()
    for panel from plan.first_panel + panels * share // plan.shares <= panel < end by PANELS:
        _panels(plan, &t, panel, min(panel + PANELS, end))
    if c.kernels.pieces:
        c.kernels.leave()
    return 0


cdef int _start_task(const Plan *plan, Py_ssize_t number, Task *t) noexcept nogil:
    """Find the block of a task, and room for its arrays; return 1 if there is no memory."""
    cdef const Conv *c = &plan.c
    cdef const Geometry *g = &plan.g
    cdef Py_ssize_t slices = plan.channel_blocks * g.count
    t.group = number % c.groups
    locate(c, &plan.blocks, number // c.groups, &t.block)
    t.whole = whole_periods(c, g, &t.block)
    t.tiles = t.whole.rows // g.rows * (t.whole.columns // g.columns)
    t.point_bytes = slices * t.tiles * plan.width * c.packed + LINE_BYTES
    t.product_bytes = round_up(t.tiles, c.kernels.tile_rows) * c.panel * c.item + LINE_BYTES

    cdef Py_ssize_t offset_bytes = round_up((2 * t.tiles + slices) * <Py_ssize_t>sizeof(Py_ssize_t), 64)
    cdef Py_ssize_t weight_bytes = PANELS * plan.panel_bytes if plan.once else 0
    cdef Py_ssize_t float_bytes = g.points * max(_input_float_bytes(plan), _weight_float_bytes(plan) if plan.once else 0)
    cdef Py_ssize_t cells = c.kernel[0] * t.whole.high * t.whole.wide
    cdef Py_ssize_t part_bytes = max(plan.width * cells, g.down * t.whole.columns * c.panel) * c.item
    if plan.once:
        part_bytes = max(part_bytes, _weight_part_bytes(plan))
    cdef char *memory = arena(
        FC_ARENA_BLOCK,
        offset_bytes + g.points * t.point_bytes + weight_bytes + PANELS * g.points * t.product_bytes
        + float_bytes + part_bytes,
    )
    if memory == NULL:
        return 1
    t.offsets = <Py_ssize_t *>memory
    t.cells = t.offsets + t.tiles
    t.taps = t.cells + t.tiles
    t.inputs = memory + offset_bytes
    t.weights = t.inputs + g.points * t.point_bytes
    t.products = t.weights + weight_bytes
    t.floats = t.products + PANELS * g.points * t.product_bytes
    t.part = t.floats + float_bytes
    return 0


cdef Py_ssize_t _input_float_bytes(const Plan *plan) noexcept nogil:
    """What one point of some tiles' inputs takes until it is split."""
    return FEW_TILES * plan.width * plan.c.item + LINE_BYTES if plan.c.kernels.pieces else 0


cdef bint _fill_inputs(const Plan *plan, Task *t) noexcept nogil:
    """Pack and transform all inputs of the block; return whether their numbers can be summed (and split)."""
    cdef const Conv *c = &plan.c
    cdef const Geometry *g = &plan.g
    cdef Py_ssize_t cells = t.whole.high * t.whole.wide, b, d, h, w, p, cell
    cdef int sizes = 0
    cdef char *out = t.inputs
    place_tiles(
        c, g, t.whole.rows, t.whole.columns, c.stride[1] * t.whole.wide * plan.width, c.stride[2] * plan.width, t.offsets
    )
    for b in range(plan.channel_blocks):
        pack_image(
            c, &t.whole, t.group * c.channels + b * plan.width, min(plan.width, c.channels - b * plan.width), plan.width,
            t.part,
        )
        if c.kernels.pieces == 0 and not c.kernels.all_below(t.part, c.kernel[0] * cells * plan.width, FC_SUM_LIMIT):
            return False
        for d in range(g.slices[0]):
            for h in range(g.slices[1]):
                for w in range(g.slices[2]):
                    cell = d * cells + h * g.taps[1] * c.dilation[1] * t.whole.wide + w * g.taps[2] * c.dilation[2]
                    sizes |= _transform_inputs(plan, t, t.part + cell * plan.width * c.item, out)
                    out += t.tiles * plan.width * c.packed
    for p in range(t.tiles):
        t.offsets[p] = p * plan.width
    for p in range(plan.channel_blocks * g.count):
        t.taps[p] = p * t.tiles * plan.width
    return not sizes & FC_HUGE and sizes != FC_TINY


cdef int _transform_inputs(const Plan *plan, const Task *t, const char *cells, char *out) noexcept nogil:
    """Transform what a slice of the filters sees; to be split, some tiles at a time; then return its numbers' sizes."""
    cdef const Conv *c = &plan.c
    cdef int pieces = c.kernels.pieces, sizes = 0
    cdef Py_ssize_t float_bytes = _input_float_bytes(plan), point, first
    cdef fc_tiles tiles = tiles_at(
        &plan.g, t.offsets, t.tiles, c.dilation[1] * t.whole.wide * plan.width, c.dilation[2] * plan.width
    )
    if pieces == 0:
        c.kernels.winograd_transform(FC_INPUTS, &tiles, cells, plan.width, out, t.point_bytes // c.item)
        return 0
    for first from 0 <= first < t.tiles by FEW_TILES:
        tiles.at = t.offsets + first
        tiles.count = min(<Py_ssize_t>FEW_TILES, t.tiles - first)
        c.kernels.winograd_transform(FC_INPUTS, &tiles, cells, plan.width, t.floats, float_bytes // c.item)
        for point in range(plan.g.points):
            sizes |= c.kernels.split_rows(
                t.floats + point * float_bytes, 1, 0, tiles.count * plan.width, pieces,
                out + point * t.point_bytes + first * plan.width * c.packed,
            )
    return sizes


cdef void _panels(const Plan *plan, const Task *t, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Compute and store the filters of some panels for all tiles of a block."""
    cdef Py_ssize_t pass_panels = plan.end_panel - plan.first_panel, points = plan.g.points, b, point, panel
    cdef Py_ssize_t point_bytes = plan.panel_bytes // plan.g.tap_points
    cdef char *weights = t.weights
    if not plan.once:
        weights = plan.weights + (t.group * pass_panels + first - plan.first_panel) * plan.panel_bytes
    for b from 0 <= b < plan.channel_blocks by plan.together:
        if plan.once:
            for panel in range(first, end):
                _transform_weights(
                    plan, t.group, panel, b, t.part, t.floats, weights + (panel - first) * plan.panel_bytes
                )
        for point in range(points):
            for panel in range(first, end):
                _multiply(
                    plan, t, panel, b, t.inputs + point * t.point_bytes,
                    weights + (panel - first) * plan.panel_bytes + plan.g.tap_point[point] * point_bytes,
                    t.products + ((panel - first) * points + point) * t.product_bytes,
                )
    for panel in range(first, end):
        _store_panel(plan, t, panel, t.products + (panel - first) * points * t.product_bytes)


cdef void _multiply(const Plan *plan, const Task *t, Py_ssize_t panel, Py_ssize_t first, const char *inputs,
                    const char *weights, char *products) noexcept nogil:
    """Multiply the inputs of one point by one panel's weights, of channel blocks from ``first`` on."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, panel)
    cdef Py_ssize_t width = vectors * c.kernels.lanes, begin = first * plan.g.count
    cdef Py_ssize_t end = min(first + plan.together, plan.channel_blocks) * plan.g.count
    cdef Py_ssize_t whole = plan.whole * plan.g.count  # slices of full channel blocks; the others are less deep
    cdef fc_reduction reduction = fc_reduction_over(NULL, 0, 0)
    reduction.apart = <int>plan.run
    reduction.b_step = width
    reduction.c_step = width
    while begin < end:
        reduction.taps = t.taps + begin
        reduction.depth = plan.width if begin < whole else c.depth - plan.whole * plan.width
        reduction.n_taps = min(plan.most_taps, (min(end, whole) if begin < whole else end) - begin)
        reduction.b_tap = reduction.depth * width
        c.kernels.brgemm(&reduction, inputs, t.offsets, t.tiles, weights, vectors, products, begin > 0)
        weights += reduction.n_taps * reduction.b_tap * c.packed
        begin += reduction.n_taps


cdef void _store_panel(const Plan *plan, const Task *t, Py_ssize_t panel, const char *products) noexcept nogil:
    """Transform one panel's products back and store them, one row of periods at a time."""
    cdef const Conv *c = &plan.c
    cdef const Geometry *g = &plan.g
    cdef const Block *block = &t.block
    cdef Py_ssize_t width = panel_vectors(c, panel) * c.kernels.lanes, pitch = t.whole.columns, row, r
    cdef Py_ssize_t first = t.group * c.filters + panel * c.panel
    cdef Py_ssize_t filters = min(width, c.filters - panel * c.panel)
    cdef Py_ssize_t tiles = c.dilation[1] * (pitch // g.columns)
    cdef fc_tiles period = tiles_at(g, t.cells, tiles, c.dilation[1] * pitch * width, c.dilation[2] * width)
    place_tiles(c, g, g.down, pitch, pitch * width, width, t.cells)
    for row from 0 <= row < block.rows by g.down:
        c.kernels.winograd_gather(FC_OUTPUTS, &period, products, t.product_bytes // c.item, width, t.part)
        products += tiles * width * c.item
        for r in range(min(g.down, block.rows - row)):
            store(
                c, block, (row + r) * block.columns, block.columns, t.part + r * pitch * width * c.item,
                width, first, filters, bias_at(plan.bias, first * c.item), plan.relu,
            )
