"""inf and NaN come out as IEEE 754 has them: one NaN makes a sum NaN, inf - inf is NaN, and nothing else is touched."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from cases import (
    CONV_CASES,
    NAIVE,
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
from fastconv.registry import Row

NAMES = (
    "3x3 of primes",
    "3x3, stride 2",
    "7x7, stride 2, few channels",
    "1x1",
    "depthwise",
    "groups of two",
    "volume",
    "3x3 of one more than a tile",
    "3x3 of whole channel blocks",
    "3x3 of whole channel blocks, rows of 30, valid",
    "3x3 of 72 channels",
    "1x1 of many channels and filters",
    "1x1 of whole channel blocks",
    "1x1 of many filters",
    "3x3 of many filters, stride 2",
    "7x7, few channels, rows of 46, 33 filters",
    "5x5, groups of few channels, stride 2 down",
    "6x7, stride 3 across, few channels",
    "3x3, two filters, dilation 2, asymmetric padding",
    "signal, one filter of many channels",
)
CASES = [case for case in CONV_CASES if case.name in NAMES]


def poisoned(array: Array, value: float) -> Array:
    """The array with ``value`` in a few scattered places."""
    result = array.copy()
    result.reshape(-1)[:: max(array.size // 3, 1)] = value
    return result


def kinds(array: Array) -> Array:
    """What is left of an array if only the kind of each number counts: nan, inf, -inf or finite (0)."""
    return np.where(np.isfinite(array), 0, array)


@cache
def problem(case: ConvCase, where: str, value: float, dtype: Any) -> tuple[ConvArrays, ConvResults]:
    """The case with a poisoned input or grad_output, and what the textbook loops say of it."""
    arrays = case.arrays(dtype)
    arrays = arrays._replace(**{where: poisoned(getattr(arrays, where), value)})
    return arrays, conv_results(case, arrays)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("where", ["input", "grad_output"])
@for_every_row(CASES)
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's own warning, from the engine "numpy"
def test_nonfinite_images_spread_to_their_windows_and_no_further(
    row: Row, case: ConvCase, where: str, value: float, dtype: Any
) -> None:
    arrays, wanted = problem(case, where, value, dtype)
    padded = any(case.dims.pad_before) or any(case.dims.pad_after)
    for name, result, answer in zip(wanted._fields, conv_results(case, arrays, row), wanted, strict=True):
        if where == "grad_output" and name == "grad_weight" and padded:
            continue  # whether a zero of the padding is multiplied by an infinite gradient is nobody's promise
        if result is not None:
            np.testing.assert_array_equal(kinds(result), kinds(answer), err_msg=name)


@for_every_row(CASES)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_call_leaves_nothing_to_the_next(row: Row, case: ConvCase, dtype: Any) -> None:
    """Workspace is kept from call to call: what was in it, laid out in another way, doesn't matter."""
    arrays, larger = case.arrays(dtype), case._replace(input=(*case.input[:2], *(3 * n for n in case.input[2:])))
    wanted = conv_results(case, arrays, row)
    conv_results(larger, ConvArrays(*(np.full_like(array, np.nan) for array in larger.arrays(dtype))), row)
    for name, result, before in zip(wanted._fields, conv_results(case, arrays, row), wanted, strict=True):
        if result is not None:
            assert result.tobytes() == before.tobytes(), name


@pytest.mark.parametrize("value", [np.inf, np.nan])
@for_every_row(
    [
        ConvCase(f"{n} images of {c} channels", (n, c, 8, 9), (18, c, 3, 3))
        for n, c in ((1, 150), (2, 17), (2, 32), (2, 64), (5, 32))
    ],
    "conv_forward",
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_nonfinite_filter_spoils_its_own_channel_only(row: Row, case: ConvCase, value: float, dtype: Any) -> None:
    x, w, b, _ = case.arrays(dtype)
    w[4, -1, 1, 1] = value
    y = fc.conv2d(x, w, b, **how(row))
    np.testing.assert_array_equal(kinds(y), kinds(fc.conv2d(x, w, b, **NAIVE)))
    assert np.isfinite(y[:, np.arange(18) != 4]).all()
    assert not np.isfinite(y[:, 4]).any()


@pytest.mark.parametrize("value", [np.inf, 1e30])
@for_every_row(
    [
        ConvCase(f"{k}x{k} of {c}", (3, c, 8, 9), (18, c, k, k), 1, k // 2)
        for k, c in ((1, 32), (3, 32), (1, 200), (3, 48))
    ],
    "conv_forward",
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_image_beyond_all_bounds_leaves_its_neighbours_their_bits(
    row: Row, case: ConvCase, value: float, dtype: Any
) -> None:
    x, w, b, _ = case.arrays(dtype)
    wanted = conv_function(2)(x, w, b, **case.geometry, **how(row))
    x[1, 5, 3, 3] = value
    result = conv_function(2)(x, w, b, **case.geometry, **how(row))
    assert result[::2].tobytes() == wanted[::2].tobytes()
    assert not np.array_equal(result[1], wanted[1])


WIDE = [ConvCase(f"3x3, {c} channels", (1, c, 6, 6), (18, c, 3, 3), 1, 1) for c in (17, 32)]


@for_every_row(WIDE, "conv_forward")
def test_a_nonfinite_bias_and_relu(row: Row, case: ConvCase, dtype: Any) -> None:
    x, w, b, _ = case.arrays(dtype)
    b[:3] = np.nan, -np.inf, np.inf
    y = fc.conv2d(x, w, b, padding=1, activation="relu", **how(row))
    assert np.isnan(y[:, 0]).all()  # as NumPy's maximum and PyTorch's relu
    assert (y[:, 1] == 0).all()
    assert (y[:, 2] == np.inf).all()
    assert np.isfinite(y[:, 3:]).all()


@for_every_row(WIDE, "conv_forward")
def test_large_and_small_numbers_stay_in_range(row: Row, case: ConvCase, dtype: Any) -> None:
    """One filter tap and one pixel at the ends of the type's range: nothing overflows or vanishes on the way."""
    info = np.finfo(dtype)
    for number in (info.max, -info.max, info.tiny):
        x, w = np.zeros(case.input, dtype), np.zeros(case.weight, dtype)
        x[0, 3, 2, 2] = number
        w[5, 3, 1, 1] = 1
        y = fc.conv2d(x, w, padding=1, **how(row))
        assert y[0, 5, 2, 2] == number
        assert np.count_nonzero(y) == 1
