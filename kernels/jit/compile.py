"""``kernel`` and ``jit``: compile functions with Numba, without the GIL, cached on disk and never stale.

A ``kernel`` is what Python calls; there are a dozen. All else is ``jit``, and only ever a part of kernels. Three things
differ from plain ``numba.njit(cache=True)``:

- Parts are not optimized, compiled to machine code and cached by themselves, but only within their kernels: that halves
  the time to compile.
- Numba's own cache looks at the file a function stands in, and so misses a change in another file whose functions were
  inlined. Ours is stamped with the contents of every file of this folder: an edit anywhere recompiles everything.
- Loading a kernel from the cache loads nothing else. Numba would first import all that its compiler may need and
  compile its runtime, which takes ten times as long. The price: kernels get no arrays, whose memory that runtime looks
  after, but numbers and tuples of them; arrays are addresses (see ``pointer`` in tile.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numba
from llvmlite.binding import Linkage, ModuleRef, add_symbol, parse_assembly
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.runtime import _nrt_python
from numba.extending import typeof_impl


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function that other compiled functions call, when one first does.

    Float arithmetic is IEEE's (no fastmath); indices are not checked.
    """
    return _JitPart(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls, at its first call, or load it from the cache."""
    dispatcher = _compiled(function, _KernelCompiler)
    _KERNELS.append(dispatcher)
    dispatcher._cache = _LazyCache(function)
    # Numba would ask every installed package for extensions of its compiler: nothing that kernels are made of.
    dispatcher._compilation_chain_init_hook = lambda: None
    return dispatcher


class _JitPart:
    """A ``jit`` function: Numba's object for it is made when a kernel that calls it is compiled, and not loaded."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @cached_property
    def dispatcher(self) -> Any:
        return _compiled(self._function, _PartCompiler, no_cpython_wrapper=True)


@typeof_impl.register(_JitPart)
def _type_of_part(part: _JitPart, context: Any) -> types.Dispatcher:
    return types.Dispatcher(part.dispatcher)


class Loads(NamedTuple):
    """Kernels, each of them counted once for each type of numbers."""

    compiled: int
    cached: int


_KERNELS: list[Any] = []


def loads() -> Loads:
    """Return how many kernels this process has compiled so far, and how many it has found in the cache."""
    stats = [kernel.stats for kernel in _KERNELS]
    return Loads(sum(len(s.cache_misses) for s in stats), sum(len(s.cache_hits) for s in stats))


def _compiled(function: Callable[..., Any], pipeline: type[Compiler], **options: bool) -> Any:
    compiled = numba.njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True, pipeline_class=pipeline, **options)
    dispatcher = compiled(function)
    template = dispatcher.get_call_template
    # A literal argument has a type of its own, and would have a version of the function compiled of its own.
    dispatcher.get_call_template = lambda args, kws: template([types.unliteral(a) for a in args], kws)
    return dispatcher


# ---------------------------------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------------------------------


class _Part(JITCodeLibrary):  # type: ignore[misc]
    """The code of a ``jit`` function, which waits to be linked into a kernel."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    @property
    def codegen(self) -> _Part:
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """Do nothing: environments are for functions that deal with Python objects."""


class _Kernel(JITCodeLibrary):  # type: ignore[misc]
    """The code of a kernel and its parts."""

    def _optimize_final_module(self) -> None:
        # Nobody else links with these parts: LLVM may inline those that are called once, and drop what it has inlined.
        for part in self._final_module.functions:
            if part.linkage == Linkage.linkonce_odr:
                part.linkage = Linkage.internal
        super()._optimize_final_module()

    def _get_module_for_linking(self) -> ModuleRef:
        """Return the names without the code: it would go into the cache, and nobody links with a kernel."""
        functions, variables = (
            [value.name for value in values if not value.is_declaration and value.linkage != Linkage.internal]
            for values in (self._final_module.functions, self._final_module.global_variables)
        )
        return parse_assembly(
            "".join(f'define void @"{name}"() {{ ret void }}\n' for name in functions)
            + "".join(f'@"{name}" = common global i64 0\n' for name in variables)
        )


class _PartCompiler(Compiler):  # type: ignore[misc]
    def define_pipelines(self) -> Any:
        self.state["library"] = _Part(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()


class _KernelCompiler(Compiler):  # type: ignore[misc]
    def define_pipelines(self) -> Any:
        kernel = _Kernel(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        kernel.enable_object_caching()
        self.state["library"] = kernel
        return super().define_pipelines()


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def _folder_stamp() -> str:
    """Return a hash of what compiled code depends on; the CPU and its own version Numba looks at itself."""
    digest = hashlib.sha256(f"{__name__} {os.environ.get('FASTCONV_ISA')}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _folder_stamp()


class _LazyCache(NullCache):  # type: ignore[misc]
    """A cache that looks for its folder when a kernel is first called, and not when it is imported."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @cached_property
    def _cache(self) -> Any:
        # RuntimeError: no folder to write to (Numba looks beside the file, then in the user's).
        with suppress(RuntimeError):
            return _FolderCache(self._function)
        return NullCache()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        return self._cache.load_overload(sig, target_context)

    def save_overload(self, sig: Any, compiled: Any) -> None:
        self._cache.save_overload(sig, compiled)


class _FolderCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function, fresh only while no file of the folder changes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path, filename_base=self._impl.filename_base, source_stamp=_STAMP
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load a kernel as Numba does, but only name the runtime's functions to LLVM, and import no compiler."""
        for name, address in _nrt_python.c_helpers.items():
            add_symbol(name if name.startswith("_") else f"NRT_{name}", address)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)
