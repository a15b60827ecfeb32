"""Operations on arrays, number by number, in plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np


def relu_backward(output: np.ndarray, grad_output: np.ndarray, grad_input: np.ndarray, options: Any) -> None:
    """See ``fastconv.kernels``. Here the arrays may be of several types, and have any strides."""
    bits = np.dtype(f"i{grad_output.itemsize}")  # times 0 or 1: of floats, inf * 0 would be NaN
    np.multiply(grad_output.view(bits), output > 0, out=grad_input.view(bits))
