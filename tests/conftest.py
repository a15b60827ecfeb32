"""Settings of the whole suite, and fixtures that loop over what is installed here."""

from __future__ import annotations

import numpy as np
import pytest
from cases import CONV_CASES, CONV_OPS, rows_of
from hypothesis import settings

from fastconv.registry import Row, available
from fastconv.runtime import ENGINES, why_missing

settings.register_profile("fastconv", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("fastconv")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)


@pytest.fixture(params=[engine for engine in ENGINES if not why_missing(engine)])
def engine(request: pytest.FixtureRequest) -> str:
    """Every engine that works here."""
    return str(request.param)


@pytest.fixture(params=available("conv_forward"), ids=lambda row: f"{row.engine}-{row.algorithm}")
def conv_row(request: pytest.FixtureRequest) -> Row:
    """Every convolution algorithm of the registry whose engine works here."""
    row: Row = request.param
    return row


GENERAL = [
    row for row in available("conv_forward") if all(row in rows_of(case, op) for case in CONV_CASES for op in CONV_OPS)
]


@pytest.fixture(params=GENERAL, ids=lambda row: f"{row.engine}-{row.algorithm}")
def general_row(request: pytest.FixtureRequest) -> Row:
    """Every convolution algorithm that can do any convolution and its gradients."""
    row: Row = request.param
    return row


@pytest.fixture(params=available("max_pool_forward"), ids=lambda row: f"{row.engine}-{row.algorithm}")
def pool_row(request: pytest.FixtureRequest) -> Row:
    """Every pooling algorithm of the registry whose engine works here."""
    row: Row = request.param
    return row


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> type[np.floating]:
    kind: type[np.floating] = request.param
    return kind
