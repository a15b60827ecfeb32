"""The gradient of max pooling for large windows and short rows: each gradient is added where its winner is.

    for images, and some channels at a time:                                 in parallel
        zero their cells, and
        for windows:  grad_input[cell of the winner] += grad_output          (one call of the microkernel)

Where the windows of a plane follow upon each other in memory, rows don't matter: a list that is made once says for each where it begins, and
which of its cells are in the image.
"""

from libc.string cimport memset

from fastconv.kernels.native.blocking cimport View, ceil_div, round_up, run_tasks
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_TURNS, arena, fc_rows, fc_scatter
from fastconv.kernels.native.pooling cimport Pool

cdef enum:
    CHANNELS = 128              # that a task has of a channels-last image; of another it has one for each turn
    NEAR_TAPS = 32              # so many numbers are looked up in registers
    APART_BYTES = 1 << 19       # of its cells, if there are other channels between: a power of two apart, they would share few sets of L1
    NEAR = 1 << 30              # elements
    LISTED = 1 << 10            # windows of a plane, at most: L1 has the list beside the planes


# What all tasks of one call share.
ctypedef struct Plan:
    const Pool *p
    fc_scatter planes           # of a channels-first image


cdef void scatter(Pool *p) except *:
    """Compute the gradient of the input."""
    cdef Plan plan
    cdef char *memory
    plan.p = p
    if p.along_channels:
        run_tasks(_channels_task, &plan, p.x.size[0] * ceil_div(p.x.size[1], _channels(p)), p.threads)
        return
    memory = arena(FC_ARENA_WEIGHTS, _tables_bytes(p) + _windows_bytes(p))
    if memory == NULL:
        raise MemoryError("no memory for workspace")
    _describe(p, &plan.planes)
    _list_cells(p, &plan.planes, memory)
    _list_windows(p, &plan.planes, memory + _tables_bytes(p))
    run_tasks(_planes_task, &plan, p.x.size[0] * ceil_div(p.x.size[1], FC_TURNS), p.threads)


