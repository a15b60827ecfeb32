"""Winograd's F(2x2, 3x3): 16 multiplications for what a 3x3 filter takes 36 for.

    output tile (2x2) = At [ sum over channels of (G g Gt) * (Bt d B) ] A,     d: 4x4 inputs, g: 3x3 filter

    transform the weights, all or (where they are large) half the panels at a time, unless each is used by one task
    for image, group, block of tiles, share of the panels:                 in parallel
        pack the part of the image that the block sees                     as conv_direct does
        transform it                                                       [point of 16][channel block][tile][width]
        for some panels of filters:
            for some channel blocks (all, or what fits L2):                transform weights that only this task uses
                for point: for panel: for tile of rows: brgemm             16 independent matrix products
            for panel: transform back, store: bias, activation, layout

      inputs of a point          panel                products, [panel][point][tile][filter]
      +---------------+       +----------+            +----------+
      |    tiles x    |   x   | channels |     =      |  tiles x |
      |   channels    |       | x width  |            |  width   |
      +---------------+       +----------+            +----------+

The gradient of the weights is a product of the same transformed inputs and of transformed gradients, summed over tiles:

    grad_weight (3x3) = Gt [ sum over tiles of (Bt d B) (A g At) ] G,          g: 2x2 gradients of the output

    for chunk of the blocks of all images, block of channels, panels of filters:     in parallel
        pack and transform both, until there are enough tiles          [point][tile][width], [point][panel][tile][filter]
        for point: for panel: for tile of channels: brgemm             the reduction runs along the tiles
        transform the sums back                                        [point][panel][channel][filter]: L2

The error is below that of summing all 9 * C products one after another (docs/performance.md). But sums of inputs can overflow,
or make a NaN of two infinities, where single products would not: an image that holds such numbers is left to conv_direct.
Where the machine has a tile that multiplies pieces of numbers (``split_numbers``), transformed inputs and weights are split;
parts of nothing but tiny numbers are left to conv_direct, too.

A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
"""

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels import interleave
from fastconv.kernels.native.blocking cimport (
    Block, Blocks, Conv, bias_at, ceil_div, locate, make_conv, pack_bias, pack_image, pack_panel, pack_pixels,
    panel_vectors, run_tasks, share_out, split_numbers, store,
)
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_SUM_LIMIT, FC_TINY, Memory, arena, fc_reduction,
)
from fastconv.kernels.native.weight_chunks cimport (
    WEIGHT_PANELS, WeightPlan, WeightTask, add_bias, end_task, plan_chunks, start_task, sum_chunks,
)

from fastconv.kernels.native import conv_direct

cdef enum:
    POINTS = 16
    CHANNELS = 64               # channel block: a row of a tile is four cache lines
    REDUCTION = 256             # channels that one brgemm reduces over: a panel's share is 16 KB of L1 in float32
    TILES = 64                  # tiles of a block, about; fewer where there are many channels
    SUMMED_TILES = 64           # tiles that one brgemm of the weight gradient reduces over, at most
    INPUT_BYTES = 1 << 21       # transformed inputs of a block, at most
    PANELS = 4                  # panels that one pass over the transformed inputs multiplies
    WEIGHT_BYTES = 1 << 19      # transformed weights of those panels, where they are used once: mostly in L2
    SPARE_BYTES = 4 << 20       # that transformed weights may take more than the weights
    LINE_BYTES = 64             # between the points of an array, lest all 16 fall into the same set of L1

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


# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    Blocks blocks               # rows and columns are even
    Py_ssize_t width            # channels in a block
    Py_ssize_t channel_blocks
    bint ready                  # the weights were kept from an earlier call
    bint once                   # each panel's weights are used by one task: it transforms them itself
    Py_ssize_t together         # channel blocks whose weights are transformed together
    Py_ssize_t first_panel      # of a pass: the panels whose weights are transformed
    Py_ssize_t end_panel
    Py_ssize_t shares           # tasks that share the panels of one block
    Py_ssize_t panel_bytes      # of transformed weights
    char *weights               # [group][panel of the pass][point][channel][filter]
    const char *bias
    int relu
    unsigned char *refused      # images with numbers that are not below FC_SUM_LIMIT; the last one stands for the weights

