"""Slots of host memory between a card's caches and peers: who holds them, what is in them, when they are free again."""

from __future__ import annotations

import pytest
import torch

from llm_engine.api.config import KvConfig
from llm_engine.api.errors import ConfigError
from llm_engine.api.handoff import KvLayout
from llm_engine.models.sizes import size_config
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import load_ops
from llm_engine.runtime.kv_store import KvStore, plan_layout
from llm_engine.serving.staging import Inbound, Mirror, staging_layout

NUM_BLOCKS = 40
BLOCK = 4
SPEC = ModelSpec.from_config(size_config("nano"))


class Ends:
    """A store of random bytes, and slots for some of its blocks."""

    def __init__(self, longest: int) -> None:
        layout = plan_layout(SPEC, KvConfig(num_blocks=NUM_BLOCKS, block_tokens=BLOCK), torch.float32, with_mtp=True)
        arena = torch.randint(0, 256, (layout.arena_bytes,), dtype=torch.uint8)
        self.store = KvStore(layout, arena, torch.float32)
        self.layout = staging_layout(layout, KvConfig(staging_mb=1), longest * BLOCK)
        per_block = layout.bytes_per_block()
        assert self.layout.num_blocks == min((1 << 20) // per_block, NUM_BLOCKS)
        self.host = torch.zeros(self.layout.arena_bytes, dtype=torch.uint8)
        self.mirror = Mirror(self.store, self.layout, self.host, load_ops("cpu"))

    def bytes_at(self, layout: KvLayout, memory: torch.Tensor, layer: int, block: int) -> list[bytes]:
        """Of one block in every plane of a layer; the draft layer comes after the others."""
        found = []
        for plane in layout.planes:
            row = layer - (SPEC.num_layers if plane.name.startswith("mtp_") else 0)
            if 0 <= row < plane.num_layers:
                start = plane.address(row, block, layout.num_blocks)
                found.append(bytes(memory[start : start + plane.block_bytes].numpy()))
        return found


def test_what_peers_filled_reaches_the_card() -> None:
    ends = Ends(6)
    inbound = Inbound(ends.mirror, 8)
    taken = inbound.take(3)
    assert taken is not None
    assert inbound.take(6) is None
    ends.host.random_(0, 256)
    before = ends.store.arena.clone()
    blocks = [7, 0, 39]
    inbound.load(taken, blocks)
    for layer in range(SPEC.num_layers + 1):
        for slot, block in zip(taken, blocks, strict=True):
            filled = ends.bytes_at(ends.layout, ends.host, layer, slot)
            assert ends.bytes_at(ends.store.layout, ends.store.arena, layer, block) == filled
        for block in set(range(NUM_BLOCKS)) - set(blocks):
            kept = ends.bytes_at(ends.store.layout, before, layer, block)
            assert ends.bytes_at(ends.store.layout, ends.store.arena, layer, block) == kept
    inbound.give(taken)
    assert inbound.take(8) is not None


def test_too_little_host_memory_is_refused() -> None:
    layout = plan_layout(SPEC, KvConfig(num_blocks=400, block_tokens=16), torch.float32, with_mtp=True)
    with pytest.raises(ConfigError, match=r"^kv.staging_mb=1: expected at least \d+, for 5000 tokens; or unset$"):
        staging_layout(layout, KvConfig(staging_mb=1), 5000)
    assert staging_layout(layout, KvConfig(), 5000).num_blocks == 400
