"""Tests that need an accelerator: `TRITON_INTERPRET=0 python -m pytest tests/gpu -m gpu`.

What they measure is printed at the end, and appended at once to the file named by BATON_GPU_REPORT; failures to that
name with `.failures` behind it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

_REPORT = "BATON_GPU_REPORT"
Note = Callable[..., None]


def pytest_configure(config: pytest.Config) -> None:
    if _REPORT not in os.environ:
        os.environ[_REPORT] = tempfile.mkstemp(prefix="baton-gpu-", suffix=".jsonl")[1]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    lines = Path(os.environ[_REPORT]).read_text(encoding="utf-8").splitlines()
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.line(line)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Show a failure when it happens: the run may be cut off before the summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        text = f"\n--- {report.nodeid} ({report.when})\n{report.longreprtext[-4000:]}\n"
        sys.stderr.write(text)
        with Path(os.environ[_REPORT] + ".failures").open("a", encoding="utf-8") as file:
            file.write(text)


@pytest.fixture(scope="session", autouse=True)
def card() -> torch.device:
    """The accelerator that everything runs on."""
    device = torch.accelerator.current_accelerator()
    if device is None or os.environ.get("TRITON_INTERPRET") != "0":
        pytest.skip("needs an accelerator and TRITON_INTERPRET=0")
    return torch.device(device.type, 0)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """Adds a line to what is printed at the end."""

    def write(**values: Any) -> None:
        with Path(os.environ[_REPORT]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": request.node.name, **values}) + "\n")

    return write
