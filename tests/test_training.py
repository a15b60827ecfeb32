"""Losses, optimizers and the training loop."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest

import fastconv as fc
from fastconv import optim
from fastconv.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential, Softmax
from fastconv.losses import cross_entropy, squared_error
from fastconv.optim import SGD, Adam
from fastconv.training import accuracy, predict

Array = np.ndarray[Any, np.dtype[Any]]


def one_weight(value: float = 1.0) -> Linear:
    """The smallest model there is: y = w x."""
    model = Linear(1, 1, bias=False, dtype=np.float64)
    model.params["weight"] = [[value]]
    return model


def step(optimizer: SGD | Adam, gradient: float) -> float:
    """Make a step for a loss of this gradient and return the weight after it."""
    model = optimizer.model
    model(np.array([[1.0]]))
    model.backward(np.array([[gradient]]))
    optimizer.step()
    return float(model.params["weight"][0, 0])


def bars(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Noisy 8x8 images of a vertical (0) or horizontal (1) bar, and which it is."""
    classes = rng.integers(0, 2, count)
    images = rng.normal(0, 0.2, (count, 1, 8, 8)).astype(np.float32)
    for image, horizontal, position in zip(images[:, 0], classes, rng.integers(0, 8, count), strict=True):
        (image if horizontal else image.T)[position] += 1
    return images, classes


def bar_detector(rng: int = 0) -> Sequential:
    """Conv, ReLU, pool, fully connected."""
    return Sequential(Conv2d(1, 4, 3, rng=rng), ReLU(), MaxPool2d(6), Flatten(), Linear(4, 2, rng=rng))


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def test_squared_error_of_one_output_is_that_of_the_notes() -> None:
    """Section 9.4: the loss is (A - y)^2, its derivative 2 (A - y)."""
    loss, grad = squared_error(np.array([[3.0]]), np.array([[1.0]]))
    assert loss == 4
    np.testing.assert_array_equal(grad, [[4]])


def test_squared_error_sums_over_outputs_and_averages_over_the_batch() -> None:
    loss, grad = squared_error(np.array([[1.0, 2.0], [0.0, 0.0]]), [[0, 0], [0, 1]])
    assert loss == (1 + 4 + 0 + 1) / 2
    np.testing.assert_array_equal(grad, [[1, 2], [0, -1]])


def test_cross_entropy_is_the_negative_logarithm_of_the_probability(rng: np.random.Generator) -> None:
    logits, classes = rng.standard_normal((5, 4)), np.array([0, 3, 1, 2, 2])
    probabilities = Softmax()(logits)
    loss, grad = cross_entropy(logits, classes)
    assert loss == pytest.approx(-np.log(probabilities[np.arange(5), classes]).mean())
    np.testing.assert_allclose(grad, (probabilities - np.eye(4)[classes]) / 5, atol=1e-15)


def test_cross_entropy_neither_overflows_nor_rounds_to_zero() -> None:
    loss, grad = cross_entropy(np.array([[1e4, 0.0], [0.0, 50.0]]), [1, 1])
    assert loss == pytest.approx((1e4 + math.log1p(math.exp(-50))) / 2)
    np.testing.assert_allclose(grad, [[0.5, -0.5], [math.exp(-50) / 2, 0]], atol=1e-15)
    assert cross_entropy(np.array([[0.0, 30.0]]), [1])[0] == pytest.approx(math.exp(-30), rel=0.01)


@pytest.mark.parametrize("loss", [squared_error, cross_entropy])
def test_gradients_of_losses_are_their_derivatives(loss: Any, rng: np.random.Generator) -> None:
    prediction = rng.standard_normal((3, 4))
    target = np.array([1, 0, 3]) if loss is cross_entropy else rng.standard_normal((3, 4))
    direction = rng.standard_normal((3, 4))
    _, grad = loss(prediction, target)
    above, below = (loss(prediction + sign * 1e-6 * direction, target)[0] for sign in (1, -1))
    assert (grad * direction).sum() == pytest.approx((above - below) / 2e-6, rel=1e-6)


