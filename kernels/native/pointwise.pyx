"""1x1 convolution of numbers where they are: rows of neighbouring pixels are the lanes, of the image and of the output.

    output[k][p] = bias[k] + sum over channels i of  weight[k][i] * image[i][p]

    for image, group, run of pixels:                            in parallel
        for box of pixels, block of channels:                   a box's cells stay in L1
            for tile of filters: for tile of pixels

                 pixels of a box                pixels
             +---+---+---+---+---+            +---+---+
    channels |   |   |   |   |   |   filters  |   |   |  8 x 3 vectors of sums in registers
             +---+---+---+---+---+            +---+---+

Where all channels lie alike in cache lines a box begins where a line does, and cells are read by whole lines. If they don't, or a set of
L1 has more of them than ways, or filters are very many, the first lay the cells side by side for the others.

It is what ``conv_im2col`` does where numbers are not split and there are enough pixels to turn the weights for. Blocks of channels
depend on the shape alone, and where boxes and tiles of pixels begin doesn't matter to the bits.
"""

from libc.stdint cimport uintptr_t
from libc.string cimport memset

from fastconv.kernels.native.blocking cimport Conv, View, bias_at, ceil_div, pack_bias, round_up, run_tasks
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, arena, fc_planes
from fastconv.kernels.native.patches cimport sees_one_cell

cdef enum:
    BOX_BYTES = 24 << 10    # of cells: half of an L1 of 48 KB
    LAID_TERMS = 384        # of a sum that are added up by themselves, ...
    TERMS = 128             # ... where cells are not laid, ...
    FAR_TERMS = 32          # ... and come from beyond L2: a core fetches lines of so many pages ahead by itself
    TILES = 2               # of filters, at most, for which cells are not laid though they lie across lines, ...
    MANY_TILES = 10         # ... and at least, for which they are laid though they lie alike in lines, if L2 has them
    LINE = 64               # bytes
    PAGE = 4096             # bytes: what is so far apart is in the same set of L1
    PIXELS = 64             # at least, for the weights to be turned
    VECTOR = 32             # bytes, at least: of four lanes too few sums are in registers
    TASKS = 4               # of a thread, at least
    NEAR_BYTES = 1 << 20    # of the image: what has more is not kept by L2
    CACHED_BYTES = 3 << 19  # of image and output: what has more comes from beyond L2, and had better be fetched early


# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    bint relu, laid
    Py_ssize_t tile             # pixels of a tile
    Py_ssize_t together         # channels that are added up by themselves
    Py_ssize_t filters          # of a group, as weights are packed, in whole tiles
    Py_ssize_t box, pixels      # of a box, and of a task
    Py_ssize_t runs             # tasks of one plane
    Py_ssize_t ahead            # pixels until those whose cells are fetched ahead
    Py_ssize_t pitch            # from channel to channel of the cells that are laid
    const char *weights         # [group][block of channels][tile of filters][channel][filter]
    const char *bias


cdef bint suits_rows(const Conv *c) noexcept nogil:
    """Whether a convolution, rows of its planes joined, is one of 1x1 filters over a single row of enough neighbouring pixels."""
    return (
        sees_one_cell(c) and c.out[1] == 1 and c.out[2] >= PIXELS and c.stride[2] == 1 and c.x.stride[4] == 1
        and c.y.stride[4] == 1 and c.kernels.lanes * c.item >= VECTOR
    )


cdef void convolve_rows(const Conv *conv, bias, bint relu) except *:
    """Convolve what ``suits_rows``."""
    cdef Plan plan
    cdef Conv *c = &plan.c
    plan.c = conv[0]
    plan.relu = relu
    _choose_blocks(&plan)
    _prepare(&plan, bias)
    run_tasks(_task, &plan, c.batch * c.groups * c.out[0] * plan.runs, c.threads)


