"""Peak memory of a convolution: inputs, outputs, the packed weights, and at most 8 MB for each thread."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from cases import CONV_OPS, NAIVE_ROW, ConvCase, for_every_row, how, output_of

from fastconv.registry import Row

MB = 1e6
THREADS = 2
PACKED = 2  #: bytes of packed weights for each byte of weights: panels are filled up, blocks aligned

# The peak that the kernel reports can be set back, so that compiling and importing do not count.
PROGRAM = """
import json, numpy as np, fastconv as fc
from fastconv import grad

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def rise(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before

def arrays(shape, filters, k, groups):
    x = np.ones(shape, np.float32)
    w = np.ones((filters, shape[1] // groups, k, k), np.float32)
    y = np.ones((shape[0], filters, *shape[2:]), np.float32)
    return x, w, y

def calls(x, w, y, groups):
    options = dict(padding=w.shape[2] // 2, groups=groups, {how})
    dx, dw, out = np.ones_like(x), np.ones_like(w), np.ones_like(y)
    everything = dict(
        conv_forward=lambda: fc.conv2d(x, w, **options, out=out),
        conv_input_grad=lambda: grad.conv2d_input(x.shape, w, y, **options, out=dx),
        conv_weight_grad=lambda: grad.conv2d_weight(x, w.shape, y, **options, out=dw),
    )
    return dict((op, everything[op]) for op in {ops})

(n, c, h, width), filters, k, groups = {problem}
for call in calls(*arrays((1, c, 24, 24), filters, k, groups), groups).values():
    call()
measured = calls(*arrays((n, c, h, width), filters, k, groups), groups)
print(json.dumps(dict((op, rise(call)) for op, call in measured.items())))
"""

PROBLEMS = [
    ConvCase("a large plane", (1, 64, 224, 224), (64, 64, 3, 3), 1, 1),
    ConvCase("many channels", (1, 256, 56, 56), (256, 256, 3, 3), 1, 1),
    ConvCase("few channels", (1, 3, 320, 320), (32, 3, 7, 7), 1, 3),
    ConvCase("a batch", (12, 32, 64, 64), (32, 32, 3, 3), 1, 1),
    ConvCase("depthwise", (2, 64, 224, 224), (64, 1, 3, 3), 1, 1, 1, 64),
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident memory from /proc")
@for_every_row(PROBLEMS, but=NAIVE_ROW)  # the textbook loops pad a copy of the image, and would take minutes
def test_the_workspace_is_small(row: Row, case: ConvCase) -> None:
    ops = [op for op in CONV_OPS if row.can(op, case.dims)]
    code = PROGRAM
    for name, value in {
        "{how}": ", ".join(f"{key}={value!r}" for key, value in how(row).items()),
        "{ops}": repr(ops),
        "{problem}": repr((case.input, case.weight[0], case.weight[2], case.groups)),
    }.items():
        code = code.replace(name, value)
    rises = json.loads(output_of(code, FASTCONV_NUM_THREADS=str(THREADS), OPENBLAS_NUM_THREADS=str(THREADS)))
    weights = math.prod(case.weight) * np.dtype(np.float32).itemsize
    assert sorted(rises) == sorted(ops)
    for op, peak in rises.items():
        allowed = 8 * MB * THREADS + PACKED * weights
        assert peak <= allowed, f"{op}: {peak / MB:.1f} MB beside inputs and outputs, allowed are {allowed / MB:.1f}"


def test_the_numba_engine_finds_an_array_where_ctypes_does() -> None:
    pytest.importorskip("numba")
    from fastconv.kernels.jit.tile import address

    array = np.zeros((4, 5, 6))
    array.flags.writeable = False
    for view in (array, array[1:], array[:, ::-2], array.T, array[:0], array[3, 4, 5:]):
        assert address(view) == view.ctypes.data
