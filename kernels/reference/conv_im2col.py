"""Convolution as matrix products: the best that plain NumPy has.

output [K x P] = weight [K x R] * columns [R x P],    P = output pixels, R = C/groups * KD * KH * KW

    columns, one row for each channel and tap: the image as that tap sees it

              P = OD * OH * OW
         +------+------+------+--+
       R |      |      |      |  |      gathered panel by panel, for one image at a time, so that a panel
         |  panel of <= PANEL    |      and its product stay in the cache and the whole matrix never exists
         |      |      |      |  |
         +------+------+------+--+

The gradient of the weights is grad_output [K x P] * columns^T [P x R], summed over panels and images in their order;
the gradient of the input is the forward product on rotated weights, one for each phase of the stride (interleave.py).
Groups are the leading dimension of a batched product. The threads are those of NumPy's BLAS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..interleave import input_grad

Slices = tuple[Any, ...]

PANEL = 4 << 20  #: bytes of a panel: its columns, the strip of the image that they come from, and their product


def conv_forward(
    input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, output: np.ndarray, dims: Any, options: Any
) -> None:
    """The product weight * columns, panel by panel."""
    filters = _filters(weight, dims)
    for n, block, columns in _panels(input, dims):
        target = output[(n, ..., *block)]
        result = np.matmul(filters, columns).reshape(target.shape)  # (g, K/g, P) -> (K, OD, OH, OW)
        if bias is not None:
            result += bias[:, None, None, None]
        if options.activation == "relu":
            np.maximum(result, 0, out=result)
        target[...] = result


def conv_input_grad(
    grad_output: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    grad_input: np.ndarray,
    dims: Any,
    options: Any,
) -> None:
    """The forward product, once for each phase of the stride."""
    input_grad(conv_forward, grad_output, weight, bias, grad_input, dims, options)


def conv_weight_grad(
    input: np.ndarray,
    grad_output: np.ndarray,
    grad_weight: np.ndarray,
    grad_bias: np.ndarray | None,
    dims: Any,
    options: Any,
) -> None:
    """The product grad_output * columns^T, summed over the panels."""
    total = np.zeros((dims.groups, dims.group_out_channels, dims.reduction), grad_weight.dtype)
    for n, block, columns in _panels(input, dims):
        pixels = grad_output[(n, ..., *block)].reshape(dims.groups, dims.group_out_channels, -1)  # (g, K/g, P)
        total += np.matmul(pixels, columns.swapaxes(1, 2))  # (g, K/g, P) * (g, P, R) -> (g, K/g, R)
    grad_weight[...] = total.reshape(grad_weight.shape)  # (g, K/g, R) -> (K, C/g, KD, KH, KW)
    if grad_bias is not None:
        grad_bias[...] = grad_output.sum(axis=(0, 2, 3, 4))


def _filters(weight: np.ndarray, dims: Any) -> np.ndarray:
    """(K, C/g, KD, KH, KW) -> (g, K/g, R), contiguous: BLAS takes no other strides."""
    return np.ascontiguousarray(weight).reshape(dims.groups, dims.group_out_channels, dims.reduction)


def _panels(input: np.ndarray, dims: Any) -> Iterator[tuple[int, Slices, np.ndarray]]:
    """Every panel of every image: the image's number, the block of output pixels, its columns (g, R, P).

    The columns are overwritten by the next panel.
    """
    for block in _blocks(dims, input.itemsize):
        source, inner, strip = _strip(input, block, dims)
        windows = _windows(strip, dims)
        columns = np.empty(windows.shape, input.dtype)
        for n in range(dims.batch):
            strip[inner] = input[(n, ..., *source)]
            columns[...] = windows
            yield n, block, columns.reshape(dims.groups, dims.reduction, -1)


def _blocks(dims: Any, itemsize: int) -> Iterator[Slices]:
    """Cut the output's pixels into blocks whose panel fits, of whole rows and planes where possible."""
    seen = dims.taps + math.prod(dims.stride)  # cells of columns and of strip, about, for each pixel and channel
    room = max(1, PANEL // (itemsize * (dims.in_channels * seen + dims.out_channels)))
    edges: list[int] = []
    for n in reversed(dims.output_size):
        edges.insert(0, min(n, room))
        room = max(1, room // n)
    starts = (range(0, n, edge) for n, edge in zip(dims.output_size, edges, strict=True))
    for corner in product(*starts):
        yield tuple(slice(i, min(i + edge, n)) for i, edge, n in zip(corner, edges, dims.output_size, strict=True))


def _strip(input: np.ndarray, block: Slices, dims: Any) -> tuple[Slices, Slices, np.ndarray]:
    """Return which part of the image ``block`` sees, where it goes, and zeros (C, D', H', W') to put it in."""
    source, inner, shape = [], [], [dims.in_channels]
    for axis, part in enumerate(block):
        first = part.start * dims.stride[axis] - dims.pad_before[axis]
        size = (part.stop - part.start - 1) * dims.stride[axis] + dims.dilation[axis] * (dims.kernel_size[axis] - 1) + 1
        start = max(first, 0)
        stop = max(start, min(first + size, dims.input_size[axis]))
        source.append(slice(start, stop))
        inner.append(slice(start - first, stop - first))
        shape.append(size)
    return tuple(source), (slice(None), *inner), np.zeros(shape, input.dtype)


def _windows(strip: np.ndarray, dims: Any) -> np.ndarray:
    """(C, D', H', W') -> (C, KD, KH, KW, OD, OH, OW), a view."""
    covered = tuple(d * (k - 1) + 1 for d, k in zip(dims.dilation, dims.kernel_size, strict=True))
    windows = sliding_window_view(strip, covered, axis=(1, 2, 3))
    steps = tuple(slice(None, None, step) for step in (*dims.stride, *dims.dilation))
    return windows[(slice(None), *steps)].transpose(0, 4, 5, 6, 1, 2, 3)
