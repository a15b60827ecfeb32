"""How the gradient of the weights is shared out: the same bits for any number of threads.

                 filters                      The matrix (channels * taps) x filters of each group is cut into tasks. Where
             +------+------+                  these are few, the reduction over the pixels of the batch is cut, too, into
    channels | task | task |  x  chunks       chunks whose number depends on the shape alone. Each chunk has accumulators
     * taps  +------+------+                  of its own; their sum is taken in the order of the chunks.
             | task | task |
             +------+------+
"""

cimport numpy as cnp
from libc.string cimport memcpy, memset

from fastconv.kernels.native.blocking cimport Conv, View, ceil_div, make_view, panel_vectors, run_tasks, taps_continue
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, arena, fc_epilogue, fc_reduction, fc_reduction_over, fc_ukernels, ukernels, usable_threads,
)

cdef enum:
    MOST_LANES = 64
    SUMMED_CHANNELS = 56    # whose gradients one task adds up, if those of the weights don't do it: some tiles
    SUMMED_PIXELS = 256     # that are added up by themselves
    SERIAL_NUMBERS = 1 << 17  # that are added up before another thread is awake

cdef float[MOST_LANES] ONES_32
cdef double[MOST_LANES] ONES_64
for i in range(MOST_LANES):
    ONES_32[i] = ONES_64[i] = 1


cdef Py_ssize_t even_panels(const Conv *c) noexcept nogil:
    """Return how many panels a task has, ``WEIGHT_PANELS`` at most, where all have as many."""
    return ceil_div(c.panels, ceil_div(c.panels, <Py_ssize_t>WEIGHT_PANELS))


