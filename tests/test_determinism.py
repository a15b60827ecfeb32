"""The same bits every time: whatever the number of threads, the size of the batch and the position in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import Array, ConvCase, conv_results, how, pool_results

import fastconv as fc
from fastconv.registry import Row

CASES = [
    ConvCase("3x3", (4, 17, 10, 9), (18, 17, 3, 3), 1, 1),
    ConvCase("few channels", (4, 3, 18, 17), (9, 3, 5, 5), 2, 2),
    ConvCase("one filter for each channel", (4, 19, 9, 8), (19, 1, 3, 3), 1, 1, 1, 19),
    ConvCase("1x1", (4, 40, 7, 7), (20, 40, 1, 1)),
]


def assert_same_bits(a: Array, b: Array, name: str) -> None:
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes(), f"{name}: {np.count_nonzero(a != b)} of {a.size} elements differ"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_convolution_does_not_depend_on_the_number_of_threads(case: ConvCase, conv_row: Row, dtype: Any) -> None:
    arrays = case.arrays(dtype)
    by_threads = []
    for threads in (1, 2, 3):
        with fc.config_context(num_threads=threads):
            by_threads.append(conv_results(2, arrays, case.geometry, **how(conv_row)))
    for other in by_threads[1:]:
        for name, a, b in zip(other._fields, by_threads[0], other, strict=True):
            assert_same_bits(a, b, name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_convolution_does_not_depend_on_the_batch(case: ConvCase, conv_row: Row, dtype: Any) -> None:
    x, w, b, dy = case.arrays(dtype)
    options = case.geometry | how(conv_row)
    together = fc.conv2d(x, w, b, **options), fc.grad.conv2d_input(x.shape, w, dy, **options)
    for part in (slice(0, 1), slice(3, 4), slice(1, 4), slice(None, None, -1)):
        y = fc.conv2d(x[part], w, b, **options)
        dx = fc.grad.conv2d_input(x[part].shape, w, dy[part], **options)
        assert_same_bits(y, together[0][part].copy(), f"output of {part}")
        assert_same_bits(dx, together[1][part].copy(), f"grad_input of {part}")


def test_the_same_call_gives_the_same_bits(conv_row: Row) -> None:
    case = CASES[0]
    first, second = (conv_results(2, case.arrays(np.float32), case.geometry, **how(conv_row)) for _ in range(2))
    for name, a, b in zip(first._fields, first, second, strict=True):
        assert_same_bits(a, b, name)


def test_pooling_does_not_depend_on_threads_or_batch(pool_row: Row, rng: np.random.Generator, dtype: Any) -> None:
    image = rng.standard_normal((5, 7, 19, 18)).astype(dtype)
    window = (3, 2, 1, 1, True)
    together = pool_results(2, image, window, **how(pool_row))
    for threads in (1, 2, 3):
        with fc.config_context(num_threads=threads):
            for name, a, b in zip(together._fields, together, pool_results(2, image, window, **how(pool_row)), strict=True):
                assert_same_bits(a, b, name)
    alone = fc.max_pool2d(image[3:4], *window, return_indices="compact", **how(pool_row))
    assert_same_bits(alone[0], together.output[3:4].copy(), "output")
    assert_same_bits(alone[1], together.winners[3:4].copy(), "winners")
