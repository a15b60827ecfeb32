"""The promises of ``precision``, as RMS of error over RMS of result.

"highest" is no worse than plain float32 accumulation, "high" is 1e-5, "medium" 1e-2.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
from cases import (
    CONV_CASES,
    Array,
    ConvArrays,
    ConvCase,
    ConvResults,
    conv_function,
    conv_results,
    for_every_row,
    how,
)

import fastconv as fc
from fastconv.registry import ROWS, Row
from fastconv.runtime import isa

CASES = [
    ConvCase(f"{c} to {k} channels, {g} groups", (2, c, 20, 20), (k, c // g, 3, 3), 1, 1, 1, g)
    for c, k, g in (
        (1, 8, 1),
        (3, 8, 1),
        (8, 8, 1),
        (16, 16, 1),
        (24, 24, 1),
        (33, 17, 1),
        (49, 16, 1),
        (64, 32, 1),
        (8, 8, 8),
        (192, 16, 1),
        (256, 4, 1),
    )
] + [
    ConvCase("weights of many outputs", (2, 16, 36, 40), (16, 16, 3, 3), 1, 1),
    ConvCase("1x1 of 320 channels", (1, 320, 8, 9), (40, 320, 1, 1)),
    ConvCase("1x1 of 1200 channels", (1, 1200, 8, 6), (20, 1200, 1, 1)),
    ConvCase("2x2, short sums", (1, 16, 14, 14), (18, 16, 2, 2)),
    ConvCase("2x2, longer sums", (1, 48, 13, 14), (48, 48, 2, 2)),
    ConvCase("4x4", (1, 120, 10, 9), (120, 120, 4, 4), 1, 1),
    ConvCase("1x7", (1, 64, 4, 30), (64, 64, 1, 7), 1, (0, 3)),
    ConvCase("7x1, longer sums", (1, 160, 20, 4), (96, 160, 7, 1), 1, (3, 0)),
    ConvCase("3x3, stride 2", (2, 18, 21, 20), (18, 18, 3, 3), 2, 1),
    ConvCase("3x3, stride 2, longer sums", (1, 130, 14, 15), (64, 130, 3, 3), 2, 1),
    ConvCase("4x4, stride 2", (2, 16, 16, 14), (48, 16, 4, 4), 2, 1),
    ConvCase("columns of several blocks of filters", (1, 34, 10, 11), (520, 34, 1, 1)),
    ConvCase("columns of 3x3, stride 2", (1, 9, 21, 22), (260, 9, 3, 3), 2, 1),
    ConvCase("columns of 2x2, longer sums", (1, 12, 20, 22), (1280, 12, 2, 2), 2),
]
WHOLE_BLOCKS = [case for case in CONV_CASES if "whole channel blocks" in case.name]
PROMISES = {"highest": 1e-6, "high": 1e-5, "medium": 1e-2}
EXACT = next(row for row in ROWS["conv_forward"] if row[:2] == ("im2col", "numpy"))  #: in float64
NOISE = 1.05  #: two such figures of the same algorithm on other numbers differ by less
DRAWS = 4  #: of the numbers of a case


def padded(case: ConvCase, x: Array) -> Array:
    """Return the image with the padding of a two-dimensional case: (N, groups, C / groups, height, width)."""
    dims = case.dims
    sides = ((0, 0), (0, 0), *zip(dims.pad_before[1:], dims.pad_after[1:], strict=True))
    return (y := np.pad(x, sides)).reshape(len(x), case.groups, -1, *y.shape[2:])


def seen(case: ConvCase, cells: Array, i: int, j: int) -> Array:
    """Return what tap (i, j) sees of padded cells: one for each output."""
    (_, high, wide), (_, down, across) = case.dims.output_size, case.dims.stride
    return cells[..., i : i + (high - 1) * down + 1 : down, j : j + (wide - 1) * across + 1 : across]


def plain_sum(case: ConvCase, x: Array, w: Array) -> Array:
    """Convolution: one float32 product after the other is rounded and added."""
    cells, split = padded(case, x), w.reshape(case.groups, -1, *w.shape[1:])
    y = np.zeros((len(x), case.groups, split.shape[1], *case.output[2:]), x.dtype)
    for c, i, j in np.ndindex(*w.shape[1:]):
        y += seen(case, cells[:, :, None, c], i, j) * split[None, :, :, c, i, j, None, None]
    return y.reshape(case.output)


def plain_input_sum(case: ConvCase, dy: Array, w: Array) -> Array:
    """The gradient of the input in the same way."""
    split, grads = w.reshape(case.groups, -1, *w.shape[1:]), dy.reshape(len(dy), case.groups, -1, *dy.shape[2:])
    cells = padded(case, np.zeros(case.input, dy.dtype))
    for k, i, j in np.ndindex(split.shape[1], *w.shape[2:]):
        view = seen(case, cells, i, j)
        view += grads[:, :, k, None] * split[None, :, k, :, i, j, None, None]
    (_, top, left), (_, height, width) = case.dims.pad_before, case.dims.input_size
    return cells[..., top : top + height, left : left + width].reshape(case.input)


def plain_weight_sum(case: ConvCase, x: Array, dy: Array) -> Array:
    """The gradient of the weights: one pixel's products after the other."""
    cells, split = padded(case, x), dy.reshape(len(dy), case.groups, -1, 1, 1, 1, *dy.shape[2:])
    (_, kh, kw), (_, down, across) = case.dims.kernel_size, case.dims.stride
    sums = np.zeros((case.groups, split.shape[2], *case.weight[1:]), x.dtype)
    for image, i, j in np.ndindex(len(x), *dy.shape[2:]):
        patch = cells[image, :, None, :, i * down : i * down + kh, j * across : j * across + kw]
        sums += patch * split[image, ..., i, j]
    return sums.reshape(case.weight)


