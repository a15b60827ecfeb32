"""The gradient of the input as stride-1 convolutions, for every engine that can convolve forward.

grad_input = sum over the phases of the stride of conv(grad_output, rotated and channel-swapped weight)

``input_grad`` convolves phase by phase; ``merge`` describes all phases as one convolution, for an engine that packs
gradients and weights once and lets each phase see some of the taps.

The algebra, which taps and which positions make a phase, is that of ``dims``; here are only the views. No zero is
inserted, no array is copied but the weights of a grouped convolution (whose swapped channels are no view).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

Kernel = Callable[..., None]
Index = tuple[Any, ...] | None  #: None: all of an array

STRANDS = 16  #: phases of a stride that are merged, at most


def swap_channels(weight: np.ndarray, groups: int) -> np.ndarray:
    """Return (K, C/g, ...) weights as (C, K/g, ...): what was an input channel is now a filter."""
    if groups == 1:
        return weight.swapaxes(0, 1)
    k, c, *kernel = weight.shape
    if c == 1:
        return weight.reshape(groups, k // groups, *kernel)
    split = weight.reshape(groups, k // groups, c, *kernel)  # (g, K/g, C/g, ...)
    # In memory channels must follow groups, for both to be one axis; what is contiguous stays so: a fast copy.
    axes, n = range(3, split.ndim), len(kernel)
    order = back = (1, 0, 2, *axes)
    if abs(weight.strides[-1]) > abs(weight.strides[0]):
        order, back = (*axes, 0, 2, 1), (n, n + 2, n + 1, *range(n))
    copy = np.ascontiguousarray(split.transpose(order)).transpose(back)
    return copy.swapaxes(1, 2).reshape(groups * c, k // groups, *kernel)


def each_group(
    grad_output: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, grad_input: np.ndarray, dims: Any
) -> Iterator[tuple[Any, ...]]:
    """Yield each group's gradient of the input as a problem of its own, whose swapped channels are a view."""
    filters, channels = dims.group_out_channels, dims.group_in_channels
    group = dims._replace(in_channels=channels, out_channels=filters, groups=1)
    for g in range(dims.groups):
        rows, columns = slice(g * filters, (g + 1) * filters), slice(g * channels, (g + 1) * channels)
        yield grad_output[:, rows], weight[rows], None if bias is None else bias[columns], grad_input[:, columns], group


def input_grad(
    forward: Kernel,
    grad_output: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    grad_input: np.ndarray,
    dims: Any,
    options: Any,
) -> None:
    """Fill ``grad_input`` by one call of ``forward`` for each phase of the stride."""
    swapped = swap_channels(weight, dims.groups)
    parts, some_empty = _phases(dims)
    if some_empty:  # all at once: a phase of it has no two neighbours
        fill(grad_input, bias, options.activation)
    for part, seen, taps, filled in parts:
        forward(_part(grad_output, seen), _part(swapped, taps), bias, _part(grad_input, filled), part, options)


@lru_cache(maxsize=512)
def _phases(dims: Any) -> tuple[list[tuple[Any, Index, Index, Index]], bool]:
    """Return phases with taps: dims, the gradients and taps seen, what is filled; and whether some have none."""
    all_parts = dims.input_grad_parts()
    parts = [
        (
            part.dims, _index(part.output_slices, dims.output_size), _index(part.kernel_slices, dims.kernel_size),
            _index(part.input_slices, dims.input_size),
        )
        for part in all_parts if part.dims is not None
    ]  # fmt: skip
    return parts, len(parts) < len(all_parts)


def _index(slices: tuple[slice, ...], size: tuple[int, ...]) -> Index:
    whole = all(s.indices(n) == (0, n, 1) for s, n in zip(slices, size, strict=True))
    return None if whole else (..., *slices)


def _part(array: np.ndarray, index: Index) -> np.ndarray:
    return array if index is None else array[index]


class Merged(NamedTuple):
    """All phases as one stride-1 convolution: where they lie, and which cells and taps they multiply."""

    kernel: tuple[int, ...]  #: cells that all phases at one position see, (depth, height, width) ...
    pad: tuple[int, ...]  #: ... and how many of them come before the position: zeros at the borders
    positions: tuple[int, ...]  #: of the phases that have most
    along: tuple[int, ...]  #: phases along each axis
    phases: np.ndarray  #: a row for each, (depth, height, width) in order: its first tap, and how many, (d, h, w)
    taps: np.ndarray  #: a row for each tap of each: the cell that it sees, (d, h, w), and its number in the filter


@lru_cache(maxsize=512)
def merge(dims: Any) -> Merged | None:
    """Merge the phases of a stride; a phase without taps is a sum of nothing.

    None where there is one phase, or are more than ``STRANDS``, or no taps, or many rows that none sees.
    """
    if not 1 < math.prod(dims.stride) <= STRANDS:
        return None
    merged = _merge(dims)
    worth = len(merged.taps) and merged.kernel[0] <= 2 * dims.kernel_size[0]  # the cells of all depths are copied
    return merged if worth else None


def _merge(dims: Any) -> Merged:
    parts = dims.input_grad_parts()
    seen = [p for p in parts if p.dims is not None]
    first = [_first_cells(p) for p in seen]
    low = [min((f[axis] for f in first), default=0) for axis in range(3)]
    kernel = [1, 1, 1]
    taps: list[tuple[int, ...]] = []
    phases = []
    for part in parts:
        size = (0, 0, 0) if part.dims is None else part.dims.kernel_size
        phases.append((len(taps), *size))
        if part.dims is not None:
            begin = [f - lowest for f, lowest in zip(_first_cells(part), low, strict=True)]
            ranges = [range(*s.indices(n)) for s, n in zip(part.kernel_slices, dims.kernel_size, strict=True)]
            for d, h, w in np.ndindex(*size):
                cell = [b + i * step for b, i, step in zip(begin, (d, h, w), part.dims.dilation, strict=True)]
                kernel = [max(n, i + 1) for n, i in zip(kernel, cell, strict=True)]
                row = ranges[0][d] * dims.kernel_size[1] + ranges[1][h]
                taps.append((*cell, row * dims.kernel_size[2] + ranges[2][w]))
    along = tuple(min(s, n) for s, n in zip(dims.stride, dims.input_size, strict=True))
    positions = tuple(-(-n // s) for s, n in zip(dims.stride, dims.input_size, strict=True))
    return Merged(
        tuple(kernel), tuple(-n for n in low), positions, along,
        np.array(phases, np.intp), np.array(taps, np.intp).reshape(-1, 4),
    )  # fmt: skip


def _first_cells(part: Any) -> list[int]:
    """Return which cells of the output's gradient the first tap of a phase sees at its first position, one per axis."""
    return [s.start - pad for s, pad in zip(part.output_slices, part.dims.pad_before, strict=True)]


def fill(target: np.ndarray, bias: np.ndarray | None, activation: str | None) -> None:
    """Store what an empty sum gives: zero, plus the bias, through the activation."""
    value = np.zeros(1, target.dtype) if bias is None else bias
    target[...] = (np.maximum(value, 0) if activation == "relu" else value)[:, None, None, None]
