"""Max pooling, forward and backward.

    output[p] = max over cells t of the window of  input[p * stride + t * dilation - padding]

    for image, and for group of channels or channel:        in parallel
        for output row:
            for cell of the window that has any output inside the image:
                max_update: all outputs of the row at once, compared with that cell
            store best values and winners

The row runs along whichever dimension is contiguous: along W for channels-first images, along C (for each output column)
for channels-last ones; the microkernel knows only a step. Backward scatters each gradient to its winner, in the order of the
outputs; no two tasks share a plane.
"""

cimport numpy as cnp
from cython.parallel cimport prange
from libc.math cimport INFINITY
from libc.string cimport memset

from fastconv.kernels.native.blocking cimport View, ceil_div, make_view
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, arena, fc_ukernels, ukernels, usable_threads

ctypedef unsigned char uchar
ctypedef unsigned short ushort

cdef enum:
    SERIAL_CELLS = 100_000      # fewer comparisons than this are not worth waking a thread
    CHANNELS = 64               # channels that a task has of a channels-last image

# One pooling; `channels` is how many channels a task has, `along_channels` whether rows run along them.
ctypedef struct Pool:
    const fc_ukernels *kernels
    Py_ssize_t item
    View x, y, winners
    Py_ssize_t winner_item      # 0: no winners wanted
    Py_ssize_t kernel[3]
    Py_ssize_t stride[3]
    Py_ssize_t pad[3]
    Py_ssize_t dilation[3]
    Py_ssize_t channels, channel_tasks
    bint along_channels
    int threads


cdef void _make_pool(Pool *p, cnp.ndarray x, cnp.ndarray y, winners, dims, options):
    cdef int axis
    p.item = cnp.PyArray_ITEMSIZE(x)
    p.kernels = ukernels(p.item)
    make_view(&p.x, x)
    make_view(&p.y, y)
    p.winner_item = 0
    if winners is not None:
        make_view(&p.winners, winners)
        p.winner_item = cnp.PyArray_ITEMSIZE(winners)
    cells = p.y.size[0] * p.y.size[1]
    for axis in range(3):
        p.kernel[axis] = dims.kernel_size[axis]
        p.stride[axis] = dims.stride[axis]
        p.pad[axis] = dims.pad_before[axis]
        p.dilation[axis] = dims.dilation[axis]
        cells *= p.y.size[2 + axis] * p.kernel[axis]
    p.along_channels = abs(p.x.stride[1]) < abs(p.x.stride[4])
    p.channels = CHANNELS if p.along_channels else 1
    p.channel_tasks = ceil_div(p.x.size[1], p.channels)
    p.threads = usable_threads(options.threads) if cells > SERIAL_CELLS else 1


cdef Py_ssize_t clip(Py_ssize_t value, Py_ssize_t low, Py_ssize_t high) noexcept nogil:
    return low if value < low else high if value > high else value


# --------------------------------------------------------------------------------------------------------- forward

def max_pool_forward(input, output, winners, dims, options):
    """See ``fastconv.kernels``."""
    cdef Pool pool
    cdef Py_ssize_t task, failures = 0
    _make_pool(&pool, input, output, winners, dims, options)
    with nogil:
        for task in prange(pool.x.size[0] * pool.channel_tasks, num_threads=pool.threads, schedule="dynamic"):
            failures += _forward_task(&pool, task)
    if failures:
        raise MemoryError("no memory for the workspace of a pooling")


cdef int _forward_task(const Pool *p, Py_ssize_t task) noexcept nogil:
    cdef Py_ssize_t image = task // p.channel_tasks, channel = task % p.channel_tasks * p.channels
    cdef Py_ssize_t channels = min(p.channels, p.x.size[1] - channel)
    cdef Py_ssize_t length = channels if p.along_channels else p.y.size[4]
    cdef char *best = arena(FC_ARENA_BLOCK, length * (p.item + 4) + 64)
    cdef Py_ssize_t z, y, x
    if best == NULL:
        return 1
    cdef int *winner = <int *>(best + length * p.item)
    for z in range(p.y.size[2]):
        for y in range(p.y.size[3]):
            if p.along_channels:
                for x in range(p.y.size[4]):
                    _row(p, image, channel, z, y, x, 1, channels, best, winner)
            else:
                _row(p, image, channel, z, y, 0, p.y.size[4], 1, best, winner)
    return 0


