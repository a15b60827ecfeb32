"""Everything that moves numbers between the caller's strided arrays and the tile's packed form.

    pack_weight   (K, C, taps)         -> panels   [group][panel][block][tap][channel][lane]
    pack_box      (C, D, H, W)         -> a box    [block][n][d][h][w][channel], padding included
    pack_patches  (C, D, H, W)         -> patches  [C * taps][pixel]
    pack_pixels   (K, OD, OH, OW)      -> a panel  [pixel][lane]: the gradient of the output, as a reduction sees it
    store_chunk   sums [pixel][lane]   -> (K, OD, OH, OW)

Almost all of them are ``copy_block`` in loops: a two-dimensional copy between any strides, which is a row copy or a
transposition in registers wherever the strides allow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .blocking import Plan
from .compile import jit, kernel
from .threads import parallel, workspace
from .tile import CHUNK, MACHINE, ROW_MULTIPLE, address, flat, pointer, reader, shift, shuffle

read_plan = reader(Plan)
Quad = tuple[int, int, int, int]  #: n, d, h, w
OFFSET = np.dtype(np.int64)  #: of the tables of offsets, which compiled code knows as ``pointer(address, 0)``


class Strided(NamedTuple):
    """An array as compiled code sees it: the address of its first element, and its strides in elements."""

    address: int
    n: int
    c: int
    d: int
    h: int
    w: int


def strided(array: np.ndarray) -> Strided:
    """Return the address and element strides of a (N, C, D, H, W) or (K, C, KD, KH, KW) array.

    A depth or height of one, whose stride means nothing, gets the stride of one that continues what follows it.
    """
    n, c, d, h, w = (stride // array.itemsize for stride in array.strides)
    _, _, depth, height, width = array.shape
    h = w * width if height == 1 else h
    return Strided(address(array), n, c, h * height if depth == 1 else d, h, w)


# ---------------------------------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------------------------------

SQUARE = min(8, MACHINE.vector_bytes // 4)  #: side of the squares that are transposed in registers


@intrinsic
def transpose(typingctx: Any, target: Any, rows: Any, source: Any, source_stride: Any) -> Any:
    """target[rows[i] + j] = source[j * source_stride + i] for i, j < SQUARE; a number as rows means i * rows."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        to, to_rows, start, stride = args
        number = context.get_value_type(source.dtype)
        vector, align = ir.VectorType(number, SQUARE), source.dtype.bitwidth // 8

        def row(base: Any, step: Any, i: int) -> Any:
            index = ir.Constant(stride.type, i)
            table = isinstance(step.type, ir.PointerType)
            offset = builder.load(builder.gep(step, [index])) if table else builder.mul(step, index)
            return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

        # Exchange one bit of the row number with the same bit of the column number, for each bit: of every 2 x 2 blocks
        # of side ``bit`` the upper right and the lower left change places.
        vectors = [builder.load(row(start, stride, i), align=align) for i in range(SQUARE)]
        for bit in (1 << b for b in range(SQUARE.bit_length() - 1)):
            for i in (i for i in range(SQUARE) if not i & bit):
                above, below = vectors[i], vectors[i + bit]
                vectors[i] = shuffle(builder, above, below, [j - bit + SQUARE if j & bit else j for j in range(SQUARE)])
                vectors[i + bit] = shuffle(
                    builder, above, below, [j + SQUARE if j & bit else j + bit for j in range(SQUARE)]
                )
        for i in range(SQUARE):
            builder.store(vectors[i], row(to, to_rows, i), align=align)
        return context.get_dummy_value()

    return types.void(target, rows, source, types.intp), generate


@jit
def copy_block(
    target: Any, to_i: int, to_j: int, source: Any, from_i: int, from_j: int, count_i: int, count_j: int
) -> None:
    """target[i * to_i + j * to_j] = source[i * from_i + j * from_j] for i < count_i, j < count_j."""
    if to_j == 1 and from_j == 1 and to_i == count_j and from_i == count_j:
        copy_row(target, source, count_i * count_j)
    elif to_j == 1 and from_j == 1:
        for i in range(count_i):
            copy_row(shift(target, i * to_i), shift(source, i * from_i), count_j)
    elif to_j == 1 and from_i == 1:
        _transpose_block(target, to_i, source, from_j, count_i, count_j)
    elif to_i == 1 and from_j == 1:
        _transpose_block(target, to_j, source, from_i, count_j, count_i)
    else:
        for j in range(count_j):
            for i in range(count_i):
                target[i * to_i + j * to_j] = source[i * from_i + j * from_j]


