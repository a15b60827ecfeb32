"""Checks of arrays, and the views that turn every layout into strides.

A kernel sees images as (N, C, D, H, W) and weights as (K, C/groups, KD, KH, KW), whatever the caller's layout is: a
transposed view with leading ones costs no copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeGuard

import numpy as np

from .dims import PoolDims, Triple

try:
    from .kernels.native import arrays as _quick
except ImportError:  # the native engine was not built
    from .kernels.reference import arrays as _quick

Axes = tuple[int, ...]  #: of the caller's array in the order of a kernel; -1 for one that it lacks
DTYPES: tuple[np.dtype[Any], ...] = _quick.DTYPES
arrange: Callable[[np.ndarray, Axes], np.ndarray] = _quick.arrange
highest: Callable[[np.ndarray], int] = _quick.highest
is_frozen: Callable[[tuple[Any, ...]], bool] = _quick.is_frozen
empty_below: Callable[[int, tuple[int, ...], np.dtype[Any]], np.ndarray[Any, Any] | None] = _quick.empty_below
from_line: Callable[[tuple[int, ...], np.dtype[Any], np.ndarray[Any, Any]], np.ndarray[Any, Any]] = _quick.from_line
is_ordinary: Callable[[object], TypeGuard[np.ndarray]] = _quick.is_ordinary

_BYTE, _WORD = np.dtype(np.uint8), np.dtype(np.uint16)
_FLIP = (slice(None), slice(None)) + (slice(None, None, -1),) * 3


def check_array(array: object, name: str) -> np.ndarray:
    """Return a float32 or float64 array that kernels can read; TypeError says what else came."""
    if is_ordinary(array):
        return array  # without further questions: small calls are made of such moments
    if type(array) is not np.ndarray:
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{name} must be a numpy.ndarray, got {type(array).__name__}")
        array = array.view(np.ndarray)
    if array.dtype not in DTYPES and array.dtype.newbyteorder("=") not in DTYPES:
        raise TypeError(f"{name} must be float32 or float64, got dtype {array.dtype}")
    if not whole_elements(array):
        array = array.astype(array.dtype.newbyteorder("="))  # kernels count in whole, aligned elements
    return array


def whole_elements(array: np.ndarray) -> bool:
    """Whether all elements are aligned, a whole number of elements apart and in native byte order."""
    flags, size = array.flags, array.itemsize
    if not flags.aligned or not array.dtype.isnative:
        return False
    return flags.c_contiguous or not any(stride % size for stride in array.strides)


def check_same_dtype(array: np.ndarray, name: str, other: np.ndarray, other_name: str) -> None:
    """Raise TypeError if two arrays differ in type: nothing is promoted silently."""
    if array.dtype is not other.dtype and array.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {array.dtype}")


@lru_cache(maxsize=1024)
def image_axes(shape: tuple[int, ...], name: str, spatial: int, last: bool) -> Axes:
    """Return the axes of an image, (N, C, *spatial) or (C, *spatial) or the same with channels last, for a kernel."""
    batched = len(shape) == spatial + 2
    if not batched and len(shape) != spatial + 1:
        raise ValueError(
            f"{name} must have {spatial + 2} dimensions (or {spatial + 1} without a batch), got shape {shape}"
        )
    first = batched if last else batched + 1
    channels = batched + spatial if last else int(batched)
    return (0 if batched else -1, channels, *(-1,) * (3 - spatial), *range(first, first + spatial))


@lru_cache(maxsize=1024)
def weight_axes(shape: tuple[int, ...], name: str, spatial: int, last: bool) -> Axes:
    """Return the axes of weights, (K, C, *kernel) or with channels last (*kernel, C, K), for a kernel."""
    if len(shape) != spatial + 2:
        raise ValueError(f"{name} must have {spatial + 2} dimensions, got shape {shape}")
    filters, channels, first = (spatial + 1, spatial, 0) if last else (0, 1, 2)
    return (filters, channels, *(-1,) * (3 - spatial), *range(first, first + spatial))


def as_image(array: object, name: str, spatial: int, last: bool) -> np.ndarray:
    """Return an image of the caller's, checked, as (N, C, D, H, W)."""
    image = check_array(array, name)
    return arrange(image, image_axes(image.shape, name, spatial, last))


def first_image(image: np.ndarray, spatial: int, last: bool) -> np.ndarray:
    """Return an image of the caller's layout as (N, C, D, H, W)."""
    return arrange(image, image_axes(image.shape, "image", spatial, last))


def as_weight(array: object, name: str, spatial: int, last: bool, flip: bool) -> np.ndarray:
    """Return weights of the caller's, checked, as (K, C, KD, KH, KW), rotated by half a turn if ``flip``."""
    weight = check_array(array, name)
    return flipped(arrange(weight, weight_axes(weight.shape, name, spatial, last)), flip)


