"""What the gradients of the weights have in common, however the image was packed.

    sums [split][group][panel][(c, tap)][lane] += sum over pixels of  cell that (c, tap) sees * grad_output[pixel][lane]

The sums of a task are its own: a range of panels and of channels, over a range of the boxes. Ranges of boxes ("splits")
change the order of additions, so their number comes from the shape alone; all else may depend on the number of threads.
Where one small box is all there is, as in a network's last layers, a chunk of sums is stored as soon as it is complete,
and all of them are never in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .blocking import GradTasks, Plan, grad_tasks
from .compile import jit, kernel
from .packing import OFFSET, Quad, Strided, copy_block, fill, filters_of, pack_pixels, read_plan, strided
from .threads import parallel, workspace
from .tile import BLOCK_BYTES, CHUNK, address, flat, multiply, pointer, shift


class Task(NamedTuple):
    """Ranges of one task: from the first to before the last."""

    split: int
    group: int
    panel0: int
    panel1: int
    block0: int
    block1: int
    box0: int
    box1: int
    bias: bool  #: whether this task adds up the gradient of the bias
    at_once: bool  #: whether it stores its products, which are complete, rather than adding them to sums


class Addresses(NamedTuple):
    """The workspace of a task, as the kernels get it."""

    sums: int  #: those of ``Sums``: of all tasks
    bias: int
    cells: int  #: the packed input
    pixels: int  #: the packed gradient of the output, a box of it
    offsets: int


class Sums(NamedTuple):
    """Where the tasks add up: pointers to numbers."""

    weight: Any  #: [split][group][panel][(c, tap)][lane]
    bias: Any  #: [split][group][panel][lane]


def weight_grad(
    accumulate: Callable[..., None], elements: int, input: np.ndarray, grad_output: np.ndarray,
    grad_weight: np.ndarray, grad_bias: np.ndarray | None, plan: Plan, threads: int,
) -> None:  # fmt: skip
    """Fill ``grad_weight`` and ``grad_bias``; ``accumulate`` does a range of tasks, packing ``elements`` at a time."""
    dtype, lanes, numbers = grad_weight.dtype, plan.panel.lanes, flat(plan)
    tasks = grad_tasks(plan, threads, grad_bias is not None)

    def work(first: int, last: int, sums: int, bias_sums: int) -> None:
        addresses = Addresses(
            sums, bias_sums, workspace("box", elements, dtype),
            workspace("pixels", plan.panels * math.prod(plan.box) * lanes, dtype),
            workspace("offsets", plan.sum_rows + plan.taps + math.prod(plan.box[:3]), OFFSET),
        )  # fmt: skip
        accumulate(
            first, last, tasks, strided(input), strided(grad_output), strided(grad_weight), address(numbers),
            addresses, dtype.type(0),
        )  # fmt: skip

    do_tasks(work, tasks, grad_weight, grad_bias, plan, threads)


def do_tasks(
    work: Callable[[int, int, int, int], None], tasks: GradTasks, grad_weight: np.ndarray,
    grad_bias: np.ndarray | None, plan: Plan, threads: int,
) -> None:  # fmt: skip
    """Call ``work(first, last, sums, bias_sums)`` for all tasks, with the addresses of ``Sums``; store the sums."""
    dtype, panels, numbers = grad_weight.dtype, plan.groups * plan.panels, flat(plan)
    columns = tasks.splits * panels * plan.panel.lanes
    sums, bias_sums = workspace("sums", columns * plan.sum_rows, dtype), workspace("bias", columns, dtype)
    bias = None if grad_bias is None else np.empty(grad_weight.shape[0], dtype)

    def store(first: int, last: int) -> None:
        target, target_bias = strided(grad_weight), 0 if bias is None else address(bias)
        _store(first, last, tasks, sums, bias_sums, target, target_bias, address(numbers), dtype.type(0))

    count = tasks.splits * plan.groups * tasks.panel_parts * tasks.channel_parts
    parallel(lambda first, last: work(first, last, sums, bias_sums), count, threads)
    parallel(store, panels, threads)
    if grad_bias is not None:
        grad_bias[...] = bias


@jit
def task_of(number: int, tasks: GradTasks, plan: Plan) -> Task:
    """Return the ranges of task ``number``."""
    number, channel_part = number // tasks.channel_parts, number % tasks.channel_parts
    number, panel_part = number // tasks.panel_parts, number % tasks.panel_parts
    split, group = number // plan.groups, number % plan.groups
    return Task(
        split, group,
        plan.panels * panel_part // tasks.panel_parts, plan.panels * (panel_part + 1) // tasks.panel_parts,
        plan.blocks * channel_part // tasks.channel_parts, plan.blocks * (channel_part + 1) // tasks.channel_parts,
        plan.box_count * split // tasks.splits, plan.box_count * (split + 1) // tasks.splits,
        tasks.bias and channel_part == 0, tasks.at_once,
    )  # fmt: skip


@jit
def panel_sums(sums: Sums, task: Task, panel: int, row: int, plan: Plan) -> Any:
    """Return where a panel's sums of a task are, from a (c, tap) on."""
    number = (task.split * plan.groups + task.group) * plan.panels + panel
    return shift(sums.weight, (number * plan.sum_rows + row) * plan.panel.lanes)


