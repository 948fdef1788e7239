"""Which attempts of which requests are live on this worker. Pure state, used from the asyncio thread only.

A token, failure or hand-off outcome leaves the worker only while its attempt is live here, so whatever ends an attempt
(finish, cancel, loss of its router, deadline) also silences everything about it that is still under way.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from llm_engine.api.messages import Submit

MAX_REMEMBERED = 8192

D = TypeVar("D")


@dataclass(slots=True, eq=False)
class Live(Generic[D]):
    """One live attempt. `deadline` is on the clock of the worker; `data` belongs to the worker's role."""

    request_id: str
    attempt: int
    router_id: str
    deadline: float
    data: D


class Ledger(Generic[D]):
    """Live attempts by request; remembers which attempts are over, so that late messages about them are dropped."""

    def __init__(self) -> None:
        self._live: dict[str, Live[D]] = {}
        self._over: OrderedDict[str, int] = OrderedDict()  # request → newest attempt that is over

    def __len__(self) -> int:
        return len(self._live)

    def is_stale(self, request_id: str, attempt: int) -> bool:
        """Whether this attempt, or a newer one, is already live or over."""
        live = self._live.get(request_id)
        newest = live.attempt if live is not None else -1
        return attempt <= max(newest, self._over.get(request_id, -1))

    def open(self, submit: Submit, now: float, data: D) -> Live[D]:
        """Make an attempt live. The caller has checked `is_stale` and ended older attempts."""
        live = Live(submit.request_id, submit.attempt, submit.router_id, now + submit.deadline_s, data)
        assert submit.request_id not in self._live
        self._live[submit.request_id] = live
        return live

    def get(self, request_id: str, attempt: int) -> Live[D] | None:
        """The live attempt, or None when it is over or another attempt is live."""
        live = self._live.get(request_id)
        return live if live is not None and live.attempt == attempt else None

    def close(self, request_id: str, attempt: int) -> Live[D] | None:
        """End an attempt and every older one, also such as have not arrived yet; returns the one that was live."""
        over = max(attempt, self._over.pop(request_id, -1))
        self._over[request_id] = over
        if len(self._over) > MAX_REMEMBERED:
            self._over.popitem(last=False)
        live = self._live.get(request_id)
        if live is None or live.attempt > attempt:
            return None
        return self._live.pop(request_id)

    def all(self) -> list[Live[D]]:
        """Every live attempt."""
        return list(self._live.values())

    def of_router(self, router_id: str) -> list[Live[D]]:
        """The live attempts one router waits for."""
        return [live for live in self._live.values() if live.router_id == router_id]
