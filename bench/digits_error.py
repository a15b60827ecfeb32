"""How exact digits are: the error of 1x1 convolutions over that of adding up one float32 product after the other.

    python -m fastconv.bench.digits_error

It prints this ratio for sums of several lengths, images and weights of several distributions, wherever the numbers were
alike enough for digits (AMX), and the largest of them. Whether they were is seen in the last bits: with one pixel far
above all others, the image is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np

import fastconv as fc

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]

LENGTHS = (200, 320, 512, 1024, 2304)  #: of sums
FILTERS, HEIGHT, WIDTH = 64, 8, 10
OUTLIER = 1e6
HOW: dict[str, Any] = {"engine": "cython", "algorithm": "im2col"}
rng = np.random.default_rng(0)
DISTRIBUTIONS: dict[str, Callable[[Shape], Array]] = {
    "normal": rng.standard_normal,
    "uniform": lambda shape: rng.uniform(-1, 1, shape),
    "Laplace": lambda shape: rng.laplace(size=shape),
    "Student, 5": lambda shape: rng.standard_t(5, shape),
    "Student, 3": lambda shape: rng.standard_t(3, shape),
    "log-normal": lambda shape: rng.lognormal(size=shape),
    "after a ReLU": lambda shape: np.maximum(rng.standard_normal(shape), 0),
    "a fifth after a ReLU": lambda shape: np.maximum(rng.standard_normal(shape) - 0.84, 0),
    "ones and zeros": lambda shape: rng.integers(0, 2, shape).astype(float),
    "channels of other sizes": lambda shape: (
        rng.standard_normal(shape) * np.exp(rng.standard_normal((1, shape[1]) + (1,) * (len(shape) - 2)))
    ),
}
WEIGHTS = ("normal", "uniform", "Laplace", "Student, 5")


class Ratio(NamedTuple):
    """The error of one convolution."""

    length: int
    image: str
    weights: str
    digits: bool  #: whether they were used
    error: float  #: over that of plain sums


def plain_sums(weights: Array, cells: Array) -> Array:
    """Return what adding up one float32 product after the other makes of (K, C) weights and (C, pixels) cells."""
    sums = np.zeros((len(weights), cells.shape[1]), np.float32)
    for column, row in zip(weights.T, cells, strict=True):
        sums += column[:, None] * row
    return sums


def ratios(lengths: tuple[int, ...] = LENGTHS) -> Iterator[Ratio]:
    """Yield the ratio for each length and pair of distributions."""
    for length, image, weights in product(lengths, DISTRIBUTIONS, WEIGHTS):
        x = DISTRIBUTIONS[image]((1, length, HEIGHT, WIDTH)).astype(np.float32)
        w = DISTRIBUTIONS[weights]((FILTERS, length, 1, 1)).astype(np.float32)
        y = fc.conv2d(x, w, **HOW)
        exact = fc.conv2d(x.astype(np.float64), w.astype(np.float64), **HOW)
        plain = plain_sums(w[:, :, 0, 0], x.reshape(length, -1)).reshape(y.shape)
        x[..., -1, -1] = OUTLIER
        digits = not np.array_equal(fc.conv2d(x, w, **HOW)[..., :-1, :], y[..., :-1, :])
        yield Ratio(length, image, weights, digits, float(np.std(y - exact) / np.std(plain - exact)))


def main() -> None:
    """Print the ratios of digits."""
    found = list(ratios())
    used = [each for each in found if each.digits]
    for each in used:
        print(f"{each.length:5} products, {each.image} x {each.weights}: {each.error:.2f}")
    print(f"digits for {len(used)} of {len(found)}, {max((each.error for each in used), default=0):.2f} at most")


if __name__ == "__main__":
    main()
