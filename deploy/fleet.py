"""The workers of a cluster: one slot per worker, each with a task that looks after its actor.

    STARTING ── report: serving ──▶ READY ── drain() ──▶ DRAINING ── run returns ──▶ gone
       ▲  ▲                           │ no report for a while
       │  └── killed: Ray starts it ──┤
       │                              ▼
       │                            SILENT ── for stall_timeout_s: its process is killed, Ray starts it again
       └── FAILED: run raised; the actor is replaced after a pause

A slot outlives its processes; it is gone only after a drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from deploy.actors import WorkerReport
from deploy.control import WorkerStatus
from deploy.desired import Present, pool_of
from deploy.rollout import Member
from llm_engine.api.config import ClusterConfig
from llm_engine.api.control import LinkStatus
from llm_engine.api.messages import Role, WorkerInfo

_log = logging.getLogger(__name__)

RESTART_PAUSE_S = (1.0, 2.0, 5.0, 15.0, 30.0)
_STOP_MARGIN_S = 10.0  # beyond the drain itself
_MAX_FALSE_STARTS = 3
_STEADY_S = 60.0  # a worker that served this long starts over with the shortest pause


class State(enum.StrEnum):
    """What the controller knows about a worker."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    SILENT = "silent"  # its process does not answer; routers decide by their own heartbeats
    FAILED = "failed"


class WorkerHandle(Protocol):
    """An actor, as the fleet uses it. Every call may take as long as a restart of its process."""

    def run(self) -> asyncio.Future[None]: ...

    def report(self) -> asyncio.Future[WorkerReport]: ...

    def stop(self, drain_s: float) -> asyncio.Future[None]: ...

    def kill(self, *, restart: bool) -> None: ...


Launch = Callable[[str, int, ClusterConfig], WorkerHandle]  # name, revision → its actor: the living one, or a new one


@dataclass(slots=True)
class Slot:
    """One worker of the desired state."""

    name: str
    config: ClusterConfig
    revision: int = 0
    state: State = State.STARTING
    info: WorkerInfo | None = None
    pid: int = 0
    restarts: int = 0
    sequences: int = 0
    pending_handoffs: int = 0
    links: list[LinkStatus] = field(default_factory=list)
    error: str = ""
    heard: bool = False  # it has reported since this controller knows it
    since: float = field(default_factory=time.monotonic)
    drain_requested: asyncio.Event = field(default_factory=asyncio.Event)
    drain_s: float = 0.0

    def enter(self, state: State) -> None:
        if state is not self.state:
            _log.info("%s: %s → %s", self.name, self.state, state)
            self.state, self.since = state, time.monotonic()

    def age(self) -> float:
        """Seconds in the present state."""
        return time.monotonic() - self.since


@dataclass(slots=True)
class _Watch:
    """What is outstanding at one actor."""

    run: asyncio.Future[None]
    report: asyncio.Future[WorkerReport] | None = None
    pending: list[asyncio.Future[None]] = field(default_factory=list)
    stopping_pid: int = -1
    heard: float = field(default_factory=time.monotonic)
    first_served: float | None = None
    pid: int = 0
    serving_pid: int = 0
    false_starts: int = 0  # processes in a row that ended before they served

    def hear(self, report: WorkerReport) -> None:
        """Note the life of the actor's processes."""
        self.heard = time.monotonic()
        if report.pid != self.pid:
            self.false_starts += self.pid != self.serving_pid
            self.pid = report.pid
        if report.info is not None:
            self.serving_pid, self.false_starts = report.pid, 0
            self.first_served = self.first_served or self.heard

    def silent_s(self) -> float:
        return time.monotonic() - self.heard

    def served_s(self) -> float:
        return 0.0 if self.first_served is None else time.monotonic() - self.first_served

    def close(self) -> BaseException | None:
        """Forget everything outstanding; returns what `run` raised."""
        for future in (self.run, self.report, *self.pending):
            if future is not None and not future.done():
                future.cancel()
            elif future is not None and future is not self.run:
                future.exception()  # looked at: not worth a warning
        return self.run.exception() if self.run.done() and not self.run.cancelled() else None


