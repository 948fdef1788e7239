"""Notices clients that leave or stop reading while their requests are served.

A client that leaves cancels the task that serves it; one that does not read for `stall_s` is disconnected, which is the
same case from then on. Waiting for a disconnect takes a task of its own, so it starts only once a request has lived
through a whole period; one timer serves all requests.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from router.exchange import ClientGone, Exchange

PERIOD_S = 0.05


class Watchdog:
    """One per event loop."""

    def __init__(self) -> None:
        self._watches: set[ClientWatch] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, exchange: Exchange) -> ClientWatch:
        """A context manager whose body ends with ClientGone when the client leaves."""
        return ClientWatch(self, exchange)

    def add(self, watch: ClientWatch) -> None:
        self._watches.add(watch)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._sweep)

    def discard(self, watch: ClientWatch) -> None:
        self._watches.discard(watch)

    def _sweep(self) -> None:
        self._timer = None
        if self._watches:
            self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._sweep)
        for watch in list(self._watches):
            watch.check()


class ClientWatch:
    """Watches the client of the task that enters it."""

    __slots__ = ("_dog", "_exchange", "_gone", "_is_young", "_task", "_watcher")

    def __init__(self, dog: Watchdog, exchange: Exchange) -> None:
        self._dog = dog
        self._exchange = exchange
        self._gone = False
        self._is_young = True
        self._task: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._dog.add(self)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dog.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()
        if self._gone and kind is asyncio.CancelledError and self._task is not None:
            self._task.uncancel()
            raise ClientGone from None

    def check(self) -> None:
        """Called once a period."""
        if self._is_young:
            self._is_young = False
        elif self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._wait_for_disconnect())
        self._exchange.check_progress()

    async def _wait_for_disconnect(self) -> None:
        await self._exchange.disconnected()
        if not self._exchange.finished and self._task is not None:  # a complete answer ends in a disconnect, too
            self._gone = True
            self._task.cancel()
