"""Who else: other libraries, each optional and imported when asked for, on the same arrays in the same process.

Who packs the weights at every call is timed with the packing (PyTorch, like fastconv's functions), who packs them once
is timed without it (ONNX Runtime, OpenVINO). The allocation of the output is timed for all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastconv.dims import per_dimension

from .engines import Array, Candidate, Problem
from .layers import ConvLayer, Layer, PoolLayer
from .training import CLASSES, LEARNING_RATE, Batch, Step, build

#: Environment variables that cap the instruction set, of fastconv and of the peers.
CAPS = ("FASTCONV_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")


class Peer(Protocol):
    """A library to compare with."""

    PACKAGES: str  #: what to install
    title: str  #: name, version, number of threads

    def __init__(self, threads: int) -> None: ...

    def candidates(self, problem: Problem, op: str) -> list[Candidate]:
        """Return its implementations of ``op``, none if it has none."""

    def steps(self, batch: Batch) -> list[Step]:
        """Return its training steps, none if it does not train."""


class Geometry(NamedTuple):
    """The numbers of a layer, one for each dimension."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    @classmethod
    def of(cls, layer: Layer) -> Geometry:
        """Return the geometry of ``layer``."""
        values = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        spatial = len(layer.kernel_size)
        return cls(*(list(per_dimension(v, spatial, name, 0)) for v, name in zip(values, cls._fields, strict=True)))


class Torch:
    """PyTorch, eager, in both memory formats."""

    PACKAGES = "torch"

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        self.title = f"torch {torch.__version__}, threads {torch.get_num_threads()}"

    def candidates(self, problem: Problem, op: str) -> list[Candidate]:
        """Return channels first and, but for 1-D, channels last."""
        formats = {"torch NCHW": self.torch.contiguous_format}
        spatial = len(problem.layer.kernel_size)
        if spatial > 1:
            formats["torch NHWC"] = self.torch.channels_last if spatial == 2 else self.torch.channels_last_3d
        return [
            Candidate(name, problem, self._call(problem, op, memory_format), lambda tensor: tensor.numpy(), peer=True)
            for name, memory_format in formats.items()
        ]

    def _call(self, problem: Problem, op: str, memory_format: Any) -> Callable[[], Any]:
        input, grad_output = (
            self.torch.from_numpy(array).contiguous(memory_format=memory_format)
            for array in (problem.input, problem.grad_output)
        )
        if isinstance(problem.layer, PoolLayer):
            return self._pool_call(problem.layer, op, input, grad_output)
        weight = self.torch.from_numpy(problem.weight).contiguous(memory_format=memory_format)
        return self._conv_call(problem.layer, op, input, weight, grad_output)

    def _conv_call(self, layer: ConvLayer, op: str, input: Any, weight: Any, grad_output: Any) -> Callable[[], Any]:
        kernel, stride, padding, dilation = Geometry.of(layer)
        if op == "forward":
            convolve = getattr(self.torch.nn.functional, f"conv{len(kernel)}d")
            return partial(convolve, input, weight, None, stride, padding, dilation, layer.groups)
        # Not torch.nn.grad, which makes up the missing array of each gradient and forgets its memory format.
        backward = partial(
            self.torch.ops.aten.convolution_backward, grad_output, input, weight, None,
            stride, padding, dilation, False, [0] * len(kernel), layer.groups, [op == "input", op == "weight", False],
        )  # fmt: skip
        return lambda: backward()[("input", "weight").index(op)]

    def _pool_call(self, layer: PoolLayer, op: str, input: Any, grad_output: Any) -> Callable[[], Any]:
        geometry = Geometry.of(layer)
        forward = partial(getattr(self.torch.nn.functional, f"max_pool{len(geometry.kernel)}d"), input, *geometry[:3])
        if op == "forward":
            return forward
        _, indices = forward(return_indices=True)
        if len(geometry.kernel) > 1:
            backward = getattr(self.torch.ops.aten, f"max_pool{len(geometry.kernel)}d_with_indices_backward")
            return partial(backward, grad_output, input, *geometry, False, indices)
        # PyTorch has no 1-D kernel: it takes the row for an image of height 1.
        input, indices, grad_output = (tensor.unsqueeze(2) for tensor in (input, indices, grad_output))
        image = ([first, *values] for first, values in zip((1, 1, 0, 1), geometry, strict=True))
        backward = self.torch.ops.aten.max_pool2d_with_indices_backward
        call = partial(backward, grad_output, input, *image, False, indices)
        return lambda: call().squeeze(2)

    def steps(self, batch: Batch) -> list[Step]:
        """Return eager steps in both memory formats, and one of ``torch.compile`` where that works."""
        first, last = self.torch.contiguous_format, self.torch.channels_last
        found = {"torch NCHW": self._step(batch, first), "torch NHWC": self._step(batch, last)}
        try:
            found["torch compile"] = self._step(batch, first, compile=True)
        except Exception as error:  # whatever its compilers lack
            print(f"torch.compile does not work here: {type(error).__name__}", file=sys.stderr)
        return [Step(name, call, lambda gradient: gradient.numpy(), peer=True) for name, call in found.items()]

    def _step(self, batch: Batch, memory_format: Any, compile: bool = False) -> Callable[[], Any]:
        nn, network = self.torch.nn, batch.network
        layers: list[Any] = []
        for channels, _, width in list(network.stages())[:-1]:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(network.features, CLASSES))
        start = build(network, "NCHW").params
        model.load_state_dict({name: self.torch.from_numpy(param.copy()) for name, param in start.items()})
        model = model.to(memory_format=memory_format)
        images = self.torch.from_numpy(batch.images).contiguous(memory_format=memory_format)
        classes = self.torch.from_numpy(batch.classes)
        optimizer = self.torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        first, run = model[0].weight, self.torch.compile(model) if compile else model
        run(images)  # compiles, or fails

        def step() -> Any:
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(images), classes).backward()
            optimizer.step()
            return first.grad

        return step


