"""Max pooling: the largest number of each window, and where in the window it was.

    output[n, c, o]  = max over taps t of  input[n, c, o * stride - pad + t * dilation]
    winners[n, c, o] = the first t that reaches it, one byte
    grad_input[n, c, cell of winners[n, c, o]] += grad_output[n, c, o]

    forward: for each row of windows (a task):
        for each run of windows that have the same taps inside the input:        w  [first | most of them | last]
            list these taps
            for each vector of windows:   along the row where columns are neighbours in memory (NCHW),
                                          along the channels where these are (NHWC)
                best, winner = the first tap; let the other taps compete         in registers

    backward: for each band of rows of the input (a task):
        pack the windows that see them, [row][column][channel], zeros where there are none
        for each class of cells, those a stride apart, which see their windows alike:
            for each run of cells, a vector of channels for each:
                sum = the gradients of those windows that a cell has won                     in registers
        store the sums, whose classes are side by side:       |a b|a b|a b|    columns with a stride of 2

With its border packed, every cell sees as many windows as any other of its class: no cell is a special case. Where
windows are large this looks at too many, and gradients are scattered to the winners instead.

The rules: the first maximum wins a tie; a NaN wins over numbers, and the last NaN over earlier ones; cells in the
padding never win, so that a window of -inf has its first cell inside the input as winner.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compile import jit, kernel
from .packing import OFFSET, SQUARE, Strided, copy_block, fill, strided
from .threads import parallel, workspace, worthwhile
from .tile import MACHINE, address, flat, pointer, reader, shift, shuffle, splat

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
    channels_last = _channels_last(image)
    if channels_last:
        part = max(SOME_CHANNELS, min(MOST_CHANNELS, -(-dims.channels * dims.batch // threads)))
    else:
        part = max(1, min(SOME_CHANNELS, SOME_BYTES // (dims.input_size[2] * image.itemsize)))
    return _describe(dims, image.itemsize, channels_last, min(dims.channels, part))


def _describe(dims: Any, itemsize: int, channels_last: bool, part: int) -> Pool:
    return Pool(
        itemsize, dims.channels, dims.input_size, dims.kernel_size, dims.stride, dims.pad_before, dims.dilation,
        dims.output_size, dims.taps, channels_last, part, -(-dims.channels // part),
    )  # fmt: skip


def _channels_last(image: np.ndarray) -> bool:
    return abs(image.strides[1]) < abs(image.strides[4])


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
            first, last, strided(input), strided(output), strided(to), wanted, address(pool_numbers), taps,
            input.dtype.type(0), to.dtype.type(0),
        )  # fmt: skip

    parallel(work, dims.batch * pool.parts * dims.output_size[0] * dims.output_size[1], threads)


def max_pool_backward(
    grad_output: np.ndarray, winners: np.ndarray, grad_input: np.ndarray, dims: Any, options: Any
) -> None:
    """Fill ``grad_input``; winners that point outside the input are ignored."""
    threads = worthwhile(options.threads, _comparisons(dims))
    around = math.prod(
        (k - 1) * d // s + 1 for k, d, s in zip(dims.kernel_size, dims.dilation, dims.stride, strict=True)
    )
    backward = _backward_by_gathering if max(dims.taps, around) <= GATHER_TAPS else _backward_by_scattering
    backward(grad_output, winners, grad_input, dims, threads)


def _backward_by_gathering(
    grad_output: np.ndarray, winners: np.ndarray, grad_input: np.ndarray, dims: Any, threads: int
) -> None:
    plan = _gathering(dims, grad_input.itemsize, _channels_last(grad_input))
    dtype, winner_dtype = grad_input.dtype, winners.dtype

    def work(first: int, last: int) -> None:
        _gather(
            first, last, strided(grad_output), strided(winners), strided(grad_input),
            address(plan.pool), address(plan.band), address(plan.sources), workspace("box", plan.windows, dtype),
            workspace("weight", plan.windows, winner_dtype), workspace("sums", plan.sums, dtype),
            dtype.type(0), winner_dtype.type(0),
        )  # fmt: skip

    parallel(work, plan.tasks, threads)


def _backward_by_scattering(
    grad_output: np.ndarray, winners: np.ndarray, grad_input: np.ndarray, dims: Any, threads: int
) -> None:
    pool = _pool(dims, grad_input, threads)
    numbers = flat(pool)

    def work(first: int, last: int) -> None:
        _scatter(
            first, last, strided(grad_output), strided(winners), strided(grad_input), address(numbers),
            workspace("offsets", 4 * dims.taps, OFFSET), grad_input.dtype.type(0), winners.dtype.type(0),
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
# Backward: cells gather from the windows that see them
# ---------------------------------------------------------------------------------------------------------------------

GATHER_TAPS = 49  #: the most cells of a window, or windows around a cell, where looking at all of them pays
BAND_BYTES = 32 * 1024  #: of packed gradients
BAND_COLUMNS = 256
RUN_VECTORS = 4  #: vectors of cells that are gathered at once


class Band(NamedTuple):
    """Cells that are gathered at once, and the packed windows that see them; triples as in ``Pool``.

    Cells that are a stride apart make up a class: along each axis, cell ``i * stride + r`` is seen by the windows from
    ``i + before`` up to ``i + before + more``.
    """

    rows: int  #: of each class
    columns: int  #: of each class
    bands: tuple[int, int]  #: of a plane: along height and width
    lanes: int  #: channels side by side: a vector, or a run of vectors
    before: Triple
    more: Triple
    high: int  #: packed rows of windows
    wide: int  #: packed columns of windows
    cells: int  #: sums of one class, in whole runs


_read_band = reader(Band)


class Gathering(NamedTuple):
    """All that ``_gather`` needs to know of one pooling: tables, and how much room."""

    pool: np.ndarray
    band: np.ndarray
    sources: np.ndarray
    windows: int
    sums: int
    tasks: int


@lru_cache(maxsize=512)
def _gathering(dims: Any, itemsize: int, channels_last: bool) -> Gathering:
    vector, run = MACHINE.vector_bytes // itemsize, RUN_VECTORS * MACHINE.vector_bytes // itemsize
    lanes = run if vector < SQUARE or (channels_last and dims.channels >= run) else vector
    pool = _describe(dims, itemsize, channels_last, lanes)
    band = _band(pool, lanes, run)
    windows = (band.more[0] + 1) * band.high * band.wide * lanes
    beyond = band.more[2] * lanes + run  # as many are read behind the last
    turned = band.high * pool.output_size[2] * lanes
    tasks = dims.batch * pool.parts * dims.input_size[0] * band.bands[0] * band.bands[1]
    return Gathering(
        flat(pool), flat(band), _sources(pool, band), windows + max(beyond, turned), pool.stride[2] * band.cells, tasks
    )


def _band(pool: Pool, lanes: int, run: int) -> Band:
    shifts = [[shift for _, shift in _seen_by(pool, axis)] for axis in range(3)]
    before = min(shifts[0]), min(shifts[1]), min(shifts[2])
    more = max(shifts[0]) - before[0], max(shifts[1]) - before[1], max(shifts[2]) - before[2]
    all_rows, all_columns = (-(-pool.input_size[axis] // pool.stride[axis]) for axis in (1, 2))
    bands_w = -(-all_columns // BAND_COLUMNS)
    columns = -(-all_columns // bands_w)
    wide = columns + more[2]
    bands_h = -(-all_rows // max(4, BAND_BYTES // (wide * lanes * pool.itemsize) - more[1]))
    rows = -(-all_rows // bands_h)
    cells = -(-rows * wide * lanes // run) * run
    return Band(rows, columns, (bands_h, bands_w), lanes, before, more, rows + more[1], wide, cells)


def _seen_by(pool: Pool, axis: int) -> list[tuple[int, int]]:
    """Return r and shift for each tap along an axis: cell ``i * stride + r`` is that tap of window ``i + shift``."""
    stride, pad, dilation = pool.stride[axis], pool.pad[axis], pool.dilation[axis]
    cells = [tap * dilation - pad for tap in range(pool.kernel_size[axis])]
    return [(cell % stride, -(cell // stride)) for cell in cells]


def _sources(pool: Pool, band: Band) -> np.ndarray:
    """Return how many windows see a cell of each class; then, class by class, where they are and as which tap.

    A cell's windows are in order, and so are its additions.
    """
    classes: dict[Triple, list[tuple[int, int]]] = {(d, h, w): [] for d, h, w in np.ndindex(*pool.stride)}
    taps = itertools.product(*(_seen_by(pool, axis) for axis in range(3)))
    for tap, ((d, shift_d), (h, shift_h), (w, shift_w)) in reversed(list(enumerate(taps))):
        layer, row, column = shift_d - band.before[0], shift_h - band.before[1], shift_w - band.before[2]
        classes[d, h, w].append((((layer * band.high + row) * band.wide + column) * band.lanes, tap))
    counts, places = [len(found) for found in classes.values()], itertools.chain(*classes.values())
    return np.array([*counts, *itertools.chain(*places)], np.int64)


@intrinsic
def _gather_run(typingctx: Any, target: Any, apart: Any, gradients: Any, winners: Any, sources: Any, count: Any) -> Any:
    """Store vectors of sums, so far ``apart``: what cells get from those of their windows that they have won."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        number = context.get_value_type(target.dtype)
        _emit_gather(builder, number, target.dtype.bitwidth, winners.dtype.bitwidth, *args)
        return context.get_dummy_value()

    return types.void(target, types.intp, gradients, winners, types.CPointer(types.int64), types.intp), generate


