"""The HTTP server under the edge: uvicorn on httptools, with bounded request heads and abortable connections."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llm_engine.api.errors import ConfigError
from router.exchange import ABORT_EXTENSION

MAX_HEAD_BYTES = 64 << 10  # request line and headers
HEAD_TIMEOUT_S = 30.0
KEEP_ALIVE_S = 75.0
BACKLOG = 2048
MAX_CONNECTIONS = 16384
DEAD_PEER_MS = 60_000  # unacknowledged or unread data for so long: the kernel drops the connection


class HeadJoiner:
    """The transport of one response: its head leaves together with the first bytes of the body, in one segment."""

    __slots__ = ("_held", "_transport", "_wrote_head")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._wrote_head = False
        self._held = b""

    def write(self, data: bytes) -> None:
        if self._wrote_head:
            self._transport.write(self._held + data if self._held else data)
            self._held = b""
        elif data.startswith(b"HTTP/1.1 100"):
            self._transport.write(data)
        else:
            self._wrote_head = True
            self._held = data

    def flush(self) -> None:
        """For answers without a body."""
        if self._held:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class EdgeProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol, which leaves the size and the arrival time of a request's head unbounded."""

    _in_head = False  # a head has begun and is not complete
    _completed = False  # a request ended in the data being handled
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._completed = False
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        if not self._completed:  # else an unknown part of `data` belonged to the previous request
            self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response(f"The request line and headers exceed {MAX_HEAD_BYTES} bytes.")
        elif self._head_timer is None:
            self._arm()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self.scope["extensions"] = {ABORT_EXTENSION: self.transport.abort}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._disarm()
        super().on_headers_complete()
        joiner = HeadJoiner(self.transport)
        self.cycle.transport = joiner  # type: ignore[assignment]  # the cycle's task has not begun yet

        def complete() -> None:
            joiner.flush()
            self.on_response_complete()

        self.cycle.on_response = complete

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._completed = True

    def _arm(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def listen(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A listening socket; port 0 takes a free one. `reuse_port` lets several router processes share it.

    Raises ConfigError when the address can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the next one inherited by accepted connections
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_MS)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise ConfigError(f"router.host={host!r} router.port={port}: {exc.strerror}") from exc
    sock.setblocking(False)
    return sock


def make_server(app: Any, *, drain_s: float) -> uvicorn.Server:
    """A server for `await server.serve(sockets=[listen(…)])`; set `should_exit` to stop it.

    Open requests then get `drain_s` seconds to finish. The caller runs the event loop (uvloop) and handles signals.
    """
    config = uvicorn.Config(
        app,
        http=EdgeProtocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(KEEP_ALIVE_S),
        timeout_graceful_shutdown=int(drain_s),
        backlog=BACKLOG,
    )
    return uvicorn.Server(config)
