"""Max pooling, forward and backward.

    output[o]     = max over cells t of the window  of  input[o * stride + t * dilation - padding]
    grad_input[i] = sum over windows o that have i as their cell t and winner  of  grad_output[o]

    for row of outputs (forward) or of cells of the input (backward), some to a task:           in parallel
        for run of columns that see the same cells (are seen by the same windows):
            one call of a microkernel: all of them at once, each maximum (sum) in a register until it is stored

         channels first: vectors along W            channels last: vectors along C, for each column
        |border|      interior      |border|        |border|      interior      |border|
          1 by 1      one run         1 by 1         1 by 1      one call         1 by 1

Backward gathers: cells that are `stride` apart along a row are seen by windows at the same distance from them. `stride` such
classes make up a row; for strides of 1, 2 and 4 they are stored side by side, so that every cell is written once and
never read. Where a window is large or rows are short, gradients are scattered to their winners instead. Either way a sum
runs over the windows in their order.
"""

cimport numpy as cnp
from cython.parallel cimport prange
from libc.string cimport memset

from fastconv.kernels.native.blocking cimport View, ceil_div, make_view
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, arena, fc_cells, fc_runs, fc_ukernels, ukernels, usable_threads,
)

ctypedef unsigned char uchar
ctypedef unsigned short ushort

cdef enum:
    SERIAL_CELLS = 100_000      # fewer comparisons than this are not worth waking a thread
    TASK_CELLS = 16_384         # comparisons that are worth a task
    GATHER_TAPS = 36            # larger windows are scattered
    CHANNELS = 64               # channels that a task has of a channels-last image where gradients are scattered

# One pooling. Planes have rows; channels-last images have one plane each.
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
    Py_ssize_t first, last      # interior columns; backward: of each class
    int classes                 # that are stored side by side
    Py_ssize_t task_rows, rows  # of a task, in all
    int threads

# Where a row is.
ctypedef struct Row:
    Py_ssize_t image, channel, z, y


cdef void _make_pool(Pool *p, cnp.ndarray x, cnp.ndarray y, winners, dims, options):
    cdef int axis
    p.item = cnp.PyArray_ITEMSIZE(x)
    p.kernels = ukernels(p.item)
    make_view(&p.x, x)
    make_view(&p.y, y)
    p.winner_item = 0
    if winners is not None:
        make_view(&p.winners, winners)
        p.winner_item = <int>cnp.PyArray_ITEMSIZE(winners)
    p.taps = 1
    outputs = p.y.size[0] * p.y.size[1]
    for axis in range(3):
        p.kernel[axis] = dims.kernel_size[axis]
        p.stride[axis] = dims.stride[axis]
        p.pad[axis] = dims.pad_before[axis]
        p.dilation[axis] = dims.dilation[axis]
        p.taps *= p.kernel[axis]
        outputs *= p.y.size[2 + axis]
    p.along_channels = abs(p.x.stride[1]) < abs(p.x.stride[4])
    p.planes = 1 if p.along_channels else p.x.size[1]
    p.threads = usable_threads(options.threads) if outputs * p.taps > SERIAL_CELLS else 1