cdef void _row(const Pool *p, Py_ssize_t image, Py_ssize_t channel, Py_ssize_t z, Py_ssize_t y, Py_ssize_t x,
               Py_ssize_t columns, Py_ssize_t channels, char *best, int *winner) noexcept nogil:
    """Pool ``columns`` outputs of one channel, or one output of ``channels`` channels."""
    cdef Py_ssize_t length = max(columns, channels), i, d, h, w, cell = -1, start, stop
    cdef Py_ssize_t iz, iy, left
    cdef const View *v = &p.x
    cdef const char *base = v.data + (image * v.stride[0] + channel * v.stride[1]) * p.item
    cdef Py_ssize_t step = v.stride[1] if p.along_channels else p.stride[2] * v.stride[4]
    for i in range(length):
        winner[i] = -1
        if p.item == 4:
            (<float *>best)[i] = -INFINITY
        else:
            (<double *>best)[i] = -INFINITY
    for d in range(p.kernel[0]):
        iz = z * p.stride[0] - p.pad[0] + d * p.dilation[0]
        for h in range(p.kernel[1]):
            iy = y * p.stride[1] - p.pad[1] + h * p.dilation[1]
            for w in range(p.kernel[2]):
                cell += 1
                left = x * p.stride[2] - p.pad[2] + w * p.dilation[2]
                if iz < 0 or iz >= v.size[2] or iy < 0 or iy >= v.size[3] or left >= v.size[4]:
                    continue
                # The outputs start to stop of the row see this cell inside the image.
                start = 0 if left >= 0 else min((-left + p.stride[2] - 1) // p.stride[2], columns)
                stop = min((v.size[4] - 1 - left) // p.stride[2] + 1, columns)
                if stop <= start:
                    continue
                left += start * p.stride[2]
                p.kernels.max_update(
                    base + (iz * v.stride[2] + iy * v.stride[3] + left * v.stride[4]) * p.item, step,
                    channels if p.along_channels else stop - start, best + start * p.item, winner + start, <int>cell,
                )
    _store_row(p, image, channel, z, y, x, length, best, winner)


cdef void _store_row(const Pool *p, Py_ssize_t image, Py_ssize_t channel, Py_ssize_t z, Py_ssize_t y, Py_ssize_t x,
                     Py_ssize_t length, const char *best, const int *winner) noexcept nogil:
    cdef const View *v = &p.y
    cdef int axis = 1 if p.along_channels else 4
    cdef char *out = v.data + (
        image * v.stride[0] + channel * v.stride[1] + z * v.stride[2] + y * v.stride[3] + x * v.stride[4]
    ) * p.item
    cdef Py_ssize_t i, step = v.stride[axis]
    for i in range(length):
        if p.item == 4:
            (<float *>out)[i * step] = (<const float *>best)[i]
        else:
            (<double *>out)[i * step] = (<const double *>best)[i]
    if p.winner_item == 0:
        return
    v = &p.winners
    step = v.stride[axis]
    out = v.data + (
        image * v.stride[0] + channel * v.stride[1] + z * v.stride[2] + y * v.stride[3] + x * v.stride[4]
    ) * p.winner_item
    for i in range(length):
        if p.winner_item == 1:
            (<unsigned char *>out)[i * step] = <unsigned char>max(winner[i], 0)
        else:
            (<unsigned short *>out)[i * step] = <unsigned short>max(winner[i], 0)


# -------------------------------------------------------------------------------------------------------- backward

def max_pool_backward(grad_output, winners, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    cdef Pool pool
    cdef Py_ssize_t task, failures = 0
    _make_pool(&pool, grad_input, grad_output, winners, dims, options)
    with nogil:
        for task in prange(pool.x.size[0] * pool.channel_tasks, num_threads=pool.threads, schedule="dynamic"):
            failures += _backward_task(&pool, task)
    if failures:
        raise MemoryError("no memory for the workspace of a pooling")


# Where a cell of a window is, from the window's first cell.
ctypedef struct Cell:
    Py_ssize_t z, y, x, offset

ctypedef fused real:
    float
    double

ctypedef fused index:
    uchar
    ushort


cdef int _backward_task(const Pool *p, Py_ssize_t task) noexcept nogil:
    cdef Py_ssize_t image = task // p.channel_tasks, channel = task % p.channel_tasks * p.channels
    cdef Py_ssize_t channels = min(p.channels, p.x.size[1] - channel), d, h, w
    cdef Cell *cells = <Cell *>arena(FC_ARENA_BLOCK, p.kernel[0] * p.kernel[1] * p.kernel[2] * <Py_ssize_t>sizeof(Cell))
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
    cdef const View *vy = &p.y
    cdef const View *vw = &p.winners
    cdef const Cell *last = &cells[p.kernel[0] * p.kernel[1] * p.kernel[2] - 1]
    cdef bint rows_inside = (
        0 <= z and z + last.z < vx.size[2] and 0 <= y0 and y0 + last.y < vx.size[3]
    )
    cdef Py_ssize_t ox, c, x0, first
    cdef const Cell *cell
    cdef bint inside
    for ox in range(vy.size[4]):
        x0 = ox * p.stride[2] - p.pad[2]
        first = z * vx.stride[2] + y0 * vx.stride[3] + x0 * vx.stride[4]
        inside = rows_inside and 0 <= x0 and x0 + last.x < vx.size[4]  # so is every cell of this window
        for c in range(channels):
            cell = &cells[winners[ox * vw.stride[4] + c * vw.stride[1]]]
            if inside or (
                0 <= z + cell.z < vx.size[2] and 0 <= y0 + cell.y < vx.size[3] and 0 <= x0 + cell.x < vx.size[4]
            ):
                x[first + cell.offset + c * vx.stride[1]] += y[ox * vy.stride[4] + c * vy.stride[1]]


cdef void _zero(const View *vx, Py_ssize_t channels, real *x) noexcept nogil:
    """Zero some channels' planes, row by row along whichever dimension is contiguous."""
    cdef Py_ssize_t z, y, i, c
    cdef real *row
    for z in range(vx.size[2]):
        for y in range(vx.size[3]):
            row = x + z * vx.stride[2] + y * vx.stride[3]
            if channels == 1 and vx.stride[4] == 1:
                memset(row, 0, <size_t>(vx.size[4] * <Py_ssize_t>sizeof(real)))
                continue
            for i in range(vx.size[4]):
                for c in range(channels):
                    row[i * vx.stride[4] + c * vx.stride[1]] = 0
