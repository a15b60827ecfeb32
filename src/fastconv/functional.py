"""Convolution and pooling of NumPy arrays: validate, allocate, select, run.

``conv1d/2d/3d``, ``conv_transpose1d/2d/3d``, ``max_pool1d/2d/3d``, ``avg_pool1d/2d/3d``, ``max_blur_pool1d/2d/3d``.
Argument names and order follow ``torch.nn.functional``. Gradients are in ``fastconv.grad``.

Average pooling is a depthwise convolution with ones, divided by the number of cells; max-blur pooling is a dense max
pooling followed by a depthwise convolution with a binomial filter. Neither has kernels of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import numpy as np

from . import arrays
from .arrays import (
    Axes,
    arrange,
    as_bias,
    as_image,
    as_weight,
    check_array,
    check_same_dtype,
    first_image,
    first_shape,
    first_weight_shape,
    flipped,
    image_axes,
    image_shape,
    plain_shape,
    weight_axes,
)
from .buffers import empty, packed
from .dims import ConvDims, Padding, PoolDims, channels_last, conv_dims, conv_transpose_shape, integer, pool_dims
from .kernels import averages
from .registry import Kernel, select
from .runtime import ACTIVATIONS, Options, Setting, check_engine, check_precision, get_config, settings

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Ints: TypeAlias = int | Sequence[int]
Indices: TypeAlias = bool | Literal["compact"]

#: Names of arguments that say which cells an operation sees.
CONV = ("stride", "padding", "dilation", "groups")
TRANSPOSE = ("stride", "padding", "output_padding", "groups", "dilation")
POOL = ("kernel_size", "stride", "padding", "dilation")
AVERAGE = ("kernel_size", "stride", "padding", "divisor_override")
BLUR = ("kernel_size", "stride", "filter_size")


# ---------------------------------------------------------------------------------------------------------------------
# What all operations share
# ---------------------------------------------------------------------------------------------------------------------


def options(activation: str | None = None, precision: str | None = None) -> Options:
    """Return what a kernel is told beside arrays and dims, from the arguments of the call and the settings in force."""
    try:
        return kernel_options(activation, *settings(None, precision)[1:])
    except TypeError:
        check_words(activation=activation, precision=precision)
        raise


@lru_cache
def kernel_options(activation: str | None, precision: str, threads: int) -> Options:
    """Return the same from words that are yet to be checked."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    return Options(activation, check_precision(precision), threads)


def freeze(names: tuple[str, ...], *values: Any) -> tuple[Any, ...]:
    """Return a hashable copy of arguments, each of which may be an int, None, a word or (nested) lists.

    Numbers must be integers: a cache that knows (1, 1) would take (1.0, True) for it.
    """
    return values if arrays.is_frozen(values) else tuple(map(_freeze, values, names))


def _freeze(value: Any, name: str) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(each, f"{name}[{i}]") for i, each in enumerate(value))
    if value is None or isinstance(value, str):
        return value
    check_sequence(value, name)
    return integer(value, name, -(2**31))


def check_words(**arguments: object) -> None:
    """Raise TypeError if an argument, such as a list, can be no word: called when a cache has refused the arguments."""
    for name, value in arguments.items():
        try:
            hash(value)
        except TypeError:
            wanted = "True or False" if name in ("ceil_mode", "count_include_pad") else "a word or None"
            raise TypeError(f"{name} must be {wanted}, got {value!r}") from None


def check_sequence(value: object, name: str) -> None:
    """Raise TypeError if ``name`` is a shape that the user gives, and ``value`` no sequence."""
    if name in ("input_size", "weight_size") and not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a sequence of integers, got {value!r}")


@lru_cache(maxsize=1024, typed=True)
def kernel(
    op: str, dims: ConvDims | PoolDims, engine: str | None, algorithm: str | None, precision: str = "highest"
) -> Kernel:
    """Return the kernel that the registry selects."""
    check_engine(engine)
    return select(op, dims, engine, algorithm, precision).kernel(op, dims)


def run(
    op: str, dims: ConvDims | PoolDims, *arrays: Array | None, how: Options, engine: str | None, algorithm: str | None
) -> None:
    """Select a kernel and run it on (N, C, D, H, W) and (K, C, KD, KH, KW) views, results last."""
    try:
        chosen = kernel(op, dims, get_config().engine if engine is None else engine, algorithm, how.precision)
    except TypeError:
        check_words(engine=engine, algorithm=algorithm)
        raise
    chosen(*arrays, dims, how)


class Plan(NamedTuple):
    """What the shapes and options of a call come to; kept, so that the next call of the kind has no shape algebra."""

    dims: Any  #: ConvDims or PoolDims
    shape: tuple[int, ...]  #: of the result, as the caller has it
    axes: tuple[Axes, ...]  #: of the caller's arrays, in the order of the kernel's
    kernel: Kernel
    options: Options


