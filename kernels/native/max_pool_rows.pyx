"""The gradient of max pooling where vectors run along rows: channels first.

A task copies the gradients and winners that it needs and puts windows that nothing wins around them, so that there is no
border:

        o o o o o o      a group of cells, one of each class,    . : . : . :
        o w w w w o      sees the same windows everywhere        : : : : : :
        o w w w w o                                              . : . : . :
        o o o o o o

If no group sees beyond the image, windows are read where they are; rows of all planes are one plane's if they lie evenly.
"""

from libc.string cimport memcpy, memset

from fastconv.kernels.native.blocking cimport ceil_div, round_up, run_tasks
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_CLASSES, arena, fc_cells, fc_classes, fc_runs, fence,
)
from fastconv.kernels.native.pooling cimport TASK_CELLS, Pool, residue, shift, uchar

cdef enum:
    LONG = 32                   # groups of cells of a row, for rows to be written in turn
    NOBODY = 255                # wins this window


cdef void gather_along_rows(Pool *p) noexcept:
    """Compute the gradient of the input."""
    run_tasks(_planes_task, p, _share_out(p), p.threads)


# Windows of a task, copied or where they are.
ctypedef struct Windows:
    const char *grads           # of the window that has the number of the task's first group
    const uchar *winners
    Py_ssize_t z_step, y_step


cdef Py_ssize_t _share_out(Pool *p) noexcept nogil:
    """Find groups and the windows they see; share out planes or parts of them; return the number of tasks."""
    cdef Py_ssize_t t, window, cells = p.taps
    cdef int axis, cut = 0 if p.x.size[2] > 1 else 1
    p.columns = <int>p.stride[2] if p.stride[2] <= FC_CLASSES else 1
    p.padded = False
    for axis in range(3):
        p.groups[axis] = ceil_div(p.x.size[2 + axis], p.stride[axis])
        p.low[axis] = p.high[axis] = 0
        for t in range(p.kernel[axis]):
            window = shift(p, axis, t)
            p.low[axis] = min(p.low[axis], window)
            p.high[axis] = max(p.high[axis], window)
        p.padded |= p.low[axis] < 0 or p.groups[axis] + p.high[axis] > p.y.size[2 + axis]
        cells *= p.groups[axis]
    if not p.padded:
        _pile_planes(p)
        cells = p.taps * p.groups[0] * p.groups[1] * p.groups[2]
    p.part = 1 + TASK_CELLS // (cells // p.groups[cut])
    p.parts = ceil_div(p.groups[cut], p.part)
    p.task_planes = 1 + TASK_CELLS // cells if p.parts == 1 else 1
    return ceil_div(p.x.size[0] * p.x.size[1], p.task_planes) * p.parts


cdef void _pile_planes(Pool *p) noexcept nogil:
    """Take all planes for a single one where rows of groups go on evenly from plane to plane."""
    cdef Py_ssize_t planes = p.x.size[0] * p.x.size[1], rows = p.groups[1] * p.stride[1]
    if p.x.size[2] > 1 or p.y.size[2] > 1 or rows != p.x.size[3] or p.groups[1] != p.y.size[3]:
        return
    if p.x.stride[1] != rows * p.x.stride[3] or p.y.stride[1] != p.groups[1] * p.y.stride[3]:
        return
    if p.x.size[0] > 1 and (
        p.x.stride[0] != p.x.size[1] * p.x.stride[1] or p.y.stride[0] != p.x.size[1] * p.y.stride[1]
    ):
        return
    p.x.size[0] = p.x.size[1] = 1
    p.x.size[3] *= planes
    p.y.size[3] *= planes
    p.groups[1] *= planes


