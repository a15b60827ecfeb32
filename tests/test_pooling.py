"""Max, average and max-blur pooling: values, borders, and the two forms of a maximum's index."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from cases import POOL_CASES, Array, PoolCase, how

import fastconv as fc
from fastconv import registry
from fastconv.dims import ConvDims
from fastconv.registry import Row

INF, NAN = np.inf, np.nan


def signal(*values: float) -> Array:
    return np.array([[values]], np.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Max pooling: which value wins
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "best", "winner"),
    [
        ((1, 2, 3), 3, 2),
        ((2, 2, 1), 2, 0),
        ((-INF, -5, -INF), -5, 1),
        ((-INF, -INF, -INF), -INF, 0),
        ((INF, 1, INF), INF, 0),
        ((0.0, -0.0, 0.0), 0, 0),
        ((1, NAN, 3), NAN, 1),
        ((NAN, 1, NAN), NAN, 2),
        ((INF, NAN, INF), NAN, 1),
        ((NAN, -INF, 7), NAN, 0),
    ],
)
def test_which_value_wins(pool_row: Row, values: tuple[float, ...], best: float, winner: int) -> None:
    """The first maximum wins a tie; a NaN wins over numbers, the last NaN over earlier ones."""
    for dtype in (np.float32, np.float64):
        x = signal(*values).astype(dtype)
        y, index = fc.max_pool1d(x, 3, return_indices=True, **how(pool_row))
        np.testing.assert_array_equal(y[0, 0], np.array([best], dtype))
        assert index.item() == winner
        np.testing.assert_array_equal(fc.max_pool1d(x, 3, **how(pool_row)), y)


def test_padding_never_wins(pool_row: Row) -> None:
    x = np.full((1, 1, 4, 4), -INF)
    y, indices = fc.max_pool2d(x, 3, 2, 1, return_indices=True, **how(pool_row))
    assert (y == -INF).all()
    assert indices[0, 0].tolist() == [[0, 1], [4, 5]]  # the first cell of each window that is inside the image


def test_a_window_that_sees_no_cell(pool_row: Row) -> None:
    """Possible with dilation: the cells of the window step over a single pixel."""
    x, dy = signal(5.0), signal(1.0, 2.0)
    y, winners = fc.max_pool1d(x, 2, 1, 1, 2, return_indices="compact", **how(pool_row))
    assert (y[0, 0].tolist(), winners[0, 0].tolist()) == ([-INF], [0])
    dx = fc.grad.max_pool1d(x.shape, winners, dy[..., :1], 2, 1, 1, 2, **how(pool_row))
    assert dx[0, 0].tolist() == [0]


def test_pooling_with_nan_keeps_its_neighbours(pool_row: Row, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 5, 16, 17))
    x[0, 1, 4, 5] = NAN
    y = fc.max_pool2d(x, 2, **how(pool_row))
    assert np.argwhere(np.isnan(y)).tolist() == [[0, 1, 2, 2]]
    clean = np.where(np.isnan(y), 0, y)
    x[0, 1, 4:6, 4:6] = 0
    np.testing.assert_array_equal(clean, fc.max_pool2d(x, 2, **how(pool_row)))


@pytest.mark.parametrize("odd", [NAN, INF, -INF])
def test_a_number_that_is_not_finite_is_nobody_elses_matter(
    pool_row: Row, odd: float, rng: np.random.Generator
) -> None:
    """Planes and images beside it have the maxima and winners that they have without it."""
    x = rng.standard_normal((3, 20, 9, 9)).astype(np.float32)
    window = (3, 2, 1)
    wanted = fc.max_pool2d(x, *window, return_indices=True, **how(pool_row))
    x[1, 7, 0, 4] = odd
    results = fc.max_pool2d(x, *window, return_indices=True, **how(pool_row))
    for result, clean in zip(results, wanted, strict=True):
        others = np.ones(result.shape[:2], bool)
        others[1, 7] = False
        np.testing.assert_array_equal(result[others], clean[others])


def test_results_go_where_out_says(pool_row: Row, rng: np.random.Generator) -> None:
    """Every second row and channel of a larger array; what lies between stays as it was."""
    x = rng.standard_normal((2, 5, 11, 9))
    window = (3, 2, 1)
    y, winners = fc.max_pool2d(x, *window, return_indices="compact", **how(pool_row))
    dx = fc.grad.max_pool2d(x.shape, winners, y, *window, **how(pool_row))
    for result, call in (
        (y, lambda out: fc.max_pool2d(x, *window, out=out, **how(pool_row))),
        (dx, lambda out: fc.grad.max_pool2d(x.shape, winners, y, *window, out=out, **how(pool_row))),
    ):
        n, c, h, w = result.shape
        large = np.full((n, 2 * c, 2 * h, w), 7.0)
        call(large[:, ::2, ::2])
        np.testing.assert_array_equal(large[:, ::2, ::2], result)
        assert (large[:, 1::2] == 7).all()
        assert (large[:, :, 1::2] == 7).all()


# ---------------------------------------------------------------------------------------------------------------------
# Max pooling: the index
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", POOL_CASES, ids=lambda case: case.name)
def test_an_index_is_an_offset_in_the_plane(case: PoolCase, pool_row: Row) -> None:
    image = case.image(np.float64)
    pool = getattr(fc, f"max_pool{case.spatial}d")
    y, indices = pool(image, *case.window, return_indices=True, **how(pool_row))
    assert indices.dtype == np.int64
    for n, c in np.ndindex(y.shape[:2]):
        np.testing.assert_array_equal(image[n, c].ravel()[indices[n, c]], y[n, c])


@pytest.mark.parametrize(("kernel", "dtype"), [((16, 16), np.uint8), ((1, 256), np.uint8), ((17, 16), np.uint16)])
def test_the_compact_index_is_one_byte_while_that_is_enough(
    pool_row: Row, kernel: tuple[int, int], dtype: type[np.integer]
) -> None:
    x = np.zeros((1, 1, 17, 256))
    x[0, 0, kernel[0] - 1, kernel[1] - 1] = 1  # the last cell of the first window
    _, winners = fc.max_pool2d(x, kernel, return_indices="compact", **how(pool_row))
    assert winners.dtype == dtype
    assert winners[0, 0, 0, 0] == kernel[0] * kernel[1] - 1


def test_what_equals_true_asks_for_offsets() -> None:
    for word in (True, 1, np.True_):
        assert fc.max_pool1d(signal(1, 2), 2, return_indices=word)[1].dtype == np.int64
    assert isinstance(fc.max_pool1d(signal(1, 2), 2, return_indices=np.False_), np.ndarray)


def test_the_gradient_takes_either_form(pool_row: Row, rng: np.random.Generator) -> None:
    for layout in ("NCHW", "NHWC"):
        x = rng.standard_normal((2, 9, 11, 5))
        window = (3, 2, 1, 1, True)
        y, offsets = fc.max_pool2d(x, *window, return_indices=True, layout=layout, **how(pool_row))
        _, winners = fc.max_pool2d(x, *window, return_indices="compact", layout=layout, **how(pool_row))
        assert offsets.shape == winners.shape == y.shape
        a, b = (
            fc.grad.max_pool2d(x.shape, indices, y, *window, layout=layout, **how(pool_row))
            for indices in (offsets, winners)
        )
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 6])
def test_gradients_of_cells_that_are_seen_seldom_or_often(
    pool_row: Row, kernel: int, stride: int, dtype: Any, rng: np.random.Generator
) -> None:
    """Cells of a row take turns in seeing so many windows, in rows of any length."""
    sizes = (11,) if pool_row.algorithm == "naive" else (11, 16, 38)
    for n, dilation, padding in [(n, d, p) for n in sizes for d in (1, 2) for p in {0, kernel // 2}]:
        x = rng.standard_normal((2, 2, n, n)).astype(dtype)
        geometry = (kernel, stride, padding, dilation)
        _, winners = fc.max_pool2d(x, *geometry, return_indices="compact", **how(pool_row))
        dy = rng.integers(-9, 9, winners.shape).astype(dtype)  # whose sums are exact
        plain = fc.grad.max_pool2d(x.shape, winners, dy, *geometry, engine="numpy")
        dx = fc.grad.max_pool2d(x.shape, winners, dy, *geometry, **how(pool_row))
        np.testing.assert_array_equal(dx, plain, str((n, dilation, padding)))


def test_gradients_of_an_image_one_cell_wide_stay_in_it(pool_row: Row, dtype: Any) -> None:
    x = np.arange(12, dtype=dtype).reshape(1, 2, 6, 1)
    _, winners = fc.max_pool2d(x, 3, 2, 1, return_indices="compact", **how(pool_row))  # of cells 1, 3 and 5
    beside = np.full((1, 2, 6, 3), -1, dtype)
    out = beside[..., :1]
    fc.grad.max_pool2d(x.shape, winners, np.ones((1, 2, 3, 1), dtype), 3, 2, 1, out=out, **how(pool_row))
    np.testing.assert_array_equal(out[..., 0], np.tile(np.array([0, 1], dtype), (1, 2, 3)))
    assert (beside[..., 1:] == -1).all()


def test_channels_last_pools_the_same(pool_row: Row) -> None:
    for case in POOL_CASES:
        x = case.image(np.float32)
        last, first = (0, *range(2, x.ndim), 1), (0, x.ndim - 1, *range(1, x.ndim - 1))
        pool, gradient = getattr(fc, f"max_pool{case.spatial}d"), getattr(fc.grad, f"max_pool{case.spatial}d")
        turned = x.transpose(last).copy()
        for form in (True, "compact"):
            wanted = pool(x, *case.window, return_indices=form, **how(pool_row))
            result = pool(turned, *case.window, return_indices=form, layout="NHWC", **how(pool_row))
            for a, b in zip(result, wanted, strict=True):
                np.testing.assert_array_equal(a.transpose(first), b)
            grad = gradient(turned.shape, result[1], result[0], *case.window, layout="NHWC", **how(pool_row))
            there = gradient(x.shape, wanted[1], wanted[0], *case.window, **how(pool_row))
            np.testing.assert_array_equal(grad.transpose(first), there)


@pytest.mark.parametrize("width", [260, 259])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1)], ids=str)
def test_an_image_larger_than_the_caches(
    engine: str, window: tuple[int, int, int], layout: str, width: int, rng: np.random.Generator
) -> None:
    """Results of such images pass by the caches, if rows are whole numbers of 16 bytes."""
    shape = (1, 64, 272, width) if layout == "NCHW" else (1, 272, width, 64)
    x = rng.standard_normal(shape, np.float32)
    wanted, indices = fc.max_pool2d(x, *window, return_indices="compact", layout=layout, engine="numpy")
    np.testing.assert_array_equal(fc.max_pool2d(x, *window, layout=layout, engine=engine), wanted)
    gradients = [
        fc.grad.max_pool2d(shape, indices, wanted, *window, layout=layout, engine=each) for each in (engine, "numpy")
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Average pooling
# ---------------------------------------------------------------------------------------------------------------------


def average_by_hand(
    x: Array, k: int, stride: int, padding: int, ceil_mode: bool, include: bool, divisor: int | None = None
) -> list[float]:
    """The definition, for one row of numbers, as PyTorch has it."""
    n = len(x)
    room = n + 2 * padding - k
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (count - 1) * stride >= n + padding:
        count -= 1
    averages = []
    for i in range(count):
        start = i * stride - padding
        stop = min(start + k, n + padding)
        inside = range(max(start, 0), min(stop, n))
        size = divisor or ((stop - start) if include else len(inside))
        averages.append(sum(x[j] for j in inside) / size)
    return averages


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize(("k", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (4, 3, 2), (5, 4, 2), (1, 3, 0)])
def test_average_pooling(
    engine: str, rng: np.random.Generator, k: int, stride: int, padding: int, ceil_mode: bool, include: bool
) -> None:
    for n in (5, 8, 11):
        x = rng.standard_normal((2, 3, n))
        y = fc.avg_pool1d(x, k, stride, padding, ceil_mode, include, engine=engine)
        wanted = [[average_by_hand(row, k, stride, padding, ceil_mode, include) for row in image] for image in x]
        np.testing.assert_allclose(y, wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_average_pooling_is_separable(engine: str, rng: np.random.Generator, layout: str) -> None:
    """A plane's averages are the averages over rows of the averages over columns."""
    x = rng.standard_normal((2, 3, 9, 8))
    rows = np.apply_along_axis(average_by_hand, 2, x, 3, 2, 1, False, True)
    wanted = np.apply_along_axis(average_by_hand, 3, rows, 2, 3, 0, False, True)
    given = x if layout == "NCHW" else x.transpose(0, 2, 3, 1)
    y = fc.avg_pool2d(given, (3, 2), (2, 3), (1, 0), layout=layout, engine=engine)
    np.testing.assert_allclose(y if layout == "NCHW" else y.transpose(0, 3, 1, 2), wanted, rtol=1e-13, atol=1e-14)


