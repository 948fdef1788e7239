"""Kernel tables under test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llm_engine.ops import Ops, load_ops


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def exact() -> Ops:
    return load_ops("cpu", "exact", "fp32")


@pytest.fixture(scope="session")
def exact_bf16() -> Ops:
    return load_ops("cpu", "exact", "bf16")


@pytest.fixture(scope="session", params=["exact/fp32", "exact/bf16", "fast/fp32", "fast/bf16"])
def ops(request: pytest.FixtureRequest) -> Ops:
    """Every table this backend builds."""
    numerics, dtype = request.param.split("/")
    return load_ops("cpu", numerics, dtype)
