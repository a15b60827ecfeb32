"""The Numba engine's cache: what is compiled ahead of time, found again, and never stale."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fastconv import warmup
from fastconv.arrays import DTYPES
from fastconv.cli import main
from fastconv.registry import ROWS
from fastconv.runtime import why_missing

pytestmark = pytest.mark.skipif(bool(why_missing("numba")), reason="Numba is not installed")

FIRST_CALL = """
import sys
import numpy as np, fastconv as fc
y, _ = fc.max_pool2d(np.ones((1, 1, 4, 4), np.float32), 2, engine="numba", return_indices=True)
from fastconv.kernels.jit.compile import loads
print(*loads(), "numba.np.linalg" in sys.modules, y.sum())
"""


def python(code: str, cache: Path, **environment: str) -> list[str]:
    """Run code with this folder as Numba's cache, and return what it prints, word by word."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_every_row_is_warmed_up_for_every_type() -> None:
    wanted = {
        (dtype, op, row.algorithm)
        for op, rows in ROWS.items()
        for row in rows
        for dtype in DTYPES
        if row.engine == "numba" and row.supports(op, warmup.DIMS[op]) != "has no gradient of the weights"
    }
    assert {job[:3] for job in warmup.jobs()} == wanted


def test_after_the_jobs_no_kernel_is_left_to_compile() -> None:
    for job in warmup.jobs():
        job.call()
    from fastconv.kernels.jit import compile as jit

    for kernel in jit._KERNELS:
        types = {str(argument) for signature in kernel.signatures for argument in signature}
        assert {"float32", "float64"} <= types, kernel


def test_the_command_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    for job in warmup.jobs([np.dtype(np.float32)]):
        job.call()
    assert main(["warmup", "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].split()[:4] == ["all", "kernels", "nothing", "to"]
    if find_spec("tqdm"):
        assert f"{len(warmup.jobs([np.dtype(np.float32)]))}/" in err, "the progress bar"


def test_without_tqdm_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(warmup, "jobs", lambda dtypes: [])
    assert main(["warmup"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("all kernels")
    assert err == 'no progress bar: tqdm is not installed; pip install "fastconv[demo]"\n'


def test_without_numba_the_command_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastconv.runtime.why_missing", lambda engine: "it is not installed")
    assert main(["warmup"]) == 1
    assert capsys.readouterr().err == "fastconv warmup: engine 'numba' is not available: it is not installed\n"


def test_a_second_process_loads_what_the_first_compiled_and_no_compiler(tmp_path: Path) -> None:
    assert python(FIRST_CALL, tmp_path) == ["1", "0", "True", "4.0"]
    assert python(FIRST_CALL, tmp_path) == ["0", "1", "False", "4.0"]


def copy_package(folder: Path) -> Path:
    """Copy fastconv into a folder, without what was compiled."""
    import fastconv

    package = folder / "fastconv"
    shutil.copytree(Path(fastconv.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return package


def test_an_edit_of_any_file_of_the_engine_recompiles(tmp_path: Path) -> None:
    """max_pool.py is the same in both processes; only a function that it uses has changed."""
    package = copy_package(tmp_path)
    here = {"PYTHONPATH": str(tmp_path)}
    assert python(FIRST_CALL, tmp_path / "cache", **here) == ["1", "0", "True", "4.0"]
    with open(package / "kernels" / "jit" / "blocking.py", "a", encoding="utf-8") as file:
        file.write("# an edit\n")
    assert python(FIRST_CALL, tmp_path / "cache", **here) == ["1", "0", "True", "4.0"]


def test_where_nothing_can_be_written_kernels_are_compiled_in_every_process(tmp_path: Path) -> None:
    """Numba tries the folder that it is told, then that of the source, then the user's: all are files here."""
    package = copy_package(tmp_path)
    (package / "kernels" / "jit" / "__pycache__").write_text("not a folder")
    (tmp_path / "file").write_text("not a folder")
    nowhere = tmp_path / "file" / "cache"
    here = {"PYTHONPATH": str(tmp_path), "HOME": str(nowhere), "XDG_CACHE_HOME": str(nowhere)}
    for _ in range(2):
        assert python(FIRST_CALL, nowhere, **here) == ["1", "0", "True", "4.0"]