def allocate(out: object, shape: tuple[int, ...], *inputs: Array | None) -> Array:
    """Return an array for a result: ``out`` itself, checked, if a kernel may write into it, or a new one."""
    like = inputs[0]
    assert like is not None
    if out is not None:
        checked = arrays.check_out(out, shape, like.dtype)
        if arrays.storable(checked, *inputs):
            return checked
    return empty(shape, like.dtype)


def deliver(result: Array, out: Array | None) -> Array:
    """Return what ``allocate`` gave as the caller's array: perhaps by way of a copy to ``out``."""
    if out is None:
        return result
    if not np.may_share_memory(out, result):
        out[...] = result
    return out


def result_shape(
    dims: ConvDims | PoolDims, channels: int, size: tuple[int, int, int], ndim: int, last: bool
) -> tuple[int, ...]:
    """Return the shape of an image of that size in the caller's layout, with a batch axis if so many axes have one."""
    shape = image_shape(dims.batch, channels, size, dims.spatial, last)
    return shape if ndim == len(shape) else shape[1:]


# ---------------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------------


def _conv(
    spatial: int,
    input: Array,
    weight: Array,
    bias: Array | None,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    groups: int,
    layout: str,
    flip_kernel: bool,
    activation: str | None,
    precision: str | None,
    algorithm: str | None,
    engine: str | None,
    out: Array | None,
) -> Array:
    last = channels_last(layout)
    x, w = check_array(input, "input"), check_array(weight, "weight")
    check_same_dtype(w, "weight", x, "input")
    try:
        dims, shape, axes, run_kernel, how = _conv_plan(
            spatial, last, x.shape, w.shape, freeze(CONV, stride, padding, dilation, groups), algorithm, activation,
            settings(engine, precision),
        )  # fmt: skip
    except TypeError:
        check_words(activation=activation, precision=precision, algorithm=algorithm, engine=engine)
        raise
    b = None if bias is None else as_bias(bias, x, dims.out_channels)
    result = empty(shape, x.dtype) if out is None else allocate(out, shape, x, w, b)
    kept = packed()
    if kept is not None:
        how = Options(how.activation, how.precision, how.threads, kept)
    filters = flipped(arrange(w, axes[1]), flip_kernel)
    run_kernel(arrange(x, axes[0]), filters, b, arrange(result, axes[2]), dims, how)
    return result if out is None else deliver(result, out)


@lru_cache(maxsize=1024, typed=True)
def _conv_plan(
    spatial: int, last: bool, x: tuple[int, ...], w: tuple[int, ...], geometry: tuple[Any, ...], algorithm: str | None,
    activation: str | None, setting: Setting,
) -> Plan:  # fmt: skip
    engine, precision, threads = setting
    image, weight = image_axes(x, "input", spatial, last), weight_axes(w, "weight", spatial, last)
    sizes = first_shape(x, spatial, last), first_weight_shape(w, spatial, last)
    stride, padding, dilation, groups = geometry
    dims = conv_dims(*sizes, stride, padding, dilation, groups, last)
    how = kernel_options(activation, precision, threads)
    chosen = kernel("conv_forward", dims, engine, algorithm, precision)
    shape = result_shape(dims, dims.out_channels, dims.output_size, len(x), last)
    return Plan(dims, shape, (image, weight, image), chosen, how)


