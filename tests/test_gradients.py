"""Gradients: exactly adjoint to what they are the gradients of, and equal to finite differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from cases import (
    CONV_CASES,
    NAIVE_ROW,
    POOL_CASES,
    Array,
    ConvArrays,
    ConvCase,
    ConvResults,
    PoolCase,
    conv_results,
    for_every_row,
    how,
)

import fastconv as fc
from fastconv.registry import Row

Function = Callable[[Array], Array]
LAYOUTS = ("NCHW", "NHWC")


def inner(a: Array, b: Array) -> float:
    return float(np.vdot(a, b))


def assert_adjoint(left: tuple[Array, Array], *others: tuple[Array, Array]) -> None:
    """<a, b> = <c, d> to rounding: relative to the sum of the products' magnitudes, not to what cancellation leaves."""
    value, size = inner(*left), inner(np.abs(left[0]), np.abs(left[1]))
    for other in others:
        assert abs(inner(*other) - value) <= 1e-13 * (size + inner(np.abs(other[0]), np.abs(other[1]))) + 1e-300


def finite_difference(function: Function, at: Array, grad_output: Array, step: float) -> Array:
    """d <function(x), grad_output> / dx by central differences, one element after the other."""
    result = np.empty_like(at)
    for index in np.ndindex(at.shape):
        moved = at.copy()
        moved[index] = at[index] + step
        upper = inner(function(moved), grad_output)
        moved[index] = at[index] - step
        result[index] = (upper - inner(function(moved), grad_output)) / (2 * step)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------------


