"""Winograd's convolution: a tile of outputs for fewer multiplications than its products, 36 instead of 144 for 4x4 outputs.

    output tile = At [ sum over channels of (G taps Gt) * (Bt inputs B) ] A        3x3 taps at most; ukernels/winograd.h

    transform the weights, all or (where they are large) some of the panels at a time, unless each is used by one task
    for image, group, block of tiles, share of the panels:                 in parallel
        pack the part of the image that the block sees                     as conv_direct does
        transform it, once for each slice of the filters                   [point][channel block][slice][tile][width]
        for some panels of filters:
            for some channel blocks (all, or what fits L2):                transform weights that only this task uses
                for point: for panel: for slice: for tile of rows: brgemm  independent matrix products, one for each point
            for panel: transform back, store: bias, activation, layout

      inputs of a point          panel                products, [panel][point][tile][filter]
      +---------------+       +----------+            +----------+
      |    tiles x    |   x   | channels |     =      |  tiles x |
      |   channels    |       | x width  |            |  width   |
      +---------------+       +----------+            +----------+

How many outputs a tile has is the choice of ``kernels/winograd.py``. Filters of more than 3 taps along an axis are cut
into slices of 3, whose products are summed like those of channels. With dilation 2 the outputs of a tile are 2 apart, and
2x2 tiles together make a period of neighbouring outputs:

      taps of a 5x5 filter      outputs of four 2x2 tiles
      in slices a, b, c, d      a, b, c, d: one period
          a a a b b                   a b a b
          a a a b b                   c d c d
          a a a b b                   a b a b
          c c c d d                   c d c d
          c c c d d

The gradient of weights of 3 taps is a product of the same transformed inputs and of transformed gradients, summed over tiles:

    grad_weight = Gt [ sum over tiles of (Bt inputs B) * (A gradients At) ] G

    for chunk of the blocks of all images, block of channels, panels of filters:     in parallel
        pack and transform both, until there are enough tiles          [point][tile][width], [point][panel][tile][filter]
        for point: for panel: for tile of channels: brgemm             the reduction runs along the tiles
        transform the sums back                                        [point][panel][channel][filter]: L2

The error is no larger than that of summing all products one after another, since few are summed in a row: the channels of a
block, and then the blocks (docs/performance.md). But sums of inputs can overflow, or make a NaN of two infinities, where
single products would not: an image that holds such numbers is left to conv_direct. Where the machine has a tile that
multiplies pieces of numbers (``split_numbers``), transformed inputs and weights are split; parts of nothing but tiny
numbers are left to conv_direct, too.

A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
"""

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels import interleave, winograd
from fastconv.kernels.native.blocking cimport (
    Block, Blocks, Conv, bias_at, ceil_div, locate, make_conv, pack_bias, pack_image, pack_panel, pack_pixels,
    panel_vectors, round_up, run_tasks, share_out, split_numbers, store,
)
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_INPUTS, FC_OUTPUTS, FC_SUM_LIMIT, FC_TAPS, FC_TINY, Memory, arena, fc_reduction,
    fc_tiles,
)
from fastconv.kernels.native.weight_chunks cimport (
    WEIGHT_PANELS, WeightPlan, WeightTask, add_bias, end_task, plan_chunks, start_task, sum_chunks,
)

from fastconv.kernels.native import conv_direct

cdef enum:
    SLICE = 3                   # taps along an axis that has more than one output in a tile
    CHANNELS = 32               # channel block, summed by itself: sums of sums have smaller errors
    FEW_CHANNELS = 16           # the same for tiles with a side of 4, which would not be exact enough
    REDUCTION = 256             # channels that one brgemm reduces over: a panel's share is 16 KB of L1 in float32
    TILES = 64                  # of a block, about; fewer where there are many channels
    SUMMED_CHANNELS = 64        # of a task of the weight gradient, at most
    APART = 16                  # tiles whose products are summed by themselves
    SUMMED_TILES = 64           # tiles that one brgemm of the weight gradient reduces over, at most
    INPUT_BYTES = 4 << 20       # transformed inputs of a block, at most
    PANELS = 4                  # panels that one pass over the transformed inputs multiplies
    WEIGHT_BYTES = 5 << 17      # transformed weights of those panels, where they are used once: mostly in L2
    SPARE_BYTES = 4 << 20       # that transformed weights may take more than the weights
    LINE_BYTES = 64             # between the points of an array, lest all of them fall into the same set of L1

