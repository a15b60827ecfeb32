"""Fixed point: on AMX, long sums of numbers of about one size are made of digits; what that may and may not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import Array, ConvCase, conv_function, for_every_row, how, rows_of

import fastconv as fc
from fastconv.registry import Row
from fastconv.runtime import isa

CASES = [
    ConvCase("3x3 of 64 channels", (5, 64, 9, 8), (40, 64, 3, 3), 1, 1),
    ConvCase("3x3 of 160 channels", (5, 160, 6, 7), (40, 160, 3, 3), 1, 1),
    ConvCase("1x1 of 256 channels", (5, 256, 7, 6), (112, 256, 1, 1)),
    ConvCase("1x1 of 1100 channels", (5, 1100, 7, 7), (112, 1100, 1, 1)),
    ConvCase("11x11 of 3 channels, stride 4", (5, 3, 43, 39), (40, 3, 11, 11), 4, 5),
]
DIGITS = [("direct", CASES[4]), ("direct", CASES[0]), ("direct", CASES[1]), ("im2col", CASES[2]), ("im2col", CASES[3])]


def convolve(case: ConvCase, x: Array, w: Array, row: Row, **keywords: Any) -> Array:
    result: Array = conv_function(case.spatial)(x, w, **case.geometry, **how(row), **keywords)
    return result


@pytest.mark.skipif(isa() != "amx", reason="only AMX multiplies digits")
@pytest.mark.parametrize(("algorithm", "case"), DIGITS)
def test_digits_are_used_unless_one_number_is_far_above_the_others(algorithm: str, case: ConvCase) -> None:
    """What far pixels come to differs in its last bits: else one of the two was not used, and nothing here tests it."""
    x, w, _, _ = case.arrays(np.float32)
    asked = {"engine": "cython", "algorithm": algorithm, **case.geometry}
    ordinary = fc.conv2d(x, w, **asked)
    x[0, 0, 0, 0] = 1e4
    outlier = fc.conv2d(x, w, **asked)
    assert not np.array_equal(outlier[0, :, -2:], ordinary[0, :, -2:])
    np.testing.assert_allclose(outlier[0, :, -2:], ordinary[0, :, -2:], rtol=1e-3, atol=1e-4)


@for_every_row(CASES, "conv_forward")
def test_images_of_other_sizes_leave_each_other_their_bits(row: Row, case: ConvCase) -> None:
    x, w, _, _ = case.arrays(np.float32)
    x[1, 0, 0, 0] = 1e4
    x[2] = 0
    x[3] *= np.float32(1e-30)
    together = convolve(case, x, w, row)
    for i in range(5):
        assert convolve(case, x[i : i + 1], w, row).tobytes() == together[i : i + 1].tobytes()


@pytest.mark.parametrize("far", [1e4, 1e-4])
@for_every_row(CASES, "conv_forward")
def test_weights_of_other_sizes_are_as_exact_as_others(row: Row, case: ConvCase, far: float) -> None:
    """Each filter by itself: one with an outlier, one that is smaller, one of zeros, one of few weights."""
    x, w, _, _ = case.arrays(np.float32)
    w[0, 0] *= np.float32(far)
    w[1] *= np.float32(far)
    w[2] = 0
    w[3, 1:] = 0
    result, exact = convolve(case, x, w, row), convolve(case, x.astype(np.float64), w.astype(np.float64), row)
    scale = np.sqrt(np.mean(np.square(exact), axis=(0, 2, 3)))
    error = np.sqrt(np.mean(np.square(result - exact), axis=(0, 2, 3)))
    assert (error <= 1e-6 * scale).all()


@pytest.mark.parametrize(
    ("row", "case"),
    [(row, case) for case in CASES for row in rows_of(case, "conv_forward") if row.algorithm != "winograd"],
    ids=str,
)
def test_small_integers_are_exact(row: Row, case: ConvCase) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-9, 10, shape).astype(np.float32) for shape in (case.input, case.weight))
    exact = convolve(case, x.astype(np.float64), w.astype(np.float64), row)
    np.testing.assert_array_equal(convolve(case, x, w, row), exact)


@for_every_row(CASES, "conv_forward")
def test_kept_weights_give_the_same_bits(row: Row, case: ConvCase) -> None:
    """Whether digits are enough is asked of each image, not of the first that met the weights."""
    x, w, _, _ = case.arrays(np.float32)
    (kernel,), filters = set(case.weight[2:]), case.weight[0]
    layer = fc.layers.Conv2d(case.input[1], filters, kernel, case.geometry["stride"], kernel // 2, bias=False)
    layer.options = how(row)
    layer.params["weight"][...] = w
    layer.eval()
    for size in (1e4, 1.0):
        x[0, 0, 0, 0] = size
        assert layer(x).tobytes() == convolve(case, x, w, row).tobytes()


@pytest.mark.skipif(isa() != "amx", reason="only AMX multiplies digits")
def test_an_image_near_the_limit_leaves_its_neighbours_their_bits() -> None:
    """For it all filters are asked: together they refuse what each of them allows, an image that isn't near."""
    rng = np.random.default_rng(5)
    x = rng.uniform(-1, 1, (2, 208, 20, 20)).astype(np.float32)
    x[0] = rng.standard_normal(x[0].shape)
    w = rng.standard_normal((64, 208, 1, 1)).astype(np.float32)
    w[33:48] = np.where(np.arange(208) % 4, 0, 1)[:, None, None]  # not the first of each 16, which are tried
    w[49:, 0] = 5
    asked: dict[str, Any] = {"engine": "cython", "algorithm": "im2col"}
    together = fc.conv2d(x, w, **asked)
    for i in range(2):
        assert together[i].tobytes() == fc.conv2d(x[i], w, **asked).tobytes()