def relative_error(result: Array, exact: Array) -> float:
    return float(np.sqrt(np.mean(np.square(result - exact)) / np.mean(np.square(exact))))


class Draw(NamedTuple):
    """Numbers of a case, what is exact, and what adding up one product after the other makes of them."""

    arrays: ConvArrays
    exact: ConvResults
    plain: ConvResults


@cache
def draws(case: ConvCase, numbers: str) -> list[Draw]:
    """Return several: with a single one, a few weights decide which of two sums is the more exact."""
    return [draw(case, numbers, seed) for seed in range(DRAWS)]


def draw(case: ConvCase, numbers: str, seed: int) -> Draw:
    x, w, b, dy = case.arrays(np.float32, seed)
    if numbers == "after a ReLU":
        x, dy = np.maximum(x, 0), np.maximum(dy, 0)
    if numbers == "with a long tail":
        x, w, dy = x**5, w**3, dy**3
    arrays = ConvArrays(x, w, np.zeros_like(b), dy)
    plain = ConvResults(
        output=plain_sum(case, x, w),
        grad_input=plain_input_sum(case, dy, w),
        grad_weight=plain_weight_sum(case, x, dy),
        grad_bias=None,
    )
    return Draw(arrays, conv_results(case, arrays.astype(np.float64), EXACT), plain)


@pytest.mark.parametrize("numbers", ["of both signs", "after a ReLU"])
@for_every_row(CASES)
def test_highest_is_no_worse_than_plain_float32(row: Row, case: ConvCase, numbers: str) -> None:
    assert_no_worse_than_plain(row, case, numbers)


@for_every_row([case for case in CASES if case.weight[1] >= 40])
def test_highest_is_no_worse_where_few_numbers_are_far_above_the_others(row: Row, case: ConvCase) -> None:
    assert_no_worse_than_plain(row, case, "with a long tail")


def assert_no_worse_than_plain(row: Row, case: ConvCase, numbers: str) -> None:
    drawn = draws(case, numbers)
    results = [conv_results(case, each.arrays, row) for each in drawn]
    for name in ("output", "grad_input", "grad_weight"):
        if getattr(results[0], name) is not None:
            exact, plain, result = (
                np.stack([getattr(one, name) for one in those])
                for those in ([each.exact for each in drawn], [each.plain for each in drawn], results)
            )
            error, allowed = relative_error(result, exact), NOISE * relative_error(plain, exact)
            assert error <= allowed, f"{name}: {error:.3g}, plain float32 has {allowed:.3g}"


@pytest.mark.parametrize("precision", PROMISES)
@for_every_row(CASES)
def test_the_promise_of_each_word(row: Row, case: ConvCase, precision: str) -> None:
    arrays = case.arrays(np.float32)
    exact = conv_results(case, arrays.astype(np.float64), EXACT)
    results = conv_results(case, arrays, row, precision=precision)
    for name, result, answer in zip(exact._fields, results, exact, strict=True):
        if result is not None:
            assert relative_error(result, answer) <= PROMISES[precision], name


