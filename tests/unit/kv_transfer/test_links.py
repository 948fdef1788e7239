"""The two ends of a data link on their own: authentication, bounds, and what a revocation proves."""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from kv_transfer import auth, shm, tcp_inlet
from kv_transfer.link import Cells, Copy, Inlet, Landed, LeaseKey, Link
from kv_transfer.memory import Arena
from kv_transfer.mooncake import Engine
from kv_transfer.tcp import TcpLink
from kv_transfer.transports import ReceiverEnd, WriterEnd, connect, open_inlet
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import LeaseRevoked, ProtocolError, TransferError
from llm_engine.api.handoff import Connected, KvLayout, LinkOffer
from tests.unit.kv_transfer.rig import KEY, MOONCAKE, arena_mappings, block_bytes, cells, make_info, make_layout

LAYOUT = make_layout(16)
TICKET = "good"


@dataclass
class Recorder:
    """The owner of an inlet: accepts one ticket, writes everything down."""

    connections: list[int] = field(default_factory=list)
    ended: list[tuple[int, bool]] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def connected(self, connection: int, transport: str, ticket: str) -> str | None:
        if ticket != TICKET:
            return "unknown pairing"
        self._note(self.connections, connection)
        return None

    def closed(self, connection: int, proven: bool) -> None:
        self._note(self.ended, (connection, proven))

    def refused(self, cause: str) -> None:
        self._note(self.causes, cause)

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 10), f"{self}"

    def _note(self, where: list, what: object) -> None:  # type: ignore[type-arg]
        with self.changed:
            where.append(what)
            self.changed.notify_all()


class Bench:
    """An arena with an inlet of either kind, and links to it."""

    def __init__(self, transport: str) -> None:
        self.transport = transport
        self.layout: KvLayout = LAYOUT
        self.arena = Arena.create(LAYOUT.arena_bytes, shared=True)
        self.events = Recorder()
        self.lost: list[TransferError] = []
        self.links: list[Link] = []
        self.config = TransferConfig(transport=transport)
        end = ReceiverEnd(
            config=self.config,
            key=KEY,
            arena=self.arena,
            layout=LAYOUT,
            events=self.events,
            network=None,
            host="127.0.0.1",
        )
        self.inlet: Inlet = open_inlet(transport, end)
        self.data = memoryview(np.random.default_rng(0).integers(1, 256, 1 << 14, np.uint8).tobytes())
        self.engine = Engine(self.data, "127.0.0.1", self.config) if transport == "mooncake" else None

    def connect(self, *, key: bytes = KEY, ticket: str = TICKET, region: str | None = None) -> Link:
        connected = Connected(
            info=make_info("d", "d1", LAYOUT, "x"),
            layout=LAYOUT,
            link=self.inlet.offer(),
            reason="",
            region=region or self.arena.region,
            ticket=ticket,
        )
        end = WriterEnd(config=self.config, key=key, network=None, engine=self.engine, device=None)
        link = connect(connected, end, self.lost.append)
        self.links.append(link)
        return link

    def cell(self, block: int, row: int = 0) -> slice:
        return list(cells(self.layout, block))[row]

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.inlet.close()
        if self.engine is not None:
            self.engine.close()
        self.data.release()
        self.arena.close()


@pytest.fixture(params=["shm", "tcp", MOONCAKE])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()


@pytest.fixture
def tcp() -> Iterator[Bench]:
    bench = Bench("tcp")
    yield bench
    bench.close()


@pytest.fixture
def shm_bench() -> Iterator[Bench]:
    bench = Bench("shm")
    yield bench
    bench.close()


def never() -> bool:
    return False


def write(bench: Bench, link: Link, lease: LeaseKey, target: slice | int, length: int | None = None) -> None:
    start = target if isinstance(target, int) else target.start
    size = length if length is not None else (target.stop - target.start if isinstance(target, slice) else 0)
    link.write(lease, bench.data, [Copy(0, start, size)], never)


def test_a_written_block_is_there_when_confirmed(bench: Bench) -> None:
    link = bench.connect()
    lease = LeaseKey(5, 1)
    bench.inlet.open_lease(lease, bench.events.connections[0], [3, 4])
    write(bench, link, lease, bench.cell(3))
    landed = link.confirm(lease).result(5)
    assert landed in (None, 96)
    assert bench.arena.buffer[bench.cell(3)] == bench.data[:96]
    others = [block for block in range(16) if block != 3]
    assert not any(any(block_bytes(LAYOUT, bench.arena.buffer, block)) for block in others)


