"""What the first call of a process costs, for each engine: with nothing compiled yet (cold), and with all (warm)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from fastconv.runtime import ENGINES, why_missing

# A layer so small that its arithmetic takes no time.
PROCESS = """
import json, sys, time
import numpy as np, fastconv as fc
engine = sys.argv[1]
image, weight = np.ones((1, 16, 12, 12), np.float32), np.ones((16, 16, 3, 3), np.float32)
times = [time.perf_counter()]
if engine == "numba":
    import numba
times.append(time.perf_counter())
for call in range(3):
    fc.conv2d(image, weight, engine=engine)
    times.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip(times, times[1:])]))
"""


class Startup(NamedTuple):
    """Seconds of one engine, each measured in a process of its own."""

    engine: str
    imported: float  #: importing Numba, for the engine that needs it
    cold: float  #: the first call, with an empty cache
    warm: float  #: the first call, with a cache that an earlier process has filled
    next: float  #: a later call


def measure(engines: Sequence[str] = ENGINES, repeat: int = 5) -> list[Startup]:
    """Return the times of the engines that work here; all but the cold ones are the shortest of several."""
    return [_measure(engine, repeat) for engine in engines if not why_missing(engine)]


def _measure(engine: str, repeat: int) -> Startup:
    with tempfile.TemporaryDirectory() as cache:
        _, cold, *_ = _process(engine, cache)
        imported, warm, _, later = map(min, zip(*(_process(engine, cache) for _ in range(repeat)), strict=True))
    return Startup(engine, imported, cold, warm, later)


def _process(engine: str, cache: str) -> list[float]:
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    command = [sys.executable, "-c", PROCESS, engine]
    times: list[float] = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    return times


def table(found: Sequence[Startup]) -> list[str]:
    """Return the lines of a Markdown table, in milliseconds."""
    lines = [
        "| engine | import numba | first call, cold | first call, warm | later call |",
        "|--------|-------------:|-----------------:|-----------------:|-----------:|",
    ]
    for engine, *seconds in found:
        imported, cold, warm, later = (f"{1e3 * time:.2f}" if time < 0.01 else f"{1e3 * time:.0f}" for time in seconds)
        lines.append(f"| {engine:<6} | {imported:>12} | {cold:>16} | {warm:>16} | {later:>10} |")
    return lines
