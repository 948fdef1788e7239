"""What only the tcp link can check, because the bytes pass through the receiver."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from kv_transfer import auth, gate
from kv_transfer import tcp as tcp_module
from kv_transfer.link import Copy, Landed, LeaseKey
from kv_transfer.tcp import TcpLink
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import LinkOffer
from tests.unit.kv_transfer.link_bench import LAYOUT, TICKET, Bench, never, write
from tests.unit.kv_transfer.rig import KEY


@pytest.fixture
def tcp() -> Iterator[Bench]:
    bench = Bench("tcp")
    yield bench
    bench.close()


@pytest.mark.parametrize(
    ("start", "length"),
    [
        ("foreign", 96),  # a block of another lease
        ("own", 95),  # not a whole block
        ("own+1", 96),  # not at a block
        ("own", 3 * 96),  # runs into a block that is not leased
        ("last", 96),  # outside the region
        ("own", 0),
    ],
)
def test_a_write_outside_the_lease_cuts_the_connection(tcp: Bench, start: str, length: int) -> None:
    link = tcp.connect()
    lease = LeaseKey(5, 1)
    tcp.inlet.open_lease(lease, tcp.events.connections[0], [3, 4])
    offsets = {
        "foreign": tcp.cell(7).start,
        "own": tcp.cell(3).start,
        "own+1": tcp.cell(3).start + 1,
        "last": LAYOUT.arena_bytes,
    }
    with contextlib.suppress(TransferError):
        write(tcp, link, lease, offsets[start], length)
    tcp.events.wait(lambda: tcp.events.causes == ["bounds"] and len(tcp.events.ended) == 1)
    assert not any(tcp.arena.buffer)


@pytest.mark.parametrize("lease", [LeaseKey(5, 2), LeaseKey(6, 1)])
def test_a_write_under_another_lease_is_thrown_away(tcp: Bench, lease: LeaseKey) -> None:
    link, other = tcp.connect(), tcp.connect()
    tcp.inlet.open_lease(LeaseKey(5, 1), tcp.events.connections[0], [3])
    write(tcp, link, lease, tcp.cell(3))
    assert link.confirm(lease).result(5) == 0
    write(tcp, other, LeaseKey(5, 1), tcp.cell(3))  # the right lease, but somebody else's
    assert other.confirm(LeaseKey(5, 1)).result(5) == 0
    assert tcp.inlet.late_bytes == 2 * 96
    assert not any(tcp.arena.buffer)
    write(tcp, link, LeaseKey(5, 1), tcp.cell(3))
    assert link.confirm(LeaseKey(5, 1)).result(5) == 96


def test_ending_a_lease_in_the_middle_of_a_frame_is_final(tcp: Bench) -> None:
    """The writer stalls half way through a block; the lease ends; the rest comes and must not land."""
    link = tcp.connect()
    lease = LeaseKey(5, 1)
    tcp.inlet.open_lease(lease, tcp.events.connections[0], [3])
    cell = tcp.cell(3)
    sock = link._sock  # type: ignore[attr-defined]
    sock.sendall(struct.pack("<BxxxIQQQ", 1, 1, 5, 1, 96) + struct.pack("<QQ", cell.start, 96) + bytes(tcp.data[:40]))
    while bytes(tcp.arena.buffer[cell][:40]) != bytes(tcp.data[:40]):
        time.sleep(0.001)
    started = time.monotonic()
    assert tcp.inlet.end_lease(lease)
    assert time.monotonic() - started < 0.5  # the stalled writer does not hold it up
    tcp.arena.buffer[cell] = b"\x55" * 96  # the new owner
    sock.sendall(tcp.data[40:96])
    assert link.confirm(lease).result(5) == 0
    assert tcp.arena.buffer[cell] == b"\x55" * 96
    assert tcp.inlet.late_bytes == 56
    next_lease = LeaseKey(6, 2)
    tcp.inlet.open_lease(next_lease, tcp.events.connections[0], [3])
    write(tcp, link, next_lease, cell)  # the stream is still in step
    assert link.confirm(next_lease).result(5) == 96


def test_neighbours_in_memory_that_are_none_in_the_lease_are_refused(tcp: Bench) -> None:
    link = tcp.connect()
    lease = LeaseKey(5, 1)
    tcp.inlet.open_lease(lease, tcp.events.connections[0], [4, 3])
    with contextlib.suppress(TransferError):
        write(tcp, link, lease, tcp.cell(3).start, 2 * 96)
    tcp.events.wait(lambda: tcp.events.causes == ["bounds"])
    assert not any(tcp.arena.buffer)


def test_blocks_of_a_frame_are_reported_when_they_are_whole_and_not_after_the_end(
    tcp: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer stalls in the middle of the third pair of blocks; the lease ends; the rest comes."""
    monkeypatch.setattr(gate, "CACHED_BYTES", 2 * 96)
    link = tcp.connect()
    lease, first = LeaseKey(5, 1), tcp.cell(3).start
    data = bytes(tcp.data[: 6 * 96])
    tcp.inlet.open_lease(lease, tcp.events.connections[0], range(3, 9))
    reported: list[tuple[int, int, bytes]] = []
    tcp.inlet.watch(lease, lambda it: reported.append((it.first, it.last, b"".join(it.parts))))
    sock = link._sock  # type: ignore[attr-defined]
    head = struct.pack("<BxxxIQQQ", 1, 1, 5, 1, 6 * 96) + struct.pack("<QQ", first, 6 * 96)
    sock.sendall(head + data[: 5 * 96 + 40])
    while bytes(tcp.arena.buffer[first : first + 5 * 96 + 40]) != data[: 5 * 96 + 40]:
        time.sleep(0.001)
    whole = [(0, 2, data[: 2 * 96]), (2, 4, data[2 * 96 : 4 * 96])]
    assert reported == whole
    assert tcp.inlet.landed(lease) == Landed(4, 4 * 96)
    assert tcp.inlet.end_lease(lease)
    tcp.arena.buffer[first : first + 6 * 96] = b"\x55" * (6 * 96)  # the new owner
    sock.sendall(data[5 * 96 + 40 :])
    assert link.confirm(lease).result(5) == 0
    assert reported == whole
    assert tcp.arena.buffer[first : first + 6 * 96] == b"\x55" * (6 * 96)
    assert tcp.inlet.late_bytes == 56