# One task: its block, and where its arrays are in the workspace.
ctypedef struct Task:
    Block block
    Py_ssize_t group
    Py_ssize_t tiles, across
    Py_ssize_t point_bytes      # of transformed inputs
    Py_ssize_t product_bytes    # of a point and a panel
    Py_ssize_t *offsets         # of each tile
    Py_ssize_t *taps            # of each channel block
    char *inputs                # [point][channel block][tile][width]
    char *weights               # [panel][point][channel][filter]: its own, if they are used once
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
    _plan_blocks(&plan)
    _plan_weights(&plan)
    # Transformed weights are 16/9 of the weights, split ones 24/9. Where that is much, they come half by half.
    spare = c.groups * (c.panels * plan.panel_bytes - c.filters * c.channels * c.taps * c.item)
    kept = None if plan.once else options.packed
    passes = 2 if c.panels > 1 and spare > SPARE_BYTES and not plan.once and kept is None else 1
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
        form = ("winograd", c.item, c.kernels.pieces, plan.width)
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


cdef void _plan_blocks(Plan *plan) noexcept nogil:
    """Choose channel blocks, and blocks of about TILES tiles."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t step = max(c.kernels.lanes, c.kernels.depth_step), tiles
    plan.width = min(<Py_ssize_t>CHANNELS, ceil_div(c.channels, step) * step)
    plan.channel_blocks = ceil_div(c.channels, plan.width)
    tiles = INPUT_BYTES // (POINTS * plan.channel_blocks * plan.width * c.packed)
    tiles = max(<Py_ssize_t>min(c.kernels.tile_rows, 16), min(<Py_ssize_t>TILES, tiles))
    _cut_tiles(c, tiles, &plan.blocks)


cdef void _cut_tiles(const Conv *c, Py_ssize_t tiles, Blocks *blocks) noexcept nogil:
    """Choose blocks of at most so many tiles: whole rows of them, or parts of one."""
    cdef Py_ssize_t across = ceil_div(c.out[2], 2), down = ceil_div(c.out[1], 2)
    across = ceil_div(across, ceil_div(across, tiles))
    down = ceil_div(down, ceil_div(down, max(1, tiles // across)))
    blocks.rows = 2 * down
    blocks.columns = 2 * across
    blocks.down = ceil_div(c.out[1], blocks.rows)
    blocks.across = ceil_div(c.out[2], blocks.columns)
    blocks.count = c.out[0] * blocks.down * blocks.across


cdef void _plan_weights(Plan *plan) noexcept nogil:
    """Choose where weights are transformed: of one block of tiles, each panel is used by one task.

    This may look at the batch, for brgemm adds to its sums in the order of the channels, however they are cut.
    """
    cdef const Conv *c = &plan.c
    plan.once = c.batch * plan.blocks.count == 1
    plan.together = plan.channel_blocks
    if plan.once:
        plan.together = min(plan.together, max(1, WEIGHT_BYTES // (PANELS * POINTS * plan.width * c.panel * c.packed)))
    plan.panel_bytes = POINTS * (min(c.depth, plan.together * plan.width) * c.panel * c.packed + LINE_BYTES)


# ---------------------------------------------------------------------------------------------------------- weights

cdef int _transform_panel(const void *shared, Py_ssize_t number) noexcept nogil:
    """Transform the weights of one panel of the pass; return 1 if there is no memory."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t pass_panels = plan.end_panel - plan.first_panel
    cdef Py_ssize_t part_bytes = weight_part_bytes(plan)
    cdef char *part = arena(FC_ARENA_BLOCK, part_bytes + POINTS * weight_float_bytes(plan))
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
    """What one point of them takes until it is split."""
    if plan.c.kernels.pieces == 0:
        return 0
    return min(plan.c.channels, plan.together * plan.width) * plan.c.panel * plan.c.item + LINE_BYTES