@for_every_row(CONV_CASES)
def test_convolution_and_its_gradients_are_adjoint(row: Row, case: ConvCase) -> None:
    """<conv(x, w), dy> = <x, input_grad(w, dy)> = <w, weight_grad(x, dy)>, and <1, dy> for the bias.

    Where a row has no kernel for one of them, the textbook loops stand in.
    """
    arrays = case.arrays(np.float64, seed=1)
    x, w, b, dy = arrays._replace(bias=np.zeros_like(arrays.bias))
    own = conv_results(case, ConvArrays(x, w, b, dy), row)
    if any(result is None for result in own):
        loops = conv_results(case, ConvArrays(x, w, b, dy))
        own = ConvResults(*(b if a is None else a for a, b in zip(own, loops, strict=True)))
    assert_adjoint((own.output, dy), (x, own.grad_input), (w, own.grad_weight))
    np.testing.assert_allclose(own.grad_bias, dy.sum(axis=(0, *range(2, dy.ndim))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [0, 2, [(1, 0)], "same", "same_lower"])
@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 2), (1, 2, 1), (3, 2, 2)])
def test_convolution_against_finite_differences(
    engine: str, rng: np.random.Generator, padding: Any, stride: int, dilation: int, groups: int
) -> None:
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    x, w = rng.standard_normal((2, 4, 9)), rng.standard_normal((6, 4 // groups, 3))
    b = rng.standard_normal(6)
    dy = rng.standard_normal(fc.conv1d(x, w, **geometry).shape)
    dx, dw, db = fc.grad.conv1d(x, w, dy, **geometry, engine=engine)

    def forward(x: Array, w: Array, b: Array) -> Array:
        return fc.conv1d(x, w, b, **geometry, engine=engine)

    # The convolution is linear in each argument, so that a step of 1 has no error but rounding.
    for gradient, function, at in (
        (dx, lambda v: forward(v, w, b), x),
        (dw, lambda v: forward(x, v, b), w),
        (db, lambda v: forward(x, w, v), b),
    ):
        np.testing.assert_allclose(gradient, finite_difference(function, at, dy, 1.0), rtol=1e-10, atol=1e-11)


@for_every_row(
    [ConvCase("3x3 of many small images", (48, 16, 9, 9), (17, 16, 3, 3), 1, 1)], "conv_weight_grad", NAIVE_ROW
)
def test_weights_sum_up_over_many_small_images(row: Row, case: ConvCase, dtype: Any) -> None:
    """A kernel may take several images at a time: none is left out, and none counts twice."""
    x, w, _, dy = case.arrays(dtype)
    together = fc.grad.conv2d(x, w, dy, **case.geometry, **how(row), needs=["weight", "bias"])
    patches = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    weight = np.einsum("nkyx,ncyxij->kcij", dy.astype(np.float64), patches.astype(np.float64), optimize=True)
    accuracy = {"atol": 2000 * np.finfo(dtype).eps, "rtol": 0}  # of sums of 3888 products of about 1
    np.testing.assert_allclose(together.weight, weight, **accuracy)
    np.testing.assert_allclose(together.bias, dy.sum((0, 2, 3), np.float64), **accuracy)


def test_only_what_is_needed_is_computed(rng: np.random.Generator) -> None:
    x, w = rng.standard_normal((2, 3, 8, 8)), rng.standard_normal((4, 3, 3, 3))
    dy = rng.standard_normal((2, 4, 6, 6))
    everything = fc.grad.conv2d(x, w, dy)
    for need in ("input", "weight", "bias"):
        alone = fc.grad.conv2d(x, w, dy, needs=[need])
        assert [name for name in alone._fields if getattr(alone, name) is not None] == [need]
        np.testing.assert_array_equal(getattr(alone, need), getattr(everything, need))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("spatial", "geometry"),
    [
        (1, {}),
        (1, {"stride": 2, "padding": 1, "output_padding": 1}),
        (2, {"stride": (2, 3), "padding": (1, 0), "output_padding": (0, 2)}),
        (2, {"stride": 2, "padding": 1, "dilation": 2, "output_padding": 1, "groups": 2}),
        (2, {"dilation": 3, "output_padding": 2}),
        (3, {"stride": (1, 2, 3), "groups": 2}),
    ],
)
def test_transposed_convolution_and_its_gradients_are_adjoint(
    engine: str, rng: np.random.Generator, spatial: int, geometry: dict[str, Any], layout: str
) -> None:
    size, kernel = (5, 4, 3)[:spatial], (3, 2, 2)[:spatial]
    x_shape, w_shape = (2, 4, *size), (4, 3, *kernel)
    if layout == "NHWC":
        x_shape, w_shape = (2, *size, 4), (*kernel, 3, 4)
    x, w = rng.standard_normal(x_shape), rng.standard_normal(w_shape)
    options: dict[str, Any] = {**geometry, "layout": layout, "engine": engine}
    y = getattr(fc, f"conv_transpose{spatial}d")(x, w, **options)
    dy = rng.standard_normal(y.shape)
    dx = getattr(fc.grad, f"conv_transpose{spatial}d_input")(x.shape, w, dy, **options)
    dw = getattr(fc.grad, f"conv_transpose{spatial}d_weight")(x, w.shape, dy, **options)
    assert_adjoint((y, dy), (x, dx), (w, dw))


def transposed(spatial: int, layout: str, rng: np.random.Generator, **options: Any) -> dict[str, Callable[..., Array]]:
    """A transposed convolution and its gradients by name; each takes what keywords there are beside ``options``."""
    size, kernel = (5, 4, 3)[:spatial], (3, 2, 2)[:spatial]
    x_shape, w_shape = ((2, *size, 4), (*kernel, 3, 4)) if layout == "NHWC" else ((2, 4, *size), (4, 3, *kernel))
    x, w, b = rng.standard_normal(x_shape), rng.standard_normal(w_shape), rng.standard_normal(6)
    options = {"stride": 2, "padding": 1, "groups": 2, "layout": layout, **options}
    forward = getattr(fc, f"conv_transpose{spatial}d")
    y = forward(x, w, b, **options)
    return {
        "output": partial(forward, x, w, b, **options),
        "input": partial(getattr(fc.grad, f"conv_transpose{spatial}d_input"), x.shape, w, y, **options),
        "weight": partial(getattr(fc.grad, f"conv_transpose{spatial}d_weight"), x, w.shape, y, **options),
    }


TRANSPOSED = pytest.mark.parametrize(("spatial", "layout"), [(n, layout) for n in (1, 2, 3) for layout in LAYOUTS])


@TRANSPOSED
def test_every_algorithm_computes_the_same_transposed_convolution(
    general_row: Row, spatial: int, layout: str, rng: np.random.Generator
) -> None:
    ways = ({"engine": "numpy", "algorithm": "naive"}, {**how(general_row), "precision": "high"})
    wanted, found = (transposed(spatial, layout, np.random.default_rng(0), **way) for way in ways)
    for name, call in found.items():
        np.testing.assert_allclose(call(), wanted[name](), rtol=1e-12, atol=1e-12, err_msg=name)


@TRANSPOSED
def test_a_transposed_convolution_goes_where_out_says(
    engine: str, spatial: int, layout: str, rng: np.random.Generator
) -> None:
    """Every second element of a larger array; what lies between stays as it was."""
    for call in transposed(spatial, layout, rng, engine=engine).values():
        result = call()
        large = np.full([2 * n for n in result.shape], 7.0)
        out = large[(slice(None, None, 2),) * large.ndim]
        assert call(out=out) is out
        np.testing.assert_allclose(out, result, rtol=1e-13, atol=1e-13)
        out[...] = 7
        assert (large == 7).all()
        with pytest.raises(ValueError, match="out must have shape"):
            call(out=large)


def test_out_of_a_transposed_convolution_may_be_its_input(engine: str, rng: np.random.Generator) -> None:
    x, w = rng.standard_normal((2, 4, 6, 6)), rng.standard_normal((4, 4, 3, 3))
    how: dict[str, Any] = {"padding": 1, "engine": engine}
    for call in (
        lambda a, out: fc.conv_transpose2d(a, w, **how, out=out),
        lambda a, out: fc.grad.conv_transpose2d_input(a.shape, w, a, **how, out=out),
    ):
        wanted, a = call(x, None).copy(), x.copy()
        np.testing.assert_array_equal(call(a, a), wanted)


@TRANSPOSED
def test_relu_is_applied_to_what_a_transposed_convolution_would_store(
    engine: str, spatial: int, layout: str, rng: np.random.Generator
) -> None:
    call = transposed(spatial, layout, rng, engine=engine)["output"]
    np.testing.assert_array_equal(call(activation="relu"), np.maximum(call(), 0))


@for_every_row(
    [
        ConvCase("stride 2", (2, 3, 8, 10), (8, 3, 3, 3), 2, 1),
        ConvCase("stride 1", (1, 18, 8, 9), (17, 18, 3, 3), 1, 1),
    ],
    "conv_input_grad",
)
def test_a_transposed_convolution_is_the_gradient_of_the_input(row: Row, case: ConvCase) -> None:
    _, w, _, dy = case.arrays(np.float64)
    np.testing.assert_array_equal(
        fc.conv_transpose2d(dy, w, stride=case.stride, padding=1, output_padding=case.stride - 1, **how(row)),
        fc.grad.conv2d_input(case.input, w, dy, **case.geometry, **how(row)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pooling
# ---------------------------------------------------------------------------------------------------------------------


def without_ties(shape: tuple[int, ...]) -> Array:
    """Numbers one apart in random order: no step below one half changes which is the largest."""
    return np.random.default_rng(3).permutation(np.prod(shape, dtype=int)).reshape(shape).astype(np.float64)


@pytest.mark.parametrize("case", POOL_CASES, ids=lambda case: case.name)
def test_max_pooling_passes_each_gradient_to_one_cell(case: PoolCase, pool_row: Row) -> None:
    """<pool(x), dy> = <x, gradient(dy)>, for the gradient is a selection."""
    x = without_ties(case.input)
    pool, gradient = getattr(fc, f"max_pool{case.spatial}d"), getattr(fc.grad, f"max_pool{case.spatial}d")
    for form in (True, "compact"):
        y, indices = pool(x, *case.window, return_indices=form, **how(pool_row))
        dy = np.random.default_rng(4).standard_normal(y.shape)
        assert_adjoint((y, dy), (x, gradient(x.shape, indices, dy, *case.window, **how(pool_row))))


POOLINGS: dict[str, tuple[Function, Callable[[Array, Array], Array]]] = {
    "max": (
        lambda x: fc.max_pool2d(x, 3, 2, 1),
        lambda x, dy: fc.grad.max_pool2d(x.shape, fc.max_pool2d(x, 3, 2, 1, return_indices=True)[1], dy, 3, 2, 1),
    ),
    "average": (
        lambda x: fc.avg_pool2d(x, 3, 2, 1, True),
        lambda x, dy: fc.grad.avg_pool2d(x.shape, dy, 3, 2, 1, True),
    ),
    "average without padding": (
        lambda x: fc.avg_pool2d(x, (3, 2), 2, 1, False, False),
        lambda x, dy: fc.grad.avg_pool2d(x.shape, dy, (3, 2), 2, 1, False, False),
    ),
    "average with a divisor": (
        lambda x: fc.avg_pool2d(x, 2, 1, divisor_override=3),
        lambda x, dy: fc.grad.avg_pool2d(x.shape, dy, 2, 1, divisor_override=3),
    ),
    "max-blur": (
        lambda x: fc.max_blur_pool2d(x, 2, 2),
        lambda x, dy: fc.grad.max_blur_pool2d(
            x.shape, fc.max_blur_pool2d(x, 2, 2, return_indices="compact")[1], dy, 2, 2
        ),
    ),
    "max-blur with an even filter": (
        lambda x: fc.max_blur_pool2d(x, (2, 3), (1, 2), 4),
        lambda x, dy: fc.grad.max_blur_pool2d(
            x.shape, fc.max_blur_pool2d(x, (2, 3), (1, 2), 4, return_indices=True)[1], dy, (2, 3), (1, 2), 4
        ),
    ),
}


@for_every_row([ConvCase("3x3", (1, 64, 6, 6), (64, 64, 3, 3), 1, 1)], "conv_weight_grad")
def test_the_gradient_of_no_images_is_zero(row: Row, case: ConvCase) -> None:
    """Whatever the workspace holds from the call before."""
    x, _, _, dy = (array + 1 for array in case.arrays(np.float32))
    assert fc.grad.conv2d_weight(x, case.weight, dy, padding=1, **how(row)).any()
    assert not fc.grad.conv2d_weight(x[:0], case.weight, dy[:0], padding=1, **how(row)).any()


@pytest.mark.parametrize("kind", POOLINGS)
def test_pooling_against_finite_differences(engine: str, kind: str) -> None:
    pool, gradient = POOLINGS[kind]
    x = without_ties((2, 2, 6, 7))
    with fc.config_context(engine=engine):
        dy = np.random.default_rng(5).standard_normal(pool(x).shape)
        wanted = finite_difference(pool, x, dy, 0.25)  # linear as long as the order of the numbers stays
        np.testing.assert_allclose(gradient(x, dy), wanted, rtol=1e-10, atol=1e-11)


def test_overlapping_windows_add_up(pool_row: Row) -> None:
    x = np.array([[[0.0, 1.0, 9.0, 2.0, 0.0]]])
    _, indices = fc.max_pool1d(x, 3, 1, return_indices=True, **how(pool_row))
    dx = fc.grad.max_pool1d(x.shape, indices, np.array([[[1.0, 10.0, 100.0]]]), 3, 1, **how(pool_row))
    assert dx[0, 0].tolist() == [0, 0, 111, 0, 0]


def test_what_is_needed_may_come_from_a_generator(rng: np.random.Generator) -> None:
    x, w, dy = (rng.standard_normal(shape) for shape in ((2, 3, 6, 6), (4, 3, 3, 3), (2, 4, 4, 4)))
    grads = fc.grad.conv2d(x, w, dy, needs=(name for name in ("weight", "bias")))  # type: ignore[arg-type]
    wanted = fc.grad.conv2d(x, w, dy)
    assert grads.input is None
    np.testing.assert_array_equal(grads.weight, wanted.weight)
    np.testing.assert_array_equal(grads.bias, wanted.bias)
