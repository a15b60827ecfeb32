"""The examples in the docstrings run, and give what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fastconv

MODULES = ["fastconv"] + [
    module.name
    for module in pkgutil.iter_modules(fastconv.__path__, "fastconv.")
    if module.name.rsplit(".", 1)[1] not in ("kernels", "bench", "__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_every_public_function_has_an_example() -> None:
    without = [
        f"{module.__name__}.{name}"
        for module in (fastconv, fastconv.grad)
        for name in module.__all__
        if callable(getattr(module, name)) and ">>>" not in (getattr(module, name).__doc__ or "")
    ]
    assert without == []
