"""``jit``: compile a function with Numba, without the GIL, cached on disk and never stale.

Numba's own cache looks at the file a function stands in, and so misses a change in another file whose functions were
inlined. Ours is stamped with the contents of every file of this folder: an edit anywhere recompiles everything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile


def _folder_stamp() -> str:
    """Return a hash of what compiled code depends on; the CPU and its own version Numba looks at itself."""
    digest = hashlib.sha256(f"{__name__} {os.environ.get('FASTCONV_ISA')}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _folder_stamp()


class _FolderCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function, fresh only while no file of the folder changes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path, filename_base=self._impl.filename_base, source_stamp=_STAMP
        )


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function that other compiled functions call, when one first does.

    Float arithmetic is IEEE's (no fastmath); indices are not checked.
    """
    return _compiled(function, no_cpython_wrapper=True)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls, at its first call."""
    return _compiled(function)


def _compiled(function: Callable[..., Any], **options: bool) -> Any:
    dispatcher = numba.njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True, **options)(function)
    template = dispatcher.get_call_template
    # A literal argument has a type of its own, and would have a version of the function compiled of its own.
    dispatcher.get_call_template = lambda args, kws: template([types.unliteral(a) for a in args], kws)
    # RuntimeError: no folder to write to (Numba looks beside the file, then in the user's). Compile in every process.
    with suppress(RuntimeError):
        dispatcher._cache = _FolderCache(function)
    return dispatcher
