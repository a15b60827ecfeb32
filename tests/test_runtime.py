"""Settings, environment variables, the choice of an engine, what is printed about it; threads and processes."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from cases import ConvCase, output_of, run_python

import fastconv as fc
from fastconv import costs, registry
from fastconv.dims import conv_dims
from fastconv.registry import ROWS
from fastconv.runtime import ENGINES, ISAS, isa, native_module, why_missing

HERE = [engine for engine in ENGINES if not why_missing(engine)]
X, W = np.ones((1, 16, 8, 8), np.float32), np.ones((16, 16, 3, 3), np.float32)


def chosen(engine: str | None = None) -> str:
    """The engine that a convolution takes."""
    verdicts = fc.explain("conv2d", X, W, engine=engine)
    return next(row.engine for row, reason in verdicts if not reason)


# ---------------------------------------------------------------------------------------------------------------------
# Settings and their order
# ---------------------------------------------------------------------------------------------------------------------


def test_the_best_engine_there_is_comes_first() -> None:
    assert chosen() == HERE[0]


def test_an_engine_can_be_forced(engine: str) -> None:
    assert chosen(engine) == engine
    with fc.config_context(engine=engine):
        assert chosen() == engine
        assert chosen("numpy") == "numpy"  # the argument of the call is stronger
    assert chosen() == HERE[0]


def test_contexts_nest_and_end() -> None:
    before = fc.get_config()
    with fc.config_context(num_threads=3) as outer:
        assert fc.get_num_threads() == outer.num_threads == 3
        with fc.config_context(engine="numpy", precision="medium") as inner:
            assert (inner.engine, inner.precision, inner.num_threads) == ("numpy", "medium", 3)
        assert fc.get_config() == outer
        with pytest.raises(RuntimeError, match="leaves the context"), fc.config_context(num_threads=1):
            raise RuntimeError("leaves the context")
        assert fc.get_config() == outer
    assert fc.get_config() == before


def test_a_context_is_that_of_its_thread() -> None:
    seen = []
    with fc.config_context(engine="numpy", num_threads=1):
        thread = threading.Thread(target=lambda: seen.append(fc.get_config()))
        thread.start()
        thread.join()
    assert seen == [fc.get_config()]


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves the number of threads of the process as it was."""
    before = fc.get_num_threads()
    yield
    fc.set_num_threads(before)


def test_the_number_of_threads(threads: None) -> None:
    assert fc.get_num_threads() >= 1
    fc.set_num_threads(5)
    assert fc.get_num_threads() == 5
    with fc.config_context(num_threads=2):
        assert fc.get_num_threads() == 2
    with fc.config_context(precision="high"):
        assert fc.get_num_threads() == 5


def test_a_context_keeps_its_number_of_threads(threads: None) -> None:
    with fc.config_context(num_threads=2), fc.config_context(precision="high"):
        fc.set_num_threads(5)
        assert fc.get_config()[1:] == ("high", 2)
    assert fc.get_num_threads() == 5


def test_the_number_of_threads_is_that_of_all_threads_of_the_process(threads: None) -> None:
    """Of those, too, that are in a context of other settings."""
    opened, changed, seen = threading.Event(), threading.Event(), []

    def work() -> None:
        with fc.config_context(precision="high"):
            opened.set()
            changed.wait(60)
            seen.append(fc.get_config()[1:])

    thread = threading.Thread(target=work)
    thread.start()
    opened.wait(60)
    with fc.config_context(precision="medium"):
        fc.set_num_threads(5)
        assert fc.get_config()[1:] == ("medium", 5)
    changed.set()
    thread.join()
    assert seen == [("high", 5)]
    assert fc.get_num_threads() == 5


# ---------------------------------------------------------------------------------------------------------------------
# The environment
# ---------------------------------------------------------------------------------------------------------------------

CALL = "import numpy as np, fastconv as fc; fc.conv2d(np.ones((1, 1, 4, 4)), np.ones((1, 1, 2, 2)));"


def test_the_environment_chooses_the_engine(engine: str) -> None:
    code = CALL + "print(fc.get_config().engine); fc.explain('conv2d', (1, 16, 8, 8), (16, 16, 3, 3))"
    lines = output_of(code, FASTCONV_ENGINE=engine).splitlines()
    assert lines[0] == engine
    assert next(line for line in lines if line.endswith("chosen")).startswith(engine)


