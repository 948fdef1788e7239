"""The step thread: order, bounds, progress clock, and loud failure."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from llm_engine.api.errors import Overloaded
from llm_engine.api.messages import Load
from llm_engine.serving.step_loop import StepLoop, StepReport
from tests.unit.worker.waiting import until


class Counter:
    """An engine whose step n yields n, `budget` times."""

    def __init__(self, budget: int = 0) -> None:
        self.budget = budget
        self.calls = 0
        self.sound = True
        self.steps = 0
        self.threads: set[int] = set()
        self.during_step: Callable[[], None] = lambda: None
        self.waits = 0
        self.during_wait: Callable[[], None] = lambda: None
        self.under_way = False
        self.rest_s = 0.0

    def step(self) -> int | None:
        self.calls += 1
        self.threads.add(threading.get_ident())
        if self.steps >= self.budget:
            return None
        self.steps += 1
        self.during_step()
        return self.steps

    def wait(self) -> None:
        self.waits += 1
        self.during_wait()
        self.rest_s = 0.0

    def load(self) -> Load:
        return Load(seq=0, num_running=self.budget - self.steps)

    def check(self) -> None:
        assert self.sound, "the books do not balance"

    def grant(self, steps: int) -> int:
        self.budget += steps
        return self.budget


@asynccontextmanager
async def running(
    engine: Counter, on_step: Callable[[StepReport[int]], None] = lambda report: None, **options: Any
) -> AsyncIterator[StepLoop[Counter, int]]:
    loop: StepLoop[Counter, int] = StepLoop(engine, on_step, **options)
    loop.start()
    try:
        yield loop
    finally:
        engine.during_step = lambda: None
        assert await loop.stop(10.0)


async def test_results_and_completions_arrive_in_the_order_they_happened() -> None:
    events: list[Any] = []
    engine = Counter()
    async with running(engine, lambda report: events.append(report.result)) as loop:
        loop.post(lambda e: e.steps, lambda n: events.append(("before", n)))
        loop.post(lambda e: e.grant(3))
        await until(lambda: 3 in events)
        loop.post(lambda e: e.steps, lambda n: events.append(("after", n)))
        loop.post(lambda e: e.grant(1))
        await until(lambda: 4 in events)
    assert events == [("before", 0), 1, 2, 3, ("after", 3), 4]


async def test_the_engine_is_touched_by_one_thread_and_the_results_by_another() -> None:
    engine = Counter(5)
    takers: set[int] = set()
    async with running(engine, lambda report: takers.add(threading.get_ident())) as loop:
        ran_on = await loop.call(lambda e: threading.get_ident())
        await until(lambda: engine.steps == 5)
    assert engine.threads == {ran_on}
    assert takers == {threading.get_ident()}
    assert ran_on not in takers


async def test_commands_that_come_while_the_device_computes_are_run_before_the_step() -> None:
    """At once while it surely goes on, else when it has ended: they do not wait for the pass after it."""
    engine = Counter()
    order: list[Any] = []
    async with running(engine, idle_s=30.0) as loop:

        def under_way(engine: Counter) -> None:
            engine.under_way, engine.rest_s = True, 30.0
            engine.during_wait = ended
            engine.during_step = lambda: order.append("step")
            engine.grant(1)

        def ended() -> None:
            order.append("end")
            engine.during_wait = lambda: None
            loop.post(lambda e: order.append("after"))

        await loop.call(under_way)
        assert await asyncio.wait_for(loop.call(lambda e: order.append("while")), 5.0) is None
        assert order == ["while"]
        loop.post(lambda e: setattr(e, "rest_s", 0.0))
        await until(lambda: engine.steps == 1)
    assert order == ["while", "end", "after", "step"]


async def test_a_step_is_timed_from_the_end_of_the_last_one_if_its_pass_was_under_way() -> None:
    engine = Counter()
    reports: list[StepReport[int]] = []
    async with running(engine, reports.append, idle_s=30.0) as loop:
        await loop.call(lambda e: e.grant(1))
        await until(lambda: len(reports) == 1)
        await asyncio.sleep(0.1)
        loop.post(lambda e: e.grant(1))
        await until(lambda: len(reports) == 2)
        await asyncio.sleep(0.1)
        loop.post(lambda e: (setattr(e, "under_way", True), e.grant(1)))
        await until(lambda: len(reports) == 3)
    assert reports[1].duration_s < 0.1 <= reports[2].duration_s


async def test_a_loop_that_stops_waits_for_the_pass_under_way() -> None:
    """Its owner closes the memory that the pass uses."""
    engine = Counter()
    async with running(engine) as loop:
        await loop.call(lambda e: None)
        engine.during_wait = lambda: setattr(engine, "under_way", False)
        engine.under_way = True
        waits = engine.waits
    assert engine.waits > waits
    assert not engine.under_way


async def test_an_expected_error_is_the_callers_and_the_loop_goes_on() -> None:
    def refuse(engine: Counter) -> None:
        raise Overloaded("no room")

    async with running(Counter()) as loop:
        with pytest.raises(Overloaded, match="no room"):
            await loop.call(refuse)
        assert await loop.call(lambda e: e.grant(1)) == 1


async def test_a_failing_step_ends_the_loop_and_is_reported() -> None:
    engine = Counter(1)

    def explode() -> None:
        raise ZeroDivisionError("broken kernel")

    engine.during_step = explode
    loop: StepLoop[Counter, int] = StepLoop(engine, lambda report: None)
    loop.start()
    assert loop.failure is not None
    with pytest.raises(ZeroDivisionError, match="broken kernel"):
        await asyncio.wait_for(loop.failure, 10.0)
    assert await loop.stop(10.0)


async def test_a_failing_command_ends_the_loop_and_is_reported() -> None:
    loop: StepLoop[Counter, int] = StepLoop(Counter(), lambda report: None)
    loop.start()
    loop.post(lambda e: [][1])
    assert loop.failure is not None
    with pytest.raises(IndexError):
        await asyncio.wait_for(loop.failure, 10.0)
    assert await loop.stop(10.0)


async def test_broken_invariants_are_found_when_the_engine_is_idle() -> None:
    engine = Counter()
    loop: StepLoop[Counter, int] = StepLoop(engine, lambda report: None, idle_s=0.01)
    loop.start()
    await loop.call(lambda e: setattr(e, "sound", False))
    assert loop.failure is not None
    with pytest.raises(AssertionError, match="do not balance"):
        await asyncio.wait_for(loop.failure, 10.0)
    assert await loop.stop(10.0)


async def test_a_result_that_cannot_be_handled_is_a_failure() -> None:
    def mishandle(report: StepReport[int]) -> None:
        raise KeyError("lost stream")

    async with running(Counter(1), mishandle) as loop:
        assert loop.failure is not None
        with pytest.raises(KeyError):
            await asyncio.wait_for(loop.failure, 10.0)


async def test_new_work_is_refused_when_the_inbox_is_full() -> None:
    engine = Counter(1)
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        release.wait(10.0)

    engine.during_step = hold
    ran: list[int] = []
    async with running(engine, max_commands=2) as loop:
        await until(entered.is_set)
        assert loop.offer(lambda e: ran.append(1))
        assert loop.offer(lambda e: ran.append(2))
        assert not loop.offer(lambda e: ran.append(3))
        loop.post(lambda e: ran.append(4))  # releases are never refused
        release.set()
        await until(lambda: len(ran) == 3)
    assert ran == [1, 2, 4]


async def test_the_engine_does_not_run_away_from_a_busy_reader() -> None:
    engine = Counter(1000)
    async with running(engine, max_deliveries=4) as loop:
        deadline = time.monotonic() + 5.0
        while engine.steps < 5 and time.monotonic() < deadline:
            time.sleep(0.001)  # noqa: ASYNC251 - the reader is busy, which is the point
        time.sleep(0.05)  # noqa: ASYNC251
        assert engine.steps == 5  # four waiting to be read, one waiting to be delivered
        await until(lambda: engine.steps == 1000)
        assert loop.alive


async def test_the_progress_clock_runs_only_while_there_is_work() -> None:
    engine = Counter(1)
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        release.wait(10.0)

    engine.during_step = hold
    async with running(engine) as loop:
        await until(entered.is_set)
        first = loop.age_s
        await until(lambda: loop.age_s > first + 0.05)
        release.set()
        await until(lambda: loop.age_s == 0.0)
        assert loop.load.num_running == 0


async def test_an_idle_loop_sleeps_and_wakes_at_once_for_a_command() -> None:
    engine = Counter()
    async with running(engine, idle_s=30.0) as loop:
        await loop.call(lambda e: None)
        await until(lambda: loop.age_s == 0.0)
        calls = engine.calls
        await asyncio.sleep(0.1)
        assert engine.calls <= calls + 1
        assert await asyncio.wait_for(loop.call(lambda e: 42), 5.0) == 42


async def test_stop_reports_a_step_that_does_not_end() -> None:
    engine = Counter(1)
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        release.wait(10.0)

    engine.during_step = hold
    loop: StepLoop[Counter, int] = StepLoop(engine, lambda report: None)
    loop.start()
    await until(entered.is_set)
    assert not await loop.stop(0.05)
    release.set()
    assert await loop.stop(10.0)
