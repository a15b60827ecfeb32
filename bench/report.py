"""The table, which is Markdown, and the JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .engines import Array, Candidate
from .layers import Layer
from .timing import Timing
from .training import Network, Step


class Result(NamedTuple):
    """What was measured of one candidate."""

    layer: str
    op: str  #: forward, input or weight, or train for a whole step
    name: str  #: engine/algorithm, or that of a peer
    peer: bool
    chosen: bool  #: fastconv takes it when nobody names an algorithm
    timed: float  #: share of the layer's output elements that was timed; below 1 the seconds are extrapolated
    minimum: float  #: seconds
    median: float  #: seconds
    flops: int  #: 0 for a pooling
    bytes: int  #: of all arrays, each read or written once; 0 for a training step
    error: float  #: RMS of the error over RMS of the result, against float64
    peak: float = 0.0  #: operations per second of the bare tile, times threads; 0 without the native engine


class Column(NamedTuple):
    """One column of the table; ``text`` gets a result and all results of the same operation and layer."""

    heading: str
    width: int
    align: str  #: "<" or ">"
    text: Callable[[Result, Sequence[Result]], str]


def relative_error(result: Array, reference: Array) -> float:
    """Return the RMS of the error over the RMS of the reference."""
    if result.shape != reference.shape:
        raise ValueError(f"result must have the shape of the reference {reference.shape}, got {result.shape}")
    return float(np.sqrt(np.mean((result - reference) ** 2) / np.mean(reference**2)))


def result(layer: Layer, op: str, candidate: Candidate, timing: Timing, error: float) -> Result:
    """Return what was measured of a candidate, for the whole layer."""
    timed = math.prod(candidate.problem.layer.output_size) / math.prod(layer.output_size)
    return Result(
        layer.name, op, candidate.name, candidate.peer, candidate.chosen, timed,
        timing.minimum / timed, timing.median / timed, layer.flops, 4 * layer.floats, error,
    )  # fmt: skip


def step_result(network: Network, step: Step, timing: Timing, error: float) -> Result:
    """Return what was measured of a training step."""
    return Result(
        network.name, "train", step.name, step.peer, step.chosen, 1.0,
        timing.minimum, timing.median, network.flops, 0, error,
    )  # fmt: skip


def ratio(result: Result, group: Iterable[Result], is_baseline: Callable[[Result], bool]) -> float | None:
    """Return how many times faster ``result`` is than the fastest baseline of its group, by their minima."""
    baselines = [other.minimum for other in group if is_baseline(other)]
    return min(baselines) / result.minimum if baselines else None


def tile_share(result: Result) -> float | None:
    """Return the speed as a share of what the bare tile does on all threads."""
    return result.flops / result.minimum / result.peak if result.flops and result.peak else None


def is_naive(result: Result) -> bool:
    """Whether this is the baseline of "x naive"."""
    return result.name == "numpy/naive"


def is_plain(result: Result) -> bool:
    """Whether this is the baseline of "x NumPy": the best plain NumPy, for convolution or for pooling."""
    return result.name in ("numpy/im2col", "numpy/windows")


def is_peer(result: Result) -> bool:
    """Whether this is one of the baselines of "x peers"."""
    return result.peer


def _number(value: float | None) -> str:
    """Three significant digits but at most four decimals; nothing for nothing."""
    if not value:
        return ""
    return f"{value:.{min(4, max(0, 2 - math.floor(math.log10(value))))}f}"


def _milliseconds(seconds: float, result: Result) -> str:
    return ("~" if result.timed < 1 else "") + _number(seconds * 1e3)


BASELINES = {"naive": is_naive, "numpy": is_plain, "peers": is_peer}

COLUMNS = (
    Column("layer", 15, "<", lambda r, group: r.layer),
    Column("op", 7, "<", lambda r, group: r.op),
    Column("who", 16, "<", lambda r, group: r.name + " *" * r.chosen),
    Column("ms min", 9, ">", lambda r, group: _milliseconds(r.minimum, r)),
    Column("ms median", 9, ">", lambda r, group: _milliseconds(r.median, r)),
    Column("GFLOP/s", 7, ">", lambda r, group: _number(r.flops / r.minimum / 1e9)),
    Column("% tile", 6, ">", lambda r, group: f"{100 * share:.0f}" if (share := tile_share(r)) else ""),
    Column("GB/s", 6, ">", lambda r, group: _number(r.bytes / r.minimum / 1e9)),
    Column("x naive", 7, ">", lambda r, group: _number(ratio(r, group, is_naive))),
    Column("x NumPy", 7, ">", lambda r, group: _number(ratio(r, group, is_plain))),
    Column("x peers", 7, ">", lambda r, group: _number(ratio(r, group, is_peer))),
    Column("error", 7, ">", lambda r, group: f"{r.error:.1e}"),
)


def header() -> list[str]:
    """Return the first two lines of the table."""
    rules = ["-" * c.width if c.align == "<" else "-" * (c.width - 1) + ":" for c in COLUMNS]
    return [_line([c.heading for c in COLUMNS]), _line(rules)]


def lines(group: Sequence[Result]) -> list[str]:
    """Return the lines of the table for all results of one operation of one layer."""
    return [_line([column.text(result, group) for column in COLUMNS]) for result in group]


def _line(cells: Iterable[str]) -> str:
    padded = (f"{cell:{c.align}{c.width}}" for cell, c in zip(cells, COLUMNS, strict=True))
    return f"| {' | '.join(padded)} |"


def footnotes(groups: Sequence[Sequence[Result]]) -> list[str]:
    """Return what the columns and the marks mean, the marks as far as they occur."""
    results = [result for group in groups for result in group]
    notes = [
        "x naive: how many times faster (by the minimum) than numpy/naive.",
        "x NumPy: how many times faster than numpy/im2col; for pooling, numpy/windows.",
        "error: RMS of the error over RMS of the result, against float64.",
    ]
    if any(tile_share(result) for result in results):
        notes.append(
            "% tile: GFLOP/s over the bare tile's (above) times threads; winograd multiplies less and may pass 100."
        )
    if any(result.peer for result in results):
        notes += [
            "x peers: how many times faster than the fastest peer.",
            "Weights are packed at every call by fastconv and torch, once and untimed by onnxruntime and openvino.",
        ]
    if any(result.chosen for result in results):
        notes.append("*: what fastconv takes when no algorithm is named.")
    if any(result.timed < 1 for result in results):
        notes.append(
            "~: measured on a slice of the layer (fewer images, channels and rows) and extrapolated to all of it."
        )
    return notes


def means(groups: Sequence[Sequence[Result]]) -> list[str]:
    """Return, for each operation, the geometric mean of the chosen row's speed over every other's, over the layers."""
    found: dict[str, dict[str, list[float]]] = {}
    for group in groups:
        chosen = next((result for result in group if result.chosen), None)
        if chosen is None:
            continue
        for other in group:
            kind = "convolution " if other.flops else "max pooling "
            ratios = found.setdefault(("" if other.op == "train" else kind) + other.op, {}).setdefault(other.name, [])
            ratios.append(other.minimum / chosen.minimum)
    return [
        f"{op}, geometric mean of * over "
        + ", ".join(f"{name}: {_number(statistics.geometric_mean(r))} ({len(r)})" for name, r in ratios.items())
        for op, ratios in found.items()
    ]


def write_json(path: Path, machine: dict[str, str], groups: Sequence[Sequence[Result]]) -> None:
    """Write everything measured: times in seconds, ratios null where there was no baseline."""
    results = [
        result._asdict()
        | {"gflops": result.flops / result.minimum / 1e9, "tile_share": tile_share(result)}
        | {f"x_{name}": ratio(result, group, baseline) for name, baseline in BASELINES.items()}
        for group in groups
        for result in group
    ]
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")
