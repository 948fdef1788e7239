"""Oracles and kernel tables of the model tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_engine.ops import Ops, load_ops
from tests.models.oracle import Oracle


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """These models are too small to share a multiplication, and idle OpenMP threads spin."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def exact() -> Ops:
    return load_ops("cpu", "exact", "fp32")


@pytest.fixture(scope="session", params=["exact", "fast"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_ops("cpu", request.param, "fp32")


@pytest.fixture(scope="session")
def oracles() -> dict[Path, Oracle]:
    return {}


@pytest.fixture(scope="session", params=["nano", "tiny", "nano-v3", "tiny-v3"])
def oracle(request: pytest.FixtureRequest, oracles: dict[Path, Oracle]) -> Oracle:
    """A checkpoint of random weights as transformers sees it."""
    return _oracle(request, oracles)


@pytest.fixture(scope="session", params=["nano", "tiny"])
def sparse_oracle(request: pytest.FixtureRequest, oracles: dict[Path, Oracle]) -> Oracle:
    """`oracle`, of the models with an indexer only."""
    return _oracle(request, oracles)


def _oracle(request: pytest.FixtureRequest, oracles: dict[Path, Oracle]) -> Oracle:
    path = request.getfixturevalue(request.param.replace("-", "_") + "_dir")
    return oracles.setdefault(path, Oracle(path))