@jit
def panel_bias(sums: Sums, task: Task, panel: int, plan: Plan) -> Any:
    """Return where a panel's sums of the bias are."""
    number = (task.split * plan.groups + task.group) * plan.panels + panel
    return shift(sums.bias, number * plan.panel.lanes)


@jit
def start_task(sums: Sums, task: Task, plan: Plan) -> None:
    """Let the sums of a task start at zero, unless they are stored at once."""
    lanes, row0 = plan.panel.lanes, task.block0 * plan.block * plan.taps
    row1 = plan.sum_rows if task.block1 == plan.blocks else task.block1 * plan.block * plan.taps
    for panel in range(task.panel0, task.panel1):
        if not task.at_once:
            fill(panel_sums(sums, task, panel, row0, plan), (row1 - row0) * lanes)
        if task.bias:
            fill(panel_bias(sums, task, panel, plan), lanes)


@jit
def pack_gradient(
    pixels: Any, source: Any, grad_output: Strided, plan: Plan, task: Task, sums: Sums,
    origin: Quad, size: Quad,
) -> None:  # fmt: skip
    """Pack the panels of grad_output for one box, and add them to the gradient of the bias if this task is to."""
    count, lanes = size[0] * size[1] * size[2] * size[3], plan.panel.lanes
    for panel in range(task.panel0, task.panel1):
        target = shift(pixels, panel * count * lanes)
        pack_pixels(target, source, grad_output, plan, origin, size, filters_of(plan, task.group, panel))
        if task.bias:
            add_rows(panel_bias(sums, task, panel, plan), target, count, lanes)


@jit
def add_rows(totals: Any, rows: Any, count: int, lanes: int) -> None:
    """totals[lane] += rows[row][lane] for each of ``count`` rows."""
    even = count // 4 * 4
    for row in range(0, even, 4):  # four at a time, for the totals are in memory
        a, b, c, d = row * lanes, (row + 1) * lanes, (row + 2) * lanes, (row + 3) * lanes
        for lane in range(lanes):
            totals[lane] += (rows[a + lane] + rows[b + lane]) + (rows[c + lane] + rows[d + lane])
    for row in range(even, count):
        for lane in range(lanes):
            totals[lane] += rows[row * lanes + lane]


