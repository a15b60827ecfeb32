"""Layers: parameters, a forward and a backward that fit each other, modes, files."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import how

import fastconv as fc
from fastconv.layers import (
    AvgPool2d,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose2d,
    Flatten,
    Layer,
    Linear,
    MaxBlurPool2d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    ReLU,
    Sequential,
    Softmax,
    _Conv,
    _MaxPool,
    _Windowed,
)
from fastconv.registry import Row, available
from fastconv.runtime import why_missing

Array = np.ndarray[Any, np.dtype[Any]]
F64: dict[str, Any] = {"rng": 0, "dtype": np.float64}

#: A layer and the shape of an input for it.
CASES: dict[str, tuple[Callable[[], Layer], tuple[int, ...]]] = {
    "conv1d": (lambda: Conv1d(2, 4, 3, padding="same_lower", **F64), (3, 2, 7)),
    "conv1d nhwc": (lambda: Conv1d(2, 4, 3, layout="NHWC", **F64), (3, 7, 2)),
    "conv2d": (lambda: Conv2d(2, 4, 3, stride=2, padding=1, **F64), (3, 2, 6, 5)),
    "conv2d without bias": (lambda: Conv2d(2, 4, (3, 1), bias=False, **F64), (3, 2, 6, 5)),
    "conv2d grouped, dilated": (lambda: Conv2d(4, 6, 2, dilation=2, groups=2, **F64), (2, 4, 5, 5)),
    "conv2d nhwc": (lambda: Conv2d(2, 4, 3, padding=((0, 1), (2, 1)), layout="NHWC", **F64), (3, 6, 5, 2)),
    "conv2d unbatched": (lambda: Conv2d(2, 4, 3, **F64), (2, 6, 5)),
    "conv3d": (lambda: Conv3d(2, 3, 2, padding=1, **F64), (2, 2, 3, 4, 3)),
    "conv_transpose2d": (lambda: ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, **F64), (2, 4, 3, 4)),
    "conv_transpose2d grouped": (lambda: ConvTranspose2d(4, 2, 3, groups=2, dilation=2, **F64), (2, 4, 3, 4)),
    "conv_transpose2d nhwc": (lambda: ConvTranspose2d(4, 2, 3, stride=2, layout="NHWC", **F64), (2, 3, 4, 4)),
    "max_pool1d": (lambda: MaxPool1d(2), (2, 3, 9)),
    "max_pool2d": (lambda: MaxPool2d(3, stride=2, padding=1, ceil_mode=True), (2, 3, 6, 7)),
    "max_pool2d nhwc": (lambda: MaxPool2d(2, layout="NHWC"), (2, 6, 7, 3)),
    "max_pool3d": (lambda: MaxPool3d(2), (2, 3, 4, 4, 5)),
    "avg_pool2d": (lambda: AvgPool2d(3, stride=2, padding=1, count_include_pad=False), (2, 3, 6, 7)),
    "max_blur_pool2d": (lambda: MaxBlurPool2d(2, 2), (2, 3, 8, 7)),
    "relu": (lambda: ReLU(), (3, 5)),
    "softmax": (lambda: Softmax(), (3, 5)),
    "softmax over channels": (lambda: Softmax(dim=1), (2, 3, 4)),
    "flatten": (lambda: Flatten(), (3, 2, 4, 5)),
    "linear": (lambda: Linear(5, 3, **F64), (4, 5)),
    "linear without bias": (lambda: Linear(5, 3, bias=False, **F64), (4, 5)),
    "linear on the last axis": (lambda: Linear(5, 3, **F64), (2, 4, 5)),
    "sequential": (
        lambda: Sequential(
            Conv2d(1, 3, 3, padding=1, **F64), ReLU(), MaxPool2d(2), Sequential(Flatten(), Linear(12, 2, **F64))
        ),
        (3, 1, 4, 4),
    ),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request: pytest.FixtureRequest, rng: np.random.Generator) -> tuple[Layer, Array]:
    """Every layer, with an input for it."""
    build, shape = CASES[request.param]
    return build(), rng.standard_normal(shape)


def lenet(rng: int = 0) -> Sequential:
    """The notes' typical architecture, small."""
    return Sequential(
        Conv2d(1, 4, 3, padding=1, rng=rng),
        ReLU(),
        MaxPool2d(2),
        Conv2d(4, 8, 3, padding=1, rng=rng),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        Linear(32, 10, rng=rng),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Forward and backward
# ---------------------------------------------------------------------------------------------------------------------


def check_gradient(gradient: Array, loss: Callable[[], float], array: Array, rng: np.random.Generator) -> None:
    """Compare ``gradient`` with central differences of ``loss`` at some elements of ``array``."""
    assert gradient.shape == array.shape
    step = 1e-5
    for index in rng.permutation(list(np.ndindex(array.shape)))[:16].tolist():
        value = array[tuple(index)]
        array[tuple(index)] = value + step
        above = loss()
        array[tuple(index)] = value - step
        difference = (above - loss()) / (2 * step)
        array[tuple(index)] = value
        assert gradient[tuple(index)] == pytest.approx(difference, rel=1e-6, abs=1e-8)


def test_backward_is_the_derivative_of_forward(case: tuple[Layer, Array], rng: np.random.Generator) -> None:
    layer, x = case
    grad_output = np.asarray(rng.standard_normal(layer(x).shape))

    def loss() -> float:
        return float((layer(x) * grad_output).sum())

    layer(x)
    check_gradient(layer.backward(grad_output), loss, x, rng)
    assert layer.grads.keys() == layer.params.keys()
    for name, param in layer.params.items():
        check_gradient(layer.grads[name], loss, param, rng)


def test_backward_params_sets_the_same_gradients(case: tuple[Layer, Array], rng: np.random.Generator) -> None:
    layer, x = case
    grad_output = np.asarray(rng.standard_normal(layer(x).shape))
    layer.backward(grad_output)
    wanted = {name: gradient.copy() for name, gradient in layer.grads.items()}
    layer(x)
    layer.backward_params(grad_output)
    assert layer.grads.keys() == wanted.keys()
    for name, gradient in layer.grads.items():
        np.testing.assert_array_equal(gradient, wanted[name])


def test_output_shape_is_the_shape_of_the_output(case: tuple[Layer, Array]) -> None:
    layer, x = case
    assert layer.output_shape(x.shape) == layer(x).shape


def test_eval_mode_computes_the_same(case: tuple[Layer, Array]) -> None:
    layer, x = case
    np.testing.assert_array_equal(layer.eval()(x), layer.train()(x))


def test_an_empty_batch_has_gradients_of_zero(engine: str) -> None:
    model = lenet()
    with fc.config_context(engine=engine):
        assert model(np.zeros((0, 1, 8, 8), np.float32)).shape == (0, 10)
        assert model.backward(np.zeros((0, 10), np.float32)).shape == (0, 1, 8, 8)
    assert all(not gradient.any() for gradient in model.grads.values())


def test_engines_agree_on_a_network(engine: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 1, 8, 8)).astype(np.float32)
    model, reference = lenet(), lenet()
    with fc.config_context(engine="numpy"):
        expected = reference(x)
        reference.backward(expected)
    with fc.config_context(engine=engine):
        output = model(x)
        model.backward(expected)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in model.grads.items():
        np.testing.assert_allclose(gradient, reference.grads[name], rtol=1e-3, atol=1e-4)


