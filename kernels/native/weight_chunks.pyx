"""How the gradient of the weights is shared out: the same bits for any number of threads.

                 filters                      The matrix (channels * taps) x filters of each group is cut into tasks. Where
             +------+------+                  these are few, the reduction over the pixels of the batch is cut, too, into
    channels | task | task |  x  chunks       chunks whose number depends on the shape alone. Each chunk has accumulators
     * taps  +------+------+                  of its own; their sum is taken in the order of the chunks.
             | task | task |
             +------+------+
"""

from cython.parallel cimport prange

from fastconv.kernels.native.blocking cimport Conv, View, ceil_div, panel_vectors
from fastconv.kernels.native.machine cimport FC_ARENA_WEIGHTS, arena, fc_epilogue


cdef void plan_chunks(WeightPlan *plan, Py_ssize_t units) except *:
    """Complete a plan that has ``width`` and ``channel_blocks``."""
    cdef const Conv *c = &plan.c
    plan.channel_tasks = ceil_div(c.channels, (plan.channel_blocks * plan.width))
    plan.panel_tasks = ceil_div(c.panels, WEIGHT_PANELS)
    plan.tasks = c.groups * plan.channel_tasks * plan.panel_tasks
    plan.units = units
    plan.chunks = max(1, min(units, WEIGHT_TASKS // plan.tasks))
    plan.task_bytes = WEIGHT_PANELS * c.panel * plan.channel_blocks * plan.width * c.taps * c.item
    plan.accumulators = arena(FC_ARENA_WEIGHTS, plan.chunks * plan.tasks * plan.task_bytes)
    if plan.accumulators == NULL:
        raise MemoryError("no memory for the gradient of the weights")


cdef void locate_task(const WeightPlan *plan, Py_ssize_t task, WeightTask *t) noexcept nogil:
    """Find task number ``task``; those of one chunk follow one another."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t chunk = task // plan.tasks
    t.accumulators = plan.accumulators + task * plan.task_bytes
    t.first_unit = plan.units * chunk // plan.chunks
    t.end_unit = plan.units * (chunk + 1) // plan.chunks
    task = task % plan.tasks
    t.panel = task % plan.panel_tasks * WEIGHT_PANELS
    t.panels = min(<Py_ssize_t>WEIGHT_PANELS, c.panels - t.panel)
    task = task // plan.panel_tasks
    t.channel = task % plan.channel_tasks * plan.channel_blocks * plan.width
    t.channel_blocks = min(plan.channel_blocks, ceil_div((c.channels - t.channel), plan.width))
    t.group = task // plan.channel_tasks


cdef void sum_chunks(const WeightPlan *plan, Py_ssize_t failures) except *:
    """Add up the chunks in their order and store the sums."""
    cdef Py_ssize_t task
    if failures:
        raise MemoryError("no memory for the workspace of a convolution")
    with nogil:
        for task in prange(plan.tasks, num_threads=plan.c.threads, schedule="static"):
            _sum_task(plan, task)


cdef void _sum_task(const WeightPlan *plan, Py_ssize_t task) noexcept nogil:
    cdef const Conv *c = &plan.c
    cdef WeightTask t
    cdef Py_ssize_t chunk, panel, b, filters, channels
    locate_task(plan, task, &t)
    for chunk in range(1, plan.chunks):
        _add(c.item, t.accumulators, t.accumulators + chunk * plan.tasks * plan.task_bytes, plan.task_bytes)
    for panel in range(t.panels):
        filters = min(c.panel, c.filters - (t.panel + panel) * c.panel)
        for b in range(t.channel_blocks):
            channels = min(plan.width, c.channels - t.channel - b * plan.width)
            store_weight(
                c, t.group * c.filters + (t.panel + panel) * c.panel, t.channel + b * plan.width, filters, channels,
                plan.width, panel_vectors(c, t.panel + panel) * c.kernels.lanes,
                t.accumulators + (panel * plan.channel_blocks + b) * c.panel * c.taps * plan.width * c.item,
            )


cdef void store_weight(const Conv *c, Py_ssize_t filter, Py_ssize_t channel, Py_ssize_t filters, Py_ssize_t channels,
                       Py_ssize_t block_channels, Py_ssize_t width, const char *accumulators) noexcept nogil:
    """Store [tap][channel][filter] accumulators, rows of ``width``, as weights (filter, channel, tap)."""
    cdef const View *w = &c.w
    cdef fc_epilogue epilogue
    cdef Py_ssize_t d, h, tap
    cdef char *out = w.data + (filter * w.stride[0] + channel * w.stride[1]) * c.item
    epilogue.bias = NULL
    epilogue.relu = 0
    epilogue.pixel_stride = w.stride[1]
    epilogue.channel_stride = w.stride[0]
    for d in range(c.kernel[0]):
        for h in range(c.kernel[1]):
            for tap in range(c.kernel[2]):
                c.kernels.epilogue(
                    &epilogue, accumulators, width, channels, filters,
                    out + (d * w.stride[2] + h * w.stride[3] + tap * w.stride[4]) * c.item,
                )
                accumulators += block_channels * width * c.item


cdef void _add(Py_ssize_t item, char *total, const char *more, Py_ssize_t bytes) noexcept nogil:
    """total += more, float32 or float64."""
    cdef Py_ssize_t i
    if item == 4:
        for i in range(bytes // 4):
            (<float *>total)[i] += (<const float *>more)[i]
    else:
        for i in range(bytes // 8):
            (<double *>total)[i] += (<const double *>more)[i]
