"""Every row of the registry against the textbook loops: a new row is tested without touching this file."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from cases import (
    CONV_CASES,
    CONV_OPS,
    NAIVE,
    POOL_CASES,
    Array,
    ConvArrays,
    ConvCase,
    ConvResults,
    PoolCase,
    PoolResults,
    assert_close,
    assert_equal_results,
    assert_results,
    case_oracle,
    conv_function,
    conv_results,
    for_every_row,
    how,
    oracle,
    pool_oracle,
    pool_results,
    rows_of,
)
from hypothesis import given, note
from hypothesis import strategies as st

import fastconv as fc
from fastconv import registry, runtime
from fastconv.dims import conv_dims
from fastconv.kernels.exchange import exchanged
from fastconv.registry import ROWS, Row, available


def named(*names: str) -> list[ConvCase]:
    return [next(case for case in CONV_CASES if case.name == name) for name in names]


#: A few of each kind, where the loops take a moment.
SMALL_CASES = [
    case for case in CONV_CASES if case.dims.batch * case.dims.out_channels * case.dims.output_size[2] < 200
] + named("3x3 of one more than a tile")


# ---------------------------------------------------------------------------------------------------------------------
# Named cases
# ---------------------------------------------------------------------------------------------------------------------


@for_every_row(CONV_CASES)
def test_convolution_of_a_named_case(row: Row, case: ConvCase, dtype: Any) -> None:
    assert_results(conv_results(case, case.arrays(dtype), row), case_oracle(case), dtype)


@pytest.mark.parametrize("case", POOL_CASES, ids=lambda case: case.name)
def test_pooling_of_a_named_case_is_exact(case: PoolCase, pool_row: Row, dtype: Any) -> None:
    results = pool_results(case.spatial, case.image(dtype), case.window, **how(pool_row))
    assert_equal_results(results, pool_oracle(case, dtype))


def test_every_row_has_some_case(conv_row: Row) -> None:
    assert any(conv_row in rows_of(case) for case in CONV_CASES)


@pytest.mark.parametrize("op", ROWS)
def test_the_reference_is_last_and_can_do_everything(op: str) -> None:
    last = ROWS[op][-1]
    assert (last.engine, last.algorithm) == ("numpy", "naive")
    cases = CONV_CASES if op.startswith("conv") else POOL_CASES
    assert not any(last.supports(op, case.dims) for case in cases)


# ---------------------------------------------------------------------------------------------------------------------
# The textbook loops themselves, against what NumPy has
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "padding"), [("valid", 0), ("full", 4), ("same", 2)])
def test_the_loops_correlate_as_numpy_does(rng: np.random.Generator, mode: str, padding: int) -> None:
    signal, taps = rng.standard_normal(12), rng.standard_normal(5)
    result = fc.conv1d(signal[None, None], taps[None, None], padding=padding, **NAIVE)
    np.testing.assert_allclose(result[0, 0], np.correlate(signal, taps, mode), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", [c for c in CONV_CASES if c.padding == 0 or c.groups > 1], ids=lambda case: case.name)
def test_the_loops_sum_over_channels_and_taps(case: ConvCase) -> None:
    """output[n, k, o] as one einsum over every (channel, tap) of a fully indexed image."""
    x, w, _, _ = case.arrays(np.float64)
    dims, ones = case.dims, (1,) * (3 - case.spatial)
    padded = np.pad(
        x.reshape(*x.shape[:2], *ones, *x.shape[2:]),
        ((0, 0), (0, 0), *zip(dims.pad_before, dims.pad_after, strict=True)),
    )
    grid = np.ix_(*(
        (np.arange(n)[:, None] * s + np.arange(k) * d).ravel()
        for n, s, k, d in zip(dims.output_size, dims.stride, dims.kernel_size, dims.dilation, strict=True)
    ))  # fmt: skip
    shape = [n for pair in zip(dims.output_size, dims.kernel_size, strict=True) for n in pair]
    patches = padded[(slice(None), slice(None), *grid)].reshape(x.shape[0], dims.groups, -1, *shape)
    filters = w.reshape(dims.groups, -1, w.shape[1], *dims.kernel_size)
    wanted = np.einsum("ngcxiyjzk,gocijk->ngoxyz", patches, filters).reshape(case.output)
    result = conv_function(case.spatial)(x, w, **case.geometry, **NAIVE)
    np.testing.assert_allclose(result, wanted, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Memory of every kind
# ---------------------------------------------------------------------------------------------------------------------


def _strided(array: Array) -> Array:
    big = np.full([2 * n + 1 for n in array.shape], np.nan, array.dtype)
    view = big[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def _reversed(array: Array) -> Array:
    back = tuple(slice(None, None, -1) for _ in array.shape)
    return array[back].copy()[back]


def _reversed_along(axis: int, array: Array) -> Array:
    return np.flip(np.ascontiguousarray(np.flip(array, axis)), axis)


def _part(array: Array) -> Array:
    """Rows of a much wider array."""
    big = np.full((*array.shape[:-1], 9 * array.shape[-1]), np.nan, array.dtype)
    big[..., : array.shape[-1]] = array
    return big[..., : array.shape[-1]]


def _read_only(array: Array) -> Array:
    view = array.copy()
    view.flags.writeable = False
    return view


def _unaligned(array: Array) -> Array:
    raw = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    raw[...] = array
    return raw


def _odd_record(array: Array) -> Array:
    records = np.empty(array.shape, [("tag", "u1"), ("value", array.dtype)])
    records["value"] = array
    return records["value"]


def _beside_no_memory(array: Array, after: bool) -> Array:
    """Put it where a page begins or ends that must not be touched: whoever does is killed."""
    page, size = mmap.PAGESIZE, -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + 2 * page)
    start = np.frombuffer(memory, np.uint8).ctypes.data
    for at in (0, page + size):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + at), page, 0) == 0
    view = np.ndarray(array.shape, array.dtype, memory, page if after else page + size - array.nbytes)
    view[...] = array
    return view


FORMS: dict[str, Callable[[Array], Array]] = {
    "contiguous": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "channels last": lambda array: np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1),
    "strided": _strided,
    "reversed": _reversed,
    "reversed channels": partial(_reversed_along, 1),
    "reversed rows": partial(_reversed_along, -2),
    "part of rows": _part,
    "read-only": _read_only,
    "unaligned": _unaligned,
    "fields of records": _odd_record,
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
}
if sys.platform == "linux":
    FORMS["before no memory"] = partial(_beside_no_memory, after=False)
    FORMS["after no memory"] = partial(_beside_no_memory, after=True)
FORM_CASES = named(
    "3x3, stride 2",
    "3x3 of one more than a tile",
    "groups of two",
    "depthwise",
    "1x1",
    "1x1 of few channels and filters",
    "signal, three pixels, stride 2",
)


@pytest.mark.parametrize("form", FORMS)
@for_every_row(FORM_CASES)
def test_convolution_reads_memory_of_every_kind(row: Row, case: ConvCase, form: str, dtype: Any) -> None:
    arrays = ConvArrays(*(FORMS[form](array) if array.ndim > 1 else _strided(array) for array in case.arrays(dtype)))
    before = [array.copy() for array in arrays]
    assert_results(conv_results(case, arrays, row), case_oracle(case), dtype)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("form", FORMS)
def test_pooling_reads_memory_of_every_kind(form: str, pool_row: Row, dtype: Any) -> None:
    case = next(case for case in POOL_CASES if case.name == "3x3, stride 2, padding")
    results = pool_results(2, FORMS[form](case.image(dtype)), case.window, **how(pool_row))
    assert_equal_results(results, pool_oracle(case, dtype))


BROADCAST = named(
    "3x3, stride 2", "3x3 of one more than a tile", "1x1 of few channels and filters", "volume of one row"
)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (2, 3), (0, 1, 2, 3)])
@for_every_row(BROADCAST)
def test_convolution_of_broadcast_arrays(row: Row, case: ConvCase, axes: tuple[int, ...], dtype: Any) -> None:
    def spread(array: Array) -> Array:
        first = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(array.ndim))
        return np.broadcast_to(array[first], array.shape)

    x, w, b, g = (np.rint(4 * array) for array in case.arrays(dtype))  # integers: every order of summation is exact
    arrays = ConvArrays(spread(x), spread(w), np.broadcast_to(b[:1], b.shape), spread(g))
    wanted = conv_results(case, ConvArrays(*(array.copy() for array in arrays)))
    assert_equal_results(conv_results(case, arrays, row), wanted)


@for_every_row(SMALL_CASES)
def test_layout_is_only_a_transposition(row: Row, case: ConvCase, dtype: Any) -> None:
    x, w, b, g = case.arrays(dtype)
    last, hwio = (0, *range(2, x.ndim), 1), (*range(2, x.ndim), 1, 0)
    arrays = ConvArrays(x.transpose(last).copy(), w.transpose(hwio).copy(), b, g.transpose(last).copy())
    y, dx, dw, db = conv_results(case, arrays, row, layout="NHWC")
    first, oihw = np.argsort(last), np.argsort(hwio)
    back = (None if a is None else a.transpose(axes) for a, axes in ((y, first), (dx, first), (dw, oihw)))
    assert_results(ConvResults(*back, db), case_oracle(case), dtype)


@for_every_row(SMALL_CASES)
def test_a_flipped_kernel_is_a_rotated_one(row: Row, case: ConvCase, dtype: Any) -> None:
    arrays = case.arrays(dtype)
    axes = tuple(range(2, arrays.weight.ndim))
    flipped = arrays._replace(weight=np.flip(arrays.weight, axes).copy())
    results = conv_results(case, flipped, row, flip_kernel=True)
    if results.grad_weight is not None:
        results = results._replace(grad_weight=np.flip(results.grad_weight, axes))
    assert_results(results, case_oracle(case), dtype)


@for_every_row(SMALL_CASES, "conv_forward")
def test_relu_is_applied_to_what_would_be_stored(row: Row, case: ConvCase, dtype: Any) -> None:
    x, w, b, _ = case.arrays(dtype)
    options = case.geometry | how(row)
    plain = conv_function(case.spatial)(x, w, b, **options)
    assert plain.size <= 1 or plain.min() < 0
    active = conv_function(case.spatial)(x, w, b, **options, activation="relu")
    np.testing.assert_array_equal(active, np.maximum(plain, 0))


# ---------------------------------------------------------------------------------------------------------------------
# The output: new, or the caller's
# ---------------------------------------------------------------------------------------------------------------------

WRITABLE = ("contiguous", "fortran", "strided", "reversed", "channels last", "unaligned")


@pytest.mark.parametrize("form", WRITABLE)
@for_every_row(named("groups of two", "3x3 of one more than a tile"))
def test_out_of_a_convolution_may_have_any_strides(row: Row, case: ConvCase, form: str, dtype: Any) -> None:
    x, w, b, g = case.arrays(dtype)
    calls = (
        (case.output, "", (x, w, b)),
        (case.input, "input", (x.shape, w, g)),
        (case.weight, "weight", (x, w.shape, g)),
    )
    results: list[Array | None] = []
    for op, (shape, gradient, arguments) in zip(CONV_OPS, calls, strict=True):
        results.append(None)
        if row in rows_of(case, op):
            results[-1] = out = FORMS[form](np.full(shape, np.nan, dtype))
            assert conv_function(2, gradient)(*arguments, **case.geometry, **how(row), out=out) is out
    assert_results(ConvResults(*results, None), case_oracle(case), dtype)


@pytest.mark.parametrize("form", WRITABLE)
def test_out_of_a_pooling_may_have_any_strides(form: str, pool_row: Row, dtype: Any) -> None:
    image = POOL_CASES[2].image(dtype)
    wanted, winners = fc.max_pool2d(image, 2, return_indices="compact", **NAIVE)
    pooled = FORMS[form](np.full(wanted.shape, np.nan, dtype))
    assert fc.max_pool2d(image, 2, out=pooled, **how(pool_row)) is pooled
    np.testing.assert_array_equal(pooled, wanted)
    spread = FORMS[form](np.full(image.shape, np.nan, dtype))
    assert fc.grad.max_pool2d(image.shape, winners, wanted, 2, out=spread, **how(pool_row)) is spread
    np.testing.assert_array_equal(spread, fc.grad.max_pool2d(image.shape, winners, wanted, 2, **NAIVE))


@for_every_row([ConvCase("in place", (2, 18, 9, 10), (18, 18, 3, 3), 1, 1)], "conv_forward")
def test_out_of_a_convolution_may_be_its_input(row: Row, case: ConvCase) -> None:
    x, w, b, _ = case.arrays(np.float32)
    wanted = fc.conv2d(x, w, b, padding=1, **how(row))
    assert fc.conv2d(x, w, b, padding=1, out=x, **how(row)) is x
    np.testing.assert_array_equal(x, wanted)


def test_out_of_a_pooling_may_be_its_input(pool_row: Row) -> None:
    image = POOL_CASES[2].image(np.float32)
    wanted = fc.max_pool2d(image, 3, 1, 1, **how(pool_row))
    assert fc.max_pool2d(image, 3, 1, 1, out=image, **how(pool_row)) is image
    np.testing.assert_array_equal(image, wanted)


@for_every_row([case for case in SMALL_CASES if case.input[0]])
def test_convolution_of_an_image_without_a_batch(row: Row, case: ConvCase) -> None:
    x, w, b, g = case.arrays(np.float32)
    single = case._replace(input=(1, *case.input[1:]))
    wanted = conv_results(single, ConvArrays(x[:1], w, b, g[:1]), row)
    y, dx, dw, db = conv_results(single, ConvArrays(x[0], w, b, g[0]), row)
    batched = (None if a is None else a[None] for a in (y, dx))
    assert_equal_results(ConvResults(*batched, dw, db), wanted)


@pytest.mark.parametrize("case", POOL_CASES[:-1], ids=lambda case: case.name)
def test_pooling_of_an_image_without_a_batch(case: PoolCase, pool_row: Row) -> None:
    image = case.image(np.float32)[:1, :2]
    alone = pool_results(case.spatial, image[0], case.window, **how(pool_row))
    wanted = pool_results(case.spatial, image, case.window, **how(pool_row))
    assert_equal_results(alone, PoolResults(*(array[0] for array in wanted)))


# ---------------------------------------------------------------------------------------------------------------------
# Drawn cases
# ---------------------------------------------------------------------------------------------------------------------


@st.composite
def conv_problems(draw: st.DrawFn) -> tuple[ConvCase, bool]:
    """A convolution of any kind, small enough for the textbook loops, and whether to flip it."""
    spatial = draw(st.integers(1, 3))
    groups = draw(st.sampled_from((1, 1, 1, 2, 3, 5)))
    channels, filters = draw(st.integers(1, 12)), draw(st.integers(1, 9 if groups > 1 else 35))
    largest = (11, 4, 3)[spatial - 1]

    def each(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(values) for _ in range(spatial))

    kernel = each(st.integers(1, largest))
    stride, dilation = each(st.integers(1, 4)), each(st.integers(1, 3))
    padding: Any = draw(
        st.one_of(
            st.sampled_from(("valid", "same", "same_lower")),
            st.integers(0, 3),
            st.tuples(*[st.integers(0, 3)] * spatial),
            st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * spatial),
        )
    )
    room = st.integers(0, (40, 9, 3)[spatial - 1])
    size = tuple(d * (k - 1) + 1 + draw(room) for k, d in zip(kernel, dilation, strict=True))
    case = ConvCase(
        "drawn",
        (draw(st.integers(0, 2)), channels * groups, *size),
        (filters * groups, channels, *kernel),
        stride,
        padding,
        dilation,
        groups,
    )
    return case, draw(st.booleans())


@given(problem=conv_problems(), form=st.sampled_from(sorted(FORMS)), kind=st.sampled_from((np.float32, np.float64)))
def test_convolution_of_drawn_cases(problem: tuple[ConvCase, bool], form: str, kind: Any) -> None:
    case, flip = problem
    answer = oracle(case, case.arrays(np.float64), flip_kernel=flip)
    arrays = ConvArrays(*(FORMS[form](array) if array.ndim > 1 else array for array in case.arrays(kind)))
    for row in rows_of(case):
        note(f"{row.engine} {row.algorithm}")
        assert_results(conv_results(case, arrays, row, flip_kernel=flip), answer, kind)


@st.composite
def pool_problems(draw: st.DrawFn) -> PoolCase:
    """A max pooling of any kind."""
    spatial = draw(st.integers(1, 3))

    def each(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(values) for _ in range(spatial))

    kernel, stride, dilation = each(st.integers(1, 4)), each(st.integers(1, 4)), each(st.integers(1, 3))
    covered = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(st.integers(0, c // 2)) for c in covered)
    size = tuple(max(1, c - 2 * p) + draw(st.integers(0, 7)) for c, p in zip(covered, padding, strict=True))
    batch, channels = draw(st.integers(0, 2)), draw(st.integers(1, 9))
    return PoolCase("drawn", (batch, channels, *size), kernel, stride, padding, dilation, draw(st.booleans()))


@given(case=pool_problems(), form=st.sampled_from(sorted(FORMS)), kind=st.sampled_from((np.float32, np.float64)))
def test_pooling_of_drawn_cases(case: PoolCase, form: str, kind: Any) -> None:
    rng = np.random.default_rng(0)
    image = case.image(kind)
    image[rng.random(image.shape) < 0.1] = -np.inf
    image[rng.random(image.shape) < 0.1] = np.nan
    answer = pool_results(case.spatial, image, case.window, **NAIVE)
    for row in available("max_pool_forward"):
        note(f"{row.engine} {row.algorithm}")
        assert_equal_results(pool_results(case.spatial, FORMS[form](image), case.window, **how(row)), answer)


@given(problem=conv_problems(), extra=st.integers(0, 3), kind=st.sampled_from((np.float32, np.float64)))
def test_transposed_convolution_of_drawn_cases(problem: tuple[ConvCase, bool], extra: int, kind: Any) -> None:
    """Against the loops that scatter, run on the dims of the convolution that is transposed."""
    case, _ = problem
    dims, spatial = case.dims, case.spatial
    pads = list(zip(dims.pad_before, dims.pad_after, strict=True))[3 - spatial :]
    surplus = [  # what floor() dropped is needed to come back to the input's size; more is allowed
        max((n + sum(p) - d * (k - 1) - 1) % s, min(extra, max(s, d) - 1))
        for n, p, k, s, d in zip(
            case.input[2:], pads, case.weight[2:], dims.stride[3 - spatial :], dims.dilation[3 - spatial :], strict=True
        )
    ]
    geometry = {
        "stride": case.stride,
        "padding": pads,
        "output_padding": surplus,
        "groups": case.groups,
        "dilation": case.dilation,
    }
    arrays = case.arrays(np.float64)
    x, w = arrays.grad_output, arrays.weight
    b = np.random.default_rng(2).standard_normal(case.input[1], np.float32).astype(np.float64)
    function = getattr(fc, f"conv_transpose{spatial}d")
    exact = function(x, w, b, **geometry, **NAIVE)
    magnitude = function(np.abs(x), np.abs(w), np.abs(b), **geometry, **NAIVE)
    for row in rows_of(case, "conv_input_grad"):
        note(f"{row.engine} {row.algorithm}")
        result = function(*(a.astype(kind) for a in (x, w, b)), **geometry, **how(row))
        assert_close(result, exact, magnitude, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing a row
# ---------------------------------------------------------------------------------------------------------------------


def test_the_first_yes_is_chosen() -> None:
    dims = CONV_CASES[7].dims
    found = registry.verdicts("conv_forward", dims)
    assert [verdict.row for verdict in found] == list(ROWS["conv_forward"])
    assert registry.select("conv_forward", dims) == next(verdict.row for verdict in found if not verdict.reason)


@pytest.mark.skipif(bool(runtime.why_missing("cython")), reason="asks the native engine")
@pytest.mark.parametrize(
    ("image", "weight", "stride", "first", "last"),
    [
        ((1, 768, 17, 17), (192, 768, 1, 1), 1, "im2col", "direct"),
        ((1, 3, 224, 224), (32, 3, 3, 3), 2, "planar", "direct"),
    ],
)
def test_the_choice_knows_where_the_channels_are(image: Any, weight: Any, stride: int, first: str, last: str) -> None:
    """Channels last, 1x1 weights are turned by im2col, and pixels of a channel are no neighbours for planar."""
    dims = conv_dims(image, weight, stride, 0, 1, 1)
    there = dims._replace(channels_last=True)
    assert [registry.select("conv_forward", d, "cython").algorithm for d in (dims, there)] == [first, last]
    n, c, h, w = image
    k, _, kh, kw = weight
    found = fc.explain("conv2d", (n, h, w, c), (kh, kw, c, k), None, stride, layout="NHWC", engine="cython")
    assert next(verdict.row.algorithm for verdict in found if not verdict.reason) == last


@pytest.mark.skipif(
    bool(runtime.why_missing("cython")) or runtime.isa() == "scalar",
    reason="of four lanes too few sums are in registers",
)
def test_the_choice_reads_1x1_images_where_they_are() -> None:
    for image, weight, expected in (
        ((1, 64, 56, 56), (4, 64, 1, 1), ("im2col", "im2col", "planar")),
        ((1, 3, 56, 56), (64, 3, 1, 1), ("im2col", "im2col", "planar")),
    ):
        dims = conv_dims(image, weight, 1, 0, 1, 1)
        assert tuple(registry.select(op, dims, "cython").algorithm for op in CONV_OPS) == expected


def test_planes_of_an_input_gradient_are_as_wide_as_the_image() -> None:
    dims = conv_dims((16, 6, 14, 14), (16, 6, 5, 5), 1, 0, 1, 1)
    if not runtime.why_missing("cython") and runtime.isa() != "scalar":
        assert registry.select("conv_input_grad", dims, "cython").algorithm == "planar"


@pytest.mark.skipif(
    bool(runtime.why_missing("cython")) or runtime.isa() == "scalar",
    reason="asks the native engine how it fills vectors",
)
def test_pixels_of_whole_rows_fill_what_few_channels_leave_empty() -> None:
    def chosen(op: str, image: Any, weight: Any) -> str:
        return registry.select(op, conv_dims(image, weight, 1, 1, 1, 1), "cython").algorithm

    assert chosen("conv_forward", (1, 8, 64, 64), (32, 8, 3, 3)) == "planar"
    assert chosen("conv_input_grad", (1, 32, 64, 64), (8, 32, 3, 3)) == "planar"
    assert chosen("conv_forward", (1, 8, 64, 5), (32, 8, 3, 3)) != "planar", "most of the vector is empty"
    assert chosen("conv_forward", (1, 64, 64, 64), (64, 64, 3, 3)) != "planar", "channels fill a vector"


@pytest.mark.skipif(
    bool(runtime.why_missing("cython")) or runtime.isa() == "scalar",
    reason="asks the native engine how it fills vectors",
)
def test_tiles_of_winograd_are_not_worth_filling_up_few_channels() -> None:
    def chosen(channels: int, filters: int) -> str:
        dims = conv_dims((1, channels, 28, 28), (filters, channels, 3, 3), 1, 1, 1, 1)
        return registry.select("conv_weight_grad", dims, "cython").algorithm

    assert chosen(8, 16) == "direct"
    assert chosen(64, 128) == ("direct" if runtime.isa() == "amx" else "winograd")
    assert chosen(12, 6) == "planar"


@pytest.mark.parametrize("op", CONV_OPS)
def test_what_a_row_can_is_the_same_in_both_layouts(op: str) -> None:
    """Where channels are decides what is faster; a row named for one layout must run in the other."""
    for case in CONV_CASES:
        for row in registry.available(op):
            there = [row.can(op, case.dims._replace(channels_last=last)) for last in (False, True)]
            assert there[0] == there[1], f"{row.engine} {row.algorithm}: {case.name}"


def test_few_filters_are_the_channels_of_the_gradient_of_the_weights() -> None:
    for case in named("3x3, two filters, dilation 2, asymmetric padding", "signal, one filter of many channels"):
        dims = case.dims
        other = registry.seen("cython", "conv_weight_grad", dims)
        assert exchanged(other) == dims != other
        assert (other.in_channels, other.input_size) == (dims.out_channels, dims.output_size)
        assert registry.seen("cython", "conv_forward", dims) is dims
    for case in named("3x3, padding beyond the kernel", "3x3, dilation 3, stride 2", "3x3, groups of many channels"):
        assert exchanged(case.dims) is None


@pytest.mark.skipif(runtime.isa() != "amx", reason="elsewhere a precision is no other number of products")
def test_the_choice_knows_the_precision() -> None:
    """Few channels' taps fill the tile in part only: that pays where one product in six, or in three, is left."""
    dims = conv_dims((1, 3, 14, 14), (256, 3, 5, 5), 1, 2, 1, 1)
    op = "conv_weight_grad"
    chosen = [registry.select(op, dims, "cython", precision=word).algorithm for word in ("highest", "high")]
    assert chosen == ["direct", "planar"]
    shapes = (1, 3, 14, 14), (256, 3, 5, 5), (1, 256, 14, 14)
    for word, algorithm in zip(("highest", "high"), chosen, strict=True):
        found = fc.explain("conv2d_weight", *shapes, 1, 2, precision=word, engine="cython")
        assert next(verdict.row for verdict in found if not verdict.reason).algorithm == algorithm


def test_a_slower_row_runs_when_named_but_is_not_chosen(conv_row: Row) -> None:
    for case in CONV_CASES:
        for op in CONV_OPS:
            if conv_row.why_not(op, case.dims).startswith("slower"):
                assert registry.select(op, case.dims, **how(conv_row)) == conv_row
                assert registry.select(op, case.dims) != conv_row