class Fleet:
    """All workers. `changed` is set whenever the membership may have changed."""

    def __init__(self, config: ClusterConfig, launch: Launch) -> None:
        self._config = config
        self._launch = launch
        self._slots: dict[str, Slot] = {}
        self.revision = 0
        self.changed = asyncio.Event()
        self._introductions = asyncio.Event()  # every worker has reported

    def adopt(self, config: ClusterConfig, revision: int) -> None:
        """What is started from now on has this configuration; what runs of another revision is to be replaced."""
        self._config = config
        self.revision = revision

    def present(self) -> list[Present]:
        return [
            Present(
                name=slot.name,
                pool=pool_of(slot.name),
                draining=slot.drain_requested.is_set(),
                current=slot.revision == self.revision,
            )
            for slot in self._slots.values()
        ]

    def rolling(self) -> list[Member]:
        """The workers as a rollout sees them."""
        return [
            Member(
                name=slot.name,
                pool=pool_of(slot.name),
                current=slot.revision == self.revision,
                ready=slot.state is State.READY,
                draining=slot.drain_requested.is_set(),
            )
            for slot in self._slots.values()
        ]

    def members(self) -> list[WorkerInfo]:
        """Workers that routers may talk to. A silent one stays in: whether it lives is for the routers to judge."""
        return [slot.info for slot in self._slots.values() if slot.info is not None]

    def ready(self, pool: str) -> int:
        """Workers of a pool that serve."""
        return sum(slot.state is State.READY and pool_of(slot.name) == pool for slot in self._slots.values())

    def status(self) -> list[WorkerStatus]:
        return [_status(self._slots[name]) for name in sorted(self._slots)]

    def has(self, name: str) -> bool:
        return name in self._slots

    async def emptied(self, timeout_s: float) -> bool:
        """Wait until no worker is left; False when the time is up."""
        deadline = time.monotonic() + timeout_s
        while self._slots and time.monotonic() < deadline:
            self.changed.clear()
            await wait_event(self.changed, deadline - time.monotonic())
        return not self._slots

    def drain(self, name: str, drain_s: float) -> None:
        """Begin to take a worker out; its task ends when it has stopped. What runs after `drain_s` is handed back."""
        slot = self._slots[name]
        slot.drain_s = drain_s
        slot.drain_requested.set()

    def add(self, name: str, revision: int | None = None) -> Coroutine[None, None, None]:
        """A new worker, or a running one of a given revision.

        The caller runs the coroutine, which starts the worker and looks after it until it has been drained.
        """
        slot = self._slots[name] = Slot(name, self._config, self.revision if revision is None else revision)
        return self._tend(slot)

    async def introduced(self, timeout_s: float) -> None:
        """Wait until every worker has said how it is, at most so long: who drains already is not one to count on."""
        if not self._all_heard():
            self._introductions.clear()
            await wait_event(self._introductions, timeout_s)

    def _all_heard(self) -> bool:
        return all(slot.heard for slot in self._slots.values())

    async def _tend(self, slot: Slot) -> None:
        failures = 0
        try:
            while not slot.drain_requested.is_set():
                handle = self._launch(slot.name, slot.revision, slot.config)
                served_s = await self._one_actor(slot, handle)
                handle.kill(restart=False)
                if slot.drain_requested.is_set():
                    return
                failures = 0 if served_s >= _STEADY_S else failures
                await wait_event(slot.drain_requested, RESTART_PAUSE_S[min(failures, len(RESTART_PAUSE_S) - 1)])
                failures += 1
                slot.restarts += 1
                slot.enter(State.STARTING)
        finally:
            del self._slots[slot.name]
            self.changed.set()

    async def _one_actor(self, slot: Slot, handle: WorkerHandle) -> float:
        """Until `run` of this actor ends; returns the seconds it was known to serve."""
        watch, hopeless = _Watch(run=asyncio.ensure_future(handle.run())), ""
        while not watch.run.done() and not hopeless:
            if slot.drain_requested.is_set() and watch.stopping_pid != slot.pid:  # a restarted process is told again
                slot.enter(State.DRAINING)
                watch.stopping_pid = slot.pid
                watch.pending.append(asyncio.ensure_future(handle.stop(slot.drain_s)))
            await self._listen(slot, handle, watch)
            if self._is_stuck(slot, watch.silent_s()):
                _log.error("%s: no progress for too long; killing its process", slot.name)
                handle.kill(restart=True)
                watch.heard = slot.since = time.monotonic()
            hopeless = _hopeless(slot, watch)
        self._note_end(slot, watch, hopeless)
        return watch.served_s()

    async def _listen(self, slot: Slot, handle: WorkerHandle, watch: _Watch) -> None:
        """Take one report, or note that there is none. One report is outstanding at a time: it survives restarts."""
        period_s = self._config.controller.period_s
        if watch.report is None:
            watch.report = asyncio.ensure_future(handle.report())
        outstanding: set[asyncio.Future[Any]] = {watch.run, watch.report}
        await asyncio.wait(outstanding, timeout=period_s, return_when=asyncio.FIRST_COMPLETED)
        if watch.report.done():
            report, watch.report = watch.report, None
            if report.exception() is None:  # else the actor is gone for good, and `run` tells why
                watch.hear(report.result())
                self._hear(slot, report.result())
            await asyncio.wait({watch.run}, timeout=period_s)
        elif watch.silent_s() > self._config.worker.peer_timeout_s and slot.state is State.READY:
            slot.enter(State.SILENT)

    def _hear(self, slot: Slot, report: WorkerReport) -> None:
        before, slot.heard = slot.info, True
        if self._all_heard():
            self._introductions.set()
        if report.drain_s is not None and not slot.drain_requested.is_set():  # by a controller before this one
            self.drain(slot.name, report.drain_s)
        slot.pid, slot.info = report.pid, report.info
        slot.sequences, slot.pending_handoffs, slot.links = report.sequences, report.pending_handoffs, report.links
        if report.info is not None:
            slot.error = ""
            if before is not None and before.incarnation != report.info.incarnation:
                slot.restarts += 1
        elif before is not None and report.stage == "starting":  # killed; Ray has started it again
            slot.restarts += 1
        if slot.state is not State.DRAINING:
            slot.enter(State.READY if report.info is not None else State.STARTING)
        if before != report.info:
            self.changed.set()

    def _is_stuck(self, slot: Slot, silent_s: float) -> bool:
        if slot.state is State.STARTING:
            return slot.age() > self._config.controller.start_timeout_s
        return silent_s > self._config.worker.stall_timeout_s

    def _note_end(self, slot: Slot, watch: _Watch, hopeless: str) -> None:
        slot.info = None
        self.changed.set()
        error = watch.close()
        if slot.drain_requested.is_set() and error is None:
            return
        slot.error = hopeless or ("it stopped by itself" if error is None else one_line(error))
        _log.error("%s failed: %s", slot.name, slot.error)
        slot.enter(State.FAILED)


