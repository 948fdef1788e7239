"""Empty messages around the end of a hand-off: they go out where there are cores to spare, and change nothing."""

from __future__ import annotations

import os
import time
from functools import partial
from types import SimpleNamespace

import pytest

from kv_transfer import awake
from kv_transfer.intake import Intakes
from kv_transfer.pairs import Pair
from llm_engine.api.handoff import Progress
from tests.unit.kv_transfer.card_rig import CardRig, HostDriver, driver
from tests.unit.kv_transfer.rig import FIRST, NUM_LAYERS, Reservation, Rig, until

__all__ = ["driver"]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """Empty messages that a receiver has read, and served as ever."""
    heard: list[Progress] = []
    serve = Intakes.on_progress

    def listen(self: Intakes[Reservation], pair: Pair, progress: Progress) -> None:
        if not progress.layers:
            heard.append(progress)
        serve(self, pair, progress)

    monkeypatch.setattr(Intakes, "on_progress", listen)
    return heard


def with_cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))


@pytest.mark.parametrize(("num_cores", "expected"), [(1, False), (7, False), (8, True), (64, True)])
def test_only_with_cores_to_spare(num_cores: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that this process may use: a container on a large host may have two."""
    assert awake.can_spare(num_cores) is expected
    with_cores(monkeypatch, num_cores)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert awake.can_spare() is expected


@pytest.mark.parametrize("transport", ["local", "shm", "tcp"])
async def test_empty_messages_until_the_first_token(
    transport: str, heard: list[Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cores(monkeypatch, 8)
    monkeypatch.setattr(awake, "LONGEST_S", 30.0)
    async with Rig(transport) as rig:
        handoff = rig.offer("r1", 40)
        rig.compute(handoff)
        await until(lambda: len(heard) >= 5)
        active = rig.intakes._active["r1"]
        assert active.verified
        assert {(each.lease_id, each.epoch) for each in heard} == {active.held.lease.key}
        await handoff.commit(FIRST, compute_end=time.monotonic())
        assert rig.pool.admitted["r1"][1] == FIRST
        assert rig.server.stats().dropped_frames == 0
        assert handoff._delivery is not None
        assert not handoff._delivery.say_nothing()  # the first token was the end of it
        count = len(heard)
        await rig.hand_off("r2", 40)  # everything that was said before has been read
        assert len(heard) == count


async def test_between_cards_they_begin_before_everything_is_written(
    driver: HostDriver, heard: list[Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cores(monkeypatch, 8)
    monkeypatch.setattr(awake, "LONGEST_S", 30.0)
    async with CardRig() as rig:
        handoff = rig.offer("r1", 40)
        rig.compute(handoff, layers=range(NUM_LAYERS))
        await until(lambda: len(heard) >= 3)
        assert handoff._delivery is not None
        assert not handoff._delivery._parts.told_manifest
        rig.compute(handoff, layers=[NUM_LAYERS])
        report = await handoff.commit(FIRST, compute_end=time.monotonic())
        assert report.transport == "cuda_ipc"
        delivery = handoff._delivery
        await until(lambda: not delivery.say_nothing())  # the sender may still be where it told the manifest
        assert rig.cached.admitted["r1"][1] == FIRST


@pytest.mark.parametrize("end", ["abort", "revoke"])
async def test_a_hand_off_that_has_ended_says_no_more(
    end: str, heard: list[Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cores(monkeypatch, 8)
    monkeypatch.setattr(awake, "LONGEST_S", 30.0)
    async with Rig("shm") as rig:
        handoff = rig.offer("r1", 40)
        rig.compute(handoff)
        await until(lambda: len(heard) >= 2)
        if end == "revoke":
            rig.server.cancel("r1", 0)
            await until(lambda: handoff.error is not None)
        await handoff.abort()
        assert handoff._delivery is not None
        assert not handoff._delivery.say_nothing()
        assert rig.pool.admitted == {}


async def test_none_without_cores_to_spare(heard: list[Progress], monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, 2)
    async with Rig("shm") as rig:
        handoff = rig.offer("r1", 40)
        rig.compute(handoff)
        await until(lambda: "r1" in rig.intakes._active and rig.intakes._active["r1"].verified)
        await rig.hand_off("r2", 40)
        await handoff.commit(FIRST, compute_end=time.monotonic())
        assert heard == []


async def test_it_stops_after_a_while_or_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said, told, pace = [100.0], list[float](), list[float](), list[float]()
    monkeypatch.setattr(awake, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def say_nothing(to: list[float]) -> bool:
        to.append(now[0])
        return True

    with_cores(monkeypatch, 8)
    first = awake.Awake(partial(say_nothing, said))
    first.stay()
    awake.Awake(lambda: bool(told.append(now[0]))).stay()
    now[0] += awake.LONGEST_S
    await until(lambda: len(said) >= 3)
    now[0] += awake.EVERY_S
    count = len(said)
    awake.Awake(partial(say_nothing, pace)).stay()
    await until(lambda: len(pace) >= 5)  # by then the others would have gone on too
    assert len(said) == count
    assert len(told) == 1
    first.stay()
    first.stay()  # twice is no more than once
    pace.clear()
    await until(lambda: len(pace) >= 10)
    assert 5 <= len(said) - count <= len(pace) + 3
