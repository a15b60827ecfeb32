"""How exact Winograd's tiles are: their error in float32 over that of adding up one product after the other.

    python -m fastconv.bench.winograd_error

It prints these ratios for the tiles of ``kernels/winograd.py``, by the length of the sums and how much of them is
summed in a row, and the points (of sixteenths) with the smallest errors. What is computed is what the kernels compute,
in NumPy: no padding, some tiles of an image. Products of tiles are fused with sums, those of plain sums rounded first.
"""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from fastconv.kernels.winograd import RUNS, TERMS, Side
from fastconv.progress import progress_bar

Array = np.ndarray[Any, np.dtype[Any]]

NEAR, FAR = Fraction(10, 16), Fraction(24, 16)  #: of kernels/native/ukernels/winograd.h
FILTERS, TILES = 24, 24
LENGTHS = (120, 180, 250, 400, 600, 1000, 1600, 2000, 3000)  #: of sums


class Matrices(NamedTuple):
    """The transforms along one axis, each (rows, columns)."""

    outputs: Array  #: At
    taps: Array  #: G
    inputs: Array  #: Bt
    stride: int

    def rounded(self) -> Matrices:
        """Return the transforms in float32."""
        return self._replace(**{name: getattr(self, name).astype(np.float32) for name in ("outputs", "taps", "inputs")})


def matrices(side: Side, near: Fraction = NEAR, far: Fraction = FAR) -> Matrices:
    """Return the exact transforms of a side; with stride 2, those of its phases side by side."""
    phases = [_phase(side.outputs, -(-(side.taps - first) // side.stride), near, far) for first in range(side.stride)]
    taps, inputs = np.zeros((side.points, side.taps)), np.zeros((side.points, side.points))
    at = 0
    for first, phase in enumerate(phases):
        points = slice(at, at + len(phase.taps))
        taps[points, first :: side.stride], inputs[points, first :: side.stride] = phase.taps, phase.inputs
        at = points.stop
    return Matrices(np.concatenate([phase.outputs for phase in phases], 1), taps, inputs, side.stride)


def _phase(outputs: int, taps: int, near: Fraction, far: Fraction) -> Matrices:
    """Return the transforms for 4 points (0, 1, -1, infinity) or 6 (0, +-near, +-far, infinity); none for a single tap.

    Values of polynomials at points (Toom and Cook; S. Winograd): the last row is for infinity.
    """
    if taps == 1:
        return Matrices(np.eye(outputs), np.ones((outputs, 1)), np.eye(outputs), 1)
    pairs = [Fraction(1)] if outputs + taps == 5 else [near, far]
    points = [Fraction(0), *(point for pair in pairs for point in (pair, -pair))]
    powers = [[p**i for p in points] + [Fraction(i == outputs - 1)] for i in range(outputs)]
    distances = [math.prod(p - q for q in points if q != p) for p in points]
    to_taps = [[p**j / d for j in range(taps)] for p, d in zip(points, distances, strict=True)]
    to_inputs = [[*_polynomial([q for q in points if q != p]), Fraction(0)] for p in points] + [_polynomial(points)]
    last = [Fraction(j == taps - 1) for j in range(taps)]
    return Matrices(np.array(powers, float), np.array([*to_taps, last], float), np.array(to_inputs, float), 1)


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Return the coefficients of the product of (x - root), the lowest first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def error_ratio(channels: int, rows: Matrices, columns: Matrices, run: int, relu: bool, seed: int = 0) -> float:
    """Return the error of tiles over that of plain sums, where a ``run`` of channels is summed by itself."""
    rng = np.random.default_rng(seed)
    sides = rows, columns
    outputs, size, taps = zip(*((len(m.outputs), m.inputs.shape[1], m.taps.shape[1]) for m in sides), strict=True)
    x = rng.standard_normal((channels, TILES, *size), dtype=np.float32)
    w = rng.standard_normal((FILTERS, channels, *taps), dtype=np.float32)
    x = np.maximum(x, 0) if relu else x
    exact = np.zeros((FILTERS, TILES, *outputs))
    plain = exact.astype(np.float32)
    high, wide = (slice(0, (n - 1) * side.stride + 1, side.stride) for n, side in zip(outputs, sides, strict=True))
    for c, i, j in np.ndindex(channels, *taps):
        cells, tap = x[c, :, i:, j:][:, high, wide], w[:, c, i, j, None, None, None]
        exact += cells.astype(float) * tap
        plain += cells * tap
    tiles = _convolve(x, w, rows.rounded(), columns.rounded(), run)
    return float(np.sqrt(np.mean(np.square(tiles - exact)) / np.mean(np.square(plain - exact))))


def _convolve(x: Array, w: Array, rows: Matrices, columns: Matrices, run: int) -> Array:
    """Return the tiles' outputs, (filter, tile, row, column), all in float32 but for the products."""
    inputs = np.einsum("bj,ctaj->abct", columns.inputs, np.einsum("ai,ctij->ctaj", rows.inputs, x))
    taps = np.einsum("bj,kcaj->abkc", columns.taps, np.einsum("ai,kcij->kcaj", rows.taps, w))
    total = np.zeros((*taps.shape[:3], x.shape[1]), np.float32)
    inputs, taps = inputs.astype(float), taps.astype(float)
    for first in range(0, x.shape[0], run):
        part = np.zeros_like(total)
        for c in range(first, min(first + run, x.shape[0])):
            part = (part + taps[:, :, :, c, None] * inputs[:, :, None, c]).astype(np.float32)
        total += part
    result: Array = np.einsum("jb,ibkt->ktij", columns.outputs, np.einsum("ia,abkt->ibkt", rows.outputs, total))
    return result


def main() -> None:
    """Print both tables."""
    print("the greater ratio of numbers of both signs, and of those after a ReLU, by the length of sums; * is in use")
    print(" " * 42 + "".join(f"{terms:8d}" for terms in LENGTHS))
    for (rows, columns), begins in TERMS.items():
        for run, begin in zip(RUNS, begins, strict=True):
            cells = []
            for terms in LENGTHS:
                channels = max(1, round(terms / (rows.taps * columns.taps)))
                tile = matrices(rows), matrices(columns)
                ratio = max(error_ratio(channels, *tile, run, relu) for relu in (False, True))
                cells.append(f"{ratio:7.2f}{'*' if terms >= begin else ' '}")
            name = " x ".join(f"F({side.outputs}, {side.taps})" for side in (rows, columns))
            name += f", stride {columns.stride}" * (columns.stride > 1)
            print(f"{name:34s} {run:3d}    {''.join(cells)}", flush=True)
    sixteenths = [Fraction(n, 16) for n in range(6, 33)]
    pairs = [(near, far) for near, far in product(sixteenths, repeat=2) if near <= 1 < far]
    found = []
    with progress_bar(len(pairs), sys.stderr.isatty(), title="points", unit="pair") as bar:
        for near, far in pairs:
            side = matrices(Side(4, 3), near, far)
            found.append((max(error_ratio(128, side, side, 16, relu) for relu in (False, True)), near, far))
            bar.update()
    textbook = Fraction(1), Fraction(2)
    print("F(4, 3) x F(4, 3), 128 channels, the greater of both: the best, and the textbook's")
    for ratio, near, far in [*sorted(found)[:6], *(row for row in found if row[1:] == textbook)]:
        print(f"    0, +-{near}, +-{far}, infinity: {ratio:.2f}")


if __name__ == "__main__":
    main()
