"""The numbers, formulas and questions of the lecture notes, section by section, on every algorithm of every engine.

MIT 6.036, "Convolutional Neural Networks", sections 9.1 to 9.4.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cases import how

import fastconv as fc
from fastconv.registry import Row

IMAGE = (0, 1, 1, 1, 0, 1, 0, 0)
F1 = (-1, +1)
F2 = (-1, +1, -1)


def row_of(values: tuple[float, ...], dtype: Any) -> Any:
    """One channel of one signal, or one filter of one channel: (1, 1, L)."""
    return np.array([[values]], dtype)


# ---------------------------------------------------------------------------------------------------------------------
# 9.1 Filters
# ---------------------------------------------------------------------------------------------------------------------


def test_f1_detects_left_edges(general_row: Row, dtype: Any) -> None:
    """Y_i = F . (X_{i-1}, X_i), so the zero of the padding goes before."""
    y = fc.conv1d(row_of(IMAGE, dtype), row_of(F1, dtype), padding="same_lower", **how(general_row))
    assert y[0, 0].tolist() == [0, 1, 0, 0, -1, 1, -1, 0]
    assert y.dtype == dtype


def test_f2_detects_isolated_pixels(general_row: Row, dtype: Any) -> None:
    """Output pixel i is that where the centre of F2 is aligned with input pixel i."""
    y = fc.conv1d(row_of(IMAGE, dtype), row_of(F2, dtype), padding="same", **how(general_row))
    assert y[0, 0].tolist() == [-1, 0, -1, 0, -2, 1, -1, 0]


def test_a_bias_is_added_to_every_output(general_row: Row, dtype: Any) -> None:
    bias = np.array([0.5], dtype)
    y = fc.conv1d(row_of(IMAGE, dtype), row_of(F2, dtype), bias, padding="same", **how(general_row))
    assert y[0, 0].tolist() == [-0.5, 0.5, -0.5, 0.5, -1.5, 1.5, -0.5, 0.5]


def test_two_filters_make_two_channels(general_row: Row, dtype: Any) -> None:
    """F1 with a zero in front looks at (X_{i-1}, X_i) through a window of three."""
    bank = np.array([[(-1, +1, 0)], [F2]], dtype)
    y = fc.conv1d(row_of(IMAGE, dtype), bank, padding=1, **how(general_row))
    assert y[0].tolist() == [[0, 1, 0, 0, -1, 1, -1, 0], [-1, 0, -1, 0, -2, 1, -1, 0]]


def test_a_convolution_of_signal_processing_flips_the_filter(general_row: Row, dtype: Any) -> None:
    y = fc.conv1d(row_of(IMAGE, dtype), row_of(F1, dtype), padding=1, flip_kernel=True, **how(general_row))
    assert y[0, 0].tolist() == np.convolve(IMAGE, F1).tolist()


def test_a_tensor_filter_combines_the_bars_of_a_filter_bank(general_row: Row, dtype: Any) -> None:
    """Two 3x3 filters look for three pixels in a row, vertically and horizontally; a third one for both."""
    image = np.zeros((1, 1, 5, 5), dtype)
    image[0, 0, 1:4, 2] = image[0, 0, 2, 1:4] = 1  # a plus sign
    bars = np.zeros((2, 1, 3, 3), dtype)
    bars[0, 0, :, 1] = bars[1, 0, 1, :] = 1
    found = fc.conv2d(image, bars, padding=1, **how(general_row))
    assert found.shape == (1, 2, 5, 5)
    assert (found[0, 0, 2, 2], found[0, 1, 2, 2]) == (3, 3)
    both = fc.conv2d(found, np.ones((1, 2, 1, 1), dtype), **how(general_row))
    assert both.shape == (1, 1, 5, 5)
    assert np.unravel_index(both.argmax(), both.shape) == (0, 0, 2, 2)
    assert both.max() == 6


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [5, 8, 11])
def test_the_size_of_the_output(n: int, k: int, padding: int, stride: int) -> None:
    y = fc.conv2d(np.ones((1, 2, n, n)), np.ones((3, 2, k, k)), stride=stride, padding=padding)
    n_out = math.ceil((n + 2 * padding - (k - 1)) / stride)
    assert y.shape == (1, 3, n_out, n_out)


def test_a_stride_of_two_makes_an_image_of_half_the_size() -> None:
    assert fc.conv2d(np.ones((1, 1, 64, 64)), np.ones((1, 1, 3, 3)), stride=2, padding=1).shape == (1, 1, 32, 32)


def test_the_number_of_weights() -> None:
    """m filters of k * k * m' weights and one bias each, however large the image is."""
    m, k, channels = 16, 5, 3
    layer = fc.layers.Conv2d(channels, m, k)
    assert sum(p.size for p in layer.params.values()) == m * (k * k * channels + 1)


