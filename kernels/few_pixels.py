"""Which layers have so few pixels that reading, or writing, their weights is most of the work."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from .exchange import exchanged

LEAST_PRODUCTS = 32  #: of a sum, which is several vectors then
MOST_BYTES = 1 << 22  #: of an image's patches, in float64: half of the promised workspace


#: What an operation is from the other side, where channels and filters of 1x1 weights are exchanged.
_OTHER = {"conv_forward": "conv_input_grad", "conv_input_grad": "conv_forward", "conv_weight_grad": "conv_weight_grad"}


@lru_cache(maxsize=1024)
def other_side(dims: Any) -> Any:
    """Return the convolution from the output to the input if that reads channels-last weights in order, else None.

    Channels last, not a filter's weights are neighbours but a tap's and channel's, of all filters. A single tap that
    sees each cell once makes the two one: image and output change places.
    """
    return exchanged(dims) if dims.channels_last and dims.taps == 1 else None


def suits(op: str, dims: Any, weight: Any) -> bool:
    """Whether all that a vector of weights, or of their gradient, is for is done while it is in a register."""
    in_order = weight.flags.c_contiguous or (other_side(dims) and weight.swapaxes(0, 1).flags.c_contiguous)
    return in_order and has_few_pixels(op, dims)


@lru_cache(maxsize=1024)
def has_few_pixels(op: str, dims: Any) -> bool:
    """Whether there are few pixels for weights that are in order.

    It is asked about one image, but for the gradient of the weights, for no other bit may depend on the batch.
    (Measured with AMX, whose tiles take over earliest.)
    """
    if dims.channels_last:
        dims, op = other_side(dims), _OTHER[op]
    if dims is None:
        return False
    pixels, reduction = math.prod(dims.output_size), dims.reduction
    if dims.depthwise or reduction < LEAST_PRODUCTS or 8 * pixels * reduction > MOST_BYTES:
        return False
    if op == "conv_weight_grad":
        small = pixels <= 4 or (pixels <= 16 and reduction >= 256) or dims.batch * pixels <= 32
        return bool(dims.batch > 0 and small and reduction >= 48)
    if op == "conv_input_grad":
        return bool(pixels <= 9)
    weights = reduction * dims.group_out_channels
    return bool(weights >= 2**15 and pixels <= (9 if weights >= 2**19 and dims.taps > 1 else 4))
