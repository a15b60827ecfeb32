"""What each native algorithm takes for a problem, so that the fastest can be chosen: a model of its parts.

    nanoseconds = sum over the parts of an algorithm of  how many there are  x  what one of them takes

How many there are follows from the shapes, as the drivers in ``kernels/native`` have it: products, those of empty lanes
among them, numbers that are packed, sums that are stored. They are below, an algorithm a function. What one takes is
measured: ``python -m fastconv.bench.choice`` times all algorithms on layers drawn at random and fits the times of the
parts, for each instruction set, precision and layout, into ``costs.json``.

An algorithm that multiplies otherwise for other shapes has a name for each way of it, "direct digits" and "direct
pieces", with times of its own.

=============  =====================================================================================================
product        a multiplication and an addition, whether or not the lane is needed
narrow         one in a tile of a single vector, which loads more for each
step           one of all of a tile's products at once: those of a few wait for each other
cell           a number of the image, padding included, as it is copied; ``cell_row`` a row of them
strided, far   one whose neighbours are two apart in the image, or further
packed         one, with those that channels are filled up by
patch          a number of a patch, or of a column, which is one backwards; ``patch_row`` a row of them
line, weight   a vector of packed weights; a number of the weights
transform      a number that goes into products of Winograd's, ``tap`` if of the weights, ``back`` if out of them
plain          a product where Winograd has no tile, in some phases of a stride
gradient       a number of the gradients, as often as it is loaded or transformed; ``apart`` one of so many filters that
               L1 lacks room for the next lines of all
sum            a vector of sums, or, of the weights, a number; ``sum_row`` one for each row that it runs over
number, row    a number of the result, a row of it
scattered      one whose neighbours are of other phases; ``stored`` as often as its sum is; ``conflict`` if planes are
               whole pages; ``alone`` if a group has a single channel or filter
plane, filter  a channel of the image, or a plane of depthwise; a channel of the result
image, group   an image of a group; a group (of an image, but in the gradient of the weights); ``phase`` of the stride
beyond         a number of the arrays that L2 has no room for
call           the call itself
=============  =====================================================================================================

The bits of an image must not depend on the batch, so that the choice doesn't either: any batch counts as two images,
which is good for one and for many; but in the gradient of the weights, which is a sum over the batch anyway.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from .dims import ConvDims
from .kernels import winograd
from .kernels.few_pixels import has_few_pixels, other_side

Parts = dict[str, float]
Times = Mapping[str, Mapping[str, Mapping[str, float]]]  #: [operation][algorithm and how it multiplies][part]

LANES = {"scalar": 4, "avx2": 8, "avx512": 16, "amx": 16}  #: numbers of a vector
VECTOR = 16  #: channels that are packed side by side
MOST_TERMS = 1024  #: of which planar keeps sums, in the gradient of the weights
IMAGES = 2  #: that any batch counts as
CACHED = 2**18  #: numbers of image, weights and result that L2 holds
PLANE_ROWS, PLANES = 7, 2**13  #: rows of planes that planar has in L1, and numbers of them, ...
SUMMED = 384  #: ... and the terms that it sums up at once
SHORT_SUM = 24  #: products that direct sums up of numbers, not of pieces, ...
READY_PRODUCTS = 64  #: ... and how many of a number, about, that lies ready for them
TURN = 14  #: products of im2col in the time of turning a number, in the gradient of 1x1 weights
TOGETHER = 32  #: pixels of small images whose weights' gradients are added up at once
READ_ALONG = 256  #: filters whose gradients are read side by side, from L1
PIECES, DIGITS = 32, 64  #: numbers that AMX's tile sums up at once, if it multiplies pieces or digits of them


class Machine(NamedTuple):
    """What the times of the parts depend on."""

    isa: str
    precision: str = "highest"
    channels_last: bool = False

    def __str__(self) -> str:
        """Return its name in ``costs.json``."""
        precision = f" {self.precision}" if self.isa == "amx" and self.precision != "highest" else ""
        return f"{self.isa}{precision} {'channels-last' if self.channels_last else 'channels-first'}"

    @property
    def lanes(self) -> int:
        return LANES[self.isa]


class Problem(NamedTuple):
    """The forward pass, or the gradient of the input as the forward pass that it is: from images to results."""

    op: str
    dims: ConvDims
    machine: Machine
    images: int  #: of the batch, times the groups
    summed: int  #: channels, of a group, that are summed
    results: int  #: channels, of a group, of the result
    taps: float  #: that a result sees: of all taps, those of its phase of the stride
    phases: int
    cells: int  #: of a channel that is read, padding included
    rows: int  #: of these
    made: int  #: numbers of a channel of the result
    made_rows: int  #: of neighbours: with a stride, each phase of a row is one
    columns: int  #: of such a row
    step: int  #: from cell to cell of neighbours: of what is read, or, in the gradient, of what is stored

    @property
    def wide(self) -> int:
        """Numbers of a channel of the result, rows of it filled up to whole vectors."""
        return self.made_rows * _up(self.columns, self.machine.lanes)

    @property
    def lanes(self) -> int:
        """Results of a pixel, filled up to whole vectors."""
        return _up(self.results, self.machine.lanes)

    @property
    def weights(self) -> int:
        return self.dims.groups * self.dims.reduction * self.dims.group_out_channels


def _up(count: float, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


def _problem(op: str, dims: ConvDims, machine: Machine, images: int) -> Problem:
    channels, filters = dims.group_in_channels, dims.group_out_channels
    images *= dims.groups
    if op == "conv_forward":
        sizes = [sum(size) for size in zip(dims.input_size, dims.pad_before, dims.pad_after, strict=True)]
        made, rows = math.prod(dims.output_size), math.prod(dims.output_size[:2])
        return Problem(
            op, dims, machine, images, channels, filters, dims.taps, 1, math.prod(sizes), sizes[0] * sizes[1], made,
            rows, dims.output_size[2], dims.stride[2],
        )  # fmt: skip
    halo = [2 * ((taps - 1) // step) for taps, step in zip(dims.kernel_size, dims.stride, strict=True)]
    sizes = [size + more for size, more in zip(dims.output_size, halo, strict=True)]
    phases, step = math.prod(dims.stride), dims.stride[2]
    return Problem(
        op, dims, machine, images, filters, channels, dims.taps / phases, phases, math.prod(sizes), sizes[0] * sizes[1],
        math.prod(dims.input_size), math.prod(dims.input_size[:2]) * step, math.ceil(dims.input_size[2] / step), step,
    )  # fmt: skip


# How numbers are multiplied -------------------------------------------------------------------------------------------


def _products(machine: Machine) -> int:
    """Return how many products of pieces AMX makes of one of numbers."""
    return {"highest": 6, "high": 3, "medium": 1}[machine.precision]


def _pays(machine: Machine, filled: float, products: int = 0) -> bool:
    """Whether products of pieces, so many times as are needed, take less time than those of numbers."""
    return machine.isa == "amx" and (products or _products(machine)) * filled <= 13


def _sums_digits(machine: Machine, summed: int, terms: float) -> bool:
    """Whether sums are long enough for digits to be as exact."""
    return machine.isa == "amx" and machine.precision == "highest" and summed >= 40 and terms >= 200


# Forward and gradient of the input ------------------------------------------------------------------------------------


def _direct(p: Problem) -> tuple[str, Parts]:
    if _is_depthwise(p):
        return _depthwise("direct", p)
    if p.dims.depthwise and not p.dims.channels_last:
        return "direct", {}  # it leaves them to planar
    how, depth = _how_direct(p)
    cells, step = _seen(p)
    if not how and _lies_ready(p):
        how = " in place"
    terms = _up(p.dims.reduction, depth) if how.startswith(" patches") else _up(p.summed, depth) * p.taps
    products, packed = p.images * p.lanes * p.made * terms, p.dims.groups * p.summed * p.dims.taps
    return "direct" + how, {
        "product": products if p.results > p.machine.lanes else 0,
        "narrow": products if p.results <= p.machine.lanes else 0,
        "step": p.images * math.ceil(p.results / (4 * p.machine.lanes)) * _up(p.made / p.phases, 6) * p.phases * terms,
        "cell": p.images * _up(p.summed, depth) * cells,
        "strided": p.images * _up(p.summed, depth) * cells if p.op == "conv_forward" and step > 1 else 0,
        "line": packed * p.lanes / p.machine.lanes,
        "sum": p.images * p.lanes / p.machine.lanes * p.made,
        "number": p.images * p.results * p.made,
        "row": p.images * p.results * p.made_rows,
        "scattered": p.images * p.results * p.made if p.phases > 1 else 0,
        "alone": p.images * p.results * p.made if p.dims.groups > 1 and min(p.summed, p.results) == 1 else 0,
        "phase": p.dims.groups * p.phases,
        "group": p.images,
        "call": 1,
    }


def _lies_ready(p: Problem) -> bool:
    """Whether direct reads a channels-last image where it is: no tap sees padding."""
    return p.machine.channels_last and p.phases == 1 and p.cells == math.prod(_image_size(p))


def _image_size(p: Problem) -> tuple[int, ...]:
    return p.dims.input_size if p.op == "conv_forward" else p.dims.output_size


def _seen(p: Problem) -> tuple[int, int]:
    """Return the cells of a channel that direct reads, and how far apart they are in a row.

    Forward, an axis along which filters have one tap, and no padding, has those alone that pixels see.
    """
    d, last = p.dims, p.machine.channels_last
    if p.op != "conv_forward":
        return p.cells, p.step
    pads = [before + after for before, after in zip(d.pad_before, d.pad_after, strict=True)]
    skips = [d.kernel_size[axis] == 1 and pads[axis] == 0 and (axis < 2 or last) for axis in range(3)]
    sizes = [d.output_size[axis] if skips[axis] else d.input_size[axis] + pads[axis] for axis in range(3)]
    return math.prod(sizes), 1 if skips[2] else p.step


def _how_direct(p: Problem) -> tuple[str, int]:
    """Return how direct multiplies, and up to a multiple of what it fills channels, or patches."""
    pixels, patch = p.made / p.phases, p.dims.reduction
    if p.machine.isa != "amx" or pixels < VECTOR:
        return "", 1
    apart = math.prod(step for step, taps in zip(p.dims.stride[1:], p.dims.kernel_size[1:], strict=True) if taps > 1)
    if _lies_ready(p) and p.results * (p.summed * p.dims.taps - SHORT_SUM) <= READY_PRODUCTS * p.summed * apart:
        return "", 1
    if p.op == "conv_forward" and p.summed <= 8 and p.dims.dilation[2] == 1 and patch >= 64:
        if _sums_digits(p.machine, patch, patch) and p.results * p.dims.kernel_size[2] * p.summed >= 640:
            return " patches digits", DIGITS
        if p.results >= 48 and _pays(p.machine, _up(patch, PIECES) / patch):
            return " patches", PIECES
    if _sums_digits(p.machine, p.summed, p.summed * p.taps) and p.dims.taps <= 400:
        return " digits", DIGITS
    filled = (1 + 40 / pixels) * _up(p.summed, PIECES) / p.summed
    return (" pieces", PIECES) if p.summed >= VECTOR and _pays(p.machine, filled) else ("", 1)


def _is_depthwise(p: Problem) -> bool:
    """Whether each result is a sum of one channel only: not in the gradient, if several filters see a channel."""
    return p.dims.depthwise and p.summed == 1


def _depthwise(algorithm: str, p: Problem) -> tuple[str, Parts]:
    """Rows of pixels are the lanes, seven at a time; direct has channels there instead, if rows are short."""
    filters = p.images * p.dims.group_out_channels
    short = 0 if p.op == "conv_input_grad" else 8
    if max(p.dims.stride) == 1:
        short = p.machine.lanes // 2
    if algorithm == "direct" and (p.columns <= short or p.dims.channels_last):
        lanes = p.images // p.dims.groups * _up(p.dims.groups, p.machine.lanes) * p.dims.group_out_channels
        return f"direct channels{' several' if p.dims.group_out_channels > 1 else ''}", {
            "product": lanes * p.made * p.taps,
            "cell": lanes * p.cells,
            "number": filters * p.made,
            "row": filters * p.made_rows,
            "weight": filters * p.dims.taps,
            "call": 1,
        }
    return f"{algorithm} depthwise", {
        "product": filters * _up(p.made_rows, 7) * _up(p.columns, p.machine.lanes) * p.taps,
        "cell": filters * p.cells,
        "strided": filters * max(p.cells, p.made) if p.step > 1 else 0,
        "number": filters * p.made,
        "row": filters * p.made_rows,
        "weight": filters * p.dims.taps,
        "plane": filters,
        "call": 1,
    }


def _planar(p: Problem) -> tuple[str, Parts]:
    if _is_depthwise(p):
        return _depthwise("planar", p)
    terms, cells, numbers = p.summed * p.taps, p.images * p.summed * p.cells, p.images * p.results * p.made
    tiles = math.ceil(p.results / 8) * p.made_rows * math.ceil(p.columns / (3 * p.machine.lanes))
    parts: Parts = {
        "product": p.images * _up(p.results, 4) * p.wide * terms,
        "step": p.images * tiles * terms,
        "cell": cells,
        "cell_row": p.images * p.summed * p.rows,
        "weight": p.weights,
        "number": numbers,
        "sum": p.images * p.results * p.wide / p.machine.lanes,
        "row": p.images * p.results * p.made_rows,
        "plane": p.images * p.summed,
        "filter": p.images * p.results,
        "stored": numbers * (math.ceil(p.summed / _planes_together(p)) - 1),  # else sums go to memory in between
        "group": p.images,
        "call": 1,
    }
    if p.phases > 1:  # there, sums of few channels do; planes of whole pages share few sets of L1
        stored = numbers * math.ceil(p.summed / 16)
        pages = math.prod(p.dims.input_size) % 1024 == 0
        few = " single" if p.results == 1 else " few" if p.results <= 4 else ""
        parts |= {"stored": stored, "conflict": stored if pages else 0, "far": numbers if p.step > 2 else 0}
        if p.results == 1:  # a tile is a column of seven vectors of a phase
            rows = math.ceil(p.dims.input_size[1] / p.dims.stride[1])
            parts["product"] = p.images * p.wide * _up(rows, 7) / rows * terms
        return f"planar phases{few}", {**parts, "phase": p.dims.groups * p.phases}
    parts |= {"strided": cells if p.step == 2 else 0, "far": cells if p.step > 2 else 0}
    if p.results == 1:  # a tile is a column of seven vectors
        tall = _up(p.made_rows, 7) * _up(p.columns, p.machine.lanes)
        return "planar single", {**parts, "product": p.images * tall * terms}
    row = _up(p.summed * p.dims.kernel_size[0] * p.dims.kernel_size[2], 2) * p.dims.kernel_size[1]
    filled = _up(row, PIECES) / terms * _up(p.results, VECTOR) / p.results * _up(p.columns, VECTOR) / p.columns
    if p.summed <= 4 and terms >= 49 and p.dims.dilation[1] == 1 and _pays(p.machine, filled):
        return "planar pieces", {**parts, "product": p.images * _up(p.results, 16) * p.wide * _up(terms, PIECES)}
    return f"planar{' few' if p.results <= 4 else ''}", parts


def _planes_together(p: Problem) -> int:
    """Return the channels that planar sums up at once, without phases: L1 has what some rows of results see of them."""
    d, seen = p.dims, 1
    for axis, size in enumerate(d.output_size if p.op == "conv_forward" else d.input_size):
        size = min(size, (1, PLANE_ROWS, size)[axis])
        seen *= (size - 1) * d.stride[axis] + d.dilation[axis] * (d.kernel_size[axis] - 1) + 1
    return max(1, min(p.summed, max(4, min(SUMMED // d.taps, PLANES // seen))))


def _im2col(p: Problem) -> tuple[str, Parts]:
    d = p.dims
    pixels, lanes = math.prod(d.output_size), p.machine.lanes
    parts: Parts = {"number": p.images * p.results * p.made, "weight": p.weights, "group": p.images, "call": 1}
    if has_few_pixels(p.op, d):
        d = other_side(d) or d
        patches = p.images * d.reduction * pixels
        rows = p.images * d.group_in_channels * pixels * d.kernel_size[0] * d.kernel_size[1]
        return "im2col few", {**parts, "product": patches * d.group_out_channels, "patch": patches, "patch_row": rows}
    filled = _up(pixels, lanes)
    if d.depthwise:
        return "im2col depthwise", {
            **parts,
            "product": p.images * d.group_out_channels * d.taps * filled,
            "patch": p.images * d.taps * filled * (p.results if p.op == "conv_input_grad" else 1),
            "patch_row": p.images * d.taps * p.made_rows,
        }
    if p.op == "conv_input_grad" and _by_columns(d):
        how, depth = _how_columns(p, pixels)
        columns = p.images * p.results * d.taps * filled
        return "im2col columns" + how, {
            **parts,
            "product": p.images * _up(p.results * d.taps, 2) * filled * _up(p.summed, depth),
            "narrow": p.images * math.ceil(p.results * d.taps / 8) * filled * p.summed,
            "cell": p.images * p.summed * pixels,
            "apart": p.images * max(0, p.summed - READ_ALONG) * pixels,
            "patch": columns,
            "patch_row": p.images * p.results * d.taps * d.output_size[0] * d.output_size[1],
            "strided": columns if p.step > 1 else 0,
        }
    in_place = (
        d.taps == 1 and set(d.stride) == {1} and pixels >= 64 and not d.channels_last and p.machine.isa != "scalar"
    )
    summed = p.summed * d.taps
    how, depth = _how_patches(p, summed, pixels)
    return f"im2col{' in place' if in_place else ''}{how}", {
        **parts,
        "product": p.images * _up(p.results, 4) * filled * _up(summed, depth),
        "narrow": p.images * math.ceil(p.results / 8) * filled * summed,
        "cell": p.images * p.summed * pixels,
        "patch": 0 if in_place else p.images * summed * filled,
        "patch_row": 0 if in_place else p.images * summed * d.output_size[0] * d.output_size[1],
        "strided": p.images * summed * pixels if p.step > 1 else 0,
    }


def _how_columns(p: Problem, pixels: int) -> tuple[str, int]:
    """Return how im2col multiplies to make columns, and up to a multiple of what it fills filters."""
    rows = p.results * p.dims.taps
    if rows <= 32 and pixels >= 512:  # gradients are read where they are, if they are rows
        return " few", 1
    if p.machine.isa != "amx" or min(pixels, p.summed, rows) < 32:
        return "", 1
    lanes = _up(rows, VECTOR) / rows
    filled = lanes * _up(p.summed, DIGITS) / p.summed * _up(pixels, 16) / pixels
    if p.machine.precision == "highest" and p.summed >= 256 and pixels >= 100 and _pays(p.machine, filled, 4):
        return " digits", DIGITS
    filled = lanes * _up(p.summed, PIECES) / p.summed * _up(pixels, 8) / pixels
    return (" pieces", PIECES) if _pays(p.machine, filled) else ("", 1)


def _how_patches(p: Problem, terms: int, pixels: int) -> tuple[str, int]:
    """Return how im2col multiplies patches, and up to a multiple of what it fills them."""
    if p.machine.isa != "amx" or terms < VECTOR:
        return "", 1
    rest = p.results % VECTOR
    tiles = p.results - rest + (0 if rest == 0 else VECTOR if rest > VECTOR // 2 else 13)
    filled = tiles / p.results * _up(pixels, VECTOR) / pixels
    for how, depth, products, patch in ((" digits", DIGITS, 4, 30), (" pieces", PIECES, _products(p.machine), 20)):
        if how == " digits" and not (_sums_digits(p.machine, p.summed, terms) and pixels >= VECTOR):
            continue
        made = products * filled * _up(terms, depth) / terms / 11
        if made + patch / p.results + 8 / pixels + 5 / terms < 1:
            return how, depth
    return "", 1


def _by_columns(dims: ConvDims) -> bool:
    """Whether im2col adds up columns: else, of 1x1 filters, the gradient is a convolution of the gradients."""
    few = 64 if max(dims.stride) == 1 else 256
    return (dims.taps > 1 or math.prod(dims.output_size) <= few) and dims.taps * dims.output_size[2] <= 2**20


def _winograd(p: Problem) -> tuple[str, Parts] | None:
    how = "split" if p.machine.isa == "amx" and p.summed >= VECTOR else "fused"
    how = "rounded" if p.machine.isa == "scalar" else how
    parts = [part.dims for part in p.dims.input_grad_parts() if part.dims] if p.op == "conv_input_grad" else [p.dims]
    tiles = [winograd.choose(part, how) for part in parts]
    if not any(tiles):
        return None
    if how == "split" and p.machine.precision != "highest":
        return "winograd", {}  # it leaves few products to direct
    channels, summed = _up(p.summed, VECTOR), _up(p.summed, PIECES) if how == "split" else p.summed
    made: Parts = dict.fromkeys(("product", "transform", "back", "tap", "plain"), 0)
    for part, tile in zip(parts, tiles, strict=True):
        if tile is None:
            made["plain"] += p.images * p.lanes * p.summed * part.taps * math.prod(part.output_size)
            continue
        work = winograd.count(part, tile.rows, tile.columns)
        made["product"] += p.images * work.points * p.lanes * summed * work.slices
        made["transform"] += p.images * work.points * channels * work.slices
        made["back"] += p.images * work.points * p.lanes
        made["tap"] += p.dims.groups * work.taps * p.lanes * p.summed * work.slices
    return f"winograd{' pieces' if how == 'split' else ''}", {
        **made,
        "cell": p.images * channels * p.cells * p.phases,
        "scattered": p.images * p.results * p.made if p.phases > 1 else 0,
        "phase": p.dims.groups * p.phases,
        "group": p.images,
        "call": 1,
    }


# Gradient of the weights ----------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """The gradient of the weights: sums over the pixels of a batch."""

    dims: ConvDims
    machine: Machine
    images: int  #: of the batch, times the groups
    channels: int  #: of a group
    filters: int  #: of a group
    lanes: int  #: filters, filled up to whole vectors
    pixels: int  #: of a plane of gradients
    rows: int  #: of these
    wide: int  #: pixels, rows filled up to whole vectors
    cells: int  #: of a plane of the image, padding included
    cell_rows: int  #: of these


def _weights(dims: ConvDims, machine: Machine) -> Weights:
    sizes = [sum(size) for size in zip(dims.input_size, dims.pad_before, dims.pad_after, strict=True)]
    rows, columns = math.prod(dims.output_size[:2]), dims.output_size[2]
    return Weights(
        dims, machine, dims.batch * dims.groups, dims.group_in_channels, dims.group_out_channels,
        _up(dims.group_out_channels, machine.lanes), rows * columns, rows, rows * _up(columns, machine.lanes),
        math.prod(sizes), sizes[0] * sizes[1],
    )  # fmt: skip


def _direct_weights(w: Weights) -> tuple[str, Parts]:
    d = w.dims
    if d.depthwise:
        return _depthwise_weights("direct", w)
    parts: Parts = {"image": w.images, "group": d.groups, "call": 1, "cell_row": w.images * w.channels * w.cell_rows}
    gap = d.output_size[2] + (d.kernel_size[2] - 1) * d.dilation[2] - min(d.pad_before[2], d.kernel_size[2] - 1)
    laid = d.output_size[0] * _up(d.output_size[1] * gap, PIECES)
    filters, channels = _up(w.filters, VECTOR), _up(w.channels, VECTOR)
    pays = laid * filters * channels <= 3 * w.pixels * w.filters * w.channels
    if w.machine.isa == "amx" and w.channels >= VECTOR and pays:  # the image's channels are the lanes
        many = d.taps * min(w.channels, w.filters) >= 128 and d.batch * w.pixels >= 256
        how = " digits" if many and w.machine.precision == "highest" else " pieces"
        return f"direct{how}{' 1x1' if d.taps == 1 else ''}", {
            **parts,
            "product": w.images * filters * channels * laid * d.taps,
            "cell": w.images * channels * w.cells,
            "strided": w.images * channels * w.cells if max(d.stride) > 1 else 0,
            "number": w.images * w.filters * laid,
            "sum": d.groups * filters * channels * d.taps,
        }
    products = w.images * w.lanes * w.pixels * d.reduction
    return f"direct{' 1x1' if d.taps == 1 else ''}", {
        **parts,
        "product": products,
        "narrow": products if w.lanes == w.machine.lanes else 0,
        "cell": w.images * w.channels * w.cells,
        "strided": products if max(d.stride) > 1 else 0,
        "packed": w.images * _up(w.channels, VECTOR) * w.cells,
        "number": w.images * w.lanes * w.pixels,
        "stored": w.images * w.lanes * d.reduction,
        "sum": d.groups * w.lanes * d.reduction,
    }


def _depthwise_weights(algorithm: str, w: Weights) -> tuple[str, Parts]:
    d, filters = w.dims, w.images * w.filters
    lanes = d.batch * _up(d.groups, w.machine.lanes) * w.filters
    return f"{algorithm} depthwise", {
        "product": (lanes * w.pixels if algorithm == "direct" else filters * w.wide) * d.taps,
        "narrow": filters * w.pixels * d.taps,
        "cell": filters * w.cells,
        "strided": filters * w.cells if d.stride[2] > 1 else 0,
        "number": filters * w.pixels,
        "row": filters * w.rows,
        "sum": d.out_channels * d.taps,
        "plane": filters,
        "call": 1,
    }


def _planar_weights(w: Weights) -> tuple[str, Parts] | None:
    d = w.dims
    if d.reduction > MOST_TERMS:
        return None
    if d.channels_last:
        return "planar", {}  # it leaves them to another
    if d.depthwise:
        return _depthwise_weights("planar", w)
    filled = (
        _up(d.reduction, VECTOR) / d.reduction * w.lanes / w.filters * _up(d.output_size[2], PIECES) / d.output_size[2]
    )
    how = " pieces" if w.channels <= 4 and d.reduction >= 49 and _pays(w.machine, filled) else ""
    how = " in place" if d.taps == 1 else how
    cells = w.images * w.channels * w.cells
    return "planar" + how, {
        "product": w.images * w.wide * _up(w.filters, 6) * _up(d.reduction, 4),
        "gradient": w.images * w.wide * w.filters * math.ceil(d.reduction / 4),
        "cell": cells,
        "cell_row": w.images * w.channels * w.cell_rows,
        "strided": cells if d.stride[2] == 2 else 0,
        "far": cells if d.stride[2] > 2 else 0,
        "sum": d.groups * w.filters * d.reduction,
        "sum_row": w.images * w.filters * d.reduction * w.rows,
        "group": w.images,
        "call": 1,
    }


def _im2col_weights(w: Weights) -> tuple[str, Parts]:
    d = w.dims
    if has_few_pixels("conv_weight_grad", d):
        d = other_side(d) or d
        passes = math.ceil(d.batch / (TOGETHER // w.pixels))  # over the gradients, each of some images
        patches, weights = w.images * d.reduction * w.pixels, d.groups * d.group_out_channels * d.reduction
        return "im2col few", {
            "patch": patches, "group": w.images, "call": 1, "product": patches * d.group_out_channels,
            "weight": weights * passes,
        }  # fmt: skip
    in_place = d.taps == 1 and set(d.stride) == {1}
    turned, others = w.filters, w.channels
    if d.taps == 1 and d.groups == 1 and w.machine.channels_last and not any(d.pad_before + d.pad_after):
        in_place = True  # nothing is turned: the more lanes, the better
        turned, others = max(turned, others), min(turned, others)
    elif in_place and d.groups == 1 and 5 * _turning(w.channels, w.filters) < 4 * _turning(w.filters, w.channels):
        turned, others = w.channels, w.filters  # for image and gradients are alike
    lanes, patches = _up(turned, w.machine.lanes), w.images * others * d.taps * w.pixels
    return f"im2col{' in place' if in_place else ' depthwise' if d.depthwise else ''}", {
        "patch": patches,
        "group": w.images,
        "call": 1,
        "product": patches * lanes,
        "narrow": patches * lanes if lanes == w.machine.lanes else 0,
        "patch_row": 0 if in_place else w.images * d.reduction * w.rows,
        "strided": patches if d.stride[2] > 1 else 0,
        "number": w.images * lanes * w.pixels,
        "sum": d.groups * lanes * others * d.taps,
    }


def _turning(turned: int, others: int) -> int:
    """Return what a pixel of 1x1 layers takes, in products, if the so many channels of one side are turned."""
    return _up(turned, VECTOR) * others + TURN * turned


def _winograd_weights(w: Weights) -> tuple[str, Parts] | None:
    tile = winograd.choose_for_weights(w.dims, "rounded" if w.machine.isa == "scalar" else "fused")
    if tile is None:
        return None
    channels, points = _up(w.channels, VECTOR), winograd.count(w.dims, tile.rows, tile.columns).points
    return "winograd", {
        "product": w.images * points * w.lanes * _up(w.channels, 8),
        "narrow": w.images * points * w.lanes * channels,
        "transform": w.images * points * channels * math.ceil(w.filters / winograd.SHARED),
        "gradient": w.images * points * w.lanes * math.ceil(w.channels / winograd.SHARED),
        "sum": w.dims.groups * tile.points * _up(w.channels, 8) * w.lanes,
        "cell": w.images * channels * w.cells,
        "number": w.images * w.filters * w.pixels,
        "group": w.images,
        "call": 1,
    }


# All together ---------------------------------------------------------------------------------------------------------

_FORWARD: dict[str, Callable[[Problem], tuple[str, Parts] | None]] = {
    "winograd": _winograd, "planar": _planar, "direct": _direct, "im2col": _im2col
}  # fmt: skip
_WEIGHTS: dict[str, Callable[[Weights], tuple[str, Parts] | None]] = {
    "winograd": _winograd_weights, "planar": _planar_weights, "direct": _direct_weights, "im2col": _im2col_weights
}  # fmt: skip
ALGORITHMS = tuple(_FORWARD)


def parts(op: str, algorithm: str, dims: ConvDims, machine: Machine, images: int = IMAGES) -> tuple[str, Parts] | None:
    """Return how a native algorithm multiplies, and how many there are of each of its parts; None if it can't.

    There are no parts of one that can, and leaves it to another.

    Parameters
    ----------
    op : str
        "conv_forward", "conv_input_grad" or "conv_weight_grad".
    algorithm : str
        One of ``ALGORITHMS``.
    dims : ConvDims
        The convolution.
    machine : Machine
        Its instruction set, how exact it has to be, and the caller's layout.
    images : int
        The batch counts as so many images; for the gradient of the weights, as many as it has.
    """
    if op == "conv_weight_grad":
        images, made = dims.batch, _WEIGHTS[algorithm](_weights(dims, machine))
    else:
        made = _FORWARD[algorithm](_problem(op, dims, machine, images))
    if made and made[1]:
        planes = dims.in_channels * math.prod(dims.input_size) + dims.out_channels * math.prod(dims.output_size)
        numbers = images * planes + dims.out_channels * dims.reduction
        made[1]["beyond"] = max(0, numbers - CACHED)
    return made


@cache
def measured() -> Mapping[str, Times]:
    """Return the times of all parts by machine, as measured."""
    found: Mapping[str, Times] = json.loads(Path(__file__).with_name("costs.json").read_text())
    return found


@lru_cache(maxsize=1024)
def estimate(op: str, dims: ConvDims, machine: Machine) -> Mapping[str, float]:
    """Return the nanoseconds that each native algorithm takes, by the model; without those that can't.

    Examples
    --------
    >>> from fastconv.dims import conv_dims
    >>> dims = conv_dims((1, 64, 14, 14), (128, 64, 5, 5), 1, 2, 1, 1)
    >>> sorted(estimate("conv_forward", dims, Machine("avx2")))
    ['direct', 'im2col', 'planar', 'winograd']
    """
    times, found = measured().get(str(machine), {}).get(op, {}), {}
    for algorithm in ALGORITHMS:
        if made := parts(op, algorithm, dims, machine):
            name, counts = made
            known = name in times and counts
            found[algorithm] = sum(counts[part] * time for part, time in times[name].items()) if known else math.inf
    return found