def _hopeless(slot: Slot, watch: _Watch) -> str:
    """Why the actor should be given up, or ""."""
    if slot.state is State.DRAINING and slot.age() > slot.drain_s + _STOP_MARGIN_S:
        return "it did not end when drained"
    if watch.false_starts >= _MAX_FALSE_STARTS:  # Ray would go on without a pause
        return f"its process died {watch.false_starts} times before it served: see its log"
    return ""


def one_line(error: BaseException) -> str:
    """The innermost message of an exception that crossed Ray, on one line."""
    cause = getattr(error, "cause", None) or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    text = " ".join(str(cause).split())
    return text if type(cause).__module__.startswith("llm_engine") else f"{type(cause).__name__}: {text}"


def _status(slot: Slot) -> WorkerStatus:
    info = slot.info
    return WorkerStatus(
        name=slot.name,
        role=Role(pool_of(slot.name)),
        state=slot.state.value,
        restarts=slot.restarts,
        pid=slot.pid,
        incarnation=info.incarnation if info else "",
        request_addr=info.request_addr if info else "",
        control_addr=info.control_addr if info else "",
        metrics_addr=info.metrics_addr if info else "",
        sequences=slot.sequences,
        pending_handoffs=slot.pending_handoffs,
        revision=slot.revision,
        links=slot.links,
        error=slot.error,
    )


async def wait_event(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event is set or the time is up. Unlike asyncio.wait_for of Python 3.11, never loses a cancellation."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
