"""From a card through host memory: every byte arrives, nothing is read too early, or when a turn is over."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest
import torch

from kv_transfer import staged
from kv_transfer.device import DeviceRegion, Mark
from kv_transfer.layout import layer_planes
from kv_transfer.link import Copy, LeaseKey, Link, Sent, no_news
from kv_transfer.writer import Handoff
from tests.unit.kv_transfer.rig import BLOCK_TOKENS, FIRST, MOONCAKE, Rig, until

_WAIT_S = 20.0


class SlowCard(DeviceRegion):
    """Computes what was reported, and copies what was enqueued, when a test says so. Copies really run at the end."""

    def __init__(self, memory: torch.Tensor) -> None:
        super().__init__(memory)
        self.computed: list[threading.Event] = []
        self.copies: list[threading.Event] = []
        self.copies_at_once = True

    def mark(self) -> Mark:
        self.computed.append(threading.Event())
        return self.computed[-1]  # type: ignore[return-value]

    def copied(self) -> Mark:
        event = threading.Event()
        if self.copies_at_once:
            event.set()
        self.copies.append(event)
        return event  # type: ignore[return-value]

    def reached(self, mark: Mark) -> bool:
        return mark is None or mark.is_set()  # type: ignore[attr-defined, no-any-return]

    def wait(self, mark: Mark) -> None:
        assert mark is None or mark.wait(_WAIT_S)  # type: ignore[call-arg, func-returns-value]

    def recycle(self, marks: object) -> None:
        pass


def on_card(rig: Rig, kind: type[DeviceRegion] = DeviceRegion) -> DeviceRegion:
    """Put the rig's source on what stands for a card."""
    rig.card = kind(torch.frombuffer(rig.source.buffer, dtype=torch.uint8))
    return rig.card


def small_halves(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """So that layers are cut."""
    monkeypatch.setattr(staged, "_HALF_BYTES", num_bytes)
    monkeypatch.setattr(staged, "_ALIGNMENT", 64)


class Gated:
    """A link whose first write waits."""

    def __init__(self, inner: Link, go_on: threading.Event) -> None:
        self.transport, self.inner, self.go_on = inner.transport, inner, go_on
        self.begun = threading.Event()

    def write(
        self,
        lease: LeaseKey,
        source: memoryview,
        copies: Sequence[Copy],
        stopped: Callable[[], bool],
        sent: Sent = no_news,
    ) -> None:
        self.begun.set()
        assert self.go_on.wait(_WAIT_S)
        self.inner.write(lease, source, copies, stopped, sent)

    def confirm(self, lease: LeaseKey) -> Future[int | None]:
        return self.inner.confirm(lease)

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("half_bytes", [64, 1 << 20])
@pytest.mark.parametrize("checksum", ["full", "sampled"])
@pytest.mark.parametrize("transport", ["shm", "tcp", MOONCAKE])
async def test_every_byte_arrives(
    transport: str, checksum: str, half_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs and fragments, whole prompts and chunks, with and without what the receiver has, several at a time."""
    small_halves(monkeypatch, half_bytes)
    rig, rng = Rig(transport, checksum=checksum, scale=7, num_blocks=40), random.Random(5)
    on_card(rig)
    async with rig:
        for first in range(0, 16, 4):
            begun: list[Handoff] = []
            for number in range(first, first + 4):
                count, name = rng.randint(1, 10), f"r{number}"
                blocks = rng.sample(range(40), count) if number % 2 else list(range(number, number + count))
                rig.pool.have_blocks[name, 0] = rng.choice([0, 0, count // 2, count])
                begun.append(rig.offer(name, count * BLOCK_TOKENS - rng.randint(0, 3), blocks=blocks))
                rig.compute(begun[-1], chunk=rng.choice([1, 3, 100]))
            for handoff in begun:
                report = await handoff.commit(FIRST, compute_end=time.monotonic())
                assert report.num_bytes == report.num_blocks * rig.layout.bytes_per_block()
                rig.pool.finish(handoff.request_id)


async def test_nothing_is_read_before_it_is_computed() -> None:
    rig = Rig("shm", checksum="full")
    card = on_card(rig, SlowCard)
    assert isinstance(card, SlowCard)
    final = card.memory.clone()
    card.memory.fill_(0xEE)
    async with rig:
        handoff = rig.offer("r1", 40)
        rig.compute(handoff)
        await until(lambda: rig.pool.count("leased") == 10)
        for layer, rows in enumerate(layer_planes(rig.source_layout)):
            for row in rows:
                plane = rig.source_layout.planes[row.plane]
                first = plane.address(row.layer, 0, rig.source_layout.num_blocks)
                cells = slice(first, first + rig.source_layout.num_blocks * plane.block_bytes)
                card.memory[cells] = final[cells]
            await asyncio.sleep(0.02)  # what is not waited for is read by now
            card.computed[layer].set()
        await handoff.commit(FIRST, compute_end=time.monotonic())
        assert torch.equal(card.memory, final), "the rig has compared all of it"


async def test_a_piece_is_written_when_its_copy_has_ended_and_a_turn_waits_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_halves(monkeypatch, 64)
    rig = Rig("shm", scale=7)
    card = on_card(rig, SlowCard)
    assert isinstance(card, SlowCard)
    card.copies_at_once = False
    async with rig:
        handoff = rig.offer("r1", 40)
        rig.compute(handoff)
        for event in card.computed:
            event.set()
        await until(lambda: len(card.copies) == 2)
        before = bytes(rig.arena.buffer)
        ending = asyncio.create_task(handoff.abort())
        for event in card.copies:
            done, _ = await asyncio.wait({ending}, timeout=0.1)
            assert not done, "the card still reads the blocks"
            assert rig.arena.buffer == before, "nothing was written from memory that is being filled"
            event.set()
        await ending
        assert rig.arena.buffer == before, "stopped before it was written"


async def test_a_hand_off_that_waits_for_the_card_lets_others_go_first() -> None:
    rig = Rig("shm")
    card = on_card(rig, SlowCard)
    assert isinstance(card, SlowCard)
    go_on, links = threading.Event(), list[Gated]()

    def gate(link: Link) -> Link:
        links.append(Gated(link, go_on))
        return links[-1]

    async with rig:
        client = await rig.add_client("prefill-1", wrap_link=gate)
        slow = rig.offer("slow", 20, client=client)
        for layer in (0, 1):
            slow.layers_ready(range(layer, layer + 1), 0, rig.sent["slow", 0])
        card.computed[0].set()
        await until(lambda: bool(links) and links[0].begun.is_set())
        quick = rig.offer("quick", 20, client=client)
        rig.compute(quick)
        for event in card.computed[2:]:
            event.set()
        await until(lambda: quick._granted.is_set())
        go_on.set()
        await quick.commit(FIRST, compute_end=time.monotonic())
        assert not slow._outbox._items or not card.computed[1].is_set()
        card.computed[1].set()
        for layer in (2, 3):
            slow.layers_ready(range(layer, layer + 1), 0, rig.sent["slow", 0])
            card.computed[-1].set()
        await slow.commit(FIRST, compute_end=time.monotonic())


async def test_memory_that_can_not_be_pinned_fails_the_hand_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("out of locked memory")

    rig = Rig("tcp")
    on_card(rig)
    async with rig:
        monkeypatch.setattr(staged.torch, "empty", refuse)
        with pytest.raises(Exception, match=r"MiB of host memory can't be pinned: out of locked memory"):
            await rig.hand_off("r1", 20)
        monkeypatch.undo()
        await rig.hand_off("r1", 20, attempt=1)
