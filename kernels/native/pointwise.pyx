"""1x1 convolution of numbers where they are: rows of neighbouring pixels are the lanes, of the image and of the output.

    output[k][p] = bias[k] + sum over channels i of  weight[k][i] * image[i][p]

    for image, group, run of pixels:                            in parallel
        for box of pixels, block of channels:                   a box's cells stay in L1
            for tile of filters: for tile of pixels             the first filters lay the cells side by side for the others

                 pixels of a box                pixels
             +---+---+---+---+---+            +---+---+
    channels |   |   |   |   |   |   filters  |   |   |  8 x 3 vectors of sums in registers
             +---+---+---+---+---+            +---+---+

It is what ``conv_im2col`` does where numbers are not split and there are enough pixels to turn the weights for. Boxes and tiles depend
on the shape alone, and what a task has doesn't matter to the bits.
"""

from fastconv.kernels.native.blocking cimport Conv, View, bias_at, ceil_div, pack_bias, round_up, run_tasks
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, arena, fc_planes
from fastconv.kernels.native.patches cimport sees_one_cell

cdef enum:
    BOX_BYTES = 24 << 10    # of cells: half of an L1 of 48 KB
    TERMS = 384             # of a sum that are added up by themselves
    PIXELS = 64             # at least, for the weights to be turned
    FILTERS = 8             # of a tile, at least: with the 4 that AVX2 has, weights where they are are faster
    TASKS = 4               # of a thread, at least
    CACHED_BYTES = 3 << 19  # of image and output: what has more comes from beyond L2, and had better be fetched early


# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    bint relu
    Py_ssize_t together         # channels that are added up by themselves
    Py_ssize_t box, pixels      # of a box, and of a task
    Py_ssize_t runs             # tasks of one plane
    Py_ssize_t ahead            # pixels until the next box, if its cells are far away
    Py_ssize_t pitch            # from channel to channel of the cells that are laid
    const Py_ssize_t *taps      # of the channels in the image, ...
    const Py_ssize_t *laid_taps # ... and where they are laid
    const char *weights         # [group][block of channels][tile of filters][channel][filter]
    const char *bias


cdef bint suits_rows(const Conv *c) noexcept nogil:
    """Whether a convolution, rows of its planes joined, is one of 1x1 filters over a single row of enough neighbouring pixels."""
    return (
        sees_one_cell(c) and c.out[1] == 1 and c.out[2] >= PIXELS and c.stride[2] == 1 and c.x.stride[4] == 1
        and c.y.stride[4] == 1 and FILTERS <= c.kernels.planar_filters <= c.filters
    )


