"""Which layers have so few pixels that reading, or writing, their weights is most of the work."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

LEAST_PRODUCTS = 32  #: of a sum, which is several vectors then
MOST_BYTES = 1 << 22  #: of an image's patches, in float64: half of the promised workspace


@lru_cache(maxsize=1024)
def has_few_pixels(op: str, dims: Any) -> bool:
    """Whether all that a vector of weights is for is done while it is in a register, in the order of memory.

    It is asked about one image, but for the gradient of the weights, for no other bit may depend on the batch. Channels
    last, a filter's weights are no neighbours. (Measured with AMX, whose tiles take over earliest.)
    """
    pixels, reduction = math.prod(dims.output_size), dims.reduction
    if dims.channels_last or dims.depthwise or reduction < LEAST_PRODUCTS or 8 * pixels * reduction > MOST_BYTES:
        return False
    if op == "conv_weight_grad":
        small = pixels <= 4 or (pixels <= 16 and reduction >= 256) or dims.batch * pixels <= 32
        return bool(dims.batch > 0 and small and reduction >= 48)
    if op == "conv_input_grad":
        return bool(pixels <= 9)
    weights = reduction * dims.group_out_channels
    return bool(weights >= 2**15 and pixels <= (9 if weights >= 2**19 and dims.taps > 1 else 4))
