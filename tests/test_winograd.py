"""Which tile Winograd's convolution takes: the cheapest that is exact enough, and that fits its workspace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastconv.dims import ConvDims, conv_dims
from fastconv.kernels import winograd


def square(channels: int, size: int, taps: int = 3, dilation: int = 1, stride: int = 1) -> ConvDims:
    """As many channels as filters, padded to keep the size."""
    pad = taps // 2 * dilation
    return conv_dims((1, channels, size, size), (channels, channels, taps, taps), stride, pad, dilation, 1)


def sides(tile: Any) -> tuple[int, int] | None:
    return tile and (tile.rows.outputs, tile.columns.outputs)


@pytest.mark.parametrize(
    ("channels", "tile"), [(8, None), (16, (2, 2)), (32, (2, 2)), (64, (2, 4)), (128, (2, 4)), (256, (4, 4))]
)
def test_tiles_grow_with_the_sums(channels: int, tile: tuple[int, int] | None) -> None:
    assert sides(winograd.choose(square(channels, 56))) == tile


def test_rounded_products_need_longer_sums() -> None:
    assert sides(winograd.choose(square(256, 56), "rounded")) == (2, 4)
    assert sides(winograd.choose(square(512, 56), "rounded")) == (4, 4)


def test_products_of_pieces_are_summed_in_short_rows_whatever_the_run() -> None:
    for channels in (64, 192, 256):
        tile = winograd.choose(square(channels, 56), "split")
        assert tile is not None
        assert tile.run == max(winograd.RUNS)
        assert sides(tile) == ((2, 4) if channels == 64 else (4, 4))


def test_padding_is_no_term_of_a_sum() -> None:
    assert sides(winograd.choose(square(48, 56))) == (2, 4)
    assert sides(winograd.choose(square(48, 8))) == (2, 2)


def test_weights_are_summed_over_the_outputs() -> None:
    assert sides(winograd.choose_for_weights(square(64, 56))) == (4, 4)
    assert sides(winograd.choose_for_weights(square(64, 28))) == (2, 4)
    assert sides(winograd.choose_for_weights(square(64, 12))) == (2, 2)
    assert winograd.choose_for_weights(square(64, 8)) is None
    assert winograd.choose_for_weights(square(64, 56, taps=5)) is None


def test_small_images_are_not_worth_large_tiles_of_weights() -> None:
    assert sides(winograd.choose(square(512, 6))) == (2, 2)
    assert sides(winograd.choose(square(512, 28))) == (4, 4)


@pytest.mark.parametrize(
    ("channels", "dilation", "fits"), [(64, 2, True), (512, 6, True), (2048, 6, False), (64, 9, False)]
)
def test_the_tiles_that_dilation_interleaves_fit_a_block(channels: int, dilation: int, fits: bool) -> None:
    dims = square(channels, 48, dilation=dilation)
    assert (winograd.choose(dims) is not None) == fits
    assert (winograd.choose_for_weights(dims) is not None) == (dilation**2 <= winograd.PERIOD)


def test_longer_sums_may_have_more_products_in_a_row() -> None:
    runs = [tile.run for channels in (64, 128, 192, 256, 512) if (tile := winograd.choose(square(channels, 56)))]
    assert runs == [32, 64, 32, 32, 64]  # 2x4 up to 1600 terms, then 4x4


@pytest.mark.parametrize(("taps", "side"), [(2, (3, 2)), (3, (2, 3)), (4, (3, 4)), (7, (3, 4))])
def test_sides_have_what_taps_they_need(taps: int, side: tuple[int, int]) -> None:
    dims = conv_dims((1, 90, 1, 300), (90, 90, 1, taps), 1, 0, 1, 1)
    tile = winograd.choose(dims)
    assert tile is not None
    assert tile.rows == winograd.ALONE
    assert tile.columns[:2] == side


@pytest.mark.parametrize(("taps", "points", "tap_points"), [(3, 49, 25), (4, 64, 64)])
def test_stride_2_has_tiles_of_both_phases(taps: int, points: int, tap_points: int) -> None:
    tile = winograd.choose(square(256, 56, taps=taps, stride=2))
    assert sides(tile) == (3, 3)
    assert tile is not None
    assert (tile.points, max(tile.tap_points) + 1) == (points, tap_points)
    assert winograd.choose_for_weights(square(256, 56, taps=taps, stride=2)) is None
    assert winograd.choose(square(256, 56, taps=taps, stride=3)) is None


def test_no_more_points_than_native_code_has_room_for() -> None:
    source = (Path(__file__).parent.parent / "kernels" / "native" / "winograd_tiles.pxd").read_text()
    most = re.search(r"MOST_POINTS = (\d+)", source)
    assert most is not None
    assert max(rows.points * columns.points for rows, columns in winograd.TERMS) <= int(most[1])