def conv1d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    layout: str = "NCHW",
    flip_kernel: bool = False,
    activation: str | None = None,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Convolve signals with a filter bank.

    Shapes: ``input`` (N, C, L) or (C, L), ``weight`` (K, C/groups, k); with ``layout="NHWC"`` (N, L, C) and
    (k, C/groups, K). Everything else is as in `conv2d`.

    Examples
    --------
    The left-edge detector F1 = (-1, +1) of the lecture notes; ``"same_lower"`` is their Y_i = F . (X_{i-1}, X_i).

    >>> import numpy as np, fastconv as fc
    >>> image = np.array([[[0, 1, 1, 1, 0, 1, 0, 0]]], np.float32)
    >>> fc.conv1d(image, np.array([[[-1, 1]]], np.float32), padding="same_lower")
    array([[[ 0.,  1.,  0.,  0., -1.,  1., -1.,  0.]]], dtype=float32)
    """
    return _conv(
        1, input, weight, bias, stride, padding, dilation, groups,
        layout, flip_kernel, activation, precision, algorithm, engine, out,
    )  # fmt: skip


def conv2d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    layout: str = "NCHW",
    flip_kernel: bool = False,
    activation: str | None = None,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Convolve images with a filter bank (a correlation, as in all neural-network libraries).

    output[n, k, y, x] = bias[k] + sum over c, i, j of
    weight[k, c, i, j] * input[n, c, y * stride + i * dilation - padding, x * stride + j * dilation - padding]

    Parameters
    ----------
    input : ndarray, float32 or float64
        (N, C, H, W), or (C, H, W) without a batch; with ``layout="NHWC"`` (N, H, W, C) or (H, W, C). Any strides.
    weight : ndarray, dtype of input
        (K, C/groups, KH, KW); with ``layout="NHWC"`` (KH, KW, C/groups, K).
    bias : ndarray, dtype of input, optional
        (K,).
    stride, dilation : int or sequence of int
        In pixels, one for all dimensions or one for each.
    padding : int, sequence, "valid", "same" or "same_lower"
        Zeros around the image: one number, one for each dimension, a (before, after) pair for each, or a word.
        "same" gives ceil(H / stride) rows, an odd surplus after the image; "same_lower" puts it before.
    groups : int
        Channel groups that are convolved independently; ``groups=C`` is a depthwise convolution.
    layout : {"NCHW", "NHWC"}
        Where the channels are, for input, weight and output alike.
    flip_kernel : bool
        Rotate the filters by half a turn: the convolution of signal processing.
    activation : {None, "relu"}
        Applied, after the bias, in the pass that stores the output.
    precision : {"highest", "high", "medium"}, optional
        Promise about error: no worse than plain float32 accumulation, 1e-5, 1e-2. Default: that of the context.
    algorithm : str, optional
        "winograd", "planar", "direct", "im2col" or "naive" instead of the registry's choice; see `explain`.
    engine : {"cython", "numba", "numpy"}, optional
        Default: that of the context, or the best there is.
    out : ndarray, optional
        Array of the exact shape and dtype to store the output in.

    Returns
    -------
    ndarray
        (N, K, OH, OW), or (K, OH, OW) for an input without a batch; channels last with ``layout="NHWC"``.

    Raises
    ------
    ValueError
        For shapes, sizes or words that don't fit.
    TypeError
        For anything but float32 and float64 arrays of one type.

    References
    ----------
    MIT 6.036 lecture notes, "Convolutional Neural Networks", section 9.1.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> images = np.ones((2, 3, 32, 32), np.float32)
    >>> filters = np.ones((8, 3, 5, 5), np.float32)
    >>> fc.conv2d(images, filters, stride=2, padding=2).shape
    (2, 8, 16, 16)
    """
    return _conv(
        2, input, weight, bias, stride, padding, dilation, groups,
        layout, flip_kernel, activation, precision, algorithm, engine, out,
    )  # fmt: skip