# The transforms double the error of fewer pieces, which leaves "high" no room.
PRECISION = {"highest": "highest", "high": "highest", "medium": "medium"}


def conv_forward(input, weight, bias, output, dims, options):
    """See ``fastconv.kernels``."""
    cdef Py_ssize_t image
    refused = _forward(input, weight, bias, output, dims, options)
    for image in refused:
        one = slice(image, image + 1)
        conv_direct.conv_forward(input[one], weight, bias, output[one], dims, options)


def conv_input_grad(grad_output, weight, bias, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    interleave.input_grad(conv_forward, grad_output, weight, bias, grad_input, dims, options)


def conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options):
    """See ``fastconv.kernels``."""
    if not _weight_grad(input, grad_output, grad_weight, grad_bias, dims, options):
        conv_direct.conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options)


# A tile, and how the taps are cut into slices for it. A block is cut into whole tiles, and with dilation into whole periods.
ctypedef struct Geometry:
    int rows, columns           # outputs of a tile
    Py_ssize_t points
    Py_ssize_t slices[3]        # along depth, height and width
    Py_ssize_t taps[3]          # of a slice: 1 or SLICE
    Py_ssize_t count            # of all slices
    Py_ssize_t down, across     # outputs of a period

# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    Geometry g
    Blocks blocks               # of whole periods
    Py_ssize_t width            # channels in a block
    Py_ssize_t channel_blocks
    Py_ssize_t whole            # of them have all their channels
    Py_ssize_t most_taps        # channel blocks that one brgemm reduces over
    bint ready                  # the weights were kept from an earlier call
    bint once                   # each panel's weights are used by one task: it transforms them itself
    Py_ssize_t together         # channel blocks whose weights are transformed together
    Py_ssize_t first_panel      # of a pass: the panels whose weights are transformed
    Py_ssize_t end_panel
    Py_ssize_t shares           # tasks that share the panels of one block
    Py_ssize_t panel_bytes      # of transformed weights
    char *weights               # [group][panel of the pass][point][channel block][slice][channel][filter]
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
    char *weights               # [panel][point][channel block][slice][channel][filter]: its own, if they are used once
    char *products              # [panel][point][tile][filter]
    char *floats                # transformed numbers that are yet to be split
    char *part                  # of the image, the weights or the output: not yet, or no longer, transformed


cdef list _forward(cnp.ndarray input, cnp.ndarray weight, bias, cnp.ndarray output, dims, options):
    """Convolve; return the images that were left out."""
    cdef Plan plan
    cdef Conv *c = &plan.c
    cdef Py_ssize_t most, bias_bytes
    cdef unsigned char[::1] refused
    cdef Memory mine = None
    cdef tuple form
    make_conv(c, input, weight, output, dims, options)
    split_numbers(c, PRECISION[options.precision])
    _cut_taps(c, winograd.choose(dims, c.kernels.pieces > 0), &plan.g)
    _plan_blocks(&plan)
    _plan_weights(&plan)
    kept = None if plan.once else options.packed
    passes = 1 if plan.once or kept is not None else _count_passes(&plan)
    bias_bytes = c.groups * c.filters * c.item
    most = 0 if plan.once or kept is not None else c.groups * ceil_div(c.panels, passes) * plan.panel_bytes
    plan.weights = arena(FC_ARENA_WEIGHTS, most + bias_bytes + LINE_BYTES)
    if plan.weights == NULL:
        raise MemoryError("no memory for packed weights")
    plan.bias = pack_bias(c, bias, plan.weights + most)
    plan.relu = options.activation == "relu"
    refused = bytearray(c.batch + 1)
    plan.refused = &refused[0]
    plan.ready = False
    if kept is not None:
        form = ("winograd", c.item, c.kernels.pieces, plan.width, plan.g.rows, plan.g.columns)
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
    plan.shares = share_out(tasks, ceil_div(plan.end_panel - plan.first_panel, PANELS), c.threads)
    run_tasks(_forward_task, plan, tasks * plan.shares, c.threads)


