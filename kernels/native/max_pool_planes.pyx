"""Max pooling in planes, forward and backward: channels first.

Rows of an image may be short. In planes, rows follow upon each other evenly, with padding between them that is the end of one and the start
of the next, and cells a stride apart are neighbours, phase by phase. What windows see through a cell of theirs, or from which windows a
class of cells gets its gradients, are then neighbours from the first row of some planes to the last:

    image, stride 2, padding 1        phases                        .: no cell (a NaN, which is never greater)
     a b a b                           d d     . c c                   windows: 4, and one between the rows of the next plane
     c d c d                           d d     . c c                   (backward: a window that nobody wins)
     a b a b                           . .     . . .
     c d c d                           b b     . a a
                                       b b     . a a

    for blocks of some planes, or of some rows (slabs) of one:                                      in parallel
        forward:    spread rows of the image to phases
                    maxima of all windows, and of what is between them: one call
                    copy rows of them to the output
        backward:   copy rows of gradients and winners (unless all windows are there: those are read where they are, in large blocks)
                    for classes of rows: sum up what their cells have won, in classes of cells that take turns: one call

Forward, cells are compared without a thought for numbers that aren't finite: a block that has one is pooled row by row.
"""

from libc.string cimport memset

from fastconv.kernels.native.blocking cimport View, ceil_div, round_up, run_tasks
from fastconv.kernels.native.machine cimport FC_ARENA_BLOCK, arena, fc_cells, fc_columns, fc_phases, fc_rows
from fastconv.kernels.native.max_pool_rows cimport cells_bytes, pool_rows
from fastconv.kernels.native.pooling cimport Pool, residue, shift, uchar

cdef enum:
    BLOCK_BYTES = 12_288        # of a block: a quarter of L1, which has the image's lines, too
    IN_PLACE_BYTES = 1 << 17    # the same where nothing is copied: then only a block's own time matters
    MOST_BYTES = 1 << 18        # of a row: longer ones don't lack vectors
    TASKS = 8                   # for each thread
    NOBODY = 255                # wins this window


# Planes of windows (forward) or of groups of cells, one of each class (backward), and their blocks.
ctypedef struct Planes:
    const Pool *p
    Py_ssize_t size[3]          # of a plane
    Py_ssize_t pitch[3]         # the same with what is between it and the next
    Py_ssize_t low[3]           # backward: the first and the last window that group 0 sees
    Py_ssize_t high[3]
    Py_ssize_t phases, phase    # of the image, elements from one to the next
    bint in_place               # backward: whether windows are read where they are, but those of the last planes
    Py_ssize_t reach            # from a window to the last cell it sees, from the first window of a group to the last
    Py_ssize_t planes, together # in all, of a block
    int cut                     # the axis along which planes are cut
    Py_ssize_t part, parts      # length of a block along it, blocks of a plane
    Py_ssize_t blocks, task_blocks
    Py_ssize_t most             # windows or groups of a block, and of what is between them; a whole number of vectors

# Backward: the windows that cells see: in which lines, for each class of rows, and which of a line, for each class of cells of a row.
ctypedef struct Sources:
    fc_cells *lines
    fc_columns *columns

# Planes from `plane` on, or `count` rows (slabs) from `first` on of one.
ctypedef struct Block:
    Py_ssize_t plane, planes, first, count

# What a block sees or stores of each plane of an array: cells first[] to end[], `before` cells behind the start of its planes.
ctypedef struct Part:
    Py_ssize_t first[3]
    Py_ssize_t end[3]
    Py_ssize_t before[3]