cdef Py_ssize_t _cut_rows(Pool *p, const View *v, Py_ssize_t cells_per_column) noexcept nogil:
    """Share out the rows of an array; return the number of tasks."""
    cdef Py_ssize_t row_cells = v.size[4] * (v.size[1] // p.planes) * cells_per_column
    p.rows = v.size[0] * p.planes * v.size[2] * v.size[3]
    p.task_rows = 1 + TASK_CELLS // row_cells
    return ceil_div(p.rows, p.task_rows)


cdef void _locate(const Pool *p, const View *v, Py_ssize_t index, Row *row) noexcept nogil:
    row.y = index % v.size[3]
    index //= v.size[3]
    row.z = index % v.size[2]
    index //= v.size[2]
    row.channel = index % p.planes
    row.image = index // p.planes


cdef char *_at(const View *v, Py_ssize_t item, const Row *row, Py_ssize_t z, Py_ssize_t y, Py_ssize_t x) noexcept nogil:
    """Return the address of a cell of the row's plane."""
    return v.data + (
        row.image * v.stride[0] + row.channel * v.stride[1] + z * v.stride[2] + y * v.stride[3] + x * v.stride[4]
    ) * item


cdef void _set_runs(const Pool *p, fc_runs *runs, const View *v, int item, Py_ssize_t stride) noexcept nogil:
    """Let runs go along an array whose columns are taken ``stride`` apart."""
    runs.item = item
    runs.run = stride * v.stride[4] if p.along_channels else 0
    runs.step = v.stride[1] if p.along_channels else stride * v.stride[4]


# --------------------------------------------------------------------------------------------------------- forward

def max_pool_forward(input, output, winners, dims, options):
    """See ``fastconv.kernels``."""
    cdef Pool pool
    cdef Pool *p = &pool
    cdef Py_ssize_t task, failures = 0, tasks, reach
    _make_pool(p, input, output, winners, dims, options)
    reach = (p.kernel[2] - 1) * p.dilation[2] - p.pad[2]  # of the first window
    p.first = min(ceil_div(p.pad[2], p.stride[2]), p.y.size[4])
    p.last = max(p.first, min((p.x.size[4] - 1 - reach + p.stride[2]) // p.stride[2], p.y.size[4]))
    tasks = _cut_rows(p, &p.y, p.taps)
    with nogil:
        for task in prange(tasks, num_threads=p.threads, schedule="dynamic"):
            failures += _forward_task(p, task)
    if failures:
        raise MemoryError("no memory for the workspace of a pooling")


cdef int _forward_task(const Pool *p, Py_ssize_t task) noexcept nogil:
    cdef char *memory = arena(FC_ARENA_BLOCK, 2 * p.taps * <Py_ssize_t>(sizeof(Py_ssize_t) + sizeof(int)))
    if memory == NULL:
        return 1
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory
    cdef int *numbers = <int *>(offsets + 2 * p.taps)
    cdef fc_cells inner, border
    cdef bint inside, known = False
    cdef Py_ssize_t index, z, y, x, i
    cdef Row row
    for index in range(task * p.task_rows, min((task + 1) * p.task_rows, p.rows)):
        _locate(p, &p.y, index, &row)
        z = row.z * p.stride[0] - p.pad[0]
        y = row.y * p.stride[1] - p.pad[1]
        inside = (
            0 <= z and z + (p.kernel[0] - 1) * p.dilation[0] < p.x.size[2]
            and 0 <= y and y + (p.kernel[1] - 1) * p.dilation[1] < p.x.size[3]
        )
        if not (known and inside):  # all rows that are inside see the same cells
            _seen(p, z, y, p.first * p.stride[2] - p.pad[2], &inner, offsets, numbers)
        known = inside
        if p.first < p.last:
            _pool(p, &inner, &row, p.first, p.last - p.first)
        for i in range(p.y.size[4] - (p.last - p.first)):
            x = i if i < p.first else i + p.last - p.first
            _seen(p, z, y, x * p.stride[2] - p.pad[2], &border, offsets + p.taps, numbers + p.taps)
            _pool(p, &border, &row, x, 1)
    return 0


cdef void _seen(const Pool *p, Py_ssize_t z, Py_ssize_t y, Py_ssize_t x, fc_cells *cells, Py_ssize_t *offsets,
                int *numbers) noexcept nogil:
    """List the cells inside the image of a window whose first cell is there."""
    cdef const View *v = &p.x
    cdef Py_ssize_t d, h, w, from_z, from_y, from_x
    cells.count = 0
    cells.offsets = offsets
    cells.numbers = numbers
    numbers[0] = 0  # the winner of a window that sees no cell
    for d in range(p.kernel[0]):
        from_z = d * p.dilation[0]
        for h in range(p.kernel[1]):
            from_y = h * p.dilation[1]
            for w in range(p.kernel[2]):
                from_x = w * p.dilation[2]
                if (
                    0 <= z + from_z < v.size[2] and 0 <= y + from_y < v.size[3] and 0 <= x + from_x < v.size[4]
                ):
                    offsets[cells.count] = from_z * v.stride[2] + from_y * v.stride[3] + from_x * v.stride[4]
                    numbers[cells.count] = <int>((d * p.kernel[1] + h) * p.kernel[2] + w)
                    cells.count += 1


cdef void _pool(const Pool *p, const fc_cells *cells, const Row *row, Py_ssize_t x, Py_ssize_t columns) noexcept nogil:
    """Pool some columns of a row that see the same cells."""
    cdef fc_runs from_x, to_y, to_winners
    _set_runs(p, &from_x, &p.x, 0, p.stride[2])
    _set_runs(p, &to_y, &p.y, 0, 1)
    from_x.data = _at(
        &p.x, p.item, row, row.z * p.stride[0] - p.pad[0], row.y * p.stride[1] - p.pad[1],
        x * p.stride[2] - p.pad[2],
    )
    to_y.data = _at(&p.y, p.item, row, row.z, row.y, x)
    to_winners.item = 0
    if p.winner_item:
        _set_runs(p, &to_winners, &p.winners, p.winner_item, 1)
        to_winners.data = _at(&p.winners, p.winner_item, row, row.z, row.y, x)
    if p.along_channels:
        p.kernels.max_pool(cells, columns, p.x.size[1], &from_x, &to_y, &to_winners)
    else:
        p.kernels.max_pool(cells, 1, columns, &from_x, &to_y, &to_winners)


# -------------------------------------------------------------------------------------------------------- backward

def max_pool_backward(grad_output, winners, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    cdef Pool pool
    cdef Pool *p = &pool
    cdef Py_ssize_t task, failures = 0, tasks
    _make_pool(p, grad_input, grad_output, winners, dims, options)
    if _can_gather(p):
        _make_classes(p)
        tasks = _cut_rows(p, &p.x, ceil_div(p.taps, p.stride[0] * p.stride[1] * p.stride[2]))
        with nogil:
            for task in prange(tasks, num_threads=p.threads, schedule="dynamic"):
                failures += _gather_task(p, task)
    else:
        tasks = p.x.size[0] * ceil_div(p.x.size[1], CHANNELS if p.along_channels else 1)
        with nogil:
            for task in prange(tasks, num_threads=p.threads, schedule="dynamic"):
                failures += _scatter_task(p, task)
    if failures:
        raise MemoryError("no memory for the workspace of a pooling")


cdef bint _can_gather(const Pool *p) noexcept nogil:
    """Whether gathering is worth it, and the outputs' gradients and winners are contiguous in the same way."""
    cdef int axis, along = 1 if p.along_channels else 4
    for axis in range(5):
        if p.y.stride[axis] != p.winners.stride[axis] and p.y.size[axis] > 1:
            return False
    return p.taps <= GATHER_TAPS and p.y.stride[along] == 1 and p.y.size[along] >= p.kernels.lanes


cdef void _make_classes(Pool *p) noexcept nogil:
    """Find the columns whose cells are seen by all windows of their class, the same in every class."""
    cdef Py_ssize_t w, distance, stride = p.stride[2]
    cdef bint side_by_side = not p.along_channels and p.x.stride[4] == 1 and stride in (1, 2, 4)
    p.classes = <int>stride if side_by_side else 1
    p.first = 0
    p.last = min(p.x.size[4] // stride, p.y.size[4])
    for w in range(p.kernel[2]):
        distance = p.pad[2] - w * p.dilation[2]
        p.first = max(p.first, max(-distance, 0) // stride)
        p.last = min(p.last, p.y.size[4] - ceil_div(distance, stride))
    if p.last < p.first:
        p.first = p.last = 0


# Workspace of a task that gathers. Input i is cell t of window i // stride + shift[t], if residue[t] is i % stride.
ctypedef struct Listing:
    Py_ssize_t *residue[3]
    Py_ssize_t *shift[3]
    Py_ssize_t lines            # rows of windows that see a row of the input: where they are, ...
    Py_ssize_t *line_offsets
    int *line_numbers           # ... and the number of their first cell
    Py_ssize_t *offsets         # of the sources
    int *numbers


cdef int _gather_task(const Pool *p, Py_ssize_t task) noexcept nogil:
    cdef Listing listing
    cdef fc_cells sources[4]
    cdef Py_ssize_t index, r, i, j, columns
    cdef Row row
    if _make_listing(p, &listing):
        return 1
    for index in range(task * p.task_rows, min((task + 1) * p.task_rows, p.rows)):
        _locate(p, &p.x, index, &row)
        _list_lines(p, &row, &listing)
        if p.first < p.last:
            for r from 0 <= r < p.stride[2] by p.classes:
                _list_sources(p, &listing, r, p.classes, p.first, p.last, sources)
                _gather(p, sources, p.classes, &row, r, p.first, p.last - p.first)
        for r in range(p.stride[2]):
            columns = (p.x.size[4] - r + p.stride[2] - 1) // p.stride[2]
            for i in range(columns - (p.last - p.first)):
                j = i if i < p.first else i + p.last - p.first
                _list_sources(p, &listing, r, 1, j, j + 1, sources)
                _gather(p, sources, 1, &row, r, j, 1)
    return 0


cdef int _make_listing(const Pool *p, Listing *listing) noexcept nogil:
    cdef Py_ssize_t taps = p.kernel[0] + p.kernel[1] + p.kernel[2], distance, t
    cdef int axis
    cdef Py_ssize_t *memory = <Py_ssize_t *>arena(
        FC_ARENA_BLOCK, (2 * taps + 2 * p.taps) * <Py_ssize_t>(sizeof(Py_ssize_t) + sizeof(int))
    )
    if memory == NULL:
        return 1
    for axis in range(3):
        listing.residue[axis] = memory
        listing.shift[axis] = memory + p.kernel[axis]
        memory += 2 * p.kernel[axis]
        for t in range(p.kernel[axis]):
            distance = t * p.dilation[axis] - p.pad[axis]  # of the cell from stride times the window's number
            listing.residue[axis][t] = (distance % p.stride[axis] + p.stride[axis]) % p.stride[axis]
            listing.shift[axis][t] = (listing.residue[axis][t] - distance) // p.stride[axis]
    listing.line_offsets = memory
    listing.offsets = memory + p.taps
    listing.line_numbers = <int *>(memory + 2 * p.taps)
    listing.numbers = listing.line_numbers + p.taps
    return 0


cdef void _list_lines(const Pool *p, const Row *row, Listing *listing) noexcept nogil:
    """List the rows of windows that see a row of the input, in their order."""
    cdef Py_ssize_t z_residue = row.z % p.stride[0], y_residue = row.y % p.stride[1], d, h, z, y, n = 0
    for d in range(p.kernel[0] - 1, -1, -1):
        z = row.z // p.stride[0] + listing.shift[0][d]
        if listing.residue[0][d] != z_residue or z < 0 or z >= p.y.size[2]:
            continue
        for h in range(p.kernel[1] - 1, -1, -1):
            y = row.y // p.stride[1] + listing.shift[1][h]
            if listing.residue[1][h] == y_residue and 0 <= y < p.y.size[3]:
                listing.line_offsets[n] = z * p.y.stride[2] + y * p.y.stride[3]
                listing.line_numbers[n] = <int>((d * p.kernel[1] + h) * p.kernel[2])
                n += 1
    listing.lines = n


cdef void _list_sources(const Pool *p, const Listing *listing, Py_ssize_t r, int classes, Py_ssize_t first,
                        Py_ssize_t last, fc_cells *sources) noexcept nogil:
    """List, for some classes from ``r`` on, the windows that see all of their cells ``first`` to ``last``."""
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


cdef void _gather(const Pool *p, const fc_cells *sources, int classes, const Row *row, Py_ssize_t r, Py_ssize_t first,
                  Py_ssize_t columns) noexcept nogil:
    """Store what cells ``first``, ... of some classes from ``r`` on get from their sources."""
    cdef fc_runs from_y, from_winners, to_x
    _set_runs(p, &from_y, &p.y, 0, 1)
    _set_runs(p, &from_winners, &p.winners, 1, 1)
    _set_runs(p, &to_x, &p.x, 0, p.stride[2])
    from_y.data = _at(&p.y, p.item, row, 0, 0, first)
    from_winners.data = _at(&p.winners, 1, row, 0, 0, first)
    to_x.data = _at(&p.x, p.item, row, row.z, row.y, r + first * p.stride[2])
    if p.along_channels:
        p.kernels.max_pool_grad(sources, classes, columns, p.x.size[1], &from_y, &from_winners, &to_x)
    else:
        p.kernels.max_pool_grad(sources, classes, 1, columns, &from_y, &from_winners, &to_x)


# Where a cell of a window is, from the window's first cell.
ctypedef struct Cell:
    Py_ssize_t z, y, x, offset

ctypedef fused real:
    float
    double

ctypedef fused index:
    uchar
    ushort


cdef int _scatter_task(const Pool *p, Py_ssize_t task) noexcept nogil:
    cdef Py_ssize_t most = CHANNELS if p.along_channels else 1, parts = ceil_div(p.x.size[1], most), d, h, w
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
    cdef const View *vy = &p.y
    cdef const View *vw = &p.winners
    cdef const Cell *last = &cells[p.taps - 1]
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
