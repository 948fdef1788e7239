"""Checkpoints that tests share: made once a session, never modified.

`*_dir` holds random weights, where every token depends on the whole context: for tests of arithmetic and of caches.
`*_planted_dir` holds weights whose greedy continuation is known from the last token alone: for tests of text and flow.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# Read when Triton is first imported, which other libraries do too. Set it to 0 to test on an accelerator.
os.environ.setdefault("TRITON_INTERPRET", "1")


def make(size: str, out_dir: Path, **options: Any) -> Path:
    from llm_engine.models.synthetic import make_checkpoint  # imports torch, which tests of the edge do without

    return make_checkpoint(size, out_dir, **options)


@pytest.fixture(scope="session")
def checkpoint_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def nano_dir(checkpoint_root: Path) -> Path:
    return make("nano", checkpoint_root / "nano", planted=False)


@pytest.fixture(scope="session")
def tiny_dir(checkpoint_root: Path) -> Path:
    return make("tiny", checkpoint_root / "tiny", planted=False)


@pytest.fixture(scope="session")
def tiny_gpu_dir(checkpoint_root: Path) -> Path:
    return make("tiny-gpu", checkpoint_root / "tiny-gpu", planted=False)


@pytest.fixture(scope="session")
def nano_v3_dir(checkpoint_root: Path) -> Path:
    return make("nano-v3", checkpoint_root / "nano-v3", planted=False)


@pytest.fixture(scope="session")
def tiny_v3_dir(checkpoint_root: Path) -> Path:
    return make("tiny-v3", checkpoint_root / "tiny-v3", planted=False)


@pytest.fixture(scope="session")
def nano_planted_dir(checkpoint_root: Path) -> Path:
    return make("nano", checkpoint_root / "nano-planted")


@pytest.fixture(scope="session")
def tiny_planted_dir(checkpoint_root: Path) -> Path:
    return make("tiny", checkpoint_root / "tiny-planted")


@pytest.fixture(scope="session")
def nano_planted_noisy_dir(checkpoint_root: Path) -> Path:
    """About a third of the MTP drafts is wrong."""
    return make("nano", checkpoint_root / "nano-planted-noisy", noise=3.0)


@pytest.fixture(scope="session")
def tiny_planted_noisy_dir(checkpoint_root: Path) -> Path:
    """About a quarter of the MTP drafts is wrong."""
    return make("tiny", checkpoint_root / "tiny-planted-noisy", noise=6.0)