@pytest.mark.parametrize("size", [1, 95, 96, 97, 250, 600])
def test_every_byte_of_every_copy_is_reported_once_and_in_order(
    tcp: Bench, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """However long copies are beside what is given to the kernel at once, and beside a frame."""
    monkeypatch.setattr(tcp_module, "CACHED_BYTES", size)
    monkeypatch.setattr(tcp_module, "_FRAME_BYTES", 2 * 96)
    link = tcp.connect()
    lease = LeaseKey(5, 1)
    tcp.inlet.open_lease(lease, tcp.events.connections[0], range(3, 12))
    blocks = [(3, 1), (4, 3), (7, 1), (8, 1), (9, 2), (11, 1)]
    copies = [Copy(96 * (block - 3), tcp.cell(block).start, 96 * count) for block, count in blocks]
    read = [bytearray() for _ in copies]

    def sent(index: int, first: int, last: int) -> None:
        assert first == len(read[index]) < last
        assert all(len(read[before]) == copies[before].num_bytes for before in range(index))
        read[index] += tcp.data[copies[index].source + first : copies[index].source + last]

    link.write(lease, tcp.data, copies, never, sent)
    assert b"".join(read) == tcp.data[: 9 * 96]
    assert link.confirm(lease).result(5) == 9 * 96
    assert tcp.arena.buffer[tcp.cell(3).start : tcp.cell(11).stop] == tcp.data[: 9 * 96]


@pytest.mark.parametrize("header", [(9, 1, 96), (1, 0, 96), (1, 5000, 96), (1, 1, 1 << 40), (1, 1, 97)])
def test_impossible_frames_cut_the_connection(tcp: Bench, header: tuple[int, int, int]) -> None:
    link = tcp.connect()
    tcp.inlet.open_lease(LeaseKey(5, 1), tcp.events.connections[0], [3])
    kind, ranges, size = header
    table = struct.pack("<QQ", tcp.cell(3).start, 96)
    link._sock.sendall(struct.pack("<BxxxIQQQ", kind, ranges, 5, 1, size) + table)  # type: ignore[attr-defined]
    tcp.events.wait(lambda: tcp.events.causes == ["bounds"])
    assert not any(tcp.arena.buffer)


def test_a_receiver_that_does_not_read_breaks_the_link_in_bounded_time() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    threads = threading.Thread(target=_accept_and_ignore, args=(listener, done := threading.Event()))
    threads.start()
    offer = LinkOffer(transport="tcp", address=f"127.0.0.1:{listener.getsockname()[1]}")
    lost: list[TransferError] = []
    link = TcpLink.connect(offer, KEY, ticket=TICKET, region="r", stall_timeout_s=0.3, on_lost=lost.append)
    data = memoryview(bytes(64 << 20))
    started = time.monotonic()
    with pytest.raises(TransferError, match="no progress"):
        link.write(LeaseKey(1, 1), data, [Copy(0, 0, len(data))], never)
    assert time.monotonic() - started < 5
    done.set()
    threads.join()
    link.close()
    listener.close()


def _accept_and_ignore(listener: socket.socket, done: threading.Event) -> None:
    sock, _ = listener.accept()
    with sock:
        shake = auth.Handshake(sock, KEY)
        shake.challenge(transport="tcp", region="r")
        shake.conclude(auth.Verdict(ok=True))
        done.wait(10)
