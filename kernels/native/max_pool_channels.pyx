"""The gradient of max pooling where vectors run along the channels: channels last.

    for some rows of the input:                                              in parallel
        for columns, of one class each, that are seen by the same windows:   (a border is a call of its own)
            one call of the microkernel
"""

from fastconv.kernels.native.blocking cimport ceil_div, run_tasks
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, FC_CLASSES, arena, fc_cells, fc_classes, fc_runs, fence,
)
from fastconv.kernels.native.pooling cimport Pool, Rows, locate, residue, runs_of, share_out, shift


cdef void gather_along_channels(Pool *p) except *:
    """Compute the gradient of the input."""
    _make_classes(p)
    tasks = share_out(p, p.x.size[2], ceil_div(p.x.size[3], p.stride[1]), p.y.size[4] * p.taps)
    run_tasks(_gather_task, p, tasks, p.threads)


# Workspace of a task. Input i is cell t of window i // stride + shift[t], if residue[t] is i % stride.
ctypedef struct Listing:
    Py_ssize_t *residue[3]
    Py_ssize_t *shift[3]
    Py_ssize_t lines            # rows of windows that see a row of the input: where they are, ...
    Py_ssize_t *line_offsets
    int *line_numbers           # ... and the number of their first cell
    Py_ssize_t *offsets         # of the sources
    int *numbers


cdef void _make_classes(Pool *p) noexcept nogil:
    """Find the members of all classes that are seen by all windows of their class."""
    cdef Py_ssize_t t, distance
    cdef int axis
    p.columns = <int>p.stride[2] if p.stride[2] <= FC_CLASSES else 1
    for axis in range(3):
        p.first[axis] = 0
        p.last[axis] = min(p.x.size[2 + axis] // p.stride[axis], p.y.size[2 + axis])
        for t in range(p.kernel[axis]):
            distance = p.pad[axis] - t * p.dilation[axis]
            p.first[axis] = max(p.first[axis], max(-distance, 0) // p.stride[axis])
            p.last[axis] = min(p.last[axis], p.y.size[2 + axis] - ceil_div(distance, p.stride[axis]))
        if p.last[axis] < p.first[axis]:
            p.first[axis] = p.last[axis] = 0


cdef int _gather_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Pool *p = <const Pool *>shared
    cdef Listing listing
    cdef Py_ssize_t index = task * p.task_rows, end = min(index + p.task_rows, p.rows), r
    cdef Rows rows
    if _make_listing(p, &listing):
        return 1
    while index < end:
        locate(p, index, end, &rows)
        for r in range(min(p.stride[1], p.x.size[3] - rows.y * p.stride[1])):
            _list_lines(p, &rows, r, &listing)
            _gather_row(p, &rows, r, &listing)
        index += rows.count
    if p.stream:
        fence()
    return 0


cdef int _make_listing(const Pool *p, Listing *listing) noexcept nogil:
    cdef Py_ssize_t taps = p.kernel[0] + p.kernel[1] + p.kernel[2], t
    cdef int axis
    cdef Py_ssize_t *memory = <Py_ssize_t *>arena(
        FC_ARENA_BLOCK, 2 * taps * <Py_ssize_t>sizeof(Py_ssize_t)
        + 2 * p.taps * <Py_ssize_t>(sizeof(Py_ssize_t) + sizeof(int))
    )
    if memory == NULL:
        return 1
    for axis in range(3):
        listing.residue[axis] = memory
        listing.shift[axis] = memory + p.kernel[axis]
        memory += 2 * p.kernel[axis]
        for t in range(p.kernel[axis]):
            listing.residue[axis][t] = residue(p, axis, t)
            listing.shift[axis][t] = shift(p, axis, t)
    listing.line_offsets = memory
    listing.offsets = memory + p.taps
    listing.line_numbers = <int *>(memory + 2 * p.taps)
    listing.numbers = listing.line_numbers + p.taps
    return 0


cdef void _list_lines(const Pool *p, const Rows *rows, Py_ssize_t r, Listing *listing) noexcept nogil:
    """List the rows of windows that see row ``r`` of a group, in their order."""
    cdef Py_ssize_t d, h, z, y, n = 0
    for d in range(p.kernel[0] - 1, -1, -1):
        z = rows.z // p.stride[0] + listing.shift[0][d]
        if listing.residue[0][d] != rows.z % p.stride[0] or z < 0 or z >= p.y.size[2]:
            continue
        for h in range(p.kernel[1] - 1, -1, -1):
            y = rows.y + listing.shift[1][h]
            if listing.residue[1][h] == r and 0 <= y < p.y.size[3]:
                listing.line_offsets[n] = z * p.y.stride[2] + y * p.y.stride[3]
                listing.line_numbers[n] = <int>((d * p.kernel[1] + h) * p.kernel[2])
                n += 1
    listing.lines = n


cdef void _gather_row(const Pool *p, const Rows *rows, Py_ssize_t row, Listing *listing) noexcept nogil:
    """Compute row ``row`` of some groups of rows: first the interior of all classes, then the borders of each."""
    cdef Py_ssize_t columns = p.last[2] - p.first[2], r, i
    if columns:
        for r from 0 <= r < p.stride[2] by p.columns:
            _gather(p, rows, row, listing, r, p.columns, p.first[2], columns)
    for r in range(p.stride[2]):
        for i in range((p.x.size[4] - r + p.stride[2] - 1) // p.stride[2] - columns):
            _gather(p, rows, row, listing, r, 1, i if i < p.first[2] else i + columns, 1)


cdef void _gather(const Pool *p, const Rows *rows, Py_ssize_t row, Listing *listing, Py_ssize_t r, int classes,
                  Py_ssize_t first, Py_ssize_t columns) noexcept nogil:
    """Compute ``columns`` members from ``first`` on of some classes from ``r`` on."""
    cdef fc_runs from_y = runs_of(p, &p.y, p.item, rows, 0, 0, first, 1, 1)
    cdef fc_runs from_winners = runs_of(p, &p.winners, 1, rows, 0, 0, first, 1, 1)
    cdef fc_runs to_x = runs_of(
        p, &p.x, p.item, rows, rows.z, rows.y * p.stride[1] + row, first * p.stride[2] + r, p.stride[1], p.stride[2]
    )
    cdef fc_cells sources[FC_CLASSES]
    _list_sources(p, listing, r, classes, first, first + columns, sources)
    cdef fc_classes side_by_side
    side_by_side.count, side_by_side.step = classes, p.x.stride[4]
    p.kernels.max_pool_grad(sources, &side_by_side, columns, p.x.size[1], &from_y, &from_winners, &to_x)


cdef void _list_sources(const Pool *p, const Listing *listing, Py_ssize_t r, int classes, Py_ssize_t first,
                        Py_ssize_t last, fc_cells *sources) noexcept nogil:
    """List, for some classes from ``r`` on, the windows that see all of their members ``first`` to ``last``."""
    cdef Py_ssize_t *offsets = listing.offsets
    cdef int *numbers = listing.numbers
    cdef Py_ssize_t line, w, x, n
    cdef int c
    for c in range(classes):
        n = 0
        for line in range(listing.lines):
            for w in range(p.kernel[2] - 1, -1, -1):
                x = listing.shift[2][w]
                if listing.residue[2][w] == r + c and first + x >= 0 and last - 1 + x < p.y.size[4]:
                    offsets[n] = listing.line_offsets[line] + x * p.y.stride[4]
                    numbers[n] = listing.line_numbers[line] + <int>w
                    n += 1
        sources[c].count = n
        sources[c].offsets = offsets
        sources[c].numbers = numbers
        offsets += n
        numbers += n
