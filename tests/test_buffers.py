"""Memory that training steps leave to one another: used again, but never while somebody has it."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest

from fastconv.buffers import LARGE, Buffers, empty, reuse
from fastconv.layers import Conv2d, MaxPool2d, ReLU, Sequential

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
            assert empty((LARGE,), F32).base is None
        assert empty((1,), F32).base is None
        assert empty((LARGE,), F32).base is not None
    assert empty((LARGE,), F32).base is None


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
