"""``explain``: which algorithm a call would take, and why not the others."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import functional, grad
from .arrays import as_image, as_weight, check_array, check_same_dtype, first_shape, first_weight_shape, plain_shape
from .dims import ConvDims, PoolDims, channels_last, conv_dims, pool_dims
from .functional import freeze, transpose_dims
from .registry import Verdict, check_algorithm, verdicts
from .runtime import check_engine, settings

_GRADIENTS = {f"conv{n}d_{what}" for n in (1, 2, 3) for what in ("input", "weight")}
_OPERATIONS = {f"{name}{n}d" for name in ("conv", "conv_transpose", "max_pool", "avg_pool") for n in (1, 2, 3)}


class Explanation(tuple[Verdict, ...]):
    """The verdicts on all rows, in order; printed, a table."""

    def __str__(self) -> str:
        chosen = next((v.row for v in self if not v.reason), None)
        lines = []
        for row, reason in self:
            answer = f"no: {reason}" if reason else ("yes, chosen" if row is chosen else "yes")
            lines.append(f"{row.engine:<8} {row.algorithm:<8} {answer}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Explanation: {next((f'{v.row.engine}/{v.row.algorithm}' for v in self if not v.reason), 'nothing')}>"


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Print every algorithm for a call, in the registry's order, each with its yes or its reason for a no.

    Parameters
    ----------
    op : str
        Name of a function: "conv2d", "conv_transpose2d", "max_pool2d", "avg_pool2d", "conv2d_input", "conv2d_weight",
        and the same in 1-D and 3-D; the last two may have their module's name before them, "grad.conv2d_input".
    *args, **kwargs
        The arguments of that function; an array may be given by its shape alone.

    Returns
    -------
    Explanation
        A tuple of ``(row, reason)``; the reason is empty for a yes. The first yes is what the call takes.

    Raises
    ------
    ValueError, TypeError
        For an unknown ``op``, and what the function itself would raise for such shapes, types and words.

    Examples
    --------
    >>> import fastconv as fc
    >>> rows = fc.explain("conv2d", (1, 64, 56, 56), (64, 64, 3, 3), engine="numpy")  # doctest: +ELLIPSIS
    cython   winograd no: engine 'numpy' was asked for
    ...
    numpy    im2col   yes, chosen
    numpy    naive    yes
    """
    name = op.removeprefix("grad.") if isinstance(op, str) else op
    if name not in (_GRADIENTS | _OPERATIONS if name == op else _GRADIENTS):
        raise ValueError(f"op must be one of {', '.join(sorted(_GRADIENTS | _OPERATIONS))}, got {op!r}")
    function: Callable[..., Any] = getattr(grad if name in _GRADIENTS else functional, name)
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    words = {key: call.arguments.get(key) for key in ("activation", "precision", "algorithm", "engine")}
    functional.check_words(**words)
    kernel_op, dims = _dims(name, call.arguments)
    engine, precision, threads = settings(check_engine(words["engine"]), words["precision"])
    functional.kernel_options(words["activation"], precision, threads)
    algorithm = check_algorithm(kernel_op, words["algorithm"])
    explanation = Explanation(verdicts(kernel_op, dims, engine, algorithm, precision))
    print(explanation)
    return explanation


def _stand_in(value: Any) -> Any:
    """Return an array of the shape that was given instead of one; a single number in memory."""
    return np.broadcast_to(np.float32(0), value) if isinstance(value, (list, tuple)) else value


def _dims(name: str, call: dict[str, Any]) -> tuple[str, ConvDims | PoolDims]:
    """Return the registry's operation and the dims of a call of the function ``name``."""
    operation, digit, of = re.fullmatch(r"(\w+?)(\d)d(\w*)", name).groups()  # type: ignore[union-attr]
    spatial, last = int(digit), channels_last(call["layout"])
    if operation in ("max_pool", "avg_pool"):
        x = as_image(_stand_in(call["input"]), "input", spatial, last)
        if operation == "avg_pool":
            functional.check_average(call["count_include_pad"], call.get("divisor_override"))
        sizes = [call.get(key, 1) for key in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")]
        pool = pool_dims(plain_shape(x, spatial), *sizes)
        return ("max_pool_forward", pool) if operation == "max_pool" else ("conv_forward", pool.as_depthwise(last))
    _check_types(call)
    image, weight = _shapes(call, spatial, last)
    names = [key for key in ("stride", "padding", "dilation", "groups", "output_padding") if key in call]
    geometry = dict(zip(names, freeze(tuple(names), *[call[key] for key in names]), strict=True))
    if operation == "conv_transpose":
        return "conv_input_grad", transpose_dims(image, weight, **geometry, last=last)
    kernel_op = {"": "conv_forward", "_input": "conv_input_grad", "_weight": "conv_weight_grad"}[of]
    dims = conv_dims(image, weight, **geometry, channels_last=last)
    if of:
        shape = np.shape(_stand_in(call["grad_output"]))
        grad.check_grad_output(shape, dims.batch, dims.out_channels, dims.output_size, spatial, last)
    return kernel_op, dims


def _check_types(call: dict[str, Any]) -> None:
    """Raise TypeError if the arrays of a call differ in type; shapes have none."""
    given = [name for name in ("input", "grad_output", "weight", "bias") if isinstance(call.get(name), np.ndarray)]
    for name in given[1:]:
        check_same_dtype(check_array(call[name], name), name, check_array(call[given[0]], given[0]), given[0])


def _shapes(call: dict[str, Any], spatial: int, last: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the (N, C, *spatial) and (K, C, *kernel) shapes of a call that gives arrays, shapes or sizes."""
    if "input_size" in call:
        size = grad.checked_size(call["input_size"], "input_size", (spatial + 1, spatial + 2))
        image = first_shape(size if len(size) == spatial + 2 else (1, *size), spatial, last)
    else:
        x = as_image(_stand_in(call["input"]), "input", spatial, last)
        image = plain_shape(x, spatial)
    if "weight_size" in call:
        size = grad.checked_size(call["weight_size"], "weight_size", (spatial + 2,))
        return image, first_weight_shape(size, spatial, last)
    w = as_weight(_stand_in(call["weight"]), "weight", spatial, last, False)
    return image, plain_shape(w, spatial)
