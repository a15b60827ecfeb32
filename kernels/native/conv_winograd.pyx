"""Winograd's F(2x2, 3x3): 16 multiplications for what a 3x3 filter takes 36 for.

    output tile (2x2) = At [ sum over channels of (G g Gt) * (Bt d B) ] A,     d: 4x4 inputs, g: 3x3 filter

    transform the weights, all or (where they are large) half the panels at a time
    for image, group, block of tiles, share of the panels:                 in parallel
        pack the part of the image that the block sees                     as conv_direct does
        transform it                                                       [point of 16][channel block][tile][width]
        for some panels of filters:
            for point: for panel: for tile of rows: brgemm over channels   16 independent matrix products
            for panel: transform back, store: bias, activation, layout

      inputs of a point          panel                products, [panel][point][tile][filter]
      +---------------+       +----------+            +----------+
      |    tiles x    |   x   | channels |     =      |  tiles x |
      |   channels    |       | x width  |            |  width   |
      +---------------+       +----------+            +----------+

The error is below that of summing all 9 * C products one after another (docs/performance.md). But sums of inputs can overflow,
or make a NaN of two infinities, where single products would not: an image that holds such numbers is left to conv_direct.
Where the machine has a tile that multiplies pieces of numbers (``split_numbers``), transformed inputs and weights are split;
parts of nothing but tiny numbers are left to conv_direct, too.

A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
"""

cimport numpy as cnp
from cython.parallel cimport prange

from fastconv.kernels import interleave
from fastconv.kernels.native.blocking cimport (
    Block, Blocks, Conv, bias_at, ceil_div, locate, make_conv, pack_bias, pack_image, pack_panel, panel_vectors,
    split_numbers, store,
)
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_SUM_LIMIT, FC_TINY, arena, fc_reduction,
)

from fastconv.kernels.native import conv_direct

cdef enum:
    POINTS = 16
    CHANNELS = 64               # channel block: a row of a tile is four cache lines
    REDUCTION = 256             # channels that one brgemm reduces over: a panel's share is 16 KB of L1 in float32
    TILES = 64                  # tiles of a block, about; fewer where there are many channels
    INPUT_BYTES = 1 << 21       # transformed inputs of a block, at most
    PANELS = 4                  # panels that one pass over the transformed inputs multiplies
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


# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    Blocks blocks               # rows and columns are even
    Py_ssize_t width            # channels in a block
    Py_ssize_t channel_blocks
    Py_ssize_t first_panel      # of a pass: the panels whose weights are transformed
    Py_ssize_t end_panel
    Py_ssize_t panel_bytes      # of transformed weights
    char *weights               # [group][panel of the pass][point][channel][filter]
    const char *bias
    int relu
    unsigned char *refused      # images with numbers that are not below FC_SUM_LIMIT


cdef list _forward(cnp.ndarray input, cnp.ndarray weight, bias, cnp.ndarray output, dims, options):
    """Convolve; return the images that were left out."""
    cdef Plan plan
    cdef Conv *c = &plan.c
    cdef Py_ssize_t most, bias_bytes
    cdef unsigned char[::1] refused
    make_conv(c, input, weight, output, dims, options)
    split_numbers(c, PRECISION[options.precision])
    _plan_blocks(&plan)
    plan.panel_bytes = POINTS * (c.depth * c.panel * c.packed + LINE_BYTES)
    # Transformed weights are 16/9 of the weights, split ones 24/9. Where that is much, they come half by half.
    spare = c.groups * (c.panels * plan.panel_bytes - c.filters * c.channels * c.taps * c.item)
    passes = 2 if c.panels > 1 and spare > SPARE_BYTES else 1
    bias_bytes = c.groups * c.filters * c.item
    most = c.groups * ceil_div(c.panels, passes) * plan.panel_bytes
    plan.weights = arena(FC_ARENA_WEIGHTS, most + bias_bytes + LINE_BYTES)
    if plan.weights == NULL:
        raise MemoryError("no memory for packed weights")
    plan.bias = pack_bias(c, bias, plan.weights + most)
    plan.relu = options.activation == "relu"
    refused = bytearray(c.batch + 1)
    plan.refused = &refused[0]
    for number in range(passes):
        plan.first_panel = c.panels * number // passes
        plan.end_panel = c.panels * (number + 1) // passes
        if not _run_pass(&plan):
            return list(range(c.batch))
    return [image for image in range(c.batch) if refused[image]]


