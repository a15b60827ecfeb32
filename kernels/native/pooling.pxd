cimport numpy as cnp

from fastconv.kernels.native.blocking cimport View
from fastconv.kernels.native.machine cimport fc_runs, fc_ukernels

ctypedef unsigned char uchar

cdef enum:
    TASK_CELLS = 32_768         # comparisons of a task: what it reads and writes stays in L2

# One pooling. A channels-last image is a single plane.
ctypedef struct Pool:
    const fc_ukernels *kernels
    Py_ssize_t item
    View x, y, winners
    int winner_item             # 0: no winners wanted
    Py_ssize_t kernel[3]
    Py_ssize_t stride[3]
    Py_ssize_t pad[3]
    Py_ssize_t dilation[3]
    Py_ssize_t taps
    bint along_channels         # whether vectors run along C
    Py_ssize_t planes           # of an image
    Py_ssize_t depth, height    # of a plane: rows of outputs, or groups of `stride` rows of the input
    Py_ssize_t first[3]         # the interior along each axis: outputs, or members of each class
    Py_ssize_t last[3]
    int columns                 # of classes that are done together
    Py_ssize_t rows, task_rows  # in all, of a task
    int threads
    bint stream

# Rows that see the same cells, from one at z, y on.
ctypedef struct Rows:
    Py_ssize_t image, channel, z, y, count


cdef void make_pool(Pool *p, cnp.ndarray x, cnp.ndarray y, winners, dims, options)
cdef Py_ssize_t share_out(Pool *p, Py_ssize_t depth, Py_ssize_t height, Py_ssize_t row_cells) noexcept nogil
cdef void locate(const Pool *p, Py_ssize_t index, Py_ssize_t end, Rows *rows) noexcept nogil
cdef Py_ssize_t residue(const Pool *p, int axis, Py_ssize_t t) noexcept nogil
cdef Py_ssize_t shift(const Pool *p, int axis, Py_ssize_t t) noexcept nogil
cdef fc_runs runs_of(const Pool *p, const View *v, Py_ssize_t item, const Rows *rows, Py_ssize_t z, Py_ssize_t y,
                     Py_ssize_t x, Py_ssize_t y_step, Py_ssize_t x_step) noexcept nogil
