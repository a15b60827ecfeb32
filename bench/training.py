"""Whole training steps: forward, loss, backward and a step of SGD, of small networks that differ in what is slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastconv as fc
from fastconv.dims import conv_dims
from fastconv.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential
from fastconv.losses import cross_entropy
from fastconv.optim import SGD

from .engines import Array, images_to

CLASSES = 10
LEARNING_RATE = 0.01


class Network(NamedTuple):
    """A network of 3x3 convolutions with padding 1, each with a ReLU after it, 2x2 max pools and a linear layer."""

    name: str
    input_size: tuple[int, int, int, int]  #: (N, C, H, W)
    widths: tuple[int, ...]  #: filters of each convolution; 0 is a pool

    def stages(self) -> Iterator[tuple[int, int, int]]:
        """Yield channels, height and filters of each convolution, with 0 filters of each pool and at the end."""
        _, channels, height, _ = self.input_size
        for width in self.widths:
            yield channels, height, width
            channels, height = (width, height) if width else (channels, height // 2)
        yield channels, height, 0

    @property
    def features(self) -> int:
        """Inputs of the linear layer."""
        channels, height, _ = list(self.stages())[-1]
        return channels * height * height

    @property
    def flops(self) -> int:
        """Floating-point operations of a step; the first layer's input has no gradient."""
        batch = self.input_size[0]
        forward = [
            conv_dims((batch, channels, height, height), (width, channels, 3, 3), 1, 1, 1, 1).flops
            for channels, height, width in self.stages()
            if width
        ] + [2 * batch * self.features * CLASSES]
        return 3 * sum(forward) - forward[0]


NETWORKS = (
    Network("digits_2conv", (64, 1, 28, 28), (32, 0, 64, 0)),
    Network("cifar_6conv", (32, 3, 32, 32), (64, 64, 0, 128, 128, 0, 256, 256, 0)),
)


class Batch(NamedTuple):
    """A network and a batch to learn from."""

    network: Network
    images: Array  #: (N, C, H, W)
    classes: Array  #: (N,)

    @classmethod
    def random(cls, network: Network) -> Batch:
        """Return float32 normal numbers, the same ones each time."""
        rng = np.random.default_rng(0)
        images = rng.standard_normal(network.input_size, np.float32)
        return cls(network, images, rng.integers(0, CLASSES, len(images)))


def build(network: Network, layout: str, dtype: Any = np.float32) -> Sequential:
    """Return fastconv's untrained model, with the same weights each time."""
    rng = np.random.default_rng(0)
    layers: list[Any] = []
    for channels, _, width in list(network.stages())[:-1]:
        if width:
            layers += [Conv2d(channels, width, 3, padding=1, layout=layout, rng=rng, dtype=dtype), ReLU()]
        else:
            layers.append(MaxPool2d(2, layout=layout))
    return Sequential(*layers, Flatten(), Linear(network.features, CLASSES, rng=rng, dtype=dtype))


class Step(NamedTuple):
    """One implementation, ready to make one training step after the other."""

    name: str
    call: Callable[[], Any]  #: makes a step, and returns the gradient of the first weights
    to_numpy: Callable[[Any], Array]  #: makes an OIHW array of it
    peer: bool = False  #: whether it is another library's
    chosen: bool = False  #: whether it has the layout that was asked for


def steps(batch: Batch, chosen: str) -> list[Step]:
    """Return fastconv's training step in both layouts."""
    return [step(batch, layout, chosen=layout == chosen) for layout in ("NCHW", "NHWC")]


def step(batch: Batch, layout: str, dtype: Any = np.float32, chosen: bool = False) -> Step:
    """Return fastconv's training step in one layout."""
    model = build(batch.network, layout, dtype)
    if layout == "NHWC":  # the same network: its features are flattened in another order
        channels, height, _ = list(batch.network.stages())[-1]
        name = f"{len(model) - 1}.weight"
        weight = model.params[name].reshape(CLASSES, channels, height, height)
        model.params[name] = np.moveaxis(weight, 1, -1).reshape(CLASSES, -1)
    images = images_to(layout, batch.images).astype(dtype)
    call = partial(_step, model, SGD(model, LEARNING_RATE), images, batch.classes)
    return Step(f"fastconv {layout}", call, _oihw if layout == "NHWC" else np.asarray, chosen=chosen)


def reference(batch: Batch) -> Array:
    """Return the first step's gradient of the first weights in float64, by plain NumPy."""
    with fc.config_context(engine="numpy"):
        gradient: Array = step(batch, "NCHW", np.float64).call()
    return gradient


def _step(model: Sequential, optimizer: SGD, images: Array, classes: Array) -> Array:
    _, grad = cross_entropy(model(images), classes)
    model.backward_params(grad)
    optimizer.step()
    return model.grads["0.weight"]


def _oihw(weight: Array) -> Array:
    return np.moveaxis(weight, (-1, -2), (0, 1))