cdef Py_ssize_t _count_passes(const Plan *plan) noexcept nogil:
    """Return in how many parts the weights are transformed, for that takes up to four times their memory."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t bytes = c.groups * c.panels * plan.panel_bytes
    cdef Py_ssize_t most = c.groups * c.filters * c.channels * c.taps * c.item + SPARE_BYTES
    return min(c.panels, ceil_div(bytes, most))


# ---------------------------------------------------------------------------------------------------------- geometry

cdef void _cut_taps(const Conv *c, tile, Geometry *g):
    """Cut the taps into slices for a tile."""
    cdef int axis
    cdef int[3] sides
    sides[0], sides[1], sides[2] = 1, tile.rows, tile.columns
    g.rows, g.columns, g.points = tile.rows, tile.columns, tile.points
    for axis in range(3):
        g.taps[axis] = 1 if sides[axis] == 1 else SLICE
        g.slices[axis] = ceil_div(c.kernel[axis], g.taps[axis])
    g.count = g.slices[0] * g.slices[1] * g.slices[2]
    g.down = g.rows * c.dilation[1]
    g.across = g.columns * c.dilation[2]


cdef fc_tiles _tiles(const Geometry *g, const Py_ssize_t *at, Py_ssize_t count, Py_ssize_t row_step,
                     Py_ssize_t cell_step) noexcept nogil:
    """Return tiles whose cells are so far apart; where they are higher than wide, with exchanged axes."""
    cdef fc_tiles tiles
    if g.rows > g.columns:
        row_step, cell_step = cell_step, row_step
    tiles.rows, tiles.columns = min(g.rows, g.columns), max(g.rows, g.columns)
    tiles.high, tiles.wide = SLICE, SLICE
    tiles.count = count
    tiles.at = at
    tiles.row_step, tiles.cell_step = row_step, cell_step
    return tiles


cdef void _place_tiles(const Conv *c, const Geometry *g, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t pitch,
                       Py_ssize_t width, Py_ssize_t *at) noexcept nogil:
    """Write where each tile of so many outputs, in whole periods, starts among cells of ``width``, ``pitch`` in a row."""
    cdef Py_ssize_t row, column, r, q, p = 0
    for row from 0 <= row < rows by g.down:
        for r in range(c.dilation[1]):
            for column from 0 <= column < columns by g.across:
                for q in range(c.dilation[2]):
                    at[p] = ((row + r) * pitch + column + q) * width
                    p += 1


cdef Block _whole_periods(const Conv *c, const Geometry *g, const Block *block) noexcept nogil:
    """Return a block with whole periods of tiles, and with all inputs that these see."""
    cdef Block whole = block[0]
    whole.rows = round_up(block.rows, g.down)
    whole.columns = round_up(block.columns, g.across)
    whole.high = whole.rows + (g.slices[1] * g.taps[1] - 1) * c.dilation[1]
    whole.wide = whole.columns + (g.slices[2] * g.taps[2] - 1) * c.dilation[2]
    return whole


cdef void _cut_tiles(const Conv *c, const Geometry *g, Py_ssize_t tiles, Blocks *blocks) noexcept nogil:
    """Choose blocks of about so many tiles: whole rows of periods, or parts of one."""
    cdef Py_ssize_t across = ceil_div(c.out[2], g.across), down = ceil_div(c.out[1], g.down)
    cdef Py_ssize_t period = c.dilation[1] * c.dilation[2], most = max(1, tiles // period), least = -1, d, rows
    across = ceil_div(across, ceil_div(across, most))
    for d in range(1, min(down, max(1, most // across)) + 1):  # tiles fill the rows of brgemm's
        rows = down // d * round_up(d * across * period, c.kernels.tile_rows)
        rows += round_up(down % d * across * period, c.kernels.tile_rows)
        if least < 0 or rows <= least:
            least = rows
            blocks.rows = g.down * d
    blocks.columns = g.across * across
    blocks.down = ceil_div(c.out[1], blocks.rows)
    blocks.across = ceil_div(c.out[2], blocks.columns)
    blocks.count = c.out[0] * blocks.down * blocks.across


cdef void _plan_blocks(Plan *plan) noexcept nogil:
    """Choose channel blocks, and blocks of about TILES tiles."""
    cdef const Conv *c = &plan.c
    cdef const Geometry *g = &plan.g
    cdef Py_ssize_t step = max(c.kernels.lanes, c.kernels.depth_step), tiles
    cdef Py_ssize_t most = FEW_CHANNELS if max(g.rows, g.columns) == 4 else CHANNELS
    plan.width = round_up(ceil_div(c.channels, ceil_div(c.channels, most)), step)  # even parts
    plan.channel_blocks = ceil_div(c.channels, plan.width)
    plan.whole = c.depth // plan.width
    plan.most_taps = REDUCTION // plan.width
    tiles = INPUT_BYTES // (g.points * g.count * plan.channel_blocks * plan.width * c.packed)
    _cut_tiles(c, g, max(<Py_ssize_t>min(c.kernels.tile_rows, 16), min(<Py_ssize_t>TILES, tiles)), &plan.blocks)


cdef void _plan_weights(Plan *plan) noexcept nogil:
    """Choose where weights are transformed: of one block of tiles, each panel is used by one task.

    This may look at the batch, for sums are added up in the order of the channels, however the weights are cut.
    """
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t row_bytes = plan.g.points * plan.g.count * c.panel * c.packed  # of a channel
    plan.once = c.batch * plan.blocks.count == 1
    plan.together = plan.channel_blocks
    if plan.once:
        plan.together = min(plan.together, max(1, WEIGHT_BYTES // (PANELS * plan.width * row_bytes)))
    plan.panel_bytes = min(c.depth, plan.together * plan.width) * row_bytes + plan.g.points * LINE_BYTES


# ---------------------------------------------------------------------------------------------------------- weights

cdef int _transform_panel(const void *shared, Py_ssize_t number) noexcept nogil:
    """Transform the weights of one panel of the pass; return 1 if there is no memory."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t pass_panels = plan.end_panel - plan.first_panel
    cdef Py_ssize_t part_bytes = weight_part_bytes(plan)
    cdef char *part = arena(FC_ARENA_BLOCK, part_bytes + plan.g.points * weight_float_bytes(plan))
    if part == NULL:
        return 1
    _transform_weights(
        plan, number // pass_panels, plan.first_panel + number % pass_panels, 0, part, part + part_bytes,
        plan.weights + number * plan.panel_bytes,
    )
    return 0


