"""The gradient of max pooling for large windows and short rows: each gradient is added where its winner is.

    for images, and channels (of channels-last images some at a time):       in parallel
        zero their cells
        for windows:  grad_input[cell of the winner] += grad_output
"""

from libc.string cimport memset

from fastconv.kernels.native.blocking cimport View, ceil_div, run_tasks
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, arena
from fastconv.kernels.native.pooling cimport Pool, uchar

ctypedef unsigned short ushort

cdef enum:
    CHANNELS = 64               # that a task has of a channels-last image
    PLANES = 8                  # of another: sums into neighbours of one plane would wait for each other


cdef void scatter(Pool *p) except *:
    """Compute the gradient of the input."""
    tasks = p.x.size[0] * ceil_div(p.x.size[1], CHANNELS if p.along_channels else PLANES)
    run_tasks(_scatter_task, p, tasks, p.threads)


# Where a cell of a window is, from the window's first cell.
ctypedef struct Cell:
    Py_ssize_t z, y, x, offset

ctypedef fused real:
    float
    double

ctypedef fused index:
    uchar
    ushort


cdef int _scatter_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Pool *p = <const Pool *>shared
    cdef Py_ssize_t most = CHANNELS if p.along_channels else PLANES, parts = ceil_div(p.x.size[1], most), d, h, w
    cdef Py_ssize_t image = task // parts, channel = task % parts * most, channels = min(most, p.x.size[1] - channel)
    cdef Cell *cells = <Cell *>arena(FC_ARENA_BLOCK, p.taps * <Py_ssize_t>sizeof(Cell))
    cdef Cell *cell = cells
    if cells == NULL:
        return 1
    for d in range(p.kernel[0]):
        for h in range(p.kernel[1]):
            for w in range(p.kernel[2]):
                cell.z = d * p.dilation[0]
                cell.y = h * p.dilation[1]
                cell.x = w * p.dilation[2]
                cell.offset = cell.z * p.x.stride[2] + cell.y * p.x.stride[3] + cell.x * p.x.stride[4]
                cell += 1
    if p.item == 4 and p.winner_item == 1:
        _scatter[float, uchar](p, image, channel, channels, cells, <float *>p.x.data, <float *>p.y.data,
                               <uchar *>p.winners.data)
    elif p.item == 4:
        _scatter[float, ushort](p, image, channel, channels, cells, <float *>p.x.data, <float *>p.y.data,
                                <ushort *>p.winners.data)
    elif p.winner_item == 1:
        _scatter[double, uchar](p, image, channel, channels, cells, <double *>p.x.data, <double *>p.y.data,
                                <uchar *>p.winners.data)
    else:
        _scatter[double, ushort](p, image, channel, channels, cells, <double *>p.x.data, <double *>p.y.data,
                                 <ushort *>p.winners.data)
    return 0


cdef void _scatter(const Pool *p, Py_ssize_t image, Py_ssize_t channel, Py_ssize_t channels, const Cell *cells, real *x,
                   const real *y, const index *winners) noexcept nogil:
    """Zero some channels' planes of the gradient of the input; add each gradient of the output where its winner is."""
    cdef const View *vx = &p.x
    cdef const View *vy = &p.y
    cdef const View *vw = &p.winners
    cdef Py_ssize_t oz, oy, z, y0, from_y, from_w
    x += image * vx.stride[0] + channel * vx.stride[1]
    _zero(vx, channels, x)
    for oz in range(vy.size[2]):
        z = oz * p.stride[0] - p.pad[0]
        for oy in range(vy.size[3]):
            y0 = oy * p.stride[1] - p.pad[1]
            from_y = image * vy.stride[0] + channel * vy.stride[1] + oz * vy.stride[2] + oy * vy.stride[3]
            from_w = image * vw.stride[0] + channel * vw.stride[1] + oz * vw.stride[2] + oy * vw.stride[3]
            _scatter_row(p, channels, cells, z, y0, x, y + from_y, winners + from_w)


cdef void _scatter_row(const Pool *p, Py_ssize_t channels, const Cell *cells, Py_ssize_t z, Py_ssize_t y0, real *x,
                       const real *y, const index *winners) noexcept nogil:
    """Add the gradients of one row of windows, whose first cells are at depth z and row y0."""
    cdef const View *vx = &p.x
    cdef const Cell *far = &cells[p.taps - 1]
    cdef Py_ssize_t y_step = p.y.stride[4], won_step = p.winners.stride[4], n = p.y.size[4], inside = 0, last = 0, ox
    if 0 <= z and z + far.z < vx.size[2] and 0 <= y0 and y0 + far.y < vx.size[3]:
        inside = min(ceil_div(p.pad[2], p.stride[2]), n)
        last = max(inside, min(ceil_div(vx.size[4] + p.pad[2] - far.x, p.stride[2]), n))
    cdef real *row = x + z * vx.stride[2] + y0 * vx.stride[3] - p.pad[2] * vx.stride[4]
    for ox in range(n):
        if inside <= ox < last:
            _scatter_window(channels, cells, vx.stride[1], p.y.stride[1], p.winners.stride[1],
                            row + ox * p.stride[2] * vx.stride[4], y + ox * y_step, winners + ox * won_step)
        else:
            _scatter_checked(p, channels, cells, z, y0, ox * p.stride[2] - p.pad[2], x, y + ox * y_step,
                             winners + ox * won_step)


cdef inline void _scatter_window(Py_ssize_t channels, const Cell *cells, Py_ssize_t x_step, Py_ssize_t y_step,
                                 Py_ssize_t won_step, real *x, const real *y, const index *winners) noexcept nogil:
    """Add the gradients of a window that is inside the image, in each of some channels."""
    cdef Py_ssize_t c
    for c in range(channels):
        x[cells[winners[c * won_step]].offset + c * x_step] += y[c * y_step]


cdef void _scatter_checked(const Pool *p, Py_ssize_t channels, const Cell *cells, Py_ssize_t z, Py_ssize_t y0,
                           Py_ssize_t x0, real *x, const real *y, const index *winners) noexcept nogil:
    """The same for a window that may reach beyond the image, where nothing is added."""
    cdef const View *vx = &p.x
    cdef Py_ssize_t c, first = z * vx.stride[2] + y0 * vx.stride[3] + x0 * vx.stride[4]
    cdef const Cell *cell
    for c in range(channels):
        cell = &cells[winners[c * p.winners.stride[1]]]
        if 0 <= z + cell.z < vx.size[2] and 0 <= y0 + cell.y < vx.size[3] and 0 <= x0 + cell.x < vx.size[4]:
            x[first + cell.offset + c * vx.stride[1]] += y[c * p.y.stride[1]]


cdef void _zero(const View *vx, Py_ssize_t channels, real *x) noexcept nogil:
    """Zero some channels' planes, row by row along whichever dimension is contiguous."""
    cdef Py_ssize_t z, y, i, c
    cdef real *row
    for z in range(vx.size[2]):
        for y in range(vx.size[3]):
            row = x + z * vx.stride[2] + y * vx.stride[3]
            if vx.stride[4] == 1:
                for c in range(channels):
                    memset(row + c * vx.stride[1], 0, <size_t>(vx.size[4] * <Py_ssize_t>sizeof(real)))
                continue
            for i in range(vx.size[4]):
                for c in range(channels):
                    row[i * vx.stride[4] + c * vx.stride[1]] = 0
