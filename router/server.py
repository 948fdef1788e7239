"""The HTTP/1.1 server under the edge: listens, bounds connections and their idle times, drains when it stops.

kernel ──▶ Connection (router.connection: bytes ↔ requests) ──▶ Exchange ──▶ the application, one task a request
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from email.utils import formatdate
from typing import Any

from llm_engine.api.errors import ConfigError
from router.connection import Connection
from router.exchange import Exchange

BACKLOG = 2048
MAX_CONNECTIONS = 16384
DEAD_PEER_MS = 60_000  # unacknowledged or unread data for so long: the kernel drops the connection
SWEEP_S = 0.5  # how often deadlines are looked at
DRAIN_POLL_S = 0.02
CANCEL_S = 5.0  # for requests that are cut off to clean up

Application = Callable[[Exchange], Coroutine[Any, Any, None]]


class HttpServer:
    """`await serve(listen(…))` returns after `stop`. Runs on the event loop (uvloop); the caller handles signals."""

    def __init__(self, application: Application, *, stall_s: float) -> None:
        """`stall_s`: a client that does not read for so long is disconnected."""
        self.application = application
        self.stall_s = stall_s
        self.connections: set[Connection] = set()
        self.draining = False
        self.now = 0.0  # the loop's time, at most SWEEP_S old
        self.date = b""  # the header line of this second
        self._drain_s = 0.0
        self._stop = asyncio.Event()

    def stop(self, drain_s: float) -> None:
        """Accept nothing more; open requests get `drain_s` seconds. May be called again with less time."""
        self._drain_s = drain_s
        self._stop.set()

    async def serve(self, sock: socket.socket) -> None:
        """Serve connections to a listening socket until stopped."""
        loop = asyncio.get_running_loop()
        self._refresh(loop)
        server = await loop.create_server(lambda: Connection(self, loop), sock=sock, backlog=BACKLOG)
        try:
            while not self._stop.is_set():
                self._refresh(loop)
                for connection in [c for c in self.connections if self.now > c.deadline]:
                    connection.abort()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), SWEEP_S)
        finally:
            server.close()
            await self._drain(loop)

    def accept(self, connection: Connection) -> bool:
        """Whether one more connection is served."""
        self.connections.add(connection)
        return len(self.connections) <= MAX_CONNECTIONS

    def _refresh(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = loop.time()
        self.date = b"date: %b\r\n" % formatdate(usegmt=True).encode()

    async def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let open requests finish, then cut off what is left."""
        self.draining = True
        begun = loop.time()
        for connection in list(self.connections):
            connection.finish()
        while self.connections and loop.time() - begun < self._drain_s:  # noqa: ASYNC110  `stop` may shorten it
            await asyncio.sleep(DRAIN_POLL_S)
        tasks = [task for connection in self.connections if (task := connection.abort()) is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_S)


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
