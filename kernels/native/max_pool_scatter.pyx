"""The gradient of max pooling for large windows and short rows: each gradient is added where its winner is.

    for images, and some channels at a time:                                 in parallel
        zero their cells, and
        for windows:  grad_input[cell of the winner] += grad_output          (one call of the microkernel)
"""

from fastconv.kernels.native.blocking cimport View, ceil_div, round_up, run_tasks
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, FC_TURNS, arena, fc_rows, fc_scatter
from fastconv.kernels.native.pooling cimport Pool

cdef enum:
    CHANNELS = 128              # that a task has of a channels-last image; of another it has one for each turn
    NEAR_TAPS = 32              # so many numbers are looked up in registers
    APART_BYTES = 1 << 19       # of its cells, if there are other channels between: a power of two apart, they would share few sets of L1
    NEAR = 1 << 30              # elements


cdef void scatter(Pool *p) except *:
    """Compute the gradient of the input."""
    run_tasks(_scatter_task, p, p.x.size[0] * ceil_div(p.x.size[1], _channels(p)), p.threads)


cdef Py_ssize_t _channels(const Pool *p) noexcept nogil:
    """Return how many channels a task has."""
    return min(<Py_ssize_t>CHANNELS, p.kernels.lanes * FC_TURNS) if p.along_channels else FC_TURNS


cdef int _scatter_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Pool *p = <const Pool *>shared
    cdef Py_ssize_t most = _channels(p), parts = ceil_div(p.x.size[1], most), tables = round_up(_tables_bytes(p), 64)
    cdef Py_ssize_t image = task // parts, channel = task % parts * most, channels = min(most, p.x.size[1] - channel)
    cdef Py_ssize_t pixels = p.x.size[2] * p.x.size[3] * p.x.size[4]
    cdef bint apart = p.along_channels and p.x.stride[1] == 1 and p.x.size[1] > channels and pixels * channels * p.item <= APART_BYTES
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
    cdef char *y = _start(&p.y, image, channel, p.item)
    cdef char *winners = _start(&p.winners, image, channel, p.winner_item)
    cdef char *cells = memory + tables if apart else x
    if p.along_channels:
        _scatter_along_channels(p, &s, channels, y, winners, cells)
    else:
        p.kernels.max_pool_scatter(&s, channels, 0, y, winners, cells)
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


cdef Py_ssize_t _tables_bytes(const Pool *p) noexcept nogil:
    return round_up(p.taps, NEAR_TAPS) * <Py_ssize_t>(sizeof(Py_ssize_t) + 4 * sizeof(int))


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


cdef Py_ssize_t _distance(Py_ssize_t stride) noexcept nogil:
    return stride if stride > 0 else -stride
