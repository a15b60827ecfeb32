"""The gradient of the input by way of columns, what each tap sends back from each pixel, where pixels are few.

    columns[r][p] = sum over k of  weight[k][r] * grad_output[k][p],      r = (channel, tap)
    grad_input[channel][the cell that p sees by tap] += columns[channel, tap][p]

    for some of the images:
        copy their gradients                                      [group][filter][image][pixel]
        for group, some channels (a task):                        in parallel
            turn the channels' weights                            [channel][tap][filter]: L2
            for panel of all images' pixels: brgemm               columns of some channels: L2
            for image: add the columns to the channels' planes

                  filters               panel                           panel
             +---------------+        +---+---+                       +---+---+
        r    |    weights    |      k |   |   |                   r   |   |   |
             |               |   x    |   |   |           =           |   |   |
             +---------------+        +---+---+                       +---+---+

The weights, most of the memory there is to move, are read once and in the caller's order, whatever the stride: the phases of
a stride are not convolutions of their own, with a part of each filter. The columns of a few channels are all that ever exists.
"""

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels.native.blocking cimport Conv, View, make_conv, pack_bias, round_up, run_tasks
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, arena, fc_reduction

cdef enum:
    ROWS = 96                   # (channel, tap) of a task, about: with 512 filters their weights take 192 KB
    PIXELS = 512                # of images that are done together, unless one has more: columns take 192 KB

# What all tasks of one call share.
ctypedef struct Plan:
    Conv c                      # x is the gradient of the input
    const char *weights         # where the caller has them, (filter, channel, tap)
    Py_ssize_t filter_step, channel_step, tap_step
    Py_ssize_t together         # channels of a task
    Py_ssize_t parts            # tasks of a group
    Py_ssize_t pixels           # of one image's output
    Py_ssize_t first, images    # that are done together
    Py_ssize_t pitch            # from filter to filter, and from column to column
    char *grads
    const char *bias
    bint relu

ctypedef fused real:
    float
    double


