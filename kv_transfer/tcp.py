"""tcp: framed writes over a plain socket, stored by the receiver's own thread.

A frame is a header, a table of (offset in the region, length) and the bytes in that order; one frame carries many
blocks, because small sends cost tens of microseconds each. The receiver stores a frame only if its lease is open for
this connection and every range is whole blocks of that lease. Bytes of a lease that is over are read and thrown away;
a range outside the lease cuts the connection.

Every slice is stored under the lease's door, so ending a lease proves on the spot that nothing lands any more: neither
a stopped writer nor a slow network keeps blocks in quarantine.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

from kv_transfer.gate import Door, Doors
from kv_transfer.layout import CellMap
from kv_transfer.link import CACHED_BYTES, Cells, Copy, Landed, LeaseKey, Sent, cuts, no_news
from kv_transfer.listener import Events, Listener
from kv_transfer.memory import Arena
from kv_transfer.sockets import dial, tune
from llm_engine.api.errors import ConfigError, LeaseRevoked, ProtocolError, TransferError
from llm_engine.api.handoff import KvLayout, LinkOffer

_HEADER = struct.Struct("<BxxxIQQQ")  # kind, ranges, lease id, epoch, payload bytes (or confirm sequence number)
_RANGE = struct.Struct("<QQ")
_ANSWER = struct.Struct("<QQ")  # confirm sequence number, bytes stored under the lease
_DATA, _CONFIRM = 1, 2
MAX_RANGES = 4096
MAX_FRAME_BYTES = 64 << 20
_FRAME_BYTES = 1 << 20  # or one copy: large enough to make the system calls cheap, small enough to stay in the cache
_IOV = 512


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
        done = 0
        for frame in _frames(copies):
            if stopped():
                raise LeaseRevoked(f"lease {lease.lease_id}: stopped")
            table = b"".join(_RANGE.pack(copy.target, copy.num_bytes) for copy in frame)
            num_bytes = sum(copy.num_bytes for copy in frame)
            header = _HEADER.pack(_DATA, len(frame), lease.lease_id, lease.epoch, num_bytes)
            self._send_frame(header + table, source, frame, partial(_renumbered, sent, done))
            done += len(frame)

    def confirm(self, lease: LeaseKey) -> Future[int | None]:
        """Ask, behind everything written so far, how much was stored."""
        future: Future[int | None] = Future()
        sequence = next(self._sequence)
        self._confirms[sequence] = future
        try:
            self._send(_HEADER.pack(_CONFIRM, 0, lease.lease_id, lease.epoch, sequence))
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

    def _send_frame(self, head: bytes, source: memoryview, frame: Sequence[Copy], sent: Sent) -> None:
        """Head and payload, the payload hashed piece by piece right before the kernel reads it."""
        views: list[memoryview] = [memoryview(head)]
        waiting = 0
        with self._sending():
            for index, copy in enumerate(frame):
                for first, last in cuts(copy.num_bytes):
                    sent(index, first, last)
                    views.append(source[copy.source + first : copy.source + last])
                    waiting += last - first
                    if waiting >= CACHED_BYTES:
                        self._send_all(views, socket.MSG_MORE)
                        waiting = 0
            self._send_all(views)

    def _send(self, head: bytes) -> None:
        with self._sending():
            self._sock.sendall(head)

    def _send_all(self, views: list[memoryview], flags: int = 0) -> None:
        while views:
            _advance(views, self._sock.sendmsg(views[:_IOV], (), flags))

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
        buffer = bytearray(_ANSWER.size)
        reason = "closed by the receiver"
        try:
            while _receive_into(self._sock, memoryview(buffer)):
                sequence, num_bytes = _ANSWER.unpack(buffer)
                if (future := self._confirms.pop(sequence, None)) is not None:
                    future.set_result(num_bytes)
        except OSError as exc:
            reason = str(exc)
        error = TransferError(f"tcp link lost: {reason}")
        while self._confirms:
            self._confirms.popitem()[1].set_exception(error)
        if not self._closed:
            self._on_lost(error)


class TcpInlet(Listener):
    """Receiver's end."""

    transport = "tcp"

    def __init__(self, arena: Arena, layout: KvLayout, key: bytes, events: Events, host: str) -> None:
        """Listens on a free port of `host`. Raises ConfigError."""
        self._buffer = arena.buffer
        self._doors = Doors(CellMap(layout))
        self._late = 0
        try:
            sock = socket.create_server((host, 0))
        except OSError as exc:
            raise ConfigError(f"worker.host={host}: tcp transport can't listen there: {exc.strerror}") from exc
        self._address = f"{host}:{sock.getsockname()[1]}"
        super().__init__(sock, key, arena.region, events)

    @property
    def late_bytes(self) -> int:
        """Bytes that arrived for leases that were over; none of them was stored."""
        return self._late

    def offer(self) -> LinkOffer:
        """host:port."""
        return LinkOffer(transport="tcp", address=self._address)

    def open_lease(self, lease: LeaseKey, connection: int, blocks: Sequence[int]) -> None:
        """Frames of this lease are stored from now on."""
        self._doors.open(lease, connection, blocks)

    def watch(self, lease: LeaseKey, on_landed: Callable[[Sequence[Cells]], None]) -> None:
        """See Inlet.watch."""
        self._doors.watch(lease, on_landed)

    def landed(self, lease: LeaseKey) -> Landed | None:
        """Counted as frames are stored."""
        return self._doors.landed(lease)

    def end_lease(self, lease: LeaseKey) -> bool:
        """Proven at once."""
        self._doors.shut(lease)
        return True

    def close(self) -> None:
        """See Listener.close."""
        super().close()
        self._buffer.release()

    def welcome(self, sock: socket.socket) -> None:
        """Nothing to send; tunes the socket."""
        tune(sock, None)

    def serve(self, sock: socket.socket, connection: int) -> bool:
        """Store frames until the writer closes."""
        header = bytearray(_HEADER.size)
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        while _receive_into(sock, memoryview(header)):
            kind, num_ranges, lease_id, epoch, value = _HEADER.unpack(header)
            lease = LeaseKey(lease_id, epoch)
            if kind == _CONFIRM:
                door = self._doors.find(lease, connection)
                sock.sendall(_ANSWER.pack(value, door.landed().num_bytes if door is not None else 0))
            elif kind == _DATA and 0 < num_ranges <= MAX_RANGES and 0 < value <= MAX_FRAME_BYTES:
                if not self._receive_frame(sock, poll, lease, connection, num_ranges, value):
                    break
            else:
                raise ProtocolError(f"frame of kind {kind} with {num_ranges} ranges, {value} bytes")
        return True

    def _receive_frame(
        self, sock: socket.socket, poll: select.poll, lease: LeaseKey, connection: int, num_ranges: int, num_bytes: int
    ) -> bool:
        table = bytearray(num_ranges * _RANGE.size)
        if not _receive_into(sock, memoryview(table)):
            return False
        ranges = list(_RANGE.iter_unpack(table))
        if sum(length for _, length in ranges) != num_bytes:
            raise ProtocolError(f"frame announces {num_bytes} bytes, its ranges hold another number")
        door = self._doors.find(lease, connection)
        stored = 0 if door is None else self._store_frame(sock, poll, door, ranges)
        if stored is None:
            return False
        self._late += num_bytes - stored
        return _discard(sock, num_bytes - stored)

    def _store_frame(
        self, sock: socket.socket, poll: select.poll, door: Door, ranges: Sequence[tuple[int, int]]
    ) -> int | None:
        """Fill the ranges while the door is open, and tell of cells as they land; bytes stored, or None at end of file.

        Raises ProtocolError for a range outside the lease, before anything is stored.
        """
        cells, stored = self._doors.check(door, ranges), 0
        for first, last in _batches(ranges):
            views = [self._buffer[offset : offset + length] for offset, length in ranges[first:last]]
            wanted = sum(len(view) for view in views)
            count = self._store(sock, poll, door, views)
            if count is None:
                return None
            stored += count
            if count < wanted:
                break
            door.record(cells[first:last], ranges[first:last])
        return stored

    def _store(self, sock: socket.socket, poll: select.poll, door: Door, views: list[memoryview]) -> int | None:
        """Fill the views while the door is open; bytes stored, or None at end of file."""
        stored = 0
        while views and door.is_open:
            with door.lock:
                if not door.is_open:
                    break
                try:
                    count = sock.recvmsg_into(views[:_IOV], 0, socket.MSG_DONTWAIT)[0]
                except BlockingIOError:
                    count = -1
            if count > 0:
                stored += count
                _advance(views, count)
            elif count == 0:
                return None
            else:
                poll.poll(1000)  # wakes up to look at the door, should the writer stall for good
        return stored


