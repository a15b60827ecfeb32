"""Named problems, the oracle that answers them, and how far from it a result may be."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastconv as fc
from fastconv.dims import ConvDims, PoolDims, conv_dims, pool_dims
from fastconv.registry import ROWS, Row, available

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]


class ConvCase(NamedTuple):
    """A convolution of (N, C, *spatial) with (K, C/groups, *kernel)."""

    name: str
    input: Shape
    weight: Shape
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def spatial(self) -> int:
        return len(self.input) - 2

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def dims(self) -> ConvDims:
        return conv_dims(self.input, self.weight, **self.geometry)

    @property
    def output(self) -> Shape:
        return (self.dims.batch, self.dims.out_channels, *self.dims.output_size[3 - self.spatial :])

    def arrays(self, dtype: Any, seed: int = 0) -> ConvArrays:
        """Random arrays for this case; float64 ones hold float32 numbers, so that both types pose the same problem."""
        rng = np.random.default_rng(seed)
        shapes = (self.input, self.weight, self.weight[:1], self.output)
        return ConvArrays(*(rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes))


class ConvArrays(NamedTuple):
    input: Array
    weight: Array
    bias: Array
    grad_output: Array

    def astype(self, dtype: Any) -> ConvArrays:
        return ConvArrays(*(array.astype(dtype) for array in self))

    def magnitudes(self) -> ConvArrays:
        return ConvArrays(*map(np.abs, self))


class ConvResults(NamedTuple):
    """What the convolution kernels of one algorithm compute; None for what it has no kernel for."""

    output: Array | None
    grad_input: Array | None
    grad_weight: Array | None
    grad_bias: Array | None


CONV_CASES = [
    ConvCase("signal", (2, 3, 20), (4, 3, 5)),
    ConvCase("signal, stride, padding and dilation", (2, 3, 23), (4, 3, 3), 2, 3, 3),
    ConvCase("signal, pair of paddings", (1, 2, 9), (3, 2, 4), 1, ((3, 0),)),
    ConvCase("signal, one long row", (1, 1, 611), (2, 1, 7), 1, 3),
    ConvCase("signal, even kernel, same", (2, 2, 11), (2, 2, 4), 1, "same"),
    ConvCase("signal, even kernel, same_lower", (2, 2, 11), (2, 2, 4), 1, "same_lower"),
    ConvCase("signal of whole channel blocks", (2, 32, 200), (20, 32, 4), 2, 1, 3),
    ConvCase("signals in long tiles", (9, 160, 60), (18, 160, 3), 1, 1),
    ConvCase("signals of many filters", (9, 8, 30), (140, 8, 3), 1, 1),
    ConvCase("signal, depthwise", (2, 5, 17), (5, 1, 3), 1, 1, 1, 5),
    ConvCase("3x3", (2, 8, 9, 9), (16, 8, 3, 3), 1, 1),
    ConvCase("3x3 of primes", (3, 17, 11, 13), (19, 17, 3, 3), 1, 1),
    ConvCase("3x3 of one more than a tile", (1, 33, 7, 9), (33, 33, 3, 3), 1, 1),
    ConvCase("3x3 of many channels", (1, 70, 6, 5), (67, 70, 3, 3), 1, 1),
    ConvCase("3x3 of whole channel blocks", (2, 32, 7, 9), (32, 32, 3, 3), 1, 1),
    ConvCase("3x3 of whole channel blocks and a part, stride 2", (1, 40, 13, 14), (33, 40, 3, 3), 2, 1),
    ConvCase("3x3 of whole channel blocks, rows of 8", (2, 32, 8, 8), (17, 32, 3, 3), 1, 1),
    ConvCase("3x3 of whole channel blocks, rows of 8, stride 3", (1, 32, 24, 22), (16, 32, 3, 3), 3, 1),
    ConvCase("3x3 of whole channel blocks, rows of 30, valid", (2, 32, 7, 32), (16, 32, 3, 3)),
    ConvCase("3x3 of whole channel blocks, rows of 32, stride 2", (1, 32, 7, 63), (16, 32, 3, 3), 2, 1),
    ConvCase("3x3 of 72 channels", (2, 72, 9, 10), (40, 72, 3, 3), 1, 1),
    ConvCase("3x3 of 72 channels and filters, stride 2", (2, 72, 13, 11), (200, 72, 3, 3), 2, 1),
    ConvCase("5x5 of 64 channels, rows of 20, valid", (1, 64, 9, 24), (17, 64, 5, 5)),
    ConvCase("3x3, two groups of 48 channels, dilation 2", (1, 96, 12, 12), (64, 48, 3, 3), 1, 2, 2, 2),
    ConvCase("signal of 64 channels", (2, 64, 60), (33, 64, 5), 2, 1, 2),
    ConvCase("3x3, groups of whole channel blocks, dilation 2", (1, 64, 12, 12), (32, 32, 3, 3), 1, 2, 2, 2),
    ConvCase("3x3 of many channels, valid", (2, 16, 8, 5), (16, 16, 3, 3), 1, "valid"),
    ConvCase("3x3 of many channels, asymmetric padding", (1, 17, 7, 6), (18, 17, 3, 3), 1, ((0, 2), (1, 0))),
    ConvCase("3x3, groups of many channels", (1, 34, 6, 9), (36, 17, 3, 3), 1, 1, 1, 2),
    ConvCase("3x3, groups of more channels, dilation 2", (1, 48, 8, 9), (34, 24, 3, 3), 1, 2, 2, 2),
    ConvCase("3x3, stride 2", (2, 8, 10, 9), (8, 8, 3, 3), 2, 1),
    ConvCase("3x3, stride 3", (1, 4, 14, 11), (5, 4, 3, 3), 3),
    ConvCase("3x3, dilation 2", (1, 9, 11, 12), (6, 9, 3, 3), 1, 2, 2),
    ConvCase("3x3, stride 2, dilation 2", (1, 4, 13, 12), (6, 4, 3, 3), 2, 2, 2),
    ConvCase("3x3, dilation 3, stride 2", (1, 9, 15, 16), (3, 9, 3, 3), 2, 1, 3),
    ConvCase("3x3, valid", (1, 8, 8, 8), (8, 8, 3, 3), 1, "valid"),
    ConvCase("3x3, same, stride 2, even", (1, 8, 8, 8), (8, 8, 3, 3), 2, "same"),
    ConvCase("3x3, same_lower, stride 2, even", (1, 8, 8, 8), (8, 8, 3, 3), 2, "same_lower"),
    ConvCase("3x3, asymmetric padding", (1, 8, 7, 6), (8, 8, 3, 3), 1, ((0, 2), (1, 0))),
    ConvCase("3x3, padding beyond the kernel", (1, 2, 4, 4), (3, 2, 3, 3), 1, 5),
    ConvCase("3x3, different in both dimensions", (1, 8, 12, 9), (8, 8, 3, 2), (2, 1), (0, 1), (1, 3)),
    ConvCase("3x3 in tiles of 4x4", (1, 260, 16, 11), (18, 260, 3, 3), 1, 1),
    ConvCase("3x3 in tiles of 4x4, of weights", (4, 16, 24, 25), (17, 16, 3, 3), 1, 1),
    ConvCase("3x3 in tiles of two sizes, dilation 2", (2, 72, 17, 18), (18, 72, 3, 3), 1, 2, 2),
    ConvCase("3x3 in high tiles, one column more", (1, 72, 40, 25), (40, 72, 3, 3), 1, 1),
    ConvCase("3x3, dilation of two sizes", (1, 72, 13, 25), (18, 72, 3, 3), 1, (2, 3), (2, 3)),
    ConvCase("3x3, dilation 9 in both dimensions", (1, 40, 29, 30), (16, 40, 3, 3), 1, 9, 9),
    ConvCase("3x3, dilation 7 and 8", (1, 40, 29, 30), (16, 40, 3, 3), 1, (7, 8), (7, 8)),
    ConvCase("5x5 in slices", (1, 40, 16, 13), (20, 40, 5, 5), 1, 2),
    ConvCase("7x1 in slices", (2, 90, 20, 6), (17, 90, 7, 1), 1, (3, 0)),
    ConvCase("1x7 in slices, dilation 2", (2, 90, 6, 30), (17, 90, 1, 7), 1, (0, 6), 2),
    ConvCase("2x2 in tiles", (2, 48, 11, 10), (18, 48, 2, 2), 1, 1),
    ConvCase("4x4 in tiles", (1, 120, 13, 14), (17, 120, 4, 4), 1, 1),
    ConvCase("4x1 in tiles, dilation 2", (2, 110, 40, 3), (17, 110, 4, 1), 1, 0, 2),
    ConvCase("3x3, stride 2, in tiles of two phases", (2, 40, 17, 22), (18, 40, 3, 3), 2, 1),
    ConvCase("3x3, stride 2 across, in tiles", (1, 40, 9, 30), (17, 40, 3, 3), (1, 2), 1),
    ConvCase("3x3, groups, stride 2 down, in tiles", (1, 80, 19, 12), (34, 40, 3, 3), (2, 1), (0, 1), 1, 2),
    ConvCase("4x4, stride 2, in tiles of two phases", (1, 40, 18, 21), (17, 40, 4, 4), 2, 1),
    ConvCase("5x5, stride 2, in slices", (1, 40, 19, 18), (16, 40, 5, 5), 2, 2),
    ConvCase("signal, stride 2, in tiles of two phases", (2, 48, 61), (18, 48, 3), 2, 1),
    ConvCase("volume, stride 2, in tiles of two phases", (1, 40, 5, 9, 10), (16, 40, 3, 3, 3), 2, 1),
    ConvCase("7x7, stride 2, few channels", (1, 3, 21, 20), (16, 3, 7, 7), 2, 3),
    ConvCase("11x11, stride 4, few channels, many filters", (2, 3, 43, 39), (50, 3, 11, 11), 4, 2),
    ConvCase("7x7, stride 2, few channels, many filters", (2, 3, 21, 24), (50, 3, 7, 7), 2, 3),
    ConvCase("7x7, few channels, rows of 46, 33 filters", (1, 3, 14, 46), (33, 3, 7, 7), 1, 3),
    ConvCase("5x5, groups of few channels, stride 2 down", (2, 6, 12, 50), (36, 3, 5, 5), (2, 1), 2, 1, 2),
    ConvCase("6x7, stride 3 across, few channels", (1, 3, 25, 91), (64, 3, 6, 7), (1, 3), (3, 5)),
    ConvCase("9x7, one channel, dilation 2 across", (1, 1, 20, 40), (18, 1, 9, 7), 1, (4, 6), (1, 2)),
    ConvCase("signal of few channels", (2, 4, 70), (20, 4, 15), 1, 7),
    ConvCase("volume of few channels, rows of 40", (1, 2, 4, 9, 40), (17, 2, 3, 3, 3), 1, 1),
    ConvCase("5x5, one channel", (3, 1, 12, 12), (6, 1, 5, 5), 1, 2),
    ConvCase("3x3, stride 2 down, columns in bands", (1, 2, 70, 33), (3, 2, 3, 3), (2, 1), 1),
    ConvCase("volume, columns in bands", (1, 1, 5, 16, 17), (2, 1, 3, 3, 3), 1, 1),
    ConvCase("2x2, stride 2, rows of 30", (1, 3, 6, 60), (16, 3, 2, 2), 2),
    ConvCase("4x4, stride 4, rows of 26", (1, 3, 9, 105), (16, 3, 4, 4), 4),
    ConvCase("1x1 of more channels than are split at a time", (1, 600, 7, 8), (50, 600, 1, 1)),
    ConvCase("3x3, two filters, dilation 2, asymmetric padding", (2, 20, 9, 12), (2, 20, 3, 3), 1, ((1, 3), (4, 0)), 2),
    ConvCase("7x5, three filters of many channels", (1, 40, 14, 46), (3, 40, 7, 5), 1, (3, 1)),
    ConvCase("3x3, 12 filters of many channels", (1, 50, 16, 15), (12, 50, 3, 3), 1, 1),
    ConvCase("signal, one filter of many channels", (3, 30, 70), (1, 30, 4), 1, "same"),
    ConvCase("volume, two filters of many channels", (1, 12, 4, 6, 20), (2, 12, 2, 3, 3), 1, (0, 2, 1)),
    ConvCase("3x3, four pixels, many weights", (2, 70, 4, 4), (35, 70, 3, 3)),
    ConvCase("1x1, one pixel in each of many images", (40, 90, 1, 1), (21, 90, 1, 1)),
    ConvCase("2x2, nine pixels, groups", (3, 64, 2, 2), (34, 32, 2, 2), 1, 1, 1, 2),
    ConvCase("4x3, few pixels, stride 2, dilation 2", (2, 33, 7, 6), (50, 33, 4, 3), (1, 2), (0, 2), (2, 1)),
    ConvCase("signal, three pixels, stride 2", (9, 33, 7), (70, 33, 3), 2),
    ConvCase("3x3, many images of few pixels", (9, 30, 4, 4), (20, 30, 3, 3), 1, 1),
    ConvCase("volume, few pixels", (2, 20, 2, 3, 3), (17, 20, 2, 2, 2)),
    ConvCase("3x3, nine pixels, many weights", (1, 260, 3, 3), (230, 260, 3, 3), 1, 1),
    ConvCase("1x1, one filter of many channels", (2, 70, 6, 7), (1, 70, 1, 1)),
    ConvCase("11x11 of 11x11", (2, 3, 11, 11), (4, 3, 11, 11)),
    ConvCase("1x1", (2, 19, 6, 7), (35, 19, 1, 1)),
    ConvCase("1x1 of many channels", (2, 200, 6, 6), (20, 200, 1, 1)),
    ConvCase("1x1 of many filters", (2, 40, 9, 11), (50, 40, 1, 1)),
    ConvCase("1x1 of many channels and filters", (2, 200, 6, 7), (210, 200, 1, 1)),
    ConvCase("1x1 of whole cache lines, more than a tile of filters", (2, 33, 8, 12), (13, 33, 1, 1)),
    ConvCase("1x1 of whole cache lines, several blocks of channels", (1, 290, 8, 16), (21, 290, 1, 1)),
    ConvCase("1x1 of whole cache lines, groups", (1, 24, 16, 16), (20, 12, 1, 1), groups=2),
    ConvCase("1x1 of few channels and filters", (3, 5, 13, 14), (3, 5, 1, 1)),
    ConvCase("1x1 of many channels and filters, stride 2", (1, 600, 9, 9), (50, 600, 1, 1), 2),
    ConvCase("1x1 of many filters, stride 2, groups", (1, 66, 13, 14), (70, 33, 1, 1), 2, 0, 1, 2),
    ConvCase("3x3 of many filters, stride 2", (2, 36, 13, 12), (34, 36, 3, 3), 2, 1),
    ConvCase("3x3 of so many filters that digits add them up", (2, 7, 12, 11), (520, 7, 3, 3), 1, 1),
    ConvCase("1x1 of so many filters, stride 2, groups", (1, 66, 20, 21), (512, 33, 1, 1), 2, 0, 1, 2),
    ConvCase("1x1 of a megabyte of weights", (1, 530, 4, 5), (640, 530, 1, 1)),
    ConvCase("3x3 of many weights for few pixels", (1, 160, 5, 6), (130, 160, 3, 3), 1, 1),
    ConvCase("1x1 of whole channel blocks", (1, 64, 7, 7), (64, 64, 1, 1)),
    ConvCase("1x1, stride 2", (2, 16, 7, 7), (8, 16, 1, 1), 2),
    ConvCase("1x1, padding", (1, 3, 4, 4), (2, 3, 1, 1), 1, 1),
    ConvCase("1x1 of one pixel", (5, 40, 1, 1), (10, 40, 1, 1)),
    ConvCase("1x1 of nine pixels", (1, 70, 3, 3), (36, 70, 1, 1)),
    ConvCase("1x1 of one pixel, many weights", (2, 520, 1, 1), (70, 520, 1, 1)),
    ConvCase("stride beyond the kernel", (2, 3, 13, 11), (4, 3, 2, 2), (5, 4)),
    ConvCase("stride beyond the image", (2, 3, 6, 5), (4, 3, 3, 3), 10**6, (1, 0)),
    ConvCase("one filter, one channel, one pixel", (1, 1, 1, 1), (1, 1, 1, 1)),
    ConvCase("groups of two", (2, 6, 8, 8), (9, 2, 3, 3), 1, 1, 1, 3),
    ConvCase("groups of nine, stride 2", (1, 18, 9, 8), (20, 9, 3, 3), 2, 1, 1, 2),
    ConvCase("depthwise", (2, 19, 8, 9), (19, 1, 3, 3), 1, 1, 1, 19),
    ConvCase("depthwise, stride 2, dilation 2", (1, 8, 13, 11), (8, 1, 3, 3), 2, 2, 2, 8),
    ConvCase("depthwise, two filters for each channel", (1, 7, 8, 8), (14, 1, 3, 3), 1, 1, 1, 7),
    ConvCase("depthwise 5x5, rows of 17, uneven padding", (2, 24, 6, 17), (24, 1, 5, 5), 1, ((2, 0), (4, 1)), 1, 24),
    ConvCase("depthwise 7x7, padding beyond the filter", (1, 17, 3, 8), (17, 1, 7, 7), 1, ((9, 3), (0, 8)), 1, 17),
    ConvCase("volume, depthwise, rows of 11", (2, 20, 3, 4, 11), (20, 1, 2, 3, 3), 1, (0, 2, 1), 1, 20),
    ConvCase("volume of one row", (2, 2, 5, 3, 9), (3, 2, 2, 3, 3)),
    ConvCase("volume", (2, 3, 5, 6, 7), (4, 3, 3, 3, 3), 1, 1),
    ConvCase("volume of many channels", (1, 25, 3, 6, 7), (16, 25, 2, 3, 3), 1, 1),
    ConvCase("volume of whole channel blocks", (1, 32, 3, 7, 8), (16, 32, 2, 3, 3), 1, 1),
    ConvCase("volume of 48 channels", (1, 48, 3, 7, 8), (40, 48, 2, 3, 3), 1, 1),
    ConvCase("volume in slices", (1, 48, 4, 9, 8), (16, 48, 3, 3, 3), 1, 1),
    ConvCase("volume of few channels, many filters", (1, 4, 6, 9, 8), (48, 4, 2, 3, 3), (1, 2, 1), 1, (2, 1, 1)),
    ConvCase("volume, all different", (1, 4, 6, 7, 9), (6, 2, 1, 2, 3), (1, 2, 3), ((0, 1), (2, 0), 1), (2, 1, 2), 2),
    ConvCase("volume, depthwise", (1, 9, 4, 5, 6), (9, 1, 3, 3, 3), 1, 1, 1, 9),
    ConvCase("empty batch", (0, 3, 8, 8), (4, 3, 3, 3), 1, 1),
]


NAIVE_ROW = ROWS["conv_forward"][-1]
NAIVE = {"engine": NAIVE_ROW.engine, "algorithm": NAIVE_ROW.algorithm}
CONV_OPS = ("conv_forward", "conv_input_grad", "conv_weight_grad")


def how(row: Row) -> dict[str, Any]:
    """The keywords that ask for a row."""
    return {"engine": row.engine, "algorithm": row.algorithm}


def rows_of(case: ConvCase, op: str | None = None) -> list[Row]:
    """The rows that work here and can compute ``op`` of a case, or any operation of it."""
    ops = CONV_OPS if op is None else (op,)
    return [row for row in available("conv_forward") if any(row.can(name, case.dims) for name in ops)]


def for_every_row(cases: list[ConvCase], op: str | None = None, but: Row | None = None) -> pytest.MarkDecorator:
    """Parametrize a test over each case and each row that can compute it."""
    pairs = [(row, case) for case in cases for row in rows_of(case, op) if row != but]
    names = [f"{row.engine}-{row.algorithm}-{case.name}" for row, case in pairs]
    return pytest.mark.parametrize(("row", "case"), pairs, ids=names)


def conv_function(spatial: int, gradient: str = "") -> Callable[..., Any]:
    """fc.conv2d and its like, or fc.grad.conv2d_input and its like."""
    name = f"conv{spatial}d"
    function: Callable[..., Any] = getattr(fc.grad, f"{name}_{gradient}") if gradient else getattr(fc, name)
    return function


def conv_results(case: ConvCase, arrays: ConvArrays, row: Row = NAIVE_ROW, **keywords: Any) -> ConvResults:
    """Everything that one algorithm says of a case, by way of the public functions."""
    x, w, b, g = arrays
    forward, input_grad, weight_grad = (row.can(op, case.dims) for op in CONV_OPS)
    options = case.geometry | how(row) | keywords
    output = conv_function(case.spatial)(x, w, b, **options) if forward else None
    needs = ["input"] * input_grad + ["weight", "bias"] * weight_grad
    return ConvResults(output, *getattr(fc.grad, f"conv{case.spatial}d")(x, w, g, **options, needs=needs))


class Answer(NamedTuple):
    """What a result must be, and how far from it a sum in a given type may end; the loops lack nothing."""

    exact: ConvResults
    magnitude: ConvResults  #: the same operation on absolute values: what rounding errors are relative to


def oracle(case: ConvCase, arrays: ConvArrays, **keywords: Any) -> Answer:
    """The textbook loops in float64."""
    wide = arrays.astype(np.float64)
    return Answer(conv_results(case, wide, **keywords), conv_results(case, wide.magnitudes(), **keywords))


@cache
def case_oracle(case: ConvCase) -> Answer:
    return oracle(case, case.arrays(np.float64))


def assert_close(actual: Array, exact: Array, magnitude: Array, dtype: Any) -> None:
    """Each element within 4 eps of the sum of its terms' magnitudes.

    The rounding error of a sum of R random terms is of the order of eps * sum |term| at most, whatever R and the order:
    relative to the result, sqrt(R) * eps. So 4 leaves room for the largest of many elements and for nothing else: one
    forgotten or doubled term is far outside.
    """
    assert actual.dtype == dtype
    assert actual.shape == exact.shape
    excess = np.abs(actual.astype(np.float64) - exact) - 4 * np.finfo(dtype).eps * magnitude
    if excess.size and not excess.max() <= 0:
        worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        wrong = f"{np.count_nonzero(~(excess <= 0))} of {excess.size} elements"
        raise AssertionError(f"{wrong} are off; at {worst}: {actual[worst]}, not {exact[worst]}")


def assert_results(actual: ConvResults, answer: Answer, dtype: Any) -> None:
    """Whatever there is of the results is close to the answer."""
    for name, result, exact, magnitude in zip(ConvResults._fields, actual, *answer, strict=True):
        if result is not None and exact is not None and magnitude is not None:
            try:
                assert_close(result, exact, magnitude, dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


def assert_equal_results(actual: NamedTuple, wanted: NamedTuple) -> None:
    """Whatever there is of the results is the same, NaN being equal to NaN."""
    for name, result, answer in zip(actual._fields, actual, wanted, strict=True):
        if result is not None:
            assert result.dtype == answer.dtype, name
            np.testing.assert_array_equal(result, answer, err_msg=name)


class PoolCase(NamedTuple):
    """A max pooling of (N, C, *spatial)."""

    name: str
    input: Shape
    kernel_size: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False

    @property
    def spatial(self) -> int:
        return len(self.input) - 2

    @property
    def dims(self) -> PoolDims:
        return pool_dims(self.input, *self.window)

    @property
    def window(self) -> tuple[Any, ...]:
        """kernel_size, stride, padding, dilation, ceil_mode: the arguments in their order."""
        return self[2:]

    def image(self, dtype: Any, seed: int = 0) -> Array:
        """Small integers, so that there are ties, of both signs, so that padding is never the maximum."""
        return np.random.default_rng(seed).integers(-9, 3, self.input).astype(dtype)


POOL_CASES = [
    PoolCase("signal", (2, 3, 20), 3),
    PoolCase("signal, overlapping", (2, 3, 21), 5, 2, 2),
    PoolCase("2x2", (2, 3, 8, 10), 2),
    PoolCase("2x2 of odd sizes", (2, 17, 9, 7), 2),
    PoolCase("2x2, ceil mode", (1, 3, 9, 7), 2, None, 0, 1, True),
    PoolCase("3x3, stride 2, padding", (2, 5, 13, 12), 3, 2, 1),
    PoolCase("3x3, stride 2, padding, ceil mode", (1, 2, 12, 10), 3, 2, 1, 1, True),
    PoolCase("3x3, stride 1", (1, 4, 7, 6), 3, 1, 1),
    PoolCase("3x3, stride 4", (1, 4, 13, 11), 3, 4),
    PoolCase("3x3, dilation 2", (1, 3, 9, 11), 3, 1, 2, 2),
    PoolCase("all different", (1, 3, 12, 14), (2, 3), (3, 1), (1, 0), (2, 3), True),
    PoolCase("1x1", (2, 3, 4, 5), 1),
    PoolCase("the whole plane", (2, 5, 6, 7), (6, 7)),
    PoolCase("17x17: more than 256 cells", (1, 2, 20, 19), 17, 2, 8),
    PoolCase("16x16: exactly 256 cells", (1, 2, 18, 18), 16, 1),
    PoolCase("volume", (2, 3, 6, 7, 8), 2),
    PoolCase("volume, all different", (1, 2, 6, 7, 8), (1, 2, 3), (1, 3, 2), (0, 1, 1), (2, 1, 1), True),
    PoolCase("many channels", (1, 67, 5, 6), 2, 1),
    PoolCase("many planes of several images", (3, 41, 9, 8), 3, 2, 1),
    PoolCase("many planes of whole windows", (2, 60, 14, 14), 2),
    PoolCase("planes larger than half of L1", (1, 2, 130, 61), (3, 2), (1, 2), (1, 1)),
    PoolCase("slabs larger than half of L1", (1, 2, 7, 45, 40), 3, (2, 1, 2), 1),
    PoolCase("5x5, stride 1", (2, 9, 13, 13), 5, 1, 2),
    PoolCase("signal in parts, overlapping", (2, 2, 5003), 5, 3, 2),
    PoolCase("signal in parts", (2, 2, 8200), 2),
    PoolCase("rows of 70000", (1, 1, 2, 70001), 3, 2, 1),
    PoolCase("stride 3, padding", (1, 5, 22, 21), 4, 3, 2),
    PoolCase("one column of windows, overlapping", (2, 64, 9, 3), 3, 2),
    PoolCase("one window, of two that would overlap", (2, 33, 4, 4), 3, 2),
    PoolCase("stride beyond the image", (2, 3, 5, 6), 3, 10**6),
    PoolCase("empty batch", (0, 3, 8, 8), 2),
]


class PoolResults(NamedTuple):
    output: Array
    indices: Array
    winners: Array
    grad_input: Array


def pool_results(spatial: int, image: Array, window: tuple[Any, ...], **how: Any) -> PoolResults:
    """Everything that one algorithm says of a max pooling."""
    pool, gradient = getattr(fc, f"max_pool{spatial}d"), getattr(fc.grad, f"max_pool{spatial}d")
    output, winners = pool(image, *window, return_indices="compact", **how)
    indices = pool(image, *window, return_indices=True, **how)[1]
    grad_output = np.random.default_rng(1).standard_normal(output.shape).astype(image.dtype)
    return PoolResults(output, indices, winners, gradient(image.shape, winners, grad_output, *window, **how))


@cache
def pool_oracle(case: PoolCase, dtype: Any) -> PoolResults:
    """What the textbook loops say of the case's image."""
    return pool_results(case.spatial, case.image(dtype), case.window, **NAIVE)


def run_python(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter, where a warning is an error and a crash is only a return code."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FASTCONV_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=clean | (environment or {}),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def output_of(code: str, **environment: str) -> str:
    """What a program prints; it must end well."""
    done = run_python(code, environment)
    assert done.returncode == 0, f"return code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
