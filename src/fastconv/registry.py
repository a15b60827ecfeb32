"""The ordered lists of algorithms: fastest first, the reference last; the first "yes" wins.

A row is a name and three facts: algorithm, engine, ``supports(op, dims, precision)``. An empty answer means yes, any
other is the reason for a no. A reason that starts with "slower" only keeps a row from being chosen: asked for by name,
it runs.

Of the native rows that one says yes which takes least time by the model of ``costs``.

To add an algorithm: one file per engine in ``kernels/`` and one row here. Tests and benchmarks loop over these lists.
(oneDNN arranges its implementations like this, in ``cpu_convolution_list.cpp``.)
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from . import costs
from .dims import ConvDims, PoolDims
from .kernels import winograd
from .kernels.exchange import exchanged, weight_grad
from .runtime import ENGINES, isa, why_missing

Kernel = Callable[..., None]
Dims = ConvDims | PoolDims


class Row(NamedTuple):
    """One algorithm of one engine."""

    algorithm: str
    engine: str
    supports: Callable[..., str]

    def load(self, op: str) -> Kernel:
        """Return the kernel of this row for ``op``, importing its module."""
        folder = {"cython": "native", "numba": "jit", "numpy": "reference"}[self.engine]
        family = "conv" if op.startswith("conv") else "max_pool"
        module = (
            "naive" if self.algorithm == "naive" else family if family == "max_pool" else f"{family}_{self.algorithm}"
        )
        kernel: Kernel = getattr(importlib.import_module(f"fastconv.kernels.{folder}.{module}"), op)
        return kernel

    def kernel(self, op: str, dims: Dims) -> Kernel:
        """Return the kernel of this row for ``op`` and these dims, as ``seen`` says."""
        kernel, other = self.load(op), seen(self.engine, op, dims)
        return kernel if other is dims else partial(weight_grad, kernel, other)

    def why_not(self, op: str, dims: Dims, precision: str = "highest") -> str:
        """Say why this row isn't the choice, by the problem as ``seen``; empty if it is."""
        return self.supports(op, seen(self.engine, op, dims), precision)

    def can(self, op: str, dims: Dims) -> bool:
        """Whether this row computes ``op`` when asked for by name, fastest or not."""
        reason = self.why_not(op, dims)
        return not reason or reason.startswith("slower")


class Verdict(NamedTuple):
    """What ``explain`` says of one row: the reason for a no, empty for a yes."""

    row: Row
    reason: str


def seen(engine: str, op: str, dims: Dims) -> Dims:
    """Return the problem as an engine computes it: with image and gradients exchanged where there are few filters.

    That is for the gradient of the weights. (Measured on all instruction sets.)
    """
    if engine != "cython" or op != "conv_weight_grad" or not isinstance(dims, ConvDims):
        return dims
    filters, channels = dims.out_channels, dims.in_channels
    if isa() == "scalar":
        few = filters <= 2 and dims.taps > 1
    elif filters <= 4:
        few = True
    else:
        few = filters < 16 and channels >= 4 * filters and dims.taps > 1
        if isa() == "amx":  # whose tile multiplies pieces of longer sums, or of more pixels' patches
            few = few and dims.taps <= 9 and math.prod(dims.output_size) >= 196
    return (exchanged(dims) or dims) if few and channels >= 2 * filters else dims


def _always(op: str, dims: Dims, precision: str = "highest") -> str:
    return ""


def _native(algorithm: str, only: str = "") -> Callable[..., str]:
    """Return what a native row says: yes, if by the model (``costs``) no other of them takes less time."""

    def reason(op: str, dims: ConvDims, precision: str = "highest") -> str:
        machine = costs.Machine("scalar" if isa() == "none" else isa(), precision, dims.channels_last)
        times = costs.estimate(op, dims, machine)
        if algorithm not in times:
            return only
        best = min(times, key=lambda name: times[name])
        more = times[algorithm] / times[best] if times[best] else 1.0
        return f"slower than {best}: about {more:.2f} times as long" if more > 1 else ""

    return reason


def _direct_numba(op: str, dims: ConvDims, precision: str = "highest") -> str:
    if op != "conv_forward" or dims.depthwise:
        return ""
    pixels, weights = math.prod(dims.output_size), dims.reduction * dims.group_out_channels
    if dims.group_out_channels >= 2 * dims.reduction:
        return (
            f"slower than im2col, which leaves the output's layout: {dims.group_out_channels} filters make more of it "
            f"than there are patches, of {dims.reduction} elements"
        )
    if dims.taps == 1 and weights <= 2**15:
        return f"slower than im2col, which leaves the output's layout, for {weights} weights of 1x1 filters"
    if dims.taps > 1 and pixels <= 32 and weights > 2**18:
        return f"slower than im2col, which reads weights in place, for {weights} weights and {pixels} pixels"
    return ""


def _im2col_numba(op: str, dims: ConvDims, precision: str = "highest") -> str:
    return "slower than direct: depthwise has no channels to reduce over" if dims.depthwise else ""


def _planar_numba(op: str, dims: ConvDims, precision: str = "highest") -> str:
    if op == "conv_forward" and dims.stride[1:] != (1, 1):
        return "only for stride 1 along height and width"
    if op == "conv_weight_grad":
        return "has no gradient of the weights"
    if dims.depthwise:
        return "slower than direct for depthwise convolution"
    filters = dims.group_in_channels if op == "conv_input_grad" else dims.group_out_channels
    return "" if filters <= 6 else f"slower than direct, which has {filters} filters to fill its lanes"


