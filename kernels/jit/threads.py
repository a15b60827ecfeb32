"""Threads: a range of tasks is cut into equal parts, one for each thread.

Compiled kernels run without the GIL, so ordinary Python threads will do. Numba's ``prange`` will not: its default
"workqueue" layer aborts the process when two Python threads call at once, its OpenMP layer hangs in a forked child, and
TBB is seldom installed. Here the calling thread does the first part itself and a shared pool the others; nobody in the
pool ever waits for the pool, so any number of threads may call at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="fastconv")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def worthwhile(threads: int, operations: int) -> int:
    """Return how many threads pay for ``operations``: handing a part to one costs some 50 microseconds."""
    return max(1, min(threads, operations // 2_000_000))


def parallel(work: Callable[[int, int], None], tasks: int, threads: int) -> None:
    """Call ``work(first, last)`` on disjoint ranges that cover ``range(tasks)``, on up to ``threads`` threads."""
    parts = max(1, min(tasks, threads))
    edges = [tasks * part // parts for part in range(parts + 1)]
    others = [_pool().submit(work, *edges[part : part + 2]) for part in range(1, parts)]
    work(edges[0], edges[1])
    for other in others:
        other.result()


LINE = 64  #: bytes of a cache line
_arena = threading.local()


class Room(NamedTuple):
    """Memory of an arena: so many bytes from the address on."""

    memory: np.ndarray
    size: int
    address: int


def workspace(name: str, count: int, dtype: np.dtype) -> int:
    """Return the address of room for ``count`` numbers, whatever they hold: this thread's own, until it asks again.

    The next call of a kernel gets the same memory: fresh memory would cost a page fault every 4 KB, which is as much as
    packing an image into it.
    """
    size = count * dtype.itemsize
    room: Room | None = getattr(_arena, name, None)
    if room is None or room.size < size:
        memory = np.empty(size + LINE, np.uint8)
        address = int(memory.ctypes.data)
        room = Room(memory, size, address + -address % LINE)  # no vector load shall straddle two cache lines
        setattr(_arena, name, room)
    return room.address