cdef void _choose_blocks(Plan *plan) noexcept nogil:
    """Choose how many channels, filters and pixels are taken at a time."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t planes = c.batch * c.groups * c.out[0], tiles = ceil_div(c.filters, <Py_ssize_t>c.kernels.planar_filters)
    cdef Py_ssize_t pixels = c.out[2] + c.kernels.lanes - 1  # wherever the first line begins
    cdef Py_ssize_t most, box, plane = c.out[2] * c.item
    cdef bint cached = (c.channels + c.filters) * c.groups * plane <= CACHED_BYTES
    plan.tile = 3 * c.kernels.lanes
    plan.laid = tiles > TILES and (
        plane % LINE != 0 or plane % (PAGE // 2) == 0 or (tiles >= MANY_TILES and c.channels * plane <= NEAR_BYTES)
    )
    most = LAID_TERMS if plan.laid else TERMS if cached else FAR_TERMS
    plan.together = ceil_div(c.channels, ceil_div(c.channels, most))  # even parts
    plan.filters = tiles * c.kernels.planar_filters
    plan.runs = min(ceil_div(c.out[2], plan.tile), ceil_div(TASKS * c.threads, planes)) if c.threads > 1 else 1
    plan.pixels = round_up(ceil_div(pixels, plan.runs), plan.tile)
    plan.runs = ceil_div(pixels, plan.pixels)
    plan.box = plan.pixels
    if tiles > 1:
        box = BOX_BYTES * 2 if plane % PAGE == 0 else BOX_BYTES  # a page of each filter's sums is stored to: longer runs
        plan.box = min(plan.box, max(1, box // (plan.together * c.item * plan.tile)) * plan.tile)
    plan.ahead = plan.box if plan.laid else plan.tile
    plan.pitch = plan.box | c.kernels.lanes  # an odd number of vectors, or few sets of L1 hold all


cdef void _prepare(Plan *plan, bias) except *:
    """Pack weights and bias, of which whole tiles are read."""
    cdef Conv *c = &plan.c
    cdef Py_ssize_t weight_bytes = c.groups * plan.filters * c.channels * c.item
    cdef char *memory = arena(FC_ARENA_WEIGHTS, weight_bytes + (c.groups * c.filters + c.kernels.planar_filters) * c.item)
    if memory == NULL:
        raise MemoryError("no memory for packed weights")
    plan.weights = memory
    _pack(plan, memory)
    plan.bias = pack_bias(c, bias, memory + weight_bytes)


cdef void _pack(const Plan *plan, char *out) noexcept nogil:
    """Pack the weights; a gradient of the input has them with channels and filters exchanged."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t group, channel, channels, filter, filters, width, tile = c.kernels.planar_filters
    for group in range(c.groups):
        for channel from 0 <= channel < c.channels by plan.together:
            channels = min(plan.together, c.channels - channel)
            for filter from 0 <= filter < c.filters by tile:
                filters = min(tile, c.filters - filter)
                width = tile if filters > tile // 2 else tile // 2
                if filters < width:
                    memset(out, 0, <size_t>(channels * width * c.item))
                c.kernels.transpose(
                    c.w.data + ((group * c.filters + filter) * c.w.stride[0] + channel * c.w.stride[1]) * c.item,
                    c.w.stride[0], c.w.stride[1], filters, channels, out, width,
                )
                out += channels * tile * c.item


cdef int _task(const void *shared, Py_ssize_t number) noexcept nogil:
    """Convolve a run of pixels of one plane. Pixels are counted from where a line begins, ``before`` the first."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t first = number % plan.runs * plan.pixels, plane = number // plan.runs // c.groups, channel, pixel, end
    cdef Py_ssize_t group = number // plan.runs % c.groups, before = 0
    cdef const View *x = &c.x
    cdef const View *y = &c.y
    cdef const char *image = x.data + (
        plane // c.out[0] * x.stride[0] + group * c.channels * x.stride[1] + plane % c.out[0] * c.stride[0] * x.stride[2]
    ) * c.item
    cdef char *out = y.data + (
        plane // c.out[0] * y.stride[0] + group * c.filters * y.stride[1] + plane % c.out[0] * y.stride[2]
    ) * c.item
    cdef const char *weights = plan.weights + group * plan.filters * c.channels * c.item
    cdef fc_planes planes
    if not plan.laid and x.stride[1] * c.item % LINE == 0:
        before = <Py_ssize_t>(<uintptr_t>image % LINE) // c.item % c.kernels.lanes
    planes.laid, planes.laid_row, planes.ahead = NULL, plan.pitch, plan.ahead
    if plan.laid:
        planes.laid = arena(FC_ARENA_BLOCK, plan.together * plan.pitch * c.item + 64)
        if planes.laid == NULL:
            return 1
    planes.tap_row, planes.out_column, planes.out_filter = x.stride[1], 1, y.stride[1]
    end = min(first + plan.pixels, c.out[2] + before)
    for pixel from first <= pixel < end by plan.box:
        planes.columns = min(plan.box, end - pixel)
        planes.before = before if pixel == 0 else 0
        for channel from 0 <= channel < c.channels by plan.together:
            planes.n_taps = min(plan.together, c.channels - channel)
            planes.accumulate = channel > 0
            planes.relu = plan.relu and channel + planes.n_taps == c.channels
            planes.bias = bias_at(plan.bias, group * c.filters * c.item) if channel == 0 else NULL
            c.kernels.pointwise(
                &planes, weights + channel * plan.filters * c.item, c.filters,
                image + (channel * x.stride[1] + pixel - before) * c.item, out + (pixel - before) * c.item,
            )
    return 0
