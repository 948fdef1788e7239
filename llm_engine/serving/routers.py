"""Which routers a worker knows, how to reach them, and what they must still be told. Pure state: no sockets, no clock.

A router is *connected* from its Hello until it is lost: silent for too long, unreachable, or too slow to read. While it
is lost every Failed for it is owed, and handed over when it says Hello again, so no stream of it hangs unnoticed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from llm_engine.api.messages import Failed

MAX_ROUTERS = 64
MAX_OWED = 8192


@dataclass(slots=True)
class _Router:
    route: bytes
    silent_s: float = 0.0
    connected: bool = True
    owed: deque[Failed] = field(default_factory=lambda: deque(maxlen=MAX_OWED))


class RouterTable:
    """Routers by id, and ids by connection. Used from the asyncio thread only."""

    def __init__(self, *, silence_s: float) -> None:
        self._silence_s = silence_s
        self._routers: dict[str, _Router] = {}
        self._by_route: dict[bytes, str] = {}

    def hello(self, router_id: str, route: bytes) -> bool | None:
        """Connect a router at `route`. True: new or back; False: a heartbeat; None: refused, the table is full."""
        router = self._routers.get(router_id)
        if router is None:
            if len(self._routers) >= MAX_ROUTERS and not self._forget_one():
                return None
            router = self._routers[router_id] = _Router(route)
            self._by_route[route] = router_id
            return True
        fresh = not router.connected or router.route != route
        self._by_route.pop(router.route, None)
        self._by_route[route] = router_id
        router.route, router.silent_s, router.connected = route, 0.0, True
        return fresh

    def heard(self, route: bytes) -> str | None:
        """The connected router behind `route`, noted as alive; None for strangers and lost routers."""
        router_id = self._by_route.get(route)
        if router_id is None or not self._routers[router_id].connected:
            return None
        self._routers[router_id].silent_s = 0.0
        return router_id

    def tick(self, elapsed_s: float) -> list[str]:
        """Add `elapsed_s` of silence to every connected router; returns those silent for too long."""
        silent = []
        for router_id, router in self._routers.items():
            router.silent_s += elapsed_s
            if router.connected and router.silent_s > self._silence_s:
                silent.append(router_id)
        return silent

    def lose(self, router_id: str) -> bool:
        """Mark a router lost. False if it was not connected."""
        router = self._routers.get(router_id)
        if router is None or not router.connected:
            return False
        router.connected = False
        return True

    def route(self, router_id: str) -> bytes | None:
        """Where to send to; None while the router is unknown or lost."""
        router = self._routers.get(router_id)
        return router.route if router is not None and router.connected else None

    def connected(self) -> list[str]:
        """Ids of the routers that can be sent to."""
        return [router_id for router_id, router in self._routers.items() if router.connected]

    def owe(self, failed: Failed, router_id: str) -> None:
        """Keep `failed` for a lost router. Unknown routers have no streams here and are owed nothing."""
        router = self._routers.get(router_id)
        if router is not None:
            router.owed.append(failed)

    def settle(self, router_id: str) -> list[Failed]:
        """Take everything owed to a router that is back."""
        router = self._routers[router_id]
        owed = list(router.owed)
        router.owed.clear()
        return owed

    def _forget_one(self) -> bool:
        """Drop the router that has been lost longest. False if all are connected."""
        lost = [(router.silent_s, router_id) for router_id, router in self._routers.items() if not router.connected]
        if not lost:
            return False
        router = self._routers.pop(max(lost)[1])
        self._by_route.pop(router.route, None)
        return True
