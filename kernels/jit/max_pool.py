"""Max pooling: the largest number of each window, and where in the window it was.

    output[n, c, o]  = max over taps t of  input[n, c, o * stride - pad + t * dilation]
    winners[n, c, o] = the first t that reaches it, one byte
    grad_input[n, c, cell of winners[n, c, o]] += grad_output[n, c, o]

    for each row of windows (forward: a task; backward, where windows overlap: all rows of some channels are one):
        for each run of windows that have the same taps inside the input:        w  [first | most of them | last]
            list these taps
            for each vector of windows:   along the row where columns are neighbours in memory (NCHW),
                                          along the channels where these are (NHWC)
                best, winner = the first tap; let the other taps compete         in registers

The rules: the first maximum wins a tie; a NaN wins over numbers, and the last NaN over earlier ones; cells in the
padding never win, so that a window of -inf has its first cell inside the input as winner.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compile import jit, kernel
from .packing import OFFSET, Strided, fill, strided
from .threads import parallel, workspace, worthwhile
from .tile import MACHINE, flat, pointer, reader, shift, shuffle, splat

Triple = tuple[int, int, int]


class Pool(NamedTuple):
    """One pooling; triples are (depth, height, width)."""

    itemsize: int
    channels: int
    input_size: Triple
    kernel_size: Triple
    stride: Triple
    pad: Triple
    dilation: Triple
    output_size: Triple
    taps: int
    channels_last: bool  #: channels are nearer to each other in memory than columns: vectors run along them
    part: int  #: channels of a task
    parts: int


_read_pool = reader(Pool)

MOST_CHANNELS = 256  #: of a task where vectors run along them
SOME_CHANNELS, SOME_BYTES = 8, 1024  #: of a task where they don't, and of their rows: they share the lists of taps


def _pool(dims: Any, image: np.ndarray, threads: int) -> Pool:
    channels_last = abs(image.strides[1]) < abs(image.strides[4])
    if channels_last:
        part = max(SOME_CHANNELS, min(MOST_CHANNELS, -(-dims.channels * dims.batch // threads)))
    else:
        part = max(1, min(SOME_CHANNELS, SOME_BYTES // (dims.input_size[2] * image.itemsize)))
    part = min(dims.channels, part)
    return Pool(
        image.itemsize, dims.channels, dims.input_size, dims.kernel_size, dims.stride, dims.pad_before, dims.dilation,
        dims.output_size, dims.taps, channels_last, part, -(-dims.channels // part),
    )  # fmt: skip


def _comparisons(dims: Any) -> int:
    return int(dims.batch * dims.channels * math.prod(dims.output_size) * dims.taps)


def max_pool_forward(
    input: np.ndarray, output: np.ndarray, winners: np.ndarray | None, dims: Any, options: Any
) -> None:
    """Fill ``output``, and ``winners`` where it is wanted."""
    threads, wanted = worthwhile(options.threads, _comparisons(dims)), winners is not None
    pool = _pool(dims, input, threads)
    pool_numbers = flat(pool)
    to = winners if winners is not None else np.zeros((1,) * 5, np.uint8 if dims.taps <= 256 else np.uint16)

    def work(first: int, last: int) -> None:
        taps = workspace("offsets", 2 * dims.taps, OFFSET)
        _forward(
            first, last, strided(input), strided(output), strided(to), wanted, pool_numbers.ctypes.data, taps,
            input.dtype.type(0), to.dtype.type(0),
        )  # fmt: skip

    parallel(work, dims.batch * pool.parts * dims.output_size[0] * dims.output_size[1], threads)


def max_pool_backward(
    grad_output: np.ndarray, winners: np.ndarray, grad_input: np.ndarray, dims: Any, options: Any
) -> None:
    """Fill ``grad_input``; winners that point outside the input are ignored."""
    threads = worthwhile(options.threads, _comparisons(dims))
    pool = _pool(dims, grad_input, threads)
    pool_numbers = flat(pool)

    def work(first: int, last: int) -> None:
        taps = workspace("offsets", 2 * dims.taps, OFFSET)
        _backward(
            first, last, strided(grad_output), strided(winners), strided(grad_input), pool_numbers.ctypes.data, taps,
            grad_input.dtype.type(0), winners.dtype.type(0),
        )  # fmt: skip

    parallel(work, dims.batch * pool.parts, threads)


# ---------------------------------------------------------------------------------------------------------------------
# Windows
# ---------------------------------------------------------------------------------------------------------------------


@jit
def _whole_windows(pool: Pool) -> tuple[int, int]:
    """Return the range of windows of a row whose columns are all inside the input."""
    step, reach = pool.stride[2], (pool.kernel_size[2] - 1) * pool.dilation[2]
    begin = min(pool.output_size[2], -(-pool.pad[2] // step))
    end = (pool.input_size[2] - 1 - reach + pool.pad[2]) // step + 1
    return begin, max(begin, min(pool.output_size[2], end))


class Taps(NamedTuple):
    """The taps of a window that are inside the input; two tables of numbers."""

    cells: Any  #: where they are in the image
    numbers: Any
    size: int


@jit
def _taps_inside(table: Any, pool: Pool, image: Strided, d: int, h: int, w: int) -> Taps:
    """Return the taps of a window that are inside the input; the table has room for two numbers a tap."""
    cells, numbers = table, shift(table, pool.taps)
    (kd, kh, kw), (depth, height, width), (step_d, step_h, step_w) = pool.kernel_size, pool.input_size, pool.dilation
    d0, h0, w0 = d * pool.stride[0] - pool.pad[0], h * pool.stride[1] - pool.pad[1], w * pool.stride[2] - pool.pad[2]
    count = 0
    for tap_d in range(kd):
        cell_d = d0 + tap_d * step_d
        for tap_h in range(kh):
            cell_h = h0 + tap_h * step_h
            if not (0 <= cell_d < depth and 0 <= cell_h < height):
                continue
            row, tap = cell_d * image.d + cell_h * image.h, (tap_d * kh + tap_h) * kw
            for tap_w in range(kw):
                cell_w = w0 + tap_w * step_w
                if 0 <= cell_w < width:
                    cells[count], numbers[count] = row + cell_w * image.w, tap + tap_w
                    count += 1
    return Taps(cells, numbers, count)


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


def _make_compete(step: int | None) -> Any:
    """Return the function that finds the maxima of a vector of windows, ``step`` cells apart (None: any)."""

    @intrinsic
    def compete(
        typingctx: Any, target: Any, winners: Any, wanted: Any, source: Any, apart: Any, cells: Any, taps: Any,
        count: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            number = context.get_value_type(target.dtype)
            _emit_compete(builder, step, number, target.dtype.bitwidth, winners.dtype.bitwidth, *args)
            return context.get_dummy_value()

        offsets, size = types.CPointer(types.int64), types.intp
        return types.void(target, winners, types.boolean, source, size, offsets, offsets, size), generate

    return compete


def _emit_compete(
    builder: ir.IRBuilder, step: int | None, number: Any, bits: int, winner_bits: int,
    target: Any, winners: Any, wanted: Any, source: Any, apart: Any, cells: Any, taps: Any, count: Any,
) -> None:  # fmt: skip
    """Emit the loop over the taps."""
    lanes, index = MACHINE.vector_bytes * 8 // bits, ir.IntType(64)
    vector, position = ir.VectorType(number, lanes), ir.VectorType(ir.IntType(bits), lanes)

    def load(start: Any, offset: int) -> Any:
        place = builder.bitcast(builder.gep(start, [index(offset)]), vector.as_pointer())
        return builder.load(place, align=bits // 8)

    def values(tap: Any) -> Any:
        start = builder.gep(source, [builder.load(builder.gep(cells, [tap]))])
        if step == 1:
            return load(start, 0)
        if step == 2:  # the second vector begins a cell early, lest it end behind the row
            picked = [2 * lane if 2 * lane < lanes else 2 * lane + 1 for lane in range(lanes)]
            return shuffle(builder, load(start, 0), load(start, lanes - 1), picked)
        gathered = ir.Constant(vector, ir.Undefined)
        for lane in range(lanes):
            cell = builder.load(builder.gep(start, [builder.mul(apart, index(lane))]))
            gathered = builder.insert_element(gathered, cell, ir.IntType(32)(lane))
        return gathered

    def numbers(tap: Any) -> Any:
        return splat(builder, builder.load(builder.gep(taps, [tap])), position)

    # LLVM turns these variables into registers.
    best = cgutils.alloca_once_value(builder, values(index(0)))
    winner = cgutils.alloca_once_value(builder, numbers(index(0)))
    with cgutils.for_range(builder, builder.sub(count, index(1))) as loop:
        tap = builder.add(loop.index, index(1))
        value, old = values(tap), builder.load(best)
        wins = builder.or_(builder.fcmp_ordered(">", value, old), builder.fcmp_unordered("uno", value, value))
        builder.store(builder.select(wins, value, old), best)
        builder.store(builder.select(wins, numbers(tap), builder.load(winner)), winner)
    builder.store(builder.load(best), builder.bitcast(target, vector.as_pointer()), align=bits // 8)
    with builder.if_then(wanted):
        small = ir.VectorType(ir.IntType(winner_bits), lanes)
        place = builder.bitcast(winners, small.as_pointer())
        builder.store(builder.trunc(builder.load(winner), small), place, align=winner_bits // 8)


_neighbours_compete = _make_compete(1)
_every_other_competes = _make_compete(2)
_distant_compete = _make_compete(None)


@kernel
def _forward(
    first: int, last: int, input: Strided, output: Strided, winners: Strided, wanted: bool, pool_numbers: int,
    taps: int, like: float, like_winners: int,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``: a task is one row of windows in some channels of one image."""
    pool = _read_pool(pool_numbers)
    source, target, table = pointer(input.address, like), pointer(output.address, like), pointer(taps, 0)
    won_by = pointer(winners.address, like_winners)
    (depth, height, width), stride = pool.output_size, pool.stride[2]
    lanes = MACHINE.vector_bytes // pool.itemsize
    begin, end = _whole_windows(pool)
    for task in range(first, last):
        h, d, group = task % height, task // height % depth, task // (height * depth)
        n, channel = group // pool.parts, group % pool.parts * pool.part
        channels = min(pool.part, pool.channels - channel)
        image = shift(source, n * input.n + channel * input.c)
        out = shift(target, n * output.n + channel * output.c + d * output.d + h * output.h)
        won = shift(won_by, n * winners.n + channel * winners.c + d * winners.d + h * winners.h)
        w = 0
        while w < width:
            run = end - w if begin <= w < end else 1
            inside = _taps_inside(table, pool, input, d, h, w)
            out_w, won_w = shift(out, w * output.w), shift(won, w * winners.w)
            if pool.channels_last:
                for i in range(run):
                    cell = shift(image, i * stride * input.w)
                    to, to_won = shift(out_w, i * output.w), shift(won_w, i * winners.w)
                    _line(to, output.c, to_won, winners.c, wanted, cell, input.c, inside, channels, lanes)
            else:
                for c in range(channels):
                    cell = shift(image, c * input.c)
                    to, to_won = shift(out_w, c * output.c), shift(won_w, c * winners.c)
                    _line(to, output.w, to_won, winners.w, wanted, cell, stride * input.w, inside, run, lanes)
            w += run


