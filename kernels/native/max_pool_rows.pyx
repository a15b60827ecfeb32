"""Max pooling, row by row: any image, whatever numbers are in it.

    for some rows of windows:                                                in parallel
        for columns of windows that see the same cells:                      (a border is a call of its own)
            one call of a microkernel: each maximum is in a register until it is stored

        +-+----------------+-+      channels first: vectors along W, one call for many rows
        | |     border     | |      channels last: vectors along C, one call for the columns of a row
        +-+----------------+-+
        | |    interior    | |      A cell of the padding is not on the list of cells that a call is given:
        | |   (one call)   | |      a border needs no code of its own, only calls of its own.
        +-+----------------+-+
"""

from fastconv.kernels.native.blocking cimport View, ceil_div, run_tasks
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, arena, fc_cells, fc_runs, fence
from fastconv.kernels.native.pooling cimport Pool, Rows, locate, runs_of, share_out


cdef void pool_by_rows(Pool *p) except *:
    """Compute maxima and winners."""
    run_tasks(_rows_task, p, ceil_div(p.rows, p.task_rows), p.threads)


cdef void number_rows(Pool *p) noexcept nogil:
    """Find the interior, and number the rows of windows of all planes."""
    cdef Py_ssize_t reach
    cdef int axis
    for axis in range(3):
        reach = p.x.size[2 + axis] + p.pad[axis] - (p.kernel[axis] - 1) * p.dilation[axis]  # first cells are below it
        p.first[axis] = min(ceil_div(p.pad[axis], p.stride[axis]), p.y.size[2 + axis])
        p.last[axis] = max(p.first[axis], min(ceil_div(reach, p.stride[axis]), p.y.size[2 + axis]))
    share_out(p, p.y.size[2], p.y.size[3], p.y.size[4] * p.taps)


cdef int _rows_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Pool *p = <const Pool *>shared
    cdef char *memory = arena(FC_ARENA_BLOCK, cells_bytes(p))
    if memory == NULL:
        return 1
    pool_rows(p, task * p.task_rows, min(task * p.task_rows + p.task_rows, p.rows), memory)
    if p.stream:
        fence()
    return 0


cdef Py_ssize_t cells_bytes(const Pool *p) noexcept nogil:
    """Return the size of the list of a window's cells."""
    return p.taps * <Py_ssize_t>(sizeof(Py_ssize_t) + sizeof(int))


cdef void pool_rows(const Pool *p, Py_ssize_t index, Py_ssize_t end, char *memory) noexcept nogil:
    """Pool rows ``index`` to ``end``; the list of a window's cells is written to ``memory``."""
    cdef fc_cells cells
    cells.offsets = <Py_ssize_t *>memory
    cells.numbers = <int *>(memory + p.taps * <Py_ssize_t>sizeof(Py_ssize_t))
    cdef Py_ssize_t columns = p.last[2] - p.first[2], i
    cdef Rows rows
    while index < end:
        locate(p, index, end, &rows)
        if columns:
            _pool(p, &cells, &rows, p.first[2], columns)
        for i in range(p.y.size[4] - columns):
            _pool(p, &cells, &rows, i if i < p.first[2] else i + columns, 1)
        index += rows.count


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