def _winograd_numba(op: str, dims: ConvDims, precision: str = "highest") -> str:
    if any(taps > 1 and step > 1 for taps, step in zip(dims.kernel_size[1:], dims.dilation[1:], strict=True)):
        return "only for dilation 1 along height and width"
    if op != "conv_input_grad" and dims.stride[1:] != (1, 1):
        return "only for stride 1 along height and width"
    if dims.kernel_size[1:] == (1, 1):
        return "only for filters of several taps along height or width"
    if op == "conv_weight_grad":
        tiles, plain = [winograd.choose_for_weights(dims)], [dims.batch * winograd.plain_cost(dims)]
    else:
        parts = [part.dims for part in dims.input_grad_parts() if part.dims] if op == "conv_input_grad" else [dims]
        tiles, plain = [winograd.choose(part) for part in parts], [winograd.plain_cost(part) for part in parts]
    tile = next(filter(None, tiles), None)
    if tile is None:
        return "not for such filters, strides or so short sums: less exact than plain sums there, or no faster"
    # Measured where it meets direct: transforms take longer, and few channels leave rows of the register tile empty.
    gain = 1.1 + 1 / dims.group_in_channels if op == "conv_weight_grad" else 1.35
    if gain * sum(t.cost if t else cost for t, cost in zip(tiles, plain, strict=True)) > sum(plain):
        return f"slower: the transforms take what tiles of {tile.rows.outputs}x{tile.columns.outputs} save"
    return ""


CONVOLUTIONS = (
    Row("winograd", "cython", _native("winograd", "only for filters of several taps and sums long enough to be exact")),
    Row("planar", "cython", _native("planar", "has the gradient of the weights for sums of few products only")),
    Row("direct", "cython", _native("direct")),
    Row("im2col", "cython", _native("im2col")),
    Row("winograd", "numba", _winograd_numba),
    Row("planar", "numba", _planar_numba),
    Row("direct", "numba", _direct_numba),
    Row("im2col", "numba", _im2col_numba),
    Row("im2col", "numpy", _always),
    Row("naive", "numpy", _always),
)

POOLINGS = (
    Row("direct", "cython", _always),
    Row("direct", "numba", _always),
    Row("windows", "numpy", _always),
    Row("naive", "numpy", _always),
)

ROWS: dict[str, tuple[Row, ...]] = {
    "conv_forward": CONVOLUTIONS,
    "conv_input_grad": CONVOLUTIONS,
    "conv_weight_grad": CONVOLUTIONS,
    "max_pool_forward": POOLINGS,
    "max_pool_backward": POOLINGS,
}


def verdicts(
    op: str, dims: Dims, engine: str | None = None, algorithm: str | None = None, precision: str = "highest"
) -> list[Verdict]:
    """Return every row of ``op`` with its yes (an empty reason) or its reason for no, in order."""
    return [Verdict(row, _reason(row, op, dims, engine, algorithm, precision)) for row in ROWS[op]]


def _reason(row: Row, op: str, dims: Dims, engine: str | None, algorithm: str | None, precision: str) -> str:
    if engine is not None and row.engine != engine:
        return f"engine {engine!r} was asked for"
    if algorithm is not None and row.algorithm != algorithm:
        return f"algorithm {algorithm!r} was asked for"
    if missing := why_missing(row.engine):
        return missing
    return "" if algorithm is not None and row.can(op, dims) else row.why_not(op, dims, precision)


def check_algorithm(op: str, algorithm: object) -> str | None:
    """Return ``algorithm`` if it is None or the name of a row of ``op``; ValueError says which there are."""
    names = sorted({row.algorithm for row in ROWS[op]})
    if algorithm is None or (isinstance(algorithm, str) and algorithm in names):
        return algorithm
    raise ValueError(f"algorithm must be one of {', '.join(map(repr, names))} or None, got {algorithm!r}")


def select(
    op: str, dims: Dims, engine: str | None = None, algorithm: str | None = None, precision: str = "highest"
) -> Row:
    """Return the first row that says yes.

    Raises
    ------
    ValueError
        If no row does: an unknown algorithm, or one that the engine lacks. The message lists what there is.
    """
    found = verdicts(op, dims, engine, algorithm, precision)
    for row, reason in found:
        if not reason:
            return row
    check_algorithm(op, algorithm)
    there = ", ".join(f"{row.engine}/{row.algorithm}" for row in ROWS[op] if not why_missing(row.engine))
    raise ValueError(
        f"algorithm {algorithm!r} with engine {engine!r} does not exist for {op}; there are {there} "
        f"({'; '.join(f'{v.row.engine}/{v.row.algorithm}: {v.reason}' for v in found)})"
    )


@cache
def elementwise(op: str, engine: str | None) -> Kernel:
    """Return the kernel of an operation on plain arrays, number by number: native, or NumPy's for all other engines."""
    native = engine in (None, "cython") and not why_missing("cython")
    module = importlib.import_module(f"fastconv.kernels.{'native' if native else 'reference'}.elementwise")
    kernel: Kernel = getattr(module, op)
    return kernel


def available(op: str, engines: tuple[str, ...] = ENGINES) -> list[Row]:
    """Return the rows of ``op`` whose engine works here and is one of ``engines``."""
    return [row for row in ROWS[op] if row.engine in engines and not why_missing(row.engine)]
