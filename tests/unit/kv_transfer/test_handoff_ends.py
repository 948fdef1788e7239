"""How hand-offs end before they are accepted, from either side, over every transport. Nothing is left of them."""

import asyncio
import gc
import os
import re
import threading
import time

import pytest

from kv_transfer.writer import Handoff
from llm_engine.api.errors import LeaseRevoked, TransferError, TransferTimeout
from llm_engine.api.messages import Submit
from tests.unit.kv_transfer.rig import FIRST, MOONCAKE, NUM_LAYERS, Reservation, Rig, arena_mappings, until

pytestmark = pytest.mark.parametrize("transport", ["local", "shm", "tcp", MOONCAKE])


@pytest.mark.parametrize("layers", [0, 2, NUM_LAYERS + 1])
async def test_abort_gives_everything_back(transport: str, layers: int) -> None:
    async with Rig(transport) as rig:
        handoff = rig.offer("r1", 20)
        rig.compute(handoff, layers=range(layers))
        if layers:
            await until(lambda: rig.server.stats().leases == 1)
        await handoff.abort()
        await handoff.abort()
        await until(lambda: rig.server.stats().pending == 0 and len(rig.pool.free_blocks) == 32)
        with pytest.raises(TransferError):
            await handoff.commit(FIRST, compute_end=time.monotonic())
        assert not rig.pool.admitted


async def test_cancel_at_the_receiver_revokes_and_tells_the_writer(transport: str) -> None:
    async with Rig(transport) as rig:
        failed: list[tuple[Handoff, TransferError]] = []
        handoff = rig.offer("r1", 20, on_failed=lambda h, e: failed.append((h, e)))
        rig.compute(handoff, layers=range(2))
        await until(lambda: rig.server.stats().leases == 1)
        assert rig.server.cancel("r1", 0)
        assert not rig.server.cancel("r1", 0)
        await until(lambda: bool(failed))
        assert failed[0][0] is handoff
        assert isinstance(failed[0][1], LeaseRevoked)
        rig.compute(handoff, layers=range(2, 4))  # late reports are ignored
        with pytest.raises(LeaseRevoked):
            await handoff.commit(FIRST, compute_end=time.monotonic())
        await until(lambda: len(rig.pool.free_blocks) == 32)
        with pytest.raises(TransferError, match="over or was overtaken"):
            await rig.hand_off("r1", 20)