# ---------------------------------------------------------------------------------------------------------------------
# 9.2 Max pooling
# ---------------------------------------------------------------------------------------------------------------------


def test_pooling_halves_an_image_and_keeps_its_channels(pool_row: Row, rng: np.random.Generator, dtype: Any) -> None:
    image = rng.standard_normal((64, 64, 3)).astype(dtype)  # 64x64x3, as the notes write it
    pooled = fc.max_pool2d(image, 2, stride=2, layout="NHWC", **how(pool_row))
    assert pooled.shape == (32, 32, 3)
    np.testing.assert_array_equal(pooled, image.reshape(32, 2, 32, 2, 3).max(axis=(1, 3)))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_two_pools_of_size_k_are_one_of_size_2k_minus_1(pool_row: Row, rng: np.random.Generator, k: int) -> None:
    """Maximilian Poole's question."""
    image = rng.standard_normal((2, 3, 13, 14))
    once = fc.max_pool2d(image, k, stride=1, **how(pool_row))
    np.testing.assert_array_equal(
        fc.max_pool2d(once, k, stride=1, **how(pool_row)), fc.max_pool2d(image, 2 * k - 1, stride=1, **how(pool_row))
    )


def test_blurring_makes_pooling_less_sensitive_to_a_shift(engine: str) -> None:
    """The paper that section 9.2 names, with the signal of its figure 3."""
    signal = np.tile([0.0, 0.0, 1.0, 1.0], 4)[None, None]
    shifted = np.roll(signal, 1)

    def inside(pool: Any, x: Any) -> list[float]:
        values: list[float] = pool(x, 2, 2, engine=engine)[0, 0, 1:-1].tolist()
        return values

    assert inside(fc.max_pool1d, signal) == [1, 0, 1, 0, 1, 0]
    assert inside(fc.max_pool1d, shifted) == [1, 1, 1, 1, 1, 1]
    assert inside(fc.max_blur_pool1d, signal) == [1, 0.5, 1, 0.5, 1, 0.5]
    assert inside(fc.max_blur_pool1d, shifted) == [0.75, 0.75, 0.75, 0.75, 0.75, 0.75]


