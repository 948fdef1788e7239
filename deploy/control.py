"""The control channel: `baton status`, `scale`, `drain` and the supervisor ask the controller over ZeroMQ.

Messages are signed with the cluster's key like every other message of Baton. One request, one reply; a reply always
carries the cluster's status after the request.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable

import zmq
import zmq.asyncio

from llm_engine.api.control import (
    Change,
    ClusterStatus,
    ConfigurePools,
    ControlRefused,
    ControlRequest,
    ControlTimeout,
    DrainWorker,
    GetStatus,
    PoolStatus,
    Reply,
    RollOut,
    RouterStatus,
    ScalePool,
    StopCluster,
    WorkerStatus,
)
from llm_engine.api.errors import ProtocolError
from llm_engine.api.messages import Codec

__all__ = [
    "Change",
    "ClusterStatus",
    "ConfigurePools",
    "ControlClient",
    "ControlRefused",
    "ControlRequest",
    "ControlServer",
    "ControlTimeout",
    "DrainWorker",
    "GetStatus",
    "Handler",
    "PoolStatus",
    "Reply",
    "RollOut",
    "RouterStatus",
    "ScalePool",
    "StopCluster",
    "WorkerStatus",
]

_log = logging.getLogger(__name__)
_MAX_REQUEST_BYTES = 1 << 16

Handler = Callable[[ControlRequest], Awaitable[Reply]]


class ControlServer:
    """Answers one request after the other. Whoever can't sign with the cluster's key gets no answer."""

    def __init__(self, context: zmq.asyncio.Context, key: bytes, handler: Handler) -> None:
        self._codec: Codec[ControlRequest] = Codec(key, ControlRequest)
        self._handler = handler
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_REQUEST_BYTES)
        self._socket.setsockopt(zmq.LINGER, 1000)

    def bind(self, addr: str) -> str:
        """Listen; returns the address with the port that was chosen."""
        self._socket.bind(addr)
        return str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            peer, *frames = await self._socket.recv_multipart()
            try:
                request = self._codec.decode(frames[-1] if frames else b"")
            except ProtocolError as exc:
                _log.warning("control request dropped: %s", exc)
                continue
            reply = await self._handler(request)
            with contextlib.suppress(zmq.Again):  # a peer that does not read loses its answer, not our time
                await self._socket.send_multipart([peer, self._codec.encode(reply)], flags=zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close()


class ControlClient:
    """Blocking client, one request at a time. A context manager."""

    def __init__(self, addr: str, key: bytes) -> None:
        self._addr = addr
        self._codec: Codec[Reply] = Codec(key, Reply)
        self._context = zmq.Context()

    def ask(self, request: ControlRequest, *, timeout_s: float = 5.0) -> ClusterStatus:
        """The status after the request. Raises ControlRefused or ControlTimeout."""
        with self._context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._addr)
            socket.send(self._codec.encode(request))
            if not socket.poll(int(timeout_s * 1000)):
                raise ControlTimeout(f"the controller at {self._addr} did not answer within {timeout_s:g} s")
            reply = self._codec.decode(socket.recv())
        if reply.error:
            raise ControlRefused(reply.error)
        return reply.status

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):
            self._context.term()  # would wait for ever for the socket that an interrupt has left open
