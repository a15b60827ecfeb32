"""A table of wrong calls: each raises ValueError or TypeError, names the argument, and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import Array

import fastconv as fc

X = np.ones((2, 4, 8, 8), np.float32)
W = np.ones((6, 4, 3, 3), np.float32)
B = np.ones(6, np.float32)
Y = np.ones((2, 6, 6, 6), np.float32)
POOLED, WINNERS = fc.max_pool2d(X, 2, return_indices="compact")
OFFSETS = fc.max_pool2d(X, 2, return_indices=True)[1]


class Wrong(NamedTuple):
    """A call that must fail, how, and a pattern that its message must match."""

    call: Callable[[], Any]
    error: type[Exception]
    message: str


def read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


CONVOLUTION = {
    "a list": Wrong(lambda: fc.conv2d([[1.0]], W), TypeError, r"input must be a numpy.ndarray, got list"),
    "None": Wrong(lambda: fc.conv2d(None, W), TypeError, r"input must be a numpy.ndarray, got NoneType"),
    "a masked array": Wrong(lambda: fc.conv2d(np.ma.ones(X.shape), W), TypeError, r"input must be .* got MaskedArray"),
    "integers": Wrong(lambda: fc.conv2d(X.astype(int), W), TypeError, r"input must be float32 or float64, .* int64"),
    "half": Wrong(lambda: fc.conv2d(X.astype("f2"), W), TypeError, r"input must be float32 or float64, .* float16"),
    "long double": Wrong(lambda: fc.conv2d(X.astype("g"), W), TypeError, r"input must be float32 or float64, got"),
    "complex": Wrong(lambda: fc.conv2d(X.astype("c8"), W), TypeError, r"input must be .* got dtype complex64"),
    "objects": Wrong(lambda: fc.conv2d(X.astype(object), W), TypeError, r"input must be .* got dtype object"),
    "booleans": Wrong(lambda: fc.conv2d(X.astype(bool), W), TypeError, r"input must be .* got dtype bool"),
    "weight is a list": Wrong(lambda: fc.conv2d(X, [[1.0]]), TypeError, r"weight must be a numpy.ndarray, got list"),
    "weight of another type": Wrong(
        lambda: fc.conv2d(X, W.astype(float)), TypeError, r"weight must have the dtype of input, float32, got float64"
    ),
    "bias of another type": Wrong(
        lambda: fc.conv2d(X, W, B.astype(float)), TypeError, r"bias must have the dtype of input, float32, got float64"
    ),
    "bias is a number": Wrong(lambda: fc.conv2d(X, W, 1.0), TypeError, r"bias must be a numpy.ndarray, got float"),
    "bias of another length": Wrong(lambda: fc.conv2d(X, W, B[:5]), ValueError, r"bias must have shape \(6,\).*\(5,\)"),
    "bias of two dimensions": Wrong(
        lambda: fc.conv2d(X, W, B[:, None]), ValueError, r"bias must have shape \(6,\).*\(6, 1\)"
    ),
    "too few dimensions": Wrong(lambda: fc.conv2d(X[0, 0], W), ValueError, r"input must have 4 dimensions .*\(8, 8\)"),
    "too many dimensions": Wrong(lambda: fc.conv2d(X[None], W), ValueError, r"input must have 4 dimensions"),
    "an image for a signal": Wrong(lambda: fc.conv1d(X, W), ValueError, r"input must have 3 dimensions"),
    "weight without channels": Wrong(lambda: fc.conv2d(X, W[0]), ValueError, r"weight must have 4 dimensions"),
    "other channels": Wrong(lambda: fc.conv2d(X[:, :3], W), ValueError, r"input must have 4 channels.* got 3"),
    "channels of another layout": Wrong(
        lambda: fc.conv2d(X, W, layout="NHWC"), ValueError, r"input must have 3 channels.* got 8"
    ),
    "no channels": Wrong(lambda: fc.conv2d(X[:, :0], W[:, :0]), ValueError, r"weight must have no empty dimension"),
    "no filters": Wrong(lambda: fc.conv2d(X, W[:0]), ValueError, r"weight must have no empty dimension"),
    "no taps": Wrong(lambda: fc.conv2d(X, W[..., :0]), ValueError, r"weight must have no empty dimension"),
    "no pixels": Wrong(lambda: fc.conv2d(X[..., :0], W), ValueError, r"input must have no empty dimension"),
    "an image below the kernel": Wrong(
        lambda: fc.conv2d(X[:, :, :2], W), ValueError, r"input is too small along spatial dimension 0: 2 .* 3 "
    ),
    "an image below the dilated kernel": Wrong(
        lambda: fc.conv2d(X, W, dilation=(1, 4)), ValueError, r"input is too small along spatial dimension 1.* 9 "
    ),
    "stride 0": Wrong(lambda: fc.conv2d(X, W, stride=0), ValueError, r"stride must be at least 1, got 0"),
    "a fractional stride": Wrong(
        lambda: fc.conv2d(X, W, stride=1.5), TypeError, r"stride must be an integer, got 1\.5"
    ),
    "strides that equal those of a call before": Wrong(
        lambda: (fc.conv2d(X, W, stride=(1, 1)), fc.conv2d(X, W, stride=(1.0, True))),
        TypeError,
        r"stride\[0\] must be an integer, got 1\.0",
    ),
    "stride None": Wrong(lambda: fc.conv2d(X, W, stride=None), TypeError, r"stride must be an integer, got None"),
    "stride True": Wrong(lambda: fc.conv2d(X, W, stride=True), TypeError, r"stride must be an integer, got True"),
    "three strides": Wrong(lambda: fc.conv2d(X, W, stride=(1, 1, 1)), ValueError, r"stride must be .* 2, got 3 values"),
    "no strides": Wrong(lambda: fc.conv2d(X, W, stride=()), ValueError, r"stride must be .* 2, got 0 values"),
    "one wrong stride": Wrong(lambda: fc.conv2d(X, W, stride=(1, -1)), ValueError, r"stride\[1\] must be at least 1"),
    "a huge stride": Wrong(lambda: fc.conv2d(X, W, stride=2**40), ValueError, r"stride must be below 2\*\*31"),
    "dilation 0": Wrong(lambda: fc.conv2d(X, W, dilation=0), ValueError, r"dilation must be at least 1, got 0"),
    "dilation of text": Wrong(lambda: fc.conv2d(X, W, dilation="2"), TypeError, r"dilation must be an integer"),
    "negative padding": Wrong(lambda: fc.conv2d(X, W, padding=-1), ValueError, r"padding must be at least 0, got -1"),
    "an unknown word": Wrong(lambda: fc.conv2d(X, W, padding="full"), ValueError, r"padding must be .*'same'.*'full'"),
    "a fractional padding": Wrong(lambda: fc.conv2d(X, W, padding=0.5), TypeError, r"padding must be an integer"),
    "padding None": Wrong(lambda: fc.conv2d(X, W, padding=None), TypeError, r"padding must be an integer"),
    "four paddings": Wrong(lambda: fc.conv2d(X, W, padding=(1, 1, 1, 1)), ValueError, r"padding must be .* 2, got 4"),
    "a triple": Wrong(lambda: fc.conv2d(X, W, padding=[(1, 2, 3), 1]), ValueError, r"padding\[0\] must be .* pair"),
    "half a pair": Wrong(
        lambda: fc.conv2d(X, W, padding=[1, (1, -2)]), ValueError, r"padding\[1\]\[1\] must be at least 0"
    ),
    "groups 0": Wrong(lambda: fc.conv2d(X, W, groups=0), ValueError, r"groups must be at least 1, got 0"),
    "fractional groups": Wrong(lambda: fc.conv2d(X, W, groups=2.0), TypeError, r"groups must be an integer"),
    "groups that do not match": Wrong(
        lambda: fc.conv2d(X, W, groups=2), ValueError, r"input must have 8 channels.* got 4"
    ),
    "groups that do not divide": Wrong(
        lambda: fc.conv2d(X, W[:, :1], groups=4), ValueError, r"groups must divide the 6 output channels.* groups=4"
    ),
    "an unknown layout": Wrong(
        lambda: fc.conv2d(X, W, layout="CHWN"), ValueError, r"layout must be 'NCHW' or 'NHWC'.*CHWN"
    ),
    "layout None": Wrong(lambda: fc.conv2d(X, W, layout=None), ValueError, r"layout must be .* got None"),
    "an unknown activation": Wrong(
        lambda: fc.conv2d(X, W, activation="tanh"), ValueError, r"activation must be one of None, 'relu', got 'tanh'"
    ),
    "an unknown precision": Wrong(
        lambda: fc.conv2d(X, W, precision="low"), ValueError, r"precision must be one of 'highest', .* got 'low'"
    ),
    "an unknown engine": Wrong(
        lambda: fc.conv2d(X, W, engine="cuda"), ValueError, r"engine must be one of 'cython', 'numba', 'numpy'.*'cuda'"
    ),
    "an unknown algorithm": Wrong(
        lambda: fc.conv2d(X, W, algorithm="fft"), ValueError, r"algorithm must be one of .*'naive'.* got 'fft'"
    ),
    "an algorithm of another engine": Wrong(
        lambda: fc.conv2d(X, W, algorithm="direct", engine="numpy"),
        ValueError,
        r"algorithm 'direct' with engine 'numpy'",
    ),
    "out is a list": Wrong(lambda: fc.conv2d(X, W, out=[]), TypeError, r"out must be a numpy.ndarray, got list"),
    "out of another shape": Wrong(
        lambda: fc.conv2d(X, W, out=np.zeros((2, 6, 6, 5), "f4")), ValueError, r"out must have shape \(2, 6, 6, 6\)"
    ),
    "out with a batch": Wrong(
        lambda: fc.conv2d(X[0], W, out=np.zeros((1, 6, 6, 6), "f4")), ValueError, r"out must have shape \(6, 6, 6\)"
    ),
    "out of another type": Wrong(
        lambda: fc.conv2d(X, W, out=np.zeros(Y.shape)), TypeError, r"out must have dtype float32, got float64"
    ),
    "out is read-only": Wrong(
        lambda: fc.conv2d(X, W, out=read_only(np.zeros(Y.shape, "f4"))), ValueError, r"out must be writ"
    ),
}

TRANSPOSED = {
    "other channels": Wrong(lambda: fc.conv_transpose2d(X, W), ValueError, r"input must have 6 channels.* got 4"),
    "padding of words": Wrong(
        lambda: fc.conv_transpose2d(Y, W, padding="same"), TypeError, r"padding of a transposed convolution"
    ),
    "too much padding": Wrong(lambda: fc.conv_transpose2d(Y, W, padding=4), ValueError, r"padding .*is too large"),
    "too much output padding": Wrong(
        lambda: fc.conv_transpose2d(Y, W, stride=2, output_padding=2), ValueError, r"output_padding must be smaller"
    ),
    "negative output padding": Wrong(
        lambda: fc.conv_transpose2d(Y, W, output_padding=-1), ValueError, r"output_padding must be at least 0"
    ),
    "bias of the input's channels": Wrong(
        lambda: fc.conv_transpose2d(Y, W, B), ValueError, r"bias must have shape \(4,\).*\(6,\)"
    ),
    "groups that do not divide": Wrong(
        lambda: fc.conv_transpose2d(Y, W, groups=4), ValueError, r"groups must divide the 6 channels of input"
    ),
}

GRADIENTS = {
    "input_size is a number": Wrong(
        lambda: fc.grad.conv2d_input(8, W, Y), TypeError, r"input_size must be a sequence of integers, got 8"
    ),
    "input_size of one dimension": Wrong(
        lambda: fc.grad.conv2d_input((8,), W, Y), ValueError, r"input_size must have 3 or 4 entries"
    ),
    "input_size of fractions": Wrong(
        lambda: fc.grad.conv2d_input((2, 4, 8.0, 8), W, Y), TypeError, r"input_size\[2\] must be an integer"
    ),
    "input_size without a batch": Wrong(
        lambda: fc.grad.conv2d_input((4, 8, 8), W, Y),
        ValueError,
        r"input_size must have as many entries as grad_output",
    ),
    "input_size of other channels": Wrong(
        lambda: fc.grad.conv2d_input((2, 3, 8, 8), W, Y), ValueError, r"input_size must have 4 channels"
    ),
    "input_size too small": Wrong(
        lambda: fc.grad.conv2d_input((2, 4, 2, 8), W, Y),
        ValueError,
        r"input_size is too small along spatial dimension 0",
    ),
    "grad_output of another shape": Wrong(
        lambda: fc.grad.conv2d_input(X.shape, W, Y[..., :5]),
        ValueError,
        r"grad_output must have the shape of the output, \(2, 6, 6, 6\), got \(2, 6, 6, 5\)",
    ),
    "grad_output of another shape, without a batch": Wrong(
        lambda: fc.grad.conv2d_input(X.shape[1:], W, Y[0, ..., :5]),
        ValueError,
        r"grad_output must have the shape of the output, \(6, 6, 6\), got \(6, 6, 5\)",
    ),
    "grad_output without the input's batch": Wrong(
        lambda: fc.grad.conv2d_weight(X, W.shape, Y[0]),
        ValueError,
        r"grad_output must have the shape of the output, \(2, 6, 6, 6\), got \(6, 6, 6\)",
    ),
    "grad_output of a transposed convolution, without a batch": Wrong(
        lambda: fc.grad.conv_transpose2d_input(Y.shape[1:], W, X[0, :3]),
        ValueError,
        r"grad_output must have the shape of the output, \(4, 8, 8\), got \(3, 8, 8\)",
    ),
    "grad_output of another type": Wrong(
        lambda: fc.grad.conv2d_weight(X, W.shape, Y.astype(float)),
        TypeError,
        r"grad_output must have the dtype of input",
    ),
    "weight of another type": Wrong(
        lambda: fc.grad.conv2d_input(X.shape, W.astype(float), Y),
        TypeError,
        r"weight must have the dtype of grad_output",
    ),
    "weight_size of other filters": Wrong(
        lambda: fc.grad.conv2d_weight(X, (5, 4, 3, 3), Y),
        ValueError,
        r"grad_output must have the shape .*\(2, 5, 6, 6\)",
    ),
    "weight_size of three": Wrong(
        lambda: fc.grad.conv2d_weight(X, (6, 4, 3), Y), ValueError, r"weight_size must have 4 entries"
    ),
    "weight_size empty": Wrong(
        lambda: fc.grad.conv2d_weight(X, (6, 4, 0, 3), Y), ValueError, r"weight_size must have no empty dimension"
    ),
    "out of another shape": Wrong(
        lambda: fc.grad.conv2d_weight(X, W.shape, Y, out=np.zeros((6, 4, 3, 2), "f4")),
        ValueError,
        r"out must have shape",
    ),
    "needs something else": Wrong(
        lambda: fc.grad.conv2d(X, W, Y, needs=["output"]), ValueError, r"needs must be a sequence of 'input'"
    ),
    "needs is a word": Wrong(lambda: fc.grad.conv2d(X, W, Y, needs="input"), ValueError, r"needs must be a sequence"),
    "needs is None": Wrong(lambda: fc.grad.conv2d(X, W, Y, needs=None), TypeError, r"needs must be a .* got None"),
    "needs an array": Wrong(lambda: fc.grad.conv2d(X, W, Y, needs=[B]), ValueError, r"needs must be a sequence"),
}

POOLING = {
    "integers": Wrong(lambda: fc.max_pool2d(X.astype(int), 2), TypeError, r"input must be float32 or float64"),
    "one dimension": Wrong(lambda: fc.max_pool2d(X[0, 0, 0], 2), ValueError, r"input must have 4 dimensions"),
    "kernel_size 0": Wrong(lambda: fc.max_pool2d(X, 0), ValueError, r"kernel_size must be at least 1, got 0"),
    "kernel_size of three": Wrong(
        lambda: fc.max_pool2d(X, (2, 2, 2)), ValueError, r"kernel_size must be .* got 3 values"
    ),
    "kernel_size None": Wrong(lambda: fc.max_pool2d(X, None), TypeError, r"kernel_size must be an integer"),
    "a window beyond the image": Wrong(lambda: fc.max_pool2d(X, 9), ValueError, r"input is too small along .* 0: 8"),
    "a huge window": Wrong(lambda: fc.max_pool2d(X, 300), ValueError, r"kernel_size must have at most 65536 cells"),
    "stride 0": Wrong(lambda: fc.max_pool2d(X, 2, 0), ValueError, r"stride must be at least 1"),
    "padding beyond half": Wrong(lambda: fc.max_pool2d(X, 2, 2, 2), ValueError, r"padding must be at most half"),
    "padding of words": Wrong(lambda: fc.max_pool2d(X, 2, 2, "same"), TypeError, r"padding must be an integer"),
    "dilation 0": Wrong(lambda: fc.max_pool2d(X, 2, 2, 0, 0), ValueError, r"dilation must be at least 1"),
    "ceil_mode of text": Wrong(
        lambda: fc.max_pool2d(X, 2, ceil_mode="no"), TypeError, r"ceil_mode must be True or False"
    ),
    "return_indices of text": Wrong(
        lambda: fc.max_pool2d(X, 2, return_indices="both"),
        ValueError,
        r"return_indices must be False, True or 'compact'",
    ),
    "out of another shape": Wrong(
        lambda: fc.max_pool2d(X, 2, out=np.zeros((2, 4, 4, 3), "f4")), ValueError, r"out must have shape \(2, 4, 4, 4\)"
    ),
    "return_indices of an array": Wrong(
        lambda: fc.max_pool2d(X, 2, return_indices=B), ValueError, r"return_indices must be False, .* got array"
    ),
    "count_include_pad of text": Wrong(
        lambda: fc.avg_pool2d(X, 2, count_include_pad="no"), TypeError, r"count_include_pad must be True .* got 'no'"
    ),
    "count_include_pad of an array": Wrong(
        lambda: fc.avg_pool2d(X, 2, count_include_pad=B), TypeError, r"count_include_pad must be True .* got array"
    ),
    "an algorithm of convolution": Wrong(
        lambda: fc.max_pool2d(X, 2, algorithm="im2col"), ValueError, r"algorithm must be one of .* got 'im2col'"
    ),
    "divisor 0": Wrong(lambda: fc.avg_pool2d(X, 2, divisor_override=0), ValueError, r"divisor_override must not be 0"),
    "average beyond half": Wrong(lambda: fc.avg_pool2d(X, 3, 1, 2), ValueError, r"padding must be at most half"),
    "filter_size 0": Wrong(lambda: fc.max_blur_pool2d(X, 2, 2, 0), ValueError, r"filter_size must be at least 1"),
    "a huge filter_size": Wrong(lambda: fc.max_blur_pool2d(X, 2, 2, 999), ValueError, r"filter_size must be at most"),
    "blur with stride 0": Wrong(lambda: fc.max_blur_pool2d(X, 2, 0), ValueError, r"stride must be at least 1"),
    "an algorithm of pooling, for the blur": Wrong(
        lambda: fc.max_blur_pool2d(X, 2, 2, algorithm="windows"), ValueError, r"algorithm must be one of .*'windows'"
    ),
    "average of another shape, without a batch": Wrong(
        lambda: fc.grad.avg_pool2d(X.shape[1:], POOLED[0, ..., :3], 2),
        ValueError,
        r"grad_output must have the shape of the output, \(4, 4, 4\), got \(4, 4, 3\)",
    ),
    "indices of floats": Wrong(
        lambda: fc.grad.max_pool2d(X.shape, WINNERS.astype("f4"), POOLED, 2),
        TypeError,
        r"indices must be .* got float32",
    ),
    "indices is a list": Wrong(
        lambda: fc.grad.max_pool2d(X.shape, [0], POOLED, 2), TypeError, r"indices must be .* got list"
    ),
    "indices of another shape": Wrong(
        lambda: fc.grad.max_pool2d(X.shape, WINNERS[..., :3], POOLED, 2), ValueError, r"indices must have the shape"
    ),
    "winners beyond the window": Wrong(
        lambda: fc.grad.max_pool2d(X.shape, WINNERS + 4, POOLED, 2), ValueError, r"indices must be below the 4 cells"
    ),
    "offsets beyond the plane": Wrong(
        lambda: fc.grad.max_pool2d(X.shape, OFFSETS + 64, POOLED, 2), ValueError, r"indices must be offsets within"
    ),
    "offsets of other windows": Wrong(
        lambda: fc.grad.max_pool2d(X.shape, OFFSETS[..., ::-1], POOLED, 2),
        ValueError,
        r"indices must be offsets within",
    ),
    "negative offsets": Wrong(
        lambda: fc.grad.max_pool2d(X.shape, OFFSETS - 64, POOLED, 2), ValueError, r"indices must be offsets within"
    ),
    "grad_output of another shape": Wrong(
        lambda: fc.grad.max_pool2d(X.shape, WINNERS, POOLED[:1], 2), ValueError, r"grad_output must have the shape"
    ),
    "input_size of other windows": Wrong(
        lambda: fc.grad.avg_pool2d((2, 4, 9, 10), POOLED, 2), ValueError, r"grad_output must have the shape"
    ),
}

SETTINGS = {
    "context of an unknown engine": Wrong(
        lambda: fc.config_context(engine="gpu").__enter__(), ValueError, r"engine must be one of .* got 'gpu'"
    ),
    "context of an unknown precision": Wrong(
        lambda: fc.config_context(precision=32).__enter__(), ValueError, r"precision must be one of .* got 32"
    ),
    "context of no threads": Wrong(
        lambda: fc.config_context(num_threads=0).__enter__(), ValueError, r"num_threads must be from 1 .* got 0"
    ),
    "no threads": Wrong(lambda: fc.set_num_threads(0), ValueError, r"n must be from 1 .* got 0"),
    "half a thread": Wrong(lambda: fc.set_num_threads(0.5), TypeError, r"n must be an integer, got 0\.5"),
    "a true thread": Wrong(lambda: fc.set_num_threads(True), TypeError, r"n must be an integer, got True"),
    "explain nothing": Wrong(lambda: fc.explain("conv4d"), ValueError, r"op must be one of .*conv2d.* got 'conv4d'"),
    "explain no gradient": Wrong(
        lambda: fc.explain("grad.max_pool2d", X.shape, 2), ValueError, r"op must be one of .* got 'grad.max_pool2d'"
    ),
    "explain a number": Wrong(lambda: fc.explain(4), ValueError, r"op must be one of .* got 4"),
    "explain a wrong algorithm": Wrong(
        lambda: fc.explain("conv2d", X, W, algorithm="foo"), ValueError, r"algorithm must be one of .* got 'foo'"
    ),
    "explain a wrong activation": Wrong(
        lambda: fc.explain("conv2d", X, W, activation="foo"), ValueError, r"activation must be one of .* got 'foo'"
    ),
    "explain arrays of two types": Wrong(
        lambda: fc.explain("conv2d", X, W.astype(float)), TypeError, r"weight must have the dtype of input, float32"
    ),
    "explain a division by 0": Wrong(
        lambda: fc.explain("avg_pool2d", X, 2, divisor_override=0), ValueError, r"divisor_override must not be 0"
    ),
    "explain a weight_size that is a number": Wrong(
        lambda: fc.explain("conv2d_weight", X, 5, X), TypeError, r"weight_size must be a sequence of integers, got 5"
    ),
    "explain an input_size that is a number": Wrong(
        lambda: fc.explain("conv2d_input", 5, W, X), TypeError, r"input_size must be a sequence of integers, got 5"
    ),
    "explain a wrong grad_output": Wrong(
        lambda: fc.explain("conv2d_weight", X, W.shape, Y[:1]), ValueError, r"grad_output must have the shape of"
    ),
    "explain a wrong call": Wrong(
        lambda: fc.explain("conv2d", X.shape, (6, 3, 3, 3)), ValueError, r"input must have 3 channels"
    ),
}

#: Calls that end in a cache's key, and the words that each of them takes.
WORDS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "conv2d": (lambda **words: fc.conv2d(X, W, **words), ("activation", "precision", "algorithm", "engine")),
    "conv_transpose2d": (
        lambda **words: fc.conv_transpose2d(Y, W, **words), ("activation", "precision", "algorithm", "engine")
    ),
    "max_pool2d": (lambda **words: fc.max_pool2d(X, 2, **words), ("ceil_mode", "algorithm", "engine")),
    "avg_pool2d": (lambda **words: fc.avg_pool2d(X, 2, **words), ("ceil_mode", "algorithm", "engine")),
    "max_blur_pool2d": (lambda **words: fc.max_blur_pool2d(X, 2, 2, **words), ("algorithm", "engine")),
    "conv2d_input": (
        lambda **words: fc.grad.conv2d_input(X.shape, W, Y, **words), ("precision", "algorithm", "engine")
    ),
    "conv2d_weight": (
        lambda **words: fc.grad.conv2d_weight(X, W.shape, Y, **words), ("precision", "algorithm", "engine")
    ),
    "conv_transpose2d_weight": (
        lambda **words: fc.grad.conv_transpose2d_weight(Y, W.shape, X, **words), ("precision", "algorithm", "engine")
    ),
    "grad.max_pool2d": (
        lambda **words: fc.grad.max_pool2d(X.shape, WINNERS, POOLED, 2, **words), ("ceil_mode", "algorithm", "engine")
    ),
    "grad.avg_pool2d": (
        lambda **words: fc.grad.avg_pool2d(X.shape, POOLED, 2, **words), ("ceil_mode", "algorithm", "engine")
    ),
    "explain": (
        lambda **words: fc.explain("conv2d", X, W, **words), ("activation", "precision", "algorithm", "engine")
    ),
}  # fmt: skip

WORDLESS = {
    f"{name} with {word} of type {type(value).__name__}": Wrong(
        partial(call, **{word: value}), TypeError, rf"^{word} must be (a word or None|True or False), got "
    )
    for name, (call, words) in WORDS.items()
    for word in words
    for value in ([], B)
} | {
    f"{name} with engine {value!r}": Wrong(
        partial(call, engine=value), ValueError, rf"engine must be one of .* or None, got {value!r}"
    )
    for name, (call, _) in WORDS.items()
    for value in ("", 0)
}

TABLE = {
    f"{title}: {name}": wrong
    for title, table in {
        "convolution": CONVOLUTION,
        "transposed": TRANSPOSED,
        "gradient": GRADIENTS,
        "pooling": POOLING,
        "settings": SETTINGS,
        "words": WORDLESS,
    }.items()
    for name, wrong in table.items()
}


@pytest.mark.parametrize("name", TABLE)
def test_a_wrong_call_says_what_is_wrong(name: str) -> None:
    call, error, message = TABLE[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error, "a subclass says something else than that an argument is wrong"
    assert re.search(message, str(caught.value)), f"{caught.value}"


def test_a_wrong_call_changes_nothing() -> None:
    """After everything above: the shared arrays, and an ``out`` whose call fails late."""
    before = fc.get_config()
    for array in (X, W, B, Y, POOLED):
        assert (array == 1).all()
    assert (WINNERS == 0).all()
    out = np.full(Y.shape, 7, np.float32)
    late: dict[str, Any] = {"algorithm": "fft", "engine": "cuda", "activation": "tanh", "precision": "low"}
    for argument, value in late.items():
        with pytest.raises(ValueError, match=argument):
            fc.conv2d(X, W, out=out, **{argument: value})
    with pytest.raises(ValueError, match="out must have shape"):
        fc.conv2d(X, W, stride=2, out=out)
    assert (out == 7).all()
    assert fc.get_config() == before


def test_an_array_may_be_any_subclass_that_is_one(rng: np.random.Generator) -> None:
    x = rng.standard_normal((1, 1, 5, 5))
    mapped = x.view(np.memmap)
    np.testing.assert_array_equal(fc.conv2d(mapped, np.ones((1, 1, 2, 2))), fc.conv2d(x, np.ones((1, 1, 2, 2))))


def test_numpy_integers_are_integers() -> None:
    two = np.int64(2)
    y = fc.conv2d(X, W, stride=two, padding=[(np.int8(1), two), 0], dilation=(np.uint8(1), 1), groups=np.intp(1))
    assert y.shape == (2, 6, 5, 3)
