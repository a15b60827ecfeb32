"""Gradients of convolution and pooling: validate, allocate, select, run.

``conv1d/2d/3d_input`` and ``_weight`` follow ``torch.nn.grad``; ``conv1d/2d/3d`` give all gradients of a convolution at
once. Sizes (``input_size``, ``weight_size``) are full shapes in the caller's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import arrays
from .arrays import (
    Axes,
    arrange,
    as_image,
    as_weight,
    check_array,
    check_same_dtype,
    first_image,
    first_shape,
    first_weight_shape,
    flipped,
    highest,
    image_axes,
    image_shape,
    plain_shape,
    weight_axes,
)
from .buffers import empty
from .dims import ConvDims, Padding, PoolDims, channels_last, conv_dims, integer, pool_dims
from .functional import (
    AVERAGE,
    CONV,
    POOL,
    TRANSPOSE,
    Array,
    Ints,
    Plan,
    allocate,
    averaging,
    blur_plan,
    check_sequence,
    check_words,
    deliver,
    freeze,
    kernel,
    kernel_options,
    options,
    reflected,
    result_shape,
    run,
    transpose_dims,
)
from .kernels import averages
from .runtime import Setting, settings

__all__ = [f"{name}{n}d" for name in ("conv", "max_pool", "avg_pool", "max_blur_pool") for n in (1, 2, 3)] + [
    f"{name}{n}d_{what}" for name in ("conv", "conv_transpose") for n in (1, 2, 3) for what in ("input", "weight")
]

Size = Sequence[int]

#: Names of arguments, those of the operation behind the shape that the result has.
_CONV_INPUT, _CONV_WEIGHT = ("input_size", *CONV), ("weight_size", *CONV)
_POOL, _AVERAGE = ("input_size", *POOL), ("input_size", *AVERAGE)

_FLAT = np.dtype(np.int64)  #: offsets in the plane, the form of indices that PyTorch has, too


class ConvGradients(NamedTuple):
    """Gradients of a convolution; None for those that were not asked for."""

    input: Array | None
    weight: Array | None
    bias: Array | None


# ---------------------------------------------------------------------------------------------------------------------
# What the gradients share
# ---------------------------------------------------------------------------------------------------------------------


def checked_size(size: object, name: str, ndims: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape that the user gave as a tuple of ints."""
    check_sequence(size, name)
    assert isinstance(size, (list, tuple))
    if len(size) not in ndims:
        wanted = " or ".join(map(str, ndims))
        raise ValueError(f"{name} must have {wanted} entries, got {tuple(size)}")
    return tuple(integer(n, f"{name}[{i}]", 0) for i, n in enumerate(size))


def _image_size(size: object, spatial: int, ndim: int) -> tuple[int, ...]:
    """Return ``input_size``, which has a batch axis exactly if ``grad_output``, of that ndim, has."""
    shape = checked_size(size, "input_size", (spatial + 1, spatial + 2))
    if len(shape) != ndim:
        raise ValueError(f"input_size must have as many entries as grad_output, {ndim}, got {shape}")
    return shape


def check_grad_output(
    grad: tuple[int, ...], batch: int, channels: int, size: tuple[int, int, int], spatial: int, last: bool
) -> None:
    """Raise ValueError unless the gradient, of that shape, is as an image of that size in the caller's layout."""
    wanted = image_shape(batch, channels, size, spatial, last)
    if batch == 1 and len(grad) < len(wanted):
        wanted = wanted[1:]
    if grad != wanted:
        raise ValueError(f"grad_output must have the shape of the output, {wanted}, got {grad}")


# ---------------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024, typed=True)
def _conv_plan(
    op: str, spatial: int, last: bool, other: tuple[int, ...], grad: tuple[int, ...], geometry: tuple[Any, ...],
    algorithm: str | None, setting: Setting,
) -> Plan:  # fmt: skip
    """Return the plan of one gradient, from the shapes of the ``other`` array and ``grad_output``."""
    size, stride, padding, dilation, groups = geometry
    engine, precision, threads = setting
    grad_axes = image_axes(grad, "grad_output", spatial, last)
    if op == "conv_input_grad":
        image = shape = _image_size(size, spatial, len(grad))
        weight, names = other, ("input_size", "weight")
    else:
        weight = shape = checked_size(size, "weight_size", (spatial + 2,))
        image, names = other, ("input", "weight_size")
    axes = (image_axes(image, "input", spatial, last), weight_axes(weight, "weight", spatial, last), grad_axes)
    sizes = first_shape(image, spatial, last), first_weight_shape(weight, spatial, last)
    dims = conv_dims(*sizes, stride, padding, dilation, groups, last, input_name=names[0], weight_name=names[1])
    check_grad_output(grad, dims.batch, dims.out_channels, dims.output_size, spatial, last)
    chosen = kernel(op, dims, engine, algorithm, precision)
    return Plan(dims, shape, axes, chosen, kernel_options(None, precision, threads))


