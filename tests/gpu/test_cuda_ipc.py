"""cuda_ipc between two processes: on one card, and on two where there are two."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from kv_transfer.device import DeviceRegion
from kv_transfer.device_verifier import DeviceLanding
from kv_transfer.memory import Arena
from kv_transfer.receiver import Ground, HandoffServer
from llm_engine.api.config import TransferConfig
from tests.gpu.conftest import Note
from tests.gpu.ipc_writer import memory
from tests.unit.kv_transfer.rig import KEY, Pool, Reservation, block_bytes, make_info, make_layout, until

pytestmark = pytest.mark.gpu

SLOTS = 200
BLOCKS, SCALE = 256, 768  # cells of 72 KiB and 30 KiB
CONFIG: dict[str, Any] = {"transport": "cuda_ipc", "checksum": "full", "canary_period_s": 60.0}
CARDS = [0, 1]


class Pair:
    """A receiver in this process and a writer in another."""

    def __init__(self, card: int, config: dict[str, Any], *, staging: bool = False) -> None:
        if card >= torch.cuda.device_count():
            pytest.skip(f"needs {card + 1} cards")
        self.config = {**CONFIG, **config}
        self.layout = make_layout(BLOCKS, scale=SCALE)
        self.region = DeviceRegion(torch.zeros(self.layout.arena_bytes, dtype=torch.uint8, device=f"cuda:{card}"))
        self.pool = Pool(BLOCKS, on_admit=self._check)
        self.slots = Arena.create(make_layout(SLOTS, scale=SCALE).arena_bytes, shared=True)
        self.staged = Pool(SLOTS, on_admit=self._check_slots)
        self.sent: dict[str, list[int]] = {}
        self.events: list[dict[str, Any]] = []
        self.server: HandoffServer[Reservation] = HandoffServer(
            config=TransferConfig(**self.config),
            key=KEY,
            layout=self.layout,
            arena=self.region,
            reserver=self.pool,
            staging=Ground(make_layout(SLOTS, scale=SCALE), self.slots, self.staged) if staging else None,
        )
        self.address = self.server.bind("127.0.0.1")
        self.child: asyncio.subprocess.Process

    async def start(self, *, relentless: bool, unreachable: bool = False, env: dict[str, str] | None = None) -> None:
        settings = {
            "unreachable": unreachable,
            "blocks": BLOCKS,
            "scale": SCALE,
            "config": self.config,
            "device": 0,
            "relentless": relentless,
            "control_addr": self.address,
        }
        words = [sys.executable, "-m", "tests.gpu.ipc_writer", json.dumps(settings)]
        pipe = asyncio.subprocess.PIPE
        self.child = await asyncio.create_subprocess_exec(
            *words, stdin=pipe, stdout=pipe, env={**os.environ, **(env or {})}
        )
        self._reading = asyncio.create_task(self._read())
        await self.seen(60, event="ready")

    def send(self, request_id: str, blocks: Sequence[int], layers: Sequence[int] = (0, 1, 2, 3)) -> None:
        assert self.child.stdin is not None
        self.sent[request_id] = list(blocks)
        self.child.stdin.write(json.dumps([request_id, list(blocks), list(layers)]).encode() + b"\n")

    async def seen(self, timeout_s: float = 20.0, **fields: Any) -> dict[str, Any]:
        def matching() -> list[dict[str, Any]]:
            return [event for event in self.events if fields.items() <= event.items()]

        await until(lambda: bool(matching()) or self.child.returncode is not None, timeout_s)
        assert matching(), f"{fields} not in {self.events}"
        return matching()[0]

    async def stop(self) -> None:
        assert self.child.stdin is not None
        if self.child.returncode is None:
            self.child.stdin.close()
            async with asyncio.timeout(30):
                await self.child.wait()
        await self._reading

    async def _read(self) -> None:
        assert self.child.stdout is not None
        while line := await self.child.stdout.readline():
            self.events.append(json.loads(line))

    def _check_slots(self, submit: Any, reservation: Reservation) -> None:
        theirs, layout = (
            memoryview(memory(self.layout.arena_bytes, 1).numpy().tobytes()),
            make_layout(SLOTS, scale=SCALE),
        )
        for source, target in zip(self.sent[submit.request_id], reservation.blocks, strict=True):
            there = block_bytes(self.layout, theirs, source)
            assert block_bytes(layout, self.slots.buffer, target) == there

    def _check(self, submit: Any, reservation: Reservation) -> None:
        theirs = memoryview(memory(self.layout.arena_bytes, 1).numpy().tobytes())
        ours = memoryview(self.region.memory.cpu().numpy().tobytes())
        for source, target in zip(self.sent[submit.request_id], reservation.blocks, strict=True):
            assert block_bytes(self.layout, ours, target) == block_bytes(self.layout, theirs, source)


@asynccontextmanager
async def pair(
    card: int,
    *,
    relentless: bool = False,
    staging: bool = False,
    unreachable: bool = False,
    env: dict[str, str] | None = None,
    **config: Any,
) -> AsyncIterator[Pair]:
    made = Pair(card, config, staging=staging)
    running = asyncio.create_task(made.server.run(make_info("decode-0", "d0", made.layout, made.address)))
    try:
        await made.start(relentless=relentless, unreachable=unreachable, env=env)
        yield made
    finally:
        await made.stop()
        await until(lambda: made.pool.count("quarantined") == 0)
        await made.server.close()
        await running
        made.slots.close()


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("checksum", ["full", "sampled"])
async def test_runs_and_fragments_arrive_byte_for_byte(card: int, checksum: str) -> None:
    async with pair(card, checksum=checksum) as made:
        made.send("runs", range(128))
        assert (await made.seen(event="accepted", request="runs"))["transport"] == "cuda_ipc"
        made.pool.free_blocks.reverse()  # no two blocks are neighbours on both sides
        made.send("fragments", range(0, 200, 3))
        await made.seen(event="accepted", request="fragments")
        assert made.pool.count("live") == 128 + 67


@pytest.mark.parametrize("card", CARDS)
async def test_a_changed_byte_is_rejected(card: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceLanding, "advance", lambda _self, _layers: None)  # nothing is checked before it changes
    async with pair(card) as made:
        made.send("r1", range(8), [0, 1, 2])
        await until(lambda: any(r.state == "leased" for r in made.pool.all))
        [reservation] = [r for r in made.pool.all if r.state == "leased"]
        plane = made.layout.planes[1]  # sent after the other plane of the layer
        last = plane.address(2, reservation.blocks[7], BLOCKS)
        sent = plane.address(2, 7, BLOCKS)
        cell = made.region.memory[last : last + plane.block_bytes]
        expected = memory(made.layout.arena_bytes, 1)[sent : sent + plane.block_bytes].to(cell.device)
        await until(lambda: torch.equal(cell, expected))
        cell[5] ^= 1
        torch.cuda.synchronize()
        made.send("r1", range(8), [3])
        error = (await made.seen(event="rejected", request="r1"))["error"]
        assert "not the bytes that were sent" in error
        assert made.pool.count("live") == 0


@pytest.mark.parametrize("card", CARDS)
async def test_a_killed_writer_frees_its_blocks_when_its_process_has_ended(card: int) -> None:
    async with pair(card, relentless=True) as made:
        made.send("r1", range(64))
        await made.seen(event="writing")
        made.child.kill()
        await until(lambda: made.server.stats().leases == 0)
        await until(lambda: made.pool.count("free") == 64)
        before = made.region.memory.clone()
        made.region.memory.zero_()  # a stale write would show
        torch.cuda.synchronize()
        await asyncio.sleep(0.5)
        assert bool(before.any())
        assert not bool(made.region.memory.any())


@pytest.mark.parametrize("card", CARDS)
async def test_blocks_of_a_stopped_writer_wait_for_its_answer(card: int) -> None:
    async with pair(card, relentless=True) as made:
        made.send("r1", range(64))
        await made.seen(event="writing")
        made.child.send_signal(signal.SIGSTOP)
        assert made.server.cancel("r1", 0)
        await until(lambda: made.pool.count("quarantined") == 64)
        await asyncio.sleep(2.0)
        assert made.pool.count("quarantined") == 64, "no timer frees them"
        made.child.send_signal(signal.SIGCONT)
        await until(lambda: made.pool.count("free") == 64)


@pytest.mark.parametrize("card", CARDS)
async def test_a_revoked_lease_stops_the_copying(card: int) -> None:
    async with pair(card, relentless=True) as made:
        made.send("r1", range(64))
        await made.seen(event="writing")
        assert made.server.cancel("r1", 0)
        await until(lambda: made.pool.count("free") == 64)
        made.region.memory.zero_()
        torch.cuda.synchronize()
        await asyncio.sleep(0.5)
        assert not bool(made.region.memory.any())


@pytest.mark.parametrize("card", CARDS)
async def test_probes_move_real_bytes(card: int) -> None:
    async with pair(card, canary_period_s=0.1) as made:
        made.send("r1", range(4))
        await made.seen(event="accepted", request="r1")
        before = made.pool.count("free")
        await until(lambda: len(made.pool.all) >= 4 and made.pool.count("free") > before)
        assert made.server.stats().failed.get("probe_timeout", 0) == 0


@pytest.mark.parametrize("card", CARDS)
async def test_auto_takes_the_way_from_card_to_card(card: int) -> None:
    async with pair(card, staging=True, transport="auto") as made:
        made.send("r1", range(128))
        assert (await made.seen(event="accepted", request="r1"))["transport"] == "cuda_ipc"
        assert made.pool.count("live") == 128
        assert [(peer.transport, peer.reason) for peer in made.server.stats().peers] == [
            ("cuda_ipc", "cuda_ipc: best of both offers")
        ]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("checksum", ["full", "sampled"])
async def test_auto_goes_through_the_host_where_cards_do_not_reach_each_other(card: int, checksum: str) -> None:
    async with pair(card, staging=True, unreachable=True, transport="auto", checksum=checksum) as made:
        made.send("runs", range(64))
        assert (await made.seen(event="accepted", request="runs"))["transport"] == "shm"
        made.staged.free_blocks.reverse()
        made.send("fragments", range(0, 180, 3))
        await made.seen(event="accepted", request="fragments")
        assert (made.pool.count("live"), made.staged.count("live")) == (0, 64 + 60)
        await until(lambda: len(made.server.stats().peers) == 1)
        [peer] = made.server.stats().peers
        assert "prefill-0 does not offer cuda_ipc: cuda_ipc: card " in peer.reason
        assert "has no peer access to" in peer.reason


async def test_a_writer_that_does_not_see_the_receivers_card_still_serves(note: Note) -> None:
    """Whether the driver maps memory of a card that is hidden is its business; a hand-off succeeds either way."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 cards")
    async with pair(0, staging=True, env={"CUDA_VISIBLE_DEVICES": "1"}, transport="auto") as made:
        made.send("r1", range(64))
        accepted = await made.seen(event="accepted", request="r1")
        [peer] = made.server.stats().peers
        note(transport=accepted["transport"], reason=peer.reason)
        assert peer.transport == accepted["transport"]


async def test_transports_over_host_memory_are_refused_at_start() -> None:
    with pytest.raises(Exception, match=r"transfer.transport=shm: copies from host memory"):
        Pair(0, {"transport": "shm"})
