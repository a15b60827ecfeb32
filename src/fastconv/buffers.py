"""What a call leaves to later calls: memory of large results in training, packed weights in evaluation.

The system clears every page of fresh memory when it is first touched, which takes about as long as storing a result.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .arrays import empty_below, from_line
from .kernels.reference.arrays import LINE

__all__ = ["Buffers", "Packed", "empty", "keep", "packed", "reuse"]

Memory = np.ndarray[Any, np.dtype[np.uint8]]

LARGE = 1 << 18  #: bytes; smaller arrays come from memory that the process keeps anyway


class Buffers:
    """Memory that was given out once, and is given out again when no array uses it any more.

    An array that the user still has, or a view of which he has, counts among the references to its memory: it is never
    overwritten behind his back.
    """

    def __init__(self) -> None:
        self._memory: list[Memory] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
        """Return an array with arbitrary content."""
        size = math.prod(shape) * dtype.itemsize
        memory = self._memory
        # Two references: the list's, and the argument of getrefcount.
        free = [
            i
            for i in range(len(memory))
            if size <= len(memory[i]) - LINE <= 2 * size and sys.getrefcount(memory[i]) == 2
        ]
        if free:
            chosen = min(free, key=lambda i: len(memory[i]))
        else:
            chosen = len(memory)
            memory.append(np.empty(size + LINE, np.uint8))
        return from_line(shape, dtype, memory[chosen])

    def __reduce__(self) -> tuple[type[Buffers], tuple[()]]:
        return Buffers, ()  # a copy of a model has its own


class Packed(dict[Any, Any]):
    """Weights as kernels have packed them, by whatever names the kernels give them."""

    def __reduce__(self) -> tuple[type[Packed], tuple[()]]:
        return Packed, ()  # a copy of a model packs its own


class _Thread(threading.local):
    buffers: Buffers | None = None
    packed: Packed | None = None


_thread = _Thread()


@contextmanager
def reuse(buffers: Buffers | None) -> Iterator[None]:
    """Let results of this thread be stored in ``buffers``, or, with None, in fresh memory."""
    before = _thread.buffers
    _thread.buffers = buffers
    try:
        yield
    finally:
        _thread.buffers = before


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    """Return an array with arbitrary content, from the buffers in use if it is large."""
    small = empty_below(LARGE, shape, dtype)
    if small is not None:
        return small
    buffers = _thread.buffers
    if buffers is not None:
        return buffers.empty(shape, dtype)
    large = empty_below(sys.maxsize, shape, dtype)
    return np.empty(shape, dtype) if large is None else large  # NumPy says that it is too large


class keep:  # as a generator it would take a microsecond longer
    """Let a convolution of this thread keep its packed weights, or use what it finds; with None it packs them itself.

    Whoever owns ``weights`` answers for its being used with the same weights only, and these not changing.
    """

    def __init__(self, weights: Packed | None) -> None:
        self._weights = weights

    def __enter__(self) -> None:
        _thread.packed = self._weights

    def __exit__(self, *_: object) -> None:
        _thread.packed = None


def packed() -> Packed | None:
    """Return where to keep packed weights, if anywhere."""
    return _thread.packed
