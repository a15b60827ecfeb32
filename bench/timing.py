"""How: all take turns in one run, with threads pinned, so that the ratios mean something on a noisy machine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import fastconv as fc

#: Seconds that a turn lasts at least; a single call may take longer.
TURN = 0.02


class Timing(NamedTuple):
    """Seconds of every timed call."""

    calls: list[float]

    @property
    def minimum(self) -> float:
        """Seconds of the fastest call."""
        return min(self.calls)

    @property
    def median(self) -> float:
        """Seconds of the middle call."""
        return statistics.median(self.calls)


def take_turns(calls: Sequence[Callable[[], Any]], repeat: int, turn: float = TURN) -> list[Timing]:
    """Time each of ``calls`` in turn, ``repeat`` times around.

    A turn is calls until ``turn`` seconds have passed, at least one. The caller has made each call once before, so
    that nothing is compiled here.
    """
    timings = [Timing([]) for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeat):
            for call, timing in zip(calls, timings, strict=True):
                _take_turn(call, timing.calls, turn)
    finally:
        if collecting:
            gc.enable()
    return timings


def _take_turn(call: Callable[[], Any], seconds: list[float], turn: float) -> None:
    """Append the seconds of each call of one turn; a result is freed outside of the time measured."""
    end = time.perf_counter() + turn
    while True:
        start = time.perf_counter()
        result = call()
        stop = time.perf_counter()
        del result
        seconds.append(stop - start)
        if stop > end:
            return


@contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Let fastconv, BLAS and OpenMP use ``threads`` threads each."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(threads), fc.config_context(num_threads=threads):
        yield


def thread_report() -> str:
    """Return the number of threads of fastconv and of each thread pool in the process."""
    from threadpoolctl import threadpool_info

    pools = {pool["internal_api"]: pool["num_threads"] for pool in threadpool_info()}
    return ", ".join(f"{name} {threads}" for name, threads in {"fastconv": fc.get_num_threads(), **pools}.items())
