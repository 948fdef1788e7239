"""The Triton table under test: interpreted on the CPU, or native with TRITON_INTERPRET=0 on a machine with a card."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_engine.ops import Ops, load_ops


class WithoutTriton(pytest.Module):
    """Stands for a test file where Triton, a large package that serving on a CPU does without, is not installed."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        raise pytest.skip.Exception("needs Triton: pip install -c constraints.txt -e '.[ci]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if importlib.util.find_spec("triton") is None:
        return WithoutTriton.from_parent(parent, path=module_path)
    return None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Slots of a deal that nobody has hold what the memory held, and are quantised with the others."""
    item.add_marker(pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"))


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    from tests.ops_triton import interpreter

    interpreter.install()


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """Where the tensors of a test are made unless it says otherwise."""
    from llm_engine.ops_triton.lang import INTERPRETED

    chosen = torch.device("cpu") if INTERPRETED else torch.accelerator.current_accelerator()
    assert chosen is not None, "TRITON_INTERPRET=0 needs an accelerator"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_device(chosen)
    with torch.inference_mode(), np.errstate(all="ignore"):  # padding rows hold what the memory held
        yield chosen
    torch.set_default_device(None)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=["exact/fp32", pytest.param("fast/bf16", marks=pytest.mark.slow)])
def ops(request: pytest.FixtureRequest) -> Ops:
    numerics, dtype = request.param.split("/")
    return load_ops("triton", numerics, dtype)


@pytest.fixture(scope="session")
def exact() -> Ops:
    return load_ops("triton", "exact", "fp32")


@pytest.fixture(scope="session")
def exact_bf16() -> Ops:
    return load_ops("triton", "exact", "bf16")