cdef void convolve_rows(const Conv *conv, bias, bint relu) except *:
    """Convolve what ``suits_rows``."""
    cdef Plan plan
    cdef Conv *c = &plan.c
    cdef Py_ssize_t tile, planes
    plan.c = conv[0]
    plan.relu = relu
    tile = 3 * c.kernels.lanes
    planes = c.batch * c.groups * c.out[0]
    plan.together = ceil_div(c.channels, ceil_div(c.channels, <Py_ssize_t>TERMS))  # even parts
    plan.box = max(1, BOX_BYTES // (plan.together * c.item * tile)) * tile
    plan.runs = ceil_div(c.out[2], plan.box)
    if c.threads > 1:
        plan.runs = min(plan.runs, max(<Py_ssize_t>1, ceil_div(TASKS * c.threads, planes)))
    else:
        plan.runs = 1
    plan.ahead = plan.box if (c.channels + c.filters) * c.groups * c.out[2] * c.item > CACHED_BYTES else 0
    plan.pixels = round_up(ceil_div(c.out[2], plan.runs), plan.box)
    plan.runs = ceil_div(c.out[2], plan.pixels)
    plan.pitch = min(plan.box, round_up(c.out[2], tile)) | c.kernels.lanes  # an odd number of vectors, or few sets of L1 hold all
    _prepare(&plan, bias)
    run_tasks(_task, &plan, planes * plan.runs, c.threads)


cdef void _prepare(Plan *plan, bias) except *:
    """Pack weights and bias, and write where channels are."""
    cdef Conv *c = &plan.c
    cdef Py_ssize_t tap_bytes = round_up(2 * plan.together * sizeof(Py_ssize_t), 64), i
    cdef Py_ssize_t weight_bytes = c.groups * c.filters * c.channels * c.item
    cdef char *memory = arena(FC_ARENA_WEIGHTS, tap_bytes + weight_bytes + c.groups * c.filters * c.item)
    if memory == NULL:
        raise MemoryError("no memory for packed weights")
    cdef Py_ssize_t *taps = <Py_ssize_t *>memory
    for i in range(plan.together):
        taps[i] = i * c.x.stride[1]
        taps[plan.together + i] = i * plan.pitch
    plan.taps, plan.laid_taps = taps, taps + plan.together
    plan.weights = memory + tap_bytes
    _pack(plan, memory + tap_bytes)
    plan.bias = pack_bias(c, bias, memory + tap_bytes + weight_bytes)


cdef void _pack(const Plan *plan, char *out) noexcept nogil:
    """Pack the weights; a gradient of the input has them with channels and filters exchanged."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t group, channel, channels, filter, filters
    for group in range(c.groups):
        for channel from 0 <= channel < c.channels by plan.together:
            channels = min(plan.together, c.channels - channel)
            for filter from 0 <= filter < c.filters by c.kernels.planar_filters:
                filters = min(<Py_ssize_t>c.kernels.planar_filters, c.filters - filter)
                c.kernels.transpose(
                    c.w.data + ((group * c.filters + filter) * c.w.stride[0] + channel * c.w.stride[1]) * c.item,
                    c.w.stride[0], c.w.stride[1], filters, channels, out, filters,
                )
                out += channels * filters * c.item


cdef int _task(const void *shared, Py_ssize_t number) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t first = number % plan.runs * plan.pixels, plane = number // plan.runs // c.groups, channel, pixel
    cdef Py_ssize_t group = number // plan.runs % c.groups, end = min(first + plan.pixels, c.out[2])
    cdef const View *x = &c.x
    cdef const View *y = &c.y
    cdef const char *image = x.data + (
        plane // c.out[0] * x.stride[0] + group * c.channels * x.stride[1] + plane % c.out[0] * c.stride[0] * x.stride[2]
    ) * c.item
    cdef char *out = y.data + (
        plane // c.out[0] * y.stride[0] + group * c.filters * y.stride[1] + plane % c.out[0] * y.stride[2]
    ) * c.item
    cdef const char *weights = plan.weights + group * c.filters * c.channels * c.item
    cdef fc_planes planes
    planes.laid = arena(FC_ARENA_BLOCK, plan.together * plan.pitch * c.item + 64)
    if planes.laid == NULL:
        return 1
    planes.taps, planes.laid_taps = plan.taps, plan.laid_taps
    planes.rows, planes.cell_row, planes.out_row, planes.out_column, planes.out_filter = 1, 0, 0, 1, y.stride[1]
    planes.ahead = plan.ahead
    for pixel from first <= pixel < end by plan.box:
        planes.columns = min(plan.box, end - pixel)
        for channel from 0 <= channel < c.channels by plan.together:
            planes.n_taps = min(plan.together, c.channels - channel)
            planes.accumulate = channel > 0
            planes.relu = plan.relu and channel + planes.n_taps == c.channels
            planes.bias = bias_at(plan.bias, group * c.filters * c.item) if channel == 0 else NULL
            c.kernels.planar(
                &planes, weights + channel * c.filters * c.item, c.filters,
                image + (channel * x.stride[1] + pixel) * c.item, out + pixel * c.item,
            )
    return 0
