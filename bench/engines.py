"""Who is measured: every row of the registry that can compute an operation of a layer, through the public functions."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import fastconv as fc
from fastconv import registry, runtime
from fastconv.dims import ConvDims, channels_last

from .layers import ConvLayer, Layer, PoolLayer, slice_layer

Array = npt.NDArray[Any]

#: Output elements in the slice of a layer that naive is timed on, which takes it some microseconds for each.
NAIVE_OUTPUTS = 8192


class Problem(NamedTuple):
    """The arrays of one layer, channels first."""

    layer: Layer
    input: Array  #: (N, C, *spatial)
    weight: Array  #: (K, C/groups, *kernel); empty for a pooling
    grad_output: Array  #: (N, K, *spatial)

    @classmethod
    def random(cls, layer: Layer) -> Problem:
        """Return float32 normal numbers, the same ones each time."""
        rng = np.random.default_rng(0)
        weight_size = layer.weight_size if isinstance(layer, ConvLayer) else (0,)
        sizes = (layer.input_size, weight_size, layer.output_size)
        return cls(layer, *(rng.standard_normal(size, np.float32) for size in sizes))

    def astype(self, dtype: npt.DTypeLike) -> Problem:
        """Return the same numbers in another type."""
        return Problem(self.layer, *(array.astype(dtype) for array in self[1:]))


class Candidate(NamedTuple):
    """One implementation, ready to compute one operation of a problem."""

    name: str
    problem: Problem  #: what it computes: that of the whole layer, or of a slice
    call: Callable[[], Any]  #: what is timed
    to_numpy: Callable[[Any], Array]  #: makes a channels-first NumPy array of its result
    peer: bool = False  #: whether it is another library's
    chosen: bool = False  #: whether fastconv takes it when nobody names an algorithm


def images_to(layout: str, array: Array) -> Array:
    """Return a channels-first batch of images as a contiguous array in ``layout``."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1)) if layout == "NHWC" else array


def weight_to(layout: str, array: Array) -> Array:
    """Return OIHW weights as a contiguous array in the form that goes with ``layout``: HWIO with NHWC."""
    return np.ascontiguousarray(np.moveaxis(array, (0, 1), (-1, -2))) if layout == "NHWC" else array


def _from_layout(layout: str, op: str, array: Array) -> Array:
    """Return a result of ``op`` channels first (OIHW for weights)."""
    if layout == "NCHW":
        return array
    return np.moveaxis(array, (-1, -2), (0, 1)) if op == "weight" else np.moveaxis(array, -1, 1)


def public_call(problem: Problem, op: str, layout: str = "NCHW", **how: str) -> Callable[[], Array]:
    """Return the call of fastconv's public function for ``op``; ``how`` is ``engine``, ``algorithm`` ..."""
    call = _conv_call if isinstance(problem.layer, ConvLayer) else _pool_call
    return call(problem, op, layout, how)


def _conv_call(problem: Problem, op: str, layout: str, how: dict[str, str]) -> Callable[[], Array]:
    layer = problem.layer
    assert isinstance(layer, ConvLayer)
    name = f"conv{len(layer.input_size) - 2}d"
    input, grad_output = images_to(layout, problem.input), images_to(layout, problem.grad_output)
    weight = weight_to(layout, problem.weight)
    options = {
        "stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups,
        "layout": layout, **how,
    }  # fmt: skip
    if op == "forward":
        return partial(getattr(fc, name), input, weight, **options)
    if op == "input":
        return partial(getattr(fc.grad, f"{name}_input"), input.shape, weight, grad_output, **options)
    return partial(getattr(fc.grad, f"{name}_weight"), input, weight.shape, grad_output, **options)


def _pool_call(problem: Problem, op: str, layout: str, how: dict[str, str]) -> Callable[[], Array]:
    layer = problem.layer
    assert isinstance(layer, PoolLayer)
    name = f"max_pool{len(layer.input_size) - 2}d"
    input, grad_output = images_to(layout, problem.input), images_to(layout, problem.grad_output)
    options = {"stride": layer.stride, "padding": layer.padding, "layout": layout, **how}
    forward = partial(getattr(fc, name), input, layer.kernel, **options)
    if op == "forward":
        return forward
    _, winners = forward(return_indices="compact")
    return partial(getattr(fc.grad, name), input.shape, winners, grad_output, layer.kernel, **options)


def reference(problem: Problem, op: str) -> Array:
    """Return the result of ``op`` in float64, by plain NumPy."""
    return public_call(problem.astype(np.float64), op, engine="numpy")()


def candidates(
    problem: Problem, op: str, layout: str, engines: Container[str], algorithms: Container[str]
) -> list[Candidate]:
    """Return the registry's rows for ``op`` that support the layer and are wanted; numpy's are, as baselines."""
    kind = problem.layer.ops[op]
    return [
        candidate(row, problem, op, layout)
        for row in registry.available(kind)
        if (row.engine == "numpy" or (row.engine in engines and row.algorithm in algorithms))
        and not unsupported(row, kind, problem.layer)
    ]


def candidate(row: registry.Row, problem: Problem, op: str, layout: str) -> Candidate:
    """Return a row of the registry, ready to compute ``op``: of the problem or, if it is naive, of a slice of it."""
    config = runtime.get_config()
    dims = problem.layer.dims
    if isinstance(dims, ConvDims):
        dims = dims._replace(channels_last=channels_last(layout))
    chosen = row == registry.select(problem.layer.ops[op], dims, config.engine, precision=config.precision)
    if row.algorithm == "naive" and (piece := slice_layer(problem.layer, NAIVE_OUTPUTS)) != problem.layer:
        problem = Problem.random(piece)
    call = public_call(problem, op, layout, engine=row.engine, algorithm=row.algorithm)
    return Candidate(f"{row.engine}/{row.algorithm}", problem, call, partial(_from_layout, layout, op), chosen=chosen)


def unsupported(row: registry.Row, kind: str, layer: Layer) -> str:
    """Return why the row can't compute the layer even when it is asked for by name, or an empty string."""
    verdicts = registry.verdicts(kind, layer.dims, row.engine, row.algorithm)
    return next(verdict.reason for verdict in verdicts if verdict.row == row)