# ---------------------------------------------------------------------------------------------------------------------
# 9.4 Backpropagation in a simple CNN
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(6, 3), (10, 5), (13, 1), (9, 7)])
def test_the_weight_update_is_the_product_of_the_three_matrices(
    general_row: Row, rng: np.random.Generator, n: int, k: int
) -> None:
    """dloss/dW1 [k x 1] = dZ1/dW1 [k x n] * dA1/dZ1 [n x n] * dloss/dA1 [n x 1]."""
    x, w1, w2, y = rng.standard_normal(n), rng.standard_normal(k), rng.standard_normal(n), rng.standard_normal()
    z1 = fc.conv1d(row_of(x, np.float64), row_of(w1, np.float64), padding=k // 2, **how(general_row))
    a1 = np.maximum(z1, 0)
    a2 = w2 @ a1[0, 0]

    padded = np.pad(x, k // 2)
    dz_dw = np.array([padded[j : j + n] for j in range(k)])  # dZ_i/dW_j = X_{i - floor(k/2) + j - 1}, j from 1
    da_dz = np.diag((z1[0, 0] > 0).astype(float))
    dloss_da = 2 * (a2 - y) * w2
    wanted = dz_dw @ da_dz @ dloss_da

    grad_z1 = dloss_da * (z1 > 0)
    grad_w1 = fc.grad.conv1d_weight(row_of(x, np.float64), (1, 1, k), grad_z1, padding=k // 2, **how(general_row))
    np.testing.assert_allclose(grad_w1[0, 0], wanted, rtol=1e-12, atol=1e-12)


def test_column_10_of_the_matrix_for_k_5() -> None:
    """ "If i = 10 and k = 5, then the elements in column 10 will be X_8, X_9, X_10, X_11, X_12"."""
    x = np.arange(1.0, 16.0)  # X_i = i
    pixel = np.zeros((1, 1, 15))
    pixel[0, 0, 10 - 1] = 1
    column = fc.grad.conv1d_weight(x[None, None], (1, 1, 5), pixel, padding=2)
    assert column[0, 0].tolist() == [8, 9, 10, 11, 12]


def test_the_simple_cnn_as_layers(engine: str, rng: np.random.Generator) -> None:
    """The same update by conv, ReLU, fully connected and squared loss."""
    n, k = 8, 3
    x, target = rng.standard_normal((1, 1, n)), np.array([[0.3]])
    conv = fc.layers.Conv1d(1, 1, k, padding=k // 2, bias=False, rng=np.random.default_rng(1))
    linear = fc.layers.Linear(n, 1, bias=False, rng=np.random.default_rng(2))
    model = fc.layers.Sequential(conv, fc.layers.ReLU(), fc.layers.Flatten(), linear)
    with fc.config_context(engine=engine):
        x = x.astype(conv.params["weight"].dtype)
        _, grad = fc.losses.squared_error(model(x), target.astype(x.dtype))
        model.backward(grad)

    w1, w2 = conv.params["weight"][0, 0].astype(float), linear.params["weight"].ravel().astype(float)
    dz_dw = np.array([np.pad(x[0, 0], k // 2)[j : j + n] for j in range(k)])
    z1 = w1 @ dz_dw
    a2 = w2 @ np.maximum(z1, 0)
    wanted = dz_dw @ np.diag((z1 > 0).astype(float)) @ (2 * (a2 - target[0, 0]) * w2)
    np.testing.assert_allclose(conv.grads["weight"][0, 0], wanted, rtol=1e-4)


def test_the_gradient_goes_to_the_larger_of_two(pool_row: Row, dtype: Any) -> None:
    """y = max(a1, a2): the error at y is propagated back entirely to the larger one."""
    for a, winner in (((3, 1), 0), ((1, 3), 1)):
        pair = row_of(a, dtype)
        y, indices = fc.max_pool1d(pair, 2, return_indices=True, **how(pool_row))
        assert y[0, 0].tolist() == [3]
        assert indices[0, 0].tolist() == [winner]
        grad = fc.grad.max_pool1d((1, 1, 2), indices, np.full((1, 1, 1), 7, dtype), 2, **how(pool_row))
        assert grad[0, 0].tolist() == [7 if i == winner else 0 for i in range(2)]


def test_the_first_of_two_equal_ones_wins(pool_row: Row, dtype: Any) -> None:
    y, indices = fc.max_pool1d(row_of((2, 2), dtype), 2, return_indices=True, **how(pool_row))
    grad = fc.grad.max_pool1d((1, 1, 2), indices, np.ones_like(y), 2, **how(pool_row))
    assert (y.item(), indices.item(), grad[0, 0].tolist()) == (2, 0, [1, 0])
