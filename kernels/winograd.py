"""The tile of Winograd's convolution: how many outputs at once, chosen by what they cost, for every engine.

Along one axis, m outputs of a 3-tap filter take m + 2 products instead of 3 m. Longer filters are cut into slices of 3
taps, which are summed like channels; an axis of one output has slices of one tap, and no transform.

    outputs of a tile    products of an output, 3x3 taps    terms that a sum must have
         1 x 1                        9
         1 x 2                        6                               120
         1 x 4                        4.5                             400
         2 x 2                        4                               120
         2 x 4                        3                               400
         4 x 4                        2.25                           1600

The larger a tile, the larger its errors, whatever the length of the sums; those of plain sums grow with it. The last
column is where they meet (docs/performance.md). What only padding is multiplied by is no term.

How products are added up matters to both, error and cost: "fused", or "rounded" before they are added, or of the pieces
that numbers are "split" into.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

SLICE = 3  #: taps
SIDES = ((1, 2), (1, 4), (2, 1), (4, 1), (2, 2), (2, 4), (4, 2), (4, 4))
TERMS = {  #: of a sum, for tiles with no, one or two sides of 4
    "fused": (120, 400, 1600),
    "rounded": (120, 600, 2600),
    "split": (120, 600, 2600),
}
PRODUCT = (1.1, 1.25)  #: time of a product in those of other algorithms; the latter with a side of 4, for shorter sums
TRANSFORM = {  #: products that fit into the time of packing and transforming one number, or of transforming it back
    "fused": 7,
    "rounded": 7,
    "split": 20,  #: counted, never timed: products of pieces are as much faster
}
SPLIT = 32  #: the same for splitting one number; counted, too
START = 85_000  #: products in the time that starting takes longer than elsewhere: 1.7 us
SUM_TRANSFORM = 12  #: the same for a number of the gradient of the weights, which is stored in the caller's layout, too
LEAST_TILES = 8  #: of a block
PERIOD = 64  #: tiles that dilation may interleave: a block has whole periods
ROOM = 2**19  #: transformed numbers of the smallest block, at most
VECTOR = 8  #: channels that the gradient of the weights fills up to, where there are fewer; of AVX2
SHARED = 64  #: channels, and filters, for which the gradient of the weights transforms a number once


class Tile(NamedTuple):
    """Outputs of a tile, and what it costs."""

    rows: int
    columns: int
    cost: float  #: of a group, in products: of one image, or of the gradient of the weights

    @property
    def points(self) -> int:
        """Products of a tile, for each channel and filter."""
        return _points(self.rows, self.columns)


def _points(rows: int, columns: int) -> int:
    """Inputs that a tile of outputs sees, and products that it takes."""
    return math.prod(1 if side == 1 else side + SLICE - 1 for side in (rows, columns))


def _slices(dims: Any, rows: int, columns: int) -> int:
    """Slices that the filters are cut into."""
    depth, height, width = dims.kernel_size
    high, wide = (1 if side == 1 else SLICE for side in (rows, columns))
    return int(depth * math.ceil(height / high) * math.ceil(width / wide))


def _period(dims: Any) -> int:
    """Tiles that dilation interleaves."""
    return math.prod(dims.dilation[1:])


@lru_cache(maxsize=1024)
def choose(dims: Any, products: str = "fused") -> Tile | None:
    """Return the cheapest tile for a convolution with stride 1 that is exact enough, or None."""
    if _period(dims) > PERIOD:
        return None
    kernel = dims.kernel_size[1:]
    terms = dims.group_in_channels * _products(dims) / math.prod(dims.output_size)
    tiles = [
        Tile(*sides, _cost(dims, products, *sides))
        for sides in _exact_enough(terms, products)
        if all(side == 1 or taps > 1 for side, taps in zip(sides, kernel, strict=True))
        and max(LEAST_TILES, _period(dims)) * _points(*sides) * _slices(dims, *sides) * dims.group_in_channels <= ROOM
    ]
    return min(tiles, key=lambda tile: tile.cost, default=None)


@lru_cache(maxsize=1024)
def choose_for_weights(dims: Any, products: str = "fused") -> Tile | None:
    """Return the cheapest tile for the gradient of weights of 3 taps along one axis or two, or None."""
    depth, *kernel = dims.kernel_size
    if depth > 1 or _period(dims) > PERIOD:
        return None
    tiles = [
        Tile(*sides, _weight_cost(dims, *sides))
        for sides in _exact_enough(dims.batch * _products(dims) / dims.taps, products)
        if all(taps == (1 if side == 1 else SLICE) for side, taps in zip(sides, kernel, strict=True))
    ]
    return min(tiles, key=lambda tile: tile.cost, default=None)


def _products(dims: Any) -> int:
    """Return how many pairs of an output and a tap meet in a cell of the image, and not in its padding."""
    return math.prod(
        sum(max(0, min(outputs, size + pad - tap * dilation) - max(0, pad - tap * dilation)) for tap in range(taps))
        for outputs, size, pad, dilation, taps in zip(
            dims.output_size, dims.input_size, dims.pad_before, dims.dilation, dims.kernel_size, strict=True
        )
    )


def _exact_enough(terms: float, products: str) -> list[tuple[int, int]]:
    """Return the sides of tiles whose error is no larger than that of a plain sum of so many terms."""
    return [sides for sides in SIDES if terms >= TERMS[products][sides.count(4)]]


def _tiles(dims: Any, rows: int, columns: int) -> int:
    """Tiles of one image; with dilation, the outputs of a tile are so far apart, and tiles interleave."""
    depth, *size = dims.output_size
    tiles: int = depth
    for side, outputs, step in zip((rows, columns), size, dims.dilation[1:], strict=True):
        tiles *= math.ceil(outputs / (side * step)) * step
    return tiles


def plain_cost(dims: Any, products: str = "fused") -> float:
    """Products of an image and a group without Winograd; if numbers are split, what that takes is among them."""
    channels, filters = dims.group_in_channels, dims.group_out_channels
    numbers = channels * (math.prod(dims.input_size) + filters * dims.taps) if products == "split" else 0
    return float(math.prod(dims.output_size) * filters * dims.reduction + SPLIT * numbers)


def _cost(dims: Any, products: str, rows: int, columns: int) -> float:
    """Products of an image and a group, transforms included."""
    channels, filters, tiles = dims.group_in_channels, dims.group_out_channels, _tiles(dims, rows, columns)
    transformed = channels * _slices(dims, rows, columns) * (tiles + filters)
    cost = PRODUCT[4 in (rows, columns)] * tiles * filters * channels * _slices(dims, rows, columns)
    cost += TRANSFORM[products] * (transformed + tiles * filters)
    if products == "split":
        cost += SPLIT * transformed
    return float(_points(rows, columns) * cost + START)


def _weight_cost(dims: Any, rows: int, columns: int) -> float:
    """Products of a group's gradient of the weights, transforms included."""
    filters, tiles = dims.group_out_channels, dims.batch * _tiles(dims, rows, columns)
    channels = max(dims.group_in_channels, VECTOR)
    shared = channels * math.ceil(filters / SHARED) + filters * math.ceil(channels / SHARED)
    products = PRODUCT[4 in (rows, columns)] * tiles * channels * filters
    transforms = TRANSFORM["fused"] * tiles * shared + SUM_TRANSFORM * channels * filters
    return float(_points(rows, columns) * (products + transforms))
