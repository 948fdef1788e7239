"""HTTP/1.1 on the wire: what a connection makes of bytes, and in which order it answers."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.api.request import FinishReason
from router.connection import MAX_PIPELINED
from tests.unit.router.edge_harness import (
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

OK = ids_of(byte_tokenizer(), "ok")
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
CLOSING = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
BODY = json.dumps({"model": MODEL, "prompt": "hi"}).encode()


@pytest.fixture(scope="module")
def edge() -> Iterator[RunningEdge]:
    dispatcher = ScriptedDispatcher(lambda _: Script([OK, OK], finish=FinishReason.LENGTH))
    with running_edge(dispatcher, max_body_bytes=64 << 10, client_stall_s=1.0) as running:
        yield running


def post(body: bytes = BODY, version: str = "1.1", headers: str = "") -> bytes:
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def talk(edge: RunningEdge, *pieces: bytes) -> bytes:
    """Send the pieces and read until the router closes the connection."""
    with connect(edge) as sock:
        for piece in pieces:
            sock.sendall(piece)
        return read_all(sock)


def test_a_client_that_asks_first_is_told_to_continue(edge: RunningEdge) -> None:
    request = post(headers="Expect: 100-continue\r\nConnection: close\r\n")
    head, _, body = request.partition(b"\r\n\r\n")
    with connect(edge) as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")
    together = talk(edge, request)
    assert together.startswith(b"HTTP/1.1 200 OK\r\n"), "the body was there already"


def test_a_client_that_asks_first_for_too_much_is_refused_without_it(edge: RunningEdge) -> None:
    head = post(headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")[0]
    head = head.replace(b"Content-Length: %d" % len(BODY), b"Content-Length: 1000000")
    answer = talk(edge, head + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")


def test_bodies_in_chunks_are_put_together(edge: RunningEdge) -> None:
    head = post(headers="Connection: close\r\n").partition(b"Content-Length")[0]
    pieces = [BODY[:7], BODY[7:8], BODY[8:]]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    answer = talk(edge, head + b"Transfer-Encoding: chunked\r\n\r\n", chunks, b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"text":"okok"' in answer


def test_http_1_0_closes_by_default_and_stays_on_request(edge: RunningEdge) -> None:
    once = talk(edge, HEALTH.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert b"connection: close" in once
    kept = HEALTH.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: x", b"Connection: keep-alive")
    answers = talk(edge, kept, kept, CLOSING)
    assert answers.count(b"HTTP/1.1 200") == 3
    assert answers.count(b"connection: keep-alive") == 2


def test_http_1_0_gets_a_stream_without_chunks(edge: RunningEdge) -> None:
    body = json.dumps({"model": MODEL, "prompt": "hi", "stream": True}).encode()
    answer = talk(edge, post(body, "1.0", "Connection: keep-alive\r\n"))
    assert b"transfer-encoding" not in answer
    assert answer.endswith(b"data: [DONE]\n\n")


def test_an_answer_to_head_has_no_body(edge: RunningEdge) -> None:
    answers = talk(edge, HEALTH.replace(b"GET", b"HEAD"), CLOSING)
    head, _, rest = answers.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 405")
    assert b"content-length: 0" not in head
    assert rest.startswith(b"HTTP/1.1 200")


def test_other_protocols_are_declined(edge: RunningEdge) -> None:
    answer = talk(edge, post(headers="Connection: Upgrade\r\nUpgrade: h2c\r\n"))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer
    assert talk(edge, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "garbage",
    [b"\x16\x03\x01\x02\x00\x01", b"GET / FTP/1.1\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 100,
     b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_request_is_answered_once_and_ends_the_connection(edge: RunningEdge, garbage: bytes) -> None:
    answer = talk(edge, garbage)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    behind = talk(edge, post() + HEALTH + garbage)
    assert behind.count(b"HTTP/1.1 200") == 2, "the requests in front of it are served"


def test_too_many_pipelined_requests_are_not_queued(edge: RunningEdge) -> None:
    num_answers = 0
    with connect(edge) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(HEALTH * (4 * MAX_PIPELINED))
        while data := sock.recv(1 << 16):
            num_answers += data.count(b"HTTP/1.1 200")
    assert num_answers <= MAX_PIPELINED + 1


def test_a_client_that_pipelines_without_reading_is_let_go(edge: RunningEdge) -> None:
    known = set(edge.server.connections)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", edge.port))
        sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * MAX_PIPELINED)
        wait_until(lambda: set(edge.server.connections) - known)
        connection = (set(edge.server.connections) - known).pop()
        wait_until(lambda: connection._stalled is not None)
        assert len(connection._queue) > 0, "it was served although it does not read"
        wait_until(lambda: connection not in edge.server.connections)
    wait_until(lambda: connection._task is not None and connection._task.done())


@pytest.mark.parametrize("target", ["http://elsewhere/health", "/health?x=1", "/%68ealth"])
def test_targets(edge: RunningEdge, target: str) -> None:
    assert talk(edge, CLOSING.replace(b"/health", target.encode())).startswith(b"HTTP/1.1 200")


REQUESTS = {
    HEALTH: b'"status":"ok"',
    post(): b'"text":"okok"',
    b"GET /nowhere HTTP/1.1\r\n\r\n": b"there is no /nowhere",
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(list(REQUESTS)), max_size=6), st.lists(st.integers(0, 900), max_size=6))
def test_however_the_bytes_are_cut_the_answers_are_the_same(
    edge: RunningEdge, requests: list[bytes], cuts: list[int]
) -> None:
    data = b"".join([*requests, CLOSING])
    ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    answers = talk(edge, *[data[start:end] for start, end in pairwise(ends)])
    position = 0
    for request in [*requests, HEALTH]:
        position = answers.index(REQUESTS[request], position) + 1
    assert answers.count(b"HTTP/1.1 ") == len(requests) + 1