def _conv_input(
    spatial: int, input_size: Size, weight: Array, grad_output: Array, stride: Ints, padding: Padding, dilation: Ints,
    groups: int, layout: str, flip_kernel: bool, precision: str | None, algorithm: str | None, engine: str | None,
    out: Array | None,
) -> Array:  # fmt: skip
    last = channels_last(layout)
    g, w = check_array(grad_output, "grad_output"), check_array(weight, "weight")
    check_same_dtype(w, "weight", g, "grad_output")
    try:
        dims, shape, axes, run_kernel, how = _conv_plan(
            "conv_input_grad", spatial, last, w.shape, g.shape,
            freeze(_CONV_INPUT, input_size, stride, padding, dilation, groups), algorithm,
            settings(engine, precision),
        )  # fmt: skip
    except TypeError:
        check_words(precision=precision, algorithm=algorithm, engine=engine)
        raise
    result = empty(shape, g.dtype) if out is None else allocate(out, shape, g, w)
    filters = flipped(arrange(w, axes[1]), flip_kernel)
    run_kernel(arrange(g, axes[2]), filters, None, arrange(result, axes[0]), dims, how)
    return result if out is None else deliver(result, out)


def _conv_weight(
    spatial: int, input: Array, weight_size: Size, grad_output: Array, stride: Ints, padding: Padding, dilation: Ints,
    groups: int, layout: str, flip_kernel: bool, precision: str | None, algorithm: str | None, engine: str | None,
    out: Array | None, with_bias: bool = False,
) -> tuple[Array, Array | None]:  # fmt: skip
    last = channels_last(layout)
    x, g = check_array(input, "input"), check_array(grad_output, "grad_output")
    check_same_dtype(g, "grad_output", x, "input")
    try:
        dims, shape, axes, run_kernel, how = _conv_plan(
            "conv_weight_grad", spatial, last, x.shape, g.shape,
            freeze(_CONV_WEIGHT, weight_size, stride, padding, dilation, groups), algorithm,
            settings(engine, precision),
        )  # fmt: skip
    except TypeError:
        check_words(precision=precision, algorithm=algorithm, engine=engine)
        raise
    result = empty(shape, x.dtype) if out is None else allocate(out, shape, x, g)
    bias = np.empty(dims.out_channels, x.dtype) if with_bias else None
    target = flipped(arrange(result, axes[1]), flip_kernel)
    run_kernel(arrange(x, axes[0]), arrange(g, axes[2]), target, bias, dims, how)
    return result if out is None else deliver(result, out), bias


def _conv(
    spatial: int, input: Array, weight: Array, grad_output: Array, stride: Ints, padding: Padding, dilation: Ints,
    groups: int, needs: Sequence[str], layout: str, flip_kernel: bool, precision: str | None, algorithm: str | None,
    engine: str | None,
) -> ConvGradients:  # fmt: skip
    needs = _needed(needs)
    geometry = (stride, padding, dilation, groups, layout, flip_kernel, precision, algorithm, engine)
    grad_input = grad_weight = grad_bias = None
    if "input" in needs:
        grad_input = _conv_input(spatial, np.shape(input), weight, grad_output, *geometry, None)
    if "weight" in needs or "bias" in needs:  # one pass has both: the bias alone would have sums of another order
        size = np.shape(weight)
        grad_weight, grad_bias = _conv_weight(spatial, input, size, grad_output, *geometry, None, "bias" in needs)
    return ConvGradients(grad_input, grad_weight if "weight" in needs else None, grad_bias)


def _needed(needs: Any) -> tuple[str, ...]:
    """Return the names of the gradients that are asked for, which may come from a generator, or say what is wrong."""
    wanted = "needs must be a sequence of 'input', 'weight' and 'bias'"
    try:
        names = needs if isinstance(needs, str) else tuple(needs)
    except TypeError:
        raise TypeError(f"{wanted}, got {needs!r}") from None
    if isinstance(names, str) or not all(isinstance(name, str) and name in ConvGradients._fields for name in names):
        raise ValueError(f"{wanted}, got {names!r}")
    return names