cdef void _transform_weights(const Plan *plan, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t b, char *part,
                             char *floats, char *out) noexcept nogil:
    """Pack and transform weights of a panel, from channel block ``b`` on; to be split, by way of ``floats``."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, panel), pieces = c.kernels.pieces
    cdef Py_ssize_t width = vectors * c.kernels.lanes, first = b * plan.width, point
    cdef Py_ssize_t channels = min(c.channels - first, plan.together * plan.width)
    cdef Py_ssize_t point_bytes = plan.panel_bytes // POINTS, float_bytes = weight_float_bytes(plan)
    pack_panel(c, group, panel, first, channels, part)
    if not c.kernels.all_below(part, channels * c.taps * width, FC_SUM_LIMIT):
        plan.refused[c.batch] = 1
    if pieces == 0:
        c.kernels.winograd_weight(part, channels, width, out, point_bytes // c.item)
        return
    c.kernels.winograd_weight(part, channels, width, floats, float_bytes // c.item)
    for point in range(POINTS):
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
    t.group = number % c.groups
    locate(c, &plan.blocks, number // c.groups, &t.block)
    t.across = ceil_div(t.block.columns, 2)
    t.tiles = t.across * ceil_div(t.block.rows, 2)
    t.point_bytes = plan.channel_blocks * t.tiles * plan.width * c.packed + LINE_BYTES
    t.product_bytes = ceil_div(t.tiles, c.kernels.tile_rows) * c.kernels.tile_rows * c.panel * c.item + LINE_BYTES

    cdef Py_ssize_t offset_bytes = (t.tiles + plan.channel_blocks + 8) // 8 * 64
    cdef Py_ssize_t weight_bytes = PANELS * plan.panel_bytes if plan.once else 0
    cdef Py_ssize_t float_bytes = POINTS * max(input_float_bytes(plan, t), weight_float_bytes(plan) if plan.once else 0)
    cdef Py_ssize_t cells = (t.block.high + t.block.rows % 2) * (t.block.wide + t.block.columns % 2)
    cdef Py_ssize_t part_bytes = max(plan.width * cells, 4 * t.across * c.panel) * c.item
    if plan.once:
        part_bytes = max(part_bytes, weight_part_bytes(plan))
    cdef char *memory = arena(
        FC_ARENA_BLOCK,
        offset_bytes + POINTS * t.point_bytes + weight_bytes + PANELS * POINTS * t.product_bytes
        + float_bytes + part_bytes,
    )
    if memory == NULL:
        return 1
    t.offsets = <Py_ssize_t *>memory
    t.taps = t.offsets + t.tiles
    t.inputs = memory + offset_bytes
    t.weights = t.inputs + POINTS * t.point_bytes
    t.products = t.weights + weight_bytes
    t.floats = t.products + PANELS * POINTS * t.product_bytes
    t.part = t.floats + float_bytes
    return 0


cdef Py_ssize_t input_float_bytes(const Plan *plan, const Task *t) noexcept nogil:
    """What one point of a channel block's inputs takes until it is split."""
    return t.tiles * plan.width * plan.c.item + LINE_BYTES if plan.c.kernels.pieces else 0


cdef bint _fill_inputs(const Plan *plan, Task *t) noexcept nogil:
    """Pack and transform all inputs of the block; return whether their numbers can be summed (and split)."""
    cdef const Conv *c = &plan.c
    cdef Block even = _whole_tiles(&t.block)
    cdef Py_ssize_t b, p
    cdef int sizes = 0
    _tile_offsets(&even, even.wide, plan.width, t.offsets)
    for b in range(plan.channel_blocks):
        pack_image(
            c, &even, t.group * c.channels + b * plan.width, min(plan.width, c.channels - b * plan.width), plan.width,
            t.part,
        )
        if not c.kernels.all_below(t.part, plan.width * even.high * even.wide, FC_SUM_LIMIT):
            return False
        t.taps[b] = b * t.tiles * plan.width
        sizes |= _transform_inputs(plan, t, even.wide * plan.width, t.inputs + t.taps[b] * c.packed)
    for p in range(t.tiles):
        t.offsets[p] = p * plan.width
    return sizes != FC_TINY


