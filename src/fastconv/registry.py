"""The ordered lists of algorithms: fastest first, the reference last; the first "yes" wins.

A row is a name and three facts: algorithm, engine, ``supports(op, dims, precision)``. An empty answer means yes, any
other is the reason for a no. A reason that starts with "slower" only keeps a row from being chosen: asked for by name,
it runs.

To add an algorithm: one file per engine in ``kernels/`` and one row here. Tests and benchmarks loop over these lists.
(oneDNN arranges its implementations like this, in ``cpu_convolution_list.cpp``.)
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from .dims import ConvDims, PoolDims
from .kernels import winograd
from .kernels.exchange import exchanged, weight_grad
from .kernels.few_pixels import has_few_pixels
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


def _fills_pieces(dims: ConvDims) -> bool:
    """Whether ``direct`` has AMX's tile for the gradient of the weights, which multiplies pieces of numbers."""
    few = 32 if dims.taps == 1 else 16  # im2col turns the smaller part of 1x1 layers
    return isa() == "amx" and min(dims.group_in_channels, dims.group_out_channels) >= few


def _rows_fill_pieces(dims: ConvDims) -> float:
    """Return which part of what this tile multiplies are pixels: rows have gaps, and planes are filled up to 32."""
    (_, high, wide), (_, _, taps) = dims.output_size, dims.kernel_size
    laid = high * (wide + (taps - 1) * dims.dilation[2] - min(dims.pad_before[2], taps - 1))
    return min(1.0, math.prod(dims.output_size) / (dims.output_size[0] * math.ceil(laid / 32) * 32))


def _few_pieces(precision: str) -> bool:
    """Whether numbers are split into one or two pieces, on AMX: fewer products than of digits, or than tiles save."""
    return isa() == "amx" and precision != "highest"


def _multiplies_digits(op: str, dims: ConvDims) -> bool:
    """Whether direct and im2col multiply digits, on AMX at "highest": of sums that are long enough (``digits.pyx``)."""
    summed, pixels, phases = dims.group_in_channels, math.prod(dims.output_size), 1
    if op == "conv_input_grad":
        summed, pixels, phases = dims.group_out_channels, math.prod(dims.input_size), math.prod(dims.stride)
    long = summed >= 40 and summed * dims.taps >= 200 * phases and dims.taps <= 400
    return isa() == "amx" and op != "conv_weight_grad" and long and pixels >= 16 * phases


def _weights_weigh(dims: ConvDims) -> bool:
    """Whether few pixels use the weights: on AMX im2col, which splits them where they are, then beats direct.

    Measured. With a stride direct packs more cells than there are pixels, and phase by phase.
    """
    pixels, filters = math.prod(dims.output_size), dims.group_out_channels
    most = filters // 8 if set(dims.stride) == {1} else min(100, filters)
    return isa() == "amx" and dims.group_in_channels >= 16 and 32 <= pixels <= most


def _columns(op: str, dims: ConvDims, precision: str) -> str:
    """Say why the native im2col, which adds up columns, is best for a gradient of the input; empty if it isn't.

    It reads weights once and in their order, and skips padding; its lanes are pixels, or (channel, tap). What it adds
    up is ``taps`` times the input, each number of it a sum over the filters. (Measured on AVX-512 and AMX.)
    """
    if op != "conv_input_grad" or dims.taps == 1 or dims.depthwise:
        return ""
    if dims.taps * dims.output_size[2] > 2**20:  # columns of one row of pixels
        return ""
    pixels, cells, filters = math.prod(dims.output_size), math.prod(dims.input_size), dims.group_out_channels
    phases = math.prod(dims.stride)
    turned = dims.channels_last and isa() == "amx"  # weights, which pieces are made of where they are
    few = _few_strided_pixels(dims) if phases > 1 else pixels <= 100 and filters >= 64 and not turned
    if few and 2 * cells >= 3 * pixels:
        return f"{pixels} pixels that see {cells}"
    channels, lanes = dims.group_in_channels, 16 if isa() in ("amx", "avx512") else 8
    empty = math.ceil(channels / lanes) * lanes * cells / (channels * phases * pixels)
    if turned and channels >= lanes:
        return ""
    if _fills_planes(op, dims, precision):
        return ""
    least = {"amx": (2.5, 3), "avx512": (1.7, 1.9)}.get(isa(), (1.55, 1.9))
    if filters >= 16 and empty >= least[phases > 1]:
        return f"{channels} channels would leave lanes empty"
    if phases > 16 and (filters >= 128 or _apart(dims)):
        return f"each of {phases} phases has weights of its own to pack"
    return ""


