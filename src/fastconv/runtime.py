"""What the machine offers and what the user set: engines, threads, precision, instruction set.

A setting is looked up in this order: the argument of the call, ``config_context``, ``set_num_threads``, the environment
(``FASTCONV_ENGINE``, ``FASTCONV_NUM_THREADS``, ``FASTCONV_ISA``), the best that the machine has.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import NamedTuple

from .buffers import Packed

ENGINES = ("cython", "numba", "numpy")  #: fastest first
PRECISIONS = ("highest", "high", "medium")
ACTIVATIONS = (None, "relu")
MOST_THREADS = 1024
ISAS = ("scalar", "avx2", "avx512", "amx")


class Config(NamedTuple):
    """The settings in force; None means the best there is (for threads: as many as the machine allows)."""

    engine: str | None = None
    precision: str = "highest"
    num_threads: int | None = None


class Options(NamedTuple):
    """What a kernel is told beside its arrays and dims."""

    activation: str | None
    precision: str
    threads: int
    packed: Packed | None = None  #: where a kernel may keep weights as it has packed them, for later calls


Setting = tuple[str | None, str, int]  #: engine, precision and threads of a call


def check_engine(engine: object, name: str = "engine") -> str | None:
    """Return ``engine`` if it is None or an engine that works here; ValueError or ImportError says what is missing."""
    if engine is None:
        return None
    if not isinstance(engine, str) or engine not in ENGINES:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, ENGINES))} or None, got {engine!r}")
    reason = why_missing(engine)
    if reason:
        raise ImportError(f"{name} {engine!r} is not available: {reason}")
    return engine


def check_precision(precision: object) -> str:
    """Return ``precision`` if it is one of the three words."""
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    return precision


def check_threads(threads: object, name: str = "num_threads") -> int:
    """Return ``threads`` if it is a positive integer."""
    if isinstance(threads, bool) or not hasattr(threads, "__index__"):
        raise TypeError(f"{name} must be an integer, got {threads!r}")
    number = threads.__index__()
    if not 1 <= number <= MOST_THREADS:
        raise ValueError(f"{name} must be from 1 to {MOST_THREADS}, got {number}")
    return int(number)


def _environment_engine() -> str | None:
    return check_engine(os.environ.get("FASTCONV_ENGINE") or None, "environment variable FASTCONV_ENGINE")


@cache
def _environment_threads() -> int | None:
    text = os.environ.get("FASTCONV_NUM_THREADS")
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"environment variable FASTCONV_NUM_THREADS must be a positive integer, got {text!r}")
    return check_threads(int(text), "environment variable FASTCONV_NUM_THREADS")


class _Defaults:
    """The settings of the process; read from the environment at first use, not at import."""

    config: Config | None = None

    @classmethod
    def get(cls) -> Config:
        if cls.config is None:
            cls.config = Config(engine=_environment_engine(), num_threads=_environment_threads())
        return cls.config


class _Context:
    """The settings of an open ``config_context``, by name; those that it lacks are the process's."""

    def __init__(self, settings: dict[str, str | int | None]) -> None:
        self.settings = settings
        self.merge()

    def merge(self) -> Config:
        """Return the settings in force; keep them, and what the process's are now."""
        defaults = _Defaults.get()
        config = defaults._replace(**self.settings)  # type: ignore[arg-type]
        self.merged = defaults, config  # in one step: threads may share a context
        return config


_context: ContextVar[_Context | None] = ContextVar("fastconv_config", default=None)


def get_config() -> Config:
    """Return the settings in force in this thread, a named tuple ``(engine, precision, num_threads)``.

    Examples
    --------
    >>> import fastconv as fc
    >>> fc.get_config().precision
    'highest'
    """
    context = _context.get()
    if context is None:
        return _Defaults.config or _Defaults.get()
    defaults, config = context.merged
    return config if defaults is _Defaults.config else context.merge()


@contextmanager
def config_context(
    *, engine: str | None = None, precision: str | None = None, num_threads: int | None = None
) -> Iterator[Config]:
    """Use other settings within a ``with`` block, in this thread (or asyncio task) only.

    What is not given stays as it is outside the block.

    Parameters
    ----------
    engine : {"cython", "numba", "numpy"}, optional
        The engine for calls that do not name one.
    precision : {"highest", "high", "medium"}, optional
        The promise about error for calls that do not name one.
    num_threads : int, optional
        The largest number of threads that a call uses.

    Raises
    ------
    ValueError, TypeError
        For an unknown word or number.
    ImportError
        For an engine that is not installed.

    Examples
    --------
    >>> import fastconv as fc
    >>> with fc.config_context(engine="numpy", num_threads=1) as config:
    ...     config.engine
    'numpy'
    """
    outer = _context.get()
    settings: dict[str, str | int | None] = {} if outer is None else outer.settings.copy()
    if engine is not None:
        settings["engine"] = check_engine(engine)
    if precision is not None:
        settings["precision"] = check_precision(precision)
    if num_threads is not None:
        settings["num_threads"] = check_threads(num_threads)
    token = _context.set(_Context(settings))
    try:
        yield get_config()
    finally:
        _context.reset(token)