cdef Py_ssize_t weight_part_bytes(const Plan *plan) noexcept nogil:
    """What the weights of a panel take that are transformed together."""
    return min(plan.c.channels, plan.together * plan.width) * plan.c.taps * plan.c.panel * plan.c.item


cdef Py_ssize_t weight_float_bytes(const Plan *plan) noexcept nogil:
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
    cdef Py_ssize_t point_bytes = plan.panel_bytes // plan.g.points, float_bytes = weight_float_bytes(plan)
    cdef Py_ssize_t[CHANNELS] at
    for n in range(channels):
        at[n] = (((n * c.kernel[0] + d) * c.kernel[1] + h) * c.kernel[2] + w) * width
    cdef fc_tiles tiles = _tiles(&plan.g, at, channels, c.kernel[2] * width, width)
    tiles.high, tiles.wide = <int>(c.kernel[1] - h), <int>(c.kernel[2] - w)
    if plan.g.rows > plan.g.columns:
        tiles.high, tiles.wide = tiles.wide, tiles.high
    if pieces == 0:
        c.kernels.winograd_transform(FC_TAPS, &tiles, part, width, out, point_bytes // c.item)
        return
    c.kernels.winograd_transform(FC_TAPS, &tiles, part, width, floats, float_bytes // c.item)
    for point in range(plan.g.points):
        c.kernels.split_weights(floats + point * float_bytes, channels, 1, vectors, pieces, out + point * point_bytes)


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
    t.whole = _whole_periods(c, g, &t.block)
    t.tiles = t.whole.rows // g.rows * (t.whole.columns // g.columns)
    t.point_bytes = slices * t.tiles * plan.width * c.packed + LINE_BYTES
    t.product_bytes = round_up(t.tiles, c.kernels.tile_rows) * c.panel * c.item + LINE_BYTES

    cdef Py_ssize_t offset_bytes = round_up((2 * t.tiles + slices) * <Py_ssize_t>sizeof(Py_ssize_t), 64)
    cdef Py_ssize_t weight_bytes = PANELS * plan.panel_bytes if plan.once else 0
    cdef Py_ssize_t float_bytes = g.points * max(input_float_bytes(plan, t), weight_float_bytes(plan) if plan.once else 0)
    cdef Py_ssize_t cells = c.kernel[0] * t.whole.high * t.whole.wide
    cdef Py_ssize_t part_bytes = max(plan.width * cells, g.down * t.whole.columns * c.panel) * c.item
    if plan.once:
        part_bytes = max(part_bytes, weight_part_bytes(plan))
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


cdef Py_ssize_t input_float_bytes(const Plan *plan, const Task *t) noexcept nogil:
    """What one point of a slice's inputs takes until it is split."""
    return t.tiles * plan.width * plan.c.item + LINE_BYTES if plan.c.kernels.pieces else 0


cdef bint _fill_inputs(const Plan *plan, Task *t) noexcept nogil:
    """Pack and transform all inputs of the block; return whether their numbers can be summed (and split)."""
    cdef const Conv *c = &plan.c
    cdef const Geometry *g = &plan.g
    cdef Py_ssize_t cells = t.whole.high * t.whole.wide, b, d, h, w, p, cell
    cdef int sizes = 0
    cdef char *out = t.inputs
    _place_tiles(c, g, t.whole.rows, t.whole.columns, t.whole.wide, plan.width, t.offsets)
    for b in range(plan.channel_blocks):
        pack_image(
            c, &t.whole, t.group * c.channels + b * plan.width, min(plan.width, c.channels - b * plan.width), plan.width,
            t.part,
        )
        if not c.kernels.all_below(t.part, c.kernel[0] * cells * plan.width, FC_SUM_LIMIT):
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
    return sizes != FC_TINY


cdef int _transform_inputs(const Plan *plan, const Task *t, const char *cells, char *out) noexcept nogil:
    """Transform what a slice of the filters sees; to be split, by way of ``floats``; then return its numbers' sizes."""
    cdef const Conv *c = &plan.c
    cdef int pieces = c.kernels.pieces, sizes = 0
    cdef Py_ssize_t float_bytes = input_float_bytes(plan, t), point
    cdef fc_tiles tiles = _tiles(
        &plan.g, t.offsets, t.tiles, c.dilation[1] * t.whole.wide * plan.width, c.dilation[2] * plan.width
    )
    if pieces == 0:
        c.kernels.winograd_transform(FC_INPUTS, &tiles, cells, plan.width, out, t.point_bytes // c.item)
        return 0
    c.kernels.winograd_transform(FC_INPUTS, &tiles, cells, plan.width, t.floats, float_bytes // c.item)
    for point in range(plan.g.points):
        sizes |= c.kernels.split_image(
            t.floats + point * float_bytes, t.tiles * plan.width, c.kernels.depth_step, pieces,
            out + point * t.point_bytes,
        )
    return sizes


cdef void _panels(const Plan *plan, const Task *t, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Compute and store the filters of some panels for all tiles of a block."""
    cdef Py_ssize_t pass_panels = plan.end_panel - plan.first_panel, points = plan.g.points, b, point, panel
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
                    weights + (panel - first) * plan.panel_bytes + point * (plan.panel_bytes // points),
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
    cdef fc_reduction reduction
    reduction.apart = 1
    reduction.a_step = 1
    reduction.b_taps = NULL
    reduction.b_step = width
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
    cdef fc_tiles period = _tiles(g, t.cells, tiles, c.dilation[1] * pitch * width, c.dilation[2] * width)
    _place_tiles(c, g, g.down, pitch, pitch, width, t.cells)
    for row from 0 <= row < block.rows by g.down:
        c.kernels.winograd_gather(FC_OUTPUTS, &period, products, t.product_bytes // c.item, width, t.part)
        products += tiles * width * c.item
        for r in range(min(g.down, block.rows - row)):
            store(
                c, block, (row + r) * block.columns, block.columns, t.part + r * pitch * width * c.item,
                width, first, filters, bias_at(plan.bias, first * c.item), plan.relu,
            )


# -------------------------------------------------------------------------------------------- gradient of the weights

# What all tasks of one call share.
ctypedef struct GradPlan:
    WeightPlan w
    Geometry g
    Py_ssize_t point_bytes      # of transformed inputs
    Py_ssize_t grad_bytes       # of a point of transformed gradients
    Py_ssize_t panel_sums       # sums of a point and a panel, and ...
    Py_ssize_t sum_bytes        # ... what those of all its panels take
    unsigned char *refused      # whether there are numbers that are not below FC_SUM_LIMIT

# One task: where its arrays are in the workspace.
ctypedef struct GradTask:
    WeightTask w
    Py_ssize_t tiles            # transformed so far
    Py_ssize_t *offsets         # of each tile
    Py_ssize_t *rows            # of each channel
    Py_ssize_t *parts           # of each APART tiles
    char *inputs                # [point][tile][channel]
    char *grads                 # [point][panel][tile][filter]
    char *sums                  # [point][panel][channel][filter]
    char *part                  # of the image or the gradients: not yet transformed


cdef bint _weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims, options):
    """Compute the gradient; return whether all numbers can be summed."""
    cdef GradPlan plan
    cdef WeightPlan *w = &plan.w
    cdef Conv *c = &w.c
    cdef unsigned char refused = 0
    make_conv(c, input, grad_weight, grad_output, dims, options)
    w.width = round_up(ceil_div(c.channels, ceil_div(c.channels, SUMMED_CHANNELS)), c.kernels.lanes)  # even parts
    w.channel_blocks = 1
    _cut_taps(c, winograd.choose_for_weights(dims), &plan.g)
    _cut_tiles(c, &plan.g, SUMMED_TILES, &w.blocks)
    plan_chunks(w, c.batch * w.blocks.count, grad_bias)
    plan.point_bytes = SUMMED_TILES * w.width * c.item + LINE_BYTES
    plan.grad_bytes = WEIGHT_PANELS * SUMMED_TILES * c.panel * c.item + LINE_BYTES
    plan.panel_sums = ceil_div(w.width, c.kernels.tile_rows) * c.kernels.tile_rows * c.panel
    plan.sum_bytes = WEIGHT_PANELS * plan.panel_sums * c.item + LINE_BYTES
    plan.refused = &refused
    run_tasks(_weight_task, &plan, w.chunks * w.tasks, c.threads)
    sum_chunks(w)
    return not refused


cdef int _weight_task(const void *shared, Py_ssize_t number) noexcept nogil:
    """Sum one chunk of the blocks for one task's channels and filters."""
    cdef const GradPlan *plan = <const GradPlan *>shared
    cdef const WeightPlan *w = &plan.w
    cdef GradTask t
    cdef Block block, whole
    cdef Py_ssize_t unit, tiles
    if start_task(w, number, &t.w) or _place(plan, &t):
        return 1
    for unit in range(t.w.first_unit, t.w.end_unit):
        locate(&w.c, &w.blocks, unit, &block)
        whole = _whole_periods(&w.c, &plan.g, &block)
        tiles = whole.rows // plan.g.rows * (whole.columns // plan.g.columns)
        if t.tiles + tiles > SUMMED_TILES:
            _sum_tiles(plan, &t)
        if not (_add_inputs(plan, &t, &whole, tiles) and _add_grads(plan, &t, &block, &whole, tiles)):
            plan.refused[0] = 1
            break
        t.tiles += tiles
    _sum_tiles(plan, &t)
    _transform_sums(plan, &t)
    end_task(w, &t.w)
    return 0


cdef int _place(const GradPlan *plan, GradTask *t) noexcept nogil:
    """Find room for a task's arrays, clear its sums; return 1 if there is no memory."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef Py_ssize_t offset_bytes = (SUMMED_TILES + w.width + SUMMED_TILES // APART + 8) // 8 * 64
    cdef Py_ssize_t points = plan.g.points, i
    cdef Py_ssize_t high = w.blocks.rows + (c.kernel[1] - 1) * c.dilation[1]
    cdef Py_ssize_t wide = w.blocks.columns + (c.kernel[2] - 1) * c.dilation[2]
    cdef Py_ssize_t cells = max(high * wide * w.width, w.blocks.rows * w.blocks.columns * c.panel)
    cdef char *memory = arena(
        FC_ARENA_BLOCK, offset_bytes + points * (plan.point_bytes + plan.grad_bytes + plan.sum_bytes) + cells * c.item
    )
    if memory == NULL:
        return 1
    t.tiles = 0
    t.offsets = <Py_ssize_t *>memory
    t.rows = t.offsets + SUMMED_TILES
    t.parts = t.rows + w.width
    t.inputs = memory + offset_bytes
    t.grads = t.inputs + points * plan.point_bytes
    t.sums = t.grads + points * plan.grad_bytes
    t.part = t.sums + points * plan.sum_bytes
    for i in range(w.width):
        t.rows[i] = i
    for i in range(SUMMED_TILES // APART):
        t.parts[i] = i * APART * w.width
    memset(t.sums, 0, <size_t>(points * plan.sum_bytes))
    return 0


cdef bint _add_inputs(const GradPlan *plan, const GradTask *t, const Block *whole, Py_ssize_t count) noexcept nogil:
    """Pack and transform a block's inputs; return whether their numbers can be summed."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef fc_tiles tiles = _tiles(
        &plan.g, t.offsets, count, c.dilation[1] * whole.wide * w.width, c.dilation[2] * w.width
    )
    pack_image(
        c, whole, t.w.group * c.channels + t.w.channel, min(w.width, c.channels - t.w.channel), w.width, t.part
    )
    if not c.kernels.all_below(t.part, w.width * whole.high * whole.wide, FC_SUM_LIMIT):
        return False
    _place_tiles(c, &plan.g, whole.rows, whole.columns, whole.wide, w.width, t.offsets)
    c.kernels.winograd_transform(
        FC_INPUTS, &tiles, t.part, w.width, t.inputs + t.tiles * w.width * c.item, plan.point_bytes // c.item
    )
    return True


cdef bint _add_grads(const GradPlan *plan, const GradTask *t, const Block *block, const Block *whole,
                     Py_ssize_t count) noexcept nogil:
    """Pack and transform a block's gradients, panel by panel; return whether their numbers can be summed."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef Py_ssize_t panel, width, filter, row, cells = whole.rows * whole.columns
    cdef fc_tiles tiles
    for panel in range(t.w.panels):
        width = panel_vectors(c, t.w.panel + panel) * c.kernels.lanes
        filter = (t.w.panel + panel) * c.panel
        if block.rows * block.columns < cells:
            memset(t.part, 0, <size_t>(cells * width * c.item))
        for row in range(block.rows):
            pack_pixels(
                c, block, t.w.group * c.filters + filter, min(width, c.filters - filter), width, row * block.columns,
                block.columns, t.part + row * whole.columns * width * c.item,
            )
        if not c.kernels.all_below(t.part, cells * width, FC_SUM_LIMIT):
            return False
        add_bias(w, &t.w, panel, t.part, cells)
        _place_tiles(c, &plan.g, whole.rows, whole.columns, whole.columns, width, t.offsets)
        tiles = _tiles(&plan.g, t.offsets, count, c.dilation[1] * whole.columns * width, c.dilation[2] * width)
        c.kernels.winograd_transform(
            FC_OUTPUTS, &tiles, t.part, width,
            t.grads + (panel * SUMMED_TILES * c.panel + t.tiles * width) * c.item, plan.grad_bytes // c.item,
        )
    return True


cdef void _sum_tiles(const GradPlan *plan, GradTask *t) noexcept nogil:
    """Add the products of all tiles that are transformed to the sums, those of APART tiles at a time."""
    cdef Py_ssize_t whole = t.tiles // APART * APART
    if whole > 0:
        _add_products(plan, t, 0, APART, whole // APART)
    if whole < t.tiles:
        _add_products(plan, t, whole, t.tiles - whole, 1)
    t.tiles = 0


cdef void _add_products(const GradPlan *plan, const GradTask *t, Py_ssize_t first, Py_ssize_t depth,
                        Py_ssize_t parts) noexcept nogil:
    """Add the products of so many parts of ``depth`` tiles, from tile ``first`` on, to the sums."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef Py_ssize_t point, panel, width
    cdef const char *inputs
    cdef const char *grads
    cdef char *sums
    cdef fc_reduction reduction
    reduction.apart = 1
    reduction.taps = t.parts
    reduction.n_taps = parts
    reduction.depth = depth
    reduction.a_step = w.width
    reduction.b_taps = NULL
    for point in range(plan.g.points):
        inputs = t.inputs + point * plan.point_bytes + first * w.width * c.item
        for panel in range(t.w.panels):
            width = panel_vectors(c, t.w.panel + panel) * c.kernels.lanes
            reduction.b_step = width
            reduction.b_tap = depth * width
            grads = t.grads + point * plan.grad_bytes + (panel * SUMMED_TILES * c.panel + first * width) * c.item
            sums = t.sums + point * plan.sum_bytes + panel * plan.panel_sums * c.item
            c.kernels.brgemm(&reduction, inputs, t.rows, w.width, grads, <int>(width // c.kernels.lanes), sums, 1)


cdef void _transform_sums(const GradPlan *plan, const GradTask *t) noexcept nogil:
    """Transform the sums back to what ``weight_chunks`` adds up and stores."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef Py_ssize_t zero = 0, panel, size
    cdef fc_tiles taps
    for panel in range(t.w.panels):
        size = w.width * panel_vectors(c, t.w.panel + panel) * c.kernels.lanes
        taps = _tiles(&plan.g, &zero, 1, c.kernel[2] * size, size)
        c.kernels.winograd_gather(
            FC_TAPS, &taps, t.sums + panel * plan.panel_sums * c.item, plan.sum_bytes // c.item, size,
            t.w.accumulators + panel * c.panel * w.width * c.taps * c.item,
        )
