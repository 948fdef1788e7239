"""Commit leaves in the thread that completes a hand-off, whatever the event loop decides at that moment."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import pytest

from kv_transfer.writer import Handoff
from llm_engine.api.errors import TransferError
from tests.unit.kv_transfer.rig import FIRST, Rig, until


@pytest.mark.parametrize("transport", ["local", "shm", "tcp"])
async def test_the_computing_thread_commits_by_itself(transport: str) -> None:
    """The receiver admits the sequence before the writer's loop has asked for it."""
    async with Rig(transport) as rig:
        handoff = rig.offer("r1", 40)
        rig.compute(handoff)
        await asyncio.to_thread(handoff.complete, FIRST, compute_end=time.monotonic())
        await until(lambda: "r1" in rig.pool.admitted)
        report = await handoff.commit(FIRST, compute_end=time.monotonic())
        assert report.num_blocks == 10
        assert rig.server.stats().accepted == rig.client.stats().accepted == 1


async def test_a_hand_off_that_was_given_up_does_not_commit() -> None:
    async with Rig("shm") as rig:
        handoff = rig.offer("r1", 40)
        rig.compute(handoff)
        await until(lambda: handoff._parts.manifest is not None)
        await handoff.abort()
        await asyncio.to_thread(handoff.complete, FIRST, compute_end=time.monotonic())
        await until(lambda: rig.pool.count("leased") == 0)
        assert rig.pool.admitted == {}
        assert rig.server.stats().failed == {"withdrawn": 1}


@pytest.mark.parametrize("transport", ["local", "shm", "tcp"])
@pytest.mark.parametrize("end", ["abort", "revoke", "cut"])
async def test_commit_races_the_end(transport: str, end: str) -> None:
    """Commit leaves in another thread at the moment at which the loop gives up, the receiver revokes, or the link
    breaks: the sequence is admitted whole or not at all, and no block is lost either way (the rig counts)."""
    async with Rig(transport, canary_period_s=0.01) as rig:
        rng = random.Random(7)
        for number in range(25):
            handoff = rig.offer(f"r{number}", 40)
            rig.compute(handoff)
            completing = asyncio.create_task(
                asyncio.to_thread(_complete_after, handoff, rng.choice([0.0, 0.0005, 0.002, 0.005]))
            )
            await asyncio.sleep(rng.choice([0.0, 0.0005, 0.002, 0.005]))
            if end == "revoke":
                rig.server.cancel(f"r{number}", 0)
            elif end == "cut" and handoff._session is not None:
                handoff._session.cut(TransferError("cut"))
            if end == "abort":
                await handoff.abort()
            await completing
            with contextlib.suppress(TransferError):
                await handoff.commit(FIRST, compute_end=time.monotonic())
            await handoff.abort()
            await until(lambda: rig.pool.count("leased") == rig.pool.count("quarantined") == 0)
            if f"r{number}" in rig.pool.admitted:
                rig.pool.finish(f"r{number}")
            assert len(rig.pool.free_blocks) == 32
            await until(lambda: rig.client.bad_peers() == [])


def _complete_after(handoff: Handoff, seconds: float) -> None:
    time.sleep(seconds)
    handoff.complete(FIRST, compute_end=time.monotonic())
