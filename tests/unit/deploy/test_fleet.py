from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from deploy import fleet as fleet_module
from deploy.fleet import Fleet
from deploy.report import table
from llm_engine.api.config import ClusterConfig
from llm_engine.api.control import ClusterStatus, LinkStatus, RouterStatus
from llm_engine.api.errors import ConfigError
from tests.unit.deploy.stand_ins import StandInWorker, config


class Yard:
    """A fleet and the stand-ins it has launched."""

    def __init__(self, *, busy: bool = False, **worker: float) -> None:
        self.launched: list[StandInWorker] = []
        self.busy = busy
        self.fleet = Fleet(config(**worker), self._launch)
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def _launch(self, name: str, revision: int, config: ClusterConfig) -> StandInWorker:
        self.launched.append(StandInWorker(name, busy=self.busy))
        return self.launched[-1]

    async def add(self, name: str) -> StandInWorker:
        self.tasks[name] = asyncio.create_task(self.fleet.add(name))
        await self.until(lambda: bool(self.launched))
        return self.launched[-1]

    def state(self, name: str) -> str:
        return next((worker.state for worker in self.fleet.status() if worker.name == name), "gone")

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10.0):
            while not condition():
                await asyncio.wait(self.tasks.values(), timeout=0.005)


@pytest.fixture
async def yard(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Yard]:
    monkeypatch.setattr(fleet_module, "RESTART_PAUSE_S", (0.01,))
    yard = Yard()
    yield yard
    for task in yard.tasks.values():
        task.cancel()
    await asyncio.gather(*yard.tasks.values(), return_exceptions=True)


async def test_a_worker_becomes_a_member_when_it_serves(yard: Yard) -> None:
    worker = await yard.add("decode-0")
    assert (yard.state("decode-0"), yard.fleet.members(), yard.fleet.ready("decode")) == ("starting", [], 0)
    yard.fleet.changed.clear()
    worker.serves()
    await yard.until(lambda: yard.state("decode-0") == "ready")
    assert yard.fleet.members() == [worker.info]
    assert yard.fleet.ready("decode") == 1
    assert yard.fleet.changed.is_set()


async def test_the_status_shows_how_each_peer_is_reached_and_why(yard: Yard) -> None:
    worker = await yard.add("prefill-0")
    worker.links = [
        LinkStatus(peer="decode-0/a", transport="tcp", reason="tcp: best of both offers (d does not offer shm)"),
        LinkStatus(peer="decode-1/b", transport="", reason="", healthy=False, detail="connection refused"),
    ]
    worker.serves()
    await yard.until(lambda: yard.fleet.ready("prefill") == 1)
    status = ClusterStatus(ready=True, model="m", router=RouterStatus(), pools={}, workers=yard.fleet.status())
    assert status.workers[0].links == worker.links
    shown = table(status).splitlines()
    assert "prefill-0 → decode-0/a: tcp: best of both offers (d does not offer shm)" in shown
    assert "prefill-0 → decode-1/b: not connected, not healthy: connection refused" in shown


async def test_a_killed_worker_leaves_the_members_until_it_serves_again(yard: Yard) -> None:
    worker = await yard.add("decode-0")
    worker.serves()
    await yard.until(lambda: yard.fleet.ready("decode") == 1)
    worker.crash()
    await yard.until(lambda: yard.state("decode-0") == "starting")
    assert yard.fleet.members() == []
    worker.serves()
    await yard.until(lambda: yard.fleet.ready("decode") == 1)
    assert [(w.restarts, w.pid) for w in yard.fleet.status()] == [(1, worker.pid)]
    assert len(yard.launched) == 1, "Ray restarts it, not the fleet"


async def test_a_restart_between_two_reports_is_counted(yard: Yard) -> None:
    worker = await yard.add("decode-0")
    worker.serves()
    await yard.until(lambda: yard.fleet.ready("decode") == 1)
    worker.crash()
    worker.serves()
    await yard.until(lambda: yard.fleet.members() == [worker.info])
    assert yard.fleet.status()[0].restarts == 1


async def test_a_silent_worker_stays_a_member_and_recovers(yard: Yard) -> None:
    worker = await yard.add("decode-0")
    worker.serves()
    await yard.until(lambda: yard.fleet.ready("decode") == 1)
    worker.silent = True
    await yard.until(lambda: yard.state("decode-0") == "silent")
    assert yard.fleet.members() == [worker.info]
    assert yard.fleet.ready("decode") == 0


