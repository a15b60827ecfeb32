"""Max pooling by shifted views: one pass over an image for each tap of the window.

output[c, o] = max over taps t of  input[c, o * stride + t * dilation - pad],    padding counts as -inf

Both directions go image by image. Going backward the taps come in descending order, so that the gradients of
overlapping windows reach a cell in the order of the outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Slices = tuple[Any, ...]


def max_pool_forward(
    input: np.ndarray, output: np.ndarray, winners: np.ndarray | None, dims: Any, options: Any
) -> None:
    """Keep the best value of the taps so far, and its tap."""
    output[...] = -np.inf
    if winners is not None:
        winners[...] = _first_winners(dims)
    for n in range(dims.batch):
        for number, tap in enumerate(np.ndindex(dims.kernel_size)):
            outputs, inputs = _shift(tap, dims)
            best, value = output[(n, ..., *outputs)], input[(n, ..., *inputs)]
            if winners is None:
                np.maximum(best, value, out=best)
            else:
                better = (value > best) | np.isnan(value)
                np.copyto(best, value, where=better)
                np.copyto(winners[(n, ..., *outputs)], number, where=better)


def max_pool_backward(
    grad_output: np.ndarray, winners: np.ndarray, grad_input: np.ndarray, dims: Any, options: Any
) -> None:
    """Add each gradient where its tap has won."""
    grad_input[...] = 0
    taps = list(enumerate(np.ndindex(dims.kernel_size)))
    for n in range(dims.batch):
        for number, tap in reversed(taps):
            outputs, inputs = _shift(tap, dims)
            target, won = grad_input[(n, ..., *inputs)], winners[(n, ..., *outputs)] == number
            np.add(target, grad_output[(n, ..., *outputs)], out=target, where=won)


def _shift(tap: tuple[int, ...], dims: Any) -> tuple[Slices, Slices]:
    """Return which outputs see the image, and not its padding, through ``tap``, and what they see."""
    outputs, inputs = [], []
    for axis, t in enumerate(tap):
        step, n = dims.stride[axis], dims.input_size[axis]
        shift = t * dims.dilation[axis] - dims.pad_before[axis]
        first = max(0, -(shift // step))  # ceil(-shift / step)
        count = max(0, min(dims.output_size[axis], (n - 1 - shift) // step + 1) - first)
        outputs.append(slice(first, first + count))
        inputs.append(slice(first * step + shift, (first + count) * step + shift, step))
    return tuple(outputs), tuple(inputs)


def _first_winners(dims: Any) -> np.ndarray:
    """(OD, OH, OW): the first cell of each window that lies in the image, 0 where there is none."""
    winner = np.zeros(dims.output_size, np.intp)
    inside = np.ones(dims.output_size, bool)
    for axis in range(3):
        start = np.arange(dims.output_size[axis]) * dims.stride[axis] - dims.pad_before[axis]
        tap = np.maximum(-(start // dims.dilation[axis]), 0)  # ceil(-start / dilation)
        cell = start + tap * dims.dilation[axis]
        shape = [1, 1, 1]
        shape[axis] = -1
        winner = winner * dims.kernel_size[axis] + tap.reshape(shape)
        inside &= ((tap < dims.kernel_size[axis]) & (cell < dims.input_size[axis])).reshape(shape)
    return np.where(inside, winner, 0)