def test_a_divisor_replaces_the_number_of_cells(engine: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((1, 2, 6, 6))
    plain, other = fc.avg_pool2d(x, 3, engine=engine), fc.avg_pool2d(x, 3, divisor_override=5, engine=engine)
    np.testing.assert_allclose(other, plain * 9 / 5, rtol=1e-14)
    y = fc.avg_pool3d(x[None], (1, 2, 2), divisor_override=1, engine=engine)
    np.testing.assert_allclose(y, x[None].reshape(1, 1, 2, 3, 2, 3, 2).sum(axis=(4, 6)), rtol=1e-13)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((7, 7), 7, 1),
        ((9, 8), (9, 8), 3),
        ((8, 12), 4, 4),
        ((11, 14), (5, 4), (6, 4)),
        ((40,), 40, 1),
        ((4, 5, 6), 3, 3),
    ],
)
def test_large_windows_that_share_no_cells_are_those_of_a_convolution(
    size: tuple[int, ...], window: Any, stride: Any, layout: str, rng: np.random.Generator, dtype: Any
) -> None:
    last, spatial = layout == "NHWC", len(size)
    pool, gradient = (getattr(module, f"avg_pool{spatial}d") for module in (fc, fc.grad))
    x = rng.standard_normal((3, *size, 5) if last else (3, 5, *size)).astype(dtype)
    for image in (x, np.asfortranarray(x), x[::-1]):  # of the second, an image's cells lie among those of others
        y = pool(image, window, stride, layout=layout)
        grad_output = rng.standard_normal(y.shape).astype(dtype)[::-1]
        exact = pool(image.astype(float), window, stride, layout=layout, engine="numpy", algorithm="naive")
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(pool(image[1:2], window, stride, layout=layout), y[1:2])
        wanted = gradient(x.shape, grad_output, window, stride, layout=layout, engine="numpy", algorithm="naive")
        np.testing.assert_array_equal(gradient(x.shape, grad_output, window, stride, layout=layout), wanted)
        out = np.full((*x.shape, 2), np.nan, dtype)[..., 1]
        assert gradient(x.shape, grad_output, window, stride, layout=layout, out=out) is out
        np.testing.assert_array_equal(out, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Max-blur pooling (arXiv 1904.11486)
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "taps"), [(1, [1]), (2, [1, 1]), (3, [1, 2, 1]), (4, [1, 3, 3, 1]), (5, [1, 4, 6, 4, 1])]
)
def test_max_blur_pooling_is_dense_max_then_blur_then_subsampling(
    engine: str, rng: np.random.Generator, size: int, taps: list[int]
) -> None:
    x = rng.standard_normal((2, 3, 12))
    dense = fc.max_pool1d(x, 3, 1, engine=engine)
    framed = np.pad(dense, ((0, 0), (0, 0), ((size - 1) // 2, size // 2)), mode="reflect")
    wanted = np.apply_along_axis(np.convolve, 2, framed, np.array(taps) / sum(taps), "valid")[:, :, ::2]
    y, indices = fc.max_blur_pool1d(x, 3, 2, size, return_indices=True, engine=engine)
    np.testing.assert_allclose(y, wanted, rtol=1e-13, atol=1e-14)
    np.testing.assert_array_equal(indices, fc.max_pool1d(x, 3, 1, return_indices=True, engine=engine)[1])


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_constant_image_stays_constant(engine: str, spatial: int, layout: str) -> None:
    shape = (2, *(7, 6, 5)[:spatial], 3) if layout == "NHWC" else (2, 3, *(7, 6, 5)[:spatial])
    y = getattr(fc, f"max_blur_pool{spatial}d")(np.full(shape, 4.0), 2, 2, layout=layout, engine=engine)
    np.testing.assert_array_equal(y, np.full_like(y, 4.0))
    assert y.size


@pytest.mark.parametrize("function", ["max_blur_pool2d", "avg_pool2d"])
def test_pooling_of_an_image_without_a_batch_and_of_no_image(engine: str, function: str, dtype: Any) -> None:
    pool = getattr(fc, function)
    x = np.random.default_rng(0).standard_normal((3, 8, 9)).astype(dtype)
    y = pool(x, 2, 2, engine=engine)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, pool(x[None], 2, 2, engine=engine)[0])
    assert pool(x[None][:0], 2, 2, engine=engine).shape == (0, *y.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Average and max-blur pooling, and their gradients: where the channels are, and where results go
# ---------------------------------------------------------------------------------------------------------------------


def calls(x: Array, spatial: int, **options: Any) -> dict[str, Callable[..., Array]]:
    """Poolings of ``x``, and gradients of it, by name; each takes what keywords there are beside ``options``."""
    average, blur = getattr(fc, f"avg_pool{spatial}d"), getattr(fc, f"max_blur_pool{spatial}d")
    average_grad, blur_grad = getattr(fc.grad, f"avg_pool{spatial}d"), getattr(fc.grad, f"max_blur_pool{spatial}d")
    window = {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False, **options}
    step = {"kernel_size": 2, "stride": 2, **options}
    blurred, winners = blur(x, **step, return_indices="compact")
    return {
        "average": partial(average, x, **window),
        "average's gradient": partial(average_grad, x.shape, average(x, **window), **window),
        "blur": partial(blur, x, **step),
        "blur's gradient": partial(blur_grad, x.shape, winners, blurred, **step),
    }


CALLS = ("average", "average's gradient", "blur", "blur's gradient")


@pytest.mark.parametrize("batch", [0, 1, 2, None])
@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("name", CALLS)
def test_channels_last_is_only_a_transposition(
    general_row: Row, name: str, spatial: int, batch: int | None, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((2, 5, *(9, 8, 7)[:spatial]))
    x = x[0] if batch is None else x[:batch]
    channels = x.ndim - spatial - 1
    first = calls(x, spatial, **how(general_row))[name]()
    last = calls(np.moveaxis(x, channels, -1).copy(), spatial, layout="NHWC", **how(general_row))[name]()
    np.testing.assert_allclose(np.moveaxis(last, -1, channels), first, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("name", CALLS)
def test_averages_and_blurs_go_where_out_says(
    general_row: Row, name: str, spatial: int, rng: np.random.Generator
) -> None:
    """Every second element of a larger array; what lies between stays as it was."""
    for layout in ("NCHW", "NHWC"):
        x = rng.standard_normal((2, 5, 8, 7, 6)[: spatial + 2])
        call = calls(x, spatial, layout=layout, **how(general_row))[name]
        result = call()
        large = np.full([2 * n for n in result.shape], 7.0)
        out = large[(slice(None, None, 2),) * large.ndim]
        assert call(out=out) is out
        np.testing.assert_allclose(out, result, rtol=1e-13, atol=1e-14)
        out[...] = 7
        assert (large == 7).all()
        with pytest.raises(ValueError, match="out must have shape"):
            call(out=large)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", CALLS)
def test_the_choice_of_an_algorithm_knows_where_the_channels_are(
    name: str, layout: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def select(op: str, dims: Any, *args: Any) -> Row:
        seen.append(dims)
        return registry.select(op, dims, *args)

    call = calls(rng.standard_normal((1, 15, 14, 13)), 2, layout=layout)[name]
    for module in (fc.functional, fc.grad):
        for plan in ("kernel", "_avg_pool_plan"):
            getattr(module, plan).cache_clear()
    monkeypatch.setattr(fc.functional, "select", select)
    call()
    assert [dims.channels_last for dims in seen if isinstance(dims, ConvDims)] == [layout == "NHWC"]
