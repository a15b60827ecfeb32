"""The rows of ``fastconv bench`` as a pytest-benchmark suite: ``pytest bench/ -k "vgg3_2 and forward"``.

One group for each operation of each layer, one thread, NCHW. Naive is timed on a slice, whose share of the layer is in
the extra information.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

from fastconv import registry
from fastconv.bench import engines, timing
from fastconv.bench.layers import LAYERS, Layer

pytest.importorskip("pytest_benchmark")
pytest.importorskip("threadpoolctl")


@lru_cache(maxsize=1)
def problem_of(layer: Layer) -> engines.Problem:
    """Return the arrays of a layer; its benchmarks follow one another."""
    return engines.Problem.random(layer)


def rows() -> Iterator[Any]:
    """Yield layer, operation and row of the registry for everything that can be measured."""
    for layer in LAYERS:
        for op, kind in layer.ops.items():
            for row in registry.available(kind):
                if not engines.unsupported(row, kind, layer):
                    yield pytest.param(layer, op, row, id=f"{layer.name}-{op}-{row.engine}-{row.algorithm}")


@pytest.mark.benchmark(min_rounds=3, max_time=0.2, warmup=False)
@pytest.mark.parametrize(("layer", "op", "row"), list(rows()))
def test_row(benchmark: Any, layer: Layer, op: str, row: registry.Row) -> None:
    candidate = engines.candidate(row, problem_of(layer), op, "NCHW")
    benchmark.group = f"{layer.name} {op}"
    benchmark.extra_info["timed"] = math.prod(candidate.problem.layer.output_size) / math.prod(layer.output_size)
    with timing.pinned_threads(1):
        candidate.call()
        benchmark(candidate.call)
