"""inf and NaN come out as IEEE 754 has them: a sum with one NaN is NaN, inf - inf is NaN, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import CONV_CASES, NAIVE, Array, ConvArrays, ConvCase, conv_results, how, runs

import fastconv as fc
from fastconv.registry import Row

NAMES = ("3x3 of primes", "3x3, stride 2", "7x7, stride 2, few channels", "1x1", "depthwise", "groups of two", "volume")
CASES = [case for case in CONV_CASES if case.name in NAMES]


def poisoned(array: Array, value: float) -> Array:
    """The array with ``value`` in a few scattered places."""
    result = array.copy()
    result.reshape(-1)[:: max(array.size // 3, 1)] = value
    return result


def kinds(array: Array) -> Array:
    """What is left of an array if only the kind of each number counts: nan, inf, -inf or finite (0)."""
    return np.where(np.isfinite(array), 0, array)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's own warning, from the engine "numpy"
def test_nonfinite_images_spread_to_their_windows_and_no_further(
    case: ConvCase, value: float, conv_row: Row, dtype: Any
) -> None:
    for op in ("conv_forward", "conv_input_grad", "conv_weight_grad"):
        if not runs(conv_row, op, case.dims):
            pytest.skip(conv_row.supports(op, case.dims))
    x, w, b, dy = case.arrays(dtype)
    padded = any(case.dims.pad_before) or any(case.dims.pad_after)
    for where, arrays in {
        "input": ConvArrays(poisoned(x, value), w, b, dy),
        "grad_output": ConvArrays(x, w, b, poisoned(dy, value)),
    }.items():
        wanted = conv_results(case.spatial, arrays, case.geometry, **NAIVE)
        results = conv_results(case.spatial, arrays, case.geometry, **how(conv_row))
        for name, result, answer in zip(results._fields, results, wanted, strict=True):
            if where == "grad_output" and name == "grad_weight" and padded:
                continue  # whether a zero of the padding is multiplied by an infinite gradient is nobody's promise
            np.testing.assert_array_equal(kinds(result), kinds(answer), err_msg=f"{name} for {where}")


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_nonfinite_filter_spoils_its_own_channel_only(conv_row: Row, value: float, dtype: Any) -> None:
    case = ConvCase("without padding", (2, 9, 8, 9), (10, 9, 3, 3))
    x, w, b, _ = case.arrays(dtype)
    w[4, 2, 1, 1] = value
    y = fc.conv2d(x, w, b, **how(conv_row))
    np.testing.assert_array_equal(kinds(y), kinds(fc.conv2d(x, w, b, **NAIVE)))
    assert np.isfinite(y[:, np.arange(10) != 4]).all()
    assert not np.isfinite(y[:, 4]).any()


def test_a_nonfinite_bias_and_relu(conv_row: Row, dtype: Any) -> None:
    x, w = np.ones((1, 8, 4, 4), dtype), np.ones((3, 8, 3, 3), dtype)
    b = np.array([np.nan, -np.inf, np.inf], dtype)
    y = fc.conv2d(x, w, b, activation="relu", **how(conv_row))
    assert np.isnan(y[:, 0]).all()  # as NumPy's maximum and PyTorch's relu
    assert (y[:, 1] == 0).all()
    assert (y[:, 2] == np.inf).all()


def test_large_and_small_numbers_stay_in_range(conv_row: Row, dtype: Any) -> None:
    """One filter tap and one pixel at the ends of the type's range: nothing overflows or vanishes on the way."""
    info = np.finfo(dtype)
    for number in (info.max, -info.max, info.tiny):
        x, w = np.zeros((1, 9, 6, 6), dtype), np.zeros((9, 9, 3, 3), dtype)
        x[0, 3, 2, 2] = number
        w[5, 3, 1, 1] = 1
        y = fc.conv2d(x, w, padding=1, **how(conv_row))
        assert y[0, 5, 2, 2] == number
        assert np.count_nonzero(y) == 1
