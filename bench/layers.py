"""What is measured: the named layers, and the slices of them that naive is timed on."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Sequence
from typing import NamedTuple

from fastconv.dims import ConvDims, PoolDims, conv_dims, per_dimension, pool_dims

Shape = tuple[int, ...]

#: The operations of a convolution that can be measured, and what the registry calls them.
CONV_OPS = {"forward": "conv_forward", "input": "conv_input_grad", "weight": "conv_weight_grad"}


class ConvLayer(NamedTuple):
    """A convolution by name; stride and dilation are the same in every dimension."""

    name: str
    input_size: Shape  #: (N, C, *spatial)
    weight_size: Shape  #: (K, C/groups, *kernel)
    stride: int = 1
    padding: int | Shape = 0
    dilation: int = 1
    groups: int = 1

    @property
    def ops(self) -> dict[str, str]:
        """The operations that can be measured, and what the registry calls them."""
        return CONV_OPS

    @property
    def dims(self) -> ConvDims:
        """The convolution, completely described."""
        return conv_dims(self.input_size, self.weight_size, self.stride, self.padding, self.dilation, self.groups)

    @property
    def output_size(self) -> Shape:
        """(N, K, *spatial)."""
        return self.input_size[0], self.weight_size[0], *self.dims.output_size[-len(self.input_size) + 2 :]

    @property
    def flops(self) -> int:
        """Floating-point operations, the same for each of the three."""
        return self.dims.flops

    @property
    def floats(self) -> int:
        """Array elements that any implementation has to read or write, once each."""
        return sum(map(math.prod, (self.input_size, self.weight_size, self.output_size)))

    @property
    def kernel_size(self) -> Shape:
        """Taps in each dimension."""
        return self.weight_size[2:]

    @property
    def channel_step(self) -> int:
        """By how many output channels the layer can be cut: a group, if there are groups."""
        return self.weight_size[0] // self.groups if self.groups > 1 else 1

    def cut(self, batch: int, channels: int, size: Shape) -> ConvLayer:
        """Return the part of the layer that computes ``channels`` channels of ``batch`` images, ``size`` of each."""
        groups = channels // self.channel_step if self.groups > 1 else 1
        input_size, padding = _cut_input(self, size)
        return self._replace(
            input_size=(batch, self.weight_size[1] * groups, *input_size),
            weight_size=(channels, *self.weight_size[1:]),
            padding=padding,
            groups=groups,
        )


class PoolLayer(NamedTuple):
    """A max pooling by name; kernel and stride are the same in every dimension."""

    name: str
    input_size: Shape  #: (N, C, *spatial)
    kernel: int
    stride: int
    padding: int | Shape = 0

    @property
    def ops(self) -> dict[str, str]:
        """The operations that can be measured, and what the registry calls them."""
        return {"forward": "max_pool_forward", "input": "max_pool_backward"}

    @property
    def dims(self) -> PoolDims:
        """The pooling, completely described."""
        return pool_dims(self.input_size, self.kernel, self.stride, self.padding, 1, False)

    @property
    def output_size(self) -> Shape:
        """(N, C, *spatial)."""
        return *self.input_size[:2], *self.dims.output_size[-len(self.input_size) + 2 :]

    @property
    def flops(self) -> int:
        """None: pooling is counted in bytes."""
        return 0

    @property
    def floats(self) -> int:
        """Array elements that any implementation has to read or write, once each."""
        return math.prod(self.input_size) + math.prod(self.output_size)

    @property
    def dilation(self) -> int:
        """Windows have no holes."""
        return 1

    @property
    def kernel_size(self) -> Shape:
        """Cells in each dimension."""
        return (self.kernel,) * (len(self.input_size) - 2)

    @property
    def channel_step(self) -> int:
        """Channels are independent."""
        return 1

    def cut(self, batch: int, channels: int, size: Shape) -> PoolLayer:
        """Return the part of the layer that computes ``channels`` channels of ``batch`` images, ``size`` of each."""
        input_size, padding = _cut_input(self, size)
        return self._replace(input_size=(batch, channels, *input_size), padding=padding)


Layer = ConvLayer | PoolLayer


def _conv2d(name: str, n: int, c: int, h: int, k: int, kernel: int, stride: int, pad: int, groups: int) -> ConvLayer:
    """Return a square 2-D convolution: N, C, H, K, k, s, p, groups."""
    return ConvLayer(name, (n, c, h, h), (k, c // groups, kernel, kernel), stride, pad, groups=groups)


LAYERS: tuple[Layer, ...] = (
    _conv2d("vgg1_1", 1, 3, 224, 64, 3, 1, 1, 1),
    _conv2d("vgg1_2", 1, 64, 224, 64, 3, 1, 1, 1),
    _conv2d("vgg2_2", 1, 128, 112, 128, 3, 1, 1, 1),
    _conv2d("vgg3_2", 1, 256, 56, 256, 3, 1, 1, 1),
    _conv2d("vgg4_2", 1, 512, 28, 512, 3, 1, 1, 1),
    _conv2d("vgg5_1", 1, 512, 14, 512, 3, 1, 1, 1),
    _conv2d("resnet_conv1", 1, 3, 224, 64, 7, 2, 3, 1),
    _conv2d("resnet2_1x1", 1, 64, 56, 256, 1, 1, 0, 1),
    _conv2d("resnet2_3x3", 1, 64, 56, 64, 3, 1, 1, 1),
    _conv2d("resnet3_3x3", 1, 128, 28, 128, 3, 1, 1, 1),
    _conv2d("resnet4_3x3", 1, 256, 14, 256, 3, 1, 1, 1),
    _conv2d("resnet5_3x3", 1, 512, 7, 512, 3, 1, 1, 1),
    _conv2d("resnet4_1x1", 1, 1024, 14, 256, 1, 1, 0, 1),
    _conv2d("resnet3_s2", 1, 128, 56, 128, 3, 2, 1, 1),
    _conv2d("mobilenet_dw112", 1, 32, 112, 32, 3, 1, 1, 32),
    _conv2d("mobilenet_dw14", 1, 512, 14, 512, 3, 1, 1, 512),
    _conv2d("lenet1", 32, 1, 28, 6, 5, 1, 2, 1),
    _conv2d("lenet2", 32, 6, 14, 16, 5, 1, 0, 1),
    _conv2d("cifar", 32, 32, 32, 32, 3, 1, 1, 1),
    _conv2d("digits", 64, 1, 8, 16, 3, 1, 1, 1),
    # 1-D: first layer of M5 (arXiv 1610.00087), a feature layer of wav2vec 2.0 (2006.11477), a TCN block (1803.01271).
    ConvLayer("audio_m5", (4, 1, 16000), (128, 1, 80), stride=4),
    ConvLayer("audio_wav2vec", (1, 512, 1599), (512, 512, 3), stride=2),
    ConvLayer("audio_tcn", (8, 64, 1024), (64, 64, 3), padding=8, dilation=8),
    # 3-D: first layer of C3D (arXiv 1412.0767), a block of 3D U-Net (1606.06650).
    ConvLayer("volume_c3d", (1, 3, 16, 112, 112), (64, 3, 3, 3, 3), padding=1),
    ConvLayer("volume_unet", (1, 32, 32, 32, 32), (32, 32, 3, 3, 3), padding=1),
    PoolLayer("pool_2x2", (8, 64, 112, 112), kernel=2, stride=2),
    PoolLayer("pool_3x3_s2", (8, 64, 112, 112), kernel=3, stride=2, padding=1),
    # AlexNet's second pool, one in front of a 1x1 convolution in an Inception block, and VGG's last.
    PoolLayer("pool_alexnet2", (1, 192, 27, 27), kernel=3, stride=2),
    PoolLayer("pool_inception3", (1, 192, 28, 28), kernel=3, stride=1, padding=1),
    PoolLayer("pool_vgg5", (1, 512, 14, 14), kernel=2, stride=2),
    PoolLayer("pool_audio", (4, 128, 3981), kernel=4, stride=4),
    PoolLayer("pool_volume", (1, 64, 16, 56, 56), kernel=2, stride=2),
)


def find_layers(patterns: str) -> tuple[Layer, ...]:
    """Return the layers that any of the comma-separated names or globs names, in the order of ``LAYERS``.

    Raises
    ------
    ValueError
        For a name or glob that fits no layer; it suggests the closest name and lists all.
    """
    names = [layer.name for layer in LAYERS]
    wanted: set[str] = set()
    for pattern in split_words(patterns):
        found = fnmatch.filter(names, pattern)
        if not found:
            close = difflib.get_close_matches(pattern, names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"no layer is called {pattern!r}; {hint}There are {', '.join(names)}")
        wanted.update(found)
    return tuple(layer for layer in LAYERS if layer.name in wanted)


def split_words(text: str) -> list[str]:
    """Return the comma-separated words of ``text``; ValueError if there are none."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError("expected one or more names, separated by commas")
    return words