cdef int _planes_task(const void *shared, Py_ssize_t task) noexcept nogil:
    """Scatter in one plane for each turn."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const Pool *p = plan.p
    cdef Py_ssize_t parts = ceil_div(p.x.size[1], FC_TURNS), image = task // parts, channel = task % parts * FC_TURNS
    p.kernels.max_pool_scatter(
        &plan.planes, min(<Py_ssize_t>FC_TURNS, p.x.size[1] - channel), 0, _start(&p.y, image, channel, p.item),
        _start(&p.winners, image, channel, p.winner_item), _start(&p.x, image, channel, p.item),
    )
    return 0


cdef Py_ssize_t _channels(const Pool *p) noexcept nogil:
    """Return how many channels of a channels-last image a task has."""
    return min(<Py_ssize_t>CHANNELS, p.kernels.lanes * FC_TURNS)


cdef int _channels_task(const void *shared, Py_ssize_t task) noexcept nogil:
    """Scatter in some channels of a channels-last image."""
    cdef const Pool *p = (<const Plan *>shared).p
    cdef Py_ssize_t most = _channels(p), parts = ceil_div(p.x.size[1], most), tables = _tables_bytes(p)
    cdef Py_ssize_t image = task // parts, channel = task % parts * most, channels = min(most, p.x.size[1] - channel)
    cdef Py_ssize_t pixels = p.x.size[2] * p.x.size[3] * p.x.size[4]
    cdef bint apart = p.x.stride[1] == 1 and p.x.size[1] > channels and pixels * channels * p.item <= APART_BYTES
    cdef char *memory = arena(FC_ARENA_BLOCK, tables + (pixels * channels * p.item if apart else 0))
    cdef fc_scatter s
    if memory == NULL:
        return 1
    _describe(p, &s)
    if apart:
        s.cell_step[0], s.cell_step[1], s.cell_step[2] = p.x.size[3] * p.x.size[4] * channels, p.x.size[4] * channels, channels
        s.lane.cell, s.turn.cell = 1, p.kernels.lanes
    _list_cells(p, &s, memory)
    cdef char *x = _start(&p.x, image, channel, p.item)
    cdef char *cells = memory + tables if apart else x
    _scatter_along_channels(
        p, &s, channels, _start(&p.y, image, channel, p.item), _start(&p.winners, image, channel, p.winner_item), cells
    )
    if apart:
        _copy(p, &s, channels, cells, x)
    return 0


cdef char *_start(const View *v, Py_ssize_t image, Py_ssize_t channel, Py_ssize_t item) noexcept nogil:
    return v.data + (image * v.stride[0] + channel * v.stride[1]) * item


cdef void _scatter_along_channels(const Pool *p, const fc_scatter *s, Py_ssize_t channels, const char *y, const char *winners,
                                  char *cells) noexcept nogil:
    """Scatter in whole vectors of channels, and in those that are left."""
    cdef Py_ssize_t lanes = p.kernels.lanes, turns = channels // lanes
    if turns:
        p.kernels.max_pool_scatter(s, turns, lanes, y, winners, cells)
    if turns * lanes < channels:
        p.kernels.max_pool_scatter(
            s, 1, channels - turns * lanes, y + turns * s.turn.grad * p.item, winners + turns * s.turn.winner * p.winner_item,
            cells + turns * s.turn.cell * p.item,
        )


cdef void _copy(const Pool *p, const fc_scatter *s, Py_ssize_t channels, const char *cells, char *x) noexcept nogil:
    """Copy some channels of all cells to the image."""
    cdef fc_rows rows
    cdef Py_ssize_t steps[3]
    cdef int axis
    for axis in range(3):
        rows.size[axis], rows.step[axis] = p.x.size[2 + axis], s.cell_step[axis] * p.item
        steps[axis] = p.x.stride[2 + axis] * p.item
    p.kernels.copy_rows(&rows, steps, channels * p.item, cells, x)


cdef void _describe(const Pool *p, fc_scatter *s) noexcept nogil:
    """Say how windows lie; their cells are listed later."""
    cdef int axis, lane = 1 if p.along_channels else 4, turn = 1
    cdef Py_ssize_t each = p.kernels.lanes if p.along_channels else 1  # channels of a turn
    for axis in range(3):
        s.reach[axis] = (p.kernel[axis] - 1) * p.dilation[axis]
        s.image[axis], s.windows[axis] = p.x.size[2 + axis], p.y.size[2 + axis]
        s.stride[axis], s.pad[axis] = p.stride[axis], p.pad[axis]
        s.cell_step[axis] = p.x.stride[2 + axis]
        s.grad_step[axis], s.winner_step[axis] = p.y.stride[2 + axis], p.winners.stride[2 + axis]
    s.lane.cell = p.x.stride[lane] * (1 if p.along_channels else p.stride[2])
    s.lane.grad, s.lane.winner = p.y.stride[lane], p.winners.stride[lane]
    s.turn.cell, s.turn.grad, s.turn.winner = each * p.x.stride[1], each * p.y.stride[1], each * p.winners.stride[1]
    s.lane_stride = 0 if p.along_channels else p.stride[2]
    s.winner_item = p.winner_item
    s.first, s.inside = NULL, NULL


cdef Py_ssize_t _tables_bytes(const Pool *p) noexcept nogil:
    return round_up(round_up(p.taps, NEAR_TAPS) * <Py_ssize_t>(sizeof(Py_ssize_t) + 4 * sizeof(int)), 64)


cdef void _list_cells(const Pool *p, fc_scatter *s, char *memory) noexcept nogil:
    """List where the cells of a window are."""
    cdef Py_ssize_t room = round_up(p.taps, NEAR_TAPS), d, h, w, t = 0, farthest = 0
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory
    cdef int *near = <int *>(offsets + room)
    cdef int *places = near + room
    cdef int axis
    cdef bint neighbours
    for d in range(p.kernel[0]):
        for h in range(p.kernel[1]):
            for w in range(p.kernel[2]):
                places[t] = <int>(d * p.dilation[0])
                places[room + t] = <int>(h * p.dilation[1])
                places[2 * room + t] = <int>(w * p.dilation[2])
                offsets[t] = (
                    places[t] * s.cell_step[0] + places[room + t] * s.cell_step[1] + places[2 * room + t] * s.cell_step[2]
                )
                near[t] = <int>offsets[t]
                t += 1
    for axis in range(3):
        s.places[axis] = places + axis * room
        farthest += (p.x.size[2 + axis] + s.reach[axis]) * _distance(s.cell_step[axis])
    s.offsets = offsets
    farthest += _distance(s.lane.cell) * p.kernels.lanes + _distance(s.turn.cell) * FC_TURNS
    neighbours = p.winner_item == 1 and s.lane.grad == 1 and s.lane.winner == 1
    s.near_offsets = near if neighbours and p.taps <= NEAR_TAPS and farthest < NEAR else NULL


cdef Py_ssize_t _windows(const Pool *p) noexcept nogil:
    """Return how many windows of a plane are listed: all, in whole vectors, if they follow upon each other, else none."""
    cdef Py_ssize_t count = p.y.size[2] * p.y.size[3] * p.y.size[4]
    cdef bint listed = p.taps <= NEAR_TAPS and count <= LISTED and _follow(&p.y) and _follow(&p.winners)
    return round_up(count, p.kernels.lanes) if listed else 0


cdef bint _follow(const View *v) noexcept nogil:
    """Whether the elements of a plane follow upon each other."""
    cdef bint rows = v.size[3] == 1 or v.stride[3] == v.size[4], slabs = v.size[2] == 1 or v.stride[2] == v.size[3] * v.size[4]
    return v.stride[4] == 1 and rows and slabs


cdef Py_ssize_t _windows_bytes(const Pool *p) noexcept nogil:
    return (2 * _windows(p) + p.y.size[4]) * <Py_ssize_t>sizeof(int)


cdef void _list_windows(const Pool *p, fc_scatter *s, char *memory) noexcept nogil:
    """List where windows begin, and which of their cells are in the image."""
    cdef Py_ssize_t count = _windows(p), z, y, x, n = 0
    cdef int *first = <int *>memory
    cdef unsigned int *inside = <unsigned int *>(first + count)
    cdef unsigned int *columns = inside + count
    cdef unsigned int slab, row
    if count == 0 or s.near_offsets == NULL:
        return
    for x in range(s.windows[2]):
        columns[x] = _inside(p, s, 2, x)
    for z in range(s.windows[0]):
        slab = _inside(p, s, 0, z)
        for y in range(s.windows[1]):
            row = slab & _inside(p, s, 1, y)
            for x in range(s.windows[2]):
                first[n] = <int>(
                    (z * s.stride[0] - s.pad[0]) * s.cell_step[0] + (y * s.stride[1] - s.pad[1]) * s.cell_step[1]
                    + (x * s.stride[2] - s.pad[2]) * s.cell_step[2]
                )
                inside[n] = row & columns[x]
                n += 1
    memset(first + n, 0, <size_t>((count - n) * <Py_ssize_t>sizeof(int)))
    memset(inside + n, 0, <size_t>((count - n) * <Py_ssize_t>sizeof(int)))
    s.first, s.inside = first, inside


cdef unsigned int _inside(const Pool *p, const fc_scatter *s, int axis, Py_ssize_t window) noexcept nogil:
    """Return which cells of a window are in the image along an axis, a bit each."""
    cdef unsigned int inside = 0
    cdef Py_ssize_t t, place = window * s.stride[axis] - s.pad[axis]
    for t in range(p.taps):
        if 0 <= place + s.places[axis][t] < s.image[axis]:
            inside |= <unsigned int>1 << t
    return inside


cdef Py_ssize_t _distance(Py_ssize_t stride) noexcept nogil:
    return stride if stride > 0 else -stride