def conv3d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    layout: str = "NCHW",
    flip_kernel: bool = False,
    activation: str | None = None,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Convolve volumes with a filter bank.

    Shapes: ``input`` (N, C, D, H, W) or (C, D, H, W), ``weight`` (K, C/groups, KD, KH, KW); with ``layout="NHWC"``
    (N, D, H, W, C) and (KD, KH, KW, C/groups, K). Everything else is as in `conv2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.conv3d(np.ones((1, 2, 8, 8, 8)), np.ones((4, 2, 3, 3, 3)), padding="same").shape
    (1, 4, 8, 8, 8)
    """
    return _conv(
        3, input, weight, bias, stride, padding, dilation, groups,
        layout, flip_kernel, activation, precision, algorithm, engine, out,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Transposed convolution: the gradient of a convolution's input, plus a bias
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024, typed=True)
def transpose_dims(
    x: tuple[int, ...],
    w: tuple[int, ...],
    stride: Ints,
    padding: Any,
    output_padding: Ints,
    groups: int,
    dilation: Ints,
    last: bool,
) -> ConvDims:
    """Return the dims of the convolution whose input gradient the transposed convolution is.

    Shapes x and w are (N, C, *spatial) and (C, K/groups, *kernel).
    """
    large = conv_transpose_shape(x, w, stride, padding, output_padding, groups, dilation)
    dims = conv_dims(large, w, stride, padding, dilation, groups, last)
    depth, height, width = (1,) * (5 - len(x)) + x[2:]
    return dims._replace(output_size=(depth, height, width))  # less than dims has if output_padding reaches the stride


def _conv_transpose(
    spatial: int,
    input: Array,
    weight: Array,
    bias: Array | None,
    stride: Ints,
    padding: Any,
    output_padding: Ints,
    groups: int,
    dilation: Ints,
    layout: str,
    activation: str | None,
    precision: str | None,
    algorithm: str | None,
    engine: str | None,
    out: Array | None,
) -> Array:
    last = channels_last(layout)
    x = as_image(input, "input", spatial, last)
    w = as_weight(weight, "weight", spatial, last, False)
    check_same_dtype(w, "weight", x, "input")
    dims = transpose_dims(
        plain_shape(x, spatial), plain_shape(w, spatial),
        *freeze(TRANSPOSE, stride, padding, output_padding, groups, dilation), last,
    )  # fmt: skip
    b = as_bias(bias, x, dims.in_channels)
    how = options(activation, precision)
    result = allocate(out, result_shape(dims, dims.in_channels, dims.input_size, input.ndim, last), x, w, b)
    target = first_image(result, spatial, last)
    run("conv_input_grad", dims, x, w, b, target, how=how, engine=engine, algorithm=algorithm)
    return deliver(result, out)


def conv_transpose1d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Ints = 1,
    padding: Any = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    layout: str = "NCHW",
    activation: str | None = None,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Transposed convolution of signals; shapes and arguments as in `conv_transpose2d` and `conv1d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.conv_transpose1d(np.ones((1, 1, 3)), np.ones((1, 1, 2)), stride=2)
    array([[[1., 1., 1., 1., 1., 1.]]])
    """
    return _conv_transpose(
        1, input, weight, bias, stride, padding, output_padding, groups, dilation,
        layout, activation, precision, algorithm, engine, out,
    )  # fmt: skip


def conv_transpose2d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Ints = 1,
    padding: Any = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    layout: str = "NCHW",
    activation: str | None = None,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Transposed convolution of images: the gradient of `conv2d` with respect to its input, plus a bias.

    Parameters
    ----------
    input : ndarray, float32 or float64
        (N, C, H, W) or (C, H, W); with ``layout="NHWC"`` channels last.
    weight : ndarray, dtype of input
        (C, K/groups, KH, KW): the weights of the convolution that is transposed, which has C filters; with
        ``layout="NHWC"`` (KH, KW, K/groups, C).
    bias : ndarray, dtype of input, optional
        (K,).
    stride, padding, dilation, groups
        Those of the convolution that is transposed; padding as int, one for each dimension, or pairs.
    output_padding : int or sequence of int
        Rows and columns added at the end of the output, less than stride or dilation.
    layout, activation, precision, algorithm, engine, out
        As in `conv2d`.

    Returns
    -------
    ndarray
        (N, K, OH, OW), OH = (H - 1) * stride - 2 * padding + dilation * (KH - 1) + output_padding + 1.

    Raises
    ------
    ValueError, TypeError
        As in `conv2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.conv_transpose2d(np.ones((1, 8, 4, 4)), np.ones((8, 3, 3, 3)), stride=2, padding=1, output_padding=1).shape
    (1, 3, 8, 8)
    """
    return _conv_transpose(
        2, input, weight, bias, stride, padding, output_padding, groups, dilation,
        layout, activation, precision, algorithm, engine, out,
    )  # fmt: skip


def conv_transpose3d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Ints = 1,
    padding: Any = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    layout: str = "NCHW",
    activation: str | None = None,
    precision: str | None = None,
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Array:
    """Transposed convolution of volumes; shapes and arguments as in `conv_transpose2d` and `conv3d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.conv_transpose3d(np.ones((1, 2, 3, 3, 3)), np.ones((2, 4, 2, 2, 2)), stride=2).shape
    (1, 4, 6, 6, 6)
    """
    return _conv_transpose(
        3, input, weight, bias, stride, padding, output_padding, groups, dilation,
        layout, activation, precision, algorithm, engine, out,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Max pooling
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024, typed=True)
def _max_pool_plan(
    spatial: int, last: bool, x: tuple[int, ...], geometry: tuple[Any, ...], ceil_mode: bool, algorithm: str | None,
    setting: Setting,
) -> Plan:  # fmt: skip
    engine, precision, threads = setting
    image = image_axes(x, "input", spatial, last)
    kernel_size, stride, padding, dilation = geometry
    dims = pool_dims(first_shape(x, spatial, last), kernel_size, stride, padding, dilation, ceil_mode)
    shape = result_shape(dims, dims.channels, dims.output_size, len(x), last)
    chosen = kernel("max_pool_forward", dims, engine, algorithm)
    return Plan(dims, shape, (image,), chosen, kernel_options(None, precision, threads))


def _check_return_indices(value: object) -> None:
    if isinstance(value, np.ndarray) or value not in (False, True, "compact"):
        raise ValueError(f"return_indices must be False, True or 'compact', got {value!r}")