cdef void input_by_columns(cnp.ndarray grad_output, cnp.ndarray weight, bias, cnp.ndarray grad_input, dims, options):
    """See ``conv_input_grad`` in ``fastconv.kernels``."""
    cdef Plan plan
    cdef Conv *c = &plan.c
    cdef Py_ssize_t most, bias_bytes
    filters, channels = dims.out_channels, dims.group_in_channels
    cdef cnp.ndarray rows = weight.reshape(filters, channels, dims.taps)  # a copy, if taps are not evenly spaced
    make_conv(c, grad_input, weight, grad_output, dims, options)
    plan.weights = cnp.PyArray_BYTES(rows)
    plan.filter_step = cnp.PyArray_STRIDE(rows, 0) // c.item
    plan.channel_step = cnp.PyArray_STRIDE(rows, 1) // c.item
    plan.tap_step = cnp.PyArray_STRIDE(rows, 2) // c.item
    plan.together = min(c.channels, max(1, ROWS // c.taps))
    plan.parts = (c.channels + plan.together - 1) // plan.together
    plan.pixels = c.out[0] * c.out[1] * c.out[2]
    most = max(1, min(c.batch, PIXELS // plan.pixels))
    plan.pitch = round_up(most * plan.pixels, c.kernels.lanes) | c.kernels.lanes  # an odd number of vectors: L1's sets
    bias_bytes = round_up(c.groups * c.channels * c.item, 64)
    plan.grads = arena(FC_ARENA_WEIGHTS, bias_bytes + c.groups * c.filters * plan.pitch * c.item)
    if plan.grads == NULL:
        raise MemoryError("no memory for copied gradients")
    plan.bias = pack_bias(c, bias, plan.grads)
    plan.grads += bias_bytes
    plan.relu = options.activation == "relu"
    for plan.first in range(0, c.batch, most):
        plan.images = min(most, c.batch - plan.first)
        _copy_grads(&plan)
        run_tasks(_channels_task, &plan, c.groups * plan.parts, c.threads)


cdef void _copy_grads(const Plan *plan) noexcept nogil:
    """Copy some images' gradients, row by row, and zeros to fill the last panel."""
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    cdef Py_ssize_t filters = c.groups * c.filters, pixels = plan.images * plan.pixels, image, depth, row, k
    cdef char *out = plan.grads
    for image in range(plan.first, plan.first + plan.images):
        for depth in range(c.out[0]):
            for row in range(c.out[1]):
                c.kernels.transpose(
                    y.data + (image * y.stride[0] + depth * y.stride[2] + row * y.stride[3]) * c.item,
                    y.stride[4], y.stride[1], c.out[2], filters, out, plan.pitch,
                )
                out += c.out[2] * c.item
    for k in range(filters):
        memset(plan.grads + (k * plan.pitch + pixels) * c.item, 0, <size_t>((plan.pitch - pixels) * c.item))


cdef int _channels_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t group = task // plan.parts, channel = task % plan.parts * plan.together, image, m, pixel
    cdef Py_ssize_t channels = min(plan.together, c.channels - channel), rows = channels * c.taps, zero = 0
    cdef Py_ssize_t pixels = plan.images * plan.pixels
    cdef Py_ssize_t whole_rows = round_up(rows, c.kernels.tile_rows), depth = c.filters | 16
    cdef Py_ssize_t offset_bytes = round_up(rows * <Py_ssize_t>sizeof(Py_ssize_t), 64)
    cdef Py_ssize_t weight_bytes = round_up(rows * depth * c.item, 64)
    cdef char *memory = arena(FC_ARENA_BLOCK, offset_bytes + weight_bytes + whole_rows * plan.pitch * c.item)
    if memory == NULL:
        return 1
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory
    cdef char *weights = memory + offset_bytes
    cdef char *columns = weights + weight_bytes
    cdef const char *grads = plan.grads + group * c.filters * plan.pitch * c.item
    cdef fc_reduction reduction
    reduction.apart = 0
    reduction.taps = &zero
    reduction.b_taps = NULL
    reduction.n_taps = 1
    reduction.depth = c.filters
    reduction.a_step = 1
    reduction.b_tap = 0
    reduction.b_step = reduction.c_step = plan.pitch
    for m in range(rows):
        offsets[m] = m * depth
    _turn_weights(plan, group, channel, channels, depth, weights)
    for pixel from 0 <= pixel < pixels by c.panel:
        c.kernels.brgemm(
            &reduction, weights, offsets, rows, grads + pixel * c.item, 1 if pixels - pixel <= c.kernels.lanes else 2,
            columns + pixel * c.item, 0,
        )
    for m in range(channels):
        for image in range(plan.images):
            _add_channel(plan, plan.first + image, group * c.channels + channel + m,
                         columns + (m * c.taps * plan.pitch + image * plan.pixels) * c.item)
    return 0


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
    cdef const Conv *c = &plan.c
    cdef const View *v = &c.x
    cdef Py_ssize_t d, h, w, depth, row, z, y, i
    cdef real *cells
    for z in range(v.size[2]):
        for y in range(v.size[3]):
            cells = x + z * v.stride[2] + y * v.stride[3]
            for i in range(v.size[4]):
                cells[i * v.stride[4]] = bias
    for d in range(c.kernel[0]):
        for h in range(c.kernel[1]):
            for w in range(c.kernel[2]):
                for depth in range(c.out[0]):
                    z = depth * c.stride[0] - c.pad[0] + d * c.dilation[0]
                    for row in range(c.out[1]):
                        y = row * c.stride[1] - c.pad[1] + h * c.dilation[1]
                        if 0 <= z < v.size[2] and 0 <= y < v.size[3]:
                            _add_row(c, x + z * v.stride[2] + y * v.stride[3], w * c.dilation[2] - c.pad[2],
                                     columns + (depth * c.out[1] + row) * c.out[2])
                columns += plan.pitch
    if not plan.relu:
        return
    for z in range(v.size[2]):
        for y in range(v.size[3]):
            cells = x + z * v.stride[2] + y * v.stride[3]
            for i in range(v.size[4]):
                if cells[i * v.stride[4]] < 0:  # a NaN stays one
                    cells[i * v.stride[4]] = 0


cdef inline void _add_row(const Conv *c, real *x, Py_ssize_t left, const real *columns) noexcept nogil:
    """Add a row of pixels' columns to the cells that they see: pixel 0 sees cell ``left`` of the image's row ``x``."""
    cdef Py_ssize_t step = c.stride[2], width = c.x.size[4], stride = c.x.stride[4], start = 0, stop = c.out[2], i
    if left < 0:
        start = (step - 1 - left) // step
    if left + (stop - 1) * step >= width:
        stop = (width - 1 - left) // step + 1 if left < width else 0
    x += left * stride
    if stride == 1 and step == 1:
        for i in range(start, stop):
            x[i] += columns[i]
    else:
        for i in range(start, stop):
            x[i * step * stride] += columns[i]
