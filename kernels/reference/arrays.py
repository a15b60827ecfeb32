"""What every call asks of its arrays, in plain NumPy; ``native/arrays`` does the same in a third of the time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
LINE = 64  #: bytes of a cache line; NumPy's memory starts anywhere, 16 behind one if it is large


def is_ordinary(array: object) -> bool:
    """Whether it is NumPy's own kind of array, of float32 or float64 in native byte order: contiguous, writable."""
    return type(array) is np.ndarray and array.dtype in DTYPES and bool(array.flags.carray)


def is_frozen(values: tuple[object, ...]) -> bool:
    """Whether each is an int (and no bool), None, a word or a tuple of such."""
    return all(
        value is None or type(value) in (int, str) or (type(value) is tuple and is_frozen(value)) for value in values
    )


def empty_below(limit: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray | None:
    """Return an array with arbitrary content if that takes fewer bytes than the limit, else None.

    It begins where a cache line does: vectors that straddle two lines take longer to store.
    """
    size = math.prod(shape) * dtype.itemsize
    return from_line(shape, dtype, np.empty(size + LINE, np.uint8)) if size < limit else None


def from_line(shape: tuple[int, ...], dtype: np.dtype[Any], memory: np.ndarray) -> np.ndarray:
    """Return an array that starts with the first whole cache line of its memory, of a line more than it takes."""
    return np.ndarray(shape, dtype, memory, -memory.ctypes.data % LINE)


def arrange(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return a view with these axes of the array, each of which occurs once; -1 is a new one, of length 1."""
    view: np.ndarray = array.transpose([axis for axis in axes if axis >= 0])
    return view[tuple(None if axis < 0 else slice(None) for axis in axes)]


def highest(array: np.ndarray) -> int:
    """Return the largest of unsigned integers, of which there is one at least."""
    return int(np.maximum.reduce(array, None))
