"""The door: how many requests may be on the way at once, and who waits how long for a place.

Credits are sequences. The limit is the smaller of `max_inflight` and what the living workers can hold at once; what is
beyond waits in a bounded queue, first come, first served. A request that would wait too long anyway is refused at once,
with the time after which a place is expected. The queue's clock stands still while no pair is alive: then the request's
own deadline is the only bound.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from llm_engine.api.errors import Overloaded, TooManyRequests

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0
WINDOW_S = 10.0
MIN_DEPARTURES = 8  # before the measured rate is believed


class Waiting(Protocol):
    """A queued request."""

    enqueued: float
    over: bool  # the client has left, or the deadline has passed: it only has to be skipped


W = TypeVar("W", bound=Waiting)


class DepartureRate:
    """Departures per second while somebody waits: an idle cluster's rate says nothing about what it could do.

    Counted over the last one to two windows of WINDOW_S.
    """

    def __init__(self) -> None:
        self._since = 0.0  # start of the previous window, if there is one
        self._window = 0.0  # start of the current one
        self._previous = 0
        self._current = 0

    def restart(self, now: float) -> None:
        """The queue was empty until now."""
        self._since = self._window = now
        self._previous = self._current = 0

    def departed(self, now: float) -> None:
        """One request has left."""
        self._roll(now)
        self._current += 1

    def per_s(self, now: float) -> float | None:
        """None: too few departures to say."""
        self._roll(now)
        count = self._previous + self._current
        return count / max(now - self._since, 1e-3) if count >= MIN_DEPARTURES else None

    def _roll(self, now: float) -> None:
        if now - self._window >= WINDOW_S:
            self._since = max(self._window, now - WINDOW_S)
            self._previous = self._current if now - self._window < 2 * WINDOW_S else 0
            self._current = 0
            self._window = now


class Admission(Generic[W]):
    """Credits and the queue in front of them. Clock-free: every call is told the time."""

    def __init__(self, *, max_inflight: int, max_queued: int, queue_timeout_s: float) -> None:
        self.num_inflight = 0
        self.num_queued = 0
        self._max_inflight = max_inflight
        self._max_queued = max_queued
        self._timeout_s = queue_timeout_s
        self._queue: deque[W] = deque()
        self._rate = DepartureRate()
        self._serving_since: float | None = None  # None: no pair is alive
        self.limit = max_inflight

    def set_capacity(self, num_seqs: int, now: float) -> None:
        """What the living pairs can hold at once; 0: there is no pair."""
        if num_seqs <= 0:
            self._serving_since = None
        elif self._serving_since is None:
            self._serving_since = now
        self.limit = min(self._max_inflight, num_seqs) if num_seqs > 0 else self._max_inflight

    def enqueue(self, item: W, now: float) -> None:
        """Put a request at the end of the queue. Raises Overloaded when it would not be served in time."""
        if self.num_queued >= max(self._max_queued, 1 if self._has_credit() else 0):
            raise TooManyRequests(
                f"the queue is full ({self.num_queued} requests wait)", retry_after_s=self.retry_after_s(now)
            )
        wait_s = self._expected_wait_s(now)
        if wait_s is not None and wait_s > self._timeout_s:
            raise Overloaded(
                f"a place is expected in {wait_s:.0f} s, later than router.queue_timeout_s={self._timeout_s:g}",
                retry_after_s=_clamp(wait_s - self._timeout_s),
            )
        if self.num_queued == 0:
            self._rate.restart(now)
        if len(self._queue) > 2 * self.num_queued + 64:  # mostly requests that are over
            self._queue = deque(queued for queued in self._queue if not queued.over)
        item.enqueued = now
        self._queue.append(item)
        self.num_queued += 1

    def head(self) -> W | None:
        """The next request to place, if there is a credit for it. It stays queued until `take`."""
        while self._queue and self._queue[0].over:
            self._queue.popleft()
        return self._queue[0] if self._queue and self._has_credit() else None

    def take(self) -> None:
        """The head was placed: it holds a credit until `release`."""
        self._queue.popleft()
        self.num_queued -= 1
        self.num_inflight += 1

    def left(self) -> None:
        """A queued request is over; it is skipped when its turn comes."""
        self.num_queued -= 1

    def release(self, now: float) -> None:
        """A request that held a credit is over."""
        self.num_inflight -= 1
        self._rate.departed(now)

    def expired(self, now: float) -> Iterator[W]:
        """Queued requests that have waited for a place for longer than the queue allows."""
        if self._serving_since is None:
            return
        for item in list(self._queue):
            if now - max(item.enqueued, self._serving_since) <= self._timeout_s:
                return
            if not item.over:
                yield item

    def retry_after_s(self, now: float) -> float:
        """When a place may be expected, in seconds."""
        return _clamp(self._expected_wait_s(now) or 0.0)

    def _has_credit(self) -> bool:
        return self.num_inflight < self.limit

    def _expected_wait_s(self, now: float) -> float | None:
        """Until a request that joins the queue now gets its credit; None: unknown."""
        ahead = self.num_queued + 1 - max(0, self.limit - self.num_inflight)
        if ahead <= 0:
            return 0.0
        rate = self._rate.per_s(now)
        return None if rate is None else ahead / rate


def _clamp(seconds: float) -> float:
    return float(min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(seconds))))