cdef Py_ssize_t _share_out(Planes *q, Py_ssize_t cell_bytes) noexcept nogil:
    """Cut planes into blocks, given the bytes that a window (group) takes; return the number of tasks."""
    cdef const Pool *p = q.p
    cdef int lanes = p.kernels.lanes
    cdef Py_ssize_t bytes = IN_PLACE_BYTES if q.in_place else BLOCK_BYTES
    cdef Py_ssize_t step = (q.pitch[1] if q.cut == 0 else 1) * (q.pitch[2] if q.cut < 2 else 1)  # windows from one to the next
    q.phases = p.stride[0] * p.stride[1] * p.stride[2]
    q.planes = p.x.size[0] * p.x.size[1]
    q.parts = ceil_div(q.size[q.cut], max(<Py_ssize_t>1, bytes // (cell_bytes * step)))
    q.part = ceil_div(q.size[q.cut], q.parts)
    q.together = 1
    if q.parts == 1 and _even(&p.x) and _even(&p.y) and _even(&p.winners):
        q.together = max(<Py_ssize_t>1, min(q.planes, bytes // (cell_bytes * step * q.pitch[q.cut])))
    if p.threads > 1:
        q.together = min(q.together, ceil_div(q.planes, p.threads * TASKS))
    q.blocks = ceil_div(q.planes, q.together) * q.parts
    q.most = round_up((q.together - 1) * q.pitch[0] * q.pitch[1] * q.pitch[2] + q.part * step, lanes)
    q.phase = (ceil_div(q.most + q.reach, lanes) + 1 | 1) * lanes  # rows are stored in whole vectors; a power of two would share few sets of L1
    q.task_blocks = max(<Py_ssize_t>1, ceil_div(q.blocks, p.threads * TASKS) if p.threads > 1 else q.blocks)
    return ceil_div(q.blocks, q.task_blocks)


cdef bint _even(const View *v) noexcept nogil:
    """Whether all planes are equally far apart."""
    return v.size[0] == 1 or v.stride[0] == v.size[1] * v.stride[1]


cdef void _find(const Planes *q, Py_ssize_t index, Block *block) noexcept nogil:
    block.plane = index // q.parts * q.together
    block.planes = min(q.together, q.planes - block.plane)
    block.first = index % q.parts * q.part
    block.count = min(q.part, q.size[q.cut] - block.first)


cdef Py_ssize_t _first(const Planes *q, const Block *block, int axis) noexcept nogil:
    return block.first if axis == q.cut else 0


cdef Py_ssize_t _count(const Planes *q, const Block *block, int axis) noexcept nogil:
    return block.count if axis == q.cut else q.size[axis]


cdef Py_ssize_t _length(const Planes *q, const Block *block) noexcept nogil:
    """Return how many windows (groups) there are from the first of a block to the last."""
    cdef Py_ssize_t last = (block.planes - 1) * q.pitch[0] + _count(q, block, 0) - 1
    last = (last * q.pitch[1] + _count(q, block, 1) - 1) * q.pitch[2] + _count(q, block, 2) - 1
    return last + 1


cdef char *_start(const Planes *q, const Block *block) noexcept nogil:
    """Return about where a block's part of the image begins, to be fetched ahead."""
    cdef const View *x = &q.p.x
    return x.data + (
        block.plane // x.size[1] * x.stride[0] + block.plane % x.size[1] * x.stride[1]
        + block.first * q.p.stride[q.cut] * x.stride[2 + q.cut]
    ) * q.p.item


cdef Py_ssize_t _bytes(const Planes *q, const Block *block) noexcept nogil:
    """Return about how long it is."""
    cdef const View *x = &q.p.x
    cdef Py_ssize_t last = block.count * q.p.stride[q.cut] * x.stride[2 + q.cut]
    return max(<Py_ssize_t>0, min(<Py_ssize_t>BLOCK_BYTES, ((block.planes - 1) * x.stride[1] + last) * q.p.item))


cdef void _clip(Part *part, int axis, Py_ssize_t start, Py_ssize_t length, Py_ssize_t size) noexcept nogil:
    """Leave out what is not in an array of that size."""
    part.first[axis] = max(<Py_ssize_t>0, start)
    part.end[axis] = max(part.first[axis], min(size, start + length))
    part.before[axis] = part.first[axis] - start


cdef char *_rows(const View *v, const Block *block, const Part *part, Py_ssize_t item, fc_rows *rows) noexcept nogil:
    """Describe the rows of a part of a block's planes; return where they begin."""
    rows.size[0] = block.planes
    rows.size[1], rows.size[2] = part.end[0] - part.first[0], part.end[1] - part.first[1]
    rows.step[0], rows.step[1], rows.step[2] = v.stride[1], v.stride[2], v.stride[3]
    return v.data + (
        block.plane // v.size[1] * v.stride[0] + block.plane % v.size[1] * v.stride[1]
        + part.first[0] * v.stride[2] + part.first[1] * v.stride[3] + part.first[2]
    ) * item


cdef void _steps(const Planes *q, Py_ssize_t item, Py_ssize_t *steps) noexcept nogil:
    """Write how far apart planes, slabs and rows are, given the bytes of an element."""
    steps[2] = q.pitch[2] * item
    steps[1] = q.pitch[1] * steps[2]
    steps[0] = q.pitch[0] * steps[1]


cdef void _copy(const Planes *q, const View *v, const Block *block, const Part *part, Py_ssize_t item, char *planes,
                bint back) noexcept nogil:
    """Copy rows of an array to planes, or back."""
    cdef fc_rows rows
    cdef Py_ssize_t steps[3]
    cdef Py_ssize_t array_steps[3]
    cdef int axis
    cdef char *array = _rows(v, block, part, item, &rows)
    _steps(q, item, steps)
    planes += part.before[0] * steps[1] + part.before[1] * steps[2] + part.before[2] * item
    for axis in range(3):
        array_steps[axis] = rows.step[axis] * item
        rows.step[axis] = steps[axis] if back else array_steps[axis]
    if back:
        q.p.kernels.copy_rows(&rows, array_steps, (part.end[2] - part.first[2]) * item, planes, array)
    else:
        q.p.kernels.copy_rows(&rows, steps, (part.end[2] - part.first[2]) * item, array, planes)


# --------------------------------------------------------------------------------------------------------- forward

cdef bint pools_in_planes(const Pool *p) noexcept nogil:
    """Whether windows along W see padding or are few, but not where rows are long, and arrays and winners are such as planes need."""
    cdef const View *v = &p.winners if p.winner_item else &p.y
    if p.along_channels or p.x.stride[4] != 1 or p.y.stride[4] != 1 or v.stride[4] != 1:
        return False
    if p.winner_item > 1 or p.stride[2] > 2 or p.x.size[4] * p.item > MOST_BYTES:
        return False
    return p.last[2] - p.first[2] < p.y.size[4] or p.y.size[4] < p.kernels.lanes


cdef void pool_in_planes(Pool *p) except *:
    """Compute maxima and winners."""
    cdef Planes planes
    cdef Planes *q = &planes
    cdef Py_ssize_t seen, used, before
    cdef int axis
    q.p = p
    q.in_place = False
    q.cut = 0 if p.y.size[2] > 1 else 1  # whole rows: they may have to be pooled by rows
    for axis in range(3):
        before = p.pad[axis]
        q.size[axis] = p.y.size[2 + axis]
        seen = _seen(p, axis, q.size[axis])
        used = min(p.x.size[2 + axis], seen - before)
        q.pitch[axis] = max(
            q.size[axis],  # windows
            ceil_div(before + used, p.stride[axis]),  # the cells in front of the next row's padding
            (seen - 1) // p.stride[axis] - before // p.stride[axis] + 1,  # the cells and the padding in front of the next row's cells
        )
    q.reach = _tap(q, p.kernel[0] - 1, p.kernel[1] - 1, p.kernel[2] - 1)
    tasks = _share_out(q, (p.stride[0] * p.stride[1] * p.stride[2] + 1) * p.item + p.winner_item)
    run_tasks(_pool_task, q, tasks, p.threads)


cdef Py_ssize_t _seen(const Pool *p, int axis, Py_ssize_t windows) noexcept nogil:
    """Return how many cells some windows see, padding included."""
    return (windows - 1) * p.stride[axis] + (p.kernel[axis] - 1) * p.dilation[axis] + 1


cdef Py_ssize_t _tap(const Planes *q, Py_ssize_t d, Py_ssize_t h, Py_ssize_t w) noexcept nogil:
    """Return how far behind a window's first cell of its phase that cell is."""
    cdef const Pool *p = q.p
    return (
        (d * p.dilation[0] // p.stride[0] * q.pitch[1] + h * p.dilation[1] // p.stride[1]) * q.pitch[2]
        + w * p.dilation[2] // p.stride[2]
    )


cdef int _pool_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Planes *q = <const Planes *>shared
    cdef const Pool *p = q.p
    cdef Py_ssize_t list_bytes = round_up(cells_bytes(p), 64), phase_bytes = q.phases * q.phase * p.item
    cdef char *memory = arena(FC_ARENA_BLOCK, 2 * list_bytes + phase_bytes + q.most * (p.item + 1))
    if memory == NULL:
        return 1
    cdef char *phases = memory + 2 * list_bytes
    cdef char *best = phases + phase_bytes
    cdef uchar *winners = <uchar *>best + q.most * p.item if p.winner_item else NULL
    cdef fc_cells cells
    cdef Block block, next
    cdef Py_ssize_t index, n
    _list_taps(q, memory, &cells)
    for index in range(task * q.task_blocks, min(task * q.task_blocks + q.task_blocks, q.blocks)):
        _find(q, index, &block)
        if q.parts > 1 or index == task * q.task_blocks:
            memset(phases, 0xff, <size_t>phase_bytes)  # NaN
        if _spread(q, &block, phases):
            _find(q, min(index + 1, q.blocks - 1), &next)
            n = round_up(_length(q, &block), p.kernels.lanes)
            p.kernels.max_pool_finite(&cells, n, phases, best, winners, _start(q, &next), _bytes(q, &next))
            _store(q, &block, best, winners)
        else:
            _pool_by_rows(q, &block, memory + list_bytes)
    return 0


cdef void _list_taps(const Planes *q, char *memory, fc_cells *cells) noexcept nogil:
    """List the cells of a window."""
    cdef const Pool *p = q.p
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory
    cdef int *numbers = <int *>(memory + p.taps * <Py_ssize_t>sizeof(Py_ssize_t))
    cdef Py_ssize_t d, h, w, of
    cells.count, cells.offsets, cells.numbers = 0, offsets, numbers
    for d in range(p.kernel[0]):
        for h in range(p.kernel[1]):
            for w in range(p.kernel[2]):
                of = d * p.dilation[0] % p.stride[0] * p.stride[1] + h * p.dilation[1] % p.stride[1]
                of = of * p.stride[2] + w * p.dilation[2] % p.stride[2]
                offsets[cells.count] = of * q.phase + _tap(q, d, h, w)
                numbers[cells.count] = <int>cells.count
                cells.count += 1


cdef bint _spread(const Planes *q, const Block *block, char *phases) noexcept nogil:
    """Spread what a block sees of the image to phases; return whether all of it is finite."""
    cdef const Pool *p = q.p
    cdef Part cells
    cdef fc_rows rows
    cdef fc_phases spread
    cdef int axis
    for axis in range(3):
        _clip(
            &cells, axis, _first(q, block, axis) * p.stride[axis] - p.pad[axis], _seen(p, axis, _count(q, block, axis)),
            p.x.size[2 + axis],
        )
        spread.stride[axis] = p.stride[axis]
        spread.before[axis] = cells.before[axis]
    _steps(q, 1, spread.pitch)
    spread.phase = q.phase
    image = _rows(&p.x, block, &cells, p.item, &rows)
    return p.kernels.to_phases(&spread, &rows, cells.end[2] - cells.first[2], image, phases)


cdef void _store(const Planes *q, const Block *block, char *best, uchar *winners) noexcept nogil:
    """Copy windows to the output."""
    cdef const Pool *p = q.p
    cdef Part windows
    cdef int axis
    for axis in range(3):
        _clip(&windows, axis, _first(q, block, axis), _count(q, block, axis), p.y.size[2 + axis])
    _copy(q, &p.y, block, &windows, p.item, best, True)
    if winners != NULL:
        _copy(q, &p.winners, block, &windows, 1, <char *>winners, True)


cdef void _pool_by_rows(const Planes *q, const Block *block, char *memory) noexcept nogil:
    cdef Py_ssize_t height = q.size[1], plane_rows = q.size[0] * height, row = 1 if q.cut else height
    cdef Py_ssize_t first = block.plane * plane_rows + block.first * row
    pool_rows(q.p, first, first + (block.planes - 1) * plane_rows + block.count * row, memory)


# -------------------------------------------------------------------------------------------------------- backward

cdef bint gathers_in_planes(const Pool *p) noexcept nogil:
    """Whether the arrays are such as planes need, and rows that aren't cut not too long."""
    if p.x.size[4] * p.item > MOST_BYTES and (p.x.size[2] > 1 or p.x.size[3] > 1):
        return False
    return p.x.stride[4] == 1 and p.y.stride[4] == 1 and p.winners.stride[4] == 1 and p.winner_item == 1


cdef void gather_in_planes(Pool *p) except *:
    """Compute the gradient of the input."""
    cdef Planes planes
    cdef Planes *q = &planes
    cdef Py_ssize_t t, window
    cdef int axis
    q.p = p
    q.cut = 0 if p.x.size[2] > 1 else 1 if p.x.size[3] > 1 else 2
    for axis in range(3):
        q.size[axis] = ceil_div(p.x.size[2 + axis], p.stride[axis])
        q.low[axis] = q.high[axis] = 0
        for t in range(p.kernel[axis]):
            window = shift(p, axis, t)
            q.low[axis] = min(q.low[axis], window)
            q.high[axis] = max(q.high[axis], window)
        window = min(p.y.size[2 + axis], q.size[axis] + q.high[axis])  # the end of those that are seen
        q.pitch[axis] = max(q.size[axis] + q.high[axis], window - q.low[axis])
    q.pitch[2] = round_up(q.pitch[2], p.kernels.lanes)  # a window's own gradient is first of a vector
    q.in_place = _sees_all_windows(q) and _is_contiguous(&p.y) and _is_contiguous(&p.winners)
    q.reach = ((q.high[0] - q.low[0]) * q.pitch[1] + q.high[1] - q.low[1]) * q.pitch[2] + q.high[2] - q.low[2]
    tasks = _share_out(q, (p.stride[0] * p.stride[1] * p.stride[2] + 1) * p.item + 1)
    run_tasks(_gather_task, q, tasks, p.threads)


cdef bint _sees_all_windows(const Planes *q) noexcept nogil:
    """Whether each group sees one window, and that one is there."""
    cdef int axis
    for axis in range(3):
        if q.low[axis] < 0 or q.high[axis] > 0 or q.size[axis] > q.p.y.size[2 + axis]:
            return False
    return True


cdef bint _is_contiguous(const View *v) noexcept nogil:
    cdef Py_ssize_t step = 1
    cdef int axis
    for axis in range(4, -1, -1):
        if v.stride[axis] != step and v.size[axis] > 1:
            return False
        step *= v.size[axis]
    return True


cdef int _gather_task(const void *shared, Py_ssize_t task) noexcept nogil:
    cdef const Planes *q = <const Planes *>shared
    cdef const Pool *p = q.p
    cdef Py_ssize_t classes = p.stride[0] * p.stride[1], lines = p.kernel[0] * p.kernel[1]
    cdef Py_ssize_t list_bytes = round_up(
        classes * <Py_ssize_t>sizeof(fc_cells) + p.stride[2] * <Py_ssize_t>sizeof(fc_columns)
        + lines * <Py_ssize_t>(sizeof(Py_ssize_t) + sizeof(int)), 64
    )
    cdef Py_ssize_t before = round_up(-q.low[2], p.kernels.lanes) + q.low[2]
    cdef char *memory = arena(FC_ARENA_BLOCK, list_bytes + before * p.item + q.phase * (p.item + 1))
    if memory == NULL:
        return 1
    cdef Sources sources
    sources.lines = <fc_cells *>memory
    sources.columns = <fc_columns *>&sources.lines[classes]
    cdef char *grads = memory + list_bytes + before * p.item
    cdef uchar *winners = <uchar *>grads + q.phase * p.item  # bytes last: numbers are aligned
    cdef Block block
    cdef Py_ssize_t index, copied
    cdef Py_ssize_t steps[3]
    _list_lines(q, sources.lines, <Py_ssize_t *>&sources.columns[p.stride[2]])
    _list_columns(q, sources.columns)
    for index in range(task * q.task_blocks, min(task * q.task_blocks + q.task_blocks, q.blocks)):
        _find(q, index, &block)
        copied = _planes_at_the_end(q, &block) if q.in_place else block.planes
        block.planes -= copied
        if block.planes > 0:
            _gather_where_they_are(q, &block, &sources)
        block.plane += block.planes
        block.planes = copied
        if copied > 0:
            if q.parts > 1 or q.in_place or index == task * q.task_blocks:
                memset(winners, NOBODY, <size_t>q.phase)
            _copy_windows(q, &block, grads, winners)
            _steps(q, 1, steps)
            _gather(q, &block, &sources, steps, grads, winners)
    return 0


cdef Py_ssize_t _planes_at_the_end(const Planes *q, const Block *block) noexcept nogil:
    """Return how many planes of a block have fewer windows behind them than fill a vector."""
    cdef const View *y = &q.p.y
    cdef Py_ssize_t windows = y.size[2] * y.size[3] * y.size[4], end = _index(y, block, q.cut) + _length(q, block)
    if q.planes * windows - end >= q.p.kernels.lanes:
        return 0
    return min(block.planes, max(<Py_ssize_t>1, ceil_div(q.p.kernels.lanes, windows) - (q.planes - block.plane - block.planes)))


cdef void _list_lines(const Planes *q, fc_cells *lines, Py_ssize_t *offsets) noexcept nogil:
    """List the lines of windows that each class of rows of a group sees, in their order; [residue of z][of y]."""
    cdef const Pool *p = q.p
    cdef int *numbers = <int *>(offsets + p.kernel[0] * p.kernel[1])
    cdef Py_ssize_t i, d, h, n = 0
    for i in range(p.stride[0] * p.stride[1]):
        lines[i].offsets = offsets + n
        lines[i].numbers = numbers + n
        for d in range(p.kernel[0] - 1, -1, -1):
            for h in range(p.kernel[1] - 1, -1, -1):
                if residue(p, 0, d) * p.stride[1] + residue(p, 1, h) == i:
                    offsets[n] = ((shift(p, 0, d) - q.low[0]) * q.pitch[1] + shift(p, 1, h) - q.low[1]) * q.pitch[2]
                    numbers[n] = <int>((d * p.kernel[1] + h) * p.kernel[2])
                    n += 1
        lines[i].count = offsets + n - lines[i].offsets


cdef void _list_columns(const Planes *q, fc_columns *columns) noexcept nogil:
    """Say which windows of a line each class of cells of a row sees, in their order."""
    cdef const Pool *p = q.p
    cdef fc_columns *seen
    cdef Py_ssize_t i, w, at
    for i in range(p.stride[2]):
        seen = &columns[i]
        seen.count, seen.first, seen.step, seen.number, seen.number_step = 0, 0, 1, 0, 0
        for w in range(p.kernel[2] - 1, -1, -1):
            if residue(p, 2, w) != i:
                continue
            at = shift(p, 2, w) - q.low[2]
            if seen.count == 0:
                seen.first, seen.number = at, <int>w
            elif seen.count == 1:
                seen.step, seen.number_step = at - seen.first, <int>w - seen.number
            seen.count += 1


cdef void _copy_windows(const Planes *q, const Block *block, char *grads, uchar *winners) noexcept nogil:
    """Copy the gradients and winners that a block sees."""
    cdef const Pool *p = q.p
    cdef Part windows
    cdef int axis
    for axis in range(3):
        _clip(
            &windows, axis, _first(q, block, axis) + q.low[axis], _count(q, block, axis) + q.high[axis] - q.low[axis],
            p.y.size[2 + axis],
        )
    _copy(q, &p.y, block, &windows, p.item, grads, False)
    _copy(q, &p.winners, block, &windows, 1, <char *>winners, False)


cdef void _gather_where_they_are(const Planes *q, const Block *block, const Sources *sources) noexcept nogil:
    """Compute a block's part of the gradient of the input from windows as they lie in their arrays."""
    cdef const View *y = &q.p.y
    cdef Py_ssize_t first = _index(y, block, q.cut)
    _gather(q, block, sources, &y.stride[1], y.data + first * q.p.item, <const uchar *>q.p.winners.data + first)


cdef Py_ssize_t _index(const View *v, const Block *block, int cut) noexcept nogil:
    """Return which element is the first of a block."""
    return (
        block.plane // v.size[1] * v.stride[0] + block.plane % v.size[1] * v.stride[1] + block.first * v.stride[2 + cut]
    )


cdef void _gather(const Planes *q, const Block *block, const Sources *sources, const Py_ssize_t *steps, const char *grads,
                  const uchar *winners) noexcept nogil:
    """Compute a block's part of the gradient of the input, one class of slabs after another."""
    cdef const Pool *p = q.p
    cdef Part cells
    cdef fc_rows rows, some
    cdef Py_ssize_t z
    cdef int axis
    for axis in range(3):
        _clip(
            &cells, axis, _first(q, block, axis) * p.stride[axis], _count(q, block, axis) * p.stride[axis], p.x.size[2 + axis]
        )
    image = _rows(&p.x, block, &cells, p.item, &rows)
    some = rows
    some.step[1] = rows.step[1] * p.stride[0]
    for z in range(min(p.stride[0], rows.size[1])):
        some.size[1] = ceil_div(rows.size[1] - z, p.stride[0])
        p.kernels.max_pool_won(
            &sources.lines[z * p.stride[1]], p.stride[1], p.stride[2], sources.columns, &some, steps,
            cells.end[2] - cells.first[2], grads, winners, image + z * rows.step[1] * p.item,
        )