cdef void plan_chunks(WeightPlan *plan, Py_ssize_t units, cnp.ndarray grad_bias) except *:
    """Complete a plan that has ``width``, ``channel_blocks`` and ``task_panels``."""
    cdef const Conv *c = &plan.c
    plan.channel_tasks = ceil_div(c.channels, (plan.channel_blocks * plan.width))
    plan.panel_tasks = ceil_div(c.panels, plan.task_panels)
    plan.tasks = c.groups * plan.channel_tasks * plan.panel_tasks
    plan.units = units
    plan.chunks = min(units, c.batch * c.out[0] * c.out[1] * c.out[2] // CHUNK_PIXELS)
    plan.chunks = max(1, min(plan.chunks, WEIGHT_TASKS // plan.tasks))
    plan.filters_first = False
    cdef Py_ssize_t filters = plan.task_panels * c.panel
    plan.bias_bytes = filters * plan.channel_blocks * plan.width * c.taps * c.item
    plan.task_bytes = plan.bias_bytes + filters * c.item
    plan.accumulators = NULL
    want_bias(plan, grad_bias)
    if plan.chunks > 1:
        plan.accumulators = arena(FC_ARENA_WEIGHTS, plan.chunks * plan.tasks * plan.task_bytes)
        if plan.accumulators == NULL:
            raise MemoryError("no memory for the gradient of the weights")


cdef void want_bias(WeightPlan *plan, cnp.ndarray grad_bias):
    """Note where the gradient of the bias goes, if it is wanted."""
    plan.bias = NULL
    if grad_bias is not None:
        plan.bias = cnp.PyArray_BYTES(grad_bias)
        plan.bias_stride = cnp.PyArray_STRIDE(grad_bias, 0) // plan.c.item


cdef void _locate_task(const WeightPlan *plan, Py_ssize_t task, WeightTask *t) noexcept nogil:
    """Find task number ``task``; those of one chunk follow one another."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t chunk = task // plan.tasks
    if plan.accumulators != NULL:
        t.accumulators = plan.accumulators + task * plan.task_bytes
    t.first_unit = plan.units * chunk // plan.chunks
    t.end_unit = plan.units * (chunk + 1) // plan.chunks
    task = task % plan.tasks
    t.panel = task % plan.panel_tasks * plan.task_panels
    t.panels = min(plan.task_panels, c.panels - t.panel)
    task = task // plan.panel_tasks
    t.channel = task % plan.channel_tasks * plan.channel_blocks * plan.width
    t.channel_blocks = min(plan.channel_blocks, ceil_div((c.channels - t.channel), plan.width))
    t.group = task // plan.channel_tasks


# What all tasks of the gradient of the bias share, if it is computed by itself.
ctypedef struct BiasPlan:
    const fc_ukernels *kernels
    View y
    Py_ssize_t item
    char *out
    Py_ssize_t step


cdef void sum_gradients(cnp.ndarray grad_output, cnp.ndarray grad_bias, options) except *:
    """Compute the gradient of the bias, if it is wanted, where what computes that of the weights doesn't."""
    cdef BiasPlan plan
    cdef int threads = 1
    if grad_bias is None:
        return
    make_view(&plan.y, grad_output)
    plan.item = cnp.PyArray_ITEMSIZE(grad_output)
    plan.kernels = ukernels(plan.item)
    plan.out, plan.step = cnp.PyArray_BYTES(grad_bias), cnp.PyArray_STRIDE(grad_bias, 0)
    if cnp.PyArray_SIZE(grad_output) > SERIAL_NUMBERS:
        threads = usable_threads(options.threads)
    run_tasks(_sum_channels, &plan, ceil_div(plan.y.size[1], <Py_ssize_t>SUMMED_CHANNELS), threads)


cdef int _sum_channels(const void *shared, Py_ssize_t task) noexcept nogil:
    """Sum some channels over all pixels: they are the rows of the tile, and what they are multiplied by is ones."""
    cdef const BiasPlan *plan = <const BiasPlan *>shared
    cdef const View *y = &plan.y
    cdef Py_ssize_t first = task * SUMMED_CHANNELS, channels = min(<Py_ssize_t>SUMMED_CHANNELS, y.size[1] - first)
    cdef Py_ssize_t together, i, image, row, left
    cdef Py_ssize_t[SUMMED_CHANNELS] offsets
    cdef Py_ssize_t[SUMMED_PIXELS] lines
    cdef double[SUMMED_CHANNELS * 16] sums  # of 16 lanes at most
    cdef fc_reduction reduction = fc_reduction_over(lines, 0, 0)
    cdef const char *ones = <const char *>ONES_32 if plan.item == 4 else <const char *>ONES_64
    memset(sums, 0, sizeof(sums))
    for i in range(channels):
        offsets[i] = i * y.stride[1]
    together = min(y.size[3], max(<Py_ssize_t>1, SUMMED_PIXELS // max(<Py_ssize_t>1, y.size[4])))
    for i in range(together):
        lines[i] = i * y.stride[3]
    reduction.a_step, reduction.c_step = y.stride[4], plan.kernels.lanes
    for image in range(y.size[0] * y.size[2]):
        for row from 0 <= row < y.size[3] by together:
            reduction.n_taps = min(together, y.size[3] - row)
            for left from 0 <= left < y.size[4] by SUMMED_PIXELS:
                reduction.depth = min(<Py_ssize_t>SUMMED_PIXELS, y.size[4] - left)
                plan.kernels.brgemm(
                    &reduction, y.data + (
                        image // y.size[2] * y.stride[0] + first * y.stride[1] + image % y.size[2] * y.stride[2] + row * y.stride[3]
                        + left * y.stride[4]
                    ) * plan.item, offsets, channels, ones, 1, sums, 1,
                )
    for i in range(channels):
        memcpy(plan.out + (first + i) * plan.step, <char *>sums + i * plan.kernels.lanes * plan.item, <size_t>plan.item)
    return 0


cdef int start_task(const WeightPlan *plan, Py_ssize_t task, WeightTask *t) noexcept nogil:
    """Find task number ``task`` and clear its sums of the bias; return 1 if there is no memory for its accumulators."""
    _locate_task(plan, task, t)
    if plan.accumulators == NULL:
        t.accumulators = arena(FC_ARENA_WEIGHTS, plan.task_bytes)
        if t.accumulators == NULL:
            return 1
    memset(t.accumulators + plan.bias_bytes, 0, <size_t>(plan.task_bytes - plan.bias_bytes))
    return 0


cdef void clear_sums(const WeightPlan *plan, const WeightTask *t) noexcept nogil:
    """Clear a task's sums of the weights."""
    memset(t.accumulators, 0, <size_t>plan.bias_bytes)


cdef void add_bias(const WeightPlan *plan, const WeightTask *t, Py_ssize_t panel, const char *grads,
                   Py_ssize_t pixels) noexcept nogil:
    """Add a panel's packed gradients, [pixel][filter], to that of the bias; of the tasks of a panel one does."""
    cdef const Conv *c = &plan.c
    add_pixels(plan, t, panel, grads, panel_vectors(c, t.panel + panel) * c.kernels.lanes, pixels)


cdef void add_pixels(const WeightPlan *plan, const WeightTask *t, Py_ssize_t panel, const char *grads, Py_ssize_t pitch,
                     Py_ssize_t pixels) noexcept nogil:
    """The same with the gradients of pixels ``pitch`` apart."""
    cdef const Conv *c = &plan.c
    if plan.bias != NULL and t.channel == 0:
        sum_pixels(
            c, grads, pitch, pixels, panel_vectors(c, t.panel + panel) * c.kernels.lanes,
            t.accumulators + plan.bias_bytes + panel * c.panel * c.item,
        )


cdef void sum_pixels(const Conv *c, const char *grads, Py_ssize_t pitch, Py_ssize_t pixels, Py_ssize_t width,
                     char *sums) noexcept nogil:
    """sums[i] += sum over pixels of grads[pixel * pitch + i], first added up by themselves."""
    cdef double[MOST_LANES] block
    cdef Py_ssize_t tap = 0
    memset(block, 0, sizeof(block))
    c.kernels.depthwise_weight(
        &tap, 1, <const char *>ONES_32 if c.item == 4 else <const char *>ONES_64, 0, grads, pitch, pixels, width, block
    )
    c.kernels.add(sums, block, width)


cdef void end_task(const WeightPlan *plan, const WeightTask *t) noexcept nogil:
    """Store what a task has, if it has all of it."""
    if plan.accumulators == NULL:
        _store_task(plan, t)


cdef bint reduce_chunks(WeightPlan *plan, TaskFunction task, const void *whole) except *:
    """Run the tasks of a ``whole`` plan and store their sums, unless one refuses; return whether none does.

    Chunks are added up in their order, if no task has stored its own.
    """
    cdef unsigned char refused = 0
    plan.refused = &refused
    run_tasks(task, whole, plan.chunks * plan.tasks, plan.c.threads)
    if plan.accumulators != NULL and not refused:
        run_tasks(_sum_task, plan, plan.tasks, plan.c.threads)
    return not refused


cdef int _sum_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const WeightPlan *plan = <const WeightPlan *>shared
    cdef WeightTask t
    cdef Py_ssize_t chunk
    _locate_task(plan, task, &t)
    for chunk in range(1, plan.chunks):
        plan.c.kernels.add(
            t.accumulators, t.accumulators + chunk * plan.tasks * plan.task_bytes, plan.task_bytes // plan.c.item
        )
    _store_task(plan, &t)
    return 0


cdef void _store_task(const WeightPlan *plan, const WeightTask *t) noexcept nogil:
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t panel, b, first, filters, channels
    cdef const char *sums
    for panel in range(t.panels):
        filters = min(c.panel, c.filters - (t.panel + panel) * c.panel)
        first = t.group * c.filters + (t.panel + panel) * c.panel
        sums = t.accumulators + panel * plan.channel_blocks * c.panel * c.taps * plan.width * c.item
        if plan.filters_first:
            channels = min(plan.channel_blocks * plan.width, c.channels - t.channel)
            _store_filters(c, first, t.channel, filters, channels, plan.channel_blocks * plan.width, sums)
        for b in range(0 if plan.filters_first else t.channel_blocks):
            channels = min(plan.width, c.channels - t.channel - b * plan.width)
            store_weight(
                c, first, t.channel + b * plan.width, filters, channels,
                plan.width, panel_vectors(c, t.panel + panel) * c.kernels.lanes,
                sums + b * c.panel * c.taps * plan.width * c.item,
            )
        if t.channel == 0:
            store_bias(plan, first, filters, t.accumulators + plan.bias_bytes + panel * c.panel * c.item)


cdef void store_bias(const WeightPlan *plan, Py_ssize_t first, Py_ssize_t filters, const char *sums) noexcept nogil:
    """Store the gradient of the bias of some filters, if it is wanted."""
    cdef const Conv *c = &plan.c
    if plan.bias != NULL:
        c.kernels.transpose(sums, 1, 1, 1, filters, plan.bias + first * plan.bias_stride * c.item, plan.bias_stride)


cdef void store_weight(const Conv *c, Py_ssize_t filter, Py_ssize_t channel, Py_ssize_t filters, Py_ssize_t channels,
                       Py_ssize_t block_channels, Py_ssize_t width, const char *accumulators) noexcept nogil:
    """Store [tap][channel][filter] accumulators, rows of ``width``, as weights (filter, channel, tap)."""
    cdef const View *w = &c.w
    cdef fc_epilogue epilogue
    cdef Py_ssize_t tap
    cdef char *turned
    cdef char *out = w.data + (filter * w.stride[0] + channel * w.stride[1]) * c.item
    epilogue.bias = NULL
    epilogue.relu = 0
    epilogue.pixel_stride = w.stride[1]
    epilogue.channel_stride = w.stride[0]
    if channels > 1 and c.taps > 1 and taps_continue(c) and w.stride[4] == 1 and w.stride[1] == c.taps:
        turned = arena(FC_ARENA_BLOCK, channels * c.taps * width * c.item)  # what a task had there is done with
        if turned != NULL:  # OIHW: all rows of a filter are one run
            for tap in range(c.taps):
                c.kernels.transpose(
                    accumulators + tap * block_channels * width * c.item, 1, width, width, channels,
                    turned + tap * width * c.item, c.taps * width,
                )
            epilogue.pixel_stride = 1
            c.kernels.epilogue(&epilogue, turned, width, channels * c.taps, filters, out)
            return
    _store_taps(c, &epilogue, accumulators, block_channels * width, width, channels, filters, out)


cdef void _store_taps(const Conv *c, const fc_epilogue *epilogue, const char *sums, Py_ssize_t tap_step, Py_ssize_t width,
                      Py_ssize_t rows, Py_ssize_t columns, char *out) noexcept nogil:
    """Store the sums of each tap, rows of ``width``, where the weights of the first filter and channel begin at ``out``."""
    cdef const View *w = &c.w
    cdef Py_ssize_t d, h, tap
    for d in range(c.kernel[0]):
        for h in range(c.kernel[1]):
            for tap in range(c.kernel[2]):
                c.kernels.epilogue(
                    epilogue, sums, width, rows, columns,
                    out + (d * w.stride[2] + h * w.stride[3] + tap * w.stride[4]) * c.item,
                )
                sums += tap_step * c.item


cdef void _store_filters(const Conv *c, Py_ssize_t filter, Py_ssize_t channel, Py_ssize_t filters, Py_ssize_t channels,
                         Py_ssize_t width, const char *sums) noexcept nogil:
    """Store [tap][filter of a panel][channel] sums, rows of ``width``, as weights (filter, channel, tap)."""
    cdef const View *w = &c.w
    cdef Py_ssize_t tap_step = c.panel * width, f
    cdef char *out = w.data + (filter * w.stride[0] + channel * w.stride[1]) * c.item
    cdef fc_epilogue epilogue
    if taps_continue(c) and w.stride[1] == c.taps and (c.taps == 1 or w.stride[4] == 1):  # OIHW
        if c.taps == 1:
            c.kernels.transpose(sums, 1, width, channels, filters, out, w.stride[0])
            return
        for f in range(filters):
            c.kernels.transpose(
                sums + f * width * c.item, tap_step, 1, c.taps, channels, out + f * w.stride[0] * c.item, c.taps
            )
        return
    epilogue.bias = NULL
    epilogue.relu = 0
    epilogue.pixel_stride = w.stride[0]
    epilogue.channel_stride = w.stride[1]
    _store_taps(c, &epilogue, sums, tap_step, width, filters, channels, out)