def _max_pool(
    spatial: int,
    input: Array,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    return_indices: Indices,
    layout: str,
    algorithm: str | None,
    engine: str | None,
    out: Array | None,
) -> Any:
    last = channels_last(layout)
    x = check_array(input, "input")
    if return_indices is not False:
        _check_return_indices(return_indices)
    try:
        dims, shape, (image,), run_kernel, how = _max_pool_plan(
            spatial, last, x.shape, freeze(POOL, kernel_size, stride, padding, dilation), ceil_mode, algorithm,
            settings(engine, None),
        )  # fmt: skip
    except TypeError:
        check_words(ceil_mode=ceil_mode, algorithm=algorithm, engine=engine)
        raise
    result = empty(shape, x.dtype) if out is None else allocate(out, shape, x)
    winners = empty(shape, arrays.winner_dtype(dims.taps)) if return_indices else None
    where = None if winners is None else arrange(winners, image)
    run_kernel(arrange(x, image), arrange(result, image), where, dims, how)
    pooled = result if out is None else deliver(result, out)
    if winners is None or where is None:
        return pooled
    if return_indices != "compact":  # True, or what equals it, such as numpy.True_
        winners = np.empty(shape, np.int64)
        arrange(winners, image)[...] = arrays.winners_to_offsets(where, dims)
    return pooled, winners