async def test_a_worker_silent_for_too_long_is_killed_and_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    yard = Yard(stall_timeout_s=0.3)
    worker = await yard.add("decode-0")
    worker.serves()
    await yard.until(lambda: yard.fleet.ready("decode") == 1)
    worker.silent = True
    await yard.until(lambda: worker.killed == [True])
    yard.tasks["decode-0"].cancel()


async def test_a_failed_worker_says_why_and_is_started_again(yard: Yard) -> None:
    worker = await yard.add("prefill-0")
    worker.fail(ConfigError("model.path=/m: not a directory"))
    await yard.until(lambda: len(yard.launched) == 2)
    assert worker.killed == [False], "the old actor must not come back by itself"
    assert yard.fleet.status()[0].error == "model.path=/m: not a directory"
    yard.launched[1].serves()
    await yard.until(lambda: yard.fleet.ready("prefill") == 1)
    assert (yard.fleet.status()[0].error, yard.fleet.status()[0].restarts) == ("", 1)


async def test_failures_in_a_row_wait_longer_but_not_after_a_steady_time(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "RESTART_PAUSE_S", (0.01, 30.0))
    monkeypatch.setattr(fleet_module, "_STEADY_S", 0.0)
    for lives in (1, 2, 3):
        worker = await yard.add("prefill-0") if lives == 1 else yard.launched[-1]
        worker.serves()
        await yard.until(lambda: yard.fleet.ready("prefill") == 1)
        worker.fail(RuntimeError("bug"))
        await yard.until(lambda expected=lives + 1: len(yard.launched) == expected)  # type: ignore[misc]
    monkeypatch.setattr(fleet_module, "_STEADY_S", 60.0)
    yard.launched[-1].fail(RuntimeError("bug"))
    await yard.until(lambda: yard.state("prefill-0") == "failed")
    assert not await yard.fleet.emptied(0.1)
    assert len(yard.launched) == 4


async def test_a_worker_that_never_gets_to_serve_is_given_up_for_a_while(yard: Yard) -> None:
    worker = await yard.add("prefill-0")
    for _ in range(3):
        heard = worker.reports
        await yard.until(lambda before=heard: worker.reports > before)  # type: ignore[misc]
        worker.crash()
    await yard.until(lambda: len(yard.launched) == 2)
    assert worker.killed == [False], "Ray must not go on restarting it"
    assert "died 3 times" in yard.fleet.status()[0].error


async def test_a_worker_that_stops_unasked_is_no_member_and_started_again(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "RESTART_PAUSE_S", (0.3,))
    worker = await yard.add("prefill-0")
    worker.serves()
    await yard.until(lambda: yard.fleet.ready("prefill") == 1)
    worker.finish()
    await yard.until(lambda: yard.state("prefill-0") == "failed")
    assert yard.fleet.members() == []
    await yard.until(lambda: len(yard.launched) == 2)


async def test_a_drained_worker_is_gone_when_it_has_stopped() -> None:
    yard = Yard(busy=True)
    worker = await yard.add("decode-0")
    worker.serves()
    await yard.until(lambda: yard.fleet.ready("decode") == 1)
    yard.fleet.drain("decode-0", 3.0)
    await yard.until(lambda: yard.state("decode-0") == "draining")
    assert yard.fleet.members() == [worker.info], "its streams still run"
    assert yard.fleet.present()[0].draining
    worker.finish()
    await yard.until(lambda: yard.state("decode-0") == "gone")
    assert worker.stopped_with == [3.0]
    assert worker.killed == [False]
    assert yard.fleet.members() == []
    assert yard.tasks["decode-0"].done()
    assert yard.tasks["decode-0"].exception() is None


async def test_a_worker_killed_while_draining_is_told_again() -> None:
    yard = Yard(busy=True)
    worker = await yard.add("decode-0")
    worker.serves()
    await yard.until(lambda: yard.fleet.ready("decode") == 1)
    yard.fleet.drain("decode-0", 3.0)
    await yard.until(lambda: worker.stopped_with == [3.0])
    worker.busy = False
    worker.crash()
    await yard.until(lambda: yard.state("decode-0") == "gone")
    assert worker.stopped_with == [3.0, 3.0]
    assert len(yard.launched) == 1


async def test_a_drain_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_STOP_MARGIN_S", 0.05)
    yard = Yard(busy=True)
    worker = await yard.add("decode-0")
    worker.serves()
    await yard.until(lambda: yard.fleet.ready("decode") == 1)
    yard.fleet.drain("decode-0", 0.05)
    assert await yard.fleet.emptied(5.0)
    assert worker.killed == [False]


async def test_emptied_does_not_wait_longer_than_told(yard: Yard) -> None:
    await yard.add("decode-0")
    assert not await yard.fleet.emptied(0.05)
