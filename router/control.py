"""The router's way to the controller: one signed request and its reply, on a connection of its own."""

from __future__ import annotations

import asyncio

import zmq
import zmq.asyncio

from llm_engine.api.control import ClusterStatus, ControlRefused, ControlRequest, ControlTimeout, Reply
from llm_engine.api.messages import MAX_FRAME_BYTES, Codec

TIMEOUT_S = 5.0


class NoController(ControlRefused):
    """This router was started without a controller."""


class ControllerPort:
    """Asks the controller. Without an address every question is refused; nothing is opened before the first one."""

    def __init__(self, address: str, key: bytes) -> None:
        self._address = address
        self._codec: Codec[Reply] = Codec(key, Reply)
        self._context: zmq.asyncio.Context | None = None

    async def ask(self, request: ControlRequest) -> ClusterStatus:
        """The cluster's status after the request. Raises ControlRefused or ControlTimeout."""
        if not self._address:
            raise NoController("router.controller is not set: this router has a fixed list of workers, and no pools")
        self._context = self._context or zmq.asyncio.Context()
        with self._context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
            try:
                socket.connect(self._address)
                async with asyncio.timeout(TIMEOUT_S):
                    await socket.send(self._codec.encode(request))
                    reply = self._codec.decode(await socket.recv())
            except TimeoutError:
                raise ControlTimeout(
                    f"the controller at {self._address} did not answer within {TIMEOUT_S:g} s; the pools keep their "
                    "sizes and requests are served meanwhile"
                ) from None
        if reply.error:
            raise ControlRefused(reply.error)
        return reply.status

    def close(self) -> None:
        """Idempotent."""
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None