def test_the_environment_gives_the_threads_and_a_context_overrides_it() -> None:
    code = """
    import fastconv as fc
    print(fc.get_num_threads())
    with fc.config_context(num_threads=2):
        print(fc.get_num_threads())
    """
    assert output_of(code, FASTCONV_NUM_THREADS="7").split() == ["7", "2"]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FASTCONV_ENGINE", "gpu", "environment variable FASTCONV_ENGINE must be one of 'cython', .* got 'gpu'"),
        ("FASTCONV_NUM_THREADS", "many", "environment variable FASTCONV_NUM_THREADS must be a positive .* got 'many'"),
        ("FASTCONV_NUM_THREADS", "0", "environment variable FASTCONV_NUM_THREADS must be from 1 to 1024, got 0"),
        ("FASTCONV_ISA", "sse9", "environment variable FASTCONV_ISA must be one of scalar, .* got 'sse9'"),
    ],
)
def test_a_wrong_variable_is_an_error_of_the_first_call(variable: str, value: str, message: str) -> None:
    assert run_python("import fastconv", {variable: value}).returncode == 0
    done = run_python(CALL, {variable: value})
    assert done.returncode == 1
    assert re.search(f"ValueError: {message}", done.stderr), done.stderr


@pytest.mark.skipif("cython" not in HERE, reason="the native engine is not built here")
def test_the_instruction_set_can_be_capped() -> None:
    """Down to plain C, every tier computes the same convolution."""
    code = """
    import numpy as np, fastconv as fc
    from fastconv.runtime import isa
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 24, 9, 10)).astype("f4"), rng.standard_normal((20, 24, 3, 3)).astype("f4")
    naive = dict(engine="numpy", algorithm="naive")
    for algorithm in ("direct", "im2col"):
        how = dict(engine="cython", algorithm=algorithm)
        y = fc.conv2d(x, w, padding=1, **how)
        assert np.allclose(y, fc.conv2d(x, w, padding=1, **naive), atol=1e-4)
        for a, b in zip(fc.grad.conv2d(x, w, y, padding=1, **how), fc.grad.conv2d(x, w, y, padding=1, **naive)):
            assert np.allclose(a, b, rtol=1e-4, atol=1e-2)
    print(isa())
    """
    native = native_module()
    assert native is not None
    assert set(native.available_isas()) <= set(native.built_isas()) <= set(ISAS)
    for cap in native.available_isas():
        assert output_of(code, FASTCONV_ISA=cap).strip() == cap


