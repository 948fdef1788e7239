"""Slots of host memory between a card's caches and peers: who holds them, what is in them, when they are free again."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch

from llm_engine.api.config import KvConfig
from llm_engine.api.errors import ConfigError
from llm_engine.api.handoff import KvLayout
from llm_engine.models.sizes import size_config
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import load_ops
from llm_engine.runtime.kv_store import KvStore, plan_layout
from llm_engine.serving.staging import Inbound, Mirror, Stager, staging_layout

NUM_BLOCKS = 40
BLOCK = 4
SPEC = ModelSpec.from_config(size_config("nano"))
_WAIT_S = 20.0


class Ends:
    """A store of random bytes, slots for some of its blocks, and a stager whose deliveries are collected."""

    def __init__(self, longest: int, kind: type[Mirror] = Mirror) -> None:
        layout = plan_layout(SPEC, KvConfig(num_blocks=NUM_BLOCKS, block_tokens=BLOCK), torch.float32, with_mtp=True)
        arena = torch.randint(0, 256, (layout.arena_bytes,), dtype=torch.uint8)
        self.store = KvStore(layout, arena, torch.float32)
        self.layout = staging_layout(layout, KvConfig(staging_mb=1), longest * BLOCK)
        per_block = layout.bytes_per_block()
        assert self.layout.num_blocks == min((1 << 20) // per_block, NUM_BLOCKS)
        self.host = torch.zeros(self.layout.arena_bytes, dtype=torch.uint8)
        self.mirror = kind(self.store, self.layout, self.host, load_ops("cpu"))
        self.failures: list[Exception] = []
        self.news = threading.Condition()

    def stager(self, num_slots: int) -> Stager:
        return Stager(self.mirror, num_slots, self.failures.append)

    def bytes_at(self, layout: KvLayout, memory: torch.Tensor, layer: int, block: int) -> list[bytes]:
        """Of one block in every plane of a layer; the draft layer comes after the others."""
        found = []
        for plane in layout.planes:
            row = layer - (SPEC.num_layers if plane.name.startswith("mtp_") else 0)
            if 0 <= row < plane.num_layers:
                start = plane.address(row, block, layout.num_blocks)
                found.append(bytes(memory[start : start + plane.block_bytes].numpy()))
        return found


class Receiver:
    """Keeps what a hand-off is told, and compares it with the store's bytes on the spot."""

    def __init__(self, ends: Ends, blocks: Seq[int]) -> None:
        self.ends, self.blocks = ends, blocks
        self.slots: dict[int, list[int]] = defaultdict(list)

    def __call__(self, layer: int, first: int, slots: Seq[int]) -> None:
        ends = self.ends
        for place, slot in enumerate(slots, first):
            sent = ends.bytes_at(ends.store.layout, ends.store.arena, layer, self.blocks[place])
            assert ends.bytes_at(ends.layout, ends.host, layer, slot) == sent
        with ends.news:
            assert first == len(self.slots[layer])
            self.slots[layer] += slots
            ends.news.notify_all()

    def wait(self, num_layers: int) -> None:
        with self.ends.news:
            complete = [len(self.blocks)] * num_layers
            done = self.ends.news.wait_for(
                lambda: self.ends.failures or [len(self.slots[layer]) for layer in range(num_layers)] == complete,
                _WAIT_S,
            )
        assert not self.ends.failures, self.ends.failures
        assert done, "blocks did not arrive"


@pytest.mark.parametrize("seed", range(4))
def test_many_sequences_share_few_slots(seed: int) -> None:
    """More blocks than slots at any time, reported in pieces and layer by layer; every byte arrives."""
    rng = random.Random(seed)
    ends, num_slots, num_layers = Ends(6), 8, SPEC.num_layers + 1
    stager = ends.stager(num_slots)
    sent = []
    for _ in range(12):
        blocks = rng.sample(range(NUM_BLOCKS), rng.randint(1, 6))
        receiver = Receiver(ends, blocks)
        sent.append((stager.open(len(blocks), receiver), receiver))
    for sending, receiver in sent:
        cut = rng.randint(0, len(receiver.blocks))
        for first, piece in ((0, receiver.blocks[:cut]), (cut, receiver.blocks[cut:])):
            for layer in range(num_layers) if piece else ():
                sending.layer_ready(layer, first, piece)
    for sending, receiver in sent:  # a hand-off ends as its peer confirms it
        receiver.wait(num_layers)
        assert all(slots == receiver.slots[0] for slots in receiver.slots.values()), "a block has one slot"
        sending.close()
        sending.close()
    whole = stager.open(num_slots, lambda *_: None)
    assert sorted(whole.slots) == list(range(num_slots)), "every slot came back"
    stager.close()


def test_a_sequence_that_ends_early_makes_room_for_those_behind_it() -> None:
    ends = Ends(6)
    stager = ends.stager(6)
    holder, impatient = stager.open(6, lambda *_: None), stager.open(4, lambda *_: None)
    receiver = Receiver(ends, [3, 4])
    last = stager.open(2, receiver)
    for layer in range(SPEC.num_layers + 1):
        impatient.layer_ready(layer, 0, [1, 2])
        last.layer_ready(layer, 0, [3, 4])
    assert not receiver.slots, "nobody overtakes: the first has all slots, the second waits for them"
    impatient.close()
    holder.close()
    receiver.wait(SPEC.num_layers + 1)
    last.close()
    stager.close()


class Gated(Mirror):
    """A card whose copies end when a test says so."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.begun, self.may_end = threading.Semaphore(0), threading.Semaphore(0)

    def to_host(self, *args: Any) -> Any:
        self.begun.release()
        assert self.may_end.acquire(timeout=_WAIT_S)
        return super().to_host(*args)


def test_slots_are_not_given_on_while_a_copy_into_them_is_in_flight() -> None:
    ends = Ends(6, Gated)
    assert isinstance(ends.mirror, Gated)
    stager = ends.stager(2)
    first = stager.open(2, lambda *_: None)
    first.layer_ready(0, 0, [1, 2])
    assert ends.mirror.begun.acquire(timeout=_WAIT_S)
    first.close()
    second = stager.open(2, lambda *_: None)
    assert second.slots == []
    ends.mirror.may_end.release()
    stager.close()
    assert sorted(second.slots) == [0, 1]


def test_reports_stay_in_order_when_slots_come_between_them() -> None:
    """The first report waits for slots; the second is queued before the stager hears that there are some."""
    ends = Ends(6, Gated)
    assert isinstance(ends.mirror, Gated)
    stager, receiver = ends.stager(2), Receiver(ends, [5, 6])
    holder, late = stager.open(2, lambda *_: None), stager.open(2, receiver)
    late.layer_ready(0, 0, [5])
    for block in (1, 2):
        holder.layer_ready(0, block - 1, [block])
        assert ends.mirror.begun.acquire(timeout=_WAIT_S)  # all reports before it have been looked at
        if block == 1:
            ends.mirror.may_end.release()
    late.layer_ready(0, 1, [6])
    holder.close()
    for _ in range(3):
        ends.mirror.may_end.release()
    receiver.wait(1)
    late.close()
    stager.close()


def test_a_failed_copy_is_told() -> None:
    ends = Ends(6)
    stager = ends.stager(2)
    stager.open(1, lambda *_: None).layer_ready(0, 0, [NUM_BLOCKS])  # no such block
    stager.close()
    assert len(ends.failures) == 1


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