def test_losses_keep_the_dtype(dtype: type) -> None:
    prediction: Array = np.zeros((2, 3), dtype)
    for loss, grad in (squared_error(prediction, np.ones((2, 3))), cross_entropy(prediction, [0, 1])):
        assert isinstance(loss, float)
        assert grad.dtype == dtype


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: squared_error(np.ones((2, 1)), np.ones(2)), ValueError, r"target must have the shape .* got \(2,\)"),
        (lambda: squared_error(np.ones((0, 1)), np.ones((0, 1))), ValueError, "at least one sample"),
        (
            lambda: squared_error(np.ones((2, 1), int), np.ones((2, 1))),
            TypeError,
            "prediction must be float32",
        ),
        (lambda: squared_error(np.ones(2), [1j, 1]), TypeError, "target must be real numbers, got dtype complex128"),
        (lambda: squared_error(np.ones(2), ["1", "2"]), TypeError, "target must be real numbers, got dtype <U1"),
        (
            lambda: squared_error(np.ones(2), np.ones(2, object)),
            TypeError,
            "target must be real numbers, got dtype object",
        ),
        (lambda: cross_entropy(np.ones((2, 3)), [0.0, 1.0]), TypeError, "classes must be integers, got dtype float64"),
        (lambda: cross_entropy(np.ones((2, 3)), [0, 3]), ValueError, "classes must be from 0 to 2, got 0 to 3"),
        (lambda: cross_entropy(np.ones((2, 3)), [-1, 0]), ValueError, "classes must be from 0 to 2, got -1 to 0"),
        (lambda: cross_entropy(np.ones((2, 3)), [[0], [1]]), ValueError, r"classes must have shape \(2,\)"),
        (lambda: cross_entropy(np.ones(3), [0]), ValueError, r"logits must have shape \(samples, classes\)"),
    ],
)
def test_losses_say_what_does_not_fit(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------------------------------------------------


def test_sgd_walks_down_the_gradient() -> None:
    optimizer = SGD(one_weight(), lr=0.1)
    assert step(optimizer, 2.0) == pytest.approx(1 - 0.2)
    optimizer.lr = 1.0
    assert step(optimizer, 0.5) == pytest.approx(0.8 - 0.5)


def test_momentum_keeps_a_part_of_the_step_before() -> None:
    optimizer = SGD(one_weight(), lr=0.1, momentum=0.5)
    assert step(optimizer, 1.0) == pytest.approx(1 - 0.1)
    assert step(optimizer, 1.0) == pytest.approx(0.9 - 0.1 * (1 + 0.5))


def test_weight_decay_pulls_to_zero() -> None:
    assert step(SGD(one_weight(4.0), lr=0.1, weight_decay=0.5), 0.0) == pytest.approx(4 - 0.1 * 0.5 * 4)


def test_adam_follows_algorithm_1_of_its_paper() -> None:
    optimizer = Adam(one_weight(), lr=0.1, betas=(0.8, 0.9), eps=1e-3)
    mean = square = 0.0
    wanted = 1.0
    for t, gradient in enumerate((2.0, -1.0, 0.5), start=1):
        mean, square = 0.8 * mean + 0.2 * gradient, 0.9 * square + 0.1 * gradient**2
        wanted -= 0.1 * (mean / (1 - 0.8**t)) / (math.sqrt(square / (1 - 0.9**t)) + 1e-3)
        assert step(optimizer, gradient) == pytest.approx(wanted)


@pytest.mark.parametrize("optimizer", [SGD, lambda model, lr: SGD(model, lr, momentum=0.9, weight_decay=0.1), Adam])
def test_large_parameters_change_as_small_ones_do(optimizer: Any, monkeypatch: Any, rng: np.random.Generator) -> None:
    """Part by part, and all at once."""
    x, grad = rng.standard_normal((4, 6)).astype(np.float32), rng.standard_normal((4, 5)).astype(np.float32)

    def trained(part: int) -> dict[str, Array]:
        monkeypatch.setattr(optim, "PART", part)
        model = Linear(6, 5, rng=0)
        updates = optimizer(model, 0.1)
        for _ in range(3):
            model(x)
            model.backward(grad)
            updates.step()
        return dict(model.params)

    wanted = trained(1000)
    for name, param in trained(7).items():
        np.testing.assert_array_equal(param, wanted[name])


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_steps_change_the_live_array(optimizer: Any) -> None:
    model = one_weight()
    captured = model.params["weight"]
    step(optimizer(model, lr=0.1), 1.0)
    assert model.params["weight"] is captured
    assert captured[0, 0] < 1


def test_a_step_needs_gradients_and_training_mode() -> None:
    model = one_weight()
    optimizer = SGD(model, lr=0.1)
    with pytest.raises(RuntimeError, match=r"SGD.step needs gradients: call the model's forward and backward first"):
        optimizer.step()
    step(optimizer, 1.0)
    model.eval()
    with pytest.raises(RuntimeError, match=r"SGD.step needs the model in training mode: call train\(\) first"):
        optimizer.step()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SGD(one_weight(), lr=-1), ValueError, "lr must be at least 0 and below inf, got -1"),
        (lambda: SGD(one_weight(), lr="fast"), TypeError, "lr must be a number, got 'fast'"),  # type: ignore[arg-type]
        (lambda: SGD(one_weight(), lr=1, momentum=1), ValueError, "momentum must be at least 0 and below 1, got 1"),
        (lambda: Adam(one_weight(), betas=(0.9, 2)), ValueError, r"betas\[1\] must be at least 0 and below 1, got 2"),
        (lambda: Adam(one_weight(), betas=0.9), TypeError, "betas must be a pair of numbers, got 0.9"),  # type: ignore[arg-type]
        (lambda: Adam(one_weight(), betas=(0.9,)), ValueError, "betas must be a pair of numbers, got 1 values"),  # type: ignore[arg-type]
        (lambda: Adam(one_weight(), betas=[0.9] * 3), ValueError, "betas must be a pair of numbers, got 3 values"),  # type: ignore[arg-type]
        (lambda: Adam([one_weight()]), TypeError, "model must be a Layer, got list"),  # type: ignore[arg-type]
    ],
)
def test_optimizers_say_what_is_wrong(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


# ---------------------------------------------------------------------------------------------------------------------
# fit
# ---------------------------------------------------------------------------------------------------------------------


def test_a_network_learns_to_tell_bars_apart(engine: str, rng: np.random.Generator) -> None:
    x, y = bars(rng, 200)
    model = bar_detector()
    with fc.config_context(engine=engine):
        history = fc.fit(
            model, x, y, loss=cross_entropy, optimizer=Adam(model, lr=2e-2), epochs=6, batch_size=20,
            validation=bars(rng, 100), rng=0, progress=False,
        )  # fmt: skip
    assert list(history) == ["loss", "val_loss", "val_accuracy"]
    assert all(len(values) == 6 for values in history.values())
    assert history["loss"][-1] < history["loss"][0] / 4
    assert history["val_accuracy"][-1] >= 0.97
    assert model.training


def test_a_seed_gives_the_same_history_every_time(rng: np.random.Generator) -> None:
    x, y = bars(rng, 50)

    def train(seed: int) -> list[float]:
        model = bar_detector()
        optimizer = SGD(model, lr=0.1)
        return fc.fit(
            model, x, y, loss=cross_entropy, optimizer=optimizer, epochs=2, batch_size=8, rng=seed, progress=False
        )["loss"]

    assert train(0) == train(0) != train(1)


def test_every_sample_is_seen_once_in_an_epoch(rng: np.random.Generator) -> None:
    model = one_weight()
    seen: list[float] = []

    def loss(prediction: Array, target: Array) -> tuple[float, Array]:
        seen.extend(target.ravel())
        return float(target.mean()), np.zeros_like(prediction)

    y = np.arange(7.0).reshape(7, 1)
    history = fc.fit(
        model,
        np.ones((7, 1)),
        y,
        loss=loss,
        optimizer=SGD(model, lr=0.1),
        epochs=2,
        batch_size=3,
        rng=rng,
        progress=False,
    )
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert seen[:7] != seen[7:]
    assert history == {"loss": pytest.approx([3, 3])}  # the mean over samples: the last, smaller batch counts less


def test_validation_without_class_numbers_has_no_accuracy() -> None:
    model = one_weight()
    x = np.ones((4, 1))
    history = fc.fit(
        model, x, 2 * x, loss=squared_error, optimizer=SGD(model, lr=0.25), epochs=1, batch_size=4,
        validation=(x, 2 * x), progress=False,
    )  # fmt: skip
    assert history == {"loss": [1.0], "val_loss": [0.25]}


def test_the_progress_bar_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    model, x = one_weight(), np.ones((4, 1))
    fc.fit(model, x, x, loss=squared_error, optimizer=SGD(model, lr=0.1), epochs=3, batch_size=2)
    out, err = capsys.readouterr()
    assert not out
    assert "6/6" in err
    assert "loss=0.0000" in err


def test_training_works_without_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model, x = one_weight(), np.ones((4, 1))
    fc.fit(model, x, x, loss=squared_error, optimizer=SGD(model, lr=0.1), epochs=1, batch_size=2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.ones((3, 1))}, ValueError, "x and y must have the same number of samples, not 0, got 3 and 4"),
        ({"x": [[1.0]] * 4}, TypeError, "x must be a numpy.ndarray with a batch axis, got list"),
        ({"epochs": -1}, ValueError, "epochs must be at least 0, got -1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"validation": (np.ones((2, 1)), np.ones(3))}, ValueError, r"validation\[0\] and validation\[1\] must have"),
        ({"validation": 5}, TypeError, "validation must be a pair of arrays, got int"),
        ({"validation": (np.ones((2, 1)),) * 3}, ValueError, "validation must be a pair of arrays, got 3 values"),
        ({"loss": "ce"}, TypeError, "loss must be a function of prediction and target, got 'ce'"),
        ({"optimizer": None}, TypeError, "optimizer must be an Optimizer, got NoneType"),
        ({"model": None}, TypeError, "model must be a Layer, got NoneType"),
        ({"optimizer": SGD(one_weight(), lr=0.1)}, ValueError, "optimizer must be of the model that is trained"),
    ],
)
def test_fit_says_what_does_not_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = one_weight()
    arguments: dict[str, Any] = {
        "x": np.ones((4, 1)), "y": np.ones((4, 1)), "loss": squared_error, "optimizer": SGD(model, lr=0.1), "epochs": 1,
        "batch_size": 2, "progress": False, "model": model,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        fc.fit(**(arguments | change))
    assert model.params["weight"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# predict and accuracy
# ---------------------------------------------------------------------------------------------------------------------


def test_predict_does_not_depend_on_the_batch_size_and_restores_the_mode(rng: np.random.Generator) -> None:
    x, _ = bars(rng, 10)
    model = bar_detector()
    whole = predict(model, x)
    np.testing.assert_allclose(predict(model, x, batch_size=3), whole, rtol=1e-5)
    assert model.training
    assert not predict(model.eval(), x[:0]).size
    assert not model.training


def test_accuracy_is_the_share_of_right_classes() -> None:
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert accuracy(Softmax(), logits, np.array([1, 0, 0, 1])) == 0.5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: predict(None, np.ones((2, 1))), TypeError, "model must be a Layer, got NoneType"),
        (lambda: predict(Softmax(), None), TypeError, "x must be a numpy.ndarray with a batch axis, got NoneType"),
        (lambda: predict(Softmax(), np.ones((2, 1)), 0), ValueError, "batch_size must be at least 1, got 0"),
        (
            lambda: accuracy(Softmax(), np.eye(3), np.array([[0], [1], [2]])),
            ValueError,
            r"classes must have shape \(3,\), one for each sample, got \(3, 1\)",
        ),
        (
            lambda: accuracy(Softmax(), np.eye(3), np.eye(3, dtype=int)),
            ValueError,
            r"classes must have shape \(3,\), .* got \(3, 3\)",
        ),
        (lambda: accuracy(Softmax(), np.eye(3), np.arange(3.0)), TypeError, "classes must be integers, got dtype fl"),
        (
            lambda: accuracy(Softmax(), np.ones((3, 2, 3)), np.arange(3)),
            ValueError,
            r"model must have outputs of shape \(samples, classes\), got \(3, 2, 3\)",
        ),
    ],
)
def test_predict_and_accuracy_say_what_does_not_fit(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
