"""tcp, the receiver's end: frames are stored by the thread of their connection, under their lease's door."""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence

from kv_transfer.gate import Door, SeenInlet
from kv_transfer.link import LeaseKey
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


class TcpInlet(SeenInlet, Listener):
    """Receiver's end."""

    transport = "tcp"

    def __init__(self, arena: Arena, layout: KvLayout, key: bytes, events: Events, host: str) -> None:
        """Listens on a free port of `host`. Raises ConfigError."""
        self._buffer = arena.buffer
        SeenInlet.__init__(self, layout)
        try:
            sock = socket.create_server((host, 0))
        except OSError as exc:
            raise ConfigError(f"worker.host={host}: tcp transport can't listen there: {exc.strerror}") from exc
        self._address = f"{host}:{sock.getsockname()[1]}"
        Listener.__init__(self, sock, key, arena.region, events)

    def offer(self) -> LinkOffer:
        """host:port."""
        return LinkOffer(transport="tcp", address=self._address)

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
        left = num_bytes
        if door is not None:
            for each in self._doors.check(door, ranges, self._buffer):
                stored = self._store(sock, poll, door, each.parts)
                if stored is None:
                    return False
                left -= stored
                if stored < each.num_bytes:
                    break
                door.record(each)
        self._late += left
        return left == 0 or _discard(sock, left)

    def _store(self, sock: socket.socket, poll: select.poll, door: Door, parts: Sequence[memoryview]) -> int | None:
        """Fill the parts while the door is open; bytes stored, or None at end of file."""
        stored = 0
        views = list(parts)
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


def _discard(sock: socket.socket, num_bytes: int) -> bool:
    """Read and forget; False at end of file."""
    scratch = memoryview(bytearray(min(num_bytes, 1 << 18)))
    while num_bytes:
        count = sock.recv_into(scratch[: min(num_bytes, len(scratch))])
        if count == 0:
            return False
        num_bytes -= count
    return True
