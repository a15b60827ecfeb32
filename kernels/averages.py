"""Averages, and their gradients, where a convolution with ones would have many taps for few cells.

    output[n][c]            = weight * sum over all cells of  input[n][c]                  of the whole image
    grad_input[n][c][cell]  = weight * grad_output[n][c][the cell's window]                of windows that don't overlap

Such an average reads each cell once, such a gradient stores each once: NumPy's sums and broadcasts do that at the speed
of memory. As a depthwise convolution, a global average has as many taps as the image has cells. What is here has the
signature of the kernels for that convolution, whose weights are a single number.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

SPATIAL = (2, 3, 4)
LEAST_CELLS = 16  #: of a window, for its gradients to be worth storing one window after another
LEAST_SUM = 64  #: cells of a channels-first image, for their sum to be worth a loop of its own


def sees_whole_image(dims: Any) -> bool:
    """Whether there is one window, the image; rows of few cells are summed faster as planes."""
    whole = dims.kernel_size == dims.input_size and dims.output_size == (1, 1, 1) and not any(dims.pad_before)
    return bool(whole and (dims.channels_last or math.prod(dims.kernel_size) >= LEAST_SUM))


def has_windows_apart(dims: Any) -> bool:
    """Whether windows are large, share no cells and don't reach beyond the image."""
    axes = zip(dims.input_size, dims.output_size, dims.kernel_size, dims.stride, dims.pad_before, strict=True)
    apart = all(
        not pad and (step >= taps or count == 1) and (count - 1) * step + taps <= size
        for size, count, taps, step, pad in axes
    )
    return apart and math.prod(dims.kernel_size) >= LEAST_CELLS


def conv_forward(input: Any, weight: Any, bias: None, output: Any, dims: Any, options: Any) -> None:
    """Average whole images, each alone where its cells lie among those of others: bits don't depend on the batch."""
    together = abs(input.strides[0]) == max(map(abs, input.strides))
    for images in [slice(None)] if together else [slice(i, i + 1) for i in range(dims.batch)]:
        np.sum(input[images], axis=SPATIAL, out=output[images, :, 0, 0, 0])
    output *= weight.flat[0]


def conv_input_grad(grad_output: Any, weight: Any, bias: None, grad_input: Any, dims: Any, options: Any) -> None:
    """Store each window's gradient in its cells."""
    covered = (n * k for n, k in zip(dims.output_size, dims.kernel_size, strict=True))
    if tuple(covered) != dims.input_size:
        grad_input[...] = 0
    *images, depth, high, wide = grad_input.strides
    steps = (stride * step for stride, step in zip((depth, high, wide), dims.stride, strict=True))
    shape, strides = (*grad_output.shape, *dims.kernel_size), (*images, *steps, depth, high, wide)
    np.multiply(grad_output[..., None, None, None], weight.flat[0], out=as_strided(grad_input, shape, strides))
