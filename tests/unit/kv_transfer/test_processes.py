"""Hand-offs between processes that are killed and stopped in the middle of a transfer."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llm_engine.api.errors import TransferError, TransferTimeout
from llm_engine.api.messages import Peer
from tests.unit.kv_transfer.rig import FIRST, MOONCAKE, Rig, block_bytes, cells, needs_engine, until

BLOCKS, SCALE = 32, 512  # 64 KiB blocks, 35 MB in all


class Process:
    """A child that prints JSON events."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self.child = child
        self.events: list[dict[str, Any]] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.child.stdout is not None
        while line := await self.child.stdout.readline():
            self.events.append(json.loads(line))

    async def seen(self, **fields: Any) -> dict[str, Any]:
        """Wait for an event with these fields."""

        def matching() -> list[dict[str, Any]]:
            return [event for event in self.events if fields.items() <= event.items()]

        await until(lambda: bool(matching()) or self.child.returncode is not None, 20)
        assert matching(), f"{fields} not in {self.events}, exit status {self.child.returncode}"
        return matching()[0]

    def tell(self, *command: Any) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(command).encode() + b"\n")

    def send(self, number: signal.Signals) -> None:
        self.child.send_signal(number)

    async def end(self) -> None:
        if self.child.returncode is None:
            self.child.kill()
        await self.child.wait()
        await self._reading


