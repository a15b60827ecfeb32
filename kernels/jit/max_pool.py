"""Max pooling: the largest number of each window, and where in the window it was.

    output[n, c, o]  = max over taps t of  input[n, c, o * stride - pad + t * dilation]
    winners[n, c, o] = the first t that reaches it, one byte
    grad_input[n, c, cell of winners[n, c, o]] += grad_output[n, c, o]

Windows are taken in lines, and one tap of all windows of a line at a time:

    along the row where columns are neighbours in memory (NCHW)       best    [o0 o1 o2 o3 ...]
    along the channels where these are neighbours (NHWC)              winner  [t  t  t  t  ...]

The rules: the first maximum wins a tie; a NaN wins over numbers, and the last NaN over earlier ones; cells in the
padding never win, so that a window of -inf has its first cell inside the input as winner.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .compile import jit, kernel
from .packing import Strided, fill, strided
from .threads import parallel, workspace, worthwhile
from .tile import data, pointer, shift

Triple = tuple[int, int, int]


class Pool(NamedTuple):
    """One pooling; triples are (depth, height, width)."""

    channels: int
    input_size: Triple
    kernel_size: Triple
    stride: Triple
    pad: Triple
    dilation: Triple
    output_size: Triple
    lanes: int  #: channels of a task: 1 where lines run along the row, several where they run along the channels
    lane_parts: int


CHANNEL_LANES = 256  #: most channels of one line: their sums stay in the L1 cache


def _pool(dims: Any, image: np.ndarray) -> Pool:
    channels_last = abs(image.strides[1]) < abs(image.strides[4]) and dims.channels > 1
    lanes = min(dims.channels, CHANNEL_LANES) if channels_last else 1
    return Pool(
        dims.channels, dims.input_size, dims.kernel_size, dims.stride, dims.pad_before, dims.dilation, dims.output_size,
        lanes, -(-dims.channels // lanes),
    )  # fmt: skip


def _comparisons(dims: Any) -> int:
    return int(dims.batch * dims.channels * math.prod(dims.output_size) * dims.taps)


def max_pool_forward(
    input: np.ndarray, output: np.ndarray, winners: np.ndarray | None, dims: Any, options: Any
) -> None:
    """Fill ``output``, and ``winners`` where it is wanted."""
    pool = _pool(dims, input)
    wanted = winners is not None
    to = winners if winners is not None else np.zeros((1,) * 5, np.uint8 if dims.taps <= 256 else np.uint16)

    def work(first: int, last: int) -> None:
        count = max(pool.lanes, pool.output_size[2])
        best, winner = workspace("best", count, output.dtype), workspace("winner", count, np.dtype(np.int32))
        _forward(
            first, last, strided(input), strided(output), strided(to), wanted, pool, best, winner, to[:0, 0, 0, 0, 0]
        )

    parallel(work, dims.batch * pool.lane_parts, worthwhile(options.threads, _comparisons(dims)))


def max_pool_backward(
    grad_output: np.ndarray, winners: np.ndarray, grad_input: np.ndarray, dims: Any, options: Any
) -> None:
    """Fill ``grad_input``; winners that point outside the input are ignored."""
    pool = _pool(dims, grad_input)
    taps = np.indices(dims.kernel_size).reshape(3, -1) * np.array(dims.dilation)[:, None]  # (3, taps): each tap's cell
    types = np.empty(0, grad_input.dtype), np.empty(0, winners.dtype)

    def work(first: int, last: int) -> None:
        _backward(first, last, strided(grad_output), strided(winners), strided(grad_input), pool, taps, *types)

    parallel(work, dims.batch * pool.lane_parts, worthwhile(options.threads, _comparisons(dims)))


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def _forward(
    first: int, last: int, input: Strided, output: Strided, winners: Strided, wanted: bool, pool: Pool,
    best: np.ndarray, winner: np.ndarray, like_winners: np.ndarray,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``: a task is ``lanes`` channels of one image."""
    source, target = pointer(input.address, best), pointer(output.address, best)
    to = pointer(winners.address, like_winners)
    depth, height, width = pool.output_size
    for task in range(first, last):
        n, channel = task // pool.lane_parts, task % pool.lane_parts * pool.lanes
        lanes = min(pool.lanes, pool.channels - channel)
        image = shift(source, n * input.n + channel * input.c)
        for row in range(depth * height):
            d, h = row // height, row % height
            out = n * output.n + channel * output.c + d * output.d + h * output.h
            won = n * winners.n + channel * winners.c + d * winners.d + h * winners.h
            if pool.lanes == 1:
                _row(image, input, pool, d, h, data(best), data(winner))
                _store(shift(target, out), output.w, data(best), width)
                if wanted:
                    _store(shift(to, won), winners.w, data(winner), width)
            else:
                for w in range(width):
                    _channels(image, input, pool, d, h, w, lanes, data(best), data(winner))
                    _store(shift(target, out + w * output.w), output.c, data(best), lanes)
                    if wanted:
                        _store(shift(to, won + w * winners.w), winners.c, data(winner), lanes)


