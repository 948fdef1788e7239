"""The thread that owns an engine, and the two queues that join it to the asyncio loop.

asyncio thread                                step thread
  post(command) ── inbox (bounded) ─────────▶  runs commands while the device computes, then one engine step
  completions, on_step ◀── deliveries ───────  at most two a round; with `max_deliveries` not yet taken the engine waits

Commands run in the order of posting; their completions and the steps' results arrive in the order they happened.
An exception of the engine ends the thread and is the result of `failure`: the owner must take the worker down.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from llm_engine.api.errors import ServingError
from llm_engine.api.messages import Load

_log = logging.getLogger(__name__)

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")
T = TypeVar("T")

Completion = Callable[[], None]


class Stepper(Protocol[R_co]):
    """What the loop needs of an engine."""

    def step(self) -> R_co | None:
        """Advance everything by one step; None when there is nothing to do."""

    @property
    def under_way(self) -> bool:
        """The device computes for the next step, or has done so, since the last one."""

    @property
    def rest_s(self) -> float:
        """Seconds for which the device will go on with a pass; a step would only wait for that long."""

    def wait(self) -> None:
        """Until the device has ended the pass under way, if there is one."""

    def load(self) -> Load:
        """Queue and block counts now."""

    def check(self) -> None:
        """Verify every invariant. Raises AssertionError."""


E = TypeVar("E", bound=Stepper[Any])


@dataclass(frozen=True, slots=True)
class StepReport(Generic[R]):
    """One engine step: what it produced, and how long it took since there was work for it."""

    result: R
    duration_s: float


class StepLoop(Generic[E, R]):
    """Runs `engine.step()` whenever there is work. Built, used and stopped on the asyncio thread."""

    def __init__(
        self,
        engine: E,
        on_step: Callable[[StepReport[R]], None],
        *,
        name: str = "step",
        idle_s: float = 0.25,
        max_commands: int = 4096,
        max_deliveries: int = 64,
        on_thread_start: Callable[[], None] = lambda: None,
        on_result: Callable[[R], None] = lambda result: None,
    ) -> None:
        """`on_result` sees a step's result first, on the step thread; it must not block."""
        self._engine = engine
        self._on_step = on_step
        self._idle_s = idle_s
        self._max_commands = max_commands
        self._on_thread_start = on_thread_start
        self._on_result = on_result
        self._inbox: deque[Callable[[], Completion | None]] = deque()
        self._wakeup = threading.Condition()
        self._deliveries = threading.Semaphore(max_deliveries)
        self._stopping = False
        self._working_since: float | None = None
        self._next_check = 0.0
        self._ended = 0.0  # when the last step did
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.failure: asyncio.Future[None] | None = None
        self.load = Load(seq=0)  # as of the last round; replaced, never changed, so any thread may read it

    def start(self) -> None:
        """Start the thread. Deliveries go to the running asyncio loop."""
        self._loop = asyncio.get_running_loop()
        self.failure = self._loop.create_future()
        self._thread.start()

    @property
    def age_s(self) -> float:
        """Seconds since the last progress while there was work; 0 when idle. Safe from any thread."""
        since = self._working_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def post(self, command: Callable[[E], T], done: Callable[[T], None] | None = None) -> None:
        """Run `command` on the step thread; `done(result)` then runs on the asyncio thread.

        For commands whose number is bounded by the work already admitted (aborts, releases). An exception of the
        command ends the worker.
        """

        def run() -> Completion | None:
            result = command(self._engine)
            return None if done is None else (lambda: done(result))

        self._enqueue(run)

    def offer(self, command: Callable[[E], T], done: Callable[[T], None] | None = None) -> bool:
        """As `post`, for new work: False, and nothing happens, when the inbox is full."""
        if len(self._inbox) >= self._max_commands:
            return False
        self.post(command, done)
        return True

    async def call(self, command: Callable[[E], T]) -> T:
        """Run `command` on the step thread and return its result. A ServingError of the command is the caller's."""
        assert self._loop is not None
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> Completion | None:
            try:
                result = command(self._engine)
            except ServingError as exc:
                error = exc
                return lambda: None if future.done() else future.set_exception(error)
            return lambda: None if future.done() else future.set_result(result)

        self._enqueue(run)
        return await future

    def fail(self, exc: BaseException) -> None:
        """Declare the engine's results unusable. On the asyncio thread."""
        assert self.failure is not None
        if not self.failure.done():
            self.failure.set_exception(exc)

    async def stop(self, timeout_s: float) -> bool:
        """Let the current step end and the thread exit. False when it is still busy after `timeout_s`."""
        with self._wakeup:
            self._stopping = True
            self._wakeup.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def _enqueue(self, run: Callable[[], Completion | None]) -> None:
        with self._wakeup:
            self._inbox.append(run)
            self._wakeup.notify()

    def _run(self) -> None:
        assert self._loop is not None
        try:
            self._on_thread_start()
            while self._round():
                pass
            self._engine.wait()  # the owner may close the memory that a pass uses
        except BaseException as exc:
            _log.critical("the step loop failed", exc_info=True)
            self._hand_over(self.fail, exc)

    def _round(self) -> bool:
        """Commands, one step, and what came of them. Sleeps when there was nothing to do. False: stop."""
        self._working_since = time.monotonic()
        self._run_commands()
        while (rest_s := self._engine.rest_s) > 0 and not self._stopping:
            self._sleep(rest_s)
            self._run_commands()
        self._engine.wait()
        self._run_commands()  # such as came meanwhile: what they bring takes part in the pass to come
        started = self._ended if self._engine.under_way else time.monotonic()
        result = self._engine.step()
        self._ended = time.monotonic()
        if result is not None:
            self._on_result(result)
        report = None if result is None else StepReport(result, self._ended - started)
        self.load = self._engine.load()
        if report is not None:
            self._deliver([], report)
        else:
            self._working_since = None
            self._check()
            self._sleep(self._idle_s)
        return not self._stopping

    def _check(self) -> None:
        """Verify the engine's invariants while it has nothing else to do, in at most a hundredth of the time."""
        started = time.monotonic()
        if started < self._next_check:
            return
        self._engine.check()
        self._next_check = started + 100 * (time.monotonic() - started)

    def _sleep(self, timeout_s: float) -> None:
        """Until a command comes, at most."""
        with self._wakeup:
            if not self._inbox and not self._stopping:
                self._wakeup.wait(timeout_s)

    def _run_commands(self) -> None:
        """Those that wait. Their completions go ahead of the step: peers wait for some of the answers."""
        completions = []
        for _ in range(len(self._inbox)):
            completion = self._inbox.popleft()()
            if completion is not None:
                completions.append(completion)
        if completions:
            self._deliver(completions, None)

    def _deliver(self, completions: list[Completion], report: StepReport[R] | None) -> None:
        while not self._deliveries.acquire(timeout=0.1):
            if self._stopping:
                return
        self._hand_over(self._take, completions, report)

    def _take(self, completions: list[Completion], report: StepReport[R] | None) -> None:
        """On the asyncio thread: a delivery of the step thread."""
        self._deliveries.release()
        try:
            for complete in completions:
                complete()
            if report is not None:
                self._on_step(report)
        except Exception as exc:
            _log.critical("a step's results could not be handled", exc_info=True)
            self.fail(exc)

    def _hand_over(self, callback: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the asyncio loop is closed: nobody is left to tell
            self._stopping = True
