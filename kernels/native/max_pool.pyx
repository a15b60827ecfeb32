"""Max pooling, forward and backward.

    output[o]     = max over cells t of the window  of  input[o * stride + t * dilation - padding]
    grad_input[i] = sum over windows o that have i as their cell t and winner  of  grad_output[o]

    for some rows of outputs (forward) or of cells of the input (backward):         in parallel
        for rows and columns that see the same cells (that are seen by the same windows):
            one call of a microkernel: each maximum (sum) is in a register until it is stored

        +-+----------------+-+      channels first: vectors along W, one call for many rows
        | |     border     | |      channels last: vectors along C, one call for the columns of a row
        +-+----------------+-+
        | |    interior    | |      A cell of the padding is not on the list of cells that a call is given:
        | |   (one call)   | |      a border needs no code of its own, only calls of its own.
        +-+----------------+-+

Backward gathers: cells of the input that are a stride apart make up a class, and are seen by windows at the same distance
from them. The classes of a row are stored together, so that every cell is written once and never read: ``max_pool_rows``
and ``max_pool_channels``. Where windows are large, gradients are scattered to their winners instead: ``max_pool_scatter``.
Either way a sum runs over the windows in their order.
"""

from fastconv.kernels.native.blocking cimport ceil_div, run_tasks
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, arena, fc_cells, fc_runs, fence
from fastconv.kernels.native.max_pool_channels cimport gather_along_channels
from fastconv.kernels.native.max_pool_rows cimport gather_along_rows
from fastconv.kernels.native.max_pool_scatter cimport scatter
from fastconv.kernels.native.pooling cimport Pool, Rows, View, locate, make_pool, runs_of, share_out

cdef enum:
    GATHER_TAPS = 36            # larger windows are scattered, ...
    GATHER_CLASSES = 16         # ... and so are those that have more classes of cells, ...
    SHORT = 4                   # ... and rows of fewer windows; rows of fewer than a vector, if windows overlap


# --------------------------------------------------------------------------------------------------------- forward

def max_pool_forward(input, output, winners, dims, options):
    """See ``fastconv.kernels``."""
    cdef Pool pool
    cdef Pool *p = &pool
    cdef Py_ssize_t tasks, reach
    cdef int axis
    make_pool(p, input, output, winners, dims, options)
    for axis in range(3):
        reach = p.x.size[2 + axis] + p.pad[axis] - (p.kernel[axis] - 1) * p.dilation[axis]  # first cells are below it
        p.first[axis] = min(ceil_div(p.pad[axis], p.stride[axis]), p.y.size[2 + axis])
        p.last[axis] = max(p.first[axis], min(ceil_div(reach, p.stride[axis]), p.y.size[2 + axis]))
    tasks = share_out(p, p.y.size[2], p.y.size[3], p.y.size[4] * p.taps)
    run_tasks(_forward_task, p, tasks, p.threads)


cdef int _forward_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Pool *p = <const Pool *>shared
    cdef Py_ssize_t *offsets = <Py_ssize_t *>arena(
        FC_ARENA_BLOCK, p.taps * <Py_ssize_t>(sizeof(Py_ssize_t) + sizeof(int))
    )
    if offsets == NULL:
        return 1
    cdef fc_cells cells
    cells.offsets = offsets
    cells.numbers = <int *>(offsets + p.taps)
    cdef Py_ssize_t index = task * p.task_rows, end = min(index + p.task_rows, p.rows), columns = p.last[2] - p.first[2]
    cdef Py_ssize_t i
    cdef Rows rows
    while index < end:
        locate(p, index, end, &rows)
        if columns:
            _pool(p, &cells, &rows, p.first[2], columns)
        for i in range(p.y.size[4] - columns):
            _pool(p, &cells, &rows, i if i < p.first[2] else i + columns, 1)
        index += rows.count
    if p.stream:
        fence()
    return 0


cdef void _pool(const Pool *p, fc_cells *cells, const Rows *rows, Py_ssize_t x, Py_ssize_t columns) noexcept nogil:
    """Pool windows that see the same cells."""
    cdef Py_ssize_t first_z = rows.z * p.stride[0] - p.pad[0]
    cdef Py_ssize_t first_y = rows.y * p.stride[1] - p.pad[1]
    cdef Py_ssize_t first_x = x * p.stride[2] - p.pad[2]
    cdef fc_runs from_x = runs_of(p, &p.x, p.item, rows, first_z, first_y, first_x, p.stride[1], p.stride[2])
    cdef fc_runs to_y = runs_of(p, &p.y, p.item, rows, rows.z, rows.y, x, 1, 1)
    cdef fc_runs to_winners = runs_of(p, &p.winners, p.winner_item, rows, rows.z, rows.y, x, 1, 1)
    _list_cells(p, first_z, first_y, first_x, cells)
    if p.along_channels:
        p.kernels.max_pool(cells, columns, p.x.size[1], &from_x, &to_y, &to_winners)
    else:
        p.kernels.max_pool(cells, rows.count, columns, &from_x, &to_y, &to_winners)


cdef void _list_cells(const Pool *p, Py_ssize_t first_z, Py_ssize_t first_y, Py_ssize_t first_x,
                      fc_cells *cells) noexcept nogil:
    """List the cells inside the image of a window whose first cell is there."""
    cdef const View *v = &p.x
    cdef Py_ssize_t *offsets = <Py_ssize_t *>cells.offsets
    cdef int *numbers = <int *>cells.numbers
    cdef Py_ssize_t d, h, w, z, y, x, n = 0
    numbers[0] = 0  # the winner of a window that sees no cell
    for d in range(p.kernel[0]):
        z = d * p.dilation[0]
        for h in range(p.kernel[1]):
            y = h * p.dilation[1]
            if not (0 <= first_z + z < v.size[2] and 0 <= first_y + y < v.size[3]):
                continue
            for w in range(p.kernel[2]):
                x = w * p.dilation[2]
                if 0 <= first_x + x < v.size[4]:
                    offsets[n] = z * v.stride[2] + y * v.stride[3] + x * v.stride[4]
                    numbers[n] = <int>((d * p.kernel[1] + h) * p.kernel[2] + w)
                    n += 1
    cells.count = n


# -------------------------------------------------------------------------------------------------------- backward

def max_pool_backward(grad_output, winners, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    cdef Pool pool
    cdef Pool *p = &pool
    make_pool(p, grad_input, grad_output, winners, dims, options)
    if not _can_gather(p):
        scatter(p)
    elif p.along_channels:
        gather_along_channels(p)
    else:
        gather_along_rows(p)


cdef bint _can_gather(const Pool *p) noexcept nogil:
    """Whether gathering is worth it, and the outputs' gradients and winners are contiguous in the same way."""
    cdef int axis, along = 1 if p.along_channels else 4
    cdef Py_ssize_t shortest = min(<Py_ssize_t>p.kernels.lanes, SHORT)
    for axis in range(5):
        if p.y.stride[axis] != p.winners.stride[axis] and p.y.size[axis] > 1:
            return False
    for axis in range(3):
        if (p.kernel[axis] - 1) * p.dilation[axis] >= p.stride[axis]:
            shortest = p.kernels.lanes
    if p.taps > GATHER_TAPS or <double>p.stride[0] * p.stride[1] * p.stride[2] > GATHER_CLASSES:
        return False
    return p.y.stride[along] == 1 and p.y.size[along] >= shortest
