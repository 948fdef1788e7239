"""The threads that copy and hash for one peer, so that neither the step loop nor the event loop ever does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from kv_transfer.link import Link

Job = Callable[[Link], bool]  # True: once more, behind the others

_JOIN_S = 5.0
SWITCH_S = 50e-6  # for sys.setswitchinterval: what the loop and the sender wait for a busy thread of their process


class Sender:
    """Runs jobs in turn. What a job raises goes to `on_error`; the thread goes on with the next."""

    def __init__(self, link: Link, on_error: Callable[[Exception], None]) -> None:
        self._link = link
        self._on_error = on_error
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # at most a few entries per pending hand-off
        self._thread = threading.Thread(target=self._run, name="kv-sender", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Any thread."""
        self._jobs.put(job)

    def has_jobs(self) -> bool:
        """Whether others wait for their turn."""
        return not self._jobs.empty()

    def stop(self) -> None:
        """End after the jobs queued so far; close the link first, so that they end quickly."""
        self._jobs.put(None)

    def join(self) -> None:
        """Wait for the end, for some seconds. Not on the loop: a link's engine may still be in a call."""
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if job(self._link):
                    self._jobs.put(job)
            except Exception as exc:  # the owner decides: a broken link ends the session, anything else the worker
                self._on_error(exc)