def _unless_few(supports: Callable[..., str]) -> Callable[..., str]:
    """Let a native row that may say yes leave few pixels to im2col, which takes weights once and in their order."""

    def reason(op: str, dims: ConvDims, precision: str = "highest") -> str:
        why_not = supports(op, dims, precision)
        if (why_not and not why_not.startswith("slower")) or not has_few_pixels(op, dims):
            return why_not
        return f"slower than im2col, which takes weights as they lie, for {math.prod(dims.output_size)} pixels"

    return reason


def _fills_planes(op: str, dims: ConvDims, precision: str) -> bool:
    """Whether few filters of few channels leave lanes empty that pixels of long rows fill. (Measured.)"""
    filters, channels, columns, least = dims.group_out_channels, dims.group_in_channels, dims.output_size[2], 12
    if op == "conv_input_grad":
        filters, channels, columns, least = channels, filters, dims.input_size[2] // dims.stride[2], 8
    if dims.taps == 1 or dims.channels_last:
        return False
    strided = dims.stride[2] > 1
    if op == "conv_input_grad" and strided and isa() == "avx2":  # short vectors, whose sums are stored apart
        return columns >= 7 * filters and filters <= 12 and channels <= 16
    if columns >= least and ((filters <= 12 and channels <= 16) or (filters <= 16 and channels <= 8)):
        return True
    most = 1152 if isa() == "amx" else 768 if channels >= 16 else 2048  # of what winograd, or im2col, does better
    if filters * channels > most or dims.stride[2] > 2 or _few_pieces(precision):
        return False
    if op == "conv_forward" and _patches_fill_tiles(dims, precision) and (channels > 12 or columns % 16 > 0):
        return False
    if (op == "conv_forward" and channels <= 4) or (op == "conv_input_grad" and strided and channels > 8):
        return False
    packed = 1.2 if op == "conv_forward" and strided and isa() == "amx" else 1  # by direct: cells for each pixel
    return packed * _lanes_filled(filters, columns) * _planes_gain(channels, filters, dims.taps) >= 1.04


def _few_filters(dims: ConvDims) -> int:
    """Return how many filters leave so much of direct's vector empty that planar is better for any channels."""
    return 8 if isa() == "avx512" and dims.output_size[2] >= 14 and max(dims.stride) <= 2 else 6


def _patches_fill_tiles(dims: ConvDims, precision: str) -> bool:
    """Whether patches of few channels fill AMX's tile, and filters are many enough to lay them out. (Measured.)"""
    if isa() != "amx" or _few_pieces(precision) or not 4 < dims.group_in_channels <= 16 or dims.taps > 9:
        return False
    full = dims.reduction >= 0.9 * math.ceil(dims.reduction / 32) * 32
    return math.prod(dims.output_size) >= 512 and dims.group_out_channels >= (64 if full else 96)


def _lanes_filled(filters: int, columns: int) -> float:
    """Return what share of planar's lanes pixels fill, over that of direct's which filters fill."""
    lanes, tile = 8 if isa() == "avx2" else 16, 16
    filled = columns / (math.ceil(columns / lanes) * lanes)
    if columns % lanes or columns < 2 * lanes:
        filled *= 0.93  # masks, and rows that begin anywhere in a cache line
    return filled / (filters / (math.ceil(filters / tile) * tile))


