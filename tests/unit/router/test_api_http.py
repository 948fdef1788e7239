"""The routes of the HTTP edge, and the bodies that it does not take."""

from __future__ import annotations

import json
import select
from collections.abc import Iterator

import httpx
import pytest

from llm_engine.api.request import FinishReason
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

OK = Script([ids_of(byte_tokenizer(), "ok")], finish=FinishReason.LENGTH)


@pytest.fixture(scope="module")
def edge() -> Iterator[RunningEdge]:
    with running_edge(ScriptedDispatcher(lambda _: OK), max_body_bytes=64 << 10, client_stall_s=0.5) as running:
        yield running


def test_models(edge: RunningEdge) -> None:
    listed = edge.http.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == [MODEL]
    assert edge.http.get(f"/v1/models/{MODEL}").json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 4096
    assert edge.http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert edge.http.get("/v1/models/a/b").status_code == 404


def test_health_and_readiness(edge: RunningEdge) -> None:
    assert edge.http.get("/health").json() == {"status": "ok"}
    assert edge.http.get("/ready").json() == {"ready": True, "detail": {"workers": []}}
    edge.dispatcher.is_ready = False
    try:
        response = edge.http.get("/ready")
        assert (response.status_code, response.json()["ready"]) == (503, False)
        assert edge.http.get("/health").status_code == 200
    finally:
        edge.dispatcher.is_ready = True


def test_metrics_are_passed_through_and_exchanges_reported(edge: RunningEdge) -> None:
    response = edge.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "up 1" in response.text
    edge.metrics.responses.clear()
    edge.http.get("/v1/models/other")
    edge.http.get("/nowhere")
    edge.http.post(COMPLETIONS, json={"model": MODEL, "prompt": "x"})
    edge.http.post(COMPLETIONS, json={"model": MODEL, "prompt": "x", "stream": True})
    wait_until(lambda: len(edge.metrics.responses) == 4)
    assert edge.metrics.responses == [
        ("/v1/models/{model}", 404),
        ("unmatched", 404),
        (COMPLETIONS, 200),
        (COMPLETIONS, 200),
    ]


def test_tokenize_and_detokenize(edge: RunningEdge) -> None:
    answer = edge.http.post("/tokenize", json={"prompt": "é<think>", "model": MODEL}).json()
    assert answer == {"tokens": ids_of(byte_tokenizer(), "é<think>"), "count": 3, "max_model_len": 4096}
    assert edge.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "é<think>"}
    assert edge.http.post("/detokenize", json={"tokens": [320]}).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nowhere", 404, None),
        ("GET", COMPLETIONS, 405, "POST"),
        ("PUT", CHAT, 405, "POST"),
        ("POST", "/health", 405, "GET"),
        ("DELETE", "/v1/models/x", 405, "GET"),
        ("OPTIONS", COMPLETIONS, 405, "POST"),
    ],
)
def test_unknown_paths_and_methods(edge: RunningEdge, method: str, path: str, status: int, allow: str | None) -> None:
    response = edge.http.request(method, path)
    assert response.status_code == status
    assert response.headers.get("allow") == allow
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"model": "nano", "prompt": "\xff"}', "not UTF-8"),
        (b'{"model": "nano", "prompt": "\xf0\x9f\x99"}', "not UTF-8"),
        (b'{"model": "nano", "prompt": "\\ud800"}', "not JSON"),
        (b'{"model": "nano", "prompt": "x", "temperature": NaN}', "not JSON"),
        (b'{"model": "nano", "prompt": "x"} trailing', "not JSON"),
        (b'{"model": "nano", "metadata": ' + b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"}", "nested"),
        (b"[]", "array"),
        (b"null", "null"),
    ],
)
def test_broken_bodies(edge: RunningEdge, content: bytes, message: str) -> None:
    response = edge.http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_the_media_type_must_be_json(edge: RunningEdge) -> None:
    content = json.dumps({"model": MODEL, "prompt": "x"})
    for media_type in ("text/plain", "application/x-www-form-urlencoded"):
        assert edge.http.post(COMPLETIONS, content=content, headers={"Content-Type": media_type}).status_code == 415
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert edge.http.post(COMPLETIONS, content=content, headers=headers).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [72 << 10, 1 << 20])
def test_a_huge_body_is_refused(edge: RunningEdge, size: int, chunked: bool) -> None:
    content = iter([b"x" * 8192] * (size // 8192)) if chunked else b"x" * size
    with httpx.Client(base_url=edge.url) as client:
        try:
            response = client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
        except httpx.WriteError:  # the server may stop reading before everything is sent
            assert size > 100 << 10
            return
    assert (response.status_code, response.headers["connection"]) == (413, "close")
    assert "65536" in response.json()["error"]["message"]


def test_a_client_in_the_middle_of_a_huge_body_gets_to_see_the_answer() -> None:
    with running_edge(ScriptedDispatcher(lambda _: OK), max_body_bytes=64 << 10) as edge, connect(edge) as sock:
        size = (64 << 10) + 1000  # so much more than what is here first is read and dropped, however it arrives
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
        sock.sendall(head.encode() + b"x" * 1000)
        assert select.select([sock], [], [], 0.2)[0] == [], "answered, and closed, before the client had a chance"
        sock.sendall(b"x" * (size - 1000))
        assert read_all(sock).startswith(b"HTTP/1.1 413")


def test_a_body_at_the_limit_is_read_in_pieces(edge: RunningEdge) -> None:
    frame = json.dumps({"model": MODEL, "prompt": "x", "user": ""})
    content = frame.replace('"user": "', '"user": "' + "u" * ((64 << 10) - len(frame))).encode()
    assert len(content) == 64 << 10
    headers = {"Content-Type": "application/json"}
    assert edge.http.post(COMPLETIONS, content=content, headers=headers).status_code == 200
    pieces = iter([content[:10], content[10:40000], content[40000:]])
    assert edge.http.post(COMPLETIONS, content=pieces, headers=headers).status_code == 200
    assert edge.http.post(COMPLETIONS, content=content + b" ", headers=headers).status_code == 413


def test_a_body_that_stops_coming_ends_in_an_error(edge: RunningEdge) -> None:
    with connect(edge) as sock:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 40\r\n\r\n"
        sock.sendall(head.encode() + b'{"model": "nano", "prompt": "x"')
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"no more of the body arrived" in answer