def conv1d_input(
    input_size: Size,
    weight: Array,
    grad_output: Array,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    layout: str = "NCHW",
    flip_kernel: bool = False,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.conv1d` with respect to its input; as `conv2d_input`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.conv1d_input((1, 1, 4), np.array([[[-1.0, 1.0]]]), np.ones((1, 1, 3)))
    array([[[-1.,  0.,  0.,  1.]]])
    """
    return _conv_input(
        1, input_size, weight, grad_output, stride, padding, dilation, groups,
        layout, flip_kernel, precision, algorithm, engine, out,
    )  # fmt: skip


def conv2d_input(
    input_size: Size,
    weight: Array,
    grad_output: Array,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    layout: str = "NCHW",
    flip_kernel: bool = False,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.conv2d` with respect to its input.

    Parameters
    ----------
    input_size : sequence of int
        Shape of the input, (N, C, H, W) or (C, H, W); with ``layout="NHWC"`` channels last.
    weight : ndarray, float32 or float64
        The filters of the convolution.
    grad_output : ndarray, dtype of weight
        Gradient of the loss with respect to the output, in the output's shape.
    stride, padding, dilation, groups, layout, flip_kernel, precision, algorithm, engine
        Those of the convolution.
    out : ndarray, optional
        Array of shape ``input_size`` to store the result in.

    Returns
    -------
    ndarray
        Of shape ``input_size``.

    Raises
    ------
    ValueError, TypeError
        As in `fastconv.conv2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.conv2d_input((1, 1, 3, 3), np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)))
    array([[[[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]]]])
    """
    return _conv_input(
        2, input_size, weight, grad_output, stride, padding, dilation, groups,
        layout, flip_kernel, precision, algorithm, engine, out,
    )  # fmt: skip


def conv3d_input(
    input_size: Size,
    weight: Array,
    grad_output: Array,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    layout: str = "NCHW",
    flip_kernel: bool = False,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.conv3d` with respect to its input; as `conv2d_input`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.conv3d_input((1, 1, 3, 3, 3), np.ones((1, 1, 2, 2, 2)), np.ones((1, 1, 2, 2, 2))).max()
    np.float64(8.0)
    """
    return _conv_input(
        3, input_size, weight, grad_output, stride, padding, dilation, groups,
        layout, flip_kernel, precision, algorithm, engine, out,
    )  # fmt: skip


def conv1d_weight(
    input: Array,
    weight_size: Size,
    grad_output: Array,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    layout: str = "NCHW",
    flip_kernel: bool = False,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.conv1d` with respect to its weight; as `conv2d_weight`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.conv1d_weight(np.array([[[1.0, 2.0, 3.0]]]), (1, 1, 2), np.ones((1, 1, 2)))
    array([[[3., 5.]]])
    """
    return _conv_weight(
        1, input, weight_size, grad_output, stride, padding, dilation, groups,
        layout, flip_kernel, precision, algorithm, engine, out,
    )[0]  # fmt: skip


def conv2d_weight(
    input: Array,
    weight_size: Size,
    grad_output: Array,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    layout: str = "NCHW",
    flip_kernel: bool = False,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.conv2d` with respect to its weight.

    Parameters
    ----------
    input : ndarray, float32 or float64
        What was convolved.
    weight_size : sequence of int
        Shape of the weight, (K, C/groups, KH, KW); with ``layout="NHWC"`` (KH, KW, C/groups, K).
    grad_output : ndarray, dtype of input
        Gradient of the loss with respect to the output, in the output's shape.
    stride, padding, dilation, groups, layout, flip_kernel, precision, algorithm, engine
        Those of the convolution.
    out : ndarray, optional
        Array of shape ``weight_size`` to store the result in.

    Returns
    -------
    ndarray
        Of shape ``weight_size``, summed over the batch.

    Raises
    ------
    ValueError, TypeError
        As in `fastconv.conv2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.conv2d_weight(np.ones((1, 1, 3, 3)), (1, 1, 2, 2), np.ones((1, 1, 2, 2)))
    array([[[[4., 4.],
             [4., 4.]]]])
    """
    return _conv_weight(
        2, input, weight_size, grad_output, stride, padding, dilation, groups,
        layout, flip_kernel, precision, algorithm, engine, out,
    )[0]  # fmt: skip


def conv3d_weight(
    input: Array,
    weight_size: Size,
    grad_output: Array,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    layout: str = "NCHW",
    flip_kernel: bool = False,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.conv3d` with respect to its weight; as `conv2d_weight`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.conv3d_weight(np.ones((1, 1, 3, 3, 3)), (1, 1, 2, 2, 2), np.ones((1, 1, 2, 2, 2))).max()
    np.float64(8.0)
    """
    return _conv_weight(
        3, input, weight_size, grad_output, stride, padding, dilation, groups,
        layout, flip_kernel, precision, algorithm, engine, out,
    )[0]  # fmt: skip


def conv1d(
    input: Array,
    weight: Array,
    grad_output: Array,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    needs: Sequence[str] = ("input", "weight", "bias"),
    layout: str = "NCHW",
    flip_kernel: bool = False,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
) -> ConvGradients:
    """All gradients of `fastconv.conv1d` in one call; as `conv2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.conv1d(np.ones((1, 1, 4)), np.ones((1, 1, 2)), np.ones((1, 1, 3)), needs=["bias"])
    ConvGradients(input=None, weight=None, bias=array([3.]))
    """
    return _conv(
        1, input, weight, grad_output, stride, padding, dilation, groups, needs,
        layout, flip_kernel, precision, algorithm, engine,
    )  # fmt: skip


def conv2d(
    input: Array,
    weight: Array,
    grad_output: Array,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    needs: Sequence[str] = ("input", "weight", "bias"),
    layout: str = "NCHW",
    flip_kernel: bool = False,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
) -> ConvGradients:
    """All gradients of `fastconv.conv2d` in one call.

    Parameters
    ----------
    input, weight : ndarray, float32 or float64
        Of the convolution.
    grad_output : ndarray, dtype of input
        Gradient of the loss with respect to the output, in the output's shape.
    stride, padding, dilation, groups, layout, flip_kernel, precision, algorithm, engine
        Those of the convolution.
    needs : sequence of {"input", "weight", "bias"}
        Which gradients to compute.

    Returns
    -------
    ConvGradients
        Named tuple ``(input, weight, bias)`` with None for what was not needed.

    Raises
    ------
    ValueError, TypeError
        As in `fastconv.conv2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> grads = fc.grad.conv2d(np.ones((1, 1, 3, 3)), np.ones((2, 1, 2, 2)), np.ones((1, 2, 2, 2)))
    >>> grads.input.shape, grads.weight.shape, grads.bias
    ((1, 1, 3, 3), (2, 1, 2, 2), array([4., 4.]))
    """
    return _conv(
        2, input, weight, grad_output, stride, padding, dilation, groups, needs,
        layout, flip_kernel, precision, algorithm, engine,
    )  # fmt: skip


def conv3d(
    input: Array,
    weight: Array,
    grad_output: Array,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    needs: Sequence[str] = ("input", "weight", "bias"),
    layout: str = "NCHW",
    flip_kernel: bool = False,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
) -> ConvGradients:
    """All gradients of `fastconv.conv3d` in one call; as `conv2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> grads = fc.grad.conv3d(np.ones((1, 1, 3, 3, 3)), np.ones((2, 1, 2, 2, 2)), np.ones((1, 2, 2, 2, 2)))
    >>> grads.weight.shape
    (2, 1, 2, 2, 2)
    """
    return _conv(
        3, input, weight, grad_output, stride, padding, dilation, groups, needs,
        layout, flip_kernel, precision, algorithm, engine,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Transposed convolution: its gradients are a convolution and a weight gradient with the two images changing places
# ---------------------------------------------------------------------------------------------------------------------


def _transpose_dims(
    small: tuple[int, ...],
    weight: tuple[int, ...],
    grad: tuple[int, ...],
    geometry: tuple[Any, ...],
    spatial: int,
    last: bool,
) -> ConvDims:
    """Return the transposed convolution's dims; ``small`` and ``weight`` are (N, C, *spatial) and (C, K/g, *kernel)."""
    dims = transpose_dims(small, weight, *geometry, last)
    check_grad_output(grad, dims.batch, dims.in_channels, dims.input_size, spatial, last)
    return dims


def _conv_transpose_input(
    spatial: int, input_size: Size, weight: Array, grad_output: Array, stride: Ints, padding: Any,
    output_padding: Ints, groups: int, dilation: Ints, layout: str, precision: str | None, algorithm: str | None,
    engine: str | None, out: Array | None,
) -> Array:  # fmt: skip
    last = channels_last(layout)
    g = as_image(grad_output, "grad_output", spatial, last)
    w = as_weight(weight, "weight", spatial, last, False)
    check_same_dtype(w, "weight", g, "grad_output")
    shape = _image_size(input_size, spatial, grad_output.ndim)
    geometry = freeze(TRANSPOSE, stride, padding, output_padding, groups, dilation)
    kernel_shape = plain_shape(w, spatial)
    dims = _transpose_dims(first_shape(shape, spatial, last), kernel_shape, grad_output.shape, geometry, spatial, last)
    how = options(None, precision)
    result = allocate(out, shape, g, w)
    target = first_image(result, spatial, last)
    run("conv_forward", dims, g, w, None, target, how=how, engine=engine, algorithm=algorithm)
    return deliver(result, out)


def _conv_transpose_weight(
    spatial: int, input: Array, weight_size: Size, grad_output: Array, stride: Ints, padding: Any,
    output_padding: Ints, groups: int, dilation: Ints, layout: str, precision: str | None, algorithm: str | None,
    engine: str | None, out: Array | None,
) -> Array:  # fmt: skip
    last = channels_last(layout)
    x = as_image(input, "input", spatial, last)
    g = as_image(grad_output, "grad_output", spatial, last)
    check_same_dtype(g, "grad_output", x, "input")
    shape = checked_size(weight_size, "weight_size", (spatial + 2,))
    geometry = freeze(TRANSPOSE, stride, padding, output_padding, groups, dilation)
    small = plain_shape(x, spatial)
    kernel_shape = first_weight_shape(shape, spatial, last)
    dims = _transpose_dims(small, kernel_shape, grad_output.shape, geometry, spatial, last)
    how = options(None, precision)
    result = allocate(out, shape, x, g)
    target = arrange(result, weight_axes(shape, "weight", spatial, last))
    run("conv_weight_grad", dims, g, x, target, None, how=how, engine=engine, algorithm=algorithm)
    return deliver(result, out)


def conv_transpose1d_input(
    input_size: Size,
    weight: Array,
    grad_output: Array,
    stride: Ints = 1,
    padding: Any = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    layout: str = "NCHW",
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.conv_transpose1d` with respect to its input; as `conv_transpose2d_input`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.conv_transpose1d_input((1, 1, 3), np.ones((1, 1, 2)), np.ones((1, 1, 6)), stride=2)
    array([[[2., 2., 2.]]])
    """
    return _conv_transpose_input(
        1, input_size, weight, grad_output, stride, padding, output_padding, groups, dilation,
        layout, precision, algorithm, engine, out,
    )  # fmt: skip


def conv_transpose2d_input(
    input_size: Size,
    weight: Array,
    grad_output: Array,
    stride: Ints = 1,
    padding: Any = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    layout: str = "NCHW",
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.conv_transpose2d` with respect to its input: a convolution of ``grad_output``.

    Parameters
    ----------
    input_size : sequence of int
        Shape of the input, (N, C, H, W) or (C, H, W); with ``layout="NHWC"`` channels last.
    weight, grad_output : ndarray, float32 or float64
        The weight, and the gradient of the loss with respect to the output.
    stride, padding, output_padding, groups, dilation, layout, precision, algorithm, engine
        Those of the transposed convolution.
    out : ndarray, optional
        Array of shape ``input_size`` to store the result in.

    Returns
    -------
    ndarray
        Of shape ``input_size``.

    Raises
    ------
    ValueError, TypeError
        As in `fastconv.conv_transpose2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.conv_transpose2d_input((1, 8, 4, 4), np.ones((8, 3, 2, 2)), np.ones((1, 3, 8, 8)), stride=2).shape
    (1, 8, 4, 4)
    """
    return _conv_transpose_input(
        2, input_size, weight, grad_output, stride, padding, output_padding, groups, dilation,
        layout, precision, algorithm, engine, out,
    )  # fmt: skip


def conv_transpose3d_input(
    input_size: Size,
    weight: Array,
    grad_output: Array,
    stride: Ints = 1,
    padding: Any = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    layout: str = "NCHW",
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.conv_transpose3d` with respect to its input; as `conv_transpose2d_input`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> weight, grad_output = np.ones((1, 1, 2, 2, 2)), np.ones((1, 1, 4, 4, 4))
    >>> fc.grad.conv_transpose3d_input((1, 1, 2, 2, 2), weight, grad_output, stride=2).max()
    np.float64(8.0)
    """
    return _conv_transpose_input(
        3, input_size, weight, grad_output, stride, padding, output_padding, groups, dilation,
        layout, precision, algorithm, engine, out,
    )  # fmt: skip


def conv_transpose1d_weight(
    input: Array,
    weight_size: Size,
    grad_output: Array,
    stride: Ints = 1,
    padding: Any = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    layout: str = "NCHW",
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.conv_transpose1d` with respect to its weight; as `conv_transpose2d_weight`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.conv_transpose1d_weight(np.ones((1, 1, 3)), (1, 1, 2), np.ones((1, 1, 6)), stride=2)
    array([[[3., 3.]]])
    """
    return _conv_transpose_weight(
        1, input, weight_size, grad_output, stride, padding, output_padding, groups, dilation,
        layout, precision, algorithm, engine, out,
    )  # fmt: skip


def conv_transpose2d_weight(
    input: Array,
    weight_size: Size,
    grad_output: Array,
    stride: Ints = 1,
    padding: Any = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    layout: str = "NCHW",
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.conv_transpose2d` with respect to its weight.

    Parameters
    ----------
    input, grad_output : ndarray, float32 or float64
        The input, and the gradient of the loss with respect to the output.
    weight_size : sequence of int
        Shape of the weight, (C, K/groups, KH, KW); with ``layout="NHWC"`` (KH, KW, K/groups, C).
    stride, padding, output_padding, groups, dilation, layout, precision, algorithm, engine
        Those of the transposed convolution.
    out : ndarray, optional
        Array of shape ``weight_size`` to store the result in.

    Returns
    -------
    ndarray
        Of shape ``weight_size``, summed over the batch.

    Raises
    ------
    ValueError, TypeError
        As in `fastconv.conv_transpose2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.conv_transpose2d_weight(np.ones((1, 8, 4, 4)), (8, 3, 2, 2), np.ones((1, 3, 8, 8)), stride=2).shape
    (8, 3, 2, 2)
    """
    return _conv_transpose_weight(
        2, input, weight_size, grad_output, stride, padding, output_padding, groups, dilation,
        layout, precision, algorithm, engine, out,
    )  # fmt: skip


def conv_transpose3d_weight(
    input: Array,
    weight_size: Size,
    grad_output: Array,
    stride: Ints = 1,
    padding: Any = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    layout: str = "NCHW",
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.conv_transpose3d` with respect to its weight; as `conv_transpose2d_weight`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> image, grad_output = np.ones((1, 1, 2, 2, 2)), np.ones((1, 1, 4, 4, 4))
    >>> fc.grad.conv_transpose3d_weight(image, (1, 1, 2, 2, 2), grad_output, stride=2).max()
    np.float64(8.0)
    """
    return _conv_transpose_weight(
        3, input, weight_size, grad_output, stride, padding, output_padding, groups, dilation,
        layout, precision, algorithm, engine, out,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Max pooling
# ---------------------------------------------------------------------------------------------------------------------


def _winners(indices: object, shape: tuple[int, ...], axes: Axes, dims: PoolDims) -> Array:
    """Return indices of either form, of the caller's shape, as (N, C, OD, OH, OW) positions in the window, checked."""
    taps = dims.taps
    compact = arrays.winner_dtype(taps)
    if not isinstance(indices, np.ndarray) or (indices.dtype is not compact and indices.dtype not in (_FLAT, compact)):
        got = indices.dtype if isinstance(indices, np.ndarray) else type(indices).__name__
        raise TypeError(f"indices must be an int64 or {compact} array that max_pool returned, got {got}")
    if indices.shape != shape:
        if (1, *indices.shape) != shape and indices.shape != (1, *shape):  # a batch of one may go unsaid
            raise ValueError(f"indices must have the shape of grad_output, got {indices.shape}")
        indices = indices.reshape(shape)
    view = arrange(indices, axes)
    if indices.dtype is not compact and indices.dtype == _FLAT:
        return arrays.offsets_to_winners(view, dims)
    if indices.size and (most := highest(indices)) >= taps:
        raise ValueError(f"indices must be below the {taps} cells of the window, got {most}")
    return view


@lru_cache(maxsize=1024, typed=True)
def _max_pool_plan(
    spatial: int, last: bool, grad: tuple[int, ...], geometry: tuple[Any, ...], ceil_mode: bool, algorithm: str | None,
    setting: Setting,
) -> Plan:  # fmt: skip
    size, kernel_size, stride, padding, dilation = geometry
    engine, precision, threads = setting
    image = image_axes(grad, "grad_output", spatial, last)
    shape = _image_size(size, spatial, len(grad))
    dims = pool_dims(
        first_shape(shape, spatial, last), kernel_size, stride, padding, dilation, ceil_mode, input_name="input_size"
    )
    check_grad_output(grad, dims.batch, dims.channels, dims.output_size, spatial, last)
    chosen = kernel("max_pool_backward", dims, engine, algorithm)
    return Plan(dims, shape, (image,), chosen, kernel_options(None, precision, threads))


def _max_pool(
    spatial: int, input_size: Size, indices: Array, grad_output: Array, kernel_size: Ints, stride: Ints | None,
    padding: Ints, dilation: Ints, ceil_mode: bool, layout: str, algorithm: str | None, engine: str | None,
    out: Array | None,
) -> Array:  # fmt: skip
    last = channels_last(layout)
    g = check_array(grad_output, "grad_output")
    try:
        dims, shape, (image,), run_kernel, how = _max_pool_plan(
            spatial, last, g.shape,
            freeze(_POOL, input_size, kernel_size, stride, padding, dilation), ceil_mode, algorithm,
            settings(engine, None),
        )  # fmt: skip
    except TypeError:
        check_words(ceil_mode=ceil_mode, algorithm=algorithm, engine=engine)
        raise
    winners = _winners(indices, g.shape, image, dims)
    result = empty(shape, g.dtype) if out is None else allocate(out, shape, g, winners)
    run_kernel(arrange(g, image), winners, arrange(result, image), dims, how)
    return result if out is None else deliver(result, out)


def max_pool1d(
    input_size: Size,
    indices: Array,
    grad_output: Array,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    *,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.max_pool1d`; as `max_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> _, indices = fc.max_pool1d(np.array([[[1.0, 3.0, 2.0, 2.0]]]), 2, return_indices="compact")
    >>> fc.grad.max_pool1d((1, 1, 4), indices, np.array([[[5.0, 7.0]]]), 2)
    array([[[0., 5., 7., 0.]]])
    """
    return _max_pool(
        1, input_size, indices, grad_output, kernel_size, stride, padding, dilation, ceil_mode,
        layout, algorithm, engine, out,
    )  # fmt: skip


def max_pool2d(
    input_size: Size,
    indices: Array,
    grad_output: Array,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    *,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.max_pool2d` with respect to its input: each maximum gets the gradient of its window.

    Parameters
    ----------
    input_size : sequence of int
        Shape of the input, (N, C, H, W) or (C, H, W); with ``layout="NHWC"`` channels last.
    indices : ndarray
        As `fastconv.max_pool2d` returned them: int64 offsets, or the compact form.
    grad_output : ndarray, float32 or float64
        Gradient of the loss with respect to the output, in the output's shape.
    kernel_size, stride, padding, dilation, ceil_mode, layout, algorithm, engine
        Those of the pooling.
    out : ndarray, optional
        Array of shape ``input_size`` to store the result in.

    Returns
    -------
    ndarray
        Of shape ``input_size``; where windows overlap, the sum.

    Raises
    ------
    ValueError
        For shapes that don't fit, or indices that lie in no such window.
    TypeError
        For types that don't fit.

    References
    ----------
    MIT 6.036 lecture notes, "Convolutional Neural Networks", section 9.4.2.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> image = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> pooled, indices = fc.max_pool2d(image, 2, return_indices=True)
    >>> fc.grad.max_pool2d(image.shape, indices, pooled, 2)[0, 0, 1]
    array([0., 5., 0., 7.])
    """
    return _max_pool(
        2, input_size, indices, grad_output, kernel_size, stride, padding, dilation, ceil_mode,
        layout, algorithm, engine, out,
    )  # fmt: skip


def max_pool3d(
    input_size: Size,
    indices: Array,
    grad_output: Array,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    *,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.max_pool3d`; as `max_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> pooled, indices = fc.max_pool3d(np.ones((1, 1, 4, 4, 4)), 2, return_indices=True)
    >>> fc.grad.max_pool3d((1, 1, 4, 4, 4), indices, pooled, 2).sum()
    np.float64(8.0)
    """
    return _max_pool(
        3, input_size, indices, grad_output, kernel_size, stride, padding, dilation, ceil_mode,
        layout, algorithm, engine, out,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Average pooling
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=128, typed=True)  # divisors may be as many as outputs
def _avg_pool_plan(
    spatial: int, last: bool, grad: tuple[int, ...], geometry: tuple[Any, ...], ceil_mode: bool,
    count_include_pad: bool, dtype: np.dtype[Any], algorithm: str | None, setting: Setting,
) -> tuple[Plan, Array, Array | None]:  # fmt: skip
    """Return the plan of the depthwise convolution's gradient, its weight, and what gradients are divided by."""
    size, kernel_size, stride, padding, divisor = geometry
    engine, precision, threads = setting
    image = image_axes(grad, "grad_output", spatial, last)
    shape = _image_size(size, spatial, len(grad))
    pool = pool_dims(
        first_shape(shape, spatial, last), kernel_size, stride, padding, 1, ceil_mode, input_name="input_size"
    )
    check_grad_output(grad, pool.batch, pool.channels, pool.output_size, spatial, last)
    dims, weight, divisors = averaging(pool, count_include_pad, divisor, dtype, last)
    chosen = kernel("conv_input_grad", dims, engine, algorithm, precision)
    if algorithm is None and averages.has_windows_apart(dims):
        chosen = averages.conv_input_grad
    return Plan(dims, shape, (image,), chosen, kernel_options(None, precision, threads)), weight, divisors


def _avg_pool(
    spatial: int, input_size: Size, grad_output: Array, kernel_size: Ints, stride: Ints | None, padding: Ints,
    ceil_mode: bool, count_include_pad: bool, divisor_override: int | None, layout: str, algorithm: str | None,
    engine: str | None, out: Array | None,
) -> Array:  # fmt: skip
    last = channels_last(layout)
    g = check_array(grad_output, "grad_output")
    try:
        plan, weight, divisors = _avg_pool_plan(
            spatial, last, g.shape,
            freeze(_AVERAGE, input_size, kernel_size, stride, padding, divisor_override), ceil_mode,
            count_include_pad, g.dtype, algorithm, settings(engine, None),
        )  # fmt: skip
    except TypeError:
        check_words(ceil_mode=ceil_mode, count_include_pad=count_include_pad, algorithm=algorithm, engine=engine)
        raise
    dims, shape, (image,), run_kernel, how = plan
    share = arrange(g, image)
    if divisors is not None:
        share = share / divisors
    result = empty(shape, g.dtype) if out is None else allocate(out, shape, g)
    run_kernel(share, weight, None, arrange(result, image), dims, how)
    return result if out is None else deliver(result, out)


def avg_pool1d(
    input_size: Size,
    grad_output: Array,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    *,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.avg_pool1d`; as `avg_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.avg_pool1d((1, 1, 4), np.array([[[2.0, 6.0]]]), 2)
    array([[[1., 1., 3., 3.]]])
    """
    return _avg_pool(
        1, input_size, grad_output, kernel_size, stride, padding, ceil_mode, count_include_pad, None,
        layout, algorithm, engine, out,
    )  # fmt: skip


def avg_pool2d(
    input_size: Size,
    grad_output: Array,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.avg_pool2d` with respect to its input: each cell of a window gets an equal share.

    Parameters
    ----------
    input_size : sequence of int
        Shape of the input, (N, C, H, W) or (C, H, W); with ``layout="NHWC"`` channels last.
    grad_output : ndarray, float32 or float64
        Gradient of the loss with respect to the output, in the output's shape.
    kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout, algorithm, engine
        Those of the pooling.
    out : ndarray, optional
        Array of shape ``input_size`` to store the result in.

    Returns
    -------
    ndarray
        Of shape ``input_size``.

    Raises
    ------
    ValueError, TypeError
        For sizes, words or types that don't fit.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.avg_pool2d((1, 1, 2, 2), np.array([[[[4.0]]]]), 2)
    array([[[[1., 1.],
             [1., 1.]]]])
    """
    return _avg_pool(
        2, input_size, grad_output, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override,
        layout, algorithm, engine, out,
    )  # fmt: skip


def avg_pool3d(
    input_size: Size,
    grad_output: Array,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.avg_pool3d`; as `avg_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.grad.avg_pool3d((1, 1, 2, 2, 2), np.full((1, 1, 1, 1, 1), 8.0), 2).sum()
    np.float64(8.0)
    """
    return _avg_pool(
        3, input_size, grad_output, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override,
        layout, algorithm, engine, out,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Max-blur pooling
# ---------------------------------------------------------------------------------------------------------------------


def _fold(grad: Array, axis: int, border: tuple[int, int]) -> Array:
    """Return the gradient of a row that was reflected at both ends: reflections add to their originals."""
    before, after = border
    n = grad.shape[axis] - before - after
    cells = reflected(n, before, after)
    rows = np.moveaxis(grad, axis, 0)
    folded = rows[before : before + n].copy(order="K")
    for i in (*range(before), *range(before + n, len(rows))):
        folded[cells[i]] += rows[i]
    return np.moveaxis(folded, 0, axis)


def _max_blur_pool(
    spatial: int, input_size: Size, indices: Array, grad_output: Array, kernel_size: Ints, stride: Ints,
    filter_size: int, layout: str, algorithm: str | None, engine: str | None, out: Array | None,
) -> Array:  # fmt: skip
    last = channels_last(layout)
    g = as_image(grad_output, "grad_output", spatial, last)
    shape = _image_size(input_size, spatial, grad_output.ndim)
    plan = blur_plan(first_shape(shape, spatial, last), kernel_size, stride, filter_size, g.dtype, last)
    blur, dense = plan.blur, plan.dense
    check_grad_output(grad_output.shape, blur.batch, blur.out_channels, blur.output_size, spatial, last)
    padded = empty(image_shape(blur.batch, blur.in_channels, blur.input_size, spatial, last), g.dtype)
    maxima = first_image(padded, spatial, last)
    run("conv_input_grad", blur, g, plan.weight, None, maxima, how=options(), engine=engine, algorithm=algorithm)
    for axis, border in enumerate(plan.borders, start=2):
        if any(border):
            maxima = _fold(maxima, axis, border)
    wanted = result_shape(dense, dense.channels, dense.output_size, grad_output.ndim, last)
    winners = _winners(indices, wanted, image_axes(shape, "input_size", spatial, last), dense)
    result = allocate(out, shape, g, winners)
    target = first_image(result, spatial, last)
    run("max_pool_backward", dense, maxima, winners, target, how=options(), engine=engine, algorithm=None)
    return deliver(result, out)


def max_blur_pool1d(
    input_size: Size,
    indices: Array,
    grad_output: Array,
    kernel_size: Ints,
    stride: Ints,
    filter_size: int = 3,
    *,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.max_blur_pool1d`; as `max_blur_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> signal = np.array([[[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]])
    >>> pooled, indices = fc.max_blur_pool1d(signal, 2, 2, return_indices="compact")
    >>> fc.grad.max_blur_pool1d(signal.shape, indices, np.ones_like(pooled), 2, 2)
    array([[[0.  , 1.25, 0.5 , 0.75, 0.5 , 0.  ]]])
    """
    return _max_blur_pool(
        1, input_size, indices, grad_output, kernel_size, stride, filter_size, layout, algorithm, engine, out
    )


def max_blur_pool2d(
    input_size: Size,
    indices: Array,
    grad_output: Array,
    kernel_size: Ints,
    stride: Ints,
    filter_size: int = 3,
    *,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.max_blur_pool2d` with respect to its input.

    Parameters
    ----------
    input_size : sequence of int
        Shape of the input, (N, C, H, W) or (C, H, W); with ``layout="NHWC"`` channels last.
    indices : ndarray
        Those of the dense maxima, as `fastconv.max_blur_pool2d` returned them, in either form.
    grad_output : ndarray, float32 or float64
        Gradient of the loss with respect to the output, in the output's shape.
    kernel_size, stride, filter_size, layout, algorithm, engine
        Those of the pooling.
    out : ndarray, optional
        Array of shape ``input_size`` to store the result in.

    Returns
    -------
    ndarray
        Of shape ``input_size``.

    Raises
    ------
    ValueError, TypeError
        As in `max_pool2d`.

    References
    ----------
    R. Zhang, "Making Convolutional Networks Shift-Invariant Again", arXiv 1904.11486.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> image = np.arange(64.0).reshape(1, 1, 8, 8)
    >>> pooled, indices = fc.max_blur_pool2d(image, 2, 2, return_indices=True)
    >>> fc.grad.max_blur_pool2d(image.shape, indices, np.ones_like(pooled), 2, 2).sum()
    np.float64(16.0)
    """
    return _max_blur_pool(
        2, input_size, indices, grad_output, kernel_size, stride, filter_size, layout, algorithm, engine, out
    )


def max_blur_pool3d(
    input_size: Size,
    indices: Array,
    grad_output: Array,
    kernel_size: Ints,
    stride: Ints,
    filter_size: int = 3,
    *,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Gradient of `fastconv.max_blur_pool3d`; as `max_blur_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> pooled, indices = fc.max_blur_pool3d(np.ones((1, 1, 4, 4, 4)), 2, 2, return_indices=True)
    >>> fc.grad.max_blur_pool3d((1, 1, 4, 4, 4), indices, pooled, 2, 2).sum()
    np.float64(8.0)
    """
    return _max_blur_pool(
        3, input_size, indices, grad_output, kernel_size, stride, filter_size, layout, algorithm, engine, out
    )
