"""What every call asks of its arrays, in plain NumPy; ``native/arrays`` does the same in a third of the time."""

from __future__ import annotations

import numpy as np

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def is_ordinary(array: object) -> bool:
    """Whether it is NumPy's own kind of array, of float32 or float64 in native byte order: contiguous, writable."""
    return type(array) is np.ndarray and array.dtype in DTYPES and bool(array.flags.carray)


def arrange(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return a view with these axes of the array, each of which occurs once; -1 is a new one, of length 1."""
    view: np.ndarray = array.transpose([axis for axis in axes if axis >= 0])
    return view[tuple(None if axis < 0 else slice(None) for axis in axes)]


def highest(array: np.ndarray) -> int:
    """Return the largest of unsigned integers, of which there is one at least."""
    return int(np.maximum.reduce(array, None))
