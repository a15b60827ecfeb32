"""Without a compiler, without Numba, without both: everything runs, and show_config says why it is slower."""

from __future__ import annotations

import pytest
from cases import output_of, run_python

NATIVE, NUMBA = "fastconv.kernels.native.machine", "numba"

# None in sys.modules is what a missing package looks like to import and to find_spec alike.
HIDE = "import sys\nsys.modules.update(dict.fromkeys({names!r}))\n"

EVERYTHING = """
import numpy as np, fastconv as fc
rng = np.random.default_rng(0)
naive = dict(engine="numpy", algorithm="naive")
for dtype, tolerance in ((np.float32, 1e-4), (np.float64, 1e-11)):
    x, w = rng.standard_normal((2, 8, 9, 10)).astype(dtype), rng.standard_normal((6, 8, 3, 3)).astype(dtype)
    y = fc.conv2d(x, w, padding=1)
    assert np.allclose(y, fc.conv2d(x, w, padding=1, **naive), atol=tolerance)
    for a, b in zip(fc.grad.conv2d(x, w, y, padding=1), fc.grad.conv2d(x, w, y, padding=1, **naive)):
        assert np.allclose(a, b, atol=100 * tolerance)
    up = fc.conv_transpose2d(y, w, padding=1)
    assert np.allclose(up, fc.conv_transpose2d(y, w, padding=1, **naive), atol=10 * tolerance)
    pooled, indices = fc.max_pool2d(x, 2, return_indices=True)
    assert np.array_equal(pooled, fc.max_pool2d(x, 2, **naive))
    dx = fc.grad.max_pool2d(x.shape, indices, pooled, 2)
    assert np.array_equal(dx, fc.grad.max_pool2d(x.shape, indices, pooled, 2, **naive))
    assert np.allclose(fc.avg_pool2d(x, 3), fc.avg_pool2d(x, 3, **naive), atol=tolerance)
    assert np.allclose(fc.max_blur_pool2d(x, 2, 2), fc.max_blur_pool2d(x, 2, 2, engine="numpy"), atol=tolerance)
fc.show_config()
print("chosen:", fc.explain("conv2d", x, w))
"""


@pytest.mark.parametrize("hidden", [(NATIVE,), (NUMBA,), (NATIVE, NUMBA)], ids=["no native", "no numba", "neither"])
def test_everything_runs_on_what_is_left(hidden: tuple[str, ...]) -> None:
    report = output_of(HIDE.format(names=hidden) + EVERYTHING)
    lines = {line.split()[1]: line for line in report.splitlines() if line.startswith("engine ")}
    assert "yes" in lines["numpy"]
    if NATIVE in hidden:
        assert "missing: the native engine was not built" in lines["cython"]
        assert "reinstall with a C compiler" in lines["cython"]
    if NUMBA in hidden:
        assert "missing: Numba is not installed; pip install 'fastconv[numba]'" in lines["numba"]
    if hidden == (NATIVE, NUMBA):
        chosen = next(line for line in report.splitlines() if line.endswith("chosen"))
        assert chosen.startswith("numpy")


@pytest.mark.parametrize(("engine", "hidden"), [("cython", NATIVE), ("numba", NUMBA)])
def test_an_engine_that_is_missing_cannot_be_asked_for(engine: str, hidden: str) -> None:
    calls = {
        "argument": f"fc.conv2d(x, w, engine={engine!r})",
        "context": f"fc.config_context(engine={engine!r}).__enter__()",
    }
    for call in calls.values():
        done = run_python(
            HIDE.format(names=(hidden,)) + f"import numpy as np, fastconv as fc\n"
            f"x, w = np.ones((1, 1, 4, 4)), np.ones((1, 1, 2, 2))\n{call}"
        )
        assert done.returncode == 1
        assert f"ImportError: engine '{engine}' is not available" in done.stderr


def test_import_loads_numpy_and_nothing_heavy() -> None:
    modules = output_of("import sys, fastconv; print(*sys.modules)").split()
    heavy = {"numba", "llvmlite", "sklearn", "scipy", "tqdm", "rich", "matplotlib", "safetensors", "torch", "pytest"}
    assert heavy.isdisjoint(modules)
    assert "numpy" in modules


def test_a_call_on_another_engine_does_not_load_numba() -> None:
    code = """
    import sys, numpy as np, fastconv as fc
    fc.conv2d(np.ones((1, 1, 4, 4)), np.ones((1, 1, 2, 2)), engine="numpy")
    fc.show_config()
    print("numba" in sys.modules)
    """
    assert output_of(code).splitlines()[-1] == "False"
