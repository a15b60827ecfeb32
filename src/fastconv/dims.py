"""All shape algebra and all shape errors, in one place.

========================  =========================================================================================
``ConvDims``              one convolution: sizes, stride, padding, dilation, groups; built by ``conv_dims``
``PoolDims``              one pooling: the same without weights; built by ``pool_dims``
``conv_transpose_shape``  the output of a transposed convolution, so that ``conv_dims`` can describe it backwards
========================  =========================================================================================

1-D and 2-D problems are 3-D problems with leading ones, so that a single kernel family serves them all.

    n_out = floor((n + pad_before + pad_after - dilation * (k - 1) - 1) / stride) + 1

which, for dilation 1 and equal padding p, is the ceil((n + 2p - (k - 1)) / stride) of the lecture notes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

Triple = tuple[int, int, int]
Padding = int | str | Sequence[Any]
Slices = tuple[slice, ...]

LAYOUTS = {
    "NCHW": "channels-first", "NCL": "channels-first", "NCW": "channels-first", "NCDHW": "channels-first",
    "NHWC": "channels-last", "NLC": "channels-last", "NWC": "channels-last", "NDHWC": "channels-last",
}  # fmt: skip


class ConvDims(NamedTuple):
    """One convolution, completely described; every tuple is (depth, height, width)."""

    spatial: int  #: spatial dimensions of the caller's arrays: 1, 2 or 3
    batch: int
    in_channels: int
    out_channels: int
    groups: int
    input_size: Triple
    kernel_size: Triple
    stride: Triple
    pad_before: Triple
    pad_after: Triple
    dilation: Triple
    output_size: Triple
    channels_last: bool = False  #: in the caller's arrays; what it says about them is for the choice of an algorithm

    @property
    def taps(self) -> int:
        """Number of cells of one filter, without channels."""
        depth, height, width = self.kernel_size
        return depth * height * width

    @property
    def group_in_channels(self) -> int:
        """Input channels that one filter sees."""
        return self.in_channels // self.groups

    @property
    def group_out_channels(self) -> int:
        """Filters in one group."""
        return self.out_channels // self.groups

    @property
    def depthwise(self) -> bool:
        """Whether every filter sees a single channel of several."""
        return self.groups > 1 and self.group_in_channels == 1

    @property
    def reduction(self) -> int:
        """Products summed for one output element."""
        return self.group_in_channels * self.taps

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiplication and an addition for each weight and output element."""
        return 2 * self.batch * self.out_channels * math.prod(self.output_size) * self.reduction

    def input_grad_parts(self) -> tuple[InputGradPart, ...]:
        """Return the gradient of the input as stride-1 convolutions of ``grad_output``, one for each phase of stride.

        grad_input[i] = sum over taps t with (i + pad - t * dilation) divisible by the stride of
        grad_output[(i + pad - t * dilation) / stride] * weight[t]. Positions i of one phase i = r (mod stride) share
        their taps, every step-th one: a dense stride-1 convolution, and no zero is ever inserted or multiplied.

        Examples
        --------
        >>> dims = conv_dims((1, 1, 6), (1, 1, 3), 2, 1, 1, 1)
        >>> [(p.kernel_slices[2], p.input_slices[2]) for p in dims.input_grad_parts()]
        [(slice(1, None, -2), slice(0, 6, 2)), (slice(2, None, -2), slice(1, 6, 2))]
        """
        return _input_grad_parts(self)


class PoolDims(NamedTuple):
    """One pooling, completely described; every tuple is (depth, height, width)."""

    spatial: int  #: spatial dimensions of the caller's arrays: 1, 2 or 3
    batch: int
    channels: int
    input_size: Triple
    kernel_size: Triple
    stride: Triple
    pad_before: Triple
    pad_after: Triple  #: what the last window needs: more than pad_before in ceil mode, less where windows end early
    dilation: Triple
    output_size: Triple

    @property
    def taps(self) -> int:
        """Number of cells of one window."""
        depth, height, width = self.kernel_size
        return depth * height * width

    def as_depthwise(self, channels_last: bool) -> ConvDims:
        """Return the convolution that visits the same windows, one filter for each channel."""
        return ConvDims(
            self.spatial, self.batch, self.channels, self.channels, self.channels, self.input_size, self.kernel_size,
            self.stride, self.pad_before, self.pad_after, self.dilation, self.output_size, channels_last,
        )  # fmt: skip