@asynccontextmanager
async def process(role: str, transport: str, **settings: Any) -> AsyncIterator[Process]:
    config = {"transport": transport, "canary_period_s": 60.0, **settings.pop("config", {})}
    arguments = {"role": role, "incarnation": "x", "blocks": BLOCKS, "scale": SCALE, "config": config, **settings}
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.unit.kv_transfer.peer_process",
        json.dumps(arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    process = Process(child)
    try:
        await process.seen(event="ready")
        yield process
    finally:
        await process.end()


@asynccontextmanager
async def writing(rig: Rig, transport: str) -> AsyncIterator[Process]:
    """A writer that has 16 blocks granted and is writing into them all the time."""
    async with process(
        "writer", transport, control_addr=rig.target.control_addr, incarnation="p1", relentless=True
    ) as child:
        child.tell("r1", 16, 2)
        await child.seen(event="writing")
        assert rig.server.stats().leases == 1
        yield child


def arena_cells(rig: Rig, blocks: list[int]) -> bytes:
    return b"".join(block_bytes(rig.layout, rig.arena.buffer, block) for block in blocks)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_writer_killed_in_the_middle_frees_its_blocks(transport: str) -> None:
    async with Rig(transport, num_blocks=BLOCKS, source_blocks=BLOCKS, scale=SCALE) as rig:
        async with writing(rig, transport) as child:
            child.send(signal.SIGKILL)
            await until(lambda: len(rig.pool.free_blocks) == BLOCKS)
        assert rig.server.stats().failed == {"writer_lost": 1}
        assert rig.server.stats().peers == ()
        await rig.hand_off("r2", 4 * BLOCKS)  # every block serves again


async def test_a_stopped_shm_writer_keeps_its_blocks_in_quarantine_until_it_answers() -> None:
    async with Rig("shm", num_blocks=BLOCKS, source_blocks=BLOCKS, scale=SCALE) as rig, writing(rig, "shm") as child:
        child.send(signal.SIGSTOP)
        rig.server.cancel("r1", 0)
        leased = rig.pool.all[0].blocks
        handoff = rig.offer("r2", 4 * (BLOCKS - 15))  # one block more than there is
        with pytest.raises(TimeoutError):
            await until(lambda: rig.server.stats().quarantined_blocks == 0, 1.3)
        assert (rig.server.stats().quarantined_leases, rig.server.stats().quarantined_blocks) == (1, 16)
        assert rig.pool.count("quarantined") == 16
        await rig.hand_off("r3", 4 * (BLOCKS - 16))  # the other blocks serve
        child.send(signal.SIGCONT)
        await child.seen(event="failed", request="r1")
        await until(lambda: rig.server.stats().quarantined_blocks == 0)
        for block in leased:
            for cell in cells(rig.layout, block):
                rig.arena.buffer[cell] = b"\x11" * (cell.stop - cell.start)  # the new owner's bytes
        mine = arena_cells(rig, leased)
        child.tell("r4", 1, 0)  # the writer lives and is busy with other things
        await until(lambda: rig.server.stats().offered >= 4)
        assert arena_cells(rig, leased) == mine
        await handoff.abort()


@needs_engine
async def test_blocks_of_a_dead_engine_writer_stay_in_quarantine() -> None:
    """Its last bytes may still be on their way: the end of the process proves nothing."""
    async with Rig("mooncake", num_blocks=BLOCKS, source_blocks=BLOCKS, scale=SCALE) as rig:
        async with writing(rig, "mooncake") as child:
            child.send(signal.SIGKILL)
            await until(lambda: rig.server.stats().quarantined_blocks == 16)
        assert rig.server.stats().peers == ()
        await rig.hand_off("r2", 4 * (BLOCKS - 16))  # the other blocks serve
        rig.pool.finish("r2")
        refused = rig.offer("r3", 4 * BLOCKS)  # more than there is without them
        with pytest.raises(TimeoutError):
            await until(lambda: len(rig.pool.free_blocks) == BLOCKS, 1.3)  # longer than fences are repeated
        await refused.abort()
        assert (rig.server.stats().quarantined_leases, rig.pool.count("quarantined")) == (1, 16)
        rig.stays_quarantined = 16


@needs_engine
async def test_a_fenced_engine_writer_frees_its_blocks() -> None:
    async with Rig("mooncake", num_blocks=BLOCKS, source_blocks=BLOCKS, scale=SCALE) as rig:
        async with writing(rig, "mooncake") as child:
            rig.server.cancel("r1", 0)
            await child.seen(event="failed", request="r1")
            await until(lambda: len(rig.pool.free_blocks) == BLOCKS)
            assert rig.server.stats().quarantined_blocks == 0
        await rig.hand_off("r2", 4 * BLOCKS)


@needs_engine
@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
async def test_blocks_of_a_stopped_engine_writer_wait_for_its_answer(end: signal.Signals) -> None:
    """Stopped in the middle of a write: it answers when it goes on, and never if it is killed instead."""
    async with Rig("mooncake", num_blocks=BLOCKS, source_blocks=BLOCKS, scale=SCALE) as rig:
        async with writing(rig, "mooncake") as child:
            child.send(signal.SIGSTOP)
            rig.server.cancel("r1", 0)
            with pytest.raises(TimeoutError):
                await until(lambda: rig.server.stats().quarantined_blocks == 0, 1.3)  # longer than fences are repeated
            assert rig.pool.count("quarantined") == 16
            await rig.hand_off("r2", 4 * (BLOCKS - 16))  # the other blocks serve
            child.send(end)
            if end is signal.SIGCONT:
                await child.seen(event="failed", request="r1")
                await until(lambda: rig.server.stats().quarantined_blocks == 0)
        rig.stays_quarantined = 16 if end is signal.SIGKILL else 0


async def test_a_stopped_shm_writer_that_dies_frees_its_blocks() -> None:
    async with Rig("shm", num_blocks=BLOCKS, source_blocks=BLOCKS, scale=SCALE) as rig, writing(rig, "shm") as child:
        child.send(signal.SIGSTOP)
        rig.server.cancel("r1", 0)
        assert rig.server.stats().quarantined_blocks == 16
        child.send(signal.SIGKILL)
        await until(lambda: len(rig.pool.free_blocks) == BLOCKS)


async def test_a_replacement_of_a_stopped_writer_does_not_free_the_blocks_of_the_old_one() -> None:
    """The same name with a new incarnation is no proof that the old process has stopped."""
    async with Rig("shm", num_blocks=BLOCKS, source_blocks=BLOCKS, scale=SCALE) as rig, writing(rig, "shm") as old:
        old.send(signal.SIGSTOP)
        address = rig.target.control_addr
        async with process("writer", "shm", control_addr=address, incarnation="p2", relentless=False) as new:
            rig.pool.on_admit = lambda *_: None  # other source bytes than the rig's own
            rig.server.cancel("r1", 0)
            new.tell("r2", 16, 4)
            await new.seen(event="accepted", request="r2")
            assert rig.server.stats().quarantined_blocks == 16
            assert len(rig.server.stats().peers) == 2
            old.send(signal.SIGKILL)
            await until(lambda: rig.server.stats().quarantined_blocks == 0)


async def test_a_stopped_tcp_writer_holds_nothing() -> None:
    async with Rig("tcp", num_blocks=BLOCKS, source_blocks=BLOCKS, scale=SCALE) as rig, writing(rig, "tcp") as child:
        child.send(signal.SIGSTOP)
        rig.server.cancel("r1", 0)
        assert len(rig.pool.free_blocks) == BLOCKS
        await rig.hand_off("r2", 4 * BLOCKS)
        mine = bytes(rig.arena.buffer)
        child.send(signal.SIGCONT)
        await child.seen(event="failed", request="r1")
        assert rig.arena.buffer == mine  # what was still in flight has been thrown away


@asynccontextmanager
async def remote_receiver(rig: Rig, transport: str) -> AsyncIterator[Process]:
    async with process("receiver", transport, incarnation="d1") as child:
        address = (await child.seen(event="ready"))["control_addr"]
        rig.target = Peer(name="decode-1", incarnation="d1", control_addr=address)
        yield child


@pytest.mark.parametrize("transport", ["shm", "tcp", MOONCAKE])
async def test_a_receiver_killed_in_the_middle_fails_the_hand_off_at_once(transport: str) -> None:
    async with Rig(transport, num_blocks=BLOCKS, source_blocks=BLOCKS, scale=SCALE) as rig:
        async with remote_receiver(rig, transport) as child:
            await rig.hand_off("r0", 40)
            await child.seen(event="admitted", request="r0")
            failed: list[TransferError] = []
            handoff = rig.offer("r1", 64, on_failed=lambda _, error: failed.append(error))
            rig.compute(handoff, layers=range(2))
            waiting = rig.offer("r2", 40)
            rig.compute(waiting, layers=range(2))
            commit = asyncio.create_task(waiting.commit(FIRST, compute_end=time.monotonic()))
            await until(lambda: rig.client.stats().peers[0].pending == 2)
            started = time.monotonic()
            child.send(signal.SIGKILL)
            await until(lambda: bool(failed))
            with pytest.raises(TransferError):
                await commit
            assert time.monotonic() - started < 2
            await handoff.abort()
        assert rig.client.stats().pending == 0
        await until(lambda: rig.client.bad_peers() == ["d1"])


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_stopped_receiver_costs_a_timeout_and_comes_back(transport: str) -> None:
    async with (
        Rig(
            transport, num_blocks=BLOCKS, source_blocks=BLOCKS, scale=SCALE, commit_timeout_s=1.5, canary_period_s=0.2
        ) as rig,
        remote_receiver(rig, transport) as child,
    ):
        await rig.hand_off("r0", 40)
        handoff = rig.offer("r1", 64)
        rig.compute(handoff, layers=range(2))
        await until(lambda: handoff._granted.is_set())
        child.send(signal.SIGSTOP)
        rig.compute(handoff, layers=[2, 3])
        with pytest.raises((TransferTimeout, TransferError)):
            await handoff.commit(FIRST, compute_end=time.monotonic())
        await until(lambda: rig.client.bad_peers() == ["d1"])
        child.send(signal.SIGCONT)
        await until(lambda: rig.client.bad_peers() == [])
        await rig.hand_off("r2", 40)
        await child.seen(event="admitted", request="r2")


@pytest.mark.slow
@needs_engine
async def test_a_stopped_engine_receiver_holds_up_no_other_pair() -> None:
    """The engine gives a write up after a while; until then its pair waits alone, and the event loop does not."""
    async with Rig(
        "mooncake", num_blocks=BLOCKS, source_blocks=BLOCKS, scale=SCALE, commit_timeout_s=5, canary_period_s=1.0
    ) as rig:
        here = rig.target
        async with remote_receiver(rig, "mooncake") as child:
            there = rig.target
            await rig.hand_off("r0", 40)
            stuck = rig.offer("r1", 40)
            await until(stuck._granted.is_set)
            child.send(signal.SIGSTOP)
            rig.compute(stuck)
            started = time.monotonic()
            ended = asyncio.create_task(stuck.commit(FIRST, compute_end=started))
            rig.target = here
            slowest, number = 0.0, 0
            while not ended.done():
                begun = time.monotonic()
                await rig.hand_off(f"other-{number}", 16)
                rig.pool.finish(f"other-{number}")
                slowest, number = max(slowest, time.monotonic() - begun), number + 1
                await asyncio.sleep(0.05)
            with pytest.raises(TransferError):
                await ended
            assert time.monotonic() - started < 12
            assert number > 20
            assert slowest < 1.5
            child.send(signal.SIGCONT)
            rig.target = there
            await rig.hand_off("r2", 16)
            await child.seen(event="admitted", request="r2")
