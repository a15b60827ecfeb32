"""The gradient of the input as stride-1 convolutions, for every engine that can convolve forward.

grad_input = sum over the phases of the stride of conv(grad_output, rotated and channel-swapped weight)

The algebra, which taps and which positions make a phase, is that of ``dims``; here are only the views. No zero is
inserted, no array is copied but the weights of a grouped convolution (whose swapped channels are no view).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Kernel = Callable[..., None]


def swap_channels(weight: np.ndarray, groups: int) -> np.ndarray:
    """Return (K, C/g, ...) weights as (C, K/g, ...): what was an input channel is now a filter."""
    k, c, *kernel = weight.shape
    if groups == 1:
        return weight.swapaxes(0, 1)
    split = weight.reshape(groups, k // groups, c, *kernel)  # (g, K/g, C/g, ...)
    # In memory channels must follow groups, for both to be one axis; what is contiguous stays so: a fast copy.
    axes, n = range(3, split.ndim), len(kernel)
    order = back = (1, 0, 2, *axes)
    if abs(weight.strides[-1]) > abs(weight.strides[0]):
        order, back = (*axes, 0, 2, 1), (n, n + 2, n + 1, *range(n))
    copy = np.ascontiguousarray(split.transpose(order)).transpose(back)
    return copy.swapaxes(1, 2).reshape(groups * c, k // groups, *kernel)


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
    swapped, parts = swap_channels(weight, dims.groups), dims.input_grad_parts()
    if any(part.dims is None for part in parts):  # all at once: a phase of it has no two neighbours
        fill(grad_input, bias, options.activation)
    for part in parts:
        if part.dims is not None:
            source, target = grad_output[(..., *part.output_slices)], grad_input[(..., *part.input_slices)]
            forward(source, swapped[(..., *part.kernel_slices)], bias, target, part.dims, options)


def fill(target: np.ndarray, bias: np.ndarray | None, activation: str | None) -> None:
    """Store what an empty sum gives: zero, plus the bias, through the activation."""
    value = np.zeros(1, target.dtype) if bias is None else bias
    target[...] = (np.maximum(value, 0) if activation == "relu" else value)[:, None, None, None]
