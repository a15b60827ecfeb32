"""Gradient descent: ``step()`` changes a model's parameters, in place, by the gradients of its last ``backward``.

``backward`` overwrites the gradients of the one before, so that there is nothing to set to zero in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .functional import Array
from .layers import Layer

__all__ = ["SGD", "Adam", "Optimizer"]

PART = 1 << 15  #: numbers of a parameter that are changed at a time: they stay in the caches for all steps of the sums


class Optimizer:
    """What optimizers share: the model, the learning rate and the walk over the parameters.

    To write one: override ``update``.

    Attributes
    ----------
    lr : float
        The learning rate; may be changed between steps.
    """

    def __init__(self, model: Layer, lr: float) -> None:
        if not isinstance(model, Layer):
            raise TypeError(f"model must be a Layer, got {type(model).__name__}")
        self.model = model
        self.lr = _number(lr, "lr")
        self.steps = 0

    def step(self) -> None:
        """Change every parameter of the model.

        Raises
        ------
        RuntimeError
            Without a ``backward`` before, or in eval mode, where parameters are read-only.
        """
        grads = self.model.grads
        if grads.keys() != self.model.params.keys():
            raise RuntimeError(
                f"{type(self).__name__}.step needs gradients: call the model's forward and backward first"
            )
        if not self.model.training:
            raise RuntimeError(f"{type(self).__name__}.step needs the model in training mode: call train() first")
        self.steps += 1
        for name, param in self.model.params.items():
            self.update(name, param, grads[name])

    def update(self, name: str, param: Array, grad: Array) -> None:
        """Change one parameter in place."""
        raise NotImplementedError


def _parts(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Yield arrays of one shape in parts, the same of each; all at once if they are not contiguous."""
    if not all(array.flags.c_contiguous for array in arrays):
        yield arrays
        return
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, PART):
        yield tuple(array[start : start + PART] for array in flat)


class SGD(Optimizer):
    """Gradient descent on batches, with momentum.

    v = momentum * v + grad + weight_decay * param;  param = param - lr * v

    Parameters
    ----------
    model : Layer
        Whose ``params`` are to change.
    lr : float
        Learning rate.
    momentum : float
        From 0 (none) to below 1.
    weight_decay : float
        Factor of the L2 penalty.

    Raises
    ------
    TypeError, ValueError
        For something that is no Layer, or a number out of range.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> model = fc.layers.Linear(2, 1, bias=False, rng=0, dtype=np.float64)
    >>> model.params["weight"] = [[1.0, 1.0]]
    >>> optimizer = fc.optim.SGD(model, lr=0.25)
    >>> loss, grad = fc.losses.squared_error(model(np.array([[1.0, 0.0]])), [[0.0]])
    >>> grad_input = model.backward(grad)
    >>> optimizer.step()
    >>> model.params["weight"]
    array([[0.5, 1. ]])
    """

    def __init__(self, model: Layer, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(model, lr)
        self.momentum = _number(momentum, "momentum", below=1)
        self.weight_decay = _number(weight_decay, "weight_decay")
        self._velocity: dict[str, Array] = {}  # empty without momentum

    def update(self, name: str, param: Array, grad: Array) -> None:
        if not self.momentum:
            for weights, slopes in _parts(param, grad):
                weights -= self.lr * self._decayed(weights, slopes)
            return
        if name not in self._velocity:
            self._velocity[name] = np.zeros_like(param)
        for weights, slopes, velocity in _parts(param, grad, self._velocity[name]):
            velocity *= self.momentum
            velocity += self._decayed(weights, slopes)
            weights -= self.lr * velocity

    def _decayed(self, weights: Array, slopes: Array) -> Array:
        return slopes + self.weight_decay * weights if self.weight_decay else slopes


class Adam(Optimizer):
    """Adam: steps scaled by running means of the gradient and of its square.

    Parameters
    ----------
    model : Layer
        Whose ``params`` are to change.
    lr : float
        Learning rate.
    betas : (float, float)
        How much of the two running means one step keeps, each from 0 to below 1.
    eps : float
        Added to the denominator.

    Raises
    ------
    TypeError, ValueError
        For something that is no Layer, or a number out of range.

    References
    ----------
    D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980, algorithm 1.

    Examples
    --------
    >>> import fastconv as fc
    >>> optimizer = fc.optim.Adam(fc.layers.Linear(2, 1), lr=1e-2)
    >>> optimizer.lr
    0.01
    """

    def __init__(
        self, model: Layer, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(model, lr)
        if not isinstance(betas, (tuple, list)):
            raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
        if len(betas) != 2:
            raise ValueError(f"betas must be a pair of numbers, got {len(betas)} values")
        self.betas = _number(betas[0], "betas[0]", below=1), _number(betas[1], "betas[1]", below=1)
        self.eps = _number(eps, "eps")
        self._mean = {name: np.zeros_like(param) for name, param in model.params.items()}
        self._square = {name: np.zeros_like(param) for name, param in model.params.items()}

    def update(self, name: str, param: Array, grad: Array) -> None:
        beta1, beta2 = self.betas
        # The means start at zero: these factors take that out again.
        lr, scale = self.lr / (1 - beta1**self.steps), 1 / (1 - beta2**self.steps)
        for weights, slopes, mean, square in _parts(param, grad, self._mean[name], self._square[name]):
            mean += (1 - beta1) * (slopes - mean)
            square += (1 - beta2) * (slopes * slopes - square)
            weights -= lr * mean / (np.sqrt(scale * square) + self.eps)


def _number(value: Any, name: str, below: float = math.inf) -> float:
    """Return a number from 0 to ``below``, or say what is wrong with argument ``name``."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not 0 <= number < below:
        raise ValueError(f"{name} must be at least 0 and below {below}, got {number}")
    return number