@jit
def copy_row(target: Any, source: Any, count: int) -> None:
    """Copy ``count`` neighbours: short rows by vectors, the last one overlapping those before; others by memcpy."""
    lanes = vector_lanes(target)
    if count < lanes or count > 16 * lanes:
        _copy_memory(target, source, count)
    else:
        for i in range(0, count - lanes, lanes):
            _copy_vector(shift(target, i), shift(source, i))
        _copy_vector(shift(target, count - lanes), shift(source, count - lanes))


@intrinsic
def vector_lanes(typingctx: Any, start: Any) -> Any:
    """Return how many numbers of this type a vector holds."""
    lanes = MACHINE.vector_bytes * 8 // start.dtype.bitwidth
    return types.intp(start), lambda context, builder, signature, args: ir.IntType(64)(lanes)


@intrinsic
def _copy_vector(typingctx: Any, target: Any, source: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        lanes = MACHINE.vector_bytes * 8 // source.dtype.bitwidth
        to, start = (builder.bitcast(arg, ir.VectorType(arg.type.pointee, lanes).as_pointer()) for arg in args)
        builder.store(builder.load(start, align=source.dtype.bitwidth // 8), to, align=source.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(target, source), generate


@intrinsic
def _copy_memory(typingctx: Any, target: Any, source: Any, count: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        cgutils.raw_memcpy(builder, *args, source.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(target, source, types.intp), generate


@jit
def _transpose_block(target: Any, to_i: int, source: Any, from_j: int, count_i: int, count_j: int) -> None:
    """target[i * to_i + j] = source[i + j * from_j]: squares in registers, the last ones overlapping those before."""
    if min(count_i, count_j) < SQUARE:
        for j in range(count_j):
            for i in range(count_i):
                target[i * to_i + j] = source[i + j * from_j]
        return
    for i_square in range(0, count_i, SQUARE):
        i = min(i_square, count_i - SQUARE)
        for j_square in range(0, count_j, SQUARE):
            j = min(j_square, count_j - SQUARE)
            transpose(shift(target, i * to_i + j), to_i, shift(source, i + j * from_j), from_j)


@jit
def _transpose_to_rows(target: Any, rows: Any, source: Any, from_j: int, count_i: int, count_j: int) -> None:
    """target[rows[i] + j] = source[i + j * from_j], in the same way."""
    if min(count_i, count_j) < SQUARE:
        for j in range(count_j):
            for i in range(count_i):
                target[rows[i] + j] = source[i + j * from_j]
        return
    for j_square in range(0, count_j, SQUARE):  # few rows of the source at a time: they may share one set of L1
        j = min(j_square, count_j - SQUARE)
        for i_square in range(0, count_i, SQUARE):
            i = min(i_square, count_i - SQUARE)
            transpose(shift(target, j), shift(rows, i), shift(source, i + j * from_j), from_j)


@jit
def fill(target: Any, count: int) -> None:
    """Store ``count`` zeros."""
    for i in range(count):
        target[i] = 0


# ---------------------------------------------------------------------------------------------------------------------
# Where things are
# ---------------------------------------------------------------------------------------------------------------------


@jit
def filters_of(plan: Plan, group: int, panel: int) -> tuple[int, int, int]:
    """Return the first filter of a panel, the distance to the next, and how many there are."""
    lanes = plan.panel.lanes
    if plan.panel.elementwise:
        first_channel = group * plan.channels
        return first_channel * plan.filters + panel, plan.filters, min(lanes, plan.in_channels - first_channel)
    return group * plan.filters + panel * lanes, 1, min(lanes, plan.filters - panel * lanes)


@jit
def box_of(plan: Plan, number: int) -> tuple[Quad, Quad]:
    """Return the first (n, d, h, w) of a box, and its size, which is smaller at the far edges."""
    d, h, w = plan.output_size
    box_n, box_d, box_h, box_w = plan.box
    count_d, count_h, count_w = -(-d // box_d), -(-h // box_h), -(-w // box_w)
    w0 = number % count_w * box_w
    h0 = number // count_w % count_h * box_h
    d0 = number // (count_w * count_h) % count_d * box_d
    n0 = number // (count_w * count_h * count_d) * box_n
    size = min(box_n, plan.batch - n0), min(box_d, d - d0), min(box_h, h - h0), min(box_w, w - w0)
    return (n0, d0, h0, w0), size


@jit
def chunk_of(pixels: int) -> int:
    """Return the size of equal chunks: a last one of few pixels would read all weights for them."""
    tiles, chunks = -(-pixels // ROW_MULTIPLE), -(-pixels // CHUNK)
    return -(-tiles // chunks) * ROW_MULTIPLE


@jit
def position(pixel: int, size: Quad) -> Quad:
    """Return the (n, d, h, w) of a pixel in a box."""
    w, h, d = pixel % size[3], pixel // size[3] % size[2], pixel // (size[3] * size[2]) % size[1]
    return pixel // (size[3] * size[2] * size[1]), d, h, w


@jit
def pixel_offsets(offsets: Any, plan: Plan, size: Quad, pixel: int, count: int, every: int) -> None:
    """Store where the first tap of each of ``count`` output pixels, ``every`` so many, stands in the packed box."""
    step_d, step_h, step_w = plan.pixel_step
    n, d, h, w = position(pixel, size)
    for i in range(count):
        offsets[i] = n * plan.plane + d * step_d + h * step_h + w * step_w
        w += every
        if w == size[3]:
            w, h = 0, h + 1
            if h == size[2]:
                h, d = 0, d + 1
                if d == size[1]:
                    d, n = 0, n + 1


@jit
def tap_offsets(offsets: Any, plan: Plan, every: int) -> None:
    """Store how far taps are from the first in the packed box: all of them, or ``every`` so many."""
    _, kh, kw = plan.kernel_size
    for i, tap in enumerate(range(0, plan.taps, every)):
        d, h, w = tap // (kh * kw), tap // kw % kh, tap % kw
        offsets[i] = d * plan.tap_step[0] + h * plan.tap_step[1] + w * plan.tap_step[2]


@jit
def repeat_last(rows: Any, count: int) -> None:
    """Repeat the last row offset up to whole tiles."""
    for i in range(count, -(-count // ROW_MULTIPLE) * ROW_MULTIPLE):
        rows[i] = rows[count - 1]


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


def packed_weight(weight: np.ndarray, plan: Plan, threads: int) -> int:
    """Return the address of the weights in panels."""
    panels = plan.groups * plan.panels
    packed = workspace("weight", panels * plan.reduction * plan.panel.lanes, weight.dtype)

    def work(first: int, last: int) -> None:
        rows = workspace("rows", SQUARE * plan.taps, OFFSET)
        pack_weight(first, last, strided(weight), packed, rows, address(numbers), weight.dtype.type(0))

    numbers = flat(plan)
    parallel(work, panels, threads)
    return packed


def contiguous_bias(bias: np.ndarray | None, channels: int, dtype: np.dtype) -> np.ndarray:
    """Return the bias as an array of its own; no bias is a bias of zero."""
    return np.zeros(channels, dtype) if bias is None else np.array(bias, order="C")


@kernel
def pack_weight(first: int, last: int, weight: Strided, packed: int, rows: int, numbers: int, like: float) -> None:
    """Pack the panels numbered ``first`` to ``last``, counted over all groups."""
    plan = read_plan(numbers)
    channels, lanes = plan.reduction // plan.taps, plan.panel.lanes
    source = pointer(weight.address, like)
    for number in range(first, last):
        panel = shift(pointer(packed, like), number * plan.reduction * lanes)
        for channel in range(0, channels, plan.block):
            depth = min(plan.block, channels - channel)
            target = shift(panel, channel * plan.taps * lanes)
            group, number_in_group = number // plan.panels, number % plan.panels
            pack_part(target, source, weight, pointer(rows, 0), plan, group, number_in_group, channel, depth)


@jit
def pack_part(
    target: Any, source: Any, weight: Strided, rows: Any, plan: Plan,
    group: int, panel: int, channel0: int, depth: int,
) -> None:  # fmt: skip
    """Pack one panel's weights [tap][channel][lane] for ``depth`` channels; unused lanes are zero.

    ``rows`` has room for SQUARE * taps offsets.
    """
    (_, kh, kw), taps, lanes = plan.kernel_size, plan.taps, plan.panel.lanes
    filter0, filter_step, count = filters_of(plan, group, panel)
    stride = filter_step * weight.n
    start = shift(source, filter0 * weight.n + channel0 * weight.c)
    if count < lanes:
        fill(target, taps * depth * lanes)
    row_follows_row = weight.h == kw * weight.w and weight.d == kh * kw * weight.w
    if taps > 1 and abs(weight.w) == 1 and row_follows_row:  # OIHW, rotated or not: a filter's cells are neighbours
        start = shift(start, min(0, (taps - 1) * weight.w))
        together = min(SQUARE, depth) if weight.c == taps else 1  # channels that are neighbours, too
        for channel in range(together):
            for tap in range(taps):
                rows[channel * taps + (tap if weight.w > 0 else taps - 1 - tap)] = (tap * depth + channel) * lanes
        for first in range(0, depth, together):
            channel = min(first, depth - together)
            to, cells = shift(target, channel * lanes), shift(start, channel * weight.c)
            _transpose_to_rows(to, rows, cells, stride, together * taps, count)
        return
    for tap in range(taps):
        cell_of_tap = tap // (kh * kw) * weight.d + tap // kw % kh * weight.h + tap % kw * weight.w
        cells = shift(start, cell_of_tap)
        copy_block(shift(target, tap * depth * lanes), lanes, 1, cells, weight.c, stride, depth, count)


@jit
def pack_box(
    box: Any, source: Any, image: Strided, plan: Plan,
    origin: Quad, size: Quad,
    group: int, channel0: int, channel1: int,
) -> None:  # fmt: skip
    """Pack the cells that a box of output pixels needs, for the channels ``channel0`` to ``channel1`` of a group."""
    group0 = group * plan.channels
    channel1 = min(channel1, plan.in_channels - group0)
    n0, d0, h0, w0 = origin
    cells_d, cells_h, cells_w = plan.packed
    row = 0
    for block0 in range(channel0, channel1, plan.block):
        count = min(plan.block, channel1 - block0)
        for n in range(plan.box[0]):
            for cell_d in range(cells_d):
                d = d0 * plan.stride[0] - plan.pad[0] + cell_d * plan.unit[0]
                for cell_h in range(cells_h):
                    h = h0 * plan.stride[1] - plan.pad[1] + cell_h * plan.unit[1]
                    target = shift(box, row * cells_w * plan.block)
                    row += 1
                    if n >= size[0] or not (0 <= d < plan.input_size[0] and 0 <= h < plan.input_size[1]):
                        fill(target, cells_w * plan.block)
                        continue
                    start = (n0 + n) * image.n + (group0 + block0) * image.c + d * image.d + h * image.h
                    _pack_row(target, shift(source, start), image, plan, w0 * plan.stride[2] - plan.pad[2], count)


@jit
def _pack_row(target: Any, source: Any, image: Strided, plan: Plan, w0: int, channels: int) -> None:
    """Pack the cells of one row from column ``w0`` (perhaps in the padding) on."""
    unit, cells, width = plan.unit[2], plan.packed[2], plan.input_size[2]
    begin = min(cells, max(0, -(w0 // unit)))
    end = max(begin, min(cells, (width - 1 - w0) // unit + 1))
    fill(target, (cells if channels < plan.block else begin) * plan.block)
    inside = shift(source, (w0 + begin * unit) * image.w)
    copy_block(shift(target, begin * plan.block), plan.block, 1, inside, unit * image.w, image.c, end - begin, channels)
    fill(shift(target, end * plan.block), (cells - end) * plan.block)


@jit
def pack_pixels(
    panel: Any, source: Any, image: Strided, plan: Plan,
    origin: Quad, size: Quad, filters: tuple[int, int, int],
) -> None:  # fmt: skip
    """Pack the pixels of a box of the output, one after the other, ``lanes`` filters side by side."""
    filter0, filter_step, count = filters
    lanes, width = plan.panel.lanes, size[3]
    if count < lanes:
        fill(panel, size[0] * size[1] * size[2] * width * lanes)
    for row in range(size[0] * size[1] * size[2]):
        n, d, h, _ = position(row * width, size)
        start = (origin[0] + n) * image.n + (origin[1] + d) * image.d + (origin[2] + h) * image.h + origin[3] * image.w
        copy_block(
            shift(panel, row * width * lanes), lanes, 1,
            shift(source, start + filter0 * image.c), image.w, filter_step * image.c, width, count,
        )  # fmt: skip


@jit
def pack_patches(
    patches: Any, source: Any, image: Strided, plan: Plan,
    origin: Quad, size: Quad, channel0: int,
) -> None:  # fmt: skip
    """Gather the patches of a box of output pixels as a matrix [C * taps][pixel], whose rows are ``pitch`` apart."""
    kd, kh, kw = plan.kernel_size
    lines, width = size[0] * size[1] * size[2], size[3]
    for tap_w in range(kw):
        # The output columns whose cell of this tap is inside: 0 <= w0 + column * stride < input width.
        w0 = origin[3] * plan.stride[2] - plan.pad[2] + tap_w * plan.dilation[2]
        begin = min(width, max(0, -(w0 // plan.stride[2])))
        end = max(begin, min(width, (plan.input_size[2] - 1 - w0) // plan.stride[2] + 1))
        for line in range(lines):
            n, line_d, line_h, _ = position(line * width, size)
            for tap_d in range(kd):
                d = (origin[1] + line_d) * plan.stride[0] - plan.pad[0] + tap_d * plan.dilation[0]
                for tap_h in range(kh):
                    h = (origin[2] + line_h) * plan.stride[1] - plan.pad[1] + tap_h * plan.dilation[1]
                    inside = 0 <= d < plan.input_size[0] and 0 <= h < plan.input_size[1]
                    start = (origin[0] + n) * image.n + channel0 * image.c + d * image.d + h * image.h + w0 * image.w
                    for channel in range(plan.channels):
                        row = ((channel * kd + tap_d) * kh + tap_h) * kw + tap_w
                        target = shift(patches, row * plan.pitch + line * width)
                        if inside:
                            cells = shift(source, start + channel * image.c)
                            _gather(target, cells, plan.stride[2] * image.w, begin, end, width)
                        else:
                            fill(target, width)


@jit
def _gather(target: Any, source: Any, step: int, begin: int, end: int, count: int) -> None:
    """Store every ``step``-th cell of a row, and zeros before ``begin`` and from ``end`` on."""
    fill(target, begin)
    if step == 1:
        copy_row(shift(target, begin), shift(source, begin), end - begin)
    else:
        for i in range(begin, end):
            target[i] = source[i * step]
    fill(shift(target, end), count - end)


# ---------------------------------------------------------------------------------------------------------------------
# The epilogue
# ---------------------------------------------------------------------------------------------------------------------


@jit
def repeat(sums: Any, first: int, total: int) -> None:
    """Repeat the first numbers up to a ``total``; a few long copies are faster than many short ones."""
    done = first
    while done < total:
        more = min(done, total - done)
        copy_row(shift(sums, done), sums, more)
        done += more


@jit
def start_sums(sums: Any, bias: Any, filters: tuple[int, int, int], count: int, lanes: int) -> None:
    """Let ``count`` rows of sums start at the bias."""
    filter0, filter_step, used = filters
    for lane in range(lanes):
        sums[lane] = bias[filter0 + lane * filter_step] if lane < used else 0
    repeat(sums, lanes, count * lanes)


@jit
def clip_negative(sums: Any, count: int) -> None:
    """Apply the ReLU; a NaN stays, which max() would lose."""
    for i in range(count):
        if sums[i] < 0:
            sums[i] = 0


@jit
def store_chunk(
    target: Any, image: Strided, sums: Any, plan: Plan,
    origin: Quad, size: Quad, pixel0: int, count: int,
    filters: tuple[int, int, int], relu: bool,
) -> None:  # fmt: skip
    """Store ``count`` rows of sums, the pixels of a box from ``pixel0`` on, through the activation.

    ``sums`` has room for another CHUNK of rows, where they are transposed if lanes are no neighbours in the output.
    """
    filter0, filter_step, used = filters
    lanes = plan.panel.lanes
    if relu:
        clip_negative(sums, count * lanes)
    lane_stride = filter_step * image.c
    turned = shift(sums, CHUNK * lanes)
    if lane_stride != 1:
        whole = -(-count // SQUARE) * SQUARE
        _transpose_block(turned, CHUNK, sums, lanes, lanes, whole)
    pixel = pixel0
    while pixel < pixel0 + count:
        start, run = run_of(image, plan, origin, size, pixel, pixel0 + count)
        to = shift(target, start + filter0 * image.c)
        if lane_stride == 1:
            copy_block(to, image.w, 1, shift(sums, (pixel - pixel0) * lanes), lanes, 1, run, used)
        else:
            copy_block(to, lane_stride, image.w, shift(turned, pixel - pixel0), CHUNK, 1, used, run)
        pixel += run


@jit
def run_of(image: Strided, plan: Plan, origin: Quad, size: Quad, pixel: int, last: int) -> tuple[int, int]:
    """Return where a pixel of a box is in the output, and how many up to ``last`` follow at equal steps."""
    n, d, h, w = position(pixel, size)
    joined = size[3] == plan.output_size[2] and image.h == size[3] * image.w  # rows that follow each other in memory
    run = min(last - pixel, (size[2] - h if joined else 1) * size[3] - w)
    n, d, h, w = n + origin[0], d + origin[1], h + origin[2], w + origin[3]
    return n * image.n + d * image.d + h * image.h + w * image.w, run
