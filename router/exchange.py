"""One HTTP request and its answer: bounded body, plain and streamed answers.

What is buffered per client is bounded by the transport's high-water mark plus one chunk: a write waits while the client
does not read, and the handler does not ask for more output meanwhile. A client that leaves, or does not read for too
long, cancels the task that serves it (`router.connection`).
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from llm_engine.api.errors import RequestError

if TYPE_CHECKING:
    from router.connection import Connection

JSON_TYPE = b"application/json"
READ_AHEAD_BYTES = 64 << 10  # of a body nobody has asked for yet
DISCARD_S = 5.0
_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in http.HTTPStatus}
_STREAM_TYPE = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"

Headers = Iterable[tuple[bytes, bytes]]


class BodyTooLarge(RequestError):
    """The request body exceeds router.max_body_bytes."""

    status = 413


class BodyStalled(RequestError):
    """The client stopped sending in the middle of the body."""

    status = 408


class WrongMediaType(RequestError):
    """The request body is not declared as JSON."""

    status = 415


class Exchange:
    """Reads the request and writes the answer. Used by one task."""

    __slots__ = (
        "_chunks",
        "_complete",
        "_connection",
        "_head",
        "_parts",
        "_reader",
        "_size",
        "arrived",
        "client_gone",
        "finished",
        "headers",
        "keeps_alive",
        "method",
        "path",
        "query",
        "salt",
        "status",
    )

    def __init__(
        self,
        connection: Connection,
        method: str,
        path: str,
        query: bytes = b"",
        headers: Sequence[tuple[bytes, bytes]] = (),
        *,
        keeps_alive: bool,
        chunks: bool,
    ) -> None:
        """`headers`: names in lower case. `chunks`: the client understands chunked answers (HTTP/1.1)."""
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.keeps_alive = keeps_alive  # the connection serves another request after this one
        self.arrived = time.monotonic()
        self.status = 0  # of the answer, once it has begun
        self.finished = False  # the whole answer was written
        self.client_gone = False
        self.salt = ""  # of the tenant's prefix cache
        self._connection = connection
        self._chunks = chunks
        self._head = b""  # of a streamed answer: leaves together with the first event, in one segment
        self._parts: list[bytes] = []  # of the body
        self._size = 0  # of the body so far
        self._complete = False  # the body
        self._reader: asyncio.Future[None] | None = None  # waits for more of the body

    # from the connection

    def feed(self, data: bytes) -> None:
        """A piece of the body. Nobody reads it after the answer."""
        if self.finished:
            return
        self._parts.append(data)
        self._size += len(data)
        if self._reader is not None:
            self._wake()
        elif self._size > READ_AHEAD_BYTES:
            self._connection.transport.pause_reading()

    def feed_end(self) -> None:
        """The body is complete."""
        self._complete = True
        self._wake()

    # the request

    async def json_body(self, max_bytes: int) -> bytes:
        """The whole body. Raises BodyTooLarge, BodyStalled, WrongMediaType."""
        declared = 0
        media_type = expect = b""
        for name, value in self.headers:
            if name == b"content-length":
                declared = int(value)
            elif name == b"content-type":
                media_type = value
            elif name == b"expect":
                expect = value
        if not self._complete and declared <= max_bytes:
            if expect.lower() == b"100-continue" and not self._parts:
                self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await self._read(max_bytes, self._connection.server.stall_s)
        if self._size > max_bytes or declared > max_bytes:
            await self._discard(max_bytes)
            raise BodyTooLarge(f"the body has {declared or 'too many'} bytes, at most {max_bytes} are accepted")
        if media_type != JSON_TYPE and media_type.partition(b";")[0].strip().lower() != JSON_TYPE:
            raise WrongMediaType("send the body as Content-Type: application/json")
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    async def _read(self, max_bytes: int, stall_s: float) -> None:
        """Read until the body is complete or has more than `max_bytes`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(stall_s) as deadline:
                while not self._complete and self._size <= max_bytes:
                    self._reader = loop.create_future()
                    self._connection.transport.resume_reading()
                    await self._reader
                    deadline.reschedule(loop.time() + stall_s)
        except TimeoutError:
            self.keeps_alive = False
            raise BodyStalled(f"no more of the body arrived for {stall_s:g} s") from None
        finally:
            self._reader = None

    async def _discard(self, max_bytes: int) -> None:
        """Read on for a bounded while, so that a client in the middle of sending gets to see the answer."""
        self.keeps_alive = False
        self._parts.clear()
        with contextlib.suppress(BodyStalled):
            await self._read(self._size + max_bytes, min(self._connection.server.stall_s, DISCARD_S))
        self._parts.clear()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # the answer

    def respond(self, status: int, body: bytes, media_type: bytes = JSON_TYPE, headers: Headers = ()) -> None:
        """A complete answer."""
        head = self._head_of(status, b"content-type: %b\r\ncontent-length: %d\r\n" % (media_type, len(body)), headers)
        self._finish(head if self.method == "HEAD" else head + body)

    def start_stream(self, headers: Headers = ()) -> None:
        """Begin a 200 answer of server-sent events."""
        if self._chunks:
            self._head = self._head_of(200, _STREAM_TYPE + b"transfer-encoding: chunked\r\n", headers)
        else:
            self.keeps_alive = False  # the end of the connection is the end of the answer
            self._head = self._head_of(200, _STREAM_TYPE, headers)

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send a piece of the stream; waits while the client does not read."""
        data = one_line_events(data)
        if self._chunks:
            data = b"%x\r\n%b\r\n%b" % (len(data), data, b"0\r\n\r\n" if last else b"")
        if self._head:
            data, self._head = self._head + data, b""
        if last:
            self._finish(data)
            return
        transport = self._connection.transport
        if transport.is_closing():
            await asyncio.sleep(0)  # cancelled here
            return
        transport.write(data)
        await self._connection.drained()

    def abort(self) -> None:
        """Drop the connection: an answer that can't be completed must not pass for a complete one."""
        self._connection.transport.abort()

    def client(self) -> tuple[str, int] | None:
        """Address of the client."""
        peer = self._connection.transport.get_extra_info("peername")
        return peer[:2] if isinstance(peer, tuple) else None

    def _head_of(self, status: int, fields: bytes, headers: Headers) -> bytes:
        self.status = status
        for name, value in headers:
            fields += b"%b: %b\r\n" % (name, value)
        if not self.keeps_alive:
            fields += b"connection: close\r\n"
        elif not self._chunks:
            fields += b"connection: keep-alive\r\n"  # not the default of HTTP/1.0
        return b"%b%b%b\r\n" % (_STATUS_LINES[status], self._connection.server.date, fields)

    def _finish(self, data: bytes) -> None:
        self.finished = True
        self._parts.clear()
        if not self._connection.transport.is_closing():
            self._connection.transport.write(data)
        self._connection.answered(self)


def one_line_events(data: bytes) -> bytes:
    """Escape the line separators that JSON leaves bare in strings but text-based stream readers split lines at."""
    if b"\xc2\x85" in data or b"\xe2\x80" in data:
        data = data.replace(b"\xc2\x85", b"\\u0085")
        data = data.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    return data
