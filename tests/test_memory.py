"""Peak memory of a convolution: inputs, outputs, the packed weights, and at most 8 MB for each thread."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from cases import how, output_of

from fastconv.registry import Row

MB = 1e6
THREADS = 2

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
    return (
        lambda: fc.conv2d(x, w, **options, out=out),
        lambda: grad.conv2d_input(x.shape, w, y, **options, out=dx),
        lambda: grad.conv2d_weight(x, w.shape, y, **options, out=dw),
    )

problem = {problem}
(n, c, h, width), filters, k, groups = problem
for call in calls(*arrays((1, c, k, k), filters, k, groups), groups):
    call()
rises = [rise(call) for call in calls(*arrays((n, c, h, width), filters, k, groups), groups)]
print(json.dumps(rises))
"""

PROBLEMS = {
    "a large plane": ((1, 64, 224, 224), 64, 3, 1),
    "few channels": ((1, 3, 320, 320), 32, 7, 1),
    "a batch": ((12, 32, 64, 64), 32, 3, 1),
    "depthwise": ((2, 64, 224, 224), 64, 3, 64),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident memory from /proc")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_workspace_is_small(conv_row: Row, problem: str) -> None:
    if conv_row.algorithm == "naive":
        pytest.skip("the textbook loops pad a copy of the image, and would take minutes")
    (_, channels, _, _), filters, k, groups = PROBLEMS[problem]
    keywords = ", ".join(f"{key}={value!r}" for key, value in how(conv_row).items())
    code = PROGRAM.replace("{how}", keywords).replace("{problem}", repr(PROBLEMS[problem]))
    rises = json.loads(output_of(code, FASTCONV_NUM_THREADS=str(THREADS), OPENBLAS_NUM_THREADS=str(THREADS)))
    packed_weights = 2 * filters * channels // groups * k * k * np.dtype(np.float32).itemsize
    allowed = 8 * MB * THREADS + packed_weights
    for name, peak in zip(("forward", "input gradient", "weight gradient"), rises, strict=True):
        assert peak <= allowed, f"{name}: {peak / MB:.1f} MB beside inputs and outputs, allowed are {allowed / MB:.1f}"
