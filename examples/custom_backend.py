"""fastconv as the convolution backend of somebody else's framework: here an automatic differentiation of 30 lines.

The framework needs four functions, and all of them take and return plain arrays: ``fc.conv2d``, ``fc.grad.conv2d``,
``fc.max_pool2d`` and ``fc.grad.max_pool2d``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import fastconv as fc


class Tensor:
    """An array that remembers how it was made, so that gradients can flow back."""

    def __init__(self, data: np.ndarray, parents: tuple[Tensor, ...] = ()) -> None:
        self.data, self.parents = data, parents
        self.grad = np.zeros_like(data)
        self.pull: Callable[[], None] = lambda: None  # hands self.grad on to the parents

    def backward(self) -> None:
        order: list[Tensor] = []

        def visit(tensor: Tensor) -> None:
            if tensor not in order:
                for parent in tensor.parents:
                    visit(parent)
                order.append(tensor)

        visit(self)
        self.grad = np.ones_like(self.data)
        for tensor in reversed(order):
            tensor.pull()


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, padding: str) -> Tensor:
    out = Tensor(fc.conv2d(x.data, weight.data, bias.data, padding=padding), (x, weight, bias))

    def pull() -> None:
        grads = fc.grad.conv2d(x.data, weight.data, out.grad, padding=padding)
        for parent, grad in zip(out.parents, grads, strict=True):
            parent.grad += grad

    out.pull = pull
    return out


def max_pool2d(x: Tensor, size: int) -> Tensor:
    data, winners = fc.max_pool2d(x.data, size, return_indices="compact")  # one byte for each output
    out = Tensor(data, (x,))

    def pull() -> None:
        x.grad += fc.grad.max_pool2d(x.data.shape, winners, out.grad, size)

    out.pull = pull
    return out


def mean_square(x: Tensor) -> Tensor:
    out = Tensor(np.square(x.data).mean(), (x,))

    def pull() -> None:
        x.grad += out.grad * 2 * x.data / x.data.size

    out.pull = pull
    return out


def main() -> None:
    rng = np.random.default_rng(0)
    images = Tensor(rng.standard_normal((8, 3, 32, 32)))
    weight, bias = Tensor(rng.standard_normal((16, 3, 3, 3))), Tensor(np.zeros(16))

    def loss() -> Tensor:
        return mean_square(max_pool2d(conv2d(images, weight, bias, padding="same"), 2))

    first = loss()
    first.backward()
    print(f"loss {first.data:.4f}; gradient of the weights {weight.grad.shape}, of the bias {bias.grad.shape}")

    step = 1e-6
    before = weight.data[3, 1, 2, 0]
    weight.data[3, 1, 2, 0] = before + step
    print(f"one element of it: {weight.grad[3, 1, 2, 0]:.6f}; measured: {(loss().data - first.data) / step:.6f}")
    weight.data[3, 1, 2, 0] = before

    weight.data -= 0.1 * weight.grad
    print(f"loss after a step down the gradient: {loss().data:.4f}")


if __name__ == "__main__":
    main()