@overload
def max_pool1d(
    input: Array, kernel_size: Ints, stride: Ints | None = ..., padding: Ints = ..., dilation: Ints = ...,
    ceil_mode: bool = ..., return_indices: Literal[False] = ..., *, layout: str = ...,
    algorithm: str | None = ..., engine: str | None = ..., out: Array | None = ...,
) -> Array: ...  # fmt: skip
@overload
def max_pool1d(
    input: Array, kernel_size: Ints, stride: Ints | None = ..., padding: Ints = ..., dilation: Ints = ...,
    ceil_mode: bool = ..., return_indices: Indices = ..., *, layout: str = ...,
    algorithm: str | None = ..., engine: str | None = ..., out: Array | None = ...,
) -> Any: ...  # fmt: skip
def max_pool1d(
    input: Array,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: Indices = False,
    *,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Any:
    """Max pooling of signals, (N, C, L) or (C, L); arguments as in `max_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.max_pool1d(np.array([[[1.0, 3.0, 2.0, 2.0]]]), 2, return_indices=True)
    (array([[[3., 2.]]]), array([[[1, 2]]]))
    """
    return _max_pool(
        1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, layout, algorithm, engine, out
    )


@overload
def max_pool2d(
    input: Array, kernel_size: Ints, stride: Ints | None = ..., padding: Ints = ..., dilation: Ints = ...,
    ceil_mode: bool = ..., return_indices: Literal[False] = ..., *, layout: str = ...,
    algorithm: str | None = ..., engine: str | None = ..., out: Array | None = ...,
) -> Array: ...  # fmt: skip
@overload
def max_pool2d(
    input: Array, kernel_size: Ints, stride: Ints | None = ..., padding: Ints = ..., dilation: Ints = ...,
    ceil_mode: bool = ..., return_indices: Indices = ..., *, layout: str = ...,
    algorithm: str | None = ..., engine: str | None = ..., out: Array | None = ...,
) -> Any: ...  # fmt: skip
def max_pool2d(
    input: Array,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: Indices = False,
    *,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Any:
    """Max pooling of images: the largest value in each window.

    The first maximum wins a tie, a NaN wins over numbers, padding never wins.

    Parameters
    ----------
    input : ndarray, float32 or float64
        (N, C, H, W) or (C, H, W); with ``layout="NHWC"`` channels last. Any strides.
    kernel_size : int or sequence of int
        Size of the window.
    stride : int or sequence of int, optional
        Step of the window; None means ``kernel_size``.
    padding : int or sequence of int
        Cells of minus infinity around the image, at most half of the window.
    dilation : int or sequence of int
        Step between the cells of a window.
    ceil_mode : bool
        Keep a last, partial window.
    return_indices : bool or "compact"
        Return where the maxima are, too: as int64 offsets in the plane (True), or as positions in the window, one byte
        each (two if the window has more than 256 cells). `fastconv.grad.max_pool2d` takes either.
    layout, algorithm, engine, out
        As in `conv2d`.

    Returns
    -------
    ndarray, or (ndarray, ndarray)
        (N, C, OH, OW), and the indices of the same shape if asked for.

    Raises
    ------
    ValueError, TypeError
        For sizes, words or types that don't fit.

    References
    ----------
    MIT 6.036 lecture notes, "Convolutional Neural Networks", section 9.2.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.max_pool2d(np.zeros((1, 3, 64, 64), np.float32), 2).shape
    (1, 3, 32, 32)
    """
    return _max_pool(
        2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, layout, algorithm, engine, out
    )


@overload
def max_pool3d(
    input: Array, kernel_size: Ints, stride: Ints | None = ..., padding: Ints = ..., dilation: Ints = ...,
    ceil_mode: bool = ..., return_indices: Literal[False] = ..., *, layout: str = ...,
    algorithm: str | None = ..., engine: str | None = ..., out: Array | None = ...,
) -> Array: ...  # fmt: skip
@overload
def max_pool3d(
    input: Array, kernel_size: Ints, stride: Ints | None = ..., padding: Ints = ..., dilation: Ints = ...,
    ceil_mode: bool = ..., return_indices: Indices = ..., *, layout: str = ...,
    algorithm: str | None = ..., engine: str | None = ..., out: Array | None = ...,
) -> Any: ...  # fmt: skip
def max_pool3d(
    input: Array,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: Indices = False,
    *,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Any:
    """Max pooling of volumes, (N, C, D, H, W) or (C, D, H, W); arguments as in `max_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.max_pool3d(np.zeros((1, 2, 8, 8, 8)), 2).shape
    (1, 2, 4, 4, 4)
    """
    return _max_pool(
        3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, layout, algorithm, engine, out
    )


# ---------------------------------------------------------------------------------------------------------------------
# Average pooling
# ---------------------------------------------------------------------------------------------------------------------


class Averaging(NamedTuple):
    """An average as a depthwise convolution."""

    dims: ConvDims
    weight: Array  #: (C, 1, KD, KH, KW), a single number in memory
    divisors: Array | None  #: what sums are divided by, broadcastable to (OD, OH, OW); None if that is in the weight


def averaging(
    dims: PoolDims, count_include_pad: bool, divisor_override: int | None, dtype: np.dtype[Any], last: bool
) -> Averaging:
    """Return the convolution that computes averages of images in the caller's layout.

    Its weight is 1, or the reciprocal of what all sums are divided by if that is a power of two: such a weight rounds
    nothing, and leaves nothing to divide by.
    """
    divisor = check_average(count_include_pad, divisor_override)
    divisors = _window_counts(dims, count_include_pad) if divisor is None else np.full((1, 1, 1), float(divisor))
    if divisors.size and (divisors == divisors.flat[0]).all():
        divisors = divisors[:1, :1, :1]
    exact = divisors.size == 1 and abs(math.frexp(divisors.item())[0]) == 0.5
    weight = np.asarray(1 / divisors.item() if exact else 1, dtype)
    weights = np.broadcast_to(weight, (dims.channels, 1, *dims.kernel_size))
    return Averaging(dims.as_depthwise(last), weights, None if exact else divisors.astype(dtype))


def check_average(count_include_pad: Any, divisor_override: object) -> int | None:
    """Return ``divisor_override`` as an int or None, or say what is wrong with what an average divides by."""
    if np.ndim(count_include_pad) or count_include_pad not in (False, True):
        raise TypeError(f"count_include_pad must be True or False, got {count_include_pad!r}")
    if divisor_override is None:
        return None
    divisor = integer(divisor_override, "divisor_override", -(2**31))
    if not divisor:
        raise ValueError("divisor_override must not be 0, got 0")
    return divisor


def _window_counts(dims: PoolDims, count_include_pad: bool) -> Array:
    """Return by how many cells an average divides, (OD, OH, OW)."""
    counts = np.ones((1, 1, 1))
    for axis in range(3):
        n, pad = dims.input_size[axis], dims.pad_before[axis]
        start = np.arange(dims.output_size[axis]) * dims.stride[axis] - pad
        stop = np.minimum(start + dims.kernel_size[axis], n + pad)  # in ceil mode a window may reach past the padding
        if not count_include_pad:
            start, stop = np.maximum(start, 0), np.minimum(stop, n)
        counts = counts * (stop - start).reshape([-1 if i == axis else 1 for i in range(3)])
    return counts


def _avg_pool(
    spatial: int,
    input: Array,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    layout: str,
    algorithm: str | None,
    engine: str | None,
    out: Array | None,
) -> Array:
    last = channels_last(layout)
    x = check_array(input, "input")
    try:
        plan, weight, divisors = _avg_pool_plan(
            spatial, last, x.shape, freeze(AVERAGE, kernel_size, stride, padding, divisor_override), ceil_mode,
            count_include_pad, x.dtype, algorithm, settings(engine, None),
        )  # fmt: skip
    except TypeError:
        check_words(ceil_mode=ceil_mode, count_include_pad=count_include_pad, algorithm=algorithm, engine=engine)
        raise
    dims, shape, (image,), run_kernel, how = plan
    result = empty(shape, x.dtype) if out is None else allocate(out, shape, x)
    target = arrange(result, image)
    run_kernel(arrange(x, image), weight, None, target, dims, how)
    if divisors is not None:
        target /= divisors
    return result if out is None else deliver(result, out)


@lru_cache(maxsize=128, typed=True)  # divisors may be as many as outputs
def _avg_pool_plan(
    spatial: int, last: bool, x: tuple[int, ...], geometry: tuple[Any, ...], ceil_mode: bool, count_include_pad: bool,
    dtype: np.dtype[Any], algorithm: str | None, setting: Setting,
) -> tuple[Plan, Array, Array | None]:  # fmt: skip
    """Return the plan of the depthwise convolution, its weight, and what its sums are divided by."""
    image = image_axes(x, "input", spatial, last)
    kernel_size, stride, padding, divisor = geometry
    pool = pool_dims(first_shape(x, spatial, last), kernel_size, stride, padding, 1, ceil_mode)
    dims, weight, divisors = averaging(pool, count_include_pad, divisor, dtype, last)
    shape = result_shape(pool, pool.channels, pool.output_size, len(x), last)
    engine, precision, threads = setting
    chosen = kernel("conv_forward", dims, engine, algorithm, precision)
    if algorithm is None and averages.sees_whole_image(dims):
        chosen = averages.conv_forward
    return Plan(dims, shape, (image,), chosen, kernel_options(None, precision, threads)), weight, divisors


def avg_pool1d(
    input: Array,
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
    """Average pooling of signals, (N, C, L) or (C, L); arguments as in `avg_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.avg_pool1d(np.array([[[1.0, 3.0, 2.0, 2.0]]]), 2)
    array([[[2., 2.]]])
    """
    return _avg_pool(
        1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None, layout, algorithm, engine, out
    )


def avg_pool2d(
    input: Array,
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
    """Average pooling of images: the mean of each window.

    Parameters
    ----------
    input : ndarray, float32 or float64
        (N, C, H, W) or (C, H, W); with ``layout="NHWC"`` channels last. Any strides.
    kernel_size, stride, padding, ceil_mode
        As in `max_pool2d`; padding is with zeros.
    count_include_pad : bool
        Whether a mean divides by all cells of the window or only by those inside the image.
    divisor_override : int, optional
        Divide by this instead.
    layout, algorithm, engine, out
        As in `conv2d`; the algorithm is that of a depthwise convolution. Without one, whole images are summed at once.

    Returns
    -------
    ndarray
        (N, C, OH, OW).

    Raises
    ------
    ValueError, TypeError
        For sizes, words or types that don't fit.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.avg_pool2d(np.ones((1, 1, 4, 4)), 3, stride=2, padding=1, count_include_pad=False)
    array([[[[1., 1.],
             [1., 1.]]]])
    """
    return _avg_pool(
        2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override,
        layout, algorithm, engine, out,
    )  # fmt: skip


def avg_pool3d(
    input: Array,
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
    """Average pooling of volumes, (N, C, D, H, W) or (C, D, H, W); arguments as in `avg_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.avg_pool3d(np.zeros((1, 2, 8, 8, 8)), 2).shape
    (1, 2, 4, 4, 4)
    """
    return _avg_pool(
        3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override,
        layout, algorithm, engine, out,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Max-blur pooling
# ---------------------------------------------------------------------------------------------------------------------


class BlurPlan(NamedTuple):
    """The two steps of a max-blur pooling, and the reflected border between them."""

    dense: PoolDims
    blur: ConvDims
    borders: tuple[tuple[int, int], ...]  #: cells that reflection adds before and after, for the three dimensions
    weight: Array  #: (C, 1, KD, KH, KW) binomial filter


def blur_plan(
    x: tuple[int, ...], kernel_size: Ints, stride: Ints, filter_size: int, dtype: np.dtype[Any], last: bool
) -> BlurPlan:
    """Return the plan of a max-blur pooling of an image of the (N, C, *spatial) shape x in the caller's layout."""
    return _blur_plan(x, freeze(BLUR, kernel_size, stride, filter_size), dtype, last)


@lru_cache
def _blur_plan(x: tuple[int, ...], geometry: tuple[Any, ...], dtype: np.dtype[Any], last: bool) -> BlurPlan:
    kernel_size, stride, filter_size = geometry
    spatial = len(x) - 2
    size = integer(filter_size, "filter_size", 1)
    if size > 64:
        raise ValueError(f"filter_size must be at most 64, got {size}")
    dense = pool_dims(x, kernel_size, 1, 0, 1, False)
    row = np.array([math.comb(size - 1, i) for i in range(size)], np.float64) / 2 ** (size - 1)
    rows = [row if axis >= 3 - spatial else np.ones(1) for axis in range(3)]
    cube = np.einsum("d,h,w->dhw", *rows).astype(dtype)
    borders = tuple(((len(r) - 1) // 2, len(r) // 2) for r in rows)
    padded = tuple(n + sum(b) for n, b in zip(dense.output_size, borders, strict=True))
    shape = (x[0], x[1], *padded[3 - spatial :])
    blur = conv_dims(shape, (x[1], 1) + (size,) * spatial, stride, 0, 1, x[1], last)
    return BlurPlan(dense, blur, borders, np.broadcast_to(cube, (x[1], 1, *cube.shape)))


def reflected(n: int, before: int, after: int) -> Array:
    """Return, for each cell of a reflected row, the cell of the row of ``n`` that it shows."""
    return np.pad(np.arange(n), (before, after), mode="reflect" if n > 1 else "edge")


def _max_blur_pool(
    spatial: int,
    input: Array,
    kernel_size: Ints,
    stride: Ints,
    filter_size: int,
    return_indices: Indices,
    layout: str,
    algorithm: str | None,
    engine: str | None,
    out: Array | None,
) -> Any:
    last = channels_last(layout)
    x = as_image(input, "input", spatial, last)
    plan = blur_plan(plain_shape(x, spatial), kernel_size, stride, filter_size, x.dtype, last)
    blur = plan.blur
    result = allocate(out, result_shape(blur, blur.out_channels, blur.output_size, input.ndim, last), x)
    dense = _max_pool(spatial, input, kernel_size, 1, 0, 1, False, return_indices, layout, None, engine, None)
    maxima = dense[0] if return_indices else dense
    for axis, (before, after) in zip(image_axes(input.shape, "input", spatial, last)[2:], plan.borders, strict=True):
        if before or after:
            maxima = maxima.take(reflected(maxima.shape[axis], before, after), axis)
    image, target = first_image(maxima, spatial, last), first_image(result, spatial, last)
    run("conv_forward", blur, image, plan.weight, None, target, how=options(), engine=engine, algorithm=algorithm)
    blurred = deliver(result, out)
    return (blurred, dense[1]) if return_indices else blurred


def max_blur_pool1d(
    input: Array,
    kernel_size: Ints,
    stride: Ints,
    filter_size: int = 3,
    *,
    return_indices: Indices = False,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Any:
    """Max-blur pooling of signals, (N, C, L) or (C, L); arguments as in `max_blur_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.max_blur_pool1d(np.array([[[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]]), 2, 2)
    array([[[1.  , 0.25, 0.  ]]])
    """
    return _max_blur_pool(1, input, kernel_size, stride, filter_size, return_indices, layout, algorithm, engine, out)


def max_blur_pool2d(
    input: Array,
    kernel_size: Ints,
    stride: Ints,
    filter_size: int = 3,
    *,
    return_indices: Indices = False,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Any:
    """Anti-aliased max pooling: the maxima of all windows (stride 1), blurred and then subsampled.

    A shift of the image by one pixel changes the result much less than that of `max_pool2d`. The blur is the binomial
    filter (1, 2, 1)/4 and its like; at the border the maxima are reflected, as in the authors' own code, so that a
    constant image stays constant.

    Parameters
    ----------
    input : ndarray, float32 or float64
        (N, C, H, W) or (C, H, W); with ``layout="NHWC"`` channels last.
    kernel_size : int or sequence of int
        Size of the max window.
    stride : int or sequence of int
        Step of the subsampling.
    filter_size : int
        Size of the blur, 1 (none) to 64.
    return_indices : bool or "compact"
        Return the indices of the dense maxima, too, for `fastconv.grad.max_blur_pool2d`.
    layout, algorithm, engine, out
        As in `conv2d`; the algorithm is that of the blur, a depthwise convolution.

    Returns
    -------
    ndarray, or (ndarray, ndarray)
        (N, C, ceil((H - KH + 1) / stride), ...), and the indices, (N, C, H - KH + 1, ...), if asked for.

    Raises
    ------
    ValueError, TypeError
        For sizes, words or types that don't fit.

    References
    ----------
    R. Zhang, "Making Convolutional Networks Shift-Invariant Again", arXiv 1904.11486.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.max_blur_pool2d(np.ones((1, 3, 32, 32), np.float32), 2, 2).shape
    (1, 3, 16, 16)
    """
    return _max_blur_pool(2, input, kernel_size, stride, filter_size, return_indices, layout, algorithm, engine, out)


def max_blur_pool3d(
    input: Array,
    kernel_size: Ints,
    stride: Ints,
    filter_size: int = 3,
    *,
    return_indices: Indices = False,
    layout: str = "NCHW",
    algorithm: str | None = None,
    engine: str | None = None,
    out: Array | None = None,
) -> Any:
    """Max-blur pooling of volumes, (N, C, D, H, W) or (C, D, H, W); arguments as in `max_blur_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.max_blur_pool3d(np.ones((1, 2, 9, 9, 9)), 2, 2).shape
    (1, 2, 4, 4, 4)
    """
    return _max_blur_pool(3, input, kernel_size, stride, filter_size, return_indices, layout, algorithm, engine, out)
