"""Convolution and pooling, forward and backward, for NumPy arrays on a CPU.

>>> import numpy as np
>>> import fastconv as fc
>>> images = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
>>> filters = np.random.default_rng(1).standard_normal((16, 3, 3, 3)).astype(np.float32)
>>> features = fc.conv2d(images, filters, padding=1, activation="relu")
>>> fc.max_pool2d(features, 2).shape
(8, 16, 16, 16)
"""

from . import grad, layers, losses, optim
from .explain import explain
from .functional import (
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    max_blur_pool1d,
    max_blur_pool2d,
    max_blur_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)
from .runtime import config_context, get_config, get_num_threads, set_num_threads, show_config
from .training import fit

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "config_context",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "explain",
    "fit",
    "get_config",
    "get_num_threads",
    "grad",
    "layers",
    "losses",
    "max_blur_pool1d",
    "max_blur_pool2d",
    "max_blur_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "optim",
    "set_num_threads",
    "show_config",
]