@jit
def _inside(pool: Pool, axis: int, output: int) -> tuple[int, int, int]:
    """Return the window's first cell along an axis, and the range of its taps that are inside the input."""
    start, step = output * pool.stride[axis] - pool.pad[axis], pool.dilation[axis]
    first = max(0, -(start // step))
    return start, first, max(first, min(pool.kernel_size[axis], (pool.input_size[axis] - 1 - start) // step + 1))


@jit
def _row(image: Any, input: Strided, pool: Pool, d: int, h: int, best: Any, winner: Any) -> None:
    """Find the maxima of one row of windows."""
    (_, kh, kw), width = pool.kernel_size, pool.output_size[2]
    d_start, d_first, d_last = _inside(pool, 0, d)
    h_start, h_first, h_last = _inside(pool, 1, h)
    empty = d_first == d_last or h_first == h_last
    for w in range(width):
        _, w_first, w_last = _inside(pool, 2, w)
        best[w] = -np.inf
        winner[w] = 0 if empty or w_first == w_last else (d_first * kh + h_first) * kw + w_first
    step, stride = pool.dilation[2], pool.stride[2]
    for tap_d in range(d_first, d_last):
        for tap_h in range(h_first, h_last):
            line = (d_start + tap_d * pool.dilation[0]) * input.d + (h_start + tap_h * pool.dilation[1]) * input.h
            for tap_w in range(kw):
                # The windows whose cell of this tap is inside: 0 <= w * stride + start < width of the input.
                start = tap_w * step - pool.pad[2]
                begin = min(width, max(0, -(start // stride)))
                end = max(begin, min(width, (pool.input_size[2] - 1 - start) // stride + 1))
                cells = shift(image, line + (start + begin * stride) * input.w)
                tap = (tap_d * kh + tap_h) * kw + tap_w
                _compare(shift(best, begin), shift(winner, begin), cells, stride * input.w, end - begin, tap)


@jit
def _channels(
    image: Any, input: Strided, pool: Pool, d: int, h: int, w: int, lanes: int, best: Any, winner: Any
) -> None:
    """Find the maxima of one window in several channels."""
    _, kh, kw = pool.kernel_size
    d_start, d_first, d_last = _inside(pool, 0, d)
    h_start, h_first, h_last = _inside(pool, 1, h)
    w_start, w_first, w_last = _inside(pool, 2, w)
    empty = d_first == d_last or h_first == h_last or w_first == w_last
    for lane in range(lanes):
        best[lane] = -np.inf
        winner[lane] = 0 if empty else (d_first * kh + h_first) * kw + w_first
    for tap_d in range(d_first, d_last):
        for tap_h in range(h_first, h_last):
            line = (d_start + tap_d * pool.dilation[0]) * input.d + (h_start + tap_h * pool.dilation[1]) * input.h
            for tap_w in range(w_first, w_last):
                cells = shift(image, line + (w_start + tap_w * pool.dilation[2]) * input.w)
                _compare(best, winner, cells, input.c, lanes, (tap_d * kh + tap_h) * kw + tap_w)


@jit
def _compare(best: Any, winner: Any, cells: Any, step: int, count: int, tap: int) -> None:
    """Let one tap compete in a line of windows; steps of 1 and 2 as constants, for the compiler to make vectors."""
    if step == 1:
        for i in range(count):
            _compete(best, winner, cells[i], i, tap)
    elif step == 2:
        for i in range(count):
            _compete(best, winner, cells[2 * i], i, tap)
    else:
        for i in range(count):
            _compete(best, winner, cells[step * i], i, tap)


@jit
def _compete(best: Any, winner: Any, value: float, i: int, tap: int) -> None:
    """Take the value if it is larger, or NaN."""
    old, old_winner = best[i], winner[i]
    wins = (value > old) | (value != value)
    best[i] = value if wins else old
    winner[i] = tap if wins else old_winner


@jit
def _store(target: Any, step: int, line: Any, count: int) -> None:
    """Store a line."""
    if step == 1:
        for i in range(count):
            target[i] = line[i]
    else:
        for i in range(count):
            target[i * step] = line[i]


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def _backward(
    first: int, last: int, grad_output: Strided, winners: Strided, grad_input: Strided, pool: Pool, taps: np.ndarray,
    like: np.ndarray, like_winners: np.ndarray,
) -> None:  # fmt: skip
    """Do the tasks ``first`` to ``last``: a task is ``lanes`` channels of one image, its windows in order."""
    source, target = pointer(grad_output.address, like), pointer(grad_input.address, like)
    won = pointer(winners.address, like_winners)
    for task in range(first, last):
        n, channel = task // pool.lane_parts, task % pool.lane_parts * pool.lanes
        lanes = min(pool.lanes, pool.channels - channel)
        image = shift(target, n * grad_input.n + channel * grad_input.c)
        _zero(image, grad_input, pool, lanes)
        for d in range(pool.output_size[0]):
            for h in range(pool.output_size[1]):
                from_row = n * grad_output.n + channel * grad_output.c + d * grad_output.d + h * grad_output.h
                won_row = n * winners.n + channel * winners.c + d * winners.d + h * winners.h
                _scatter_row(
                    image, grad_input, shift(source, from_row), grad_output, shift(won, won_row), winners,
                    pool, d, h, lanes, taps,
                )  # fmt: skip


@jit
def _scatter_row(
    image: Any, grad_input: Strided, gradient: Any, grad_output: Strided, won: Any, winners: Strided,
    pool: Pool, d: int, h: int, lanes: int, taps: np.ndarray,
) -> None:  # fmt: skip
    """Add the gradients of one row of windows to the cells that won."""
    (depth, height, width), kernel = pool.input_size, taps.shape[1]
    d_start, h_start = d * pool.stride[0] - pool.pad[0], h * pool.stride[1] - pool.pad[1]
    for w in range(pool.output_size[2]):
        w_start = w * pool.stride[2] - pool.pad[2]
        for lane in range(lanes):
            tap = won[w * winners.w + lane * winners.c]
            if tap >= kernel:
                continue
            cell_d, cell_h, cell_w = d_start + taps[0, tap], h_start + taps[1, tap], w_start + taps[2, tap]
            if 0 <= cell_d < depth and 0 <= cell_h < height and 0 <= cell_w < width:
                cell = cell_d * grad_input.d + cell_h * grad_input.h + cell_w * grad_input.w + lane * grad_input.c
                image[cell] += gradient[w * grad_output.w + lane * grad_output.c]


@jit
def _zero(image: Any, grad_input: Strided, pool: Pool, lanes: int) -> None:
    """Store zeros in ``lanes`` channels of an image."""
    depth, height, width = pool.input_size
    for d in range(depth):
        for h in range(height):
            row = shift(image, d * grad_input.d + h * grad_input.h)
            if lanes == 1 and grad_input.w == 1:
                fill(row, width)
                continue
            for w in range(width):
                for lane in range(lanes):
                    row[w * grad_input.w + lane * grad_input.c] = 0
