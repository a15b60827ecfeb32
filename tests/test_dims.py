"""The shape algebra: sizes, the forms of padding, and the parts of the input's gradient."""

from __future__ import annotations

from typing import Any

import pytest
from cases import CONV_CASES, ConvCase
from hypothesis import given
from hypothesis import strategies as st

from fastconv.dims import conv_dims, conv_transpose_shape, pool_dims

sizes = st.integers(1, 40)
small = st.integers(1, 5)


@given(n=sizes, k=small, stride=small, before=st.integers(0, 4), after=st.integers(0, 4), dilation=small)
def test_the_last_window_fits_and_another_would_not(
    n: int, k: int, stride: int, before: int, after: int, dilation: int
) -> None:
    covered = dilation * (k - 1) + 1
    if n + before + after < covered:
        with pytest.raises(ValueError, match="input is too small"):
            conv_dims((1, 1, n), (1, 1, k), stride, [(before, after)], dilation, 1)
        return
    count = conv_dims((1, 1, n), (1, 1, k), stride, [(before, after)], dilation, 1).output_size[2]
    assert (count - 1) * stride + covered <= n + before + after < count * stride + covered


@given(n=sizes, k=small, stride=small, dilation=small)
def test_same_gives_n_over_stride_with_no_more_padding_than_needed(n: int, k: int, stride: int, dilation: int) -> None:
    same, lower = (conv_dims((1, 1, n), (1, 1, k), stride, word, dilation, 1) for word in ("same", "same_lower"))
    assert same.output_size[2] == lower.output_size[2] == -(-n // stride)
    before, after = same.pad_before[2], same.pad_after[2]
    assert 0 <= after - before <= 1  # the odd surplus goes after...
    assert (lower.pad_before[2], lower.pad_after[2]) == (after, before)  # ...or before
    assert before + after in (0, (same.output_size[2] - 1) * stride + dilation * (k - 1) + 1 - n)


@pytest.mark.parametrize(
    ("padding", "before", "after"),
    [
        (2, (2, 2), (2, 2)),
        ((2,), (2, 2), (2, 2)),
        ((1, 2), (1, 2), (1, 2)),
        ([1, 2], (1, 2), (1, 2)),
        ([(0, 1), (2, 3)], (0, 2), (1, 3)),
        ([(0, 1), 4], (0, 4), (1, 4)),
        ([(3, 1)], (3, 3), (1, 1)),
        ("valid", (0, 0), (0, 0)),
        ("same", (1, 1), (1, 2)),
        ("same_lower", (1, 2), (1, 1)),
    ],
)
def test_the_forms_of_padding(padding: Any, before: tuple[int, int], after: tuple[int, int]) -> None:
    dims = conv_dims((1, 1, 9, 9), (1, 1, 3, 4), 1, padding, 1, 1)
    assert (dims.pad_before[1:], dims.pad_after[1:]) == (before, after)


def test_fewer_dimensions_are_three_with_leading_ones() -> None:
    dims = conv_dims((2, 3, 9), (4, 3, 3), 2, 1, 1, 1)
    assert (dims.spatial, dims.input_size, dims.kernel_size) == (1, (1, 1, 9), (1, 1, 3))
    assert (dims.stride, dims.dilation, dims.pad_before, dims.pad_after) == ((1, 1, 2), (1, 1, 1), (0, 0, 1), (0, 0, 1))
    assert (dims.output_size, dims.taps, dims.reduction) == ((1, 1, 5), 3, 9)
    assert dims.flops == 2 * (2 * 4 * 5) * 9


@given(n=st.integers(1, 12), k=small, stride=small, pad=st.integers(0, 4), extra=st.integers(0, 4), dilation=small)
def test_a_transposed_convolution_undoes_the_shape(
    n: int, k: int, stride: int, pad: int, extra: int, dilation: int
) -> None:
    room = (n - 1) * stride - 2 * pad + dilation * (k - 1) + 1
    if extra >= max(stride, dilation) or room + extra < 1:
        return
    shape = conv_transpose_shape((1, 2, n), (2, 3, k), stride, pad, extra, 1, dilation)
    assert shape == (1, 3, room + extra)
    if extra < stride and room + extra + 2 * pad >= dilation * (k - 1) + 1:
        assert conv_dims(shape, (2, 3, k), stride, pad, dilation, 1).output_size[2] == n


@pytest.mark.parametrize("case", CONV_CASES, ids=lambda case: case.name)
def test_the_parts_of_the_input_gradient_tile_it(case: ConvCase) -> None:
    """Every input element in exactly one part, every product counted once, all strides 1, nothing inserted."""
    dims = case.dims
    cells: set[tuple[int, ...]] = set()
    for part in dims.input_grad_parts():
        own = [range(*s.indices(n)) for s, n in zip(part.input_slices, dims.input_size, strict=True)]
        block = {(d, h, w) for d in own[0] for h in own[1] for w in own[2]}
        assert not block & cells
        cells |= block
        if part.dims is not None:
            assert part.dims.stride == (1, 1, 1)
            assert part.dims.output_size == tuple(map(len, own))
            assert (part.dims.in_channels, part.dims.out_channels) == (dims.out_channels, dims.in_channels)
    assert len(cells) == dims.input_size[0] * dims.input_size[1] * dims.input_size[2]


@given(
    n=sizes, k=st.integers(1, 6), stride=small, dilation=st.integers(1, 3), ceil_mode=st.booleans(), data=st.data()
)  # fmt: skip
def test_every_pooling_window_starts_before_the_image_ends(
    n: int, k: int, stride: int, dilation: int, ceil_mode: bool, data: st.DataObject
) -> None:
    covered = dilation * (k - 1) + 1
    pad = data.draw(st.integers(0, covered // 2))
    if n + 2 * pad < covered:
        return
    count = pool_dims((1, 1, n), k, stride, pad, dilation, ceil_mode).output_size[2]
    floor = (n + 2 * pad - covered) // stride + 1
    assert floor <= count <= floor + 1
    assert (count - 1) * stride < n + pad
    if not ceil_mode:
        assert count == floor
    elif (
        count == floor
    ):  # nothing of the image is left over, or only what a window that starts in the padding would see
        assert (floor - 1) * stride + covered >= n + 2 * pad or floor * stride >= n + pad


def test_a_stride_beyond_the_image_counts_as_the_first_that_has_no_second_position() -> None:
    """So that nothing grows with it."""
    image, weight = (1, 1, 5, 5), (1, 1, 3, 3)
    for stride in (4, 5, 10**9):
        assert conv_dims(image, weight, stride, 0, 1, 1) == conv_dims(image, weight, 3, 0, 1, 1)
        assert max(pool_dims(image, 3, stride + 3, 1, 1, False).stride) <= 7
    assert conv_dims(image, weight, 2, 0, 1, 1).output_size == (1, 2, 2)


def test_the_stride_of_a_pooling_is_its_window_unless_it_is_given() -> None:
    assert pool_dims((1, 1, 9, 9), (2, 3), None, 0, 1, False).stride == (1, 2, 3)


def test_a_single_channel_and_a_single_filter_are_first_and_last() -> None:
    """Both layouts of such arrays are the same memory."""
    assert not conv_dims((1, 1, 5, 5), (1, 1, 3, 3), 1, 0, 1, 1, channels_last=True).channels_last
    assert conv_dims((1, 1, 5, 5), (2, 1, 3, 3), 1, 0, 1, 1, channels_last=True).channels_last
