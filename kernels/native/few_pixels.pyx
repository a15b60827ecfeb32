"""Convolution for few pixels, and its gradients: weights are read, or written, once and in their order, a filter's as one row.

    output[p][k]         = sum over r of       patches[p][r] * weight[k][r],       r = (channel, tap)
    grad_weight[k][r]    = sum over pixels of  grad_output[p][k] * patches[p][r]
    grad_patches[p][r]   = sum over filters of grad_output[p][k] * weight[k][r],   added up to grad_input

    for group, share of the filters, or of the channels of grad_input:             in parallel
        for some images: lay out the patches of all their pixels                   L2
            forward:      for some filters: for part of r: dot products            a part of patches stays in L1
            grad_weight:  for tile of filters: for vectors of r                    stored where they belong
            grad_input:   for part of r: for some filters                          sums stay in L1; then they are added

              r                                       The lanes are weights of a filter: a vector of them is multiplied by what
    filters +---------+         r                     all pixels see. Where a layer has some hundred weights for each pixel it is
            | weights |   x   +---------+             memory that takes the time, and turning weights, or cutting them in pieces,
            +---------+       | patches | pixels      takes a multiple of it.
                              +---------+

The last layers of a network are such, those of squeeze-and-excitation, and a fully connected layer as a convolution. Where a channel's
weights are one row, as of 1x1 filters channels last, the layer is computed from the other side: forward as a gradient of the input.
"""

import numpy as np

cimport numpy as cnp
from libc.string cimport memcpy, memset

from fastconv.kernels import interleave
from fastconv.kernels.few_pixels import other_side
from fastconv.kernels.native.blocking cimport (
    Block, Conv, View, ceil_div, make_conv, pack_bias, round_up, run_tasks,
)
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, arena, fc_epilogue, fc_planes
from fastconv.kernels.native.patches cimport gather

cdef enum:
    ROWS = 32               # pixels of some images that are computed together, if one has no more
    PATCH_BYTES = 3 << 18   # of their patches: part of L2
    PART_BYTES = 24 << 10   # of a part of them: half of L1
    LEAST_PART = 512        # numbers of it
    FILTERS = 48            # whose sums are lanes at a time, at most, ...
    LEAST_FILTERS = 12      # ... and at least
    SUM_BYTES = 16 << 10    # of these, and of the columns that a part of grad_input is added up in: part of L1
    TERMS = 8               # filters that are added up in registers: long runs of weights; ...
    MANY_TERMS = 16         # ... where an image has more than ...
    SUM_PIXELS = 4          # ... so many pixels, for whose sums adding to those in L1 takes too long
    GATHERED = 32           # channels whose cells are gathered before they are turned
    TASKS = 4               # of a thread, at most

# What all tasks of one call share.
ctypedef struct Plan:
    Conv c
    bint relu
    Py_ssize_t pixels       # of an image
    Py_ssize_t images       # computed together
    Py_ssize_t step         # from filter to filter of the weights
    Py_ssize_t part         # of the reduction, whose patches stay in L1
    Py_ssize_t pitch        # from row to row of patches: parts of rows don't share sets of L1
    Py_ssize_t terms        # filters that are added up in registers: the same for any batch
    Py_ssize_t together     # filters whose sums are lanes at a time
    Py_ssize_t shares       # of filters, or channels, that tasks have
    char *weights
    const char *bias

# One task, and its workspace.
ctypedef struct Task:
    Py_ssize_t group
    Py_ssize_t first, count     # of its share
    Py_ssize_t *taps            # where rows of patches, or of weights, are
    char *patches               # [image][pixel][reduction]
    char *numbers
    char *sums


