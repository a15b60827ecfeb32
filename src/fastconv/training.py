"""Training and evaluation in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .dims import integer
from .functional import Array
from .layers import Layer, Seed
from .optim import Optimizer
from .progress import progress_bar

__all__ = ["accuracy", "fit", "predict"]

Loss = Callable[[Array, Array], tuple[float, Array]]
History = dict[str, list[float]]


def fit(
    model: Layer,
    x: Array,
    y: Array,
    *,
    loss: Loss,
    optimizer: Optimizer,
    epochs: int,
    batch_size: int,
    validation: tuple[Array, Array] | None = None,
    rng: Seed = None,
    progress: bool = True,
) -> History:
    """Train a model by gradient descent on random batches.

    Parameters
    ----------
    model : Layer
        Put into training mode, and left in it.
    x, y : ndarray
        Samples and what is wanted for each, (N, ...) both.
    loss : callable
        ``loss(prediction, target) -> (loss, grad)``, such as `fastconv.losses.cross_entropy`: means over the batch.
    optimizer : Optimizer
        Of this model.
    epochs : int
        How many times to go through the samples.
    batch_size : int
        Samples for one step; the last batch of an epoch may be smaller.
    validation : (ndarray, ndarray), optional
        Samples to measure the loss on after each epoch; the accuracy, too, if the second array holds class numbers.
    rng : int or numpy.random.Generator, optional
        For the order of the samples.
    progress : bool
        Whether to show a progress bar on standard error (if tqdm is installed).

    Returns
    -------
    dict of str to list of float
        For each epoch: ``"loss"``, the mean during it, and with ``validation`` ``"val_loss"`` and ``"val_accuracy"``.

    Raises
    ------
    ValueError, TypeError
        For arrays of different length, numbers out of range, or something that is no model, loss or optimizer.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> x = np.random.default_rng(0).normal(size=(100, 2))
    >>> model = fc.layers.Linear(2, 2, rng=0, dtype=np.float64)
    >>> history = fc.fit(model, x, (x[:, 0] > 0).astype(int), loss=fc.losses.cross_entropy,
    ...                  optimizer=fc.optim.SGD(model, lr=0.5), epochs=5, batch_size=10, rng=0, progress=False)
    >>> history["loss"][-1] < history["loss"][0]
    True
    """
    _check_model(model)
    _check_samples(x, y, "x", "y")
    if validation is not None:
        _check_samples(*_pair(validation), "validation[0]", "validation[1]")
    if not callable(loss):
        raise TypeError(f"loss must be a function of prediction and target, got {loss!r}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be an Optimizer, got {type(optimizer).__name__}")
    if optimizer.model is not model:
        raise ValueError("optimizer must be of the model that is trained, got that of another one")
    epochs, batch_size = integer(epochs, "epochs", 0), integer(batch_size, "batch_size", 1)
    generator = np.random.default_rng(rng)
    history: History = {"loss": []}
    with progress_bar(epochs * -(-len(x) // batch_size), progress, unit="batch") as bar:
        for _ in range(epochs):
            model.train()
            total = 0.0
            for rows in _batches(generator.permutation(len(x)), batch_size):
                total += len(rows) * _step(model, x[rows], y[rows], loss, optimizer)
                bar.update()
            history["loss"].append(total / len(x))
            if validation is not None:
                _validate(model, *validation, loss, batch_size, history)
            bar.set_postfix_str(", ".join(f"{name}={values[-1]:.4f}" for name, values in history.items()))
    model.train()
    return history


def predict(model: Layer, x: Array, batch_size: int = 256) -> Array:
    """Return the output of a model in eval mode for samples (N, ...), computed in batches; the mode is restored after.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.training.predict(fc.layers.ReLU(), np.array([[-1.0], [1.0]])).ravel()
    array([0., 1.])
    """
    _check_model(model)
    _check_array(x, "x")
    size = integer(batch_size, "batch_size", 1)
    training = model.training
    model.eval()
    try:
        return np.concatenate([model(x[i : i + size]) for i in range(0, max(len(x), 1), size)])
    finally:
        if training:
            model.train()


def accuracy(model: Layer, x: Array, classes: Array, batch_size: int = 256) -> float:
    """Return the share of samples (N, ...) whose largest output is at their class number.

    The model's outputs are (N, number of classes), ``classes`` are integers, (N,).

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.training.accuracy(fc.layers.Softmax(), np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([1, 1]))
    0.5
    """
    _check_samples(x, classes, "x", "classes")
    if not np.issubdtype(classes.dtype, np.integer):
        raise TypeError(f"classes must be integers, got dtype {classes.dtype}")
    if classes.ndim != 1:
        raise ValueError(f"classes must have shape ({len(x)},), one for each sample, got {classes.shape}")
    prediction = predict(model, x, batch_size)
    if prediction.ndim != 2:
        raise ValueError(f"model must have outputs of shape (samples, classes), got {prediction.shape}")
    return _accuracy(prediction, classes)


def _step(model: Layer, x: Array, y: Array, loss: Loss, optimizer: Optimizer) -> float:
    """Train on one batch and return its loss."""
    value, grad = loss(model(x), y)
    model.backward_params(grad)
    optimizer.step()
    return value


def _validate(model: Layer, x: Array, y: Array, loss: Loss, batch_size: int, history: History) -> None:
    """Append loss and, for class numbers, accuracy on the samples to the history."""
    prediction = predict(model, x, batch_size)
    history.setdefault("val_loss", []).append(loss(prediction, y)[0])
    if np.issubdtype(y.dtype, np.integer) and y.ndim == 1 and prediction.ndim == 2:
        history.setdefault("val_accuracy", []).append(_accuracy(prediction, y))


def _accuracy(prediction: Array, classes: Array) -> float:
    return float((prediction.argmax(axis=1) == classes).mean())


def _batches(rows: Array, batch_size: int) -> Iterator[Array]:
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def _check_model(model: object) -> None:
    if not isinstance(model, Layer):
        raise TypeError(f"model must be a Layer, got {type(model).__name__}")


def _check_array(array: object, name: str) -> None:
    if not isinstance(array, np.ndarray) or not array.ndim:
        raise TypeError(f"{name} must be a numpy.ndarray with a batch axis, got {type(array).__name__}")


def _pair(validation: Any) -> tuple[Any, Any]:
    if not isinstance(validation, (tuple, list)):
        raise TypeError(f"validation must be a pair of arrays, got {type(validation).__name__}")
    if len(validation) != 2:
        raise ValueError(f"validation must be a pair of arrays, got {len(validation)} values")
    return validation[0], validation[1]


def _check_samples(x: Any, y: Any, x_name: str, y_name: str) -> None:
    _check_array(x, x_name)
    _check_array(y, y_name)
    if len(x) != len(y) or not len(x):
        raise ValueError(
            f"{x_name} and {y_name} must have the same number of samples, not 0, got {len(x)} and {len(y)}"
        )