@jit
def add_products(
    sums: Sums, cells: Any, rows: Any, row0: int, row_count: int,
    lines: Any, line_count: int, width: int, step: int, pixels: Any, grad_weight: Strided, like: float, plan: Plan,
    task: Task,
) -> None:  # fmt: skip
    """Add the products of one box: ``lines`` of ``width`` pixels, whose cells are ``step`` apart."""
    lanes = plan.panel.lanes
    if task.at_once:
        _store_products(
            sums, cells, rows, row0, row_count, lines, line_count, width, step, pixels, grad_weight, like, plan, task
        )
        return
    most_lines = max(1, BLOCK_BYTES // (width * (lanes + step) * plan.itemsize))  # of the pixels and of their cells
    for row in range(0, row_count, CHUNK):  # its sums with all panels stay in the L2 cache
        for line in range(0, line_count, most_lines):
            some_lines = min(most_lines, line_count - line)
            for panel in range(task.panel0, task.panel1):
                b = shift(pixels, (panel * line_count + line) * width * lanes)
                multiply(
                    panel_sums(sums, task, panel, row0 + row, plan), lanes, cells, shift(rows, row),
                    min(CHUNK, row_count - row), shift(lines, line), some_lines, width, step,
                    b, width * lanes, lanes, plan.panel,
                )  # fmt: skip


@jit
def _store_products(
    sums: Sums, cells: Any, rows: Any, row0: int, row_count: int,
    lines: Any, line_count: int, width: int, step: int, pixels: Any, grad_weight: Strided, like: float, plan: Plan,
    task: Task,
) -> None:  # fmt: skip
    """Store the products of the only box, chunk by chunk, by way of room for one chunk of sums."""
    lanes, target = plan.panel.lanes, pointer(grad_weight.address, like)
    chunk = panel_sums(sums, task, task.panel0, row0, plan)
    for row in range(0, row_count, CHUNK):
        some_rows = min(CHUNK, row_count - row)
        for panel in range(task.panel0, task.panel1):
            filter0, filter_step, count = filters_of(plan, task.group, panel)
            fill(chunk, some_rows * lanes)
            multiply(
                chunk, lanes, cells, shift(rows, row), some_rows, lines, line_count, width, step,
                shift(pixels, panel * line_count * width * lanes), width * lanes, lanes, plan.panel,
            )  # fmt: skip
            store_rows(
                shift(target, filter0 * grad_weight.n), grad_weight, chunk, row0 + row, some_rows, plan,
                filter_step * grad_weight.n, count,
            )  # fmt: skip


@kernel
def _store(
    first: int, last: int, tasks: GradTasks, sums: int, bias_sums: int, grad_weight: Strided, grad_bias: int,
    numbers: int, like: float,
) -> None:  # fmt: skip
    """Store the panels ``first`` to ``last``, counted over all groups: the splits added up, in order.

    ``grad_bias`` is 0 where it is not wanted.
    """
    plan = read_plan(numbers)
    lanes, panels, elements = plan.panel.lanes, plan.groups * plan.panels, plan.sum_rows * plan.panel.lanes
    target, target_bias = pointer(grad_weight.address, like), pointer(grad_bias, like)
    for number in range(first, last):
        filter0, filter_step, count = filters_of(plan, number // plan.panels, number % plan.panels)
        weight, bias = shift(pointer(sums, like), number * elements), shift(pointer(bias_sums, like), number * lanes)
        for split in range(1, tasks.splits):
            _add(weight, shift(weight, split * panels * elements), elements)
        if grad_bias != 0:
            for split in range(1, tasks.splits):
                _add(bias, shift(bias, split * panels * lanes), lanes)
            for lane in range(count):
                target_bias[filter0 + lane * filter_step] = bias[lane]
        if not tasks.at_once:
            store_rows(
                shift(target, filter0 * grad_weight.n), grad_weight, weight, 0, plan.reduction, plan,
                filter_step * grad_weight.n, count,
            )  # fmt: skip


@jit
def _add(totals: Any, values: Any, count: int) -> None:
    for i in range(count):
        totals[i] += values[i]


@jit
def store_rows(
    target: Any, grad_weight: Strided, sums: Any, row0: int, row_count: int, plan: Plan, filter_stride: int, count: int
) -> None:
    """Store sums [(c, tap)][lane] of ``row_count`` rows from ``row0`` on."""
    (_, kh, kw), lanes = plan.kernel_size, plan.panel.lanes
    one_run = grad_weight.w == 1 and grad_weight.h == kw and grad_weight.d == kh * kw and grad_weight.c == plan.taps
    if one_run:  # OIHW: the gradient of a filter is a column of the panel
        copy_block(shift(target, row0), filter_stride, 1, sums, 1, lanes, count, row_count)
        return
    for row in range(row_count):
        c, tap = (row0 + row) // plan.taps, (row0 + row) % plan.taps
        d, h, w = tap // (kh * kw), tap // kw % kh, tap % kw
        start = c * grad_weight.c + d * grad_weight.d + h * grad_weight.h + w * grad_weight.w
        copy_block(shift(target, start), filter_stride, 1, shift(sums, row * lanes), 1, 1, count, 1)
