"""Layers: parameters, one line of forward and a few of backward.

==============================================  ========================================================
``Conv1d`` ``Conv2d`` ``Conv3d``                filters with weights
``ConvTranspose2d``                             their transpose: the gradient of a convolution's input
``MaxPool1d`` ``MaxPool2d`` ``MaxPool3d``       the maximum of each window
``AvgPool2d`` ``MaxBlurPool2d``                 the mean of each window; the maximum, blurred and subsampled
``Linear``                                      fully connected: a convolution of one tap
``ReLU`` ``Softmax`` ``Flatten``                what a network needs around them, in plain NumPy
``Sequential``                                  one layer after the other
==============================================  ========================================================

The data's way through a layer, and back::

    input ------> forward ------> output
                     |  keeps what backward needs (in training mode only)
                     v
    grad_input <- backward <----- grad_output
                     |
                     v
                   grads, by the names of params

To add a layer: one class here. Give its arrays to ``Layer.__init__``; write ``forward``, ``backward`` and
``output_shape``.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, overload

import numpy as np
from numpy.typing import DTypeLike

from . import functional, grad
from .arrays import DTYPES, check_array, check_same_dtype, first_shape
from .buffers import Buffers, Packed, empty, keep, reuse
from .dims import Padding, channels_last, conv_dims, conv_transpose_shape, integer, per_dimension, pool_dims
from .functional import Array, Ints
from .registry import elementwise
from .runtime import check_engine, get_config

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "AvgPool2d", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Flatten", "Layer", "Linear", "MaxBlurPool2d",
    "MaxPool1d", "MaxPool2d", "MaxPool3d", "ReLU", "Sequential", "Softmax",
]  # fmt: skip

Seed = int | np.random.Generator | None
Shape = tuple[int, ...]

_ANY_SIZE = 2**31 - 1  # larger than any window: for checking a layer's arguments before it has met an input


class Params(dict[str, Array]):
    """The parameters of a layer by name; assigning copies into the array, so that a captured one stays the live one."""

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, *others: Any, **values: Any) -> None:
        """Assign several; nothing is assigned unless everything fits."""
        checked = [(self._live(name), self._fitting(name, value)) for name, value in dict(*others, **values).items()]
        for param, value in checked:
            np.copyto(param, value, casting="same_kind")

    def __ior__(self, others: Any) -> Self:  # type: ignore[override, misc]
        self.update(others)
        return self

    def setdefault(self, name: str, default: Any = None) -> Array:
        """Return a parameter; it has a value, and there can be no other ones."""
        return self._live(name)

    def _live(self, name: str) -> Array:
        """Return the array of a parameter, or say which ones there are."""
        if name not in self:
            raise KeyError(f"there is no parameter {name!r}; there are {', '.join(map(repr, self)) or 'none'}")
        return self[name]

    def _fitting(self, name: str, given: Any) -> Array:
        """Return a value as an array that can be assigned to a parameter, or say what is wrong with it."""
        param, value = self[name], np.asarray(given)
        if value.shape != param.shape:
            raise ValueError(f"params[{name!r}] must have shape {param.shape}, got {value.shape}")
        if not np.can_cast(value.dtype, param.dtype, "same_kind"):
            raise TypeError(f"params[{name!r}] must be real numbers, got dtype {value.dtype}")
        if not param.flags.writeable:
            raise ValueError(f"params[{name!r}] is read-only in eval mode; call train() first")
        return value

    def _refuse(self, *names: Any) -> NoReturn:
        raise TypeError("params must keep all their arrays: a layer computes with them; assign values instead")

    __delitem__ = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[type[Params], tuple[dict[str, Array]]]:
        return Params, (dict(self),)  # copy and pickle would assign to names that are not there yet


class Layer:
    """What all layers have in common.

    Attributes
    ----------
    params : dict of str to ndarray
        The parameters by name. They change in place, always: an array taken from here stays the live one.
    training : bool
        Whether ``forward`` keeps what ``backward`` needs. A new layer is in training mode.
    options : dict
        Keywords for every convolution and pooling that this layer computes: ``engine``, ``algorithm``. Empty at first.
    """

    def __init__(self, **params: Array | None) -> None:
        self.params = Params({name: param for name, param in params.items() if param is not None})
        self.training = True
        self.options: dict[str, Any] = {}
        self._grads: dict[str, Array] = {}
        self._kept: Any = None

    @property
    def grads(self) -> dict[str, Array]:
        """The gradients of the last ``backward``, by the names of ``params``; the next ``backward`` overwrites them."""
        return self._grads

    @property
    def sample_ndim(self) -> int | None:
        """Number of dimensions of an input without a batch axis; None where the layer takes it for a batch."""
        return None

    def forward(self, input: Array) -> Array:
        """Return the output of the layer."""
        raise NotImplementedError

    def backward(self, grad_output: Array) -> Array:
        """Set ``grads`` and return the gradient of the input of the last ``forward``."""
        raise NotImplementedError

    def backward_params(self, grad_output: Array) -> None:
        """Set ``grads`` as ``backward`` does, for a first layer: nobody asks for the gradient of its input."""
        self.backward(grad_output)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return the shape that ``forward`` gives for an input of shape ``input_shape``, batch included."""
        raise NotImplementedError

    def __call__(self, input: Array) -> Array:
        return self.forward(input)

    def train(self) -> Self:
        """Switch to training mode: ``forward`` keeps what ``backward`` needs, ``params`` are writable. Return self."""
        for param in self.params.values():
            param.setflags(write=True)
        self.training = True
        return self

    def eval(self) -> Self:
        """Switch to evaluation mode: nothing is kept for ``backward``, ``params`` are read-only. Return self."""
        for param in self.params.values():
            param.setflags(write=False)
        self.training = False
        self._kept = None
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy, or what was unpickled, whose arrays have whatever flags, and may never be writable again."""
        self.__dict__.update(state)
        self.params = Params({name: param.copy("K") for name, param in self.params.items()})
        for param in self.params.values():
            param.setflags(write=self.training)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``params`` to a file.

        Parameters
        ----------
        path : str or path-like
            Ending in ``.npz``, or in ``.safetensors`` (which needs the package of that name).

        Raises
        ------
        ValueError
            For another ending.
        """
        if _suffix(path) == ".npz":
            np.savez(path, allow_pickle=False, **self.params)
        else:
            _safetensors().save_file({name: np.ascontiguousarray(param) for name, param in self.params.items()}, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Copy a file that ``save`` wrote into ``params``; nothing is copied unless everything fits.

        Parameters
        ----------
        path : str or path-like
            Ending in ``.npz`` or ``.safetensors``. Neither form can run code: pickles are refused.

        Raises
        ------
        ValueError
            If names, shapes or dtypes differ from those of ``params``, for another ending, or for a damaged file.
        """
        arrays = _read_npz(path) if _suffix(path) == ".npz" else _read_safetensors(path)
        _check_same(arrays, self.params, os.fspath(path))
        training = self.training
        self.train().params.update(arrays)
        if not training:
            self.eval()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._arguments()})"

    def _arguments(self) -> str:
        return ""

    def _keep(self, *values: Any) -> None:
        self._kept = values if self.training else None

    def _recall(self) -> tuple[Any, ...]:
        if self._kept is None:
            name = type(self).__name__
            raise RuntimeError(f"{name}.backward needs a {name}.forward in training mode before it (see Layer.train)")
        kept: tuple[Any, ...] = self._kept
        return kept


class _Weighted(Layer):
    """What convolutions and `Linear` share: packed weights in evaluation mode, an activation, gradients in one call."""

    def forward(self, input: Array) -> Array:
        return self.activated(input, None)

    def activated(self, input: Array, activation: str | None) -> Array:
        """Return the output after an activation, which is computed where it is stored; it has a backward of its own."""
        self._kept = None  # a call that fails leaves nothing to differentiate
        with keep(None if self.training else self._packed):
            output = self._convolve(input, activation)
        self._keep(input)
        return output

    def backward(self, grad_output: Array) -> Array:
        grad_input: Array = self._backward(grad_output, ("input", *self.params))
        return grad_input

    def backward_params(self, grad_output: Array) -> None:
        self._backward(grad_output, tuple(self.params))

    def train(self) -> Self:
        self._packed = Packed()
        return super().train()

    def eval(self) -> Self:
        self._packed = Packed()  # filled by the first call that has a use for it
        return super().eval()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._packed = Packed()

    def _convolve(self, input: Array, activation: str | None) -> Array:
        raise NotImplementedError

    def _backward(self, grad_output: Array, needs: tuple[str, ...]) -> Any:
        """Set ``grads`` and return the gradient of the input if ``needs`` names it."""
        raise NotImplementedError


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix
    if suffix not in (".npz", ".safetensors"):
        raise ValueError(f"path must end in .npz or .safetensors, got {os.fspath(path)!r}")
    return suffix


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("a .safetensors file needs safetensors: pip install safetensors (or use .npz)") from error
    return safetensors.numpy


def _read_npz(path: str | os.PathLike[str]) -> dict[str, Array]:
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file):  # NumPy takes all other files for pickles, and says how to load those
                file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return dict(archive)
        except _UNREADABLE as error:
            reason = "it holds a pickle" if "allow_pickle" in str(error) else error or type(error).__name__
            raise ValueError(f"{os.fspath(path)} is no .npz file of arrays, or is damaged: {reason}") from None


#: What NumPy, zipfile and zlib raise for files that they can't make sense of.
_UNREADABLE = (
    ValueError, TypeError, KeyError, EOFError, OSError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error
)  # fmt: skip


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, Array]:
    numpy_form = _safetensors()
    from safetensors import SafetensorError

    try:
        arrays: dict[str, Array] = numpy_form.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is no .safetensors file, or is damaged: {error}") from None
    return arrays


def _check_same(arrays: Mapping[str, Array], params: Mapping[str, Array], path: str) -> None:
    """Raise ValueError unless ``arrays`` from ``path`` have the names, shapes and dtypes of ``params``."""
    if arrays.keys() != params.keys():
        raise ValueError(
            f"{path} does not fit this model: it lacks {sorted(params.keys() - arrays.keys())} "
            f"and has {sorted(arrays.keys() - params.keys())} too many"
        )
    for name, param in params.items():
        if (arrays[name].shape, arrays[name].dtype) != (param.shape, param.dtype):
            raise ValueError(
                f"{path} does not fit this model: {name!r} must be {param.dtype} of shape {param.shape}, "
                f"got {arrays[name].dtype} of shape {arrays[name].shape}"
            )


def _uniform(
    rng: Seed, weight_shape: Sequence[int], fan_in: int, bias: int, dtype: DTypeLike
) -> tuple[Array, Array | None]:
    """Return weights and ``bias`` biases (None for 0) as PyTorch draws them.

    That is the rule of He et al., arXiv 1502.01852, for a leaky ReLU of slope sqrt(5): uniform within 1 / sqrt(fan_in).
    """
    if np.dtype(dtype) not in DTYPES:
        raise TypeError(f"dtype must be float32 or float64, got {np.dtype(dtype)}")
    bound, generator = 1 / math.sqrt(fan_in), np.random.default_rng(rng)
    weight = generator.uniform(-bound, bound, weight_shape).astype(dtype)
    return weight, generator.uniform(-bound, bound, bias).astype(dtype) if bias else None


# ---------------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------------


class _Windowed(Layer):
    """What convolutions and poolings share: layout, geometry (stride and the like), inputs with or without a batch."""

    spatial: ClassVar[int]

    def __init__(self, layout: str, geometry: dict[str, Any], **params: Array | None) -> None:
        super().__init__(**params)
        self.layout = layout
        self._last = channels_last(layout)
        self._geometry = geometry

    def _how(self) -> dict[str, Any]:
        """Return the keywords that a call of ``functional`` and its gradient share."""
        return {**self._geometry, "layout": self.layout, **self.options}

    @property
    def sample_ndim(self) -> int | None:
        return self.spatial + 1

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        shape = tuple(input_shape)
        if len(shape) == self.spatial + 1:
            return self.output_shape((1, *shape))[1:]
        if len(shape) != self.spatial + 2:
            wanted = f"{self.spatial + 2} dimensions (or {self.spatial + 1} without a batch)"
            raise ValueError(f"input_shape must have {wanted}, got {shape}")
        batch, channels, *size = self._output_shape(first_shape(shape, self.spatial, self._last))
        return (batch, *size, channels) if self._last else (batch, channels, *size)

    def _output_shape(self, shape: Shape) -> Shape:
        """Return the output's (N, C, *spatial) from the input's."""
        raise NotImplementedError


class _Filters(_Windowed):
    """A filter bank: what `Conv2d`, its siblings and `ConvTranspose2d` share."""

    def __init__(
        self,
        channels: tuple[int, int],
        weight_channels: tuple[int, int],
        kernel_size: Ints,
        geometry: dict[str, Any],
        bias: bool,
        layout: str,
        rng: Seed,
        dtype: DTypeLike,
    ) -> None:
        kernel = per_dimension(kernel_size, self.spatial, "kernel_size", 1)
        fan_in = weight_channels[1] * math.prod(kernel)
        weight, shift = _uniform(rng, weight_channels + kernel, fan_in, channels[1] if bias else 0, dtype)
        if channels_last(layout):  # (K, C, *kernel) -> (*kernel, C, K)
            weight = np.ascontiguousarray(np.moveaxis(weight, (1, 0), (-2, -1)))
        super().__init__(layout, geometry, weight=weight, bias=shift)
        self._first_weight_shape = weight_channels + kernel
        self._signature = (*channels, kernel if len(set(kernel)) > 1 else kernel[0])
        self._output_shape((1, channels[0], *(_ANY_SIZE,) * self.spatial))  # a wrong stride or padding is told now

    def _arguments(self) -> str:
        return ", ".join(map(str, self._signature))


class _Conv(_Weighted, _Filters):
    """What `Conv2d` and its siblings share."""

    _conv: ClassVar[Callable[..., Array]]
    _gradients: ClassVar[Callable[..., Any]]  #: returns a ConvGradients

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        layout: str = "NCHW",
        rng: Seed = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        channels = _grouped_channels(in_channels, out_channels, groups)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        super().__init__(
            channels, (channels[1], channels[0] // groups), kernel_size, geometry, bias, layout, rng, dtype
        )

    def _convolve(self, input: Array, activation: str | None) -> Array:
        return self._conv(input, **self.params, activation=activation, **self._how())

    def _backward(self, grad_output: Array, needs: tuple[str, ...]) -> Any:
        (input,) = self._recall()
        grads = self._gradients(input, self.params["weight"], grad_output, needs=needs, **self._how())
        self._grads = {name: getattr(grads, name) for name in self.params}
        return grads.input

    def _output_shape(self, shape: Shape) -> Shape:
        dims = conv_dims(shape, self._first_weight_shape, **self._geometry)
        return (dims.batch, dims.out_channels, *dims.output_size[3 - self.spatial :])


def _grouped_channels(in_channels: int, out_channels: int, groups: int) -> tuple[int, int]:
    """Return the two numbers of channels if ``groups`` divides them."""
    channels = integer(in_channels, "in_channels", 1), integer(out_channels, "out_channels", 1)
    if any(number % integer(groups, "groups", 1) for number in channels):
        raise ValueError(
            f"groups must divide in_channels and out_channels, got {groups} for {channels[0]} and {channels[1]}"
        )
    return channels


class Conv1d(_Conv):
    """Filter bank for signals; weights (K, C/groups, k), or (k, C/groups, K) in layout "NHWC". See `Conv2d`.

    Examples
    --------
    >>> import fastconv as fc
    >>> fc.layers.Conv1d(1, 8, 5, padding="same").output_shape((2, 1, 100))
    (2, 8, 100)
    """

    spatial = 1
    _conv = staticmethod(functional.conv1d)
    _gradients = staticmethod(grad.conv1d)


class Conv2d(_Conv):
    """Filter bank for images. In evaluation mode its weights are packed for the kernels only once.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of the input; number of filters.
    kernel_size, stride, padding, dilation, groups
        As in `fastconv.conv2d`.
    bias : bool
        Whether each filter has a bias.
    layout : {"NCHW", "NHWC"}
        Of input and output, (N, C, H, W) or (N, H, W, C).
    rng : int or numpy.random.Generator, optional
        Where the weights are drawn from. The same seed gives the same filters in either layout.
    dtype : {float32, float64}
        Of the weights, and so of the input.

    Attributes
    ----------
    params, grads : dict
        ``weight``, (K, C/groups, KH, KW), or (KH, KW, C/groups, K) in layout "NHWC"; ``bias``, (K,).

    Raises
    ------
    ValueError, TypeError
        For arguments that no input would fit.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> layer = fc.layers.Conv2d(3, 16, 3, padding=1, rng=0)
    >>> layer(np.zeros((8, 3, 32, 32), np.float32)).shape
    (8, 16, 32, 32)
    >>> layer.backward(np.zeros((8, 16, 32, 32), np.float32)).shape
    (8, 3, 32, 32)
    >>> layer.grads["weight"].shape
    (16, 3, 3, 3)
    """

    spatial = 2
    _conv = staticmethod(functional.conv2d)
    _gradients = staticmethod(grad.conv2d)


class Conv3d(_Conv):
    """Filter bank for volumes; weights (K, C/groups, KD, KH, KW), or with K last in layout "NHWC". See `Conv2d`.

    Examples
    --------
    >>> import fastconv as fc
    >>> fc.layers.Conv3d(1, 8, 3, stride=2).output_shape((2, 1, 9, 9, 9))
    (2, 8, 4, 4, 4)
    """

    spatial = 3
    _conv = staticmethod(functional.conv3d)
    _gradients = staticmethod(grad.conv3d)


class ConvTranspose2d(_Filters):
    """Transposed filter bank for images: with a stride, it enlarges them.

    Arguments have PyTorch's names and order, see `fastconv.conv_transpose2d`; layout, rng and dtype are as in `Conv2d`.

    Attributes
    ----------
    params, grads : dict
        ``weight``, (C, K/groups, KH, KW), or (KH, KW, K/groups, C) in layout "NHWC"; ``bias``, (K,).

    Examples
    --------
    >>> import fastconv as fc
    >>> fc.layers.ConvTranspose2d(8, 3, 2, stride=2).output_shape((1, 8, 16, 16))
    (1, 3, 32, 32)
    """

    spatial = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints = 0,
        output_padding: Ints = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Ints = 1,
        *,
        layout: str = "NCHW",
        rng: Seed = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        channels = _grouped_channels(in_channels, out_channels, groups)
        geometry = {
            "stride": stride, "padding": padding, "output_padding": output_padding, "groups": groups,
            "dilation": dilation,
        }  # fmt: skip
        super().__init__(
            channels, (channels[0], channels[1] // groups), kernel_size, geometry, bias, layout, rng, dtype
        )

    def forward(self, input: Array) -> Array:
        self._keep(input)
        return functional.conv_transpose2d(input, self.params["weight"], self.params.get("bias"), **self._how())

    def backward(self, grad_output: Array) -> Array:
        self.backward_params(grad_output)
        (input,) = self._recall()
        return grad.conv_transpose2d_input(input.shape, self.params["weight"], grad_output, **self._how())

    def backward_params(self, grad_output: Array) -> None:
        (input,) = self._recall()
        size = self.params["weight"].shape
        self._grads["weight"] = grad.conv_transpose2d_weight(input, size, grad_output, **self._how())
        if "bias" in self.params:
            channels_first = np.moveaxis(grad_output, -1 if self._last else -3, 0)
            self._grads["bias"] = channels_first.sum(axis=tuple(range(1, grad_output.ndim)))

    def _output_shape(self, shape: Shape) -> Shape:
        return conv_transpose_shape(shape, self._first_weight_shape, **self._geometry)


# ---------------------------------------------------------------------------------------------------------------------
# Fully connected
# ---------------------------------------------------------------------------------------------------------------------


class Linear(_Weighted):
    """Fully connected: y = x W^T + b.

    It is a convolution of one tap, and computed as one: a row is a pixel, a feature is a channel. In evaluation mode
    its weights are packed for the kernels only once.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last axis of input and output.
    bias : bool
        Whether there is a b.
    rng, dtype
        As in `Conv2d`.

    Attributes
    ----------
    params, grads : dict
        ``weight``, (out_features, in_features); ``bias``, (out_features,).

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.layers.Linear(256, 10, rng=0)(np.zeros((64, 256), np.float32)).shape
    (64, 10)
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, rng: Seed = None, dtype: DTypeLike = np.float32
    ) -> None:
        outputs, inputs = integer(out_features, "out_features", 1), integer(in_features, "in_features", 1)
        weight, shift = _uniform(rng, (outputs, inputs), inputs, outputs if bias else 0, dtype)
        super().__init__(weight=weight, bias=shift)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        outputs, inputs = self.params["weight"].shape
        if not input_shape or input_shape[-1] != inputs:
            raise ValueError(f"input must have {inputs} features in its last axis, got shape {tuple(input_shape)}")
        return (*input_shape[:-1], outputs)

    def _convolve(self, input: Array, activation: str | None) -> Array:
        weight = self.params["weight"]
        check_same_dtype(check_array(input, "input"), "input", weight, "weight")
        shape = self.output_shape(input.shape)
        pixels, taps = _as_pixels(input), weight.T[None]  # (1, rows, in), (1, in, out)
        how = {"activation": activation, "layout": "NHWC", **self.options}
        return functional.conv1d(pixels, taps, self.params.get("bias"), **how).reshape(shape)

    def _backward(self, grad_output: Array, needs: tuple[str, ...]) -> Any:
        (input,) = self._recall()
        weight = self.params["weight"]
        grad_output = _like_output(grad_output, self.output_shape(input.shape), weight.dtype)
        rows, pixels = _as_pixels(grad_output), _as_pixels(input)
        how = {"layout": "NHWC", **self.options}
        self._grads = {"weight": grad.conv1d_weight(rows, (1, *weight.shape), pixels, **how)[0]}  # (out, in), in place
        if "bias" in self.params:
            self._grads["bias"] = rows[0].sum(axis=0) if rows.size else np.zeros_like(self.params["bias"])
        if "input" in needs:
            return grad.conv1d_input(pixels.shape, weight.T[None], rows, **how).reshape(input.shape)
        return None

    def _arguments(self) -> str:
        outputs, inputs = self.params["weight"].shape
        return f"{inputs}, {outputs}"