class OnnxRuntime:
    """ONNX Runtime, channels first and forward only. The model is a single node with its weights inside."""

    PACKAGES = "onnxruntime onnx"

    def __init__(self, threads: int) -> None:
        import onnx
        import onnxruntime

        self.onnx, self.runtime = onnx, onnxruntime
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        # Threads that go on spinning after their work would take the processors of those whose turn is next.
        self.options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.title = f"onnxruntime {onnxruntime.__version__}, threads {threads}"

    def candidates(self, problem: Problem, op: str) -> list[Candidate]:
        """Return the forward operation; there are no gradients."""
        if op != "forward":
            return []
        model = self._model(problem).SerializeToString()
        session = self.runtime.InferenceSession(model, self.options, providers=["CPUExecutionProvider"])
        call = partial(session.run, None, {"input": problem.input})
        return [Candidate("onnxruntime", problem, call, lambda outputs: np.asarray(outputs[0]), peer=True)]

    def steps(self, batch: Batch) -> list[Step]:
        """Return nothing: it does not train."""
        return []

    def _model(self, problem: Problem) -> Any:
        helper, layer = self.onnx.helper, problem.layer
        kernel, stride, padding, dilation = Geometry.of(layer)
        attributes = {"kernel_shape": kernel, "strides": stride, "pads": padding * 2, "dilations": dilation}
        if isinstance(layer, ConvLayer):
            weights = [self.onnx.numpy_helper.from_array(problem.weight, "weight")]
            node = helper.make_node("Conv", ["input", "weight"], ["output"], group=layer.groups, **attributes)
        else:
            weights = []
            node = helper.make_node("MaxPool", ["input"], ["output"], **attributes)
        input, output = (
            helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, size)
            for name, size in (("input", layer.input_size), ("output", layer.output_size))
        )
        graph = helper.make_graph([node], "layer", [input], [output], weights)
        # Versions of 2023, so that an older runtime reads what a newer onnx writes.
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


class OpenVino:
    """OpenVINO, channels first and forward only. The model is a single operation with its weights inside."""

    PACKAGES = "openvino"

    def __init__(self, threads: int) -> None:
        import openvino
        from openvino import opset1

        self.openvino, self.opset = openvino, opset1
        self.core = openvino.Core()
        self.options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # it would pin those whose turn is next, too
        }
        version = openvino.__version__.split("-")[0]
        self.title = f"openvino {version}, threads {threads}"

    def candidates(self, problem: Problem, op: str) -> list[Candidate]:
        """Return the forward operation; there are no gradients."""
        if op != "forward":
            return []
        request = self.core.compile_model(self._model(problem), "CPU", self.options).create_infer_request()
        request.set_input_tensor(self.openvino.Tensor(problem.input, shared_memory=True))

        def call() -> Array:
            output = np.empty(problem.layer.output_size, np.float32)
            request.set_output_tensor(self.openvino.Tensor(output, shared_memory=True))
            request.infer()
            return output

        return [Candidate("openvino", problem, call, np.asarray, peer=True)]

    def steps(self, batch: Batch) -> list[Step]:
        """Return nothing: it does not train."""
        return []

    def _model(self, problem: Problem) -> Any:
        layer, opset = problem.layer, self.opset
        kernel, stride, padding, dilation = Geometry.of(layer)
        input = opset.parameter(layer.input_size, np.float32)
        if isinstance(layer, PoolLayer):
            return self.openvino.Model([opset.max_pool(input, stride, padding, padding, kernel)], [input])
        weight, convolve = problem.weight, opset.convolution
        if layer.groups > 1:  # (groups, K/groups, C/groups, *kernel)
            weight, convolve = weight.reshape(layer.groups, -1, *weight.shape[1:]), opset.group_convolution
        node = convolve(input, opset.constant(weight), stride, padding, padding, dilation)
        return self.openvino.Model([node], [input])


PEERS: dict[str, type[Peer]] = {"torch": Torch, "onnxruntime": OnnxRuntime, "openvino": OpenVino}


def load_peers(names: Sequence[str], threads: int) -> list[Peer]:
    """Return the peers, imported and their threads pinned.

    Raises
    ------
    ImportError
        With the pip command that installs what is missing.
    """
    loaded = []
    for name in names:
        try:
            loaded.append(PEERS[name](threads))
        except ImportError as error:
            command = f"python -m pip install {PEERS[name].PACKAGES}"
            raise ImportError(f"peer {name!r} does not load ({error}); {command}") from None
    return loaded


def caps() -> str:
    """Return the caps on instruction sets that the environment sets, empty if it sets none."""
    return ", ".join(f"{name}={os.environ[name]}" for name in CAPS if os.environ.get(name))