def set_num_threads(n: int) -> None:
    """Set the largest number of threads that a call uses, in all threads of this process.

    An open ``config_context`` that gives another number keeps it until it ends.

    Parameters
    ----------
    n : int
        At least 1.

    Examples
    --------
    >>> import fastconv as fc
    >>> before = fc.get_num_threads()
    >>> fc.set_num_threads(1)
    >>> fc.get_num_threads()
    1
    >>> fc.set_num_threads(before)
    """
    _Defaults.config = _Defaults.get()._replace(num_threads=check_threads(n, "n"))


def get_num_threads() -> int:
    """Return the largest number of threads that a call uses.

    Without ``set_num_threads``, ``config_context`` and ``FASTCONV_NUM_THREADS`` it is what OpenMP allows
    (``OMP_NUM_THREADS``, threadpoolctl) or, where the native engine is missing, the number of usable processors.

    Examples
    --------
    >>> import fastconv as fc
    >>> with fc.config_context(num_threads=1):
    ...     fc.get_num_threads()
    1
    """
    return settings(None, None)[2]


def settings(engine: str | None, precision: str | None) -> Setting:
    """Return engine, precision and threads of a call that asks for these two, from the settings in force."""
    usual_engine, usual_precision, threads = get_config()
    return (
        usual_engine if engine is None else engine,
        usual_precision if precision is None else precision,
        _count_threads()() if threads is None else threads,
    )


@cache
def _count_threads() -> Callable[[], int]:
    """Return what tells how many threads the machine allows."""
    native = native_module()
    if native is not None:
        counted: Callable[[], int] = native.max_threads
        return counted
    if hasattr(os, "sched_getaffinity"):
        return lambda: len(os.sched_getaffinity(0))
    return lambda: os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------------
# Engines
# ---------------------------------------------------------------------------------------------------------------------


@cache
def _import_native() -> tuple[ModuleType | None, str]:
    check_isa()
    try:
        with _patient_openmp():
            return importlib.import_module("fastconv.kernels.native.machine"), ""
    except ImportError as error:
        return None, f"the native engine was not built, or does not load ({error}); reinstall with a C compiler"


#: How OpenMP's threads wait: GCC's spin for some 100 microseconds, so that the next loop of a call, or the next layer,
#: finds them awake, and then sleep; others sleep.
WAITING = {"GOMP_SPINCOUNT": "4000", "OMP_WAIT_POLICY": "passive"}


@contextmanager
def _patient_openmp() -> Iterator[None]:
    """Load OpenMP so that its threads soon sleep when they wait, unless the user has set how they wait.

    By default they spin for milliseconds, and on a busy machine they keep from the processor the very thread that they
    wait for. OpenMP reads these settings once, when it is loaded.
    """
    if any(name in os.environ for name in WAITING):
        yield
        return
    os.environ.update(WAITING)
    try:
        yield
    finally:
        for name in WAITING:
            del os.environ[name]


def native_module() -> ModuleType | None:
    """Return the native engine's ``machine`` module, or None where it is missing."""
    return _import_native()[0]


def check_isa() -> None:
    """Raise ValueError if the environment asks for an instruction set that does not exist."""
    cap = os.environ.get("FASTCONV_ISA")
    if cap and cap not in ISAS:
        raise ValueError(f"environment variable FASTCONV_ISA must be one of {', '.join(ISAS)}, got {cap!r}")


@cache
def why_missing(engine: str) -> str:
    """Return why an engine can't be used here, or an empty string."""
    if engine == "cython":
        return _import_native()[1]
    if engine == "numba" and importlib.util.find_spec("numba") is None:
        return "Numba is not installed; pip install 'fastconv[numba]'"
    return ""


def isa() -> str:
    """Return the instruction set that the native engine uses: scalar, avx2, avx512 or amx; "none" without it."""
    native = native_module()
    return "none" if native is None else str(native.isa())


def show_config() -> None:
    """Print versions, engines (and why one is missing), CPU, instruction sets and threads.

    Examples
    --------
    >>> import fastconv as fc
    >>> fc.show_config()  # doctest: +ELLIPSIS
    fastconv         ...
    """
    print("\n".join(f"{key:<16} {value}" for key, value in config_report().items()))


def config_report() -> dict[str, str]:
    """Return what ``show_config`` prints, by name."""
    import numpy as np

    import fastconv

    report = {
        "fastconv": fastconv.__version__,
        "python": f"{platform.python_version()} {platform.python_implementation()}, {platform.platform(terse=True)}",
        "numpy": np.__version__,
        "cpu": _cpu_name(),
    }
    for engine in ENGINES:
        report[f"engine {engine}"] = (
            f"missing: {why_missing(engine)}" if why_missing(engine) else _engine_detail(engine)
        )
    report["threads"] = f"{get_num_threads()} of {os.cpu_count()} processors"
    config = get_config()
    report["settings"] = f"engine={config.engine or 'best'}, precision={config.precision}"
    return report


def _engine_detail(engine: str) -> str:
    if engine == "cython":
        native = native_module()
        assert native is not None
        here, built = ", ".join(native.available_isas()), ", ".join(native.built_isas())
        return f"yes; instruction set {native.isa()} (works here: {here}; built: {built}); {native.compiler()}"
    if engine == "numba":
        from importlib.metadata import version

        return f"yes; numba {version('numba')}, llvmlite {version('llvmlite')}"
    return "yes"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