def _planes_gain(channels: int, filters: int, taps: int) -> float:
    """Return how many times as long as planar others take where all lanes are full. (Fitted to 400 layers.)"""
    if isa() == "amx":  # where direct fills 16 channels up, and 17 to 32; few taps don't pay for packing and storing
        return (1 + 2.5 / taps) * (1.12 - 0.012 * min(channels, 16)) * min(16 / channels, 1)
    if isa() == "avx512":
        return (1.38 - 0.018 * channels) * (1.3 if filters <= 16 else 1)  # a tile of one vector loads for each product
    return 1.5 - 0.035 * channels if isa() == "avx2" and channels <= 12 else 0


def _read_in_place(dims: ConvDims) -> bool:
    """Whether im2col lays out nothing of 1x1 filters' image (``pointwise.pyx``)."""
    pixels = math.prod(dims.output_size)
    return dims.taps == 1 and set(dims.stride) == {1} and pixels >= 64 and not dims.channels_last and isa() != "scalar"


def _few_strided_pixels(dims: ConvDims) -> bool:
    """Whether, with a stride, so few pixels use the weights that it pays to read them where they are. (Measured.)"""
    pixels, filters = math.prod(dims.output_size), dims.group_out_channels
    shared = dims.taps > 1 and not _apart(dims)
    if shared and _multiplies_digits("conv_input_grad", dims):
        return False
    if pixels <= 32:
        return filters >= 64
    if isa() != "amx":
        return False
    if shared:
        return filters >= 512 and pixels <= 100
    return filters >= (256 if dims.taps == 1 else 384) and pixels <= 256


def _apart(dims: ConvDims) -> bool:
    """Whether patches share no cell."""
    return dims.taps > 1 and all(s >= size for s, size in zip(dims.stride, dims.kernel_size, strict=True))


def _direct(op: str, dims: ConvDims, precision: str = "highest") -> str:
    if reason := _columns(op, dims, precision):
        return f"slower than im2col: {reason}"
    if dims.depthwise:
        return f"slower than im2col: {dims.group_out_channels} filters see each channel" if _multiplied(dims) else ""
    pixels, weights = math.prod(dims.output_size), dims.reduction * dims.group_out_channels
    strided = set(dims.stride) != {1}
    many = strided and pixels > 256  # for which it pays to turn weights whose filters are neighbours
    few = weights <= 2**16 or isa() == "amx"  # that im2col must turn
    if strided:
        few = many if dims.channels_last else _few_strided_pixels(dims)
    if op == "conv_weight_grad" and _fills_pieces(dims):
        return ""
    if op == "conv_weight_grad" and dims.channels_last and dims.group_in_channels <= 4 and _turning_pays(dims):
        return ""
    if op == "conv_weight_grad" and dims.taps > 1 and dims.reduction <= 40 and dims.group_out_channels >= 32:
        return f"slower than im2col, which gathers patches of {dims.reduction} elements once for all filters"
    few = few and (strided or pixels > 64 or dims.channels_last)
    digits = _multiplies_digits(op, dims)
    packs = digits and pixels <= (64 if strided else 256)  # to multiply it in direct's longer runs
    if dims.taps == 1 and {
        "conv_forward": many or not dims.channels_last, "conv_input_grad": few and not packs, "conv_weight_grad": True
    }[op]:  # fmt: skip
        return "slower than im2col, which leaves 1x1 weights, or the image that they see, where they are"
    if op != "conv_forward" or dims.channels_last:
        return ""
    filters = dims.group_out_channels
    weigh = _weights_weigh(dims) and (not digits or _few_pieces(precision))
    if (9 <= pixels <= 16 or weigh) and dims.taps > 1 and weights > 2**18:
        return f"slower than im2col, which reads weights in place, for {weights} weights and {pixels} pixels"
    fit = 0.75 * math.ceil(pixels / 16) * 16 < pixels <= 256
    if dims.taps >= 16 and filters >= 0.6 * pixels and fit and set(dims.stride) == {1} and not digits:
        return f"slower than im2col, which leaves weights of {dims.taps} taps where they are, for {pixels} pixels"
    if dims.reduction <= 40 and dims.taps <= 9 and filters >= 16 and pixels >= 512:
        return (
            f"slower than im2col, which leaves the output's layout: there is as much of it, {filters} filters, as of "
            f"patches, of {dims.reduction} elements"
        )
    if isa() in ("avx512", "avx2") and 4 < dims.group_in_channels <= 12 and filters >= 2 * dims.reduction:
        return f"slower than im2col, which leaves the output's layout, for {filters} filters"
    if _patches_fill_tiles(dims, precision):
        return f"slower than im2col, whose patches fill AMX's tile, where {dims.group_in_channels} channels don't"
    if _apart(dims) and (dims.reduction <= 64 or max(dims.stride) == 2):
        return f"slower than im2col: its patches of {dims.reduction} elements share none, and gathering them is a copy"
    return ""