@pytest.mark.parametrize("end", ["abort", "cancel", "overtake", "close"])
async def test_an_offer_that_ends_while_blocks_are_being_reserved(
    transport: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Rig(transport) as rig:
        asked, go_on = asyncio.Event(), asyncio.Event()
        reserve = rig.pool.reserve

        async def slow(submit: Submit, num_tokens: int, digests: bytes) -> Reservation | None:
            reservation = await reserve(submit, num_tokens, digests)
            if submit.attempt == 0:
                asked.set()
                await go_on.wait()
            return reservation

        monkeypatch.setattr(rig.pool, "reserve", slow)
        handoff = rig.offer("r1", 20)
        await asked.wait()
        if end == "abort":
            await handoff.abort()
        elif end == "cancel":
            assert rig.server.cancel("r1", 0)
        elif end == "overtake":
            newer = rig.offer("r1", 20, attempt=1)
        else:
            await rig.client.close()
        await until(lambda: handoff.error is not None)
        await until(lambda: rig.server.stats().waiting_offers == (1 if end == "overtake" else 0))
        go_on.set()
        if end == "overtake":
            rig.compute(newer)
            await newer.commit(FIRST, compute_end=time.monotonic())
            rig.pool.finish("r1")
        await until(lambda: len(rig.pool.free_blocks) == 32)
        assert rig.server.stats().pending == 0


async def test_a_newer_attempt_overtakes_an_older_one(transport: str) -> None:
    async with Rig(transport) as rig:
        old = rig.offer("r1", 20, attempt=1)
        rig.compute(old, layers=range(3))
        await until(lambda: rig.server.stats().leases == 1)
        other = await rig.add_client("prefill-1")
        await rig.hand_off("r1", 20, attempt=2, client=other)
        with pytest.raises(LeaseRevoked):
            await old.commit(FIRST, compute_end=time.monotonic())
        with pytest.raises(TransferError, match="overtaken"):
            await rig.hand_off("r1", 20, attempt=0)
        assert rig.server.stats().failed == {"overtaken": 1, "refused_stale": 1}


async def test_no_blocks_in_time(transport: str) -> None:
    async with Rig(transport, num_blocks=4, grant_timeout_s=0.3) as rig:
        failed: list[TransferError] = []
        handoff = rig.offer("big", 20, on_failed=lambda _, error: failed.append(error))
        await until(lambda: bool(failed))
        assert str(failed[0]).startswith("hand-off of big/0 to decode-0: ")
        await handoff.abort()
        await until(lambda: rig.server.stats().pending == 0)


async def test_a_lease_ends_with_its_request_deadline(transport: str) -> None:
    async with Rig(transport) as rig:
        handoff = rig.offer("r1", 20, deadline_s=0.3)
        rig.compute(handoff, layers=range(2))
        await until(lambda: rig.server.stats().failed.get("deadline") == 1)
        with pytest.raises(LeaseRevoked):
            await handoff.commit(FIRST, compute_end=time.monotonic())


async def test_a_layer_that_never_comes(transport: str) -> None:
    async with Rig(transport, commit_timeout_s=0.3) as rig:
        handoff = rig.offer("r1", 20)
        rig.compute(handoff, layers=[0, 1, 3])
        with pytest.raises(TransferTimeout, match="no write in time"):
            await handoff.commit(FIRST, compute_end=time.monotonic())
        await until(lambda: len(rig.pool.free_blocks) == 32)
        assert not rig.pool.admitted


async def test_drain_refuses_the_new_and_finishes_the_granted(transport: str) -> None:
    async with Rig(transport, num_blocks=8) as rig:
        granted = rig.offer("r1", 20)
        await until(lambda: rig.server.stats().leases == 1)
        waiting = rig.offer("r2", 20)
        await until(lambda: rig.server.stats().waiting_offers == 1)
        rig.server.drain()
        rig.compute(granted)
        await granted.commit(FIRST, compute_end=time.monotonic())
        for handoff in (waiting, rig.offer("r3", 20)):
            with pytest.raises(TransferError, match="draining"):
                await handoff.commit(FIRST, compute_end=time.monotonic())
        assert rig.server.stats().pending == 0


async def test_closing_the_client_ends_its_hand_offs(transport: str) -> None:
    async with Rig(transport, num_blocks=8) as rig:
        handoffs = [rig.offer("r1", 20), rig.offer("r2", 20)]
        rig.compute(handoffs[0], layers=range(2))
        await until(lambda: rig.server.stats().pending == 2)
        await rig.client.close()
        for handoff in handoffs:
            with pytest.raises(TransferError, match="shutting down"):
                await handoff.commit(FIRST, compute_end=time.monotonic())
        await until(lambda: rig.server.stats().pending == 0)
        with pytest.raises(TransferError, match="client is closed"):
            rig.offer("r3", 20)


async def test_closing_the_server_fails_the_writers_hand_offs(transport: str) -> None:
    async with Rig(transport) as rig:
        await rig.hand_off("r0", 8)
        handoff = rig.offer("r1", 20)
        rig.compute(handoff, layers=range(2))
        await until(lambda: rig.server.stats().leases == 1)
        await rig.server.close()
        with pytest.raises(TransferError):
            await handoff.commit(FIRST, compute_end=time.monotonic())
        await until(lambda: rig.client.bad_peers() == ["d0"])
        rig.pool.all.clear()  # the server's leases died with it
        rig.intakes.custody.leases._leases.clear()
        rig.intakes.custody.leases._held.clear()
        rig.intakes._active.clear()


async def test_cancelling_both_ends_leaves_nothing_running(transport: str) -> None:
    rig = Rig(transport)
    await rig.__aenter__()
    handoffs = [rig.offer("r1", 20), rig.offer("r2", 20)]
    rig.compute(handoffs[0], layers=range(2))
    await until(lambda: rig.server.stats().leases == 2)
    server, *clients = rig._tasks
    for task in clients:
        task.cancel()
    await asyncio.wait(clients)
    for handoff in handoffs:
        with pytest.raises(TransferError):
            await handoff.commit(FIRST, compute_end=time.monotonic())
    await until(lambda: len(rig.pool.free_blocks) == 32)
    server.cancel()
    await asyncio.wait([server])
    await rig.client.close()
    await rig.server.close()
    rig.arena.close()
    rig.source.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv-")]


async def test_a_cancelled_commit_aborts(transport: str) -> None:
    async with Rig(transport) as rig:
        handoff = rig.offer("r1", 20)
        commit = asyncio.create_task(handoff.commit(FIRST, compute_end=time.monotonic()))
        await until(lambda: rig.server.stats().leases == 1)
        commit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await commit
        await until(lambda: len(rig.pool.free_blocks) == 32)


async def test_nothing_is_left_behind(transport: str) -> None:
    async def life() -> None:
        async with Rig(transport) as rig:
            other = await rig.add_client("prefill-1")
            await asyncio.gather(*(rig.hand_off(f"r{i}", 8, client=c) for i, c in enumerate([rig.client, other] * 3)))
            await rig.offer("r9", 20).abort()

    def descriptors() -> list[str]:
        gc.collect()
        paths = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return sorted(re.sub(r"\d+", "", os.readlink(path)) for path in paths if os.path.lexists(path))

    await life()
    before, mapped = descriptors(), len(arena_mappings())
    for _ in range(3):
        await life()
    assert descriptors() == before
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")]
    assert len(arena_mappings()) == mapped