def _as_pixels(rows: Array) -> Array:
    """Return (..., features) as one signal, channels last; a signal without pixels can't be, no signals can."""
    return rows.reshape((1, -1, rows.shape[-1]) if rows.size else (0, 1, rows.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# Pooling
# ---------------------------------------------------------------------------------------------------------------------


class _Pool(_Windowed):
    def __init__(self, layout: str, geometry: dict[str, Any]) -> None:
        super().__init__(layout, geometry)
        self._output_shape((1, 1, *(_ANY_SIZE,) * self.spatial))  # a wrong stride or padding is told now

    def _arguments(self) -> str:
        return str(self._geometry["kernel_size"])


class _Maximum(_Pool):
    """A pooling that keeps its winners for ``backward``."""

    _pool: ClassVar[Callable[..., Any]]
    _pool_grad: ClassVar[Callable[..., Array]]

    def forward(self, input: Array) -> Array:
        if not self.training:
            maxima: Array = self._pool(input, **self._how())
            return maxima
        output: Array
        output, winners = self._pool(input, return_indices="compact", **self._how())
        self._keep(input.shape, winners, output.dtype)
        return output

    def backward(self, grad_output: Array) -> Array:
        input_shape, winners, dtype = self._recall()
        return self._pool_grad(input_shape, winners, _of_type(grad_output, dtype), **self._how())


class _MaxPool(_Maximum):
    def __init__(
        self,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Ints = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
        *,
        layout: str = "NCHW",
    ) -> None:
        geometry = {
            "kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation,
            "ceil_mode": ceil_mode,
        }  # fmt: skip
        super().__init__(layout, geometry)

    def _output_shape(self, shape: Shape) -> Shape:
        dims = pool_dims(shape, **self._geometry)
        return (dims.batch, dims.channels, *dims.output_size[3 - self.spatial :])


class MaxPool1d(_MaxPool):
    """The maximum of each window of a signal. See `MaxPool2d`.

    Examples
    --------
    >>> import fastconv as fc
    >>> fc.layers.MaxPool1d(2).output_shape((1, 8, 100))
    (1, 8, 50)
    """

    spatial = 1
    _pool = staticmethod(functional.max_pool1d)
    _pool_grad = staticmethod(grad.max_pool1d)


class MaxPool2d(_MaxPool):
    """The maximum of each window of an image.

    Parameters
    ----------
    kernel_size, stride, padding, dilation, ceil_mode
        As in `fastconv.max_pool2d`.
    layout : {"NCHW", "NHWC"}
        Of input and output.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.layers.MaxPool2d(2)(np.array([[[[1.0, 2.0], [4.0, 3.0]]]]))
    array([[[[4.]]]])
    """

    spatial = 2
    _pool = staticmethod(functional.max_pool2d)
    _pool_grad = staticmethod(grad.max_pool2d)


class MaxPool3d(_MaxPool):
    """The maximum of each window of a volume. See `MaxPool2d`.

    Examples
    --------
    >>> import fastconv as fc
    >>> fc.layers.MaxPool3d(3, stride=2).output_shape((1, 8, 9, 9, 9))
    (1, 8, 4, 4, 4)
    """

    spatial = 3
    _pool = staticmethod(functional.max_pool3d)
    _pool_grad = staticmethod(grad.max_pool3d)


class AvgPool2d(_Pool):
    """The mean of each window of an image; arguments as in `fastconv.avg_pool2d`.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.layers.AvgPool2d(2)(np.array([[[[1.0, 2.0], [4.0, 3.0]]]]))
    array([[[[2.5]]]])
    """

    spatial = 2

    def __init__(
        self,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Ints = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        layout: str = "NCHW",
    ) -> None:
        geometry = {
            "kernel_size": kernel_size, "stride": stride, "padding": padding, "ceil_mode": ceil_mode,
            "count_include_pad": count_include_pad, "divisor_override": divisor_override,
        }  # fmt: skip
        functional.check_average(count_include_pad, divisor_override)
        super().__init__(layout, geometry)

    def forward(self, input: Array) -> Array:
        output = functional.avg_pool2d(input, **self._how())
        self._keep(input.shape, output.dtype)
        return output

    def backward(self, grad_output: Array) -> Array:
        input_shape, dtype = self._recall()
        return grad.avg_pool2d(input_shape, _of_type(grad_output, dtype), **self._how())

    def _output_shape(self, shape: Shape) -> Shape:
        window = {name: self._geometry[name] for name in ("kernel_size", "stride", "padding", "ceil_mode")}
        dims = pool_dims(shape, dilation=1, **window)
        return (dims.batch, dims.channels, *dims.output_size[1:])


class MaxBlurPool2d(_Maximum):
    """Anti-aliased max pooling of an image (arXiv 1904.11486); arguments as in `fastconv.max_blur_pool2d`.

    Examples
    --------
    >>> import fastconv as fc
    >>> fc.layers.MaxBlurPool2d(2, 2).output_shape((1, 8, 32, 32))
    (1, 8, 16, 16)
    """

    spatial = 2
    _pool = staticmethod(functional.max_blur_pool2d)
    _pool_grad = staticmethod(grad.max_blur_pool2d)

    def __init__(self, kernel_size: Ints, stride: Ints, filter_size: int = 3, *, layout: str = "NCHW") -> None:
        super().__init__(layout, {"kernel_size": kernel_size, "stride": stride, "filter_size": filter_size})

    def _output_shape(self, shape: Shape) -> Shape:
        batch, channels, *size = shape
        plan = functional.blur_plan(
            (batch, channels, *size), dtype=np.dtype(np.float32), last=self._last, **self._geometry
        )
        return (batch, channels, *plan.blur.output_size[1:])


# ---------------------------------------------------------------------------------------------------------------------
# What a network needs around them
# ---------------------------------------------------------------------------------------------------------------------


def _is_array(value: object, name: str) -> Array:
    """Return an array of any type; TypeError says what else came."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a numpy.ndarray, got {type(value).__name__}")
    return value


def _of_type(grad_output: object, dtype: np.dtype[Any]) -> Array:
    """Return a gradient if it has the type of the output, in whatever byte order."""
    gradient = _is_array(grad_output, "grad_output")
    if gradient.dtype != dtype and gradient.dtype.newbyteorder("=") != dtype.newbyteorder("="):
        raise TypeError(f"grad_output must have the dtype of the output, {dtype}, got {gradient.dtype}")
    return gradient


def _like_output(grad_output: object, shape: Shape, dtype: np.dtype[Any]) -> Array:
    """Return a gradient if it has shape and type of the output: nothing is broadcast."""
    gradient = _of_type(grad_output, dtype)
    if gradient.shape != shape:
        raise ValueError(f"grad_output must have the shape of the output, {shape}, got {gradient.shape}")
    return gradient


class ReLU(Layer):
    """max(x, 0), element by element; the derivative at 0 is 0, as in section 9.4.1 of the lecture notes.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.layers.ReLU()(np.array([[-1.0, 2.0]]))
    array([[0., 2.]])
    """

    def forward(self, input: Array) -> Array:
        input = _is_array(input, "input")
        output: Array = np.maximum(input, 0, out=empty(input.shape, input.dtype))
        self._keep(output)
        return output

    def backward(self, grad_output: Array) -> Array:
        (output,) = self._recall()
        grad_output = _like_output(grad_output, output.shape, output.dtype)
        grad_input = empty(grad_output.shape, grad_output.dtype)
        plain = _are_plain(output, grad_output)
        engine = check_engine(self.options.get("engine")) or get_config().engine
        kernel = elementwise("relu_backward", engine if plain else "numpy")
        kernel(output, grad_output, grad_input, functional.options())
        return grad_input

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        return tuple(input_shape)


def _are_plain(*arrays: Array) -> bool:
    """Whether arrays have one shape, one type that kernels compute, and are contiguous."""
    first = arrays[0]
    return first.dtype in DTYPES and all(
        array.flags.carray and array.dtype == first.dtype and array.shape == first.shape for array in arrays
    )


class Softmax(Layer):
    """exp(x) / sum(exp(x)) along one axis, computed from x - max(x), which does not overflow.

    To train a classifier use `fastconv.losses.cross_entropy` on the input of this layer: it is faster and more exact.

    Parameters
    ----------
    dim : int
        The axis.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> fc.layers.Softmax()(np.array([[1000.0, 1000.0]]))
    array([[0.5, 0.5]])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Array) -> Array:
        input = _is_array(input, "input")
        if not input.ndim:
            raise ValueError(f"input must have an axis {self.dim}, got shape ()")
        output: Array = np.exp(input - input.max(self.dim, keepdims=True))
        output /= output.sum(self.dim, keepdims=True)
        self._keep(output)
        return output

    def backward(self, grad_output: Array) -> Array:
        (output,) = self._recall()
        grad_output = _like_output(grad_output, output.shape, output.dtype)
        # The Jacobian is diag(y) - y y^T.
        grad_input: Array = output * (grad_output - (output * grad_output).sum(self.dim, keepdims=True))
        return grad_input

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        return tuple(input_shape)


class Flatten(Layer):
    """(N, ...) to (N, features).

    Examples
    --------
    >>> import fastconv as fc
    >>> fc.layers.Flatten().output_shape((64, 16, 4, 4))
    (64, 256)
    """

    def forward(self, input: Array) -> Array:
        input = _is_array(input, "input")
        output = input.reshape(self.output_shape(input.shape))
        self._keep(input.shape, input.dtype)
        return output

    def backward(self, grad_output: Array) -> Array:
        input_shape, dtype = self._recall()
        return _like_output(grad_output, self.output_shape(input_shape), dtype).reshape(input_shape)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        if not input_shape:
            raise ValueError("input must have a batch axis, got shape ()")
        return (input_shape[0], math.prod(input_shape[1:]))


class Sequential(Layer):
    """One layer after the other.

    Parameters
    ----------
    *layers : Layer
        In the order of ``forward``, each only once. ``model[i]`` is a layer, ``model[i:j]`` a Sequential of some.

    Attributes
    ----------
    params, grads : dict
        Those of all layers, named ``"0.weight"``, ``"0.bias"``, ... by the layer's position.

    Raises
    ------
    TypeError, ValueError
        For something that is no layer, or a layer that occurs twice.

    Examples
    --------
    >>> import numpy as np, fastconv as fc
    >>> from fastconv.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential
    >>> model = Sequential(Conv2d(1, 8, 3, padding=1), ReLU(), MaxPool2d(2), Flatten(), Linear(8 * 4 * 4, 10))
    >>> model(np.zeros((64, 1, 8, 8), np.float32)).shape
    (64, 10)
    >>> list(model.params)
    ['0.weight', '0.bias', '4.weight', '4.bias']
    """

    def __init__(self, *layers: Layer) -> None:
        for position, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"layers[{position}] must be a Layer, got {type(layer).__name__}")
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError("layers must be different objects: each keeps one forward for one backward, got one twice")
        super().__init__(**_joined(layers))
        self.layers = layers
        self._order = _relu_after_pool(layers)
        self._fused = _convolved_relus(layers)
        self._buffers = Buffers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.params = Params(_joined(self.layers))  # the layers' own

    @property
    def grads(self) -> dict[str, Array]:
        """The gradients of the last ``backward``, by the names of ``params``; the next ``backward`` overwrites them."""
        return {f"{i}.{name}": g for i, layer in enumerate(self.layers) for name, g in layer.grads.items()}

    @property
    def sample_ndim(self) -> int | None:
        return self.layers[0].sample_ndim if self.layers else None

    def forward(self, input: Array) -> Array:
        rectified = self._fused.values()
        with reuse(self._buffers if self.training else None):
            for layer in self._order:
                if isinstance(layer, _Weighted) and layer in self._fused:
                    input = layer.activated(input, "relu")
                elif layer in rectified:
                    layer._keep(input)
                else:
                    input = layer(input)
        return input

    def backward(self, grad_output: Array) -> Array:
        with reuse(self._buffers):
            for layer in reversed(self._order):
                grad_output = layer.backward(grad_output)
        return grad_output

    def backward_params(self, grad_output: Array) -> None:
        first = next((i for i, layer in enumerate(self._order) if layer.params), len(self._order))
        with reuse(self._buffers):
            for layer in reversed(self._order[first + 1 :]):
                grad_output = layer.backward(grad_output)
            for layer in self._order[first : first + 1]:
                layer.backward_params(grad_output)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        shape = tuple(input_shape)
        for layer in self.layers:
            shape = layer.output_shape(shape)
        return shape

    def train(self) -> Self:
        for layer in self.layers:
            layer.train()
        return super().train()

    def eval(self) -> Self:
        for layer in self.layers:
            layer.eval()
        return super().eval()

    def summary(self, input_shape: Sequence[int]) -> None:
        """Print each layer's output shape and number of weights, beside what a fully connected layer would need.

        Parameters
        ----------
        input_shape : sequence of int
            Of an input, (N, ...); with a convolution or pooling as the first layer N is optional.

        Examples
        --------
        The question of section 9.1 of the lecture notes: how many weights, and how many if fully connected?

        >>> from fastconv.layers import Conv2d, MaxPool2d, Sequential
        >>> Sequential(Conv2d(3, 8, 3, padding=1), MaxPool2d(2)).summary((3, 64, 64))
        layer               output shape  weights  fully connected
        0 Conv2d(3, 8, 3)   (8, 64, 64)       224      402,685,952
        1 MaxPool2d(2)      (8, 32, 32)         0                -
        total                                 224      402,685,952
        """
        print(_summary(self, tuple(input_shape)))

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Layer:
        return Sequential(*self.layers[index]) if isinstance(index, slice) else self.layers[index]

    def _arguments(self) -> str:
        return ", ".join(map(repr, self.layers))


