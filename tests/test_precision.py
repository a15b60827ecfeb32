"""The promise of precision="highest": no worse than plain float32 accumulation, as RMS of error over RMS of result."""

from __future__ import annotations

import numpy as np
from cases import Array, ConvArrays, ConvCase, conv_results, for_every_row

from fastconv.registry import ROWS, Row

CASES = [
    ConvCase(f"{c} to {k} channels, {g} groups", (2, c, 20, 20), (k, c // g, 3, 3), 1, 1, 1, g)
    for c, k, g in ((1, 8, 1), (3, 8, 1), (8, 8, 1), (16, 16, 1), (33, 17, 1), (64, 32, 1), (8, 8, 8))
]
EXACT = next(row for row in ROWS["conv_forward"] if row[:2] == ("im2col", "numpy"))  #: in float64
NOISE = 1.05  #: two such figures of the same algorithm on other numbers differ by less


def plain_sum(x: Array, w: Array, groups: int) -> Array:
    """3x3 convolution with padding 1: one float32 product after the other is rounded and added."""
    (n, _, height, width), (filters, channels, _, _) = x.shape, w.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))).reshape(n, groups, channels, height + 2, width + 2)
    split = w.reshape(groups, filters // groups, channels, 3, 3)
    y = np.zeros((n, groups, filters // groups, height, width), x.dtype)
    for c, i, j in np.ndindex(channels, 3, 3):
        y += padded[:, :, None, c, i : i + height, j : j + width] * split[None, :, :, c, i, j, None, None]
    return y.reshape(n, filters, height, width)


def relative_error(result: Array, exact: Array) -> float:
    return float(np.sqrt(np.mean(np.square(result - exact)) / np.mean(np.square(exact))))


@for_every_row(CASES, "conv_forward")
def test_highest_is_no_worse_than_plain_float32(row: Row, case: ConvCase) -> None:
    x, w, b, dy = case.arrays(np.float32)
    b = np.zeros_like(b)
    exact = conv_results(case, ConvArrays(x, w, b, dy).astype(np.float64), EXACT)
    results = conv_results(case, ConvArrays(x, w, b, dy), row)
    rotated = w.reshape(case.groups, -1, *w.shape[1:]).swapaxes(1, 2).reshape(case.input[1], -1, 3, 3)[..., ::-1, ::-1]
    for name, plain in (("output", plain_sum(x, w, case.groups)), ("grad_input", plain_sum(dy, rotated, case.groups))):
        result, answer = getattr(results, name), getattr(exact, name)
        if result is not None:
            error, allowed = relative_error(result, answer), NOISE * relative_error(plain, answer)
            assert error <= allowed, f"{name}: {error:.3g}, plain float32 has {allowed:.3g}"