def _turning_pays(dims: ConvDims) -> bool:
    """Whether direct, which turns gradients, takes less time, channels last, than gathering patches. (Measured.)"""
    grads, short = dims.group_out_channels * math.prod(dims.output_size), dims.reduction <= 16
    return dims.reduction > 48 or grads <= (2**15 if short else 2**18) or (not short and dims.group_out_channels <= 32)


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


def _multiplied(dims: ConvDims) -> bool:
    """Whether filters of each channel fill vectors, and rows of pixels don't. (Measured.)"""
    return dims.group_out_channels >= 16 and dims.output_size[2] < 12


def _im2col(op: str, dims: ConvDims, precision: str = "highest") -> str:
    thin = dims.depthwise and not _multiplied(dims)
    return "slower than direct: depthwise has no channels to reduce over" if thin else ""


def _taps_fill_pieces(dims: ConvDims) -> bool:
    """Whether few channels' taps fill AMX's tile in the gradient of the weights, and rows share most. (Measured.)"""
    columns, long = dims.output_size[2], 49 <= dims.reduction <= 1024 and dims.dilation[1] == 1
    full = dims.group_out_channels >= 12 and columns >= 0.6 * 32 * math.ceil(columns / 32)
    shared = 2 * dims.kernel_size[1] >= 3 * dims.stride[1]
    return isa() == "amx" and dims.group_in_channels <= 4 and long and full and shared


def _least_columns(dims: ConvDims) -> int:
    """Return for how many pixels of a row planar adds up sums of the gradient of the weights. (Measured.)"""
    if not dims.depthwise:
        return 24
    if dims.channels_last:
        return 48
    if dims.group_out_channels >= 16:
        return 12
    if dims.taps > 9:
        return 56
    return 14 if dims.batch * math.prod(dims.output_size) >= 700 else 24


def _half_a_vector(dims: ConvDims) -> bool:
    """Whether filters leave half of direct's last vector empty in the gradient of the weights. (Measured.)"""
    channels, filters, pieces = dims.group_in_channels, dims.group_out_channels, isa() == "amx"
    if isa() == "avx2":
        return filters <= 6
    if dims.taps > 9 and (filters > 8 or (channels >= 16 and pieces)):
        return False
    return filters <= 8 or (16 < filters <= (24 if channels <= 12 else 20) and channels <= (12 if pieces else 24))


def _planar_weights(dims: ConvDims) -> str:
    """Say why the native planar isn't the choice for the gradient of the weights. (Measured on AVX-512 and AMX.)"""
    if dims.reduction > 1024:
        return "has the gradient of the weights for sums of few products only"
    if _taps_fill_pieces(dims):
        return ""
    columns = dims.output_size[2]
    if dims.taps == 1:
        less, more = sorted((dims.group_in_channels, dims.group_out_channels))
        long = dims.batch * math.prod(dims.output_size) >= 512  # sums: their lanes are added up one by one
        if _read_in_place(dims) and long and (less <= 8 or more <= 16):
            return ""
        return "slower than im2col, which turns the smaller part of 1x1 layers"
    if isa() not in ("amx", "avx512") and not (isa() == "avx2" and (_half_a_vector(dims) or dims.depthwise)):
        return "slower than direct or im2col: too few sums are in registers"
    if dims.channels_last and not dims.depthwise:
        return "slower than direct or im2col: pixels of a channel are no neighbours"
    if columns < _least_columns(dims) or max(dims.stride) > 2:
        return f"slower than direct or im2col: rows of {columns} pixels leave lanes empty"
    if dims.depthwise:
        return "" if dims.taps <= 49 else f"slower than direct, which adds up {dims.taps} taps of a pixel"
    few = dims.reduction <= 36 or (dims.group_in_channels == 1 and dims.taps <= 49)
    return "" if few or _half_a_vector(dims) else f"slower than direct or im2col for patches of {dims.reduction} cells"