def test_options_choose_engine_and_algorithm_for_one_layer(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 1, 8, 8)).astype(np.float32)
    layer = Conv2d(1, 4, 3, rng=0)
    expected = layer(x)
    layer.options = {"engine": "numpy", "algorithm": "naive"}
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_options_reach_all_that_a_layer_computes(
    case: tuple[Layer, Array], general_row: Row, rng: np.random.Generator
) -> None:
    layer, x = case
    output = layer(x)
    grad_output = np.asarray(rng.standard_normal(output.shape))
    wanted = {"input": layer.backward(grad_output), **layer.grads}
    pools = isinstance(layer, _MaxPool)
    layer.options = how(available("max_pool_forward", (general_row.engine,))[0] if pools else general_row)
    np.testing.assert_allclose(layer(x), output, rtol=1e-12, atol=1e-13)
    results = {"input": layer.backward(grad_output), **layer.grads}
    for name, gradient in results.items():
        np.testing.assert_allclose(gradient, wanted[name], rtol=1e-12, atol=1e-13, err_msg=name)


@pytest.mark.parametrize(
    "name", [name for name, (build, _) in CASES.items() if isinstance(build(), (_Windowed, Linear))]
)
def test_a_wrong_option_is_an_error_forward_and_backward(name: str, rng: np.random.Generator) -> None:
    build, shape = CASES[name]
    layer, x = build(), rng.standard_normal(shape)
    grad_output = layer(x)
    layer.options = {"algorithm": "magic"}
    for call in (lambda: layer.backward(grad_output), lambda: layer(x)):
        with pytest.raises(ValueError, match=r"algorithm must be one of .* got 'magic'"):
            call()