def flipped(weight: np.ndarray, flip: bool) -> np.ndarray:
    """Return (K, C, KD, KH, KW) weights, rotated by half a turn if ``flip``."""
    return weight[_FLIP] if flip else weight


def as_bias(array: object | None, like: np.ndarray, channels: int) -> np.ndarray | None:
    """Return the bias, (channels,) of the type of ``like``, or None."""
    if array is None:
        return None
    bias = check_array(array, "bias")
    if bias.shape != (channels,):
        raise ValueError(f"bias must have shape ({channels},), one value for each output channel, got {bias.shape}")
    check_same_dtype(bias, "bias", like, "input")
    return bias


def image_shape(batch: int, channels: int, size: Triple, spatial: int, last: bool) -> tuple[int, ...]:
    """Return the shape of a batched image in the caller's layout."""
    sizes = size[3 - spatial :]
    return (batch, *sizes, channels) if last else (batch, channels, *sizes)


def plain_shape(first: np.ndarray, spatial: int) -> tuple[int, ...]:
    """Return the shape of an (N, C, D, H, W) image or (K, C, KD, KH, KW) weight without the ones it was given."""
    return first.shape[:2] + first.shape[5 - spatial :]


def first_shape(shape: tuple[int, ...], spatial: int, last: bool) -> tuple[int, ...]:
    """Return the shape of an image of the caller's layout as (N, C, *spatial)."""
    return _without_ones(shape, image_axes(shape, "image", spatial, last), spatial)


def first_weight_shape(shape: tuple[int, ...], spatial: int, last: bool) -> tuple[int, ...]:
    """Return the shape of weights of the caller's layout as (K, C, *kernel)."""
    return _without_ones(shape, weight_axes(shape, "weight", spatial, last), spatial)


def _without_ones(shape: tuple[int, ...], axes: Axes, spatial: int) -> tuple[int, ...]:
    return tuple(1 if axis < 0 else shape[axis] for axis in axes[:2] + axes[5 - spatial :])


def check_out(out: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return ``out`` if a result of this shape and type can be stored in it."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a numpy.ndarray, got {type(out).__name__}")
    if out.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    return out


def storable(out: np.ndarray, *inputs: np.ndarray | None) -> bool:
    """Whether a kernel may write straight into ``out``: aligned, whole elements, no overlap with itself or an input."""
    if not whole_elements(out) or (0 in out.strides and out.size > 1):
        return False
    return not any(a is not None and np.may_share_memory(out, a) for a in inputs)


# ---------------------------------------------------------------------------------------------------------------------
# The two forms of a maximum's index
# ---------------------------------------------------------------------------------------------------------------------


def winner_dtype(taps: int) -> np.dtype[Any]:
    """Return the type of the compact form: one byte unless the window has more than 256 cells."""
    return _BYTE if taps <= 256 else _WORD


def winners_to_offsets(winners: np.ndarray, dims: PoolDims) -> np.ndarray:
    """Return flat offsets in the input plane, int64, from positions in the window; -1 for a cell in the padding.

    Both are (N, C, OD, OH, OW).
    """
    offsets = np.zeros(winners.shape, np.int64)
    inside = np.ones(winners.shape, bool)
    cells = np.unravel_index(winners, dims.kernel_size)
    for axis, cell in enumerate(cells):
        start = np.arange(dims.output_size[axis]) * dims.stride[axis] - dims.pad_before[axis]
        position = start.reshape([-1 if i == axis else 1 for i in range(3)]) + cell * dims.dilation[axis]
        inside &= (position >= 0) & (position < dims.input_size[axis])
        offsets = offsets * dims.input_size[axis] + position
    offsets[~inside] = -1
    return offsets


def offsets_to_winners(offsets: np.ndarray, dims: PoolDims) -> np.ndarray:
    """Return positions in the window from flat offsets in the input plane; ValueError if one lies in no such window."""
    plane = int(np.prod(dims.input_size))
    positions = np.unravel_index(np.clip(offsets, 0, plane - 1), dims.input_size)
    cells = []
    for axis, position in enumerate(positions):
        start = np.arange(dims.output_size[axis]) * dims.stride[axis] - dims.pad_before[axis]
        from_start = position - start.reshape([-1 if i == axis else 1 for i in range(3)])
        cells.append(np.clip(from_start // dims.dilation[axis], 0, dims.kernel_size[axis] - 1))
    winners: np.ndarray = np.ravel_multi_index(cells, dims.kernel_size).astype(winner_dtype(dims.taps))
    winners[offsets < 0] = 0
    if not np.array_equal(winners_to_offsets(winners, dims), offsets):
        raise ValueError("indices must be offsets within the pooling windows, as max_pool returned them; got others")
    return winners
