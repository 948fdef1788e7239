"""The control channel: one plain TCP connection per pair, on which signed frames follow each other.

    length (4 bytes, little endian) | frame of `Codec`

Whoever has something to say says it in the thread that knows it: `send` writes into the socket then and there, so that
the other end's event loop is the only thread that has to wake up. Nothing here waits: what the kernel does not take is
queued up to a bound and sent by the loop; beyond that a message is an error for the hand-off concerned.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable

from kv_transfer.sockets import tune
from llm_engine.api.errors import TransferError
from llm_engine.api.messages import MAX_FRAME_BYTES

_LENGTH = struct.Struct("<I")
_READ_BYTES = 64 << 10
_QUEUE_BYTES = 8 << 20  # a peer that does not read is given so much, and one frame
_QUEUE_FRAMES = 256  # read and not yet handled; more stay in the kernel
_STRANGER_FRAME_BYTES = 1 << 20


class Channel:
    """One end of a control connection. `send` is for any thread; all else runs on the loop that it was made on."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes the connected socket over."""
        tune(sock, None)
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()  # frames leave whole and in order; the descriptor is closed under it
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._end = ""  # why the connection is over
        self._max_frame = _STRANGER_FRAME_BYTES
        self._incoming = bytearray(_READ_BYTES)
        self._filled = 0  # bytes of it
        self._frames: deque[bytes] = deque()
        self._handle: Callable[[memoryview], object] | None = None
        self._failure: Exception | None = None  # of `_handle`
        self._waiter: asyncio.Future[None] | None = None
        self._reading = False
        self._read_on()

    @classmethod
    async def connect(cls, address: str) -> Channel:
        """Reach tcp://host:port. Bound the time by `asyncio.timeout`. Raises TransferError."""
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            family, kind, protocol, _, where = found[0]
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                await loop.sock_connect(sock, where)
                return cls(sock)
            except BaseException:
                sock.close()
                raise
        except (OSError, ValueError, OverflowError) as exc:
            raise TransferError(str(exc)) from exc

    def trust(self) -> None:
        """The other end holds the cluster key: its frames may be as large as messages get."""
        self._max_frame = MAX_FRAME_BYTES

    def send(self, frame: bytes) -> None:
        """Write a frame, or queue what the kernel does not take. Any thread.

        Raises TransferError when the connection is over or the peer has not read for too long.
        """
        head = _LENGTH.pack(len(frame))
        with self._lock:
            if self._end:
                raise TransferError(f"control channel: {self._end}")
            if self._unsent_bytes:
                if self._unsent_bytes > _QUEUE_BYTES:
                    raise TransferError(f"control channel: the peer has left {self._unsent_bytes} bytes unread")
                self._queue(memoryview(head + frame))
                return
            sent = self._write(head, frame)
            if sent < len(head) + len(frame):
                self._queue(memoryview(head + frame)[sent:])
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to send it
                    self._loop.call_soon_threadsafe(self._send_on)

    async def serve(self, handle: Callable[[memoryview], object]) -> None:
        """Pass every frame to `handle` in the very callback that read it, until the connection is over.

        The frame's memory is used again when `handle` has returned. Raises TransferError at the end, or what `handle`
        raises.
        """
        while self._frames:  # read before
            handle(memoryview(self._frames.popleft()))
        self._read_on()
        self._handle = handle
        try:
            await self._wait()
        finally:
            self._handle = None
        raise self._failure or TransferError(f"control channel: {self._end}")

    async def recv(self) -> bytes:
        """The next frame. Raises TransferError when the connection is over and everything before that was returned."""
        while not self._frames:
            if self._end:
                raise TransferError(f"control channel: {self._end}")
            await self._wait()
        frame = self._frames.popleft()
        if not self._frames:
            self._read_on()
        return frame

    def close(self) -> None:
        """Idempotent. What was not sent is lost."""
        self._lose("closed")

    # Internals, on the loop unless they say otherwise.

    def _read_on(self) -> None:
        if not self._reading and not self._end:
            self._loop.add_reader(self._sock, self._on_readable)
            self._reading = True

    def _on_readable(self) -> None:
        try:
            count = self._sock.recv_into(memoryview(self._incoming)[self._filled :])
        except BlockingIOError:
            return
        except OSError as exc:
            self._lose(exc.strerror or str(exc))
            return
        if not count:
            self._lose("closed by the peer")
            return
        self._filled += count
        try:
            self._split()
        except Exception as exc:  # whoever awaits `serve` gets it
            self._failure = exc
            self._lose("a frame could not be handled")
            return
        if self._handle is not None:
            return
        if len(self._frames) > _QUEUE_FRAMES and not self._end:
            self._loop.remove_reader(self._sock)
            self._reading = False
        self._wake()

    def _split(self) -> None:
        """Cut what has arrived into frames; handle or queue them."""
        first, view = 0, memoryview(self._incoming)
        needed = _LENGTH.size
        while self._filled - first >= _LENGTH.size and not self._end:
            (length,) = _LENGTH.unpack_from(view, first)
            if length > self._max_frame:
                self._lose(f"a frame of {length} bytes, at most {self._max_frame} expected")
                return
            needed = _LENGTH.size + length
            if self._filled - first < needed:
                break
            frame = view[first + _LENGTH.size : first + needed]
            if self._handle is not None:
                self._handle(frame)
            else:
                self._frames.append(bytes(frame))
            first += needed
            needed = _LENGTH.size
        self._make_room(first, needed)

    def _make_room(self, first: int, needed: int) -> None:
        """Keep what has arrived from byte `first` on: the beginning of a frame that takes `needed` bytes."""
        left = self._filled - first
        if needed > len(self._incoming) or (needed <= _READ_BYTES < len(self._incoming)):
            incoming = bytearray(max(needed, _READ_BYTES))
            incoming[:left] = memoryview(self._incoming)[first : self._filled]
            self._incoming = incoming
        elif first and left:
            self._incoming[:left] = self._incoming[first : self._filled]
        self._filled = left

    async def _wait(self) -> None:
        """Until a frame is queued or the connection is over."""
        self._waiter = self._loop.create_future()
        try:
            if not self._end:
                await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _lose(self, why: str) -> None:
        with self._lock:
            if self._end:
                return
            self._end = why
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._unsent.clear()
            self._sock.close()
        self._wake()

    def _send_on(self) -> None:
        """There are unsent bytes: wait until the kernel takes more."""
        if not self._end:
            self._loop.add_writer(self._sock, self._on_writable)

    def _on_writable(self) -> None:
        with self._lock:
            with contextlib.suppress(TransferError):  # the reader notices the end
                while self._unsent:
                    sent = self._write(self._unsent[0])
                    self._unsent_bytes -= sent
                    if sent < len(self._unsent[0]):
                        self._unsent[0] = self._unsent[0][sent:]
                        return
                    self._unsent.popleft()
            self._loop.remove_writer(self._sock)

    def _queue(self, data: memoryview) -> None:
        """Any thread, with the lock held."""
        self._unsent.append(data)
        self._unsent_bytes += len(data)

    def _write(self, *data: bytes | memoryview) -> int:
        """Any thread, with the lock held. How many bytes the kernel has taken."""
        try:
            return self._sock.sendmsg(data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise TransferError(f"control channel: {exc.strerror or exc}") from exc