@pytest.mark.parametrize("shape", [(5,), (1, 5), (70, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
def test_linear_takes_any_number_of_rows(shape: tuple[int, ...], dtype: type, rng: np.random.Generator) -> None:
    layer = Linear(5, 3, rng=0, dtype=dtype)
    x, grad_output = (rng.standard_normal((*shape[:-1], n)).astype(dtype)[..., ::-1] for n in (5, 3))
    weight, rows = layer.params["weight"].astype(float), grad_output.reshape(-1, 3).astype(float)
    wanted = {
        "output": x @ weight.T + layer.params["bias"],
        "input": grad_output @ weight,
        "weight": rows.T @ x.reshape(-1, 5),
        "bias": rows.sum(axis=0),
    }
    found = {"output": layer(x), "input": layer.backward(grad_output), **layer.grads}
    assert list(found) == list(wanted)
    for name, result in found.items():
        assert result.dtype == dtype
        np.testing.assert_allclose(result, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
        assert result.shape == wanted[name].shape


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(3, 300, 10), (64, 512, 100), (100, 64, 200)])
def test_linear_keeps_the_promises_of_precision(
    rows: int, inputs: int, outputs: int, precision: str, rng: np.random.Generator
) -> None:
    layer = Linear(inputs, outputs, bias=False, rng=0)
    layer.options = {"precision": precision}
    x, grad_output = (rng.standard_normal((rows, n), np.float32) for n in (inputs, outputs))
    weight = layer.params["weight"]
    found = layer(x), layer.backward(grad_output), layer.grads["weight"]
    for result, left, right in zip(found, (x, grad_output, grad_output.T), (weight.T, weight, x), strict=True):
        plain = np.zeros(result.shape, np.float32)
        for i in range(left.shape[1]):
            plain += left[:, i : i + 1] * right[i : i + 1]
        exact = left.astype(float) @ right.astype(float)
        size = np.linalg.norm(exact)
        bound = {"highest": np.linalg.norm(plain - exact) / size, "high": 1e-5, "medium": 1e-2}[precision]
        assert np.linalg.norm(result - exact) / size <= bound


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (Conv1d, (2, 9, 3), {"NCHW": ("NCL", "NCW"), "NHWC": ("NLC", "NWC")}),
        (MaxPool1d, (2, 9, 3), {"NCHW": ("NCL", "NCW"), "NHWC": ("NLC", "NWC")}),
        (Conv3d, (2, 6, 5, 4, 3), {"NCHW": ("NCDHW",), "NHWC": ("NDHWC",)}),
        (MaxPool3d, (2, 6, 5, 4, 3), {"NCHW": ("NCDHW",), "NHWC": ("NDHWC",)}),
    ],
)
def test_layouts_have_names_of_their_own_in_one_and_three_dimensions(
    layer: type[Layer], shape: tuple[int, ...], words: dict[str, tuple[str, ...]], rng: np.random.Generator
) -> None:
    x = rng.standard_normal(shape)
    for layout, synonyms in words.items():
        for word in synonyms:
            plain, other = (
                layer(x.shape[-1 if layout == "NHWC" else 1], 4, 2, layout=name, **F64)
                if issubclass(layer, _Conv)
                else layer(2, layout=name)
                for name in (layout, word)
            )
            output = plain(x)
            np.testing.assert_array_equal(other(x), output)
            np.testing.assert_array_equal(other.backward(output), plain.backward(output))
            assert other.output_shape(shape) == plain.output_shape(shape) == output.shape


def test_relu_passes_no_gradient_at_zero() -> None:
    relu = ReLU()
    np.testing.assert_array_equal(relu(np.array([-1.0, 0.0, 2.0])), [0, 0, 2])
    np.testing.assert_array_equal(relu.backward(np.array([5.0, 5.0, 5.0])), [0, 0, 5])


def test_relu_lets_nan_through_and_keeps_the_dtype(dtype: type) -> None:
    relu = ReLU()
    output = relu(np.array([np.nan, -np.inf, np.inf], dtype))
    np.testing.assert_array_equal(output, [np.nan, 0, np.inf])
    assert output.dtype == relu.backward(output).dtype == dtype


def test_relu_stops_whatever_comes_back_where_it_was_zero(dtype: type) -> None:
    relu = ReLU()
    relu(np.array([-1.0, -1.0, 1.0, 1.0], dtype))
    grad = relu.backward(np.array([np.nan, np.inf, np.nan, -np.inf], dtype))
    np.testing.assert_array_equal(grad, [0, 0, np.nan, -np.inf])
    relu(np.array([[-1.0, 2.0], [3.0, -4.0]], dtype))
    np.testing.assert_array_equal(relu.backward(np.arange(4, dtype=dtype).reshape(2, 2).T), [[0, 2], [1, 0]])


@pytest.mark.parametrize("size", [0, 1, 37, 3 << 16, (3 << 16) + 5])
def test_every_engine_masks_the_same_gradients(engine: str, dtype: type, size: int, rng: np.random.Generator) -> None:
    relu, x, grad = ReLU(), rng.standard_normal(size).astype(dtype), rng.standard_normal(size).astype(dtype)
    x[::5], grad[::3] = np.nan, np.inf
    with fc.config_context(engine=engine, num_threads=2):
        wanted = np.where(relu(x) > 0, grad, dtype(0))
        np.testing.assert_array_equal(relu.backward(grad), wanted)
        np.testing.assert_array_equal(relu.backward(grad[::-1]), np.where(x > 0, grad[::-1], dtype(0)))


def test_softmax_does_not_overflow() -> None:
    np.testing.assert_array_equal(Softmax()(np.array([[1e4, 0.0], [-1e4, -1e4]])), [[1, 0], [0.5, 0.5]])