def _emit_gather(
    builder: ir.IRBuilder, number: Any, bits: int, winner_bits: int,
    target: Any, apart: Any, gradients: Any, winners: Any, sources: Any, count: Any,
) -> None:  # fmt: skip
    """Emit the loop over the sources: pairs of an offset and a tap."""
    lanes, index = MACHINE.vector_bytes * 8 // bits, ir.IntType(64)
    vector, position = ir.VectorType(number, lanes), ir.VectorType(ir.IntType(bits), lanes)
    small, zeros = ir.VectorType(ir.IntType(winner_bits), lanes), ir.Constant(vector, None)

    def place(start: Any, kind: Any, i: int) -> Any:
        return builder.bitcast(builder.gep(start, [index(i * lanes)]), kind.as_pointer())

    # LLVM turns these variables into registers.
    sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(RUN_VECTORS)]
    with cgutils.for_range(builder, count) as loop:
        source = builder.gep(sources, [builder.mul(loop.index, index(2))])
        offset, tap = builder.load(source), builder.load(builder.gep(source, [index(1)]))
        seen, seen_winners, wanted = (
            builder.gep(gradients, [offset]),
            builder.gep(winners, [offset]),
            splat(builder, tap, position),
        )
        for i, total in enumerate(sums):
            winner = builder.zext(builder.load(place(seen_winners, small, i), align=winner_bits // 8), position)
            gradient = builder.load(place(seen, vector, i), align=bits // 8)
            won = builder.select(builder.icmp_unsigned("==", winner, wanted), gradient, zeros)
            builder.store(builder.fadd(builder.load(total), won), total)
    for i, total in enumerate(sums):
        to = builder.gep(target, [builder.mul(apart, index(i))])
        builder.store(builder.load(total), builder.bitcast(to, vector.as_pointer()), align=bits // 8)


@kernel
def _gather(
    first: int, last: int, grad_output: Strided, winners: Strided, grad_input: Strided,
    pool_numbers: int, band_numbers: int, sources: int, packed: int, packed_winners: int, sums: int,
    like: float, like_winners: int,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``: a task is one band of some channels of one image."""
    pool, band = _read_pool(pool_numbers), _read_band(band_numbers)
    source, target = pointer(grad_output.address, like), pointer(grad_input.address, like)
    won_by, to_won_by = pointer(winners.address, like_winners), pointer(packed_winners, like_winners)
    to_source, all_sums = pointer(packed, like), pointer(sums, like)
    counts = pointer(sources, 0)
    places = shift(counts, pool.stride[0] * pool.stride[1] * pool.stride[2])
    depth, (bands_h, bands_w) = pool.input_size[0], band.bands
    for task in range(first, last):
        channel, place = task % pool.parts * pool.part, task // pool.parts
        n, d = place // (bands_w * bands_h * depth), place // (bands_w * bands_h) % depth
        first_cell = d // pool.stride[0], place // bands_w % bands_h * band.rows, place % bands_w * band.columns
        channels = min(pool.part, pool.channels - channel)
        gradients = shift(source, n * grad_output.n + channel * grad_output.c)
        won = shift(won_by, n * winners.n + channel * winners.c)
        _pack_windows(to_source, gradients, grad_output, True, pool, band, first_cell, channels)
        _pack_windows(to_won_by, won, winners, False, pool, band, first_cell, channels)
        image = shift(target, n * grad_input.n + channel * grad_input.c + d * grad_input.d)
        _gather_classes(
            image, grad_input, to_source, to_won_by, counts, places, all_sums, pool, band, d, first_cell, channels
        )


@jit
def _pack_windows(
    packed: Any, source: Any, image: Strided, padded: bool, pool: Pool, band: Band, first_cell: Triple, channels: int
) -> None:
    """Pack the windows that see the cells of a band, and zeros where there are none if ``padded``."""
    (depth, height, width), lanes = pool.output_size, band.lanes
    d0, h0, w0 = first_cell[0] + band.before[0], first_cell[1] + band.before[1], first_cell[2] + band.before[2]
    top, bottom = max(0, -h0), min(band.high, height - h0)
    begin = min(band.wide, max(0, -w0))
    end = max(begin, min(band.wide, width - w0))
    for layer in range(band.more[0] + 1):
        d = d0 + layer
        target = shift(packed, layer * band.high * band.wide * lanes)
        windows, step_h, step_w, step_c = shift(source, d * image.d + h0 * image.h), image.h, image.w, image.c
        if width < SQUARE and step_c != 1 and step_h == width * step_w and 0 <= d < depth and top < bottom:
            # Rows too short for squares are transposed all together, by way of the room behind.
            turned = shift(packed, (band.more[0] + 1) * band.high * band.wide * lanes)
            copy_block(turned, lanes, 1, shift(windows, top * step_h), step_w, step_c, (bottom - top) * width, channels)
            windows, step_h, step_w, step_c = shift(turned, -top * width * lanes), width * lanes, lanes, 1
        for row in range(band.high):
            to = shift(target, row * band.wide * lanes)
            inside = 0 <= d < depth and top <= row < bottom
            if padded:
                fill(to, (begin if inside else band.wide) * lanes)
                fill(shift(to, end * lanes), (band.wide - end) * lanes)
            if inside:
                start = shift(windows, row * step_h + (begin + w0) * step_w)
                copy_block(shift(to, begin * lanes), lanes, 1, start, step_w, step_c, end - begin, channels)


@jit
def _gather_classes(
    image: Any, grad_input: Strided, gradients: Any, winners: Any, counts: Any, places: Any, sums: Any,
    pool: Pool, band: Band, d: int, first_cell: Triple, channels: int,
) -> None:  # fmt: skip
    """Compute and store a band: for each row of a group of ``stride``, the classes of its columns."""
    (_, height, width), (_, step_h, step_w), (_, row, column) = pool.input_size, pool.stride, first_cell
    columns, lanes = min(band.columns * step_w, width - column * step_w), band.lanes
    vector = MACHINE.vector_bytes // pool.itemsize
    apart = step_w * vector if lanes == vector else vector  # a run is a vector of some cells, or some vectors of one
    number, first = 0, d % pool.stride[0] * step_h * step_w
    for i in range(first):
        number += counts[i]
    for h in range(step_h):
        for w in range(step_w):
            count = counts[first + h * step_w + w]
            for i in range(0, band.cells, RUN_VECTORS * vector):
                to = shift(sums, i * step_w + w * lanes)
                _gather_run(to, apart, shift(gradients, i), shift(winners, i), shift(places, 2 * number), count)
            number += count
        for i in range(min(band.rows, -(-(height - h) // step_h) - row)):
            to = shift(image, ((row + i) * step_h + h) * grad_input.h + column * step_w * grad_input.w)
            cells = shift(sums, i * band.wide * step_w * lanes)
            copy_block(to, grad_input.w, grad_input.c, cells, lanes, 1, columns, channels)


# ---------------------------------------------------------------------------------------------------------------------
# Backward, large windows: gradients are scattered to the winners
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def _scatter(
    first: int, last: int, grad_output: Strided, winners: Strided, grad_input: Strided, pool_numbers: int, table: int,
    like: float, like_winners: int,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``: a task is some channels of one image, their windows in order."""
    pool = _read_pool(pool_numbers)
    source, target = pointer(grad_output.address, like), pointer(grad_input.address, like)
    won_by, cells = pointer(winners.address, like_winners), _window_cells(pointer(table, 0), pool, grad_input)
    depth, height, width = pool.output_size
    for task in range(first, last):
        n, channel = task // pool.parts, task % pool.parts * pool.part
        channels = min(pool.part, pool.channels - channel)
        image = shift(target, n * grad_input.n + channel * grad_input.c)
        gradients = shift(source, n * grad_output.n + channel * grad_output.c)
        won = shift(won_by, n * winners.n + channel * winners.c)
        _zero(image, grad_input, pool, channels)
        for window in range(depth * height * width):
            d, h, w = window // (height * width), window // width % height, window % width
            gradient = shift(gradients, d * grad_output.d + h * grad_output.h + w * grad_output.w)
            winner = shift(won, d * winners.d + h * winners.h + w * winners.w)
            _add_to_winners(
                image, grad_input, gradient, grad_output.c, winner, winners.c, cells, pool, (d, h, w), channels
            )


class Cells(NamedTuple):
    """Where the cells of a window are, seen from its first one; tables of numbers."""

    offsets: Any  #: in the image
    d: Any
    h: Any
    w: Any


@jit
def _window_cells(table: Any, pool: Pool, image: Strided) -> Cells:
    """Return where the cells of a window are; the table has room for four numbers a tap."""
    taps, (_, kh, kw) = pool.taps, pool.kernel_size
    cells = Cells(table, shift(table, taps), shift(table, 2 * taps), shift(table, 3 * taps))
    for tap in range(taps):
        d, h, w = tap // (kh * kw) * pool.dilation[0], tap // kw % kh * pool.dilation[1], tap % kw * pool.dilation[2]
        cells.d[tap], cells.h[tap], cells.w[tap] = d, h, w
        cells.offsets[tap] = d * image.d + h * image.h + w * image.w
    return cells


@jit
def _add_to_winners(
    image: Any, grad_input: Strided, gradient: Any, gradient_step: int, winner: Any, winner_step: int, cells: Cells,
    pool: Pool, window: Triple, channels: int,
) -> None:  # fmt: skip
    """Add the gradients of one window of some channels."""
    depth, height, width = pool.input_size
    d, h, w = (
        window[0] * pool.stride[0] - pool.pad[0],
        window[1] * pool.stride[1] - pool.pad[1],
        window[2] * pool.stride[2] - pool.pad[2],
    )
    start = shift(image, d * grad_input.d + h * grad_input.h + w * grad_input.w)
    for c in range(channels):
        tap = winner[c * winner_step]
        in_rows = 0 <= d + cells.d[tap] < depth and 0 <= h + cells.h[tap] < height
        if in_rows and 0 <= w + cells.w[tap] < width:
            start[c * grad_input.c + cells.offsets[tap]] += gradient[c * gradient_step]


@jit
def _zero(image: Any, grad_input: Strided, pool: Pool, channels: int) -> None:
    """Store zeros in some channels of an image."""
    depth, height, width = pool.input_size
    for row in range(depth * height):
        cells = shift(image, row // height * grad_input.d + row % height * grad_input.h)
        if pool.channels_last:
            for w in range(width):
                _fill(shift(cells, w * grad_input.w), grad_input.c, channels)
        else:
            for c in range(channels):
                _fill(shift(cells, c * grad_input.c), grad_input.w, width)


@jit
def _fill(target: Any, step: int, count: int) -> None:
    """Store ``count`` zeros, ``step`` elements apart."""
    if step == 1:
        fill(target, count)
    else:
        for i in range(count):
            target[i * step] = 0
