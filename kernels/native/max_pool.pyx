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
from them. The classes of a row are stored together, so that every cell is written once and never read. Channels last, a
border is, as above, a call of its own. Channels first, a task copies the gradients and winners that it needs and
puts windows that nothing wins around them, so that there is no border:

        o o o o o o      a group of cells, one of each class,    . : . : . :
        o w w w w o      sees the same windows everywhere        : : : : : :
        o w w w w o                                              . : . : . :
        o o o o o o

Where windows are large, gradients are scattered to their winners instead. Either way a sum runs over the windows in
their order.
"""

cimport numpy as cnp
from libc.string cimport memcpy, memset

from fastconv.kernels.native.blocking cimport View, ceil_div, make_view, run_tasks
from fastconv.kernels.native.machine cimport (
    FC_ARENA_BLOCK, arena, fc_cells, fc_runs, fc_ukernels, ukernels, usable_threads,
)

ctypedef unsigned char uchar
ctypedef unsigned short ushort

cdef enum:
    SERIAL_CELLS = 100_000      # fewer comparisons than this are not worth waking a thread
    TASK_CELLS = 32_768         # comparisons of a task: what it reads and writes stays in L2
    GATHER_TAPS = 36            # larger windows are scattered, ...
    GATHER_CLASSES = 16         # ... and so are those that have more classes of cells, ...
    SHORT = 4                   # ... and rows of fewer windows; rows of fewer than a vector, if windows overlap
    NOBODY = 255                # wins this window
    CHUNK = 8_192               # bytes of rows that are written by one call for each residue of y
    CLASSES = 4                 # that are done together, at most
    CHANNELS = 64               # channels that a task has of a channels-last image where gradients are scattered

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
    int classes                 # that are done together
    Py_ssize_t rows, task_rows  # in all, of a task
    Py_ssize_t groups[3]        # of cells, one of each class; the rest is for gathering along W
    Py_ssize_t low[3]           # the first and the last window that group 0 sees
    Py_ssize_t high[3]
    bint padded                 # whether groups see windows that don't exist
    Py_ssize_t parts, part      # of a plane, groups of a part: along H, or along D where there is one
    Py_ssize_t task_planes
    int threads

# Rows that see the same cells, from one at z, y on.
ctypedef struct Rows:
    Py_ssize_t image, channel, z, y, count


cdef void _make_pool(Pool *p, cnp.ndarray x, cnp.ndarray y, winners, dims, options):
    cdef int axis
    p.item = cnp.PyArray_ITEMSIZE(x)
    p.kernels = ukernels(p.item)
    make_view(&p.x, x)
    make_view(&p.y, y)
    p.winners = p.y  # nobody looks there if there are none
    p.winner_item = 0
    if winners is not None:
        make_view(&p.winners, winners)
        p.winner_item = <int>cnp.PyArray_ITEMSIZE(winners)
    p.taps = 1
    cells = p.y.size[0] * p.y.size[1]
    for axis in range(3):
        p.kernel[axis] = dims.kernel_size[axis]
        p.stride[axis] = dims.stride[axis]
        p.pad[axis] = dims.pad_before[axis]
        p.dilation[axis] = dims.dilation[axis]
        p.taps *= p.kernel[axis]
        cells *= p.y.size[2 + axis] * p.kernel[axis]
    p.along_channels = abs(p.x.stride[1]) < abs(p.x.stride[4])
    p.planes = 1 if p.along_channels else p.x.size[1]
    p.threads = usable_threads(options.threads) if cells > SERIAL_CELLS else 1


cdef Py_ssize_t _share_out(Pool *p, Py_ssize_t depth, Py_ssize_t height, Py_ssize_t row_cells) noexcept nogil:
    """Share out the rows of all planes, each of so many comparisons for a channel; return the number of tasks."""
    p.depth = depth
    p.height = height
    p.rows = p.x.size[0] * p.planes * depth * height
    p.task_rows = 1 + TASK_CELLS // (row_cells * (p.x.size[1] // p.planes))
    return ceil_div(p.rows, p.task_rows)


cdef void _locate(const Pool *p, Py_ssize_t index, Py_ssize_t end, Rows *rows) noexcept nogil:
    """Find the rows from ``index`` on that can be done in one call."""
    rows.y = index % p.height
    rows.z = index // p.height % p.depth
    rows.channel = index // p.height // p.depth % p.planes
    rows.image = index // p.height // p.depth // p.planes
    rows.count = 1
    if not p.along_channels and p.first[1] <= rows.y < p.last[1]:
        rows.count = min(end - index, p.last[1] - rows.y)


cdef fc_runs _runs(const Pool *p, const View *v, Py_ssize_t item, const Rows *rows, Py_ssize_t z, Py_ssize_t y,
                   Py_ssize_t x, Py_ssize_t y_step, Py_ssize_t x_step) noexcept nogil:
    """Return how to go along rows of an array from a cell on, rows and columns being steps apart."""
    cdef fc_runs runs
    runs.data = v.data + (
        rows.image * v.stride[0] + rows.channel * v.stride[1] + z * v.stride[2] + y * v.stride[3] + x * v.stride[4]
    ) * item
    runs.run = x_step * v.stride[4] if p.along_channels else y_step * v.stride[3]
    runs.step = v.stride[1] if p.along_channels else x_step * v.stride[4]
    runs.item = <int>item
    return runs


# --------------------------------------------------------------------------------------------------------- forward

def max_pool_forward(input, output, winners, dims, options):
    """See ``fastconv.kernels``."""
    cdef Pool pool
    cdef Pool *p = &pool
    cdef Py_ssize_t tasks, reach
    cdef int axis
    _make_pool(p, input, output, winners, dims, options)
    for axis in range(3):
        reach = p.x.size[2 + axis] + p.pad[axis] - (p.kernel[axis] - 1) * p.dilation[axis]  # first cells are below it
        p.first[axis] = min(ceil_div(p.pad[axis], p.stride[axis]), p.y.size[2 + axis])
        p.last[axis] = max(p.first[axis], min(ceil_div(reach, p.stride[axis]), p.y.size[2 + axis]))
    tasks = _share_out(p, p.y.size[2], p.y.size[3], p.y.size[4] * p.taps)
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
        _locate(p, index, end, &rows)
        if columns:
            _pool(p, &cells, &rows, p.first[2], columns)
        for i in range(p.y.size[4] - columns):
            _pool(p, &cells, &rows, i if i < p.first[2] else i + columns, 1)
        index += rows.count
    return 0


cdef void _pool(const Pool *p, fc_cells *cells, const Rows *rows, Py_ssize_t x, Py_ssize_t columns) noexcept nogil:
    """Pool windows that see the same cells."""
    cdef Py_ssize_t first_z = rows.z * p.stride[0] - p.pad[0]
    cdef Py_ssize_t first_y = rows.y * p.stride[1] - p.pad[1]
    cdef Py_ssize_t first_x = x * p.stride[2] - p.pad[2]
    cdef fc_runs from_x = _runs(p, &p.x, p.item, rows, first_z, first_y, first_x, p.stride[1], p.stride[2])
    cdef fc_runs to_y = _runs(p, &p.y, p.item, rows, rows.z, rows.y, x, 1, 1)
    cdef fc_runs to_winners = _runs(p, &p.winners, p.winner_item, rows, rows.z, rows.y, x, 1, 1)
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
    cdef Py_ssize_t tasks
    _make_pool(p, grad_input, grad_output, winners, dims, options)
    if _can_gather(p) and not p.along_channels:
        run_tasks(_planes_task, p, _share_planes(p), p.threads)
    elif _can_gather(p):
        _make_classes(p)
        tasks = _share_out(p, p.x.size[2], ceil_div(p.x.size[3], p.stride[1]), p.y.size[4] * p.taps)
        run_tasks(_gather_task, p, tasks, p.threads)
    else:
        tasks = p.x.size[0] * ceil_div(p.x.size[1], CHANNELS if p.along_channels else 1)
        run_tasks(_scatter_task, p, tasks, p.threads)


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


# ------------------------------------------------------------------------------- backward, vectors along W

# Windows of a task, copied or where they are.
ctypedef struct Windows:
    const char *grads           # of the window that has the number of the task's first group
    const uchar *winners
    Py_ssize_t z_step, y_step


cdef Py_ssize_t _share_planes(Pool *p) noexcept nogil:
    """Find groups and the windows they see; share out planes or parts of them; return the number of tasks."""
    cdef Py_ssize_t t, shift, cells = p.taps
    cdef int axis, cut = 0 if p.x.size[2] > 1 else 1
    p.classes = <int>p.stride[2] if p.stride[2] <= CLASSES else 1
    p.padded = False
    for axis in range(3):
        p.groups[axis] = ceil_div(p.x.size[2 + axis], p.stride[axis])
        p.low[axis] = p.high[axis] = 0
        for t in range(p.kernel[axis]):
            shift = _shift(p, axis, t)
            p.low[axis] = min(p.low[axis], shift)
            p.high[axis] = max(p.high[axis], shift)
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


cdef Py_ssize_t _residue(const Pool *p, int axis, Py_ssize_t t) noexcept nogil:
    """Return which cell of each group is cell ``t`` of a window."""
    cdef Py_ssize_t distance = t * p.dilation[axis] - p.pad[axis]
    return (distance % p.stride[axis] + p.stride[axis]) % p.stride[axis]


cdef Py_ssize_t _shift(const Pool *p, int axis, Py_ssize_t t) noexcept nogil:
    """Return which window has that cell of group 0 for its cell ``t``."""
    return (_residue(p, axis, t) - t * p.dilation[axis] + p.pad[axis]) // p.stride[axis]


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
    cdef char *memory = arena(FC_ARENA_BLOCK, list_bytes + windows * (p.item + 1))
    if memory == NULL:
        return 1
    cdef fc_cells *sources = <fc_cells *>memory
    cdef char *copy = memory + list_bytes
    _list_classes(p, &w, sources)
    for plane in range(plane, end):
        if p.padded:
            _copy_windows(p, plane, first, last, &w, copy, <uchar *>(copy + windows * p.item))
        else:
            _find_windows(p, plane, first, &w)
        _gather_plane(p, plane, first, last, &w, sources)
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
                of = (_residue(p, 0, d) * p.stride[1] + _residue(p, 1, h)) * p.stride[2]
                if not of <= i < of + p.stride[2]:
                    continue
                at = _shift(p, 0, d) * w.z_step + _shift(p, 1, h) * w.y_step
                for x in range(p.kernel[2] - 1, -1, -1):
                    if of + _residue(p, 2, x) == i:
                        offsets[n] = at + _shift(p, 2, x)
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
    """Copy what groups ``first`` to ``last`` of a plane see; around it, nobody wins."""
    cdef Py_ssize_t z, y, at, to = 0, pitch = w.y_step, left = -p.low[2], n = min(p.y.size[4], pitch - left)
    cdef Py_ssize_t base = plane // p.x.size[1] * p.y.stride[0] + plane % p.x.size[1] * p.y.stride[1]
    at = -p.low[0] * w.z_step - p.low[1] * w.y_step + left
    w.grads = grads + at * p.item
    w.winners = winners + at
    for z in range(first[0] + p.low[0], last[0] + p.high[0]):
        for y in range(first[1] + p.low[1], last[1] + p.high[1]):
            if 0 <= z < p.y.size[2] and 0 <= y < p.y.size[3]:
                at = base + z * p.y.stride[2] + y * p.y.stride[3]
                memset(winners + to, NOBODY, <size_t>left)
                memcpy(winners + to + left, p.winners.data + at, <size_t>n)
                memset(winners + to + left + n, NOBODY, <size_t>(pitch - left - n))
                memcpy(grads + (to + left) * p.item, p.y.data + at * p.item, <size_t>(n * p.item))
            else:
                memset(winners + to, NOBODY, <size_t>pitch)
            to += pitch


cdef void _gather_plane(const Pool *p, Py_ssize_t plane, const Py_ssize_t *first, const Py_ssize_t *last,
                        const Windows *w, const fc_cells *sources) noexcept nogil:
    """Compute groups ``first`` to ``last``: all rows of one residue in some rows of groups, then those of the next."""
    cdef Py_ssize_t z, y, r, rows, at, most = 1 + CHUNK // (p.stride[1] * p.x.size[4] * p.item)
    cdef char *to = p.x.data + (plane // p.x.size[1] * p.x.stride[0] + plane % p.x.size[1] * p.x.stride[1]) * p.item
    cdef Windows of
    of.y_step = w.y_step
    for z in range(first[0] * p.stride[0], min(last[0] * p.stride[0], p.x.size[2])):
        for y from first[1] <= y < last[1] by most:
            for r in range(p.stride[1]):
                rows = min(min(y + most, last[1]), (p.x.size[3] - r + p.stride[1] - 1) // p.stride[1]) - y
                at = (z // p.stride[0] - first[0]) * w.z_step + (y - first[1]) * w.y_step
                of.grads = w.grads + at * p.item
                of.winners = w.winners + at
                _gather_rows(
                    p, &of, &sources[(z % p.stride[0] * p.stride[1] + r) * p.stride[2]], rows,
                    to + (z * p.x.stride[2] + (y * p.stride[1] + r) * p.x.stride[3]) * p.item,
                )


cdef void _gather_rows(const Pool *p, const Windows *w, const fc_cells *sources, Py_ssize_t rows, char *to) noexcept nogil:
    """Compute some rows: whole groups, then the rest."""
    cdef Py_ssize_t columns = p.x.size[4] // p.stride[2], rest = p.x.size[4] % p.stride[2], r
    cdef fc_runs grads, winners, cells
    grads.data, grads.run, grads.step, grads.item = <char *>w.grads, w.y_step, 1, <int>p.item
    winners.data, winners.run, winners.step, winners.item = <uchar *>w.winners, w.y_step, 1, 1
    cells.run, cells.step, cells.item = p.stride[1] * p.x.stride[3], p.stride[2] * p.x.stride[4], <int>p.item
    if columns:
        for r from 0 <= r < p.stride[2] by p.classes:
            cells.data = to + r * p.x.stride[4] * p.item
            p.kernels.max_pool_grad(
                &sources[r], p.classes, p.x.stride[4], rows, columns, &grads, &winners, &cells
            )
    grads.data = <char *>w.grads + columns * p.item
    winners.data = <uchar *>w.winners + columns
    for r in range(rest):
        cells.data = to + (columns * p.stride[2] + r) * p.x.stride[4] * p.item
        p.kernels.max_pool_grad(&sources[r], 1, 0, rows, 1, &grads, &winners, &cells)


# ------------------------------------------------------------------------------- backward, vectors along C


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
    p.classes = <int>p.stride[2] if p.stride[2] <= CLASSES else 1
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
        _locate(p, index, end, &rows)
        for r in range(min(p.stride[1], p.x.size[3] - rows.y * p.stride[1])):
            _list_lines(p, &rows, r, &listing)
            _gather_row(p, &rows, r, &listing)
        index += rows.count
    return 0


cdef int _make_listing(const Pool *p, Listing *listing) noexcept nogil:
    cdef Py_ssize_t taps = p.kernel[0] + p.kernel[1] + p.kernel[2], distance, t
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
            distance = t * p.dilation[axis] - p.pad[axis]
            listing.residue[axis][t] = (distance % p.stride[axis] + p.stride[axis]) % p.stride[axis]
            listing.shift[axis][t] = (listing.residue[axis][t] - distance) // p.stride[axis]
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
        for r from 0 <= r < p.stride[2] by p.classes:
            _gather(p, rows, row, listing, r, p.classes, p.first[2], columns)
    for r in range(p.stride[2]):
        for i in range((p.x.size[4] - r + p.stride[2] - 1) // p.stride[2] - columns):
            _gather(p, rows, row, listing, r, 1, i if i < p.first[2] else i + columns, 1)


cdef void _gather(const Pool *p, const Rows *rows, Py_ssize_t row, Listing *listing, Py_ssize_t r, int classes,
                  Py_ssize_t first, Py_ssize_t columns) noexcept nogil:
    """Compute ``columns`` members from ``first`` on of some classes from ``r`` on."""
    cdef fc_runs from_y = _runs(p, &p.y, p.item, rows, 0, 0, first, 1, 1)
    cdef fc_runs from_winners = _runs(p, &p.winners, 1, rows, 0, 0, first, 1, 1)
    cdef fc_runs to_x = _runs(
        p, &p.x, p.item, rows, rows.z, rows.y * p.stride[1] + row, first * p.stride[2] + r, p.stride[1], p.stride[2]
    )
    cdef fc_cells sources[CLASSES]
    _list_sources(p, listing, r, classes, first, first + columns, sources)
    p.kernels.max_pool_grad(sources, classes, p.x.stride[4], columns, p.x.size[1], &from_y, &from_winners, &to_x)


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
            if channels == 1 and vx.stride[4] == 1:
                memset(row, 0, <size_t>(vx.size[4] * <Py_ssize_t>sizeof(real)))
                continue
            for i in range(vx.size[4]):
                for c in range(channels):
                    row[i * vx.stride[4] + c * vx.stride[1]] = 0