def test_a_writer_without_the_key_is_refused(bench: Bench) -> None:
    with pytest.raises(TransferError, match="BATON_SECRET"):
        bench.connect(key=b"x" * 32)
    bench.events.wait(lambda: bench.events.causes == ["auth"])
    assert bench.events.connections == []
    bench.connect()


@pytest.mark.parametrize("proof", ["wrong", "the receiver's own", "of another handshake"])
def test_a_writer_that_can_not_prove_the_key_is_refused(bench: Bench, proof: str) -> None:
    """It does not care who the receiver is, and tries to get by without the key."""
    first = _greet(bench)
    old = first.challenge.proof
    first.sock.close()
    stranger = _greet(bench)
    answer = {"wrong": b"w" * 32, "the receiver's own": stranger.challenge.proof, "of another handshake": old}[proof]
    stranger.send(auth.Answer(proof=answer))
    assert not stranger.receive(auth.Verdict).ok
    bench.events.wait(lambda: bench.events.causes.count("auth") >= 1)
    assert bench.events.connections == []
    stranger.sock.close()


def dial(bench: Bench) -> socket.socket:
    """A plain connection to the inlet."""
    address = bench.inlet.offer().address
    if bench.transport == "shm":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("\0" + address)
        return sock
    host, port = address.partition("/")[0].split(":")
    return socket.create_connection((host, int(port)))