cdef Block _whole_tiles(const Block *block) noexcept nogil:
    """Return a block with an odd last row and column made even: they are computed, and not stored (or are zeros)."""
    cdef Block even = block[0]
    even.rows += even.rows % 2
    even.columns += even.columns % 2
    even.high = even.rows + 2
    even.wide = even.columns + 2
    return even


cdef void _tile_offsets(const Block *even, Py_ssize_t pitch, Py_ssize_t width, Py_ssize_t *offsets) noexcept nogil:
    """Write where each tile of a block starts among cells of ``width``, in rows of ``pitch`` cells."""
    cdef Py_ssize_t row, column, p = 0
    for row from 0 <= row < even.rows by 2:
        for column from 0 <= column < even.columns by 2:
            offsets[p] = (row * pitch + column) * width
            p += 1


cdef int _transform_inputs(const Plan *plan, const Task *t, Py_ssize_t row_step, char *out) noexcept nogil:
    """Transform a channel block of the part; to be split, by way of ``floats``; then return its numbers' sizes."""
    cdef const Conv *c = &plan.c
    cdef int pieces = c.kernels.pieces, sizes = 0
    cdef Py_ssize_t float_bytes = input_float_bytes(plan, t), point
    if pieces == 0:
        c.kernels.winograd_input(t.offsets, t.tiles, t.part, row_step, plan.width, out, t.point_bytes // c.item)
        return 0
    c.kernels.winograd_input(t.offsets, t.tiles, t.part, row_step, plan.width, t.floats, float_bytes // c.item)
    for point in range(POINTS):
        sizes |= c.kernels.split_image(
            t.floats + point * float_bytes, t.tiles * plan.width, c.kernels.depth_step, pieces,
            out + point * t.point_bytes,
        )
    return sizes


cdef void _panels(const Plan *plan, const Task *t, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Compute and store the filters of some panels for all tiles of a block."""
    cdef Py_ssize_t pass_panels = plan.end_panel - plan.first_panel, b, point, panel
    cdef char *weights = t.weights
    if not plan.once:
        weights = plan.weights + (t.group * pass_panels + first - plan.first_panel) * plan.panel_bytes
    for b from 0 <= b < plan.channel_blocks by plan.together:
        if plan.once:
            for panel in range(first, end):
                _transform_weights(
                    plan, t.group, panel, b, t.part, t.floats, weights + (panel - first) * plan.panel_bytes
                )
        for point in range(POINTS):
            for panel in range(first, end):
                _multiply(
                    plan, t, panel, b, t.inputs + point * t.point_bytes,
                    weights + (panel - first) * plan.panel_bytes + point * (plan.panel_bytes // POINTS),
                    t.products + ((panel - first) * POINTS + point) * t.product_bytes,
                )
    for panel in range(first, end):
        _store_panel(plan, t, panel, t.products + (panel - first) * POINTS * t.product_bytes)


cdef void _multiply(const Plan *plan, const Task *t, Py_ssize_t panel, Py_ssize_t first, const char *inputs,
                    const char *weights, char *products) noexcept nogil:
    """Multiply the inputs of one point by one panel's weights, of channel blocks from ``first`` on."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, panel), tile_rows = c.kernels.tile_rows
    cdef Py_ssize_t width = vectors * c.kernels.lanes, b = first, m
    cdef Py_ssize_t end = min(first + plan.together, plan.channel_blocks)
    cdef Py_ssize_t whole = c.depth // plan.width  # full channel blocks; a last, narrower one is a reduction of its own
    cdef fc_reduction reduction
    reduction.a_step = 1
    reduction.b_taps = NULL
    reduction.b_tap = plan.width * width
    reduction.b_step = width
    while b < end:
        reduction.taps = t.taps + b
        reduction.n_taps = min(REDUCTION // plan.width, min(end, whole) - b) if b < whole else 1
        reduction.depth = plan.width if b < whole else c.depth - whole * plan.width
        for m from 0 <= m < t.tiles by tile_rows:
            c.kernels.brgemm(
                &reduction, inputs, t.offsets + m, <int>min(tile_rows, t.tiles - m),
                weights + (b - first) * plan.width * width * c.packed, vectors, products + m * width * c.item, b > 0,
            )
        b += reduction.n_taps


cdef void _store_panel(const Plan *plan, const Task *t, Py_ssize_t panel, const char *products) noexcept nogil:
    """Transform one panel's products back and store them, two output rows at a time."""
    cdef const Conv *c = &plan.c
    cdef const Block *block = &t.block
    cdef Py_ssize_t width = panel_vectors(c, panel) * c.kernels.lanes, row, r
    cdef Py_ssize_t first = t.group * c.filters + panel * c.panel
    cdef Py_ssize_t filters = min(width, c.filters - panel * c.panel)
    for row in range(t.tiles // t.across):
        c.kernels.winograd_output(
            products + row * t.across * width * c.item, t.product_bytes // c.item, t.across, width, t.part
        )
        for r in range(min(<Py_ssize_t>2, block.rows - 2 * row)):
            store(
                c, block, (2 * row + r) * block.columns, block.columns, t.part + r * 2 * t.across * width * c.item,
                width, first, filters, bias_at(plan.bias, first * c.item), plan.relu,
            )


# -------------------------------------------------------------------------------------------- gradient of the weights

# What all tasks of one call share.
ctypedef struct GradPlan:
    WeightPlan w
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
    w.width = ceil_div(c.channels, ceil_div(c.channels, CHANNELS))  # even parts
    w.width = ceil_div(w.width, c.kernels.lanes) * c.kernels.lanes
    w.channel_blocks = 1
    _cut_tiles(c, SUMMED_TILES, &w.blocks)
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
    cdef Block block, even
    cdef Py_ssize_t unit
    if start_task(w, number, &t.w) or _place(plan, &t):
        return 1
    for unit in range(t.w.first_unit, t.w.end_unit):
        locate(&w.c, &w.blocks, unit, &block)
        even = _whole_tiles(&block)
        if t.tiles + even.rows * even.columns // 4 > SUMMED_TILES:
            _sum_tiles(plan, &t)
        if not (_add_inputs(plan, &t, &even) and _add_grads(plan, &t, &block, &even)):
            plan.refused[0] = 1
            break
        t.tiles += even.rows * even.columns // 4
    _sum_tiles(plan, &t)
    _transform_sums(plan, &t)
    end_task(w, &t.w)
    return 0


cdef int _place(const GradPlan *plan, GradTask *t) noexcept nogil:
    """Find room for a task's arrays, clear its sums; return 1 if there is no memory."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef Py_ssize_t offset_bytes = (SUMMED_TILES + w.width + 8) // 8 * 64, i
    cdef Py_ssize_t cells = max(
        (w.blocks.rows + 2) * (w.blocks.columns + 2) * w.width, w.blocks.rows * w.blocks.columns * c.panel
    )
    cdef char *memory = arena(
        FC_ARENA_BLOCK, offset_bytes + POINTS * (plan.point_bytes + plan.grad_bytes + plan.sum_bytes) + cells * c.item
    )
    if memory == NULL:
        return 1
    t.tiles = 0
    t.offsets = <Py_ssize_t *>memory
    t.rows = t.offsets + SUMMED_TILES
    t.inputs = memory + offset_bytes
    t.grads = t.inputs + POINTS * plan.point_bytes
    t.sums = t.grads + POINTS * plan.grad_bytes
    t.part = t.sums + POINTS * plan.sum_bytes
    for i in range(w.width):
        t.rows[i] = i
    memset(t.sums, 0, <size_t>(POINTS * plan.sum_bytes))
    return 0


cdef bint _add_inputs(const GradPlan *plan, const GradTask *t, const Block *even) noexcept nogil:
    """Pack and transform a block's inputs; return whether their numbers can be summed."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    pack_image(
        c, even, t.w.group * c.channels + t.w.channel, min(w.width, c.channels - t.w.channel), w.width, t.part
    )
    if not c.kernels.all_below(t.part, w.width * even.high * even.wide, FC_SUM_LIMIT):
        return False
    _tile_offsets(even, even.wide, w.width, t.offsets)
    c.kernels.winograd_input(
        t.offsets, even.rows * even.columns // 4, t.part, even.wide * w.width, w.width,
        t.inputs + t.tiles * w.width * c.item, plan.point_bytes // c.item,
    )
    return True


cdef bint _add_grads(const GradPlan *plan, const GradTask *t, const Block *block, const Block *even) noexcept nogil:
    """Pack and transform a block's gradients, panel by panel; return whether their numbers can be summed."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef Py_ssize_t panel, width, filter, row, cells = even.rows * even.columns
    for panel in range(t.w.panels):
        width = panel_vectors(c, t.w.panel + panel) * c.kernels.lanes
        filter = (t.w.panel + panel) * c.panel
        if block.rows * block.columns < cells:
            memset(t.part, 0, <size_t>(cells * width * c.item))
        for row in range(block.rows):
            pack_pixels(
                c, block, t.w.group * c.filters + filter, min(width, c.filters - filter), width, row * block.columns,
                block.columns, t.part + row * even.columns * width * c.item,
            )
        if not c.kernels.all_below(t.part, cells * width, FC_SUM_LIMIT):
            return False
        add_bias(w, &t.w, panel, t.part, cells)
        _tile_offsets(even, even.columns, width, t.offsets)
        c.kernels.winograd_grad(
            t.offsets, cells // 4, t.part, even.columns * width, width,
            t.grads + (panel * SUMMED_TILES * c.panel + t.tiles * width) * c.item, plan.grad_bytes // c.item,
        )
    return True


cdef void _sum_tiles(const GradPlan *plan, GradTask *t) noexcept nogil:
    """Add the products of all tiles that are transformed to the sums."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef Py_ssize_t zero = 0, point, panel, width, m
    cdef const char *grads
    cdef char *sums
    cdef fc_reduction reduction
    reduction.taps = &zero
    reduction.n_taps = 1
    reduction.depth = t.tiles
    reduction.a_step = w.width
    reduction.b_taps = NULL
    reduction.b_tap = 0
    for point in range(POINTS):
        for panel in range(t.w.panels):
            width = panel_vectors(c, t.w.panel + panel) * c.kernels.lanes
            reduction.b_step = width
            grads = t.grads + point * plan.grad_bytes + panel * SUMMED_TILES * c.panel * c.item
            sums = t.sums + point * plan.sum_bytes + panel * plan.panel_sums * c.item
            for m from 0 <= m < w.width by c.kernels.tile_rows:
                c.kernels.brgemm(
                    &reduction, t.inputs + point * plan.point_bytes, t.rows + m,
                    <int>min(<Py_ssize_t>c.kernels.tile_rows, w.width - m), grads, width // c.kernels.lanes,
                    sums + m * width * c.item, 1,
                )
    t.tiles = 0


cdef void _transform_sums(const GradPlan *plan, const GradTask *t) noexcept nogil:
    """Transform the sums back to what ``weight_chunks`` adds up and stores."""
    cdef const WeightPlan *w = &plan.w
    cdef const Conv *c = &w.c
    cdef Py_ssize_t panel, size
    for panel in range(t.w.panels):
        size = w.width * panel_vectors(c, t.w.panel + panel) * c.kernels.lanes
        c.kernels.winograd_weight_grad(
            t.sums + panel * plan.panel_sums * c.item, plan.sum_bytes // c.item, size,
            t.w.accumulators + panel * c.panel * w.width * c.taps * c.item, size,
        )