cdef void _plan(Plan *plan, cnp.ndarray x, cnp.ndarray w, cnp.ndarray y, dims, options):
    cdef Conv *c = &plan.c
    make_conv(c, x, w, y, dims, options)
    plan.pixels = c.out[0] * c.out[1] * c.out[2]
    cdef Py_ssize_t line = 64 // c.item, sets = 64 * line
    plan.images = min(ROWS // plan.pixels, PATCH_BYTES // (plan.pixels * c.channels * c.taps * c.item))
    plan.images = max(<Py_ssize_t>1, min(plan.images, c.batch))
    plan.part = max(<Py_ssize_t>LEAST_PART, PART_BYTES // (plan.images * plan.pixels * c.item) // line * line)
    plan.pitch = round_up(c.channels * c.taps, line)
    plan.pitch += ((plan.part - plan.pitch) % sets + sets) % sets
    plan.together = FILTERS
    while plan.together > LEAST_FILTERS and plan.together * plan.images * plan.pixels * c.kernels.lanes * c.item > SUM_BYTES:
        plan.together //= 2
    plan.terms = MANY_TERMS if plan.pixels > SUM_PIXELS else TERMS
    plan.weights = c.w.data
    plan.step = c.w.stride[0]


cdef void _share(Plan *plan, Py_ssize_t parts):
    plan.shares = 1 if plan.c.threads == 1 else max(<Py_ssize_t>1, min(parts, ceil_div(TASKS * plan.c.threads, plan.c.groups)))


cdef bint _find_task(const Plan *plan, Py_ssize_t number, Py_ssize_t unit, Py_ssize_t all, Py_ssize_t number_bytes,
                     Py_ssize_t sum_bytes, Task *t) noexcept nogil:
    """Find task number ``number``, whole units of all filters or channels, and its workspace; return whether there is none."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t share = number % plan.shares, units = ceil_div(all, unit), rows = plan.images * plan.pixels
    cdef Py_ssize_t tap_bytes = round_up(max(rows, plan.terms) * sizeof(Py_ssize_t), 64)
    cdef Py_ssize_t patch_bytes = rows * plan.pitch * c.item
    t.group = number // plan.shares
    t.first = units * share // plan.shares * unit
    t.count = min(units * (share + 1) // plan.shares * unit, all) - t.first
    cdef char *memory = arena(FC_ARENA_BLOCK, tap_bytes + patch_bytes + number_bytes + sum_bytes + 256)
    if memory == NULL:
        return True
    t.taps = <Py_ssize_t *>memory
    t.patches = memory + tap_bytes
    t.numbers = t.patches + round_up(patch_bytes, 64)
    t.sums = t.numbers + round_up(number_bytes, 64)
    return False


cdef void _lay_row(fc_planes *planes, const Py_ssize_t *taps, Py_ssize_t columns, Py_ssize_t step) noexcept nogil:
    """Let planes be a single row of weights, and what is computed of each rows that are ``step`` apart."""
    planes.taps, planes.rows, planes.columns, planes.cell_row, planes.out_row = taps, 1, columns, 0, 0
    planes.out_column, planes.out_filter, planes.bias, planes.relu = 1, step, NULL, 0
    planes.laid, planes.ahead = NULL, 0


cdef void _lay_patches(const Plan *plan, const Task *t, Py_ssize_t first, Py_ssize_t images) noexcept nogil:
    """Lay out what each pixel of some images sees of a group, in the order of its weights."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t image, channel, channels, plane = c.out[1] * c.out[2]
    cdef char *out
    cdef Block block
    block.top = block.left = 0
    block.rows, block.columns = c.out[1], c.out[2]
    for image in range(images):
        block.image = first + image
        for block.depth in range(c.out[0]):
            out = t.patches + (image * plan.pixels + block.depth * plane) * plan.pitch * c.item
            for channel from 0 <= channel < c.channels by GATHERED:
                channels = min(<Py_ssize_t>GATHERED, c.channels - channel)
                gather(c, &block, t.group * c.channels + channel, channels, 0, plane, plane, t.numbers)
                c.kernels.transpose(
                    t.numbers, plane, 1, channels * c.taps, plane, out + channel * c.taps * c.item, plan.pitch,
                )


# --------------------------------------------------------------------------------------------------------- forward

def conv_forward(input, weight, bias, output, dims, options):
    """See ``fastconv.kernels``; weights are in order."""
    if weight.flags.c_contiguous:
        _convolve(input, weight, bias, output, dims, options)
        return
    _input_grad(input, weight.swapaxes(0, 1), bias, output, other_side(dims), options)
    if options.activation == "relu":
        np.maximum(output, 0, out=output)


cdef void _convolve(cnp.ndarray input, cnp.ndarray weight, bias, cnp.ndarray output, dims, options) except *:
    cdef Plan plan
    cdef Conv *c = &plan.c
    _plan(&plan, input, weight, output, dims, options)
    _share(&plan, ceil_div(c.filters, plan.together))
    plan.relu = options.activation == "relu"
    cdef char *memory = arena(FC_ARENA_WEIGHTS, c.groups * c.filters * c.item)
    if memory == NULL:
        raise MemoryError("no memory for the bias")
    plan.bias = pack_bias(c, bias, memory)
    run_tasks(_forward_task, &plan, c.groups * plan.shares, c.threads)


cdef int _forward_task(const void *shared, Py_ssize_t number) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t rows = plan.images * plan.pixels, image, images, filter
    cdef Task t
    if _find_task(plan, number, plan.together, c.filters, GATHERED * c.taps * plan.pixels * c.item,
                  plan.together * rows * (c.kernels.lanes + 1) * c.item, &t):
        return 1
    for image in range(rows):
        t.taps[image] = image * plan.pitch
    for image from 0 <= image < c.batch by plan.images:
        images = min(plan.images, c.batch - image)
        _lay_patches(plan, &t, image, images)
        for filter from t.first <= filter < t.first + t.count by plan.together:
            _multiply(plan, &t, image, images, filter, min(plan.together, t.first + t.count - filter))
    return 0


cdef void _multiply(const Plan *plan, const Task *t, Py_ssize_t image, Py_ssize_t images, Py_ssize_t filter,
                    Py_ssize_t filters) noexcept nogil:
    """Compute some filters of some images: parts of dot products, lane by lane, then the sums of lanes."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t rows = images * plan.pixels, lanes = c.kernels.lanes, reduction = c.channels * c.taps, r, i
    cdef char *totals = t.sums + filters * rows * lanes * c.item
    cdef const char *weights = plan.weights + (t.group * c.filters + filter) * plan.step * c.item
    cdef fc_planes planes
    _lay_row(&planes, t.taps, 0, plan.step)
    planes.n_taps = rows
    memset(t.sums, 0, <size_t>(filters * rows * lanes * c.item))
    if plan.bias != NULL:
        for i in range(filters * rows):
            memcpy(t.sums + i * lanes * c.item, plan.bias + (t.group * c.filters + filter + i // rows) * c.item, <size_t>c.item)
    for r from 0 <= r < reduction by plan.part:
        planes.columns = min(plan.part, reduction - r)
        planes.ahead = plan.part if r + plan.part < reduction else filters * plan.step - r
        c.kernels.planar_weight(&planes, filters, weights + r * c.item, t.patches + r * c.item, t.sums)
    c.kernels.sum_lanes(t.sums, filters * rows, totals)
    _store(plan, t, image, images, filter, filters, totals)


cdef void _store(const Plan *plan, const Task *t, Py_ssize_t image, Py_ssize_t images, Py_ssize_t filter, Py_ssize_t filters,
                 const char *totals) noexcept nogil:
    """Store the sums of some filters, [filter][image][pixel]."""
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    cdef Py_ssize_t n, d, h, rows = images * plan.pixels
    cdef fc_epilogue epilogue
    epilogue.bias, epilogue.relu = NULL, plan.relu
    epilogue.pixel_stride, epilogue.channel_stride = y.stride[1], y.stride[4]
    for n in range(images):
        for d in range(c.out[0]):
            for h in range(c.out[1]):
                c.kernels.epilogue(
                    &epilogue, totals, rows, filters, c.out[2], y.data + (
                        (image + n) * y.stride[0] + (t.group * c.filters + filter) * y.stride[1] + d * y.stride[2] + h * y.stride[3]
                    ) * c.item,
                )
                totals += c.out[2] * c.item


# ------------------------------------------------------------------------------------------ gradient of the weights

def conv_weight_grad(input, grad_output, grad_weight, dims, options):
    """See ``fastconv.kernels``; ``grad_weight`` is in order, and the gradient of the bias isn't wanted."""
    if grad_weight.flags.c_contiguous:
        _weight_grad(input, grad_output, grad_weight, dims, options)
    else:
        _weight_grad(grad_output, input, grad_weight.swapaxes(0, 1), other_side(dims), options)


cdef void _weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, dims, options) except *:
    cdef Plan plan
    cdef Conv *c = &plan.c
    _plan(&plan, input, grad_weight, grad_output, dims, options)
    _share(&plan, ceil_div(c.filters, <Py_ssize_t>c.kernels.planar_filters))
    run_tasks(_weight_task, &plan, c.groups * plan.shares, c.threads)


cdef int _weight_task(const void *shared, Py_ssize_t number) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t rows = plan.images * plan.pixels, tile = c.kernels.planar_filters, image, images, filter, filters
    cdef Task t
    cdef fc_planes planes
    if _find_task(plan, number, tile, c.filters, GATHERED * c.taps * plan.pixels * c.item, rows * tile * c.item, &t):
        return 1
    for image in range(rows):
        t.taps[image] = image * plan.pitch
    _lay_row(&planes, t.taps, c.channels * c.taps, plan.step)
    for image from 0 <= image < c.batch by plan.images:
        images = min(plan.images, c.batch - image)
        planes.n_taps, planes.accumulate = images * plan.pixels, image > 0
        _lay_patches(plan, &t, image, images)
        for filter from t.first <= filter < t.first + t.count by tile:
            filters = min(tile, t.first + t.count - filter)
            _lay_grads(plan, image, images, t.group * c.filters + filter, filters, t.sums)
            c.kernels.planar(
                &planes, t.sums, filters, t.patches, plan.weights + (t.group * c.filters + filter) * plan.step * c.item
            )
    return 0


cdef void _lay_grads(const Plan *plan, Py_ssize_t image, Py_ssize_t images, Py_ssize_t filter, Py_ssize_t filters,
                     char *out) noexcept nogil:
    """Lay out some filters' gradients, [image][pixel][filter]."""
    cdef const Conv *c = &plan.c
    cdef const View *y = &c.y
    cdef Py_ssize_t n, d, h
    for n in range(image, image + images):
        for d in range(c.out[0]):
            for h in range(c.out[1]):
                c.kernels.transpose(
                    y.data + (n * y.stride[0] + filter * y.stride[1] + d * y.stride[2] + h * y.stride[3]) * c.item,
                    y.stride[1], y.stride[4], filters, c.out[2], out, filters,
                )
                out += c.out[2] * filters * c.item


# -------------------------------------------------------------------------------------------- gradient of the input

def conv_input_grad(grad_output, weight, grad_input, dims, options):
    """See ``fastconv.kernels``; weights are in order, and there are neither bias nor activation."""
    if weight.flags.c_contiguous:
        _input_grad(grad_output, weight, None, grad_input, dims, options)
    else:
        _convolve(grad_output, weight.swapaxes(0, 1), None, grad_input, other_side(dims), options)


cdef void _input_grad(cnp.ndarray grad_output, cnp.ndarray weight, bias, cnp.ndarray grad_input, dims, options) except *:
    cdef Plan plan
    cdef Conv *c = &plan.c
    interleave.fill(grad_input, bias, None)
    _plan(&plan, grad_input, weight, grad_output, dims, options)
    _share(&plan, c.channels)
    run_tasks(_input_task, &plan, c.groups * plan.shares, c.threads)


cdef int _input_task(const void *shared, Py_ssize_t number) noexcept nogil:
    """Add up a share of the channels."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t rows = plan.images * plan.pixels, image, images, channel, channels
    cdef Py_ssize_t together = max(<Py_ssize_t>1, max(<Py_ssize_t>LEAST_PART, SUM_BYTES // (rows * c.item)) // c.taps), i
    cdef Task t
    if _find_task(plan, number, 1, c.channels, rows * c.filters * c.item,
                  (rows + 1) * _column_pitch(c, together) * c.item, &t):
        return 1
    for i in range(plan.terms):
        t.taps[i] = i * plan.step
    for image from 0 <= image < c.batch by plan.images:
        images = min(plan.images, c.batch - image)
        _lay_factors(plan, &t, image, images)
        for channel from t.first <= channel < t.first + t.count by together:
            channels = min(together, t.first + t.count - channel)
            _multiply_grads(plan, &t, images, channel, channels)
            _add_columns(plan, &t, image, images, channel, channels)
    return 0


cdef void _lay_factors(const Plan *plan, const Task *t, Py_ssize_t image, Py_ssize_t images) noexcept nogil:
    """Lay out the gradients of some images, [some filters][tile of pixels][filter][pixel]."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t rows = images * plan.pixels, tile = c.kernels.planar_filters, filter, filters, row, count
    cdef char *out = t.numbers
    for filter from 0 <= filter < c.filters by plan.terms:
        filters = min(plan.terms, c.filters - filter)
        _lay_grads(plan, image, images, t.group * c.filters + filter, filters, t.patches)
        for row from 0 <= row < rows by tile:
            count = min(tile, rows - row)
            c.kernels.transpose(t.patches + row * filters * c.item, filters, 1, count, filters, out, count)
            out += count * filters * c.item


cdef inline Py_ssize_t _column_pitch(const Conv *c, Py_ssize_t channels) noexcept nogil:
    return round_up(channels * c.taps, c.kernels.lanes)


cdef void _multiply_grads(const Plan *plan, const Task *t, Py_ssize_t images, Py_ssize_t channel,
                          Py_ssize_t channels) noexcept nogil:
    """Compute the gradients of some channels' patches, [image][pixel][channel][tap]."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t rows = images * plan.pixels, filter, count, tap
    cdef bint last = t.group + 1 == c.groups and channel + channels == c.channels
    cdef const char *weights = plan.weights + (t.group * c.filters * plan.step + channel * c.taps) * c.item
    cdef fc_planes planes
    _lay_row(&planes, t.taps, channels * c.taps, _column_pitch(c, channels))
    for filter from 0 <= filter < c.filters by plan.terms:
        planes.n_taps = count = min(plan.terms, c.filters - filter)
        planes.accumulate = filter > 0
        tap = t.taps[count - 1]
        if last and filter + count == c.filters:
            t.taps[count - 1] = _copy_last(plan, t, rows, channels, weights + filter * plan.step * c.item, tap)
        c.kernels.planar(
            &planes, t.numbers + filter * rows * c.item, rows, weights + filter * plan.step * c.item, t.sums
        )
        t.taps[count - 1] = tap


cdef Py_ssize_t _copy_last(const Plan *plan, const Task *t, Py_ssize_t rows, Py_ssize_t channels, const char *weights,
                           Py_ssize_t tap) noexcept nogil:
    """Copy the last weights that there are, for whole vectors of them are read; return where they are from ``weights``."""
    cdef const Conv *c = &plan.c
    cdef char *copy = t.sums + rows * _column_pitch(c, channels) * c.item
    memcpy(copy, weights + tap * c.item, <size_t>(channels * c.taps * c.item))
    return (copy - weights) // c.item


cdef void _add_columns(const Plan *plan, const Task *t, Py_ssize_t image, Py_ssize_t images, Py_ssize_t channel,
                       Py_ssize_t channels) noexcept nogil:
    """Add the gradients of patches to those of the cells that they show."""
    cdef const Conv *c = &plan.c
    cdef const View *x = &c.x
    cdef Py_ssize_t n, p, d, h, w, z, row, column, at
    cdef const char *sums = t.sums
    cdef const char *tap
    for n in range(images):
        for p in range(plan.pixels):
            tap = sums
            for d in range(c.kernel[0]):
                z = p // (c.out[1] * c.out[2]) * c.stride[0] - c.pad[0] + d * c.dilation[0]
                for h in range(c.kernel[1]):
                    row = p // c.out[2] % c.out[1] * c.stride[1] - c.pad[1] + h * c.dilation[1]
                    column = p % c.out[2] * c.stride[2] - c.pad[2]
                    at = (image + n) * x.stride[0] + (t.group * c.channels + channel) * x.stride[1]
                    at += z * x.stride[2] + row * x.stride[3]
                    for w in range(c.kernel[2] if 0 <= z < x.size[2] and 0 <= row < x.size[3] else 0):
                        if 0 <= column < x.size[4]:
                            _add_apart(c, channels, tap + w * c.item, x.data + (at + column * x.stride[4]) * c.item)
                        column += c.dilation[2]
                    tap += c.kernel[2] * c.item
            sums += _column_pitch(c, channels) * c.item


cdef void _add_apart(const Conv *c, Py_ssize_t channels, const char *sums, char *cells) noexcept nogil:
    """Add what a tap has of some channels to their cells."""
    cdef Py_ssize_t i, step = c.x.stride[1], taps = c.taps
    if c.item == 4:
        for i in range(channels):
            (<float *>cells)[i * step] += (<const float *>sums)[i * taps]
    else:
        for i in range(channels):
            (<double *>cells)[i * step] += (<const double *>sums)[i * taps]
