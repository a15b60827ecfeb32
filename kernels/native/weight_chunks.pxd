cimport numpy as cnp

from fastconv.kernels.native.blocking cimport Blocks, Conv, TaskFunction

cdef enum:
    WEIGHT_ROWS = 576     # channels times taps that one task computes, ...
    WEIGHT_PANELS = 4     # ... for this many panels: each packed element is used some hundred times
    WEIGHT_TASKS = 16     # fewer tasks than this, and the reduction is cut into fixed chunks ...
    CHUNK_PIXELS = 256    # ... of so many pixels at least: the sums of each are written and read once more

# What all tasks of one weight gradient share. A task computes some channel blocks x some panels of one group, for one fixed
# chunk of the reduction: `units` are the pieces of all images, in order.
ctypedef struct WeightPlan:
    Conv c
    Blocks blocks
    Py_ssize_t width, channel_blocks    # channels in a block; blocks that a task has, ...
    Py_ssize_t task_panels              # ... and panels
    Py_ssize_t channel_tasks, panel_tasks, tasks
    Py_ssize_t units, chunks
    bint filters_first                  # whether sums of a panel are [tap][filter][channel of all blocks]
    Py_ssize_t task_bytes               # accumulators of one task: [panel][channel block][tap][channel][filter], ...
    Py_ssize_t bias_bytes               # ... and from here on [panel][filter], the gradient of the bias
    char *accumulators                  # [chunk][task]; NULL where one chunk is all, and each task stores its own
    char *bias                          # gradient of the bias; NULL: not wanted
    Py_ssize_t bias_stride
    unsigned char *refused              # whether a task found numbers that it can't use

# One task: where its channels, filters and units are.
ctypedef struct WeightTask:
    Py_ssize_t group, channel, channel_blocks, panel, panels, first_unit, end_unit
    char *accumulators

cdef Py_ssize_t even_panels(const Conv *c) noexcept nogil
cdef void plan_chunks(WeightPlan *plan, Py_ssize_t units, cnp.ndarray grad_bias) except *
cdef void want_bias(WeightPlan *plan, cnp.ndarray grad_bias)
cdef int start_task(const WeightPlan *plan, Py_ssize_t task, WeightTask *t) noexcept nogil
cdef void clear_sums(const WeightPlan *plan, const WeightTask *t) noexcept nogil
cdef void add_bias(const WeightPlan *plan, const WeightTask *t, Py_ssize_t panel, const char *grads,
                   Py_ssize_t pixels) noexcept nogil
cdef void add_pixels(const WeightPlan *plan, const WeightTask *t, Py_ssize_t panel, const char *grads, Py_ssize_t pitch,
                     Py_ssize_t pixels) noexcept nogil
cdef void sum_gradients(cnp.ndarray grad_output, cnp.ndarray grad_bias, options) except *
cdef void end_task(const WeightPlan *plan, const WeightTask *t) noexcept nogil
cdef void store_bias(const WeightPlan *plan, Py_ssize_t first, Py_ssize_t filters, const char *sums) noexcept nogil
cdef bint reduce_chunks(WeightPlan *plan, TaskFunction task, const void *whole) except *
cdef void sum_pixels(const Conv *c, const char *grads, Py_ssize_t pitch, Py_ssize_t pixels, Py_ssize_t width,
                     char *sums) noexcept nogil
cdef void store_weight(const Conv *c, Py_ssize_t filter, Py_ssize_t channel, Py_ssize_t filters, Py_ssize_t channels,
                       Py_ssize_t block_channels, Py_ssize_t width, const char *accumulators) noexcept nogil
