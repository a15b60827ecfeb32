"""What is built and installed: the sdist, the wheel made from it, with and without a C compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path

import pytest

import fastconv as fc

ROOT = Path(__file__).resolve().parents[1]
NETWORK = re.compile(r"NewConnectionError|Temporary failure in name resolution|Max retries")


def run(command: Sequence[str | Path], **environment: str) -> str:
    """Run a command away from the source tree; skip the test if only a package index is missing."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd="/", env=clean | environment, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if done.returncode and NETWORK.search(text):
        pytest.skip("no package index can be reached for the build's requirements")
    assert done.returncode == 0, text[-5000:]
    return text


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the tests run outside a source tree")
    folder = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT])
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, sdist])
    return next(folder.glob("*.whl"))


def python_with(wheel: Path, folder: Path) -> Path:
    """A fresh virtual environment with the wheel and what it requires."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", wheel])
    return python


TRY_IT = """
import numpy as np, fastconv as fc
x, w = np.ones((1, 8, 8, 8), np.float32), np.ones((8, 8, 3, 3), np.float32)
assert fc.conv2d(x, w).max() == 72
assert fc.max_pool2d(x, 2).shape == (1, 8, 4, 4)
fc.show_config()
"""


def test_the_version_is_that_of_the_distribution() -> None:
    try:
        installed = metadata.version("fastconv")
    except metadata.PackageNotFoundError:
        pytest.skip("fastconv is imported from a source tree, not installed")
    assert installed == fc.__version__


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("fastconv").joinpath("py.typed").is_file()


def test_the_wheel_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "fastconv/py.typed",
        "fastconv/costs.json",
        "fastconv/kernels/reference/naive.py",
        "fastconv/bench/__init__.py",
    ):
        assert name in names
    assert any(re.match(r"fastconv/kernels/native/conv_direct\..*(so|pyd)$", name) for name in names)
    assert not [name for name in names if name.endswith((".pyx", ".pxd", ".c", ".h", "CMakeLists.txt"))]
    assert not [name for name in names if "test_" in name]


def test_the_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    python = python_with(wheel, tmp_path / "fresh")
    report = run([python, "-W", "error", "-c", TRY_IT])
    assert re.search(r"engine cython\s+yes", report)
    assert "missing: Numba is not installed" in report
    assert re.search(r"engine cython\s+yes", run([tmp_path / "fresh" / "bin" / "fastconv", "info"]))


def test_without_a_compiler_it_installs_and_says_so(sdist: Path, tmp_path: Path) -> None:
    no_compiler = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    built = run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", tmp_path, sdist], **no_compiler
    )
    assert "built WITHOUT its native engine" in built
    pure = next(tmp_path.glob("*.whl"))
    assert not [name for name in zipfile.ZipFile(pure).namelist() if name.endswith((".so", ".pyd"))]
    report = run([python_with(pure, tmp_path / "fresh"), "-W", "error", "-c", TRY_IT])
    assert "missing: the native engine was not built" in report
