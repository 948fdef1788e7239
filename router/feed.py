"""The controller's membership feed: a ZeroMQ subscription to complete member lists."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq

from llm_engine.api.errors import ConfigError, ProtocolError
from llm_engine.api.messages import MAX_FRAME_BYTES, Codec, Members

logger = logging.getLogger(__name__)


class MembershipFeed:
    """Calls `on_members` with the newest list. A silent feed changes nothing: the last list stays in force."""

    def __init__(
        self, address: str, key: bytes, loop: asyncio.AbstractEventLoop, on_members: Callable[[Members], None]
    ) -> None:
        self._codec: Codec[Members] = Codec(key, Members)
        self._loop = loop
        self._on_members = on_members
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.CONFLATE, 1)  # lists are complete, so only the newest one matters
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            self._socket.connect(address)
        except zmq.ZMQError as exc:
            self._context.destroy(linger=0)
            raise ConfigError(f"router.membership={address!r}: {exc}; expected tcp://host:port") from exc
        self._loop.add_reader(self._socket.FD, self._drain)
        self._drain()  # the descriptor first fires after the socket has been found empty

    def close(self) -> None:
        """Unsubscribe. No callback follows."""
        self._loop.remove_reader(self._socket.FD)
        self._socket.close()
        self._context.term()

    def _drain(self) -> None:
        members: Members | None = None
        while True:  # the descriptor is edge-triggered: read until empty
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                members = self._codec.decode(frame)
            except ProtocolError as exc:
                logger.warning("dropped a membership message: %s", exc)
        if members is not None:
            self._on_members(members)