cdef int _planes_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Pool *p = <const Pool *>shared
    cdef int cut = 0 if p.x.size[2] > 1 else 1
    cdef Py_ssize_t first[3]
    cdef Py_ssize_t last[3]
    cdef Py_ssize_t plane = task // p.parts * p.task_planes, pitch = p.groups[2] + p.high[2] - p.low[2]
    cdef Py_ssize_t end = min(plane + p.task_planes, p.x.size[0] * p.x.size[1]), windows = 0
    cdef Py_ssize_t classes = p.stride[0] * p.stride[1] * p.stride[2], list_bytes
    cdef Windows w
    first[0] = first[1] = first[2] = 0
    first[cut] = task % p.parts * p.part
    last[0], last[1], last[2] = p.groups[0], p.groups[1], p.groups[2]
    last[cut] = min(first[cut] + p.part, last[cut])
    if p.padded:
        w.y_step = pitch
        w.z_step = pitch * (last[1] - first[1] + p.high[1] - p.low[1])
        windows = w.z_step * (last[0] - first[0] + p.high[0] - p.low[0])
    else:
        w.z_step, w.y_step = p.y.stride[2], p.y.stride[3]
    list_bytes = classes * <Py_ssize_t>sizeof(fc_cells) + p.taps * <Py_ssize_t>(sizeof(Py_ssize_t) + sizeof(int))
    list_bytes = round_up(list_bytes, p.item)
    cdef char *memory = arena(FC_ARENA_BLOCK, list_bytes + windows * (p.item + 1))
    if memory == NULL:
        return 1
    cdef fc_cells *sources = <fc_cells *>memory
    cdef char *copy = memory + list_bytes
    _list_classes(p, &w, sources)
    memset(copy + windows * p.item, NOBODY, <size_t>windows)  # the margins stay so from plane to plane
    for plane in range(plane, end):
        if p.padded:
            _copy_windows(p, plane, first, last, &w, copy, <uchar *>(copy + windows * p.item))
        else:
            _find_windows(p, plane, first, &w)
        _gather_plane(p, plane, first, last, &w, sources)
    if p.stream:
        fence()
    return 0


cdef void _list_classes(const Pool *p, const Windows *w, fc_cells *sources) noexcept nogil:
    """List the windows that each class of cells of a group sees, in their order; [residue of z][of y][of x]."""
    cdef Py_ssize_t classes = p.stride[0] * p.stride[1] * p.stride[2], i, d, h, x, at, of
    cdef Py_ssize_t *offsets = <Py_ssize_t *>&sources[classes]
    cdef int *numbers = <int *>(offsets + p.taps)
    cdef Py_ssize_t n = 0
    for i in range(classes):
        sources[i].offsets = offsets + n
        sources[i].numbers = numbers + n
        sources[i].count = 0
        for d in range(p.kernel[0] - 1, -1, -1):
            for h in range(p.kernel[1] - 1, -1, -1):
                of = (residue(p, 0, d) * p.stride[1] + residue(p, 1, h)) * p.stride[2]
                if not of <= i < of + p.stride[2]:
                    continue
                at = shift(p, 0, d) * w.z_step + shift(p, 1, h) * w.y_step
                for x in range(p.kernel[2] - 1, -1, -1):
                    if of + residue(p, 2, x) == i:
                        offsets[n] = at + shift(p, 2, x)
                        numbers[n] = <int>((d * p.kernel[1] + h) * p.kernel[2] + x)
                        n += 1
        sources[i].count = offsets + n - sources[i].offsets


cdef void _find_windows(const Pool *p, Py_ssize_t plane, const Py_ssize_t *first, Windows *w) noexcept nogil:
    """Point to a plane's windows where they are."""
    cdef Py_ssize_t at = (
        plane // p.x.size[1] * p.y.stride[0] + plane % p.x.size[1] * p.y.stride[1] + first[0] * w.z_step
        + first[1] * w.y_step
    )
    w.grads = p.y.data + at * p.item
    w.winners = <const uchar *>p.winners.data + at


