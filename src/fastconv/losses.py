"""Losses: each returns the loss of a batch and its gradient with respect to the first argument.

A loss is the mean over the batch (the first axis) of what each sample contributes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import check_array
from .functional import Array

__all__ = ["cross_entropy", "squared_error"]


def squared_error(prediction: Array, target: Any) -> tuple[float, Array]:
    """Return the squared error (A - y)^2 and its gradient 2 (A - y): summed over the outputs, averaged over the batch.

    Parameters
    ----------
    prediction : ndarray, float32 or float64
        (N, ...), at least one sample. (N,) is one output for each sample.
    target : array_like
        Of the shape of ``prediction``, to whose dtype it is converted.

    Returns
    -------
    loss : float
        sum((prediction - target)^2) / N.
    grad : ndarray
        2 (prediction - target) / N, of shape and dtype of ``prediction``.

    Raises
    ------
    ValueError, TypeError
        For other shapes (nothing is broadcast) or dtypes.

    References
    ----------
    MIT 6.036 lecture notes, "Convolutional Neural Networks", section 9.4.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.losses.squared_error(np.array([[3.0, 1.0]]), [[1.0, 0.0]])
    (5.0, array([[4., 2.]]))
    """
    prediction = check_array(prediction, "prediction")
    target = np.asarray(target)
    if not prediction.ndim or not len(prediction):
        raise ValueError(f"prediction must have a batch of at least one sample, got shape {prediction.shape}")
    if target.shape != prediction.shape:
        raise ValueError(f"target must have the shape of prediction, {prediction.shape}, got {target.shape}")
    if not np.can_cast(target.dtype, prediction.dtype, "same_kind"):
        raise TypeError(f"target must be real numbers, got dtype {target.dtype}")
    difference = prediction - target.astype(prediction.dtype)
    batch = len(prediction)
    return float(np.square(difference).sum(dtype=np.float64)) / batch, difference * (2 / batch)


def cross_entropy(logits: Array, classes: Any) -> tuple[float, Array]:
    """Return the negative log-likelihood of the right classes under softmax(logits), and its gradient.

    Computed as logsumexp(z) - z[class] from z - max(z), so that large logits neither overflow nor lose the small
    probabilities.

    Parameters
    ----------
    logits : ndarray, float32 or float64
        (N, number of classes), at least one sample; the input of a softmax, not its output.
    classes : array_like of int
        (N,), the right class of each sample, from 0.

    Returns
    -------
    loss : float
        The mean over the batch.
    grad : ndarray
        (softmax(logits) - one_hot(classes)) / N, of shape and dtype of ``logits``.

    Raises
    ------
    ValueError, TypeError
        For other shapes or dtypes, or a class that does not exist.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> loss, grad = fc.losses.cross_entropy(np.array([[0.0, 0.0]]), [1])
    >>> round(loss, 6), grad
    (0.693147, array([[ 0.5, -0.5]]))
    """
    logits = check_array(logits, "logits")
    if logits.ndim != 2 or not logits.size:
        raise ValueError(f"logits must have shape (samples, classes) without empty dimension, got {logits.shape}")
    classes = _check_classes(classes, *logits.shape)
    rows = np.arange(len(logits))
    shifted = logits - logits.max(axis=1, keepdims=True)
    grad = np.exp(shifted)
    sums = grad.sum(axis=1, keepdims=True)
    loss = float((np.log(sums[:, 0]) - shifted[rows, classes]).mean(dtype=np.float64))
    grad /= sums
    grad[rows, classes] -= 1
    grad /= len(logits)
    return loss, grad


def _check_classes(given: Any, samples: int, count: int) -> Array:
    """Return class numbers as an integer array, or say what is wrong with them."""
    classes: Array = np.asarray(given)
    if not np.issubdtype(classes.dtype, np.integer):
        raise TypeError(f"classes must be integers, got dtype {classes.dtype}")
    if classes.shape != (samples,):
        raise ValueError(f"classes must have shape ({samples},), one for each row of logits, got {classes.shape}")
    if classes.min() < 0 or classes.max() >= count:
        raise ValueError(f"classes must be from 0 to {count - 1}, got {classes.min()} to {classes.max()}")
    return classes
