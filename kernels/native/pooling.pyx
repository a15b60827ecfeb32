"""What the loops of max pooling share: the pooling, the sharing out of its work, rows that a microkernel goes along."""

cimport numpy as cnp

from fastconv.kernels.native.blocking cimport View, ceil_div, make_view
from fastconv.kernels.native.machine cimport fc_runs, ukernels, usable_threads

cdef enum:
    SERIAL_CELLS = 100_000      # fewer comparisons than this are not worth waking a thread
    STREAM_BYTES = 16_777_216   # of the unpooled image: then no cache keeps what is stored
    LINE_BYTES = 64             # a vector as long as a cache line is stored without reading the line before


cdef void make_pool(Pool *p, cnp.ndarray x, cnp.ndarray y, winners, dims, options):
    cdef int axis
    cdef tuple kernel, stride, pad, dilation
    # Taken apart at once: looking up an attribute takes as long as all of this does.
    _, _, _, _, kernel, stride, pad, _, dilation, _ = <tuple>dims
    p.item = cnp.PyArray_ITEMSIZE(x)
    p.kernels = ukernels(p.item)
    make_view(&p.x, x)
    make_view(&p.y, y)
    p.winners = p.y  # nobody looks there if there are none
    p.winner_item = 0
    if winners is not None:
        make_view(&p.winners, winners)
        p.winner_item = <int>cnp.PyArray_ITEMSIZE(winners)
        for axis in range(5):
            if p.y.size[axis] == 1:  # any will do, but windows beside it are reached by that of the other array
                p.winners.stride[axis] = p.y.stride[axis]
    p.taps = 1
    cells = p.y.size[0] * p.y.size[1]
    for axis in range(3):
        p.kernel[axis] = kernel[axis]
        p.stride[axis] = stride[axis]
        p.pad[axis] = pad[axis]
        p.dilation[axis] = dilation[axis]
        p.taps *= p.kernel[axis]
        cells *= p.y.size[2 + axis] * p.kernel[axis]
    p.along_channels = abs(p.x.stride[1]) < abs(p.x.stride[4])
    p.planes = 1 if p.along_channels else p.x.size[1]
    p.threads = usable_threads(options.threads) if cells > SERIAL_CELLS else 1
    p.stream = cnp.PyArray_NBYTES(x) >= STREAM_BYTES and p.kernels.lanes * p.item < LINE_BYTES


cdef Py_ssize_t share_out(Pool *p, Py_ssize_t depth, Py_ssize_t height, Py_ssize_t row_cells) noexcept nogil:
    """Share out the rows of all planes, each of so many comparisons for a channel; return the number of tasks."""
    p.depth = depth
    p.height = height
    p.rows = p.x.size[0] * p.planes * depth * height
    p.task_rows = 1 + TASK_CELLS // (row_cells * (p.x.size[1] // p.planes))
    return ceil_div(p.rows, p.task_rows)


cdef void locate(const Pool *p, Py_ssize_t index, Py_ssize_t end, Rows *rows) noexcept nogil:
    """Find the rows from ``index`` on that can be done in one call."""
    rows.y = index % p.height
    rows.z = index // p.height % p.depth
    rows.channel = index // p.height // p.depth % p.planes
    rows.image = index // p.height // p.depth // p.planes
    rows.count = 1
    if not p.along_channels and p.first[1] <= rows.y < p.last[1]:
        rows.count = min(end - index, p.last[1] - rows.y)


cdef Py_ssize_t residue(const Pool *p, int axis, Py_ssize_t t) noexcept nogil:
    """Return which cell of each group is cell ``t`` of a window."""
    cdef Py_ssize_t distance = t * p.dilation[axis] - p.pad[axis]
    return (distance % p.stride[axis] + p.stride[axis]) % p.stride[axis]


cdef Py_ssize_t shift(const Pool *p, int axis, Py_ssize_t t) noexcept nogil:
    """Return which window has that cell of group 0 for its cell ``t``."""
    return (residue(p, axis, t) - t * p.dilation[axis] + p.pad[axis]) // p.stride[axis]


cdef fc_runs runs_of(const Pool *p, const View *v, Py_ssize_t item, const Rows *rows, Py_ssize_t z, Py_ssize_t y,
                     Py_ssize_t x, Py_ssize_t y_step, Py_ssize_t x_step) noexcept nogil:
    """Return how to go along rows of an array from a cell on, rows and columns being steps apart."""
    cdef fc_runs runs
    runs.data = v.data + (
        rows.image * v.stride[0] + rows.channel * v.stride[1] + z * v.stride[2] + y * v.stride[3] + x * v.stride[4]
    ) * item
    runs.run = x_step * v.stride[4] if p.along_channels else y_step * v.stride[3]
    runs.step = v.stride[1] if p.along_channels else x_step * v.stride[4]
    runs.item = <int>item
    runs.stream = p.stream
    return runs
