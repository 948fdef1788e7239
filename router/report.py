"""What operators see: the state of the workers and the timelines of requests, as JSON-serialisable data."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from itertools import islice, product
from typing import Any

import msgspec

from llm_engine.api.messages import Role
from llm_engine.api.request import FinishReason
from router.flight import Flight
from router.journal import AttemptRecord
from router.worker import LinkState, Worker

MAX_TIMELINES = 512


class Timeline(msgspec.Struct):
    """When and where a request was served. Times are seconds since its arrival."""

    request_id: str
    arrived_unix: float
    num_prompt: int
    num_output: int
    cached_tokens: int | None
    finish: FinishReason | None
    error: str | None
    first_token_s: float | None
    ended_s: float | None
    stages: dict[str, float]  # shared with the flight: filled when the first chunk has been written
    attempts: list[AttemptRecord]

    @staticmethod
    def of(flight: Flight) -> Timeline:
        """The timeline so far; keeps no token."""
        journal = flight.journal
        return Timeline(
            request_id=journal.request_id,
            arrived_unix=journal.arrived_unix,
            num_prompt=journal.num_prompt,
            num_output=len(journal.output),
            cached_tokens=journal.cached_tokens,
            finish=journal.finish,
            error=str(flight.error) if flight.error is not None else None,
            first_token_s=flight.first_s,
            ended_s=flight.ended_s,
            stages=flight.stages,
            attempts=journal.attempts,
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        return data


class TimelineLog:
    """The timelines of the last requests that ended."""

    def __init__(self, capacity: int = MAX_TIMELINES) -> None:
        self._timelines: deque[Timeline] = deque(maxlen=capacity)

    def add(self, flight: Flight) -> None:
        """Keep the timeline of a request that is over."""
        self._timelines.append(Timeline.of(flight))

    def get(self, request_id: str) -> Timeline | None:
        """None: unknown, or too long ago."""
        return next((timeline for timeline in self._timelines if timeline.request_id == request_id), None)

    def recent(self, count: int) -> list[dict[str, Any]]:
        """The last requests, newest first."""
        return [timeline.as_json() for timeline in islice(reversed(self._timelines), count)]


def worker_status(worker: Worker, now: float) -> dict[str, Any]:
    """One worker, alive or not."""
    info = worker.info
    return {
        "name": worker.name,
        "address": worker.address,
        "state": worker.state.value,
        "usable": worker.usable,
        "retired": worker.retired,
        "silent_s": round(now - worker.last_seen, 3) if info is not None else None,
        "attempts": len(worker.attempts),
        "prefix_blocks": len(worker.prefix),
        "prefix_gaps": worker.prefix.num_gaps,
        "info": None if info is None else msgspec.to_builtins(info),
        "load": None if info is None else msgspec.structs.asdict(worker.load),
    }


def worker_counts(workers: Iterable[Worker]) -> dict[tuple[str, str], int]:
    """Number of workers by (role, state); every combination is present, so that gauges go back to 0."""
    counts = Counter((worker.info.role.value, worker.state.value) for worker in workers if worker.info is not None)
    return {key: counts[key] for key in product([r.value for r in Role], [s.value for s in LinkState])}


def pool_status(workers: Iterable[Worker]) -> dict[str, dict[str, int]]:
    """Per role: known, alive and usable workers, and what they hold."""
    pools: dict[str, dict[str, int]] = {}
    for worker in workers:
        if worker.info is None:
            continue
        empty = {"workers": 0, "alive": 0, "usable": 0, "running": 0, "waiting": 0, "blocks_free": 0, "blocks_live": 0}
        pool = pools.setdefault(worker.info.role.value, empty)
        pool["workers"] += 1
        pool["usable"] += worker.usable
        if worker.state is LinkState.ALIVE:
            pool["alive"] += 1
            pool["running"] += worker.load.num_running
            pool["waiting"] += worker.load.num_waiting
            pool["blocks_free"] += worker.load.blocks_free + worker.load.blocks_cached
            pool["blocks_live"] += worker.load.blocks_live
    return pools
