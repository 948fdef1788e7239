"""The membership feed: the complete list of workers, signed, on every change and at a fixed period.

Lost messages and late subscribers cost one period. Versions grow over restarts of the controller, because they start
from the clock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import zmq
import zmq.asyncio

from llm_engine.api.messages import Codec, Members, WorkerInfo

_HIGH_WATER = 16  # an absent or slow subscriber needs only the newest list


class MembershipFeed:
    """Publishes Members to any number of routers."""

    def __init__(self, context: zmq.asyncio.Context, key: bytes) -> None:
        self._codec: Codec[Members] = Codec(key, Members)
        self._socket = context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._version = time.time_ns() // 1_000_000
        self._workers: list[WorkerInfo] = []

    def bind(self, addr: str) -> str:
        """Publish there; returns the address with the port that was chosen."""
        self._socket.bind(addr)
        return str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))

    async def publish(self, workers: Sequence[WorkerInfo]) -> None:
        """Send the list; its version grows when it differs from the one before."""
        if list(workers) != self._workers:
            self._workers = list(workers)
            self._version += 1
        await self._socket.send(self._codec.encode(Members(version=self._version, workers=self._workers)))

    def close(self) -> None:
        self._socket.close()
