"""The control channel: `baton status`, `scale`, `drain` and the supervisor ask the controller over ZeroMQ.

Messages are signed with the cluster's key like every other message of Baton. One request, one reply; a reply always
carries the cluster's status after the request.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from llm_engine.api.errors import ProtocolError, ServingError
from llm_engine.api.messages import Codec, Message, Role

_log = logging.getLogger(__name__)
_MAX_REQUEST_BYTES = 1 << 16


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as the controller sees it."""

    name: str
    role: Role
    state: str  # starting | ready | draining | silent | failed
    restarts: int = 0
    pid: int = 0
    incarnation: str = ""
    request_addr: str = ""
    control_addr: str = ""
    metrics_addr: str = ""
    error: str = ""  # why the last start failed


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Replicas wanted, and those that serve."""

    desired: int
    ready: int


class RouterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP edge. `ready`: it answers and knows enough workers to serve a request."""

    url: str = ""
    pid: int = 0
    restarts: int = 0
    ready: bool = False
    error: str = ""  # why the last start failed


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What `baton status --json` prints. `ready`: the router serves and every pool has its desired size."""

    ready: bool
    model: str
    router: RouterStatus
    pools: dict[str, PoolStatus]
    workers: list[WorkerStatus]


class GetStatus(Message, frozen=True, kw_only=True, tag="get_status"):
    """Only the status."""


class ScalePool(Message, frozen=True, kw_only=True, tag="scale_pool"):
    """Change the desired size of a pool; surplus workers drain first."""

    pool: str
    replicas: int


class ConfigurePools(Message, frozen=True, kw_only=True, tag="configure_pools"):
    """The configured sizes and bounds may have changed. A size that has is obeyed, one that has not changes nothing."""

    pools: dict[str, dict[str, Any]]  # PoolsConfig as plain data


class DrainWorker(Message, frozen=True, kw_only=True, tag="drain_worker"):
    """Take a worker out once its requests are finished or handed over; a fresh one takes its place."""

    worker: str


class StopCluster(Message, frozen=True, kw_only=True, tag="stop_cluster"):
    """Stop the router, then the workers."""


class Reply(Message, frozen=True, kw_only=True, tag="reply"):
    """`error` is empty when the request was carried out."""

    status: ClusterStatus
    error: str = ""


ControlRequest = GetStatus | ScalePool | ConfigurePools | DrainWorker | StopCluster
Handler = Callable[[ControlRequest], Awaitable[Reply]]


class ControlRefused(ServingError):
    """The controller understood the request and refused it."""


class ControlTimeout(ServingError):
    """The controller did not answer in time."""


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

    def __exit__(self, *_: object) -> None:
        self._context.term()