def test_a_layer_is_safe_to_share_between_threads_in_eval_mode(rng: np.random.Generator) -> None:
    model = lenet().eval()
    x = rng.standard_normal((4, 1, 8, 8)).astype(np.float32)
    expected, outputs = model(x), []
    threads = [threading.Thread(target=lambda: outputs.append(model(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 4
    for output in outputs:
        np.testing.assert_array_equal(output, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (Conv1d(4, 6, 5, groups=2), {"weight": (6, 2, 5), "bias": (6,)}),
        (Conv1d(4, 6, 5, groups=2, layout="NHWC"), {"weight": (5, 2, 6), "bias": (6,)}),
        (Conv2d(3, 8, (5, 3)), {"weight": (8, 3, 5, 3), "bias": (8,)}),
        (Conv2d(3, 8, (5, 3), layout="NHWC", bias=False), {"weight": (5, 3, 3, 8)}),
        (Conv3d(3, 8, 2), {"weight": (8, 3, 2, 2, 2), "bias": (8,)}),
        (ConvTranspose2d(4, 6, 3, groups=2), {"weight": (4, 3, 3, 3), "bias": (6,)}),
        (ConvTranspose2d(4, 6, 3, groups=2, layout="NHWC"), {"weight": (3, 3, 3, 4), "bias": (6,)}),
        (Linear(5, 3), {"weight": (3, 5), "bias": (3,)}),
        (MaxPool2d(2), {}),
    ],
    ids=repr,
)
def test_parameters_are_named_and_shaped_as_in_pytorch(layer: Layer, shapes: dict[str, tuple[int, ...]]) -> None:
    assert {name: param.shape for name, param in layer.params.items()} == shapes


def test_weights_are_drawn_uniformly_within_one_over_the_root_of_fan_in(dtype: type) -> None:
    layer = Conv2d(4, 256, 3, rng=0, dtype=dtype)
    bound = 1 / 6  # of 4 * 3 * 3
    for param in layer.params.values():
        assert param.dtype == dtype
        assert 0.9 * bound < np.abs(param).max() <= bound
    assert layer.params["weight"].std() == pytest.approx(bound / np.sqrt(3), rel=0.03)


def test_a_seed_gives_the_same_weights_every_time_and_in_every_layout() -> None:
    first, again = Conv2d(3, 4, 3, rng=7), Conv2d(3, 4, 3, rng=np.random.default_rng(7))
    last, other = Conv2d(3, 4, 3, rng=7, layout="NHWC"), Conv2d(3, 4, 3, rng=8)
    weight = first.params["weight"]
    np.testing.assert_array_equal(again.params["weight"], weight)
    np.testing.assert_array_equal(last.params["weight"].transpose(3, 2, 0, 1), weight)  # HWIO -> OIHW
    assert (other.params["weight"] != weight).any()


def test_assigning_a_parameter_keeps_the_captured_array_live() -> None:
    model = Sequential(Linear(2, 2), ReLU())
    captured = model[0].params["weight"]
    model.params["0.weight"] = np.eye(2)
    model.params.update({"0.bias": np.ones(2)})
    assert model[0].params["weight"] is captured is model.params["0.weight"]
    np.testing.assert_array_equal(captured, np.eye(2))
    np.testing.assert_array_equal(model(np.zeros((1, 2), np.float32)), [[1, 1]])


def test_backward_overwrites_the_gradients_of_the_one_before() -> None:
    layer = Linear(2, 1, rng=0)
    for _ in range(2):
        layer(np.ones((1, 2), np.float32))
        layer.backward(np.ones((1, 1), np.float32))
        np.testing.assert_array_equal(layer.grads["weight"], [[1, 1]])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"bias": np.ones(1)}, ValueError, r"params\['bias'\] must have shape \(2,\), got \(1,\)"),
        ({"bias": np.ones(2, complex)}, TypeError, r"params\['bias'\] must be real numbers, got dtype complex128"),
        ({"bias": ["a", "b"]}, TypeError, r"params\['bias'\] must be real numbers, got dtype <U1"),
        ({"shift": np.ones(2)}, KeyError, "there is no parameter 'shift'"),
    ],
)
def test_several_parameters_change_together_or_not_at_all(
    values: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer = Linear(2, 2)
    before = {name: param.copy() for name, param in layer.params.items()}
    with pytest.raises(error, match=message):
        layer.params.update(weight=np.eye(2), **values)
    with pytest.raises(error, match=message):
        layer.params |= {"weight": np.eye(2), **values}
    for name, param in layer.params.items():
        np.testing.assert_array_equal(param, before[name])


def test_parameters_stay_the_arrays_that_a_layer_computes_with() -> None:
    layer = Linear(2, 2)
    weight, bias = layer.params["weight"], layer.params["bias"]
    layer.params |= {"weight": np.eye(2)}
    np.testing.assert_array_equal(weight, np.eye(2))
    assert layer.params.setdefault("bias", np.ones(2)) is bias
    with pytest.raises(KeyError, match="there is no parameter 'shift'"):
        layer.params.setdefault("shift", np.ones(2))
    for call in (
        lambda: layer.params.pop("weight"),
        lambda: layer.params.pop("weight", None),
        lambda: layer.params.popitem(),
        lambda: layer.params.clear(),
        lambda: layer.params.__delitem__("weight"),
    ):
        with pytest.raises(TypeError, match="params must keep all their arrays"):
            call()
    assert layer.params["weight"] is weight
    assert layer.params["bias"] is bias


def test_assigning_a_parameter_checks_name_and_shape() -> None:
    layer = Linear(2, 2)
    with pytest.raises(KeyError, match="there is no parameter 'wieght'; there are 'weight', 'bias'"):
        layer.params["wieght"] = np.eye(2)
    with pytest.raises(ValueError, match=r"params\['bias'\] must have shape \(2,\), got \(1,\)"):
        layer.params["bias"] = np.ones(1)


# ---------------------------------------------------------------------------------------------------------------------
# Modes
# ---------------------------------------------------------------------------------------------------------------------


def test_eval_makes_parameters_read_only_and_train_makes_them_writable_again() -> None:
    model = lenet()
    captured = model.params["0.weight"]
    assert model.eval() is model
    assert not any(layer.training for layer in model)
    with pytest.raises(ValueError, match="read-only"):
        captured += 1
    with pytest.raises(ValueError, match=r"params\['0.weight'\] is read-only in eval mode; call train\(\) first"):
        model.params["0.weight"] = captured
    assert model.train() is model
    assert all(layer.training for layer in model)
    captured += 1


def test_backward_needs_a_forward_in_training_mode(case: tuple[Layer, Array]) -> None:
    layer, x = case
    message = r"backward needs a \w+.forward in training mode before it"
    with pytest.raises(RuntimeError, match=message):
        layer.backward(x)
    grad_output = np.zeros_like(layer(x))
    layer.eval()
    layer(x)
    with pytest.raises(RuntimeError, match=message):
        layer.backward(grad_output)


@pytest.mark.parametrize("kernel_size", [1, 3, (1, 7)])
def test_weights_packed_for_evaluation_give_the_same_bits(rng: np.random.Generator, kernel_size: Any) -> None:
    layer = fc.layers.Conv2d(20, 33, kernel_size, padding="same", rng=0)
    images = [rng.standard_normal((n, 20, size, size), np.float32) for n, size in ((1, 12), (2, 12), (1, 40), (1, 7))]
    wanted = [layer(x) for x in images]
    layer.eval()
    for _ in range(2):  # packs, and uses what is packed
        for x, y in zip(images, wanted, strict=True):
            np.testing.assert_array_equal(layer(x), y)
    twin = copy.deepcopy(layer)
    layer.train().params["weight"] = -layer.params["weight"]
    layer.params["bias"] = -layer.params["bias"]
    layer.eval()
    np.testing.assert_array_equal(layer(images[0]), -wanted[0])
    np.testing.assert_array_equal(twin(images[0]), wanted[0])


@pytest.mark.parametrize(("inputs", "outputs"), [(20, 33), (300, 10), (64, 512)])
def test_linear_gives_the_same_bits_in_evaluation_fused_and_by_any_threads(
    inputs: int, outputs: int, rng: np.random.Generator
) -> None:
    layer, x = Linear(inputs, outputs, rng=0), rng.standard_normal((64, inputs), np.float32)
    wanted, grad_output = layer(x), rng.standard_normal((64, outputs), np.float32)
    gradients = [layer.backward(grad_output), *layer.grads.values()]
    np.testing.assert_array_equal(Sequential(layer, ReLU())(x), np.maximum(wanted, 0))
    for threads in (1, 2, 3):
        with fc.config_context(num_threads=threads):
            np.testing.assert_array_equal(layer.train()(x), wanted)
            for gradient, same in zip([layer.backward(grad_output), *layer.grads.values()], gradients, strict=True):
                np.testing.assert_array_equal(gradient, same)
            for _ in range(2):  # packs, and uses what is packed
                np.testing.assert_array_equal(layer.eval()(x), wanted)


@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("whole", [False, True])
def test_a_copy_in_eval_mode_is_read_only_and_has_packed_nothing(
    twin_of: Callable[[Layer], Layer], whole: bool, rng: np.random.Generator
) -> None:
    conv = Conv2d(20, 33, 3, rng=0)
    model: Layer = Sequential(conv, ReLU()) if whole else conv
    x = rng.standard_normal((1, 20, 12, 12), np.float32)
    wanted = model.eval()(x)
    twin = twin_of(model)
    first = twin[0] if isinstance(twin, Sequential) else twin
    assert isinstance(first, Conv2d)
    assert first.params["weight"] is next(iter(twin.params.values()))
    if first is not conv:  # a shallow copy of a Sequential has the same layers
        assert not first._packed
    for params in (twin.params, first.params):
        for name, param in params.items():
            assert not param.flags.writeable
            with pytest.raises(ValueError, match="read-only in eval mode"):
                params[name] = np.zeros_like(param)
    np.testing.assert_array_equal(twin(x), wanted)
    if twin_of is not copy.copy:
        twin.train().params.update({name: -param for name, param in twin.params.items()})
        np.testing.assert_array_equal(first.eval()(x), -conv(x))
        np.testing.assert_array_equal(model(x), wanted)


@pytest.mark.skipif(bool(why_missing("cython")), reason="needs the native engine")
def test_evaluation_packs_weights_once(rng: np.random.Generator) -> None:
    layer = fc.layers.Conv2d(32, 32, 5, rng=0).eval()
    layer(rng.standard_normal((1, 32, 30, 30), np.float32))
    packs = dict(layer._packed)
    assert packs
    layer(rng.standard_normal((2, 32, 30, 30), np.float32))
    assert layer._packed == packs


# ---------------------------------------------------------------------------------------------------------------------
# Sequential
# ---------------------------------------------------------------------------------------------------------------------


def test_sequential_is_a_sequence_of_layers() -> None:
    model = lenet()
    assert len(model) == 8
    assert model[0] is next(iter(model))
    assert isinstance(model[-1], Linear)
    head = model[:3]
    assert isinstance(head, Sequential)
    assert head[0] is model[0]
    assert list(model.params) == ["0.weight", "0.bias", "3.weight", "3.bias", "7.weight", "7.bias"]
    assert next(iter(Sequential(ReLU(), lenet()).params)) == "1.0.weight"


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's own warning, from the engine "numpy"
def test_sequential_computes_what_its_layers_compute_one_by_one(engine: str, value: float) -> None:
    """It computes a ReLU with the convolution before it, or after the max pooling behind it; nobody can tell."""
    rng = np.random.default_rng(0)
    model = Sequential(
        Conv2d(2, 5, 3, padding=1, rng=0, layout="NHWC"), ReLU(), MaxPool2d(3, 2, 1, layout="NHWC"),
        Conv2d(5, 4, 3, rng=1, layout="NHWC"), ReLU(), Conv2d(4, 4, 1, rng=2, layout="NHWC"), ReLU(),
        MaxPool2d(2, dilation=2, padding=1, stride=1, layout="NHWC"), ReLU(),
    )  # fmt: skip
    twin = copy.deepcopy(model)
    x = rng.standard_normal((3, 12, 13, 2)).astype(np.float32)
    x[1, 4, 5, 1] = value
    with fc.config_context(engine=engine):
        output = model(x)
        wanted = x
        for layer in twin:
            wanted = layer(wanted)
        np.testing.assert_array_equal(output, wanted)
        grad_output = rng.standard_normal(output.shape).astype(np.float32)
        grad_input, wanted = model.backward(grad_output), grad_output
        for layer in reversed(twin.layers):
            wanted = layer.backward(wanted)
    np.testing.assert_array_equal(grad_input, wanted)
    for name, gradient in model.grads.items():
        np.testing.assert_array_equal(gradient, twin.grads[name])


def test_sequential_calls_layers_that_are_someones_own() -> None:
    class Shifted(ReLU):
        def forward(self, input: Array) -> Array:
            return super().forward(input + 1)

    class Doubled(Conv2d):
        def forward(self, input: Array) -> Array:
            return 2 * super().forward(input)

    x = np.full((1, 1, 1, 1), -3.0)
    ones = {"bias": False, "dtype": np.float64}
    for layers, wanted in (
        ((Conv2d(1, 1, 1, **ones), Shifted()), 1 - 0.25),
        ((Doubled(1, 1, 1, **ones), ReLU()), 0),
        ((Shifted(), MaxPool2d(1)), 0),
    ):
        for layer in layers:
            if layer.params:
                layer.params["weight"] = [[[[1 / 12]]]]
        assert Sequential(*layers)(x).item() == wanted


def test_a_training_step_skips_the_gradient_of_the_first_input() -> None:
    class Spy(ReLU):
        def backward(self, grad_output: Array) -> Array:
            called.append(self)
            return super().backward(grad_output)

    called: list[Layer] = []
    first, inner, last = Spy(), Spy(), Spy()
    model = Sequential(first, Sequential(inner, Linear(3, 3, rng=0)), last)
    output = model(np.ones((2, 3), np.float32))
    model.backward_params(output)
    assert called == [last]
    model.backward(output)
    assert called == [last, last, inner, first]


def test_sequential_takes_only_layers_and_each_only_once() -> None:
    relu = ReLU()
    with pytest.raises(ValueError, match="layers must be different objects"):
        Sequential(relu, relu)
    with pytest.raises(TypeError, match=r"layers\[1\] must be a Layer, got builtin_function_or_method"):
        Sequential(relu, len)  # type: ignore[arg-type]


def test_a_copy_is_independent() -> None:
    model = Sequential(Linear(2, 2, rng=0))
    twin = copy.deepcopy(model)
    twin.params["0.weight"] += 1
    assert twin[0].params["weight"] is twin.params["0.weight"]
    assert (twin.params["0.weight"] != model.params["0.weight"]).all()


def test_summary_compares_with_a_fully_connected_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """Section 9.1: a filter layer has m (k k m' + 1) weights; fully connected it would be (inputs + 1) x outputs."""
    model = Sequential(Conv2d(3, 8, 5, padding=2), ReLU(), MaxPool2d(2), Flatten(), Linear(8 * 16 * 16, 10))
    for shape in ((3, 32, 32), (64, 3, 32, 32)):
        model.summary(shape)
        lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
        rows = {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in lines}
        convolution, connected = 8 * (5 * 5 * 3 + 1), (3 * 32 * 32 + 1) * 8 * 32 * 32
        assert rows["0 Conv2d(3, 8, 5)"] == ["(8, 32, 32)", f"{convolution:,}", f"{connected:,}"]
        assert rows["2 MaxPool2d(2)"] == ["(8, 16, 16)", "0", "-"]
        assert rows["4 Linear(2048, 10)"] == ["(10,)", "20,490", "20,490"]
        assert rows["total"] == [f"{convolution + 20490:,}", f"{connected + 20490:,}"]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[".npz", ".safetensors"])
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A path of each form that weights can be saved in."""
    if request.param == ".safetensors":
        pytest.importorskip("safetensors")
    return tmp_path / f"weights{request.param}"


def test_load_copies_what_save_wrote_in_place(weights: Path) -> None:
    model, other = lenet(rng=0), lenet(rng=1)
    model.save(weights)
    captured = other[3].params["weight"]
    other.load(str(weights))
    assert other[3].params["weight"] is captured
    for name, param in model.params.items():
        np.testing.assert_array_equal(other.params[name], param)


def test_load_works_in_eval_mode_and_stays_there(weights: Path) -> None:
    model, other = lenet(rng=0), lenet(rng=1).eval()
    model.eval().save(weights)
    other.load(weights)
    assert not other.training
    assert not other.params["0.weight"].flags.writeable
    np.testing.assert_array_equal(other.params["0.weight"], model.params["0.weight"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Sequential(Linear(3, 2), Linear(2, 2)), r"lacks \['1.bias', '1.weight'\] and has \[\] too many"),
        (Sequential(Linear(3, 2, bias=False)), r"lacks \[\] and has \['0.bias'\] too many"),
        (Sequential(Linear(4, 2)), r"'0.weight' must be float32 of shape \(2, 4\), got float32 of shape \(2, 3\)"),
        (Sequential(Linear(3, 2, dtype=np.float64)), r"'0.weight' must be float64 of shape \(2, 3\), got float32"),
    ],
)
def test_load_refuses_what_does_not_fit_and_changes_nothing(weights: Path, other: Sequential, message: str) -> None:
    Sequential(Linear(3, 2)).save(weights)
    before = {name: param.copy() for name, param in other.params.items()}
    with pytest.raises(ValueError, match=f"does not fit this model: .*{message}"):
        other.load(weights)
    for name, param in other.params.items():
        np.testing.assert_array_equal(param, before[name])


def test_load_never_unpickles(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    np.savez(path, weight=np.array([{"a": "pickle"}], dtype=object))
    with pytest.raises(ValueError, match=r"weights.npz is no .npz file of arrays, .*: it holds a pickle"):
        Linear(3, 2).load(path)


def damaged(path: Path, how: str) -> None:
    """Write a file of weights and damage it."""
    Linear(3, 2).save(path)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes({
        "empty": b"", "text": b"weights", "pickle": pickle.dumps({"weight": 1}), "short": content[:middle],
        "changed": content[:60] + bytes(byte ^ 255 for byte in content[60:middle]) + content[middle:],
    }[how])  # fmt: skip


@pytest.mark.parametrize("how", ["empty", "text", "pickle", "short", "changed"])
def test_load_of_a_damaged_file_names_it(tmp_path: Path, how: str) -> None:
    path, layer = tmp_path / "weights.npz", Linear(3, 2)
    before = layer.params["weight"].copy()
    damaged(path, how)
    with pytest.raises(ValueError, match=r"weights.npz is no .npz file of arrays, or is damaged: ") as caught:
        layer.load(path)
    assert "allow_pickle" not in str(caught.value)
    np.testing.assert_array_equal(layer.params["weight"], before)


@pytest.mark.parametrize("how", ["empty", "text", "short"])
def test_load_of_a_damaged_safetensors_file_names_it(tmp_path: Path, how: str) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "weights.safetensors"
    damaged(path, how)
    with pytest.raises(ValueError, match=r"weights.safetensors is no .safetensors file, or is damaged: "):
        Linear(3, 2).load(path)


def test_load_of_no_file_says_so(weights: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Linear(3, 2).load(weights)


def test_other_endings_are_refused(tmp_path: Path) -> None:
    for method in (Linear(3, 2).save, Linear(3, 2).load):
        with pytest.raises(ValueError, match=r"path must end in .npz or .safetensors, got .*weights.pkl"):
            method(tmp_path / "weights.pkl")


def test_a_missing_safetensors_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        Linear(3, 2).save(tmp_path / "weights.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Conv2d(0, 4, 3), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: Conv2d(3, "4", 3), TypeError, "out_channels must be an integer, got '4'"),  # type: ignore[arg-type]
        (
            lambda: Conv2d(3, 4, (3, 3, 3)),
            ValueError,
            "kernel_size must be .* a sequence of 2, got 3 values",
        ),
        (lambda: Conv2d(3, 4, 3, stride=0), ValueError, "stride must be at least 1, got 0"),
        (lambda: Conv2d(3, 4, 3, padding="full"), ValueError, "padding must be .* got 'full'"),
        (lambda: Conv2d(3, 4, 3, dilation=-1), ValueError, "dilation must be at least 1, got -1"),
        (
            lambda: Conv2d(3, 4, 3, groups=2),
            ValueError,
            "groups must divide .* got 2 for 3 and 4",
        ),
        (lambda: Conv2d(3, 4, 3, layout="CHWN"), ValueError, "layout must be 'NCHW' or 'NHWC' .* got 'CHWN'"),
        (lambda: Conv2d(3, 4, 3, dtype=np.float16), TypeError, "dtype must be float32 or float64, got float16"),
        (lambda: ConvTranspose2d(3, 4, 3, output_padding=1), ValueError, "output_padding must be smaller than stride"),
        (lambda: MaxPool2d(0), ValueError, "kernel_size must be at least 1, got 0"),
        (lambda: MaxPool2d(2, padding=2), ValueError, "padding must be at most half"),
        (lambda: AvgPool2d(2, ceil_mode=1), TypeError, "ceil_mode must be True or False"),  # type: ignore[arg-type]
        (lambda: AvgPool2d(2, divisor_override=0), ValueError, "divisor_override must not be 0, got 0"),
        (
            lambda: AvgPool2d(2, divisor_override=0.5),  # type: ignore[arg-type]
            TypeError,
            "divisor_override must be an integer, got 0.5",
        ),
        (
            lambda: AvgPool2d(2, count_include_pad=None),  # type: ignore[arg-type]
            TypeError,
            "count_include_pad must be True or False, got None",
        ),
        (lambda: MaxBlurPool2d(2, 2, filter_size=0), ValueError, "filter_size must be at least 1, got 0"),
        (lambda: Linear(0, 2), ValueError, "in_features must be at least 1, got 0"),
    ],
)
def test_constructors_say_at_once_what_is_wrong(
    build: Callable[[], Layer], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("layer", "x", "error", "message"),
    [
        (Conv2d(3, 4, 3), np.zeros((2, 1, 8, 8), np.float32), ValueError, "input must have 3 channels.* got 1"),
        (
            Conv2d(3, 4, 3),
            np.zeros((2, 3, 8, 8)),
            TypeError,
            "weight must have the dtype of input, float64",
        ),
        (Linear(5, 2), np.zeros((2, 4), np.float32), ValueError, r"input must have 5 features .* got shape \(2, 4\)"),
        (Linear(5, 2), np.zeros((2, 5)), TypeError, "input must have the dtype of weight, float32, got float64"),
        (Linear(5, 2), [[0.0] * 5], TypeError, "input must be a numpy.ndarray, got list"),
        *[
            (layer, x, TypeError, f"input must be a numpy.ndarray, got {type(x).__name__}")
            for layer in (ReLU(), Flatten(), Softmax(), AvgPool2d(2), MaxPool2d(2), MaxBlurPool2d(2, 2))
            for x in ([[0.0] * 5], None)
        ],
        (Flatten(), np.zeros(()), ValueError, r"input must have a batch axis, got shape \(\)"),
        (Softmax(), np.zeros(()), ValueError, r"input must have an axis -1, got shape \(\)"),
    ],
)
def test_forward_says_what_does_not_fit(layer: Layer, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer(x)


def test_backward_says_what_does_not_fit(case: tuple[Layer, Array]) -> None:
    layer, x = case
    output = layer(x)
    wrong = output.sum(axis=0, keepdims=True), output[..., :1], output[None, None], output.ravel()
    for backward in (layer.backward, layer.backward_params):
        for grad_output in wrong:
            with pytest.raises(ValueError, match=r"grad_output.*, got (shape )?\("):
                backward(grad_output)
        with pytest.raises(TypeError, match=r"float64|dtype"):
            backward(output.astype(np.float32))
        for other in (None, output.tolist()):
            with pytest.raises(TypeError, match=r"grad_output must be a numpy.ndarray"):
                backward(other)  # type: ignore[arg-type]
    layer.backward(output)


def test_output_shape_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"input_shape must have 4 dimensions \(or 3 without a batch\), got \(8, 8\)"):
        Conv2d(3, 4, 3).output_shape((8, 8))
