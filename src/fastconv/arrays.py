"""Checks of arrays, and the views that turn every layout into strides.

A kernel sees images as (N, C, D, H, W) and weights as (K, C/groups, KD, KH, KW), whatever the caller's layout is: a
transposed view with leading ones costs no copy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .dims import PoolDims, Triple

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))

#: Image axes of the caller's (N, *spatial, C) array in (N, C, *spatial) order, by spatial dimensions.
_IMAGE_FIRST = {1: (0, 2, 1), 2: (0, 3, 1, 2), 3: (0, 4, 1, 2, 3)}
#: Weight axes of the caller's (*kernel, C, K) array in (K, C, *kernel) order.
_WEIGHT_FIRST = {1: (2, 1, 0), 2: (3, 2, 0, 1), 3: (4, 3, 0, 1, 2)}
#: Index that adds the leading ones.
_EXPAND: dict[int, Any] = {
    1: (slice(None), slice(None), None, None),
    2: (slice(None), slice(None), None),
    3: (),
}
_BYTE, _WORD = np.dtype(np.uint8), np.dtype(np.uint16)
_FLIP = (slice(None), slice(None)) + (slice(None, None, -1),) * 3


def check_array(array: object, name: str) -> np.ndarray:
    """Return a float32 or float64 array that kernels can read; TypeError says what else came."""
    if type(array) is np.ndarray and array.dtype in DTYPES and array.flags.carray:
        return array  # an ordinary array, without further questions: small calls are made of such moments
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


def as_image(array: object, name: str, spatial: int, last: bool) -> np.ndarray:
    """Return an image, (N, C, *spatial) or (C, *spatial) or the same with channels last, as (N, C, D, H, W)."""
    image = check_array(array, name)
    if image.ndim == spatial + 1:
        image = image[None]
    elif image.ndim != spatial + 2:
        raise ValueError(
            f"{name} must have {spatial + 2} dimensions (or {spatial + 1} without a batch), got shape {image.shape}"
        )
    return first_image(image, spatial, last)


def first_image(image: np.ndarray, spatial: int, last: bool) -> np.ndarray:
    """Return a batched image of the caller's layout as (N, C, D, H, W)."""
    view: np.ndarray = image.transpose(_IMAGE_FIRST[spatial]) if last else image
    return view if spatial == 3 else view[_EXPAND[spatial]]


def as_weight(array: object, name: str, spatial: int, last: bool, flip: bool) -> np.ndarray:
    """Return weights, (K, C, *kernel) or with channels last (*kernel, C, K), as (K, C, KD, KH, KW)."""
    weight = check_array(array, name)
    if weight.ndim != spatial + 2:
        raise ValueError(f"{name} must have {spatial + 2} dimensions, got shape {weight.shape}")
    return first_weight(weight, spatial, last, flip)


def first_weight(weight: np.ndarray, spatial: int, last: bool, flip: bool) -> np.ndarray:
    """Return weights of the caller's layout as (K, C, KD, KH, KW), rotated by half a turn if ``flip``."""
    view: np.ndarray = (weight.transpose(_WEIGHT_FIRST[spatial]) if last else weight)[_EXPAND[spatial]]
    return view[_FLIP] if flip else view


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
    """Return the shape of a batched image of the caller's layout as (N, C, *spatial)."""
    return tuple(shape[axis] for axis in _IMAGE_FIRST[spatial]) if last else shape


def first_weight_shape(shape: tuple[int, ...], spatial: int, last: bool) -> tuple[int, ...]:
    """Return the shape of weights of the caller's layout as (K, C, *kernel)."""
    return tuple(shape[axis] for axis in _WEIGHT_FIRST[spatial]) if last else shape


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


def winner_dtype(dims: PoolDims) -> np.dtype[Any]:
    """Return the type of the compact form: one byte unless the window has more than 256 cells."""
    return _BYTE if dims.taps <= 256 else _WORD


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
    winners: np.ndarray = np.ravel_multi_index(cells, dims.kernel_size).astype(winner_dtype(dims))
    winners[offsets < 0] = 0
    if not np.array_equal(winners_to_offsets(winners, dims), offsets):
        raise ValueError("indices must be offsets within the pooling windows, as max_pool returned them; got others")
    return winners