@pytest.mark.parametrize(("scale", "weight_scale"), [(1e-36, 1), (1e-26, 1), (1, 1e-30), (1e12, 1e12), (1e30, 1)])
@pytest.mark.parametrize("precision", PROMISES)
@for_every_row([ConvCase(f"{k}x{k}", (1, 32, 9, 8), (16, 32, k, k), 1, k // 2) for k in (1, 3)], "conv_forward")
def test_the_promises_hold_for_small_and_large_numbers(
    row: Row, case: ConvCase, precision: str, scale: float, weight_scale: float
) -> None:
    x, w, _, _ = case.arrays(np.float32)
    x, w = x * np.float32(scale), w * np.float32(weight_scale)
    exact = fc.conv2d(x.astype(np.float64), w.astype(np.float64), **case.geometry, **how(EXACT))
    result = fc.conv2d(x, w, **case.geometry, **how(row), precision=precision)
    assert relative_error(result, exact) <= PROMISES[precision]


@pytest.mark.parametrize(
    ("scale", "grad_scale"), [(1e-36, 1), (1, 1e-36), (1e-26, 1), (1, 1e-30), (1e12, 1e12), (1e30, 1), (1, 1e30)]
)
@pytest.mark.parametrize("precision", PROMISES)
@for_every_row([ConvCase(f"rows of {n}", (2, 32, 8, n), (18, 32, 3, 3), 1, 1) for n in (8, 32)], "conv_weight_grad")
def test_the_promises_of_the_weight_gradient_hold_for_small_and_large_numbers(
    row: Row, case: ConvCase, precision: str, scale: float, grad_scale: float
) -> None:
    x, _, _, dy = case.arrays(np.float32)
    x, dy = x * np.float32(scale), dy * np.float32(grad_scale)
    gradient = conv_function(2, "weight")
    exact = gradient(x.astype(np.float64), case.weight, dy.astype(np.float64), **case.geometry, **how(EXACT))
    result = gradient(x, case.weight, dy, **case.geometry, **how(row), precision=precision)
    assert relative_error(result, exact) <= PROMISES[precision]


@pytest.mark.skipif(isa() != "amx", reason="only AMX multiplies pieces of numbers")
@pytest.mark.parametrize(
    ("algorithm", "case"),
    [
        ("direct", ConvCase("1x1", (1, 40, 12, 11), (20, 40, 1, 1))),
        ("direct", ConvCase("3x3", (1, 40, 12, 11), (20, 40, 3, 3), 1, 1)),
        ("direct", ConvCase("patches", (1, 3, 21, 20), (50, 3, 7, 7), 2, 3)),
        ("im2col", ConvCase("1x1", (1, 40, 12, 11), (40, 40, 1, 1))),
        ("im2col", ConvCase("3x3", (1, 40, 12, 11), (40, 40, 3, 3), 2, 1)),
        ("winograd", ConvCase("3x3", (1, 40, 12, 11), (20, 40, 3, 3), 1, 1)),
    ],
)
def test_amx_takes_the_precision_at_its_word(algorithm: str, case: ConvCase) -> None:
    """What is allowed to be less exact is: else the tile was not used, and nothing here tests it."""
    x, w, _, _ = case.arrays(np.float32)
    exact = fc.conv2d(x.astype(np.float64), w.astype(np.float64), **case.geometry, **how(EXACT))
    asked = {"engine": "cython", "algorithm": algorithm, **case.geometry}
    errors = [relative_error(fc.conv2d(x, w, precision=word, **asked), exact) for word in PROMISES]
    assert errors[0] < 3e-7
    assert errors[2] > 1e-3


@pytest.mark.skipif(isa() != "amx", reason="only AMX multiplies pieces of numbers")
@pytest.mark.parametrize("case", [case for case in CONV_CASES if case.name == "3x3 of many filters, stride 2"])
def test_amx_takes_the_precision_of_columns_at_its_word(case: ConvCase) -> None:
    _, w, _, dy = case.arrays(np.float32)
    exact = fc.grad.conv2d_input(case.input, w.astype(np.float64), dy.astype(np.float64), **case.geometry, **how(EXACT))
    asked = {"engine": "cython", "algorithm": "im2col", **case.geometry}
    errors = [relative_error(fc.grad.conv2d_input(case.input, w, dy, precision=p, **asked), exact) for p in PROMISES]
    assert errors[0] < 3e-7
    assert errors[2] > 1e-3


@pytest.mark.skipif(isa() != "amx", reason="only AMX multiplies pieces of numbers")
@pytest.mark.parametrize(
    "case",
    [*WHOLE_BLOCKS, *(case for case in CONV_CASES if case.name.startswith("1x1 of many filters"))],
    ids=str,
)
def test_amx_takes_the_precision_of_the_weight_gradient_at_its_word(case: ConvCase) -> None:
    x, _, _, dy = case.arrays(np.float32)
    gradient = conv_function(case.spatial, "weight")
    exact = gradient(x.astype(np.float64), case.weight, dy.astype(np.float64), **case.geometry, **how(EXACT))
    asked = {"engine": "cython", "algorithm": "direct", **case.geometry}
    errors = [relative_error(gradient(x, case.weight, dy, precision=word, **asked), exact) for word in PROMISES]
    assert errors[0] < 3e-7
    assert errors[1] > 1e-6
    assert errors[2] > 1e-3
