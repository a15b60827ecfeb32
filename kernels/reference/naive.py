"""The loops of the textbook: the oracle of the tests and the baseline of the benchmark.

output[n, k, o] = bias[k] + sum over channels c and taps t of
                  input[n, c, o * stride + t * dilation - pad] * weight[k, c, t]

Nothing is shared with the other kernels, so that an error of theirs can't hide here. One output element is one
``(window * filter).sum()``, and each gradient is the same loop with the roles of the three arrays exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

Position = tuple[Any, ...]
Slices = tuple[Any, ...]


def conv_forward(
    input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, output: np.ndarray, dims: Any, options: Any
) -> None:
    """One output element after the other: (window * filter).sum() + bias."""
    for n in range(dims.batch):
        padded = _pad(input[n], dims)
        for k in range(dims.out_channels):
            for position, window in _windows(dims):
                value = (padded[(_channels(k, dims), *window)] * weight[k]).sum()
                output[(n, k, *position)] = value if bias is None else value + bias[k]
    _activate(output, options)


def conv_input_grad(
    grad_output: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    grad_input: np.ndarray,
    dims: Any,
    options: Any,
) -> None:
    """Every output element hands its gradient, times the filter, back to its window."""
    for n in range(dims.batch):
        padded = _pad(np.zeros(grad_input.shape[1:], grad_input.dtype), dims)
        for k in range(dims.out_channels):
            for position, window in _windows(dims):
                padded[(_channels(k, dims), *window)] += weight[k] * grad_output[(n, k, *position)]
        grad_input[n] = _crop(padded, dims)
    if bias is not None:
        grad_input += bias[:, None, None, None]
    _activate(grad_input, options)


def conv_weight_grad(
    input: np.ndarray,
    grad_output: np.ndarray,
    grad_weight: np.ndarray,
    grad_bias: np.ndarray | None,
    dims: Any,
    options: Any,
) -> None:
    """Every output element hands its gradient, times the window, back to its filter."""
    grad_weight[...] = 0
    for n in range(dims.batch):
        padded = _pad(input[n], dims)
        for k in range(dims.out_channels):
            for position, window in _windows(dims):
                grad_weight[k] += padded[(_channels(k, dims), *window)] * grad_output[(n, k, *position)]
    if grad_bias is not None:
        grad_bias[...] = grad_output.sum(axis=(0, 2, 3, 4))


def max_pool_forward(
    input: np.ndarray, output: np.ndarray, winners: np.ndarray | None, dims: Any, options: Any
) -> None:
    """The largest value in each window, and where in the window it was."""
    for n, c in np.ndindex(dims.batch, dims.channels):
        for position in np.ndindex(dims.output_size):
            cells = list(_cells_inside(position, dims))
            best, winner = -np.inf, cells[0][0] if cells else 0
            for tap, cell in cells:
                value = input[(n, c, *cell)]
                if value > best or np.isnan(value):
                    best, winner = value, tap
            output[(n, c, *position)] = best
            if winners is not None:
                winners[(n, c, *position)] = winner


def max_pool_backward(
    grad_output: np.ndarray, winners: np.ndarray, grad_input: np.ndarray, dims: Any, options: Any
) -> None:
    """The gradient of each window goes to its winner alone."""
    grad_input[...] = 0
    for n, c in np.ndindex(dims.batch, dims.channels):
        for position in np.ndindex(dims.output_size):
            for tap, cell in _cells_inside(position, dims):
                if tap == winners[(n, c, *position)]:
                    grad_input[(n, c, *cell)] += grad_output[(n, c, *position)]


def _pad(image: np.ndarray, dims: Any) -> np.ndarray:
    """(C, D, H, W) -> (C, padded D, padded H, padded W)."""
    return np.pad(image, ((0, 0), *zip(dims.pad_before, dims.pad_after, strict=True)))


def _crop(padded: np.ndarray, dims: Any) -> np.ndarray:
    """The inverse of ``_pad``."""
    inner: Slices = tuple(slice(p, p + n) for p, n in zip(dims.pad_before, dims.input_size, strict=True))
    return padded[(..., *inner)]


def _channels(k: int, dims: Any) -> slice:
    """The input channels that filter ``k`` sees: those of its group."""
    first = k // dims.group_out_channels * dims.group_in_channels
    return slice(first, first + dims.group_in_channels)


def _windows(dims: Any) -> Iterator[tuple[Position, Slices]]:
    """Every output position, in order, with the slices of its window in the padded image."""
    for position in np.ndindex(dims.output_size):
        yield (
            position,
            tuple(
                slice(o * s, o * s + d * (k - 1) + 1, d)
                for o, s, d, k in zip(position, dims.stride, dims.dilation, dims.kernel_size, strict=True)
            ),
        )


def _cells_inside(position: Position, dims: Any) -> Iterator[tuple[int, Position]]:
    """The cells of a window that lie in the image and not in the padding, numbered by their tap."""
    for tap, offsets in enumerate(product(*map(range, dims.kernel_size))):
        cell = tuple(
            o * s + t * d - p
            for o, s, t, d, p in zip(position, dims.stride, offsets, dims.dilation, dims.pad_before, strict=True)
        )
        if all(0 <= i < n for i, n in zip(cell, dims.input_size, strict=True)):
            yield tap, cell


def _activate(array: np.ndarray, options: Any) -> None:
    if options.activation == "relu":
        np.maximum(array, 0, out=array)
