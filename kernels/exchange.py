"""The gradient of the weights with image and gradients exchanged, by any engine's kernel; ``registry.seen`` asks for it
on engine "cython" only.

    grad_weight[k][c][t] = sum over pixels p of  grad_output[k][p] * input[c][p + t - pad]
                         = sum over cells  q of  input[c][q] * grad_output[k][q + t' - pad']

with t' = last - t and pad' = last - pad is, with taps in reversed order, the gradient of the weights of a convolution
from ``grad_output`` to ``input``. A kernel whose lanes are filters leaves nearly all of them empty where a layer has
few; from the other side these are few channels, as a network's first layer has, and the channels are the filters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def exchanged(dims: Any) -> Any:
    """Return the convolution from ``grad_output`` to ``input``; None if that is none.

    That is so with strides, groups, and where gradients see nothing but padding.
    """
    last = [d * (k - 1) for d, k in zip(dims.dilation, dims.kernel_size, strict=True)]
    pads = [tuple(n - p for n, p in zip(last, pad, strict=True)) for pad in (dims.pad_before, dims.pad_after)]
    if dims.groups > 1 or set(dims.stride) != {1} or min(*pads[0], *pads[1]) < 0:
        return None
    return dims._replace(
        in_channels=dims.out_channels, out_channels=dims.in_channels, input_size=dims.output_size,
        output_size=dims.input_size, pad_before=pads[0], pad_after=pads[1],
    )  # fmt: skip


def weight_grad(
    kernel: Callable[..., None],
    other: Any,
    input: np.ndarray,
    grad_output: np.ndarray,
    grad_weight: np.ndarray,
    grad_bias: np.ndarray | None,
    dims: Any,
    options: Any,
) -> None:
    """Fill ``grad_weight`` by a ``kernel``, as ``fastconv.kernels`` has it; ``other`` is ``dims``, exchanged.

    Exchanged, cells that a tap doesn't see are multiplied by zeros: what is not finite then comes the other way.
    """
    turned = np.empty((dims.in_channels, dims.out_channels, *dims.kernel_size), grad_weight.dtype)
    kernel(grad_output, input, turned, None, other, options)
    if not np.isfinite(turned).all():
        kernel(input, grad_output, grad_weight, grad_bias, dims, options)
        return
    grad_weight[...] = turned.swapaxes(0, 1)[:, :, ::-1, ::-1, ::-1]
    if grad_bias is not None:
        np.sum(grad_output, axis=(0, 2, 3, 4), out=grad_bias)
