"""The two ends of a data link on their own: authentication, bounds, and what a revocation proves."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kv_transfer import auth, shm
from kv_transfer.link import Copy, LeaseKey
from kv_transfer.tcp import TcpLink
from llm_engine.api.errors import LeaseRevoked, ProtocolError, TransferError
from llm_engine.api.handoff import LinkOffer
from tests.unit.kv_transfer.link_bench import LAYOUT, TICKET, Bench, write
from tests.unit.kv_transfer.rig import KEY, MOONCAKE, arena_mappings, block_bytes


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