@jit
def _line(
    target: Any, to_step: int, winners: Any, won_step: int, wanted: bool, source: Any, step: int, inside: Taps,
    windows: int, lanes: int,
) -> None:  # fmt: skip
    """Find the maxima of a line of windows that are ``step`` cells apart; the last vectors may overlap."""
    cells, taps, count = inside
    if windows < lanes or count == 0 or to_step != 1 or (wanted and won_step != 1):
        for i in range(windows):
            to, won = shift(target, i * to_step), shift(winners, i * won_step if wanted else 0)
            _one(to, won, wanted, shift(source, i * step), cells, taps, count)
        return
    for i_vector in range(0, windows, lanes):
        i = min(i_vector, windows - lanes)
        to, won, start = shift(target, i), shift(winners, i if wanted else 0), shift(source, i * step)
        if step == 1:
            _neighbours_compete(to, won, wanted, start, step, cells, taps, count)
        elif step == 2:
            _every_other_competes(to, won, wanted, start, step, cells, taps, count)
        else:
            _distant_compete(to, won, wanted, start, step, cells, taps, count)


@jit
def _one(target: Any, winner: Any, wanted: bool, source: Any, cells: Any, taps: Any, count: int) -> None:
    """Find the maximum of one window; one without a cell inside the input has -inf."""
    target[0], first = -np.inf, 0
    for i in range(count):
        value = source[cells[i]]
        if i == 0 or value > target[0] or value != value:
            target[0], first = value, taps[i]
    if wanted:
        winner[0] = first


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


