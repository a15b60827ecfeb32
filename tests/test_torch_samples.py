"""PyTorch's own sample inputs for these operations: every engine must agree with PyTorch, gradients too."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import Array

import fastconv as fc

torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed here")
pytest.importorskip("expecttest", reason="PyTorch's sample inputs need the package expecttest")

torch.set_num_threads(1)

TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
CONVOLUTIONS = [f"conv{n}d" for n in (1, 2, 3)] + [f"conv_transpose{n}d" for n in (1, 2, 3)]
POOLINGS = [f"{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3)]
ARGUMENTS = {
    "conv": ("weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose": ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}


class Sample(NamedTuple):
    """A call in PyTorch's arguments: tensors as arrays, and the rest by name or in order."""

    input: Array
    arguments: list[Any]
    keywords: dict[str, Any]


@cache
def samples(name: str, dtype: str) -> list[Sample]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's internal tables warn of their own future
        from torch.testing._internal.common_methods_invocations import op_db

        info = next(info for info in op_db if info.name == f"nn.functional.{name}")
        torch.manual_seed(0)
        found = list(info.sample_inputs("cpu", getattr(torch, dtype), requires_grad=False))
    assert found

    def plain(value: Any) -> Any:
        return value.numpy() if isinstance(value, torch.Tensor) else value

    return [
        Sample(
            plain(s.input), [plain(value) for value in s.args], {key: plain(value) for key, value in s.kwargs.items()}
        )
        for s in found
    ]


def tensor(array: Array | None) -> Any:
    return None if array is None else torch.from_numpy(array.copy()).requires_grad_(array.dtype.kind == "f")


def assert_agrees(result: Array, wanted: Any, dtype: str, name: str) -> None:
    expected = wanted.detach().numpy()
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape), name
    size = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size, err_msg=name)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # PyTorch's own
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, dtype: str, engine: str) -> None:
    kind = name[:-2]
    for x, arguments, keywords in samples(name, dtype):
        call = dict(zip(ARGUMENTS[kind], arguments, strict=False)) | keywords
        tx, tw, tb = tensor(x), tensor(call.pop("weight")), tensor(call.pop("bias", None))
        w, b = tw.detach().numpy(), None if tb is None else tb.detach().numpy()
        wanted = getattr(torch.nn.functional, name)(tx, tw, tb, **call)
        assert_agrees(getattr(fc, name)(x, w, b, **call, engine=engine), wanted, dtype, f"{x.shape} {w.shape} {call}")
        if wanted.numel() == 0:
            continue
        dy = np.random.default_rng(0).standard_normal(wanted.shape).astype(dtype)
        wanted.backward(torch.from_numpy(dy))
        dx = getattr(fc.grad, f"{name}_input")(x.shape, w, dy, **call, engine=engine)
        dw = getattr(fc.grad, f"{name}_weight")(x, w.shape, dy, **call, engine=engine)
        assert_agrees(dx, tx.grad, dtype, f"grad_input of {x.shape} {w.shape} {call}")
        assert_agrees(dw, tw.grad, dtype, f"grad_weight of {x.shape} {w.shape} {call}")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling(name: str, dtype: str, engine: str) -> None:
    for x, arguments, keywords in samples(name, dtype):
        tx = tensor(x)
        call = dict(keywords)
        maximum = name.startswith("max")
        if maximum:
            call["return_indices"] = True
        wanted = getattr(torch.nn.functional, name)(tx, *arguments, **call)
        result = getattr(fc, name)(x, *arguments, **call, engine=engine)
        text = f"{x.shape} {arguments} {call}"
        if not maximum:
            assert_agrees(result, wanted, dtype, text)
            gradient_call: tuple[Any, ...] = (x.shape,)
        else:
            wanted, indices = wanted
            np.testing.assert_array_equal(result[0], wanted.detach().numpy(), err_msg=text)
            np.testing.assert_array_equal(result[1], indices.numpy(), err_msg=text)
            gradient_call = (x.shape, result[1])
            call.pop("return_indices")
        dy = np.random.default_rng(0).standard_normal(wanted.shape).astype(dtype)
        wanted.backward(torch.from_numpy(dy))
        dx = getattr(fc.grad, name)(*gradient_call, dy, *arguments, **call, engine=engine)
        assert_agrees(dx, tx.grad, dtype, f"gradient of {text}")