def _renumbered(sent: Sent, offset: int, index: int, first: int, last: int) -> None:
    sent(offset + index, first, last)


def _frames(copies: Sequence[Copy]) -> list[list[Copy]]:
    """Group copies into frames of at most _FRAME_BYTES and MAX_RANGES, one copy at least."""
    frames: list[list[Copy]] = []
    room = 0
    for copy in copies:
        if not frames or copy.num_bytes > room or len(frames[-1]) == MAX_RANGES:
            frames.append([])
            room = _FRAME_BYTES
        frames[-1].append(copy)
        room -= copy.num_bytes
    return frames


def _batches(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbours of at most CACHED_BYTES together, or one range: it is hashed from the cache when it is there."""
    first = num_bytes = 0
    for index, (_, length) in enumerate(ranges):
        if index > first and num_bytes + length > CACHED_BYTES:
            yield first, index
            first, num_bytes = index, 0
        num_bytes += length
    yield first, len(ranges)


def _advance(views: list[memoryview], count: int) -> None:
    """Drop the first `count` bytes of a list of views."""
    done = 0
    while count > 0 and count >= len(views[done]):
        count -= len(views[done])
        done += 1
    del views[:done]
    if count:
        views[0] = views[0][count:]


def _receive_into(sock: socket.socket, view: memoryview) -> bool:
    """Fill `view`; False at end of file, wherever it comes."""
    while len(view):
        count = sock.recv_into(view)
        if count == 0:
            return False
        view = view[count:]
    return True


def _discard(sock: socket.socket, num_bytes: int) -> bool:
    """Read and forget; False at end of file."""
    scratch = memoryview(bytearray(min(num_bytes, 1 << 18)))
    while num_bytes:
        count = sock.recv_into(scratch[: min(num_bytes, len(scratch))])
        if count == 0:
            return False
        num_bytes -= count
    return True