cdef void _copy_windows(const Pool *p, Py_ssize_t plane, const Py_ssize_t *first, const Py_ssize_t *last, Windows *w,
                        char *grads, uchar *winners) noexcept nogil:
    """Copy what groups ``first`` to ``last`` of a plane see to where nobody wins the windows around it."""
    cdef Py_ssize_t z, y, at, to, n = min(p.y.size[4], w.y_step + p.low[2])
    cdef Py_ssize_t base = plane // p.x.size[1] * p.y.stride[0] + plane % p.x.size[1] * p.y.stride[1]
    at = -p.low[0] * w.z_step - p.low[1] * w.y_step - p.low[2]
    w.grads = grads + at * p.item
    w.winners = winners + at
    for z in range(max(first[0] + p.low[0], 0), min(last[0] + p.high[0], p.y.size[2])):
        for y in range(max(first[1] + p.low[1], 0), min(last[1] + p.high[1], p.y.size[3])):
            at = base + z * p.y.stride[2] + y * p.y.stride[3]
            to = (z - first[0]) * w.z_step + (y - first[1]) * w.y_step
            memcpy(<uchar *>w.winners + to, p.winners.data + at, <size_t>n)
            memcpy(<char *>w.grads + to * p.item, p.y.data + at * p.item, <size_t>(n * p.item))


cdef void _gather_plane(const Pool *p, Py_ssize_t plane, const Py_ssize_t *first, const Py_ssize_t *last,
                        const Windows *w, const fc_cells *sources) noexcept nogil:
    """Compute groups ``first`` to ``last``: those that have all their rows, then the rows of the rest."""
    cdef Py_ssize_t whole = min(last[1], p.x.size[3] // p.stride[1]), z, at
    cdef char *to = p.x.data + (plane // p.x.size[1] * p.x.stride[0] + plane % p.x.size[1] * p.x.stride[1]) * p.item
    cdef char *rows
    cdef const fc_cells *of_z
    cdef Windows here = w[0]
    for z in range(first[0] * p.stride[0], min(last[0] * p.stride[0], p.x.size[2])):
        at = (z // p.stride[0] - first[0]) * w.z_step
        here.grads, here.winners = w.grads + at * p.item, w.winners + at
        of_z = &sources[z % p.stride[0] * p.stride[1] * p.stride[2]]
        rows = to + (z * p.x.stride[2] + first[1] * p.stride[1] * p.x.stride[3]) * p.item
        if whole > first[1]:
            _gather_rows(p, &here, of_z, p.stride[1], whole - first[1], rows)
        if whole < last[1]:
            at = (whole - first[1]) * w.y_step
            here.grads += at * p.item
            here.winners += at
            rows += (whole - first[1]) * p.stride[1] * p.x.stride[3] * p.item
            _gather_rows(p, &here, of_z, p.x.size[3] % p.stride[1], 1, rows)


cdef void _gather_rows(const Pool *p, const Windows *w, const fc_cells *sources, Py_ssize_t residues, Py_ssize_t groups,
                       char *to) noexcept nogil:
    """Compute ``residues`` rows of some groups."""
    cdef Py_ssize_t columns = p.x.size[4] // p.stride[2], rest = p.x.size[4] % p.stride[2], x, y
    cdef bint in_turn = columns >= LONG and p.columns == p.stride[2] and residues * p.columns <= FC_CLASSES
    cdef fc_runs grads, winners, cells
    cdef fc_classes classes
    classes.rows = <int>residues if in_turn else 1
    classes.columns = p.columns
    classes.row_step, classes.column_step = p.x.stride[3], p.x.stride[4]
    grads.data, winners.data = <char *>w.grads, <uchar *>w.winners
    grads.run = winners.run = w.y_step
    grads.step = winners.step = 1
    grads.item, winners.item, cells.item = <int>p.item, 1, <int>p.item
    grads.stream, winners.stream, cells.stream = False, False, p.stream
    cells.run, cells.step = p.stride[1] * p.x.stride[3], p.stride[2] * p.x.stride[4]
    for y from 0 <= y < residues by classes.rows:
        for x from 0 <= x < p.stride[2] by p.columns:
            classes.rest = <int>max(0, rest - x)
            cells.data = to + (y * p.x.stride[3] + x * p.x.stride[4]) * p.item
            p.kernels.max_pool_grad(&sources[y * p.stride[2] + x], &classes, groups, columns, &grads, &winners, &cells)