ZEROS = [
    ("direct", ConvCase("3x3", (8, 256, 16, 16), (40, 256, 3, 3), 1, 1)),
    ("im2col", ConvCase("1x1", (8, 1280, 16, 16), (48, 1280, 1, 1))),
]
PLAIN = 0.294 / 2**24  #: error of a sum of one product, by which that of plain sums grows as the root of their length


def rms(result: Array, exact: Array) -> float:
    return float(np.sqrt(np.mean(np.square(result - exact)) / np.mean(np.square(exact))))


@pytest.mark.skipif(isa() != "amx", reason="only AMX multiplies digits")
@pytest.mark.parametrize("where", ["image", "weights"])
@pytest.mark.parametrize(("algorithm", "case"), ZEROS)
def test_channels_of_zeros_make_sums_no_longer(algorithm: str, case: ConvCase, where: str) -> None:
    x, w, _, _ = case.arrays(np.float32)
    channels = case.input[1] // 4
    (x if where == "image" else w)[:, channels:] = 0
    asked = {"engine": "cython", "algorithm": algorithm, **case.geometry}
    exact = fc.conv2d(x.astype(np.float64), w.astype(np.float64), **asked)
    assert rms(fc.conv2d(x, w, **asked), exact) < PLAIN * np.sqrt(channels * case.dims.taps)


@pytest.mark.skipif(isa() != "amx", reason="only AMX multiplies digits")
@pytest.mark.parametrize("side", [16, 13, 7])
def test_images_of_zeros_make_sums_no_longer(side: int) -> None:
    """Small images are summed up together: by how many of them a sum is long."""
    case = ConvCase("3x3", (8, 256, side, side), (40, 256, 3, 3), 1, 1)
    x, w, _, dy = case.arrays(np.float32)
    dy[1:] = 0
    gradient, asked = conv_function(2, "weight"), {"engine": "cython", "algorithm": "direct", **case.geometry}
    exact = gradient(x.astype(np.float64), w.shape, dy.astype(np.float64), **asked)
    assert rms(gradient(x, w.shape, dy, **asked), exact) < PLAIN * np.sqrt(dy[0, 0].size)
