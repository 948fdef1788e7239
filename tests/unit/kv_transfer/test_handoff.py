"""Whole hand-offs between a real client and a real server, over every transport."""

import asyncio
import random
import threading
import time

import pytest

from kv_transfer.pairs import Pair
from llm_engine.api.errors import Overloaded, PromptTooLong, TransferError
from llm_engine.api.handoff import Grant
from llm_engine.api.messages import Message
from tests.unit.kv_transfer.rig import FIRST, MOONCAKE, Rig, until

pytestmark = pytest.mark.parametrize("transport", ["local", "shm", "tcp", MOONCAKE])


async def test_one_hand_off_moves_every_byte(transport: str) -> None:
    async with Rig(transport) as rig:
        report = await rig.hand_off("r1", 27)
        reservation, first, seen = rig.pool.admitted["r1"]  # bytes were compared on admission
        assert len(reservation.blocks) == 7  # 27 tokens in blocks of 4
        assert first == FIRST
        assert report.transport == seen.transport == transport
        assert report.num_bytes == seen.num_bytes == 7 * rig.layout.bytes_per_block()
        assert 0 <= seen.verify_s <= seen.exposed_s <= seen.handoff_s + 1
        stats = rig.server.stats()
        assert (stats.accepted, stats.pending, stats.num_blocks, stats.failed) == (1, 0, 7, {})
        assert rig.client.stats().pending == 0


async def test_scattered_blocks_and_small_chunks(transport: str) -> None:
    async with Rig(transport) as rig:
        blocks = list(range(40))
        random.Random(3).shuffle(blocks)
        rig.pool.free_blocks.reverse()
        handoff = rig.offer("r1", 90, blocks=blocks[:23])
        rig.compute(handoff, chunk=3)
        await handoff.commit(FIRST, compute_end=time.monotonic())
        assert set(rig.pool.admitted) == {"r1"}


@pytest.mark.parametrize("have", [1, 4, 5])
async def test_what_the_receiver_has_is_not_sent(transport: str, have: int) -> None:
    async with Rig(transport) as rig:
        rig.pool.have_blocks["r1", 0] = have
        report = await rig.hand_off("r1", 20)
        assert report.have_tokens == 4 * have
        assert report.num_bytes == (5 - have) * rig.layout.bytes_per_block()


async def test_many_at_once_from_two_writers(transport: str) -> None:
    async with Rig(transport, num_blocks=200, source_blocks=300) as rig:
        other = await rig.add_client("prefill-1")
        rng = random.Random(1)
        work = []
        for index in range(30):
            blocks = rng.sample(range(300), rng.randint(1, 6))
            client = rng.choice([rig.client, other])
            work.append(rig.hand_off(f"r{index}", 4 * len(blocks), blocks=blocks, client=client))
        await asyncio.gather(*work)
        assert len(rig.pool.admitted) == 30
        assert rig.server.stats().num_bytes == sum(c.stats().num_bytes for c in rig.clients)


async def test_layers_may_be_reported_from_a_thread_before_the_grant(transport: str) -> None:
    async with Rig(transport, num_blocks=8) as rig:
        await rig.hand_off("first", 28)
        handoff = rig.offer("second", 20)
        thread = threading.Thread(target=rig.compute, args=(handoff,), kwargs={"chunk": 2})
        thread.start()
        thread.join(5)
        assert not thread.is_alive()  # no grant, and yet the step thread is through
        commit = asyncio.create_task(handoff.commit(FIRST, compute_end=time.monotonic()))
        await until(lambda: rig.server.stats().deferred == 1)
        assert rig.server.stats().waiting_offers == rig.server.stats().pending == 1
        assert not commit.done()
        rig.pool.finish("first")
        rig.server.blocks_freed()
        await commit
        assert "second" in rig.pool.admitted


async def test_offers_beyond_the_bound_are_refused(transport: str) -> None:
    async with Rig(transport, num_blocks=4, max_pending=3) as rig:
        handoffs = [rig.offer(f"r{i}", 16) for i in range(3)]
        await until(lambda: rig.server.stats().pending == 3)
        with pytest.raises(Overloaded):
            rig.offer("r3", 16)
        other = await rig.add_client("prefill-1")
        with pytest.raises(TransferError, match="3 hand-offs are pending"):
            await rig.hand_off("r4", 16, client=other)
        await asyncio.gather(*(handoff.abort() for handoff in handoffs))


async def test_gaps_and_repeats_are_programming_errors(transport: str) -> None:
    async with Rig(transport) as rig:
        handoff = rig.offer("r1", 20)
        handoff.layers_ready(range(2), 0, [0, 1])
        handoff.layers_ready(range(1), 2, [2])
        for layers, first, blocks in [
            (range(1), 4, [4]),
            (range(1, 2), 1, [1]),
            (range(1, 2), 2, [2, 3, 4, 5]),
            (range(2), 2, [2]),  # the first layer has come further than the second
            (range(2, 3), 0, [99]),
            (range(2, 5), 0, [0]),
            (range(-1, 1), 0, [0]),
            (range(2, 2), 0, [0]),
        ]:
            with pytest.raises(ValueError, match="layer"):
                handoff.layers_ready(layers, first, blocks)
        handoff.layers_ready(range(1, 2), 2, [2])  # what was refused has left nothing behind
        await handoff.abort()


async def test_a_sequence_that_is_not_admitted(transport: str) -> None:
    async with Rig(transport) as rig:
        handoff = rig.offer("r1", 20)
        await until(lambda: rig.server.stats().leases == 1)
        rig.pool.refuse = lambda _: TransferError("gone meanwhile")
        rig.compute(handoff)
        with pytest.raises(TransferError, match="gone meanwhile"):
            await handoff.commit(FIRST, compute_end=time.monotonic())
        assert len(rig.pool.free_blocks) == 32
        assert rig.server.stats().failed == {"not_admitted": 1}


async def test_a_request_that_can_never_fit(transport: str) -> None:
    async with Rig(transport) as rig:
        rig.pool.refuse = lambda _: PromptTooLong("20 tokens, at most 10")
        with pytest.raises(TransferError, match="at most 10"):
            await rig.hand_off("r1", 20)
        assert rig.server.stats().failed == {"refused_too_long": 1}


async def test_other_weights_are_refused(transport: str) -> None:
    async with Rig(transport, served_weights="w2") as rig:
        with pytest.raises(TransferError, match="weights w1, served are w2"):
            await rig.hand_off("r1", 20)


async def test_offering_an_attempt_twice_leaves_the_first_alone(transport: str) -> None:
    async with Rig(transport) as rig:
        await rig.hand_off("r0", 4)
        first, second = rig.offer("r1", 20), rig.offer("r1", 20)
        with pytest.raises(TransferError, match="r1/0 is under way"):
            await second.commit(FIRST, compute_end=time.monotonic())
        rig.compute(first)
        await first.commit(FIRST, compute_end=time.monotonic())


async def test_a_repeated_grant_does_not_disturb_the_writing(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Rig(transport) as rig:
        intakes = rig.intakes
        send = intakes._send_or_raise

        def twice(pair: Pair, message: Message) -> None:
            for _ in range(2 if isinstance(message, Grant) else 1):
                send(pair, message)

        monkeypatch.setattr(intakes, "_send_or_raise", twice)
        handoff = rig.offer("r1", 20)
        rig.compute(handoff, layers=range(2))
        await rig.hand_off("r2", 20)
        rig.compute(handoff, layers=range(2, 4))
        await handoff.commit(FIRST, compute_end=time.monotonic())
        assert rig.server.stats().failed == {}
