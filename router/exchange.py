"""One HTTP request and its answer over raw ASGI: bounded body, plain and streamed answers.

What is buffered per client is bounded by the transport's high-water mark plus one chunk: a write waits while the client
does not read, and the handler does not ask for more output meanwhile. `router.watchdog` ends waits that last too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from typing import Any

from llm_engine.api.errors import RequestError

ABORT_EXTENSION = "baton.abort"  # scope extension: drops the connection without waiting for unread data
JSON_TYPE = b"application/json"

Headers = Iterable[tuple[bytes, bytes]]
Scope = Any
Receive = Any
Send = Any


class ClientGone(Exception):
    """The client closed the connection before the answer was complete."""


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
        "_receive",
        "_scope",
        "_send",
        "_stall_s",
        "_writing_since",
        "arrived",
        "finished",
        "method",
        "path",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, stall_s: float) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._stall_s = stall_s
        self._writing_since: float | None = None
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.arrived = time.monotonic()
        self.status = 0  # of the answer, once it has begun
        self.finished = False

    async def json_body(self, max_bytes: int) -> bytes:
        """The whole body. Raises BodyTooLarge, BodyStalled, WrongMediaType, ClientGone."""
        declared = 0
        media_type = b""
        for name, value in self._scope["headers"]:
            if name == b"content-length":
                declared = int(value) if value.isdigit() else 0
            elif name == b"content-type":
                media_type = value.partition(b";")[0].strip().lower()
        if declared > max_bytes:
            await self._discard(max_bytes)
            raise BodyTooLarge(f"the body has {declared} bytes, at most {max_bytes} are accepted")
        message = await self._next_message()
        body: bytes = message["body"]
        if message.get("more_body"):
            body = await self._read_rest(body, max_bytes)
        if len(body) > max_bytes:
            raise BodyTooLarge(f"the body has more than {max_bytes} bytes")
        if media_type != JSON_TYPE:
            raise WrongMediaType("send the body as Content-Type: application/json")
        return body

    async def respond(self, status: int, body: bytes, media_type: bytes = JSON_TYPE, headers: Headers = ()) -> None:
        """A complete answer."""
        self.status = status
        length = (b"content-length", b"%d" % len(body))
        start = {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", media_type), length, *headers],
        }
        self.finished = True
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    async def start_stream(self, headers: Headers = ()) -> None:
        """Begin a 200 answer of server-sent events."""
        self.status = 200
        fixed = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await self._send({"type": "http.response.start", "status": 200, "headers": [*fixed, *headers]})

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send a piece of the stream; waits while the client does not read."""
        self.finished = last
        self._writing_since = time.monotonic()
        await self._send({"type": "http.response.body", "body": one_line_events(data), "more_body": not last})
        self._writing_since = None

    async def disconnected(self) -> None:
        """Wait for the client to leave. Reads (and drops) what it still sends."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def check_progress(self) -> None:
        """Disconnect the client if the current write has been waiting for longer than `stall_s`."""
        if self._writing_since is not None and time.monotonic() - self._writing_since >= self._stall_s:
            self.abort()

    def abort(self) -> None:
        """Drop the connection at once, unread data included."""
        drop = self._scope.get("extensions", {}).get(ABORT_EXTENSION)
        if drop is not None:
            drop()

    async def _read_rest(self, body: bytes, max_bytes: int) -> bytes:
        parts = [body]
        size = len(body)
        try:
            async with asyncio.timeout(self._stall_s) as deadline:
                while size <= max_bytes:
                    message = await self._next_message()
                    parts.append(message["body"])
                    size += len(parts[-1])
                    if not message.get("more_body"):
                        return b"".join(parts)
                    deadline.reschedule(asyncio.get_running_loop().time() + self._stall_s)
        except TimeoutError:
            raise BodyStalled(f"no more of the body arrived for {self._stall_s:g} s") from None
        await self._discard(max_bytes)
        return b"".join(parts)

    async def _discard(self, max_bytes: int) -> None:
        """Read on for a bounded while, so that a client in the middle of sending gets to see the answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(self._stall_s, 5.0)):
                while max_bytes > 0:
                    message = await self._next_message()
                    max_bytes -= len(message["body"])
                    if not message.get("more_body"):
                        return

    async def _next_message(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message


def one_line_events(data: bytes) -> bytes:
    """Escape the line separators that JSON leaves bare in strings but text-based stream readers split lines at."""
    if b"\xc2\x85" in data or b"\xe2\x80" in data:
        data = data.replace(b"\xc2\x85", b"\\u0085")
        data = data.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    return data
