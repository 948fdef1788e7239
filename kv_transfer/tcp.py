"""tcp: framed writes over a plain socket, stored by the receiver's own thread. The writer's end; see `tcp_inlet`.

A frame is a header, a table of (offset in the region, length) and the bytes in that order; one frame carries many
blocks, because small sends cost tens of microseconds each. The receiver stores a frame only if its lease is open for
this connection and every range is whole blocks of that lease, in its order. Bytes of a lease that is over are read and
thrown away; any other range cuts the connection.

Every slice is stored under the lease's door, so ending a lease proves on the spot that nothing lands any more: neither
a stopped writer nor a slow network keeps blocks in quarantine.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future

from kv_transfer.link import CACHED_BYTES, Copy, LeaseKey, Sent, no_news
from kv_transfer.sockets import dial
from llm_engine.api.errors import LeaseRevoked, TransferError
from llm_engine.api.handoff import LinkOffer

HEADER = struct.Struct("<BxxxIQQQ")  # kind, ranges, lease id, epoch, payload bytes (or confirm sequence number)
RANGE = struct.Struct("<QQ")
ANSWER = struct.Struct("<QQ")  # confirm sequence number, bytes stored under the lease
DATA, CONFIRM = 1, 2
MAX_RANGES = 4096
MAX_FRAME_BYTES = 64 << 20
_FRAME_BYTES = 1 << 20  # or one copy: large enough to make the system calls cheap, small enough to stay in the cache
IOV = 512


class TcpLink:
    """Writer's end."""

    transport = "tcp"

    def __init__(self, sock: socket.socket, on_lost: Callable[[TransferError], None]) -> None:
        self._sock = sock
        self._lock = threading.Lock()  # frames are written whole
        self._closed = False
        self._on_lost = on_lost
        self._sequence = itertools.count(1)
        self._confirms: dict[int, Future[int | None]] = {}
        self._reader = threading.Thread(target=self._read_answers, name="kv-tcp-answers", daemon=True)
        self._reader.start()

    @classmethod
    def connect(
        cls,
        offer: LinkOffer,
        key: bytes,
        *,
        ticket: str,
        region: str,
        stall_timeout_s: float,
        on_lost: Callable[[TransferError], None],
    ) -> TcpLink:
        """Connect to the receiver. Blocks for at most a few seconds. Raises TransferError.

        `stall_timeout_s`: a send that makes no progress for so long breaks the link.
        """
        sock = dial("tcp", offer.address, key, ticket=ticket, region=region, stall_timeout_s=stall_timeout_s)
        return cls(sock, on_lost)

    def write(
        self,
        lease: LeaseKey,
        source: memoryview,
        copies: Sequence[Copy],
        stopped: Callable[[], bool],
        sent: Sent = no_news,
    ) -> None:
        """See Link.write. A frame once begun is finished: frames hold _FRAME_BYTES, or one copy if that is longer."""
        for first, last, num_bytes in _frames(copies):
            if stopped():
                raise LeaseRevoked(f"lease {lease.lease_id}: stopped")
            frame = copies[first:last]
            header = HEADER.pack(DATA, len(frame), lease.lease_id, lease.epoch, num_bytes)
            table = b"".join([RANGE.pack(copy.target, copy.num_bytes) for copy in frame])
            self._send_frame(header + table, source, enumerate(frame, first), sent)

    def confirm(self, lease: LeaseKey) -> Future[int | None]:
        """Ask, behind everything written so far, how much was stored."""
        future: Future[int | None] = Future()
        sequence = next(self._sequence)
        self._confirms[sequence] = future
        try:
            self._send(HEADER.pack(CONFIRM, 0, lease.lease_id, lease.epoch, sequence))
        except TransferError as exc:
            if self._confirms.pop(sequence, None) is not None:
                future.set_exception(exc)
        return future

    def close(self) -> None:
        """Cut the connection; a running send fails."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:
            self._reader.join()
        with self._lock:  # a failing send has returned: the descriptor can't be reused under it
            self._sock.close()

    def _send_frame(self, head: bytes, source: memoryview, frame: Iterable[tuple[int, Copy]], sent: Sent) -> None:
        """Head and payload, the payload hashed piece by piece right after the kernel has read it."""
        views = [memoryview(head)]
        pieces: list[tuple[int, int, int]] = []
        room = CACHED_BYTES
        with self._sending():
            for index, copy in frame:
                for first in range(0, copy.num_bytes, CACHED_BYTES):
                    last = min(first + CACHED_BYTES, copy.num_bytes)
                    views.append(source[copy.source + first : copy.source + last])
                    pieces.append((index, first, last))
                    room -= last - first
                    if room <= 0:
                        self._send_pieces(views, pieces, sent)
                        views, pieces, room = [], [], CACHED_BYTES
            self._send_pieces(views, pieces, sent)

    def _send_pieces(self, views: list[memoryview], pieces: Sequence[tuple[int, int, int]], sent: Sent) -> None:
        self._send_all(views)
        for piece in pieces:
            sent(*piece)

    def _send(self, head: bytes) -> None:
        with self._sending():
            self._sock.sendall(head)

    def _send_all(self, views: list[memoryview]) -> None:
        while views:
            advance(views, self._sock.sendmsg(views[:IOV]))

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        with self._lock:
            try:
                if self._closed:
                    raise TransferError("tcp link is closed")
                yield
            except OSError as exc:
                # Part of a frame may be on the wire: the stream can't be used any more.
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
                reason = "no progress" if isinstance(exc, BlockingIOError) else str(exc)
                raise TransferError(f"tcp link broken while sending: {reason}") from exc

    def _read_answers(self) -> None:
        buffer = bytearray(ANSWER.size)
        reason = "closed by the receiver"
        try:
            while receive_into(self._sock, memoryview(buffer)):
                sequence, num_bytes = ANSWER.unpack(buffer)
                if (future := self._confirms.pop(sequence, None)) is not None:
                    future.set_result(num_bytes)
        except OSError as exc:
            reason = str(exc)
        error = TransferError(f"tcp link lost: {reason}")
        while self._confirms:
            self._confirms.popitem()[1].set_exception(error)
        if not self._closed:
            self._on_lost(error)


def _frames(copies: Sequence[Copy]) -> Iterator[tuple[int, int, int]]:
    """[first, last) of copies that make a frame, of at most _FRAME_BYTES and MAX_RANGES or one copy, and its bytes."""
    first = num_bytes = 0
    for index, copy in enumerate(copies):
        if index > first and (num_bytes + copy.num_bytes > _FRAME_BYTES or index - first == MAX_RANGES):
            yield first, index, num_bytes
            first, num_bytes = index, 0
        num_bytes += copy.num_bytes
    if copies:
        yield first, len(copies), num_bytes


def advance(views: list[memoryview], count: int) -> None:
    """Drop the first `count` bytes of a list of views."""
    done = 0
    while count > 0 and count >= len(views[done]):
        count -= len(views[done])
        done += 1
    del views[:done]
    if count:
        views[0] = views[0][count:]


def receive_into(sock: socket.socket, view: memoryview) -> bool:
    """Fill `view`; False at end of file, wherever it comes."""
    while len(view):
        count = sock.recv_into(view)
        if count == 0:
            return False
        view = view[count:]
    return True
