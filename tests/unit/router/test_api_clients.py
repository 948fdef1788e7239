"""Clients on the wire: those that leave, stop reading, come in numbers, pipeline or say nothing."""

from __future__ import annotations

import contextlib
import gc
import json
import socket
import struct
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from llm_engine.api.request import FinishReason
from router import connection as connection_module
from router import server as server_module
from router.dispatch_api import GenerationRequest
from tests.unit.router.edge_harness import (
    CHAT,
    COMPLETIONS,
    MODEL,
    RunningEdge,
    Script,
    ScriptedDispatcher,
    byte_tokenizer,
    connect,
    ids_of,
    read_all,
    running_edge,
    wait_until,
)

TOKENIZER = byte_tokenizer()
ENDLESS = 1 << 20


def scripted(request: GenerationRequest) -> Script:
    """The salt says how to answer, or the prompt if the salt says so."""
    match TOKENIZER.decode(request.prompt_tokens) if request.salt == "prompt" else request.salt:
        case "hang":
            return Script([], hang=True)
        case "one-then-hang":
            return Script([ids_of(TOKENIZER, "a")], hang=True)
        case "flood":
            return Script([ids_of(TOKENIZER, "x" * 4096)] * ENDLESS)
        case "endless":
            return Script([ids_of(TOKENIZER, "ab")] * ENDLESS, pace_s=0.001)
        case "slow":
            return Script([ids_of(TOKENIZER, "a")] * 30, pace_s=0.005, finish=FinishReason.LENGTH)
    return Script([ids_of(TOKENIZER, "ok")], finish=FinishReason.LENGTH)


@pytest.fixture(scope="module")
def edge() -> Iterator[RunningEdge]:
    with running_edge(ScriptedDispatcher(scripted), client_stall_s=0.5, max_inflight=8, max_queued=0) as running:
        yield running


def request_bytes(salt: str = "", *, stream: bool = False, path: str = COMPLETIONS, **fields: Any) -> bytes:
    body = json.dumps({"model": MODEL, "prompt": "hi", "stream": stream, "cache_salt": salt} | fields).encode()
    if path == CHAT:
        messages = [{"role": "user", "content": "hi"}]
        body = json.dumps({"model": MODEL, "messages": messages, "stream": stream, "cache_salt": salt}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("salt", "stream"), [("hang", False), ("hang", True), ("one-then-hang", True)])
def test_a_client_that_leaves_aborts_its_request(edge: RunningEdge, path: str, salt: str, stream: bool) -> None:
    edge.dispatcher.closed.clear()
    edge.metrics.responses.clear()
    num_before = len(edge.dispatcher.requests)
    with connect(edge) as sock:
        sock.sendall(request_bytes(salt, stream=stream, path=path))
        wait_until(lambda: len(edge.dispatcher.requests) > num_before)
        if salt == "one-then-hang":
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert edge.dispatcher.closed.wait(5)
    assert edge.dispatcher.closed_early[-1] == edge.dispatcher.requests[-1].request_id
    wait_until(lambda: edge.metrics.responses == [(path, 499)])


def test_a_client_that_leaves_aborts_all_choices(edge: RunningEdge) -> None:
    num_before = len(edge.dispatcher.requests)
    with connect(edge) as sock:
        sock.sendall(request_bytes("one-then-hang", stream=True, n=4))
        wait_until(lambda: len(edge.dispatcher.requests) == num_before + 4)
    ids = {request.request_id for request in edge.dispatcher.requests[num_before:]}
    wait_until(lambda: ids <= set(edge.dispatcher.closed_early))


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_reached_its_stop_string_is_aborted_while_others_go_on(edge: RunningEdge, stream: bool) -> None:
    num_before = len(edge.dispatcher.requests)
    with connect(edge) as sock:
        sock.sendall(request_bytes("prompt", stream=stream, prompt=["endless", "hang"], stop="bab"))
        wait_until(lambda: len(edge.dispatcher.requests) == num_before + 2)
        stopped, running = (request.request_id for request in edge.dispatcher.requests[num_before:])
        wait_until(lambda: stopped in edge.dispatcher.closed_early)
        assert running not in edge.dispatcher.closed_early
    wait_until(lambda: running in edge.dispatcher.closed_early)


def test_a_client_that_resets_the_connection_aborts_its_request(edge: RunningEdge) -> None:
    edge.dispatcher.closed.clear()
    sock = connect(edge)
    sock.sendall(request_bytes("one-then-hang", stream=True))
    sock.recv(1 << 16)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    assert edge.dispatcher.closed.wait(5)