cdef bint _run_pass(const Plan *plan) except -1:
    """Compute the panels of one pass; return whether the weights are below FC_SUM_LIMIT."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t panels = c.groups * (plan.end_panel - plan.first_panel)
    cdef Py_ssize_t blocks = c.batch * c.groups * plan.blocks.count
    cdef Py_ssize_t task, refused = 0, failures = 0
    cdef Py_ssize_t shares = max(
        1, min(ceil_div(plan.end_panel - plan.first_panel, PANELS), 2 * c.threads // max(blocks, 1))
    )  # tasks that share the panels of one block
    with nogil:
        for task in prange(panels, num_threads=c.threads, schedule="static"):
            refused += _transform_panel(plan, task)
    if refused:
        return False
    with nogil:
        for task in prange(blocks * shares, num_threads=c.threads, schedule="dynamic"):
            failures += _forward_task(plan, task // shares, task % shares, shares)
    if failures:
        raise MemoryError("no memory for the workspace of a convolution")
    return True


cdef void _plan_blocks(Plan *plan) noexcept nogil:
    """Choose channel blocks, and blocks of about TILES tiles."""
    cdef const Conv *c = &plan.c
    cdef Blocks *blocks = &plan.blocks
    cdef Py_ssize_t step = max(c.kernels.lanes, c.kernels.depth_step), tiles, across, down
    plan.width = min(<Py_ssize_t>CHANNELS, ceil_div(c.channels, step) * step)
    plan.channel_blocks = ceil_div(c.channels, plan.width)
    tiles = INPUT_BYTES // (POINTS * plan.channel_blocks * plan.width * c.packed)
    tiles = max(<Py_ssize_t>min(c.kernels.tile_rows, 16), min(<Py_ssize_t>TILES, tiles))
    across = ceil_div(c.out[2], 2)
    across = ceil_div(across, ceil_div(across, tiles))
    down = ceil_div(c.out[1], 2)
    down = ceil_div(down, ceil_div(down, max(1, tiles // across)))
    blocks.rows = 2 * down
    blocks.columns = 2 * across
    blocks.down = ceil_div(c.out[1], blocks.rows)
    blocks.across = ceil_div(c.out[2], blocks.columns)
    blocks.count = c.out[0] * blocks.down * blocks.across


cdef int _transform_panel(const Plan *plan, Py_ssize_t number) noexcept nogil:
    """Pack and transform the weights of one panel; return 1 if they are not below FC_SUM_LIMIT (or no memory)."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t pass_panels = plan.end_panel - plan.first_panel
    cdef Py_ssize_t panel = plan.first_panel + number % pass_panels
    cdef int vectors = panel_vectors(c, panel), pieces = c.kernels.pieces
    cdef Py_ssize_t width = vectors * c.kernels.lanes, point
    cdef Py_ssize_t weight_bytes = c.channels * c.taps * width * c.item
    cdef Py_ssize_t point_bytes = plan.panel_bytes // POINTS
    cdef Py_ssize_t float_bytes = c.channels * width * c.item + LINE_BYTES if pieces else 0
    cdef char *packed = arena(FC_ARENA_BLOCK, weight_bytes + POINTS * float_bytes)
    cdef char *out = plan.weights + number * plan.panel_bytes
    if packed == NULL:
        return 1
    pack_panel(c, number // pass_panels, panel, 0, c.channels, packed)
    if pieces == 0:
        c.kernels.winograd_weight(packed, c.channels, width, out, point_bytes // c.item)
    else:
        c.kernels.winograd_weight(packed, c.channels, width, packed + weight_bytes, float_bytes // c.item)
        for point in range(POINTS):
            c.kernels.split_weights(
                packed + weight_bytes + point * float_bytes, c.channels, 1, vectors, pieces, out + point * point_bytes
            )
    return not c.kernels.all_below(packed, c.channels * c.taps * width, FC_SUM_LIMIT)


cdef int _forward_task(const Plan *plan, Py_ssize_t task, Py_ssize_t share, Py_ssize_t shares) noexcept nogil:
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t group = task % c.groups
    cdef Block block, even
    locate(c, &plan.blocks, task // c.groups, &block)
    even = block  # whole tiles: an odd last row or column is computed, and not stored
    even.rows += even.rows % 2
    even.columns += even.columns % 2
    even.high = even.rows + 2
    even.wide = even.columns + 2

    cdef Py_ssize_t across = even.columns // 2, tiles = across * even.rows // 2
    cdef Py_ssize_t cells = even.high * even.wide
    cdef Py_ssize_t offset_bytes = (tiles + plan.channel_blocks + 8) // 8 * 64
    cdef Py_ssize_t point_bytes = plan.channel_blocks * tiles * plan.width * c.packed + LINE_BYTES
    cdef Py_ssize_t input_bytes = POINTS * point_bytes
    cdef Py_ssize_t product_bytes = PANELS * POINTS * point_product_bytes(c, tiles)
    cdef Py_ssize_t part_bytes = plan.width * cells * c.item
    cdef Py_ssize_t float_bytes = tiles * plan.width * c.item + LINE_BYTES if c.kernels.pieces else 0
    cdef Py_ssize_t row_bytes = 4 * across * c.panel * c.item
    cdef char *memory = arena(
        FC_ARENA_BLOCK, offset_bytes + input_bytes + product_bytes + POINTS * float_bytes + max(part_bytes, row_bytes)
    )
    if memory == NULL:
        return 1
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory
    cdef Py_ssize_t *taps = offsets + tiles
    cdef char *inputs = memory + offset_bytes
    cdef char *products = inputs + input_bytes
    cdef char *floats = products + product_bytes
    cdef char *part = floats + POINTS * float_bytes
    cdef Py_ssize_t b, p, panel
    cdef int sizes = 0
    for p in range(tiles):
        offsets[p] = 2 * (p // across * even.wide + p % across) * plan.width
    for b in range(plan.channel_blocks):
        pack_image(
            c, &even, group * c.channels + b * plan.width, min(plan.width, c.channels - b * plan.width), plan.width, part
        )
        if not c.kernels.all_below(part, plan.width * cells, FC_SUM_LIMIT):
            plan.refused[block.image] = 1
            return 0
        sizes |= _transform_inputs(plan, offsets, tiles, part, even.wide * plan.width, floats, float_bytes,
                                   inputs + b * tiles * plan.width * c.packed, point_bytes)
    if sizes == FC_TINY:
        plan.refused[block.image] = 1
        return 0
    for p in range(tiles):
        offsets[p] = p * plan.width
    for b in range(plan.channel_blocks):
        taps[b] = b * tiles * plan.width
    cdef Py_ssize_t pass_panels = plan.end_panel - plan.first_panel
    cdef Py_ssize_t first = plan.first_panel + pass_panels * share // shares
    cdef Py_ssize_t end = plan.first_panel + pass_panels * (share + 1) // shares
    if c.kernels.pieces:
        c.kernels.enter()
    for panel from first <= panel < end by PANELS:
        _panels(plan, &block, group, panel, min(panel + PANELS, end), tiles, across, offsets, taps, inputs, point_bytes,
                products, part)
    if c.kernels.pieces:
        c.kernels.leave()
    return 0


cdef Py_ssize_t point_product_bytes(const Conv *c, Py_ssize_t tiles) noexcept nogil:
    """What the products of one point and panel take: whole tiles of rows."""
    return ceil_div(tiles, c.kernels.tile_rows) * c.kernels.tile_rows * c.panel * c.item + LINE_BYTES


cdef int _transform_inputs(const Plan *plan, const Py_ssize_t *offsets, Py_ssize_t tiles, const char *part,
                           Py_ssize_t row_step, char *floats, Py_ssize_t float_bytes, char *out,
                           Py_ssize_t point_bytes) noexcept nogil:
    """Transform a channel block of the part; to be split, by way of ``floats``; then return its numbers' sizes."""
    cdef const Conv *c = &plan.c
    cdef int pieces = c.kernels.pieces, sizes = 0
    cdef Py_ssize_t point
    if pieces == 0:
        c.kernels.winograd_input(offsets, tiles, part, row_step, plan.width, out, point_bytes // c.item)
        return 0
    c.kernels.winograd_input(offsets, tiles, part, row_step, plan.width, floats, float_bytes // c.item)
    for point in range(POINTS):
        sizes |= c.kernels.split_image(
            floats + point * float_bytes, tiles * plan.width, pieces, out + point * point_bytes
        )
    return sizes


cdef void _panels(const Plan *plan, const Block *block, Py_ssize_t group, Py_ssize_t first, Py_ssize_t end,
                  Py_ssize_t tiles, Py_ssize_t across, const Py_ssize_t *offsets, const Py_ssize_t *taps,
                  const char *inputs, Py_ssize_t point_bytes, char *products, char *pixels) noexcept nogil:
    """Compute and store the filters of some panels for all tiles of a block."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t product_bytes = point_product_bytes(c, tiles), point, panel
    for point in range(POINTS):
        for panel in range(first, end):
            _multiply(
                plan, group, panel, point, tiles, offsets, taps, inputs + point * point_bytes,
                products + ((panel - first) * POINTS + point) * product_bytes,
            )
    for panel in range(first, end):
        _store_panel(plan, block, group, panel, tiles, across, products + (panel - first) * POINTS * product_bytes,
                     product_bytes, pixels)


cdef void _multiply(const Plan *plan, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t point, Py_ssize_t tiles,
                    const Py_ssize_t *offsets, const Py_ssize_t *taps, const char *inputs, char *products) noexcept nogil:
    """Multiply the inputs of one point by one panel's weights."""
    cdef const Conv *c = &plan.c
    cdef int vectors = panel_vectors(c, panel), tile_rows = c.kernels.tile_rows
    cdef Py_ssize_t width = vectors * c.kernels.lanes, together = REDUCTION // plan.width, b, m, whole
    cdef const char *weights = plan.weights + (
        (group * (plan.end_panel - plan.first_panel) + panel - plan.first_panel) * plan.panel_bytes
        + point * (plan.panel_bytes // POINTS)
    )
    cdef fc_reduction reduction
    reduction.a_step = 1
    reduction.b_taps = NULL
    reduction.b_tap = plan.width * width
    reduction.b_step = width
    whole = c.depth // plan.width  # full channel blocks; a last, narrower one is a reduction of its own
    b = 0
    while b < plan.channel_blocks:
        reduction.taps = taps + b
        reduction.n_taps = min(together, whole - b) if b < whole else 1
        reduction.depth = plan.width if b < whole else c.depth - whole * plan.width
        for m from 0 <= m < tiles by tile_rows:
            c.kernels.brgemm(
                &reduction, inputs, offsets + m, <int>min(tile_rows, tiles - m),
                weights + b * plan.width * width * c.packed, vectors, products + m * width * c.item, b > 0,
            )
        b += reduction.n_taps


cdef void _store_panel(const Plan *plan, const Block *block, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t tiles,
                       Py_ssize_t across, const char *products, Py_ssize_t product_bytes, char *pixels) noexcept nogil:
    """Transform one panel's products back and store them, two output rows at a time."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t width = panel_vectors(c, panel) * c.kernels.lanes, row, r
    cdef Py_ssize_t first = group * c.filters + panel * c.panel
    cdef Py_ssize_t filters = min(width, c.filters - panel * c.panel)
    for row in range(tiles // across):
        c.kernels.winograd_output(products + row * across * width * c.item, product_bytes // c.item, across, width, pixels)
        for r in range(min(<Py_ssize_t>2, block.rows - 2 * row)):
            store(
                c, block, (2 * row + r) * block.columns, block.columns, pixels + r * 2 * across * width * c.item, width,
                first, filters, bias_at(plan.bias, first * c.item), plan.relu,
            )
