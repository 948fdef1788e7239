"""One HTTP/1.1 connection: httptools turns its bytes into exchanges, which are served one after the other.

        idle ──first byte──▶ head ──complete──▶ open: the task serves it ──answered──▶ idle, or the next pipelined one
          │                    │                  │
          └── KEEP_ALIVE_S ────┴── HEAD_TIMEOUT_S │ client leaves: the task is cancelled;
              later: closed                       │ client does not read for `stall_s`: aborted, which is the same

Bounds: a head has MAX_HEAD_BYTES; a body is read on only while the handler wants it; while requests are pipelined
nothing more is read, and none is begun while the client does not read its answers.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote

import httptools

from llm_engine.api.errors import RequestError
from router.exchange import Exchange
from router.failures import error_body

if TYPE_CHECKING:
    from router.server import HttpServer

MAX_HEAD_BYTES = 64 << 10  # request line and headers
HEAD_TIMEOUT_S = 30.0
KEEP_ALIVE_S = 75.0
MAX_PIPELINED = 128  # requests behind the open one


class Connection(asyncio.Protocol):
    """The protocol object of one client."""

    def __init__(self, server: HttpServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.deadline = math.inf  # of what is awaited from an idle client; the server closes the connection after it
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[Exchange] = deque()  # to be served
        self._open: Exchange | None = None  # being served
        self._task: asyncio.Task[None] | None = None  # serves them
        self._idle: asyncio.Future[None] | None = None  # what the task waits for while there is nothing to serve
        self._incoming: Exchange | None = None  # whose body is arriving
        self._last = False  # nothing that arrives from now on is read as a request
        self._in_head = False  # a head has begun and is not complete
        self._completed = False  # a request ended in the data being handled
        self._unparsed = 0  # bytes left of a body that the parser does not see, because the request asks for an upgrade
        self._head_bytes = 0
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._drained: asyncio.Future[None] | None = None  # set while the client does not read
        self._stalled: asyncio.TimerHandle | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.deadline = self._loop.time() + HEAD_TIMEOUT_S
        if not self.server.accept(self):
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        self._queue.clear()
        if self._drained is not None:
            self.resume_writing()
        if self._open is not None:
            self._open.client_gone = True
        if self._task is not None and (self._open is not None or self._idle is not None):
            self._task.cancel()
        self._open = None
        del self._parser  # it refers back to this object

    def data_received(self, data: bytes) -> None:
        if self._last and self._incoming is None:
            return  # nothing that follows the last request is read
        if self._unparsed:
            self._feed_unparsed(data)
            return
        self._completed = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._last = True  # no other protocol is spoken here: the request is answered in this one
            self._feed_unparsed(data[exc.args[0] :])
        except httptools.HttpParserError as exc:
            self._refuse(f"not HTTP: {exc}")
            return
        if self._in_head:
            self._bound_head(len(data))

    def eof_received(self) -> bool:
        """A client that half-closes has left."""
        return False

    def pause_writing(self) -> None:
        self._drained = self._loop.create_future()
        self._stalled = self._loop.call_later(self.server.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        assert self._stalled is not None
        assert self._drained is not None
        self._stalled.cancel()
        if not self._drained.done():
            self._drained.set_result(None)
        self._stalled = self._drained = None

    # httptools

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        self._url = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._last:
            return
        parser = self._parser
        url = self._url
        if not url.startswith(b"/"):
            parsed = httptools.parse_url(url)
            url = (parsed.path or b"/") + (b"?" + parsed.query if parsed.query else b"")
        raw_path, _, query = url.partition(b"?")
        path = raw_path.decode("latin-1")
        exchange = self._incoming = Exchange(
            self,
            parser.get_method().decode("latin-1"),
            unquote(path) if "%" in path else path,
            query,
            self._headers,
            keeps_alive=parser.should_keep_alive() and not parser.should_upgrade(),
            chunks=parser.get_http_version() == "1.1",
        )
        if parser.should_upgrade():
            self._unparsed = sum([int(value) for name, value in self._headers if name == b"content-length"])
        self._queue.append(exchange)
        if self._task is None:
            self._task = self._loop.create_task(self._serve())
        elif self._idle is not None:
            if not self._idle.done():
                self._idle.set_result(None)
        elif len(self._queue) <= MAX_PIPELINED:
            self.transport.pause_reading()
        else:
            self.transport.abort()

    def on_body(self, data: bytes) -> None:
        if self._incoming is not None:
            self._incoming.feed(data)

    def on_message_complete(self) -> None:
        self._completed = True
        if self._incoming is not None and not self._unparsed:
            self._incoming.feed_end()
            self._incoming = None

    # for exchanges

    async def drained(self) -> None:
        """Wait while the client does not read."""
        if self._drained is not None:
            await self._drained

    def answered(self, exchange: Exchange) -> None:
        """The open exchange has its whole answer."""
        self._open = None
        if not exchange.keeps_alive or self.server.draining or (self._last and not self._queue):
            self.finish()
        else:
            self.deadline = self.server.now + (HEAD_TIMEOUT_S if self._in_head else KEEP_ALIVE_S)

    # for the server

    def finish(self) -> None:
        """Close after the open request, or now."""
        self._last = True
        self._queue.clear()
        if self._open is None:
            self.transport.close()

    def abort(self) -> asyncio.Task[None] | None:
        """Drop the connection; returns its task, which is cancelled soon."""
        self.transport.abort()
        return self._task

    async def _serve(self) -> None:
        """The task: one exchange after the other, as long as there is a client."""
        try:
            while True:
                await self.drained()
                if self.transport.is_closing():
                    return
                if self._queue:
                    self.deadline = math.inf
                    self._open = self._queue.popleft()
                    await self.server.application(self._open)
                else:
                    self.transport.resume_reading()
                    self._idle = self._loop.create_future()
                    await self._idle
                    self._idle = None
        except BaseException:
            self.transport.abort()  # nobody would serve what follows
            raise

    def _feed_unparsed(self, data: bytes) -> None:
        if self._incoming is not None and self._unparsed:
            piece = data[: self._unparsed]
            self._unparsed -= len(piece)
            self._incoming.feed(piece)
            if not self._unparsed:
                self.on_message_complete()

    def _bound_head(self, num_bytes: int) -> None:
        if not self._completed:  # else an unknown part of the data belonged to the previous request
            self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(f"the request line and headers exceed {MAX_HEAD_BYTES} bytes")
        elif self._open is None and self._head_bytes in (0, num_bytes):  # the head has just begun
            self.deadline = self._loop.time() + HEAD_TIMEOUT_S

    def _refuse(self, reason: str) -> None:
        """What arrived is no request: say so, unless another one's answer is due, and close."""
        self._last = True
        self._incoming = None
        if self._open is None and not self._queue:
            self._open = Exchange(self, "", "", keeps_alive=False, chunks=True)
            self._open.respond(400, error_body(RequestError(reason)))
