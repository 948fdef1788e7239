"""What a worker takes of a card, and what it says about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_engine.api.config import build
from llm_engine.api.errors import ConfigError
from llm_engine.api.messages import Role
from llm_engine.runtime.memory import free_and_total
from llm_engine.serving import assembly
from tests.gpu.conftest import Note

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


def assembled(path: Path, **kv: object) -> assembly.Assembly:
    config = build(
        {
            "model": {"path": str(path), "max_len": 512},
            "engine": {"backend": "triton", "dtype": "bf16", "num_drafts": 1},
            "kv": kv,
            "scheduler": {"max_num_seqs": 4},
        }
    )
    planned = assembly.plan(config, uses_control_port=False)
    return assembly.assemble(config, planned, lambda size: memoryview(bytearray(size)), Role.AGGREGATED)


def test_caches_take_their_share_of_what_is_free(tiny_dir: Path, card: torch.device, note: Note) -> None:
    free, _ = free_and_total(card)
    made = assembled(tiny_dir, memory_fraction=0.05)
    assert made.memory is not None
    note(report=str(made.memory))
    assert 0.04 * free < made.memory.caches <= 0.05 * free
    assert made.memory.weights > 10 << 20
    assert made.memory.activations > 0
    assert made.store.device == card


def test_more_than_there_is_is_an_error_of_one_line(tiny_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"^kv.num_blocks=100000000: the caches need \d+ MiB of the device, \d+ are"):
        assembled(tiny_dir, num_blocks=100_000_000)
    with pytest.raises(ConfigError, match=r"^kv.memory_mb=1: expected at least"):
        assembled(tiny_dir, memory_mb=1, block_tokens=1024)
