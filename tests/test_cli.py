"""The command line: what it prints, and one clear line for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastconv as fc
from fastconv import demo
from fastconv.cli import main
from fastconv.runtime import ENGINES, why_missing

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments and warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def test_info_prints_versions_engines_and_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (fc.__version__, "engine cython", "engine numba", "engine numpy", "threads"):
        assert word in out


def test_the_module_runs_as_a_command() -> None:
    result = run("-m", "fastconv", "--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"fastconv {fc.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["demo", "--epoch", "1"], "unrecognized arguments: --epoch"),
        (["demo", "--epochs", "0"], "argument --epochs: must be a positive integer, got '0'"),
        (["demo", "--threads", "many"], "argument --threads: must be a positive integer, got 'many'"),
        (["demo", "--threads", "5000"], "argument --threads: must be from 1 to 1024, got 5000"),
        (["demo", "--seed", "-1"], "argument --seed: must be an integer from 0, got '-1'"),
        (["bench", "--threads", "5000"], "argument --threads: must be from 1 to 1024, got 5000"),
        (["bench", "--json", "."], "argument --json: must be a file, got the folder '.'"),
        (["demo", "--engine", "torch"], "argument --engine: invalid choice: 'torch'"),
        (["bench", "--what"], "unrecognized arguments: --what"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FASTCONV_ENGINE", "torch", "must be one of"),
        ("FASTCONV_ISA", "avx", "must be one of scalar, avx2, avx512, amx, got 'avx'"),
        ("FASTCONV_NUM_THREADS", "0", "must be from 1 to 1024, got 0"),
    ],
)
def test_a_mistake_in_the_environment_is_one_clear_line(name: str, value: str, message: str) -> None:
    result = run("-m", "fastconv", "info", **{name: value})
    assert result.returncode == 2
    assert not result.stdout
    assert result.stderr.splitlines()[-1].startswith(f"fastconv: error: environment variable {name} {message}")


def test_a_missing_extra_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert (
        err
        == 'fastconv demo: the digits come with scikit-learn, which is not installed; pip install "fastconv[demo]"\n'
    )


def test_a_missing_progress_bar_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(demo, "measure", lambda *arguments: {demo.NAIVE: [(1.0, 1.0)] * 8})
    assert main(["demo", "--epochs", "1", "--engine", "numpy"]) == 0
    assert capsys.readouterr().err == 'no progress bar: tqdm is not installed; pip install "fastconv[demo]"\n'


def test_a_short_demo_ends_with_the_accuracy_and_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """One epoch on the engine at hand; `test_the_whole_demo_learns_the_digits` is the real thing."""
    pytest.importorskip("sklearn")
    assert main(["demo", "--epochs", "1", "--no-progress"]) == 0
    out, err = capsys.readouterr()
    assert not err
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("test accuracy: "))
    assert float(lines[start].split()[-1]) > 0.6
    note, head, *rows = lines[start + 1 :]
    assert "timed on 4 of the 32" in note
    engines = [name for name in reversed(ENGINES) if not why_missing(name)]
    assert head.split() == ["layer", "naive", "NumPy", *engines]
    assert len(rows) == 2 * 8 + 1
    assert rows[0].startswith("0 Conv2d(1, 32, 3)          forward")
    assert rows[-1].startswith("all layers")
    assert rows[-1].count("x") == len(engines)


def test_the_whole_demo_learns_the_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(demo, "measure", lambda *arguments: {demo.NAIVE: [(1.0, 1.0)] * 8})
    with fc.config_context(num_threads=1):  # what is learnt does not depend on it, and small layers are fast enough
        assert demo.run(epochs=15, seed=0, progress=False) >= 0.98


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_run(path: Path) -> None:
    if path.name == "digits.py":
        pytest.importorskip("sklearn")
    result = run(str(path))
    assert result.returncode == 0, result.stderr
    assert result.stdout
