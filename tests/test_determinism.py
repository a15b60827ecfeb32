"""The same bits every time: whatever the number of threads, the size of the batch and the position in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import Array, ConvArrays, ConvCase, ConvResults, PoolResults, conv_results, for_every_row, how, pool_results

import fastconv as fc
from fastconv.registry import Row

CASES = [
    ConvCase("3x3", (4, 17, 10, 9), (18, 17, 3, 3), 1, 1),
    ConvCase("3x3 of many channels", (4, 40, 9, 8), (34, 40, 3, 3), 1, 1),
    ConvCase("3x3 of several blocks of channels", (4, 150, 9, 8), (70, 150, 3, 3), 1, 1),
    ConvCase("few channels", (4, 3, 18, 17), (9, 3, 5, 5), 2, 2),
    ConvCase("few channels of an image", (2, 3, 70, 66), (33, 3, 3, 3), 1, 1),
    ConvCase("few channels, cells that no pixel sees", (1, 3, 130, 140), (80, 3, 4, 3), 5, 0),
    ConvCase("few channels of a volume", (1, 2, 13, 20, 21), (18, 2, 3, 3, 3), (2, 1, 1), 1),
    ConvCase("one filter for each channel", (4, 19, 9, 8), (19, 1, 3, 3), 1, 1, 1, 19),
    ConvCase("1x1", (4, 40, 7, 7), (20, 40, 1, 1)),
    ConvCase("columns of several blocks of filters", (4, 34, 10, 11), (520, 34, 1, 1)),
    ConvCase("few pixels in each of many images", (37, 60, 3, 3), (35, 60, 2, 2)),
    ConvCase("few pixels, many weights", (4, 260, 3, 3), (230, 260, 3, 3), 1, 1),
    ConvCase("1x1 of few pixels", (4, 320, 1, 2), (105, 320, 1, 1)),
    ConvCase("columns of 3x3", (4, 9, 12, 11), (260, 9, 3, 3), 1, 1),
]


def layouts(row: Row) -> tuple[str, ...]:
    """Those that an engine computes differently: for others a layout is only strides."""
    return ("NCHW", "NHWC") if row.engine == "cython" else ("NCHW",)


def arranged(case: ConvCase, dtype: Any, layout: str) -> ConvArrays:
    x, w, b, dy = case.arrays(dtype)
    if layout == "NCHW":
        return ConvArrays(x, w, b, dy)
    x, dy = (np.ascontiguousarray(np.moveaxis(array, 1, -1)) for array in (x, dy))
    return ConvArrays(x, np.ascontiguousarray(np.moveaxis(w, (1, 0), (-2, -1))), b, dy)


def assert_same_bits(a: Array, b: Array, name: str) -> None:
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes(), f"{name}: {np.count_nonzero(a != b)} of {a.size} elements differ"


def assert_same_results(a: ConvResults | PoolResults, b: ConvResults | PoolResults) -> None:
    for name, left, right in zip(a._fields, a, b, strict=True):
        if left is not None and right is not None:
            assert_same_bits(left, right, name)


@for_every_row(CASES)
def test_convolution_does_not_depend_on_the_number_of_threads(row: Row, case: ConvCase, dtype: Any) -> None:
    for layout in layouts(row):
        arrays = arranged(case, dtype, layout)
        with fc.config_context(num_threads=1):
            alone = conv_results(case, arrays, row, layout=layout)
        for threads in (1, 2, 3):
            with fc.config_context(num_threads=threads):
                assert_same_results(alone, conv_results(case, arrays, row, layout=layout))


@pytest.mark.parametrize("tiny", [slice(20, 44), slice(30, 52), slice(41, 70)])
def test_the_gradient_does_not_depend_on_where_threads_cut_an_image(tiny: slice, rng: np.random.Generator) -> None:
    """Tiny numbers are not split; some strips have nothing else."""
    weight = rng.standard_normal((64, 32, 3, 3), np.float32)
    grad = rng.standard_normal((1, 64, 70, 66), np.float32)
    grad[:, :, tiny] *= np.float32(1e-37)
    results = []
    for threads in (1, 2, 3):
        with fc.config_context(num_threads=threads):
            results.append(fc.grad.conv2d_input((1, 32, 70, 66), weight, grad, 1, 1, algorithm="im2col"))
    for result in results[1:]:
        assert_same_bits(results[0], result, "grad_input")


@for_every_row(
    [ConvCase("1x1", (1, 40, 8, 12), (21, 40, 1, 1)), ConvCase("1x1 of few filters", (2, 19, 7, 30), (3, 19, 1, 1))]
)
def test_convolution_does_not_depend_on_where_arrays_begin_in_a_cache_line(
    row: Row, case: ConvCase, dtype: Any
) -> None:
    arrays = case.arrays(dtype)
    first = conv_results(case, arrays, row)
    for skipped in (1, 5, 12):
        moved = (np.concatenate([np.zeros(skipped, dtype), a.ravel()])[skipped:].reshape(a.shape) for a in arrays)
        assert_same_results(first, conv_results(case, ConvArrays(*moved), row))


@for_every_row(CASES)
def test_convolution_does_not_depend_on_the_batch(row: Row, case: ConvCase, dtype: Any) -> None:
    for layout in layouts(row):
        x, w, b, dy = arranged(case, dtype, layout)
        together = conv_results(case, ConvArrays(x, w, b, dy), row, layout=layout)
        for part in (slice(0, 1), slice(2, 3), slice(1, 4), slice(None, None, -1)):
            fewer = case._replace(input=(len(x[part]), *case.input[1:]))
            some = conv_results(fewer, ConvArrays(x[part], w, b, dy[part]), row, layout=layout)
            for name in ("output", "grad_input"):
                if (whole := getattr(together, name)) is not None:
                    assert_same_bits(getattr(some, name), whole[part].copy(), f"{name} of {part}, {layout}")


def test_pooling_does_not_depend_on_threads_or_batch(pool_row: Row, rng: np.random.Generator, dtype: Any) -> None:
    image = rng.standard_normal((5, 7, 19, 18)).astype(dtype)
    window = (3, 2, 1, 1, True)
    together = pool_results(2, image, window, **how(pool_row))
    for threads in (1, 2, 3):
        with fc.config_context(num_threads=threads):
            assert_same_results(together, pool_results(2, image, window, **how(pool_row)))
    alone = fc.max_pool2d(image[3:4], *window, return_indices="compact", **how(pool_row))
    assert_same_bits(alone[0], together.output[3:4].copy(), "output")
    assert_same_bits(alone[1], together.winners[3:4].copy(), "winners")
