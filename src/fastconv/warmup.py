"""``fastconv warmup``: compile all kernels of the Numba engine now, so that no program waits for them later.

Every row of the registry does a small problem once. Numba keeps what it compiles in a folder on disk, where every later
process finds it, until fastconv, Numba or the processor changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import functional, grad
from .arrays import DTYPES
from .dims import conv_dims, pool_dims
from .progress import progress_bar, tell_if_missing
from .registry import ROWS, Row
from .runtime import check_engine

CONV = (1, 16, 24, 24), (16, 16, 3, 3)  #: shapes of image and weights: all rows can, and none takes a short cut
POOL = (1, 1, 20, 20)
WINDOWS = (2, 17)  #: winners take one byte and, in windows of more than 256 cells, two
DIMS = {
    op: conv_dims(*CONV, 1, 1, 1, 1) if op.startswith("conv") else pool_dims(POOL, WINDOWS[0], None, 0, 1, False)
    for op in ROWS
}


class Job(NamedTuple):
    """A call that needs some of the kernels."""

    dtype: np.dtype
    op: str
    algorithm: str
    call: Callable[[], Any]


def jobs(dtypes: Sequence[np.dtype] = DTYPES) -> list[Job]:
    """Return calls that together need all kernels of the Numba engine for arrays of these types."""
    return [
        Job(dtype, op, row.algorithm, call)
        for dtype in dtypes
        for op, rows in ROWS.items()
        for row in rows
        if row.engine == "numba"
        for call in (_conv_calls if op.startswith("conv") else _pool_calls)(op, row, dtype)
    ]


def _conv_calls(op: str, row: Row, dtype: np.dtype) -> Iterator[Callable[[], Any]]:
    image, weight = (np.zeros(shape, dtype) for shape in CONV)
    how: dict[str, Any] = {"padding": 1, "engine": row.engine, "algorithm": row.algorithm}
    if not row.can(op, DIMS[op]):
        return
    if op == "conv_forward":
        yield partial(functional.conv2d, image, weight, **how)
    elif op == "conv_input_grad":
        yield partial(grad.conv2d_input, image.shape, weight, image, **how)
    else:
        yield partial(grad.conv2d_weight, image, weight.shape, image, **how)


def _pool_calls(op: str, row: Row, dtype: np.dtype) -> Iterator[Callable[[], Any]]:
    image = np.zeros(POOL, dtype)
    how: dict[str, Any] = {"engine": row.engine, "algorithm": row.algorithm}
    for window in WINDOWS:
        if op == "max_pool_forward":
            yield partial(functional.max_pool2d, image, window, return_indices="compact", **how)
        else:
            output = np.zeros(pool_dims(POOL, window, None, 0, 1, False).output_size[1:], dtype)[None, None]
            winners = np.zeros(output.shape, np.uint8 if window**2 <= 256 else np.uint16)
            yield partial(grad.max_pool2d, image.shape, winners, output, window, **how)


def run(dtypes: Sequence[np.dtype], progress: bool) -> None:
    """Compile, and print what was compiled, what was there already, and how long it took."""
    check_engine("numba")
    tell_if_missing(progress)
    start = time.perf_counter()
    from .kernels.jit.compile import Loads, loads

    total, found = Loads(0, 0), jobs(dtypes)
    with progress_bar(len(found), progress, title="compiling", unit="call") as bar:
        for job in found:
            before, begin = loads(), time.perf_counter()
            job.call()
            new = Loads(*(now - then for now, then in zip(loads(), before, strict=True)))
            total = Loads(total.compiled + new.compiled, total.cached + new.cached)
            if any(new):
                what = f"{job.dtype} {job.op:<18}{job.algorithm}"
                bar.write(f"{what:<36}{_count(new):<28}{time.perf_counter() - begin:7.2f} s")
            bar.update()
    print(f"{'all kernels':<36}{_count(total):<28}{time.perf_counter() - start:7.2f} s")


def _count(loads: Any) -> str:
    words = (f"{number} {what}" for number, what in zip(loads, ("compiled", "from the cache"), strict=True) if number)
    return ", ".join(words) or "nothing to do"