@pytest.mark.skipif("cython" not in HERE, reason="the native engine is not built here")
@pytest.mark.parametrize(
    ("op", "case", "without", "with_amx"),
    [
        ("conv_forward", ConvCase("1x1", (1, 64, 14, 14), (128, 64, 1, 1)), "im2col", "im2col"),
        ("conv_forward", ConvCase("few filters", (1, 64, 56, 56), (4, 64, 3, 3), 1, 1), "planar", "planar"),
        ("conv_forward", ConvCase("few pixels, digits", (1, 256, 14, 14), (512, 256, 3, 3), 2, 1), "direct", "direct"),
        ("conv_forward", ConvCase("3x3", (1, 32, 28, 28), (32, 32, 3, 3), 1, 1), "winograd", "direct"),
        ("conv_forward", ConvCase("3x3, digits", (1, 128, 56, 56), (128, 128, 3, 3), 1, 1), "winograd", "direct"),
        ("conv_input_grad", ConvCase("stem", (1, 3, 224, 224), (64, 3, 3, 3), 2, 1), "im2col", "im2col"),
        ("conv_input_grad", ConvCase("many filters", (1, 64, 13, 13), (384, 64, 3, 3), 1, 1), "winograd", "direct"),
        ("conv_weight_grad", ConvCase("3x3", (1, 64, 14, 14), (64, 64, 3, 3), 1, 1), "winograd", "direct"),
        ("conv_weight_grad", ConvCase("3x3, large", (1, 64, 56, 56), (64, 64, 3, 3), 1, 1), "winograd", "direct"),
        ("conv_weight_grad", ConvCase("1x1", (1, 64, 14, 14), (128, 64, 1, 1)), "im2col", "direct"),
        ("conv_weight_grad", ConvCase("stem", (1, 3, 64, 64), (32, 3, 3, 3), 2, 1), "planar", "planar"),
    ],
)
def test_the_choice_knows_of_the_tile_that_splits_numbers(
    op: str, case: ConvCase, without: str, with_amx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, algorithm in (("avx512", without), ("amx", with_amx)):
        monkeypatch.setattr(registry, "isa", lambda name=name: name)
        assert registry.select(op, case.dims, "cython").algorithm == algorithm


# ---------------------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------------------


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    fc.show_config()
    report = capsys.readouterr().out
    for word in (f"fastconv         {fc.__version__}", f"numpy            {np.__version__}", "cpu ", "threads "):
        assert word in report
    for engine in ENGINES:
        line = next(line for line in report.splitlines() if line.startswith(f"engine {engine}"))
        assert ("missing: " if why_missing(engine) else "yes") in line


@pytest.mark.parametrize(
    ("op", "arguments", "kernel"),
    [
        ("conv1d", ((2, 3, 9), (4, 3, 3)), "conv_forward"),
        ("conv2d", (X, W), "conv_forward"),
        ("conv3d", ((1, 2, 5, 5, 5), (2, 2, 3, 3, 3)), "conv_forward"),
        ("conv2d_input", (X.shape, W, (1, 16, 6, 6)), "conv_input_grad"),
        ("conv2d_weight", (X, W.shape, (1, 16, 6, 6)), "conv_weight_grad"),
        ("grad.conv2d_weight", (X, W.shape, (1, 16, 6, 6)), "conv_weight_grad"),
        ("conv_transpose2d", (X, W), "conv_input_grad"),
        ("max_pool2d", (X, 2), "max_pool_forward"),
        ("avg_pool2d", (X, 2), "conv_forward"),
    ],
)
def test_explain_prints_every_row_and_its_reason(
    op: str, arguments: tuple[object, ...], kernel: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fc.explain(op, *arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [verdict.row for verdict in found] == list(ROWS[kernel])
    assert len(lines) == len(found)
    for line, (row, reason) in zip(lines, found, strict=True):
        assert line.split()[:2] == [row.engine, row.algorithm]
        assert (f"no: {reason}" if reason else "yes") in line
    assert sum(line.endswith("yes, chosen") for line in lines) == 1


@pytest.mark.skipif("cython" not in HERE, reason="the native engine is not built here")
@pytest.mark.parametrize("op", ["avg_pool1d", "avg_pool2d", "avg_pool3d"])
@pytest.mark.parametrize("channels", [8, 48, 192])
def test_the_choice_for_an_average_knows_where_the_channels_are(op: str, channels: int) -> None:
    spatial = int(op[-2])
    for layout, last in (("NCHW", False), ("NHWC", True)):
        size, weight = (24, 20, 14)[:spatial], (channels, 1, *(3, 3, 3)[:spatial])
        dims = conv_dims((1, channels, *size), weight, 2, 1, 1, channels, last)
        times = costs.estimate("conv_forward", dims, costs.Machine(isa(), channels_last=last))
        shape = (1, *size, channels) if last else (1, channels, *size)
        found = fc.explain(op, shape, 3, 2, 1, layout=layout, engine="cython")
        assert next(row.algorithm for row, reason in found if not reason) == min(times, key=lambda name: times[name])


def test_what_explain_chooses_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen row's kernel, put out of order, is missed."""
    row = next(row for row, reason in fc.explain("conv2d", X, W, engine="numpy") if not reason)
    module = __import__(row.load("conv_forward").__module__, fromlist=["conv_forward"])

    def broken(*args: object) -> None:
        raise RuntimeError("this one")

    monkeypatch.setattr(module, "conv_forward", broken)
    caches = fc.functional.kernel, fc.functional._conv_plan
    for cache in caches:
        cache.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="this one"):
            fc.conv2d(X, W, engine="numpy")
    finally:
        for cache in caches:
            cache.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Threads and processes
# ---------------------------------------------------------------------------------------------------------------------

PROBLEM = """
import numpy as np, fastconv as fc
rng = np.random.default_rng(0)
x, w = rng.standard_normal((3, 16, 14, 15)).astype("f4"), rng.standard_normal((32, 16, 3, 3)).astype("f4")

def work():
    y = fc.conv2d(x, w, padding=1)
    pooled, winners = fc.max_pool2d(x, 2, return_indices="compact")
    return [y, *fc.grad.conv2d(x, w, y, padding=1), pooled, fc.grad.max_pool2d(x.shape, winners, pooled, 2)]

def same(a, b):
    return all(p.tobytes() == q.tobytes() for p, q in zip(a, b, strict=True))
"""


def test_eight_threads_at_once(engine: str) -> None:
    """In a process of its own, for a failure may be a crash."""
    code = """
from concurrent.futures import ThreadPoolExecutor
alone = work()
with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(lambda _: work(), range(24)))
print(sum(same(alone, result) for result in results))
"""
    assert output_of(PROBLEM + code, FASTCONV_ENGINE=engine, FASTCONV_NUM_THREADS="2").split() == ["24"]


def test_a_forked_child_works(engine: str) -> None:
    """After the parent has started its threads, which the child does not inherit."""
    code = """
import os, signal
before = work()
child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that waits for threads it does not have would wait for ever
    os._exit(0 if same(before, work()) else 3)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), same(before, work()))
"""
    assert output_of(PROBLEM + code, FASTCONV_ENGINE=engine, FASTCONV_NUM_THREADS="2").split() == ["0", "True"]
