"""tcp, the receiver's end: frames are stored by the thread of their connection, under their lease's door."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator, Sequence

from kv_transfer.gate import Door, Doors
from kv_transfer.layout import CellMap
from kv_transfer.link import CACHED_BYTES, Cells, Landed, LeaseKey
from kv_transfer.listener import Events, Listener
from kv_transfer.memory import Arena
from kv_transfer.sockets import tune
from kv_transfer.tcp import (
    ANSWER,
    CONFIRM,
    DATA,
    HEADER,
    IOV,
    MAX_FRAME_BYTES,
    MAX_RANGES,
    RANGE,
    advance,
    receive_into,
)
from llm_engine.api.errors import ConfigError, ProtocolError
from llm_engine.api.handoff import KvLayout, LinkOffer


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
        header = bytearray(HEADER.size)
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        while receive_into(sock, memoryview(header)):
            kind, num_ranges, lease_id, epoch, value = HEADER.unpack(header)
            lease = LeaseKey(lease_id, epoch)
            if kind == CONFIRM:
                door = self._doors.find(lease, connection)
                sock.sendall(ANSWER.pack(value, door.landed().num_bytes if door is not None else 0))
            elif kind == DATA and 0 < num_ranges <= MAX_RANGES and 0 < value <= MAX_FRAME_BYTES:
                if not self._receive_frame(sock, poll, lease, connection, num_ranges, value):
                    break
            else:
                raise ProtocolError(f"frame of kind {kind} with {num_ranges} ranges, {value} bytes")
        return True

    def _receive_frame(
        self, sock: socket.socket, poll: select.poll, lease: LeaseKey, connection: int, num_ranges: int, num_bytes: int
    ) -> bool:
        table = bytearray(num_ranges * RANGE.size)
        if not receive_into(sock, memoryview(table)):
            return False
        ranges = list(RANGE.iter_unpack(table))
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
                    count = sock.recvmsg_into(views[:IOV], 0, socket.MSG_DONTWAIT)[0]
                except BlockingIOError:
                    count = -1
            if count > 0:
                stored += count
                advance(views, count)
            elif count == 0:
                return None
            else:
                poll.poll(1000)  # wakes up to look at the door, should the writer stall for good
        return stored


def _batches(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbours of at most CACHED_BYTES together, or one range: it is hashed from the cache when it is there."""
    first = num_bytes = 0
    for index, (_, length) in enumerate(ranges):
        if index > first and num_bytes + length > CACHED_BYTES:
            yield first, index
            first, num_bytes = index, 0
        num_bytes += length
    yield first, len(ranges)


def _discard(sock: socket.socket, num_bytes: int) -> bool:
    """Read and forget; False at end of file."""
    scratch = memoryview(bytearray(min(num_bytes, 1 << 18)))
    while num_bytes:
        count = sock.recv_into(scratch[: min(num_bytes, len(scratch))])
        if count == 0:
            return False
        num_bytes -= count
    return True
