"""How exact Winograd's tiles are: their error in float32 over that of adding up one product after the other.

    python -m fastconv.bench.winograd_error

It prints these ratios for tiles and numbers of channels, and the points (of sixteenths) with the smallest errors. What
is computed is what the kernels compute, in NumPy: 3x3 filters, no padding, some tiles of an image.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

Array = np.ndarray[Any, np.dtype[Any]]

NEAR, FAR = Fraction(10, 16), Fraction(24, 16)  #: of kernels/native/ukernels/winograd.h
FILTERS, TILES = 32, 48
CHANNELS = (16, 32, 48, 64, 128, 176, 192, 256, 512)


class Matrices(NamedTuple):
    """The transforms along one axis, each (rows, columns)."""

    outputs: Array  #: At
    taps: Array  #: G
    inputs: Array  #: Bt

    def rounded(self) -> Matrices:
        """Return the transforms in float32."""
        return Matrices(*(matrix.astype(np.float32) for matrix in self))


def matrices(outputs: int, near: Fraction = NEAR, far: Fraction = FAR) -> Matrices:
    """Return the exact transforms for 2 outputs (points 0, 1, -1, infinity) or 4 (0, +-near, +-far, infinity).

    Values of polynomials at points (Toom and Cook; S. Winograd): the last row is for infinity.
    """
    points = [Fraction(0), *([Fraction(1), Fraction(-1)] if outputs == 2 else [near, -near, far, -far])]
    powers = [[p**i for p in points] + [Fraction(i == outputs - 1)] for i in range(outputs)]
    distances = [math.prod(p - q for q in points if q != p) for p in points]
    taps = [[p**j / d for j in range(3)] for p, d in zip(points, distances, strict=True)] + [[0, 0, 1]]
    inputs = [[*_polynomial([q for q in points if q != p]), Fraction(0)] for p in points] + [_polynomial(points)]
    return Matrices(*(np.array(m, float) for m in (powers, taps, inputs)))


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Return the coefficients of the product of (x - root), the lowest first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def error_ratio(channels: int, rows: Matrices, columns: Matrices, apart: int, relu: bool, seed: int = 0) -> float:
    """Return the error of tiles over that of plain sums, where ``apart`` channels are summed by themselves."""
    rng = np.random.default_rng(seed)
    high, wide = rows.inputs.shape[0], columns.inputs.shape[0]
    x = rng.standard_normal((channels, TILES, high, wide), dtype=np.float32)
    w = rng.standard_normal((FILTERS, channels, 3, 3), dtype=np.float32)
    x = np.maximum(x, 0) if relu else x
    shape = (FILTERS, TILES, high - 2, wide - 2)
    exact, plain = np.zeros(shape), np.zeros(shape, np.float32)
    for c, i, j in np.ndindex(channels, 3, 3):
        cells, taps = x[c, :, i : i + high - 2, j : j + wide - 2], w[:, c, i, j, None, None, None]
        exact += cells.astype(float) * taps
        plain += cells * taps
    tiles = _convolve(x, w, rows.rounded(), columns.rounded(), apart)
    return float(np.sqrt(np.mean(np.square(tiles - exact)) / np.mean(np.square(plain - exact))))


def _convolve(x: Array, w: Array, rows: Matrices, columns: Matrices, apart: int) -> Array:
    """Return the tiles' outputs, (filter, tile, row, column), all in float32."""
    inputs = np.einsum("bj,ctaj->abct", columns.inputs, np.einsum("ai,ctij->ctaj", rows.inputs, x))
    taps = np.einsum("bj,kcaj->abkc", columns.taps, np.einsum("ai,kcij->kcaj", rows.taps, w))
    total = np.zeros((*taps.shape[:3], x.shape[1]), np.float32)
    for first in range(0, x.shape[0], apart):
        part = np.zeros_like(total)
        for c in range(first, min(first + apart, x.shape[0])):
            part += taps[:, :, :, c, None] * inputs[:, :, None, c]
        total += part
    result: Array = np.einsum("jb,ibkt->ktij", columns.outputs, np.einsum("ia,abkt->ibkt", rows.outputs, total))
    return result


def main() -> None:
    """Print both tables."""
    two, four = matrices(2), matrices(4)
    tiles = {
        "2x2": (two, two, 32),
        "2x4": (two, four, 16),
        "4x4": (four, four, 16),
        "4x4 in one row": (four, four, max(CHANNELS)),
    }
    print("channels   " + "   ".join(f"{name} both signs, after a ReLU" for name in tiles))
    for channels in CHANNELS:
        ratios = [[error_ratio(channels, *tile, relu) for relu in (False, True)] for tile in tiles.values()]
        print(f"{channels:8d}   " + "   ".join(f"{a:14.2f} {b:14.2f}" for a, b in ratios))
    sixteenths = [Fraction(n, 16) for n in range(6, 33)]
    pairs = [(near, far) for near, far in product(sixteenths, repeat=2) if near <= 1 < far]
    found = []
    for near, far in tqdm(pairs, desc="points", disable=None):
        tile = matrices(4, near, far)
        found.append((max(error_ratio(128, tile, tile, 16, relu) for relu in (False, True)), near, far))
    print("4x4, 128 channels, the greater of both: the best, and the textbook's")
    for ratio, near, far in [*sorted(found)[:6], *(row for row in found if row[1:] == (1, 2))]:
        print(f"    0, +-{near}, +-{far}, infinity: {ratio:.2f}")


if __name__ == "__main__":
    main()