def _planar(op: str, dims: ConvDims, precision: str = "highest") -> str:
    if op == "conv_weight_grad":
        return _planar_weights(dims)
    channels, filters = dims.group_in_channels, dims.group_out_channels
    if op == "conv_input_grad":
        channels, filters = filters, channels
    if dims.depthwise and channels == 1:
        return "slower than direct, which is the same for depthwise convolution of contiguous rows, but for short ones"
    pixels = math.prod(dims.output_size)
    if op == "conv_input_grad" and dims.stride[2] > 2 and pixels <= 256:
        return f"slower than im2col, for {pixels} pixels whose gradients are stored {dims.stride[2]} apart"
    if _read_in_place(dims):
        return "slower than im2col, which reads the cells of 1x1 filters where they are"
    if filters <= _few_filters(dims) or _fills_planes(op, dims, precision):
        return ""
    if op == "conv_input_grad" or channels > 4:
        return f"slower than direct, which has {filters} filters to fill its lanes"
    if dims.channels_last and (isa() != "amx" or dims.reduction < 49):
        return "slower than direct: pixels of a channel are no neighbours"
    if dims.output_size[2] < {"amx": 12, "avx512": 12, "avx2": 6}.get(isa(), 3):
        return f"slower than direct: rows of {dims.output_size[2]} pixels leave lanes empty"
    laid = _few_pieces(precision) and dims.reduction >= 49 and not _apart(dims)  # patches take longer than products
    if dims.stride[2] > 2 and not laid:
        return f"slower than direct or im2col: cells that are {dims.stride[2]} apart are made neighbours one by one"
    return ""


def _planar_numba(op: str, dims: ConvDims, precision: str = "highest") -> str:
    if op == "conv_forward" and dims.stride[1:] != (1, 1):
        return "only for stride 1 along height and width"
    if op == "conv_weight_grad":
        return "has no gradient of the weights"
    if dims.depthwise:
        return "slower than direct for depthwise convolution"
    filters = dims.group_in_channels if op == "conv_input_grad" else dims.group_out_channels
    return "" if filters <= 6 else f"slower than direct, which has {filters} filters to fill its lanes"


def _planar_cython(op: str, dims: ConvDims, precision: str = "highest") -> str:
    reason = _columns(op, dims, precision)
    return f"slower than im2col: {reason}" if reason else _planar(op, dims, precision)


def _winograd(op: str, dims: ConvDims, gain: float = 1, columns: int = 0, products: str = "fused") -> str:
    """Say yes where plain products (or ``columns``) are at least ``gain`` times the cost modelled for tiles."""
    if dims.kernel_size[1:] == (1, 1):
        return "only for filters of several taps along height or width"
    if op == "conv_weight_grad":
        tiles, plain = [winograd.choose_for_weights(dims, products)], [dims.batch * winograd.plain_cost(dims)]
    else:
        parts = [part.dims for part in dims.input_grad_parts() if part.dims] if op == "conv_input_grad" else [dims]
        tiles = [winograd.choose(part, products) for part in parts]
        plain = [winograd.plain_cost(part, products) for part in parts]
    tile = next(filter(None, tiles), None)
    if tile is None:
        return "not for such filters, strides or so short sums: less exact than plain sums there, or no faster"
    if gain * sum(t.cost if t else cost for t, cost in zip(tiles, plain, strict=True)) > (columns or sum(plain)):
        return f"slower: the transforms take what tiles of {tile.rows.outputs}x{tile.columns.outputs} save"
    return ""


