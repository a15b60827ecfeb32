"""Memory that training steps leave to one another: used again, but never while somebody has it."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest

import fastconv as fc
from fastconv.buffers import LARGE, Buffers, empty, reuse
from fastconv.kernels.reference import arrays as reference
from fastconv.kernels.reference.arrays import LINE
from fastconv.layers import Conv2d, MaxPool2d, ReLU, Sequential

try:
    from fastconv.kernels.native import arrays as native
except ImportError:
    native = None

F32 = np.dtype(np.float32)


def address(array: np.ndarray[Any, np.dtype[Any]]) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_given_again_when_nobody_has_it() -> None:
    buffers = Buffers()
    array = buffers.empty((4, 8), F32)
    assert (array.shape, array.dtype) == ((4, 8), F32)
    first = address(array)
    del array
    assert address(buffers.empty((8, 4), F32)) == first
    assert address(buffers.empty((2, 8), np.dtype(np.float64))) == first
    assert address(buffers.empty((4, 7), F32)) == first, "somewhat less will do"
    assert address(buffers.empty((4, 9), F32)) != first, "more will not"
    assert address(buffers.empty((3,), F32)) != first, "nor would so little be worth it"


@pytest.mark.parametrize(
    "hold",
    [
        lambda array: array,
        lambda array: array[1:2, ::2],
        lambda array: array.reshape(8, 4).T[None],
        lambda array: memoryview(array),
        lambda array: {"somewhere": [array.view(np.int32)]},
    ],
)
def test_memory_is_not_given_again_while_somebody_has_it(hold: Any) -> None:
    buffers = Buffers()
    array = buffers.empty((4, 8), F32)
    first, held = address(array), hold(array)
    del array
    assert address(buffers.empty((4, 8), F32)) != first
    del held
    gc.collect()
    again = [buffers.empty((4, 8), F32) for _ in range(2)]
    assert first in map(address, again)


def test_only_large_arrays_come_from_the_buffers_and_only_where_they_are_in_use() -> None:
    buffers = Buffers()
    with reuse(buffers):
        with reuse(None):
            empty((LARGE,), F32)
        empty((LARGE // 8,), F32)
        assert not buffers._memory
        array = empty((LARGE,), F32)
        assert array.base is buffers._memory[0]
    assert empty((LARGE,), F32).base is not buffers._memory[0]


@pytest.mark.parametrize("quick", [pytest.param(native, id="native"), pytest.param(reference, id="reference")])
def test_results_begin_where_a_cache_line_does(quick: Any) -> None:
    if quick is None:
        pytest.skip("the native engine was not built")
    held = []
    for shape in ((1 << 10,), (3, 5, 7, 11, 13), (2, 1 << 17), (0, 1 << 10)):
        for dtype in (F32, np.dtype(np.float64), np.dtype(np.uint8)):
            array = quick.empty_below(1 << 30, shape, dtype)
            assert (array.shape, array.dtype) == (shape, dtype)
            assert array.flags.carray
            assert address(array) % LINE == 0 or array.nbytes < 1 << 10, "small ones may be anywhere"
            array[...] = 1
            held.append(array)
    assert all((array == 1).all() for array in held), "no two in the same memory"


@pytest.mark.parametrize("quick", [pytest.param(native, id="native"), pytest.param(reference, id="reference")])
def test_arrays_of_more_bytes_than_the_limit_are_not_made(quick: Any) -> None:
    if quick is None:
        pytest.skip("the native engine was not built")
    assert quick.empty_below(4096, (1023,), F32) is not None
    assert quick.empty_below(4096, (1024,), F32) is None
    assert quick.empty_below(1 << 62, (1 << 40, 1 << 40), F32) is None, "more bytes than there are numbers"
    memory = np.empty(4096 + LINE, np.uint8)
    assert quick.from_line((1024,), F32, memory).base is memory
    for shape in ((2048,), (1 << 40, 1 << 40)):
        with pytest.raises((TypeError, ValueError)):
            quick.from_line(shape, F32, memory)
    with pytest.raises((ValueError, MemoryError)):
        empty((1 << 40, 1 << 40), F32)


def test_public_results_begin_where_a_cache_line_does(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 8, 24, 25)).astype(np.float32)
    weight = rng.standard_normal((16, 8, 3, 3)).astype(np.float32)
    output = fc.conv2d(x, weight)
    pooled, winners = fc.max_pool2d(output, 2, return_indices="compact")
    results = {
        "conv2d": output,
        "max_pool2d": pooled,
        "indices": winners,
        "avg_pool2d": fc.avg_pool2d(output, 2),
        "conv_transpose2d": fc.conv_transpose2d(output, weight),
        "conv2d_input": fc.grad.conv2d_input(x.shape, weight, output),
        "conv2d_weight": fc.grad.conv2d_weight(x, weight.shape, output),
        "max_pool2d_grad": fc.grad.max_pool2d(output.shape, winners, pooled, 2),
    }
    assert {name: address(array) % LINE for name, array in results.items()} == dict.fromkeys(results, 0)


def network() -> Sequential:
    """Small, but its arrays are large enough for the buffers."""
    layers = (Conv2d(1, 8, 3, padding=1, rng=0), ReLU(), MaxPool2d(2), Conv2d(8, 8, 3, padding=1, rng=1), ReLU())
    return Sequential(*layers)


def test_what_the_user_has_is_not_overwritten_by_later_steps(rng: np.random.Generator) -> None:
    model = network()
    images = [rng.standard_normal((8, 1, 64, 64)).astype(np.float32) for _ in range(3)]
    outputs = [model(image) for image in images]
    grads = []
    for image in images:
        grads.append(model.backward(model(image)))
    fresh = [network() for _ in images]
    for image, output, grad, other in zip(images, outputs, grads, fresh, strict=True):
        wanted = other(image)
        np.testing.assert_array_equal(output, wanted)
        np.testing.assert_array_equal(grad, other.backward(wanted))


def test_steps_need_no_more_memory_from_the_second_on(rng: np.random.Generator) -> None:
    model, image = network(), rng.standard_normal((8, 1, 64, 64)).astype(np.float32)
    sizes = []
    for _ in range(4):
        model.backward(model(image))
        sizes.append(len(model._buffers._memory))
    assert 0 < sizes[1] == sizes[2] == sizes[3]


def test_a_copy_of_a_model_has_buffers_of_its_own(rng: np.random.Generator) -> None:
    model = network()
    model(rng.standard_normal((8, 1, 64, 64)).astype(np.float32))
    assert model._buffers._memory
    assert not copy.deepcopy(model)._buffers._memory