def _convolved_relus(layers: Sequence[Layer]) -> dict[Layer, Layer]:
    """Return the ReLUs that the layers with weights before them apply as they store their output."""
    return {
        layer: after
        for layer, after in pairwise(layers)
        if isinstance(layer, _Weighted) and type(layer).forward is _Weighted.forward and type(after) is ReLU
    }


def _joined(layers: Sequence[Layer]) -> dict[str, Array]:
    """Return the parameters of all layers, named by position and name."""
    return {f"{i}.{name}": param for i, layer in enumerate(layers) for name, param in layer.params.items()}


def _relu_after_pool(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return the order to compute in: a ReLU commutes with the max pooling after it, and has less to do behind it.

    The gradient is the same, too: where the maximum is positive the winner is the same cell, elsewhere it is 0. With
    dilation a window can miss the image, and its -inf would become 0.
    """
    order = list(layers)
    for i, (layer, after) in enumerate(pairwise(layers)):
        if type(layer) is ReLU and isinstance(after, _MaxPool) and after._geometry["dilation"] == 1:
            order[i : i + 2] = after, layer
    return tuple(order)


def _summary(model: Sequential, input_shape: Shape) -> str:
    """Return the table of ``Sequential.summary``."""
    shape = (1, *input_shape) if len(input_shape) == model.sample_ndim else input_shape
    rows = [("layer", "output shape", "weights", "fully connected")]
    total = total_connected = 0
    for position, layer in enumerate(model):
        before, shape = shape, layer.output_shape(shape)
        weights = sum(param.size for param in layer.params.values())
        connected = _fully_connected(layer, before, shape) if weights else 0
        rows.append((f"{position} {layer!r}", str(shape[1:]), f"{weights:,}", f"{connected:,}" if weights else "-"))
        total, total_connected = total + weights, total_connected + connected
    rows.append(("total", "", f"{total:,}", f"{total_connected:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}   {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    )


def _fully_connected(layer: Layer, input_shape: Shape, output_shape: Shape) -> int:
    """Return the weights of a fully connected layer between the same sizes, with a bias if ``layer`` has one."""
    inputs, outputs = math.prod(input_shape[1:]), math.prod(output_shape[1:])
    has_bias = any(name.endswith("bias") for name in layer.params)
    return inputs * outputs + (outputs if has_bias else 0)