def slice_layer(layer: Layer, outputs: int) -> Layer:
    """Return the layer, or a slice of about ``outputs`` output elements at most: fewer images, channels and rows.

    A slice keeps whole rows and the whole reduction of each output element, so that the time goes with the number of
    outputs. It is cut from inside the image: where rows were cut off there is no padding.
    """
    batch, channels, *size = layer.output_size
    if math.prod(layer.output_size) <= outputs:
        return layer
    step = layer.channel_step
    kept = _shrink([batch, channels // step, *size[:-1]], outputs // (step * size[-1]))
    return layer.cut(kept[0], kept[1] * step, (*kept[2:], size[-1]))


def _shrink(sizes: Sequence[int], product: int) -> list[int]:
    """Return ``sizes`` made smaller, from the front, until their product is at most ``product`` or all are 1."""
    return [max(1, min(n, product // math.prod(sizes[i + 1 :]))) for i, n in enumerate(sizes)]


def _cut_input(layer: Layer, size: Shape) -> tuple[Shape, Shape]:
    """Return the size of the input that a block of ``size`` output elements sees, and its padding."""
    spatial = len(size)
    paddings = per_dimension(layer.padding, spatial, "padding", 0)
    input_size, padding = [], []
    for i in range(spatial):
        whole = size[i] == layer.output_size[2 + i]
        seen = (size[i] - 1) * layer.stride + layer.dilation * (layer.kernel_size[i] - 1) + 1
        input_size.append(layer.input_size[2 + i] if whole else seen)
        padding.append(paddings[i] if whole else 0)
    return tuple(input_size), tuple(padding)