class InputGradPart(NamedTuple):
    """One of the stride-1 convolutions that together are the gradient of the input.

    ``forward(grad_output[:, :, *output_slices], swapped_weight[:, :, *kernel_slices])`` is
    ``grad_input[:, :, *input_slices]``; with ``dims`` None that part of the gradient is zero.
    """

    dims: ConvDims | None
    output_slices: Slices
    kernel_slices: Slices
    input_slices: Slices


# ---------------------------------------------------------------------------------------------------------------------
# What a user may write
# ---------------------------------------------------------------------------------------------------------------------


def integer(value: object, name: str, minimum: int) -> int:
    """Return ``value`` as an int of at least ``minimum``, or say what is wrong with argument ``name``."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    if number > 2**31 - 1:
        raise ValueError(f"{name} must be below 2**31, got {number}")
    return number


def per_dimension(value: object, spatial: int, name: str, minimum: int) -> tuple[int, ...]:
    """Return one int for each spatial dimension from an int or a sequence of 1 or ``spatial`` ints."""
    if not isinstance(value, (list, tuple)):
        return (integer(value, name, minimum),) * spatial
    if len(value) not in (1, spatial):
        raise ValueError(f"{name} must be an integer or a sequence of {spatial}, got {len(value)} values: {value!r}")
    values = tuple(integer(v, f"{name}[{i}]", minimum) for i, v in enumerate(value))
    return values * spatial if len(values) == 1 else values


def channels_last(layout: object) -> bool:
    """Whether ``layout`` puts the channels last; ValueError for an unknown word."""
    try:
        return LAYOUTS[layout] == "channels-last"  # type: ignore[index]
    except (KeyError, TypeError):
        raise ValueError(
            f"layout must be 'NCHW' or 'NHWC' (or a synonym for 1-D and 3-D: {', '.join(LAYOUTS)}), got {layout!r}"
        ) from None


def _padding(
    padding: Padding, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return (before, after) for each spatial dimension from any of the forms of ``padding``."""
    spatial = len(size)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * spatial
        if padding not in ("same", "same_lower"):
            raise ValueError(
                f"padding must be an integer, a sequence, 'valid', 'same' or 'same_lower', got {padding!r}"
            )
        pairs = []
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
            # TensorFlow's and ONNX's SAME: ceil(n / s) outputs, the surplus shared, an odd one after (or before).
            total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            small, large = total // 2, total - total // 2
            pairs.append((small, large) if padding == "same" else (large, small))
        return tuple(pairs)
    if not isinstance(padding, (list, tuple)):
        return ((integer(padding, "padding", 0),) * 2,) * spatial
    if len(padding) not in (1, spatial):
        raise ValueError(
            f"padding must be an integer or a sequence of {spatial}, got {len(padding)} values: {padding!r}"
        )
    pairs = []
    for i, value in enumerate(padding):
        if isinstance(value, (list, tuple)):
            if len(value) != 2:
                raise ValueError(f"padding[{i}] must be an integer or a (before, after) pair, got {value!r}")
            pairs.append((integer(value[0], f"padding[{i}][0]", 0), integer(value[1], f"padding[{i}][1]", 0)))
        else:
            pairs.append((integer(value, f"padding[{i}]", 0),) * 2)
    return tuple(pairs) * (spatial if len(pairs) == 1 else 1)


def _triple(values: Sequence[int], fill: int) -> Triple:
    """Return 1 to 3 values as (depth, height, width), ``fill`` in front."""
    d, h, w = (fill,) * (3 - len(values)) + tuple(values)
    return d, h, w


# ---------------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------------