def test_a_client_that_stops_reading_is_disconnected(edge: RunningEdge) -> None:
    edge.dispatcher.closed.clear()
    edge.metrics.responses.clear()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", edge.port))
    with sock:
        started = time.monotonic()
        sock.sendall(request_bytes("flood", stream=True))
        assert edge.dispatcher.closed.wait(10)
        assert 0.4 < time.monotonic() - started < 8
        wait_until(lambda: edge.metrics.responses == [(COMPLETIONS, 499)])
        with contextlib.suppress(ConnectionResetError):
            read_all(sock)  # ends: the connection is gone


def test_a_client_that_reads_slowly_but_reads_is_served(edge: RunningEdge) -> None:
    edge.dispatcher.closed.clear()
    with connect(edge) as sock:
        sock.sendall(request_bytes("flood", stream=True))
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            assert sock.recv(1 << 20)
            time.sleep(0.02)
        assert not edge.dispatcher.closed.is_set()
    assert edge.dispatcher.closed.wait(5)


def test_more_open_requests_than_configured_are_refused(edge: RunningEdge) -> None:
    num_before = len(edge.dispatcher.requests)
    sockets = [connect(edge) for _ in range(8)]
    try:
        for sock in sockets:
            sock.sendall(request_bytes("hang"))
        wait_until(lambda: len(edge.dispatcher.requests) == num_before + 8)
        response = edge.http.post(COMPLETIONS, json={"model": MODEL, "prompt": "x"})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert edge.http.get("/health").status_code == 200
    finally:
        for sock in sockets:
            sock.close()
    wait_until(lambda: edge.http.post(COMPLETIONS, json={"model": MODEL, "prompt": "x"}).status_code == 200)


def test_events_arrive_as_they_are_made(edge: RunningEdge) -> None:
    """Without the 40 ms gap that Nagle's algorithm and delayed acknowledgements cause on kept-alive connections."""
    body = {"model": MODEL, "prompt": "x", "stream": True, "cache_salt": "slow"}
    longest_gaps = []
    for _ in range(5):
        with edge.http.stream("POST", COMPLETIONS, json=body) as response:
            times = [time.monotonic() for _ in response.iter_raw()]
        assert len(times) >= 20, "the events came in lumps"
        longest_gaps.append(max(b - a for a, b in pairwise(times)))
    assert min(longest_gaps) < 0.03


def test_connections_have_their_socket_options(edge: RunningEdge) -> None:
    edge.http.get("/health")
    transports = [connection.transport for connection in edge.server.connections]
    assert transports
    for transport in transports:
        connection = transport.get_extra_info("socket")
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == server_module.DEAD_PEER_MS


def test_connections_are_bounded(edge: RunningEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 0)
    with connect(edge) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_all(sock) == b""


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_finished_requests_leave_nothing_to_the_garbage_collector(edge: RunningEdge, path: str, stream: bool) -> None:
    """Reference cycles would keep prompts alive until a collection, and make collections long."""
    request = request_bytes(stream=stream, path=path).replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n")

    def serve_one() -> None:
        with connect(edge) as sock:
            sock.sendall(request)
            assert read_all(sock).startswith(b"HTTP/1.1 200")
        wait_until(lambda: len(edge.server.connections) <= num_before)

    num_before = len(edge.server.connections)
    serve_one()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        serve_one()
        gc.collect()
        garbage = [item for item in gc.garbage if type(item).__module__.startswith(("router", "llm_engine"))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert garbage == []


def test_pipelined_and_kept_alive_requests_are_answered_in_order(edge: RunningEdge) -> None:
    with connect(edge) as sock:
        last = request_bytes().replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n")
        sock.sendall(request_bytes() + request_bytes(stream=True) + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + last)
        answers = read_all(sock)
    assert answers.count(b"HTTP/1.1 200 OK") == 4
    assert answers.index(b"text_completion") < answers.index(b"text/event-stream") < answers.index(b'"status":"ok"')


def test_oversized_headers_are_refused(edge: RunningEdge) -> None:
    with connect(edge) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
        try:
            for _ in range(40):
                sock.sendall(b"a" * 4096)
            answer = read_all(sock)
        except ConnectionError:
            return
    assert answer.startswith(b"HTTP/1.1 400")


def test_a_request_head_that_stops_coming_is_cut_off(edge: RunningEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HEAD_TIMEOUT_S", 0.2)
    for start in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /he"):
        with connect(edge) as sock:
            sock.sendall(start)
            assert read_all(sock).count(b"HTTP/1.1 200") == start.count(b"\r\n\r\n")


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_stream_survives_the_head_timeout(edge: RunningEdge, monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    monkeypatch.setattr(connection_module, "HEAD_TIMEOUT_S", 0.05)
    data = request_bytes("slow", stream=True).replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n")
    with connect(edge) as sock:
        half = data.index(b"\r\n\r\n") + 4 if pieces == 2 else len(data)
        sock.sendall(data[:half])
        sock.sendall(data[half:])
        assert read_all(sock).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