def _make_add(step: int) -> Any:
    """Return the function that adds a vector of gradients to the cells of those windows that a tap has won."""

    @intrinsic
    def add(typingctx: Any, target: Any, gradient: Any, winners: Any, tap: Any, skip: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            number = context.get_value_type(target.dtype)
            _emit_add(builder, step, number, target.dtype.bitwidth, winners.dtype.bitwidth, *args)
            return context.get_dummy_value()

        return types.void(target, gradient, winners, types.int64, types.int64), generate

    return add


def _emit_add(
    builder: ir.IRBuilder, step: int, number: Any, bits: int, winner_bits: int,
    target: Any, gradient: Any, winners: Any, tap: Any, skip: Any,
) -> None:  # fmt: skip
    """Emit the addition of one vector, but of its first ``skip`` lanes."""
    lanes = MACHINE.vector_bytes * 8 // bits
    vector, small = ir.VectorType(number, lanes), ir.VectorType(ir.IntType(winner_bits), lanes)
    zeros, lane_numbers = ir.Constant(vector, None), ir.Constant(small, list(range(lanes)))

    def place(start: Any, kind: Any, offset: int = 0) -> Any:
        return builder.bitcast(builder.gep(start, [ir.IntType(64)(offset)]), kind.as_pointer())

    won = builder.icmp_unsigned(
        "==", builder.load(place(winners, small), align=winner_bits // 8), splat(builder, tap, small)
    )
    wanted = builder.icmp_unsigned(">=", lane_numbers, splat(builder, skip, small))
    gradients = builder.load(place(gradient, vector), align=bits // 8)
    values = builder.select(builder.and_(won, wanted), gradients, zeros)
    if step == 1:
        parts = {0: values}
    else:  # a zero between every two; the second part begins a cell early, lest it end behind the row
        low = [lane // 2 if lane % 2 == 0 else lanes for lane in range(lanes)]
        high = [(lane + lanes - 1) // 2 if lane % 2 == 1 else lanes for lane in range(lanes)]
        parts = {0: shuffle(builder, values, zeros, low), lanes - 1: shuffle(builder, values, zeros, high)}
    sums = {
        offset: builder.fadd(builder.load(place(target, vector, offset), align=bits // 8), part)
        for offset, part in parts.items()
    }
    for offset, total in sums.items():
        builder.store(total, place(target, vector, offset), align=bits // 8)


_add_to_neighbours = _make_add(1)
_add_to_every_other = _make_add(2)


@kernel
def _backward(
    first: int, last: int, grad_output: Strided, winners: Strided, grad_input: Strided, pool_numbers: int, taps: int,
    like: float, like_winners: int,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``: a task is some channels of one image, their windows in order."""
    pool = _read_pool(pool_numbers)
    source, target = pointer(grad_output.address, like), pointer(grad_input.address, like)
    won_by, table = pointer(winners.address, like_winners), pointer(taps, 0)
    (depth, height, width), stride = pool.output_size, pool.stride[2]
    lanes = MACHINE.vector_bytes // pool.itemsize
    begin, end = _whole_windows(pool)
    for task in range(first, last):
        n, channel = task // pool.parts, task % pool.parts * pool.part
        channels = min(pool.part, pool.channels - channel)
        image, zeroed = shift(target, n * grad_input.n + channel * grad_input.c), 0
        for row in range(depth * height):
            d, h = row // height, row % height
            zeroed = _zero(image, grad_input, pool, zeroed, _reach(pool, d, h), channels)
            gradient = shift(
                source, n * grad_output.n + channel * grad_output.c + d * grad_output.d + h * grad_output.h
            )
            won = shift(won_by, n * winners.n + channel * winners.c + d * winners.d + h * winners.h)
            w = 0
            while w < width:
                run = end - w if begin <= w < end else 1
                inside = _taps_inside(table, pool, grad_input, d, h, w)
                from_w, won_w = shift(gradient, w * grad_output.w), shift(won, w * winners.w)
                columns = Steps(stride * grad_input.w, grad_output.w, winners.w)
                along_channels = Steps(grad_input.c, grad_output.c, winners.c)
                if pool.channels_last:
                    for i in range(run):
                        cell, of, by = _start(image, from_w, won_w, columns, i)
                        _scatter(cell, of, by, columns, 1, along_channels, channels, inside, lanes)
                else:
                    _scatter(image, from_w, won_w, along_channels, channels, columns, run, inside, lanes)
                w += run
        _zero(image, grad_input, pool, zeroed, pool.input_size[0] * pool.input_size[1], channels)


class Steps(NamedTuple):
    """Elements between neighbours."""

    target: int
    gradient: int
    winners: int


@jit
def _start(target: Any, gradient: Any, winners: Any, steps: Steps, i: int) -> tuple[Any, Any, Any]:
    """Return where the i-th neighbour is."""
    return shift(target, i * steps.target), shift(gradient, i * steps.gradient), shift(winners, i * steps.winners)


@jit
def _scatter(
    target: Any, gradient: Any, winners: Any, line_steps: Steps, line_count: int, steps: Steps, windows: int,
    inside: Taps, lanes: int,
) -> None:  # fmt: skip
    """Add the gradients of lines of windows to the cells that won.

    One tap of all lines at a time: a cell that was just stored could only be loaded with a delay. From the last tap to
    the first, so that a cell is reached by its windows in order.
    """
    vectors = windows >= lanes and steps.gradient == 1 and steps.winners == 1
    for i_tap in range(inside.size - 1, -1, -1):
        tap = inside.numbers[i_tap]
        for line in range(line_count):
            to, of, by = _start(shift(target, inside.cells[i_tap]), gradient, winners, line_steps, line)
            if vectors and steps.target == 1:
                for i_vector in range(0, windows, lanes):
                    i = min(i_vector, windows - lanes)
                    _add_to_neighbours(shift(to, i), shift(of, i), shift(by, i), tap, i_vector - i)
            elif vectors and steps.target == 2:
                for i_vector in range(0, windows, lanes):
                    i = min(i_vector, windows - lanes)
                    _add_to_every_other(shift(to, 2 * i), shift(of, i), shift(by, i), tap, i_vector - i)
            else:
                for i in range(windows):
                    if by[i * steps.winners] == tap:
                        to[i * steps.target] += of[i * steps.gradient]


@jit
def _reach(pool: Pool, d: int, h: int) -> int:
    """Return how many rows of the input it takes to hold all cells of this row of windows and those before it."""
    (kd, kh, _), (depth, height, _) = pool.kernel_size, pool.input_size
    last_d = min(depth - 1, d * pool.stride[0] - pool.pad[0] + (kd - 1) * pool.dilation[0])
    last_h = min(height - 1, h * pool.stride[1] - pool.pad[1] + (kh - 1) * pool.dilation[1])
    return last_d * height + last_h + 1


@jit
def _zero(image: Any, grad_input: Strided, pool: Pool, first: int, last: int, channels: int) -> int:
    """Store zeros in the rows ``first`` to ``last`` of some channels of an image; return the next row."""
    height, width = pool.input_size[1:]
    for number in range(first, last):
        row = shift(image, number // height * grad_input.d + number % height * grad_input.h)
        if pool.channels_last:
            for w in range(width):
                _fill(shift(row, w * grad_input.w), grad_input.c, channels)
        else:
            for c in range(channels):
                _fill(shift(row, c * grad_input.c), grad_input.w, width)
    return max(first, last)


@jit
def _fill(target: Any, step: int, count: int) -> None:
    """Store ``count`` zeros, ``step`` elements apart."""
    if step == 1:
        fill(target, count)
    else:
        for i in range(count):
            target[i * step] = 0