class Stranger(auth.Handshake):
    """A writer's handshake without a key."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, b"")
        self.sock = sock
        self.send = self._send
        self.receive = self._receive
        self.challenge: auth.Challenge


def _greet(bench: Bench) -> Stranger:
    sock = dial(bench)
    stranger = Stranger(sock)
    greeting = auth.Greeting(
        version=auth.DATA_VERSION,
        transport=bench.transport,
        ticket=TICKET,
        region=bench.arena.region,
        nonce=b"n" * 32,
    )
    stranger.send(greeting)
    stranger.challenge = stranger.receive(auth.Challenge)
    return stranger


def test_a_receiver_without_the_key_is_noticed(tcp: Bench) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    impostor = threading.Thread(target=_pretend, args=(listener,))
    impostor.start()
    offer = LinkOffer(transport="tcp", address=f"127.0.0.1:{listener.getsockname()[1]}")
    with pytest.raises(TransferError, match="receiver is not authentic"):
        TcpLink.connect(offer, KEY, ticket=TICKET, region="r", stall_timeout_s=1, on_lost=tcp.lost.append)
    impostor.join()
    listener.close()


def _pretend(listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock, contextlib.suppress(OSError, ProtocolError):
        auth.Handshake(sock, b"y" * 32).challenge(transport="tcp", region="r")


def test_unknown_ticket_and_foreign_region_are_refused(bench: Bench) -> None:
    with pytest.raises(TransferError, match="unknown pairing"):
        bench.connect(ticket="bad")
    with pytest.raises(TransferError):
        bench.connect(region="another")
    bench.events.wait(lambda: bench.events.causes == ["peer", "auth"])


@pytest.mark.parametrize("garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00", b"\xff\xff" + b"a" * 70000])
def test_garbage_instead_of_a_handshake_is_cut(bench: Bench, garbage: bytes) -> None:
    sock = dial(bench)
    with sock, contextlib.suppress(OSError):  # the other end may hang up while we are talking
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
    bench.events.wait(lambda: bench.events.causes == ["auth"])
    assert bench.events.connections == []
    assert not any(bench.arena.buffer)


def test_a_handshake_is_bounded_in_time(tcp: Bench) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        started = time.monotonic()
        drip = threading.Timer(0.15, ours.send, [b"\x10"])  # progress, but not enough of it
        drip.start()
        with pytest.raises(TimeoutError):
            auth.Handshake(theirs, KEY, timeout_s=0.3).challenge(transport="tcp", region="r")
        assert 0.25 < time.monotonic() - started < 2
        drip.join()


def test_another_user_is_refused(shm_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(TransferError):
        shm_bench.connect()
    monkeypatch.undo()
    shm_bench.connect()


def test_the_mapping_of_a_writer_does_not_survive_a_fork(shm_bench: Bench) -> None:
    before = arena_mappings()
    shm_bench.connect()
    after = arena_mappings()
    assert len(after) == len(before) + 1
    assert sum("dc" in flags.split() for flags in after) == sum("dc" in flags.split() for flags in before) + 1


def test_a_stopped_write_ends_between_pieces(bench: Bench) -> None:
    link = bench.connect()
    lease = LeaseKey(5, 1)
    bench.inlet.open_lease(lease, bench.events.connections[0], [0, 1])
    with pytest.raises(LeaseRevoked):
        link.write(lease, bench.data, [Copy(0, bench.cell(0).start, 96)], lambda: True)
    link.confirm(lease).result(5)
    assert not any(bench.arena.buffer)


def test_end_of_a_writer_is_proven_and_end_of_the_inlet_is_not(bench: Bench) -> None:
    first, _ = bench.connect(), bench.connect()
    first.close()
    bench.events.wait(lambda: len(bench.events.ended) == 1)
    assert bench.events.ended == [(bench.events.connections[0], True)]
    bench.inlet.close()
    assert bench.events.ended[1] == (bench.events.connections[1], False)
    while not bench.lost:
        time.sleep(0.001)
    assert "closed by the receiver" in str(bench.lost[0])


def test_noise_on_the_liveness_socket_is_no_proof(shm_bench: Bench) -> None:
    link = shm_bench.connect()
    link._sock.sendall(b"still here")  # type: ignore[attr-defined]
    shm_bench.events.wait(lambda: "data" in shm_bench.events.causes)
    assert shm_bench.events.ended == []
    link.close()
    shm_bench.events.wait(lambda: shm_bench.events.ended == [(shm_bench.events.connections[0], True)])


def test_closing_a_link_waits_for_the_copy_that_is_running(shm_bench: Bench) -> None:
    """End of file is the proof that nothing is written any more, so it must not come before the last byte."""
    link = shm_bench.connect()
    inside, go_on = threading.Event(), threading.Event()

    def stopped() -> bool:
        inside.set()
        go_on.wait(5)
        return False

    copies = [Copy(0, shm_bench.cell(3).start, 96)]
    writer = threading.Thread(target=link.write, args=(LeaseKey(1, 1), shm_bench.data, copies, stopped))
    writer.start()
    inside.wait(5)
    closer = threading.Thread(target=link.close)
    closer.start()
    time.sleep(0.05)
    assert shm_bench.events.ended == []
    go_on.set()
    writer.join()
    closer.join()
    shm_bench.events.wait(lambda: len(shm_bench.events.ended) == 1)
    with pytest.raises(TransferError, match="closed"):
        write(shm_bench, link, LeaseKey(1, 1), shm_bench.cell(3))


# What only tcp can check, because the bytes pass through the receiver.


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


def test_cells_are_told_while_the_rest_of_their_frame_is_under_way(tcp: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are hashed from the cache of the thread that stored them; half a cell is none."""
    monkeypatch.setattr(tcp_inlet, "CACHED_BYTES", 2 * 96)
    link, lease, told = tcp.connect(), LeaseKey(5, 1), threading.Event()
    tcp.inlet.open_lease(lease, tcp.events.connections[0], [3, 4, 8])
    seen: list[Cells] = []
    tcp.inlet.watch(lease, lambda cells: (seen.extend(cells), told.set()))
    ranges = [(tcp.cell(block).start, 96) for block in (8, 3, 4)]
    head = struct.pack("<BxxxIQQQ", 1, 3, 5, 1, 3 * 96) + b"".join(struct.pack("<QQ", *each) for each in ranges)
    sock = link._sock  # type: ignore[attr-defined]
    sock.sendall(head + bytes(tcp.data[: 2 * 96 + 40]))
    assert told.wait(5)
    assert seen == [Cells(0, 8, 1), Cells(0, 3, 1)]
    assert tcp.inlet.landed(lease) == Landed(2, 2 * 96)
    sock.sendall(tcp.data[2 * 96 + 40 : 3 * 96])
    assert link.confirm(lease).result(5) == 3 * 96
    assert seen[2:] == [Cells(0, 4, 1)]


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
