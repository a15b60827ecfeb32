"""The tile of Winograd's convolution: how many outputs at once, chosen by what they cost, for every engine.

Along one axis, F(m, r) computes m outputs of an r-tap filter by m + r - 1 products instead of m r. With stride 2, even
taps see even cells and odd taps odd ones, so that 3 outputs of 4 taps are two F(3, 2), and 3 outputs of 3 taps are one,
and 3 products of the odd tap. Longer filters are cut into slices, which are summed like channels; an axis with F(1, 1)
is left alone, in slices of one tap.

    tile                  products of an output    instead of    terms
    F(2, 3)                        2                   3           120
    F(4, 3)                        1.5                 3           300
    F(2, 3) x F(2, 3)              4                   9           120
    F(2, 3) x F(4, 3)              3                   9           400
    F(4, 3) x F(4, 3)              2.25                9          1600
    F(3, 2) x F(3, 2)              1.8                 4           180
    F(3, 4) x F(3, 4)              4                  16          1250
    F(3, 3) x F(3, 3), stride 2    5.4                 9           120
    F(3, 4) x F(3, 4), stride 2    7.1                16           180

The larger a tile, the larger its errors, whatever the length of the sums; those of plain sums grow with it. They meet
at so many terms (docs/performance.md), where 16 products are summed in a row, and then these sums; the longer the sums,
the more may be summed in a row, which is faster. What only padding is multiplied by is no term.

How products are added up matters to both, error and cost: "fused", or "rounded" before they are added, or of the pieces
that numbers are "split" into.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple


class Side(NamedTuple):
    """What happens along one axis of a tile."""

    outputs: int
    taps: int  #: of a slice of the filters
    stride: int = 1

    @property
    def points(self) -> int:
        """Inputs that the outputs see, and products that they take."""
        return (self.outputs - 1) * self.stride + self.taps

    @property
    def tap_points(self) -> tuple[int, ...]:
        """Which value of the taps each point has: a phase of a single tap has but that one."""
        single = self.stride == 2 and self.taps == 3
        return (0, 1, 2, 3, 4, 4, 4) if single else tuple(range(self.points))

    @property
    def coarse(self) -> bool:
        """Whether its points are so many that errors are larger."""
        return self.stride == 1 and self.points == 6

    @property
    def code(self) -> int:
        """Its number in compiled code, which knows sides by it."""
        return 100 * self.stride + 10 * self.outputs + self.taps


ALONE = Side(1, 1)  #: of any stride
RUNS = (16, 32, 64)  #: products that are summed in a row
TERMS = {  #: that a sum must have for each of the runs; the axes of a tile may be exchanged
    (ALONE, Side(2, 3)): (120, 120, 180),
    (ALONE, Side(4, 3)): (300, 350, 500),
    (ALONE, Side(3, 2)): (120, 120, 250),
    (ALONE, Side(3, 4)): (300, 300, 500),
    (ALONE, Side(3, 3, 2)): (120, 120, 180),
    (ALONE, Side(3, 4, 2)): (120, 120, 250),
    (Side(2, 3), Side(2, 3)): (120, 120, 180),
    (Side(2, 3), Side(4, 3)): (400, 540, 850),
    (Side(4, 3), Side(4, 3)): (1600, 1600, 2500),
    (Side(3, 2), Side(3, 2)): (180, 180, 400),
    (Side(3, 4), Side(3, 4)): (1250, 1500, 2400),
    (Side(3, 3, 2), Side(3, 3, 2)): (120, 120, 180),
    (Side(3, 4, 2), Side(3, 4, 2)): (180, 180, 400),
}
ROUNDED = 1.6  #: times as many terms for coarse tiles, where products are rounded before they are added
PRODUCT = {16: 1.25, 32: 1.12, 64: 1.06}  #: time of a product of runs in those of other algorithms
TRANSFORM = 7  #: products that fit into the time of packing and transforming one number, or of transforming it back


class Split(NamedTuple):
    """The same where pieces of numbers are multiplied: products of ``direct`` that fit into the time of something else.

    Fitted to 20 shapes of 32 to 512 channels (docs/performance.md).
    """

    product: float = 1.9  #: one of a tile: they are many small matrices
    transform: int = 60  #: of a number of the image
    back: int = 12  #: of an output
    tap: int = 110  #: of a transformed weight


SPLIT = Split()
START = 85_000  #: products in the time that starting takes longer than elsewhere: 1.7 us
SUM_TRANSFORM = 12  #: the same for a number of the gradient of the weights, which is stored in the caller's layout, too
LEAST_TILES = 8  #: of a block
PERIOD = 64  #: tiles that dilation may interleave: a block has whole periods
ROOM = 2**19  #: transformed numbers of the smallest block, at most
VECTOR = 8  #: channels that the gradient of the weights fills up to, where there are fewer; of AVX2
LANES = 16  #: channels that inputs are filled up to; of AVX-512
SHARED = 64  #: channels, and filters, for which the gradient of the weights transforms a number once


class Tile(NamedTuple):
    """Outputs of a tile, and what it costs."""

    rows: Side
    columns: Side
    run: int  #: products that may be summed in a row
    cost: float  #: of a group, in products: of one image, or of the gradient of the weights

    @property
    def points(self) -> int:
        """Products of a tile, for each channel and filter."""
        return self.rows.points * self.columns.points

    @property
    def tap_points(self) -> list[int]:
        """Which transformed taps each point multiplies."""
        rows, columns = sorted((self.rows, self.columns), key=lambda side: side.code)  # as compiled code has them
        wide = max(columns.tap_points) + 1
        return [row * wide + column for row in rows.tap_points for column in columns.tap_points]


def slices(dims: Any, rows: Side, columns: Side) -> tuple[int, int, int]:
    """Return how many slices the filters are cut into along each axis."""
    depth, height, width = dims.kernel_size
    return depth, math.ceil(height / rows.taps), math.ceil(width / columns.taps)


def _period(dims: Any) -> int:
    """Tiles that dilation interleaves."""
    return math.prod(dims.dilation[1:])


@lru_cache(maxsize=1024)
def choose(dims: Any, products: str = "fused") -> Tile | None:
    """Return the cheapest tile for a convolution that is exact enough, or None."""
    if _period(dims) > PERIOD:
        return None
    terms = dims.group_in_channels * _products(dims) / math.prod(dims.output_size)
    least = max(LEAST_TILES, _period(dims)) * dims.group_in_channels
    tiles = [
        Tile(rows, columns, run, _cost(dims, products, rows, columns, run))
        for rows, columns, run in _exact_enough(dims, terms, products)
        if rows.points * columns.points * math.prod(slices(dims, rows, columns)) * least <= ROOM
    ]
    return min(tiles, key=lambda tile: tile.cost, default=None)


@lru_cache(maxsize=1024)
def choose_for_weights(dims: Any, products: str = "fused") -> Tile | None:
    """Return the cheapest tile for the gradient of weights that are one slice, with stride 1, or None."""
    if _period(dims) > PERIOD or dims.stride[1:] != (1, 1):
        return None
    tiles = [
        Tile(rows, columns, run, _weight_cost(dims, rows, columns, run))
        for rows, columns, run in _exact_enough(dims, dims.batch * _products(dims) / dims.taps, products)
        if (1, rows.taps, columns.taps) == dims.kernel_size
    ]
    return min(tiles, key=lambda tile: tile.cost, default=None)


def _products(dims: Any) -> int:
    """Return how many pairs of an output and a tap meet in a cell of the image, and not in its padding."""

    def along(axis: int) -> int:
        pad, stride, dilation = dims.pad_before[axis], dims.stride[axis], dims.dilation[axis]
        pairs = 0
        for tap in range(dims.kernel_size[axis]):
            cell = tap * dilation - pad  # that the first output sees
            end = -((cell - dims.input_size[axis]) // stride)
            pairs += max(0, min(dims.output_size[axis], end) - max(0, -(cell // stride)))
        return pairs

    return along(0) * along(1) * along(2)


def _exact_enough(dims: Any, terms: float, products: str) -> list[tuple[Side, Side, int]]:
    """Return the sides that fit the filters, with their longest run, where plain sums are no more exact."""

    def fits(side: Side, axis: int) -> bool:
        taps, stride, dilation = dims.kernel_size[axis], dims.stride[axis], dims.dilation[axis]
        return side == ALONE or (taps > 1 and side.stride == stride and (stride == 1 or dilation == 1))

    found = []
    for pair, needed in TERMS.items():
        there = terms / ROUNDED if products == "rounded" and any(side.coarse for side in pair) else terms
        least = (needed[0],) * len(RUNS) if products == "split" else needed  # AMX sums 16 in a row by itself
        runs = [run for run, enough in zip(RUNS, least, strict=True) if there >= enough]
        sides = dict.fromkeys((pair, pair[::-1])) if runs else ()
        found += [(rows, columns, runs[-1]) for rows, columns in sides if fits(rows, 1) and fits(columns, 2)]
    return found


def _tiles(dims: Any, rows: Side, columns: Side) -> int:
    """Tiles of one image; with dilation, the outputs of a tile are so far apart, and tiles interleave."""
    depth, *size = dims.output_size
    tiles: int = depth
    for side, outputs, step in zip((rows, columns), size, dims.dilation[1:], strict=True):
        tiles *= math.ceil(outputs / (side.outputs * step)) * step
    return tiles


class Work(NamedTuple):
    """What tiles make of one channel and one filter."""

    points: int  #: of all tiles of an image: each is a product
    slices: int  #: of the filter, summed like channels
    taps: int  #: of a slice, transformed


def count(dims: Any, rows: Side, columns: Side) -> Work:
    """Return what there is to multiply and to transform."""
    points = rows.points * columns.points * _tiles(dims, rows, columns)
    taps = (max(rows.tap_points) + 1) * (max(columns.tap_points) + 1)
    return Work(points, math.prod(slices(dims, rows, columns)), taps)


def plain_cost(dims: Any) -> float:
    """Products of an image and a group without Winograd."""
    return float(math.prod(dims.output_size) * dims.group_out_channels * dims.reduction)


def _cost(dims: Any, products: str, rows: Side, columns: Side, run: int) -> float:
    """Products of an image and a group, transforms included."""
    filters, work = dims.group_out_channels, count(dims, rows, columns)
    channels = dims.group_in_channels * work.slices
    lanes = math.ceil(dims.group_in_channels / LANES) * LANES * work.slices
    taps = work.taps * filters * channels
    if products == "split":
        transforms = work.points * (SPLIT.transform * lanes + SPLIT.back * filters) + SPLIT.tap * taps
        return float(SPLIT.product * work.points * filters * channels + transforms + START)
    transforms = TRANSFORM * (work.points * (lanes + filters) + taps)
    return float(PRODUCT[run] * work.points * filters * channels + transforms + START)


def _weight_cost(dims: Any, rows: Side, columns: Side, run: int) -> float:
    """Products of a group's gradient of the weights, transforms included."""
    filters, tiles = dims.group_out_channels, dims.batch * _tiles(dims, rows, columns)
    channels = max(dims.group_in_channels, VECTOR)
    shared = channels * math.ceil(filters / SHARED) + filters * math.ceil(channels / SHARED)
    products = PRODUCT[run] * tiles * channels * filters
    transforms = TRANSFORM * tiles * shared + SUM_TRANSFORM * channels * filters
    return float(rows.points * columns.points * (products + transforms))
