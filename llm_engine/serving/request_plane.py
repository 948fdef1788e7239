"""The worker's end of the request plane: a ZeroMQ ROUTER socket on the asyncio loop.

receive: frame → Codec (authentic, well-formed) → a known router? → RequestHandler
send:    never waits. A full queue or a missing connection makes the router *lost*: the handler ends its streams at
         once, and the failures are owed to it until it says Hello again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from llm_engine.api.errors import ConfigError, ProtocolError
from llm_engine.api.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Cancel,
    Codec,
    Deltas,
    Drain,
    Failed,
    Hello,
    Load,
    Message,
    RouterMessage,
    SnapshotRequest,
    Submit,
    Welcome,
    WorkerInfo,
)
from llm_engine.api.request import TokenDelta
from llm_engine.serving.routers import RouterTable

_log = logging.getLogger(__name__)

_QUEUE_FRAMES = 1000  # per router and direction; a full send queue means the router does not read
_LINGER_MS = 1000
_BURST = 64  # frames handled before other tasks get a turn


class RequestHandler(Protocol):
    """What a worker does with messages. Called on the asyncio thread; must not block."""

    def on_submit(self, submit: Submit) -> None: ...

    def on_cancel(self, cancel: Cancel) -> None: ...

    def on_drain(self, drain: Drain) -> None: ...

    def on_snapshot_request(self, router_id: str) -> None: ...

    def on_router_lost(self, router_id: str) -> None:
        """End every stream of the router. Failures sent from here are owed to it."""

    def load(self) -> Load: ...


class RequestPlane:
    """Serves routers at one address, on one asyncio loop: `bind()`, then `run()` until cancelled, then `close()`."""

    def __init__(
        self,
        key: bytes,
        handler: RequestHandler,
        *,
        heartbeat_s: float,
        silence_s: float,
        on_reject: Callable[[str], None] = lambda cause: None,
        queue_frames: int = _QUEUE_FRAMES,
    ) -> None:
        self._codec: Codec[RouterMessage] = Codec(key, RouterMessage)
        self._handler = handler
        self._heartbeat_s = heartbeat_s
        self._on_reject = on_reject
        self._routers = RouterTable(silence_s=silence_s)
        self._info: WorkerInfo | None = None
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, queue_frames)
        self._socket.setsockopt(zmq.RCVHWM, queue_frames)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)

    def bind(self, host: str, port: int) -> str:
        """Listen; returns the address routers connect to. Raises ConfigError when the port is taken."""
        endpoint = f"tcp://{host}:{port or '*'}"
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as exc:
            raise ConfigError(f"worker.request_port={port}: can't listen on {endpoint}: {exc}") from exc
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def run(self, info: WorkerInfo) -> None:
        """Serve until cancelled. `info` is what Welcome tells."""
        self._info = info
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._receive())
            tasks.create_task(self._heartbeat())

    def close(self) -> None:
        """Close the socket; frames already queued get a second to leave. Idempotent."""
        self._socket.close()
        self._context.term()

    def knows(self, router_id: str) -> bool:
        """Whether messages to this router can be sent now."""
        return self._routers.route(router_id) is not None

    def num_routers(self) -> int:
        return len(self._routers.connected())

    def send(self, router_id: str, message: Message) -> bool:
        """Queue one message. False if it was not queued; a Failed is then owed to the router."""
        if self._transmit(router_id, self._codec.encode(message)):
            return True
        if isinstance(message, Failed):
            self._routers.owe(message, router_id)
        return False

    def send_deltas(self, router_id: str, items: list[TokenDelta]) -> bool:
        """All new tokens of one step for one router."""
        return self.send(router_id, Deltas(items=items))

    def broadcast(self, message: Message) -> None:
        """Send to every connected router."""
        frame = self._codec.encode(message)
        for router_id in self._routers.connected():
            self._transmit(router_id, frame)

    def beat(self) -> None:
        """Send the load to every connected router now."""
        self.broadcast(self._load())

    def _load(self) -> Load:
        return msgspec.structs.replace(self._handler.load(), num_routers=len(self._routers.connected()))

    async def _receive(self) -> None:
        while True:
            for _ in range(_BURST):
                frames = await self._socket.recv_multipart()
                try:
                    self._dispatch(frames)
                except ProtocolError as exc:
                    self._on_reject("malformed")
                    _log.debug("frame dropped: %s", exc)
            await asyncio.sleep(0)

    async def _heartbeat(self) -> None:
        """Load to every router and the silence check. A pause of this process is not a silence of its routers."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            self.beat()
            await asyncio.sleep(self._heartbeat_s)
            now = loop.time()
            for router_id in self._routers.tick(min(now - last, 2 * self._heartbeat_s)):
                self._lose(router_id, "silent")
            last = now

    def _dispatch(self, frames: list[bytes]) -> None:
        if len(frames) != 2:
            raise ProtocolError(f"{len(frames)} frames: expected a route and a message")
        route, frame = frames
        message = self._codec.decode(frame)
        if isinstance(message, Hello):
            self._hello(message, route)
            return
        router_id = self._routers.heard(route)
        if router_id is None:
            self._on_reject("unknown_router")
            return
        match message:
            case Submit():
                if message.router_id != router_id:
                    raise ProtocolError(f"submit names router {message.router_id}, sent by {router_id}")
                self._handler.on_submit(message)
            case Cancel():
                self._handler.on_cancel(message)
            case Drain():
                self._handler.on_drain(message)
            case SnapshotRequest():
                self._handler.on_snapshot_request(router_id)

    def _hello(self, hello: Hello, route: bytes) -> None:
        assert self._info is not None
        welcome = Welcome(version=PROTOCOL_VERSION, info=self._info)
        if hello.version != PROTOCOL_VERSION:
            self._on_reject("version")
            self._put(route, self._codec.encode(welcome))  # tells the router which version would do
            return
        if self._routers.route(hello.router_id) not in (None, route):
            self._lose(hello.router_id, "reconnected")  # what the old connection still held may be gone
        fresh = self._routers.hello(hello.router_id, route)
        if fresh is None:
            self._on_reject("too_many_routers")
        elif fresh:
            self.send(hello.router_id, welcome)
            self.send(hello.router_id, self._load())
            self._settle(hello.router_id, self._routers.settle(hello.router_id))

    def _settle(self, router_id: str, owed: Iterable[Failed]) -> None:
        for failed in owed:
            self.send(router_id, failed)

    def _transmit(self, router_id: str, frame: bytes) -> bool:
        route = self._routers.route(router_id)
        if route is None:
            return False
        cause = self._put(route, frame)
        if cause is not None:
            self._lose(router_id, cause)
        return cause is None

    def _put(self, route: bytes, frame: bytes) -> str | None:
        """Hand one frame to ZeroMQ without waiting; otherwise why it could not be."""
        sent = self._socket.send_multipart([route, frame], flags=zmq.DONTWAIT)
        assert isinstance(sent, asyncio.Future), "with DONTWAIT the outcome is known at once"
        error = sent.exception()
        if error is None:
            return None
        if isinstance(error, zmq.Again):
            return "slow"
        if isinstance(error, zmq.ZMQError) and error.errno == errno.EHOSTUNREACH:
            return "disconnected"
        raise error

    def _lose(self, router_id: str, cause: str) -> None:
        if self._routers.lose(router_id):
            _log.warning("router %s lost: %s", router_id, cause)
            self._handler.on_router_lost(router_id)
