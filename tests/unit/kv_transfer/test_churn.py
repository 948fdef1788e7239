"""Random lives of many hand-offs at once: whatever is cancelled, aborted, lost or overtaken, nothing leaks and nothing
wrong is admitted (`Rig` compares the bytes of every admission and counts every block at the end)."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.writer import Handoff, HandoffClient
from llm_engine.api.errors import ServingError
from tests.unit.kv_transfer.rig import BLOCK_TOKENS, FIRST, NUM_LAYERS, Rig, until


async def pause(rng: random.Random) -> None:
    await asyncio.sleep(rng.choice([0, 0, 0.001, 0.004]))


class Churn:
    """One random life per request; some end well."""

    def __init__(self, rig: Rig, seed: int, clients: list[HandoffClient]) -> None:
        self.rig = rig
        self.rng = random.Random(seed)
        self.clients = clients
        self.accepted = 0

    async def request(self, name: str) -> None:
        rng = random.Random(self.rng.random())
        for attempt in range(rng.randint(1, 3)):
            await pause(rng)
            blocks = rng.sample(range(40), rng.randint(1, 9))
            self.rig.pool.have_blocks[name, attempt] = rng.randint(0, len(blocks))
            try:
                handoff = self.rig.offer(
                    name, len(blocks) * BLOCK_TOKENS, client=rng.choice(self.clients), attempt=attempt, blocks=blocks
                )
            except ServingError:
                return  # its client has been closed
            if await self.life(handoff, rng):
                self.accepted += 1
                await pause(rng)
                self.rig.pool.finish(name)
                self.rig.server.blocks_freed()
                return

    async def life(self, handoff: Handoff, rng: random.Random) -> bool:
        fate = rng.choice(["commit", "commit", "commit", "abort", "cancel", "forget"])
        stop_at = rng.randint(0, NUM_LAYERS + 1) if fate in ("abort", "forget") else NUM_LAYERS + 1
        for layer in range(stop_at):
            self.rig.compute(handoff, layers=[layer], chunk=rng.randint(1, 9))
            await pause(rng)
        if fate == "cancel":
            self.rig.server.cancel(handoff.request_id, handoff.attempt)
        if fate == "abort" or (fate == "forget" and rng.random() < 0.5):
            await handoff.abort()
            return False
        if fate == "forget":  # its worker starts the next attempt without a word; clean up at the end
            return False
        try:
            await handoff.commit(FIRST, compute_end=time.monotonic())
        except ServingError:
            return False
        return True


@pytest.mark.parametrize("transport", ["local", "shm", "tcp"])
def test_nothing_leaks_under_churn(transport: str) -> None:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 1 << 30), lose=st.booleans())
    def check(seed: int, lose: bool) -> None:
        asyncio.run(life(seed, lose))

    async def life(seed: int, lose: bool) -> None:
        async with Rig(transport, num_blocks=24, commit_timeout_s=20, grant_timeout_s=2, canary_period_s=0.01) as rig:
            second = await rig.add_client("prefill-1")
            churn = Churn(rig, seed, [rig.client, second])
            work = [asyncio.create_task(churn.request(f"r{i}")) for i in range(12)]
            if lose:
                await asyncio.sleep(0.01)
                await second.close()
            await asyncio.gather(*work)
            await asyncio.gather(*(h.abort() for c in rig.clients for h in tuple(c._context.handoffs)))
            await until(lambda: rig.server.stats().pending == 0)
            verdicts_lost = rig.server.stats().accepted - churn.accepted
            assert verdicts_lost >= 0 if lose else verdicts_lost == 0  # on the way to a client that was being closed
            assert sum(client.stats().pending for client in rig.clients) == 0
            assert sum(client.stats().accepted for client in rig.clients) == churn.accepted

    check()