def conv_dims(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
    channels_last: bool = False,
    *,
    input_name: str = "input",
    weight_name: str = "weight",
) -> ConvDims:
    """Return the dims of a convolution.

    Parameters
    ----------
    input_shape
        (N, C, *spatial).
    weight_shape
        (K, C/groups, *kernel).
    stride, padding, dilation, groups
        As the user wrote them.
    channels_last
        Whether the user's arrays have them so. A single channel and a single filter are first and last.
    input_name, weight_name
        What the error messages call the two shapes.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what came and what was wanted.

    Examples
    --------
    >>> conv_dims((1, 3, 32, 32), (8, 3, 5, 5), 2, 2, 1, 1).output_size
    (1, 16, 16)
    """
    spatial = len(input_shape) - 2
    batch, in_channels, *size = input_shape
    out_channels, group_in_channels, *kernel = weight_shape
    groups = integer(groups, "groups", 1)
    strides = list(per_dimension(stride, spatial, "stride", 1))
    dilations = per_dimension(dilation, spatial, "dilation", 1)
    if min(kernel) < 1 or out_channels < 1 or group_in_channels < 1:
        raise ValueError(f"{weight_name} must have no empty dimension, got shape {tuple(weight_shape)}")
    if min(size) < 1 or in_channels < 1:
        raise ValueError(f"{input_name} must have no empty dimension but the batch, got shape {tuple(input_shape)}")
    if in_channels != group_in_channels * groups:
        raise ValueError(
            f"{input_name} must have {group_in_channels * groups} channels, for {weight_name} has {group_in_channels} "
            f"in each of {groups} group(s), got {in_channels}"
        )
    if out_channels % groups:
        raise ValueError(f"groups must divide the {out_channels} output channels of {weight_name}, got groups={groups}")
    pads = _padding(padding, size, kernel, strides, dilations)
    output = []
    for axis, (n, k, s, (before, after), d) in enumerate(zip(size, kernel, strides, pads, dilations, strict=True)):
        room = n + before + after - d * (k - 1) - 1
        if room < 0:
            raise ValueError(
                f"{input_name} is too small along spatial dimension {axis}: {n} and padding ({before}, {after}) "
                f"are less than the {d * (k - 1) + 1} that the kernel ({k}, dilation {d}) covers"
            )
        output.append(room // s + 1)
        strides[axis] = min(s, room + 1)  # a longer one has no second position either
    return ConvDims(
        spatial, batch, in_channels, out_channels, groups,
        _triple(size, 1), _triple(kernel, 1), _triple(strides, 1),
        _triple([p[0] for p in pads], 0), _triple([p[1] for p in pads], 0),
        _triple(dilations, 1), _triple(output, 1), channels_last and in_channels * out_channels > 1,
    )  # fmt: skip


def conv_transpose_shape(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: int | Sequence[int],
    padding: Padding,
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
) -> tuple[int, ...]:
    """Return the output shape (N, K, *spatial) of a transposed convolution.

    ``weight_shape`` is (C, K/groups, *kernel): that of the convolution whose gradient this is.

    Examples
    --------
    >>> conv_transpose_shape((1, 8, 4, 4), (8, 3, 3, 3), 2, 1, 1, 1, 1)
    (1, 3, 8, 8)
    """
    spatial = len(input_shape) - 2
    batch, channels, *size = input_shape
    if channels != weight_shape[0]:
        raise ValueError(f"input must have {weight_shape[0]} channels, as many as weight has filters, got {channels}")
    groups = integer(groups, "groups", 1)
    if channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of input, got groups={groups}")
    strides = per_dimension(stride, spatial, "stride", 1)
    dilations = per_dimension(dilation, spatial, "dilation", 1)
    extras = per_dimension(output_padding, spatial, "output_padding", 0)
    if isinstance(padding, str):
        raise TypeError(f"padding of a transposed convolution must be an integer or a sequence, got {padding!r}")
    pads = _padding(padding, size, weight_shape[2:], strides, dilations)
    output = []
    for axis in range(spatial):
        extra, s, d = extras[axis], strides[axis], dilations[axis]
        if extra >= max(s, d):
            raise ValueError(f"output_padding must be smaller than stride or dilation, got {extra} for {s} and {d}")
        n = (size[axis] - 1) * s - sum(pads[axis]) + d * (weight_shape[2 + axis] - 1) + extra + 1
        if n < 1:
            raise ValueError(
                f"the output would have size {n} along spatial dimension {axis}: padding {pads[axis]} is too large"
            )
        output.append(n)
    return batch, weight_shape[1] * groups, *output


@lru_cache(maxsize=512)
def _input_grad_parts(dims: ConvDims) -> tuple[InputGradPart, ...]:
    return tuple(_input_grad_part(dims, axes) for axes in product(*(_phases(dims, axis) for axis in range(3))))


class _Phase(NamedTuple):
    """One phase of one dimension of ``input_grad_parts``."""

    taps: int
    outputs: int
    positions: int
    dilation: int
    before: int
    after: int
    output_slice: slice
    kernel_slice: slice
    input_slice: slice


def _phases(dims: ConvDims, axis: int) -> list[_Phase]:
    n, k, s = dims.input_size[axis], dims.kernel_size[axis], dims.stride[axis]
    d, pad, n_out = dims.dilation[axis], dims.pad_before[axis], dims.output_size[axis]
    common = math.gcd(d, s)
    step, sub_dilation = s // common, d // common
    phases = []
    for r in range(min(s, n)):
        count = -(-(n - r) // s)
        first = next((t for t in range(min(step, k)) if (r + pad - t * d) % s == 0), k)
        taps = -(-(k - first) // step)
        # Position j of this phase meets its tap m at grad_output[j + shift - m * sub_dilation].
        shift = (r + pad - first * d) // s
        before = (taps - 1) * sub_dilation - shift
        after = count + (taps - 1) * sub_dilation - n_out - before
        start, stop = max(0, -before), n_out - max(0, -after)  # negative padding crops
        last = first + (taps - 1) * step
        phases.append(
            _Phase(
                taps if stop > start else 0,
                stop - start,
                count,
                sub_dilation,
                max(0, before),
                max(0, after),
                slice(start, stop),
                slice(last, first - step if first >= step else None, -step),
                slice(r, n, s),
            )
        )
    return phases


def _input_grad_part(dims: ConvDims, axes: tuple[_Phase, ...]) -> InputGradPart:
    def triple(pick: Callable[[_Phase], int]) -> Triple:
        d, h, w = map(pick, axes)
        return d, h, w

    part = ConvDims(
        dims.spatial, dims.batch, dims.out_channels, dims.in_channels, dims.groups,
        triple(lambda a: a.outputs), triple(lambda a: a.taps), (1, 1, 1),
        triple(lambda a: a.before), triple(lambda a: a.after),
        triple(lambda a: a.dilation), triple(lambda a: a.positions),
    )  # fmt: skip
    return InputGradPart(
        part if part.taps else None,
        tuple(a.output_slice for a in axes),
        tuple(a.kernel_slice for a in axes),
        tuple(a.input_slice for a in axes),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pooling
# ---------------------------------------------------------------------------------------------------------------------


def pool_dims(
    input_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
    *,
    input_name: str = "input",
) -> PoolDims:
    """Return the dims of a pooling; ``input_shape`` is (N, C, *spatial), ``stride`` None means the kernel size.

    In ceil mode a last, partial window is kept if it starts inside the input or the padding before it.

    Examples
    --------
    >>> pool_dims((1, 3, 64, 64), 2, None, 0, 1, False).output_size
    (1, 32, 32)
    """
    spatial = len(input_shape) - 2
    batch, channels, *size = input_shape
    kernel = per_dimension(kernel_size, spatial, "kernel_size", 1)
    unset = stride is None or (isinstance(stride, (list, tuple)) and not stride)  # PyTorch's functions take () for None
    strides = kernel if unset else per_dimension(stride, spatial, "stride", 1)
    pads = per_dimension(padding, spatial, "padding", 0)
    dilations = per_dimension(dilation, spatial, "dilation", 1)
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"ceil_mode must be True or False, got {ceil_mode!r}")
    if min(size) < 1 or channels < 1:
        raise ValueError(f"{input_name} must have no empty dimension but the batch, got shape {tuple(input_shape)}")
    if math.prod(kernel) > 2**16:
        raise ValueError(f"kernel_size must have at most 65536 cells, got {kernel}")
    output, after, steps = [], [], []
    for axis, (n, k, s, p, d) in enumerate(zip(size, kernel, strides, pads, dilations, strict=True)):
        covered = d * (k - 1) + 1
        if 2 * p > covered:
            raise ValueError(f"padding must be at most half of the {covered} cells that kernel_size covers, got {p}")
        room = n + 2 * p - covered
        count = (-(-room // s) if ceil_mode else room // s) + 1
        if ceil_mode and (count - 1) * s >= n + p:
            count -= 1  # a window that starts in the padding after the input sees nothing
        if room < 0 and count < 1:
            raise ValueError(
                f"{input_name} is too small along spatial dimension {axis}: {n} and padding {p} on both sides "
                f"are less than the {covered} that the window ({k}, dilation {d}) covers"
            )
        output.append(count)
        steps.append(min(s, n + 2 * p) if count == 1 else s)  # a longer one has no second position either
        after.append(max((count - 1) * s + covered - p - n, 0))
    return PoolDims(
        spatial, batch, channels,
        _triple(size, 1), _triple(kernel, 1), _triple(steps, 1), _triple(pads, 0), _triple(after, 0),
        _triple(dilations, 1), _triple(output, 1),
    )  # fmt: skip