def _winograd_cython(op: str, dims: ConvDims, precision: str = "highest") -> str:
    columns = math.prod(dims.output_size) * dims.group_out_channels * dims.reduction
    summed = dims.group_out_channels if op == "conv_input_grad" else dims.group_in_channels
    split = op != "conv_weight_grad" and summed >= 16
    products = {"scalar": "rounded", "amx": "split" if split else "fused"}.get(isa(), "fused")
    gain = 1.0  # of gradients of the input, the weights are packed in shorter runs
    if op == "conv_input_grad" and set(dims.stride) != {1} and isa() in ("amx", "avx512"):
        gain = 1.4  # direct packs and stores once for all phases
    elif op == "conv_input_grad":
        gain = 1.03 if products == "split" else 1.15
    elif op == "conv_weight_grad" and _fills_pieces(dims):
        gain = 4.0 * _rows_fill_pieces(dims)  # products of pieces in the time of one of tiles (measured)
    elif op == "conv_weight_grad":
        gain = _tiles_gain(dims)
    reason = _winograd(op, dims, gain, columns if _columns(op, dims, precision) else 0, products)
    return reason or _without_tiles(op, dims, precision)


def _without_tiles(op: str, dims: ConvDims, precision: str) -> str:
    """Say what is better than winograd, though this saves products; empty if nothing is."""
    if op == "conv_weight_grad":
        return ""
    filters, channels = dims.group_out_channels, dims.group_in_channels
    if op == "conv_input_grad":
        filters, channels = channels, filters
    if _multiplies_digits(op, dims):
        return "slower than direct, which multiplies digits of numbers"
    if filters <= _few_filters(dims) or channels <= 4 or _fills_planes(op, dims, precision):
        return "slower than planar, whose lanes pixels fill, or than patches"
    if channels >= 16 and _few_pieces(precision):
        return "slower than direct, which multiplies fewer pieces"
    return ""


def _tiles_gain(dims: ConvDims) -> float:
    """Return how often tiles' modelled cost must be saved in the gradient of few weights. (Fitted to 300 layers.)"""
    channels, filters = dims.group_in_channels, dims.group_out_channels
    if isa() in ("avx512", "amx"):  # fills channels up; direct, if its lanes are full, comes nearer to its peak
        return (1 + 7 / filters) ** 3 * (math.ceil(channels / 16) * 16 / channels) ** 2
    return (1 + 4 / filters) * (1 + 2 / channels) if isa() == "avx2" else 1.0


def _winograd_numba(op: str, dims: ConvDims, precision: str = "highest") -> str:
    if any(taps > 1 and step > 1 for taps, step in zip(dims.kernel_size[1:], dims.dilation[1:], strict=True)):
        return "only for dilation 1 along height and width"
    if op != "conv_input_grad" and dims.stride[1:] != (1, 1):
        return "only for stride 1 along height and width"
    # Measured where it meets direct: transforms take longer, and few channels leave rows of the register tile empty.
    return _winograd(op, dims, gain=1.1 + 1 / dims.group_in_channels if op == "conv_weight_grad" else 1.35)


CONVOLUTIONS = (
    Row("winograd", "cython", _unless_few(_winograd_cython)),
    Row("planar", "cython", _unless_few(_planar_cython)),
    Row("direct", "cython", _unless_few(_direct)),
    Row("im2col", "cython", _im2col),
    Row("winograd", "numba", _winograd_numba),
    Row("planar", "numba", _planar_numba),
    Row("direct", "numba", _direct_numba),
    Row("im2col", "numba", _im2col),
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
    names = sorted({row.algorithm for row in ROWS[op]})
    if algorithm is not None and algorithm not in names:
        raise ValueError(f"algorithm must be one of {', '.join(map(repr, names))} or None, got {algorithm!r}")
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
