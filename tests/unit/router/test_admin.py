from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_engine.api.config import Resolved, build
from router.admin import build_admin
from router.asgi import AsgiApp
from router.control import ControllerPort


class FakeDispatcher:
    """What the admin API asks for."""

    def __init__(self) -> None:
        self.drained: list[tuple[str, bool]] = []

    def status(self) -> dict[str, Any]:
        return {"ready": True}

    def drain(self, worker: str, *, hand_back: bool = False) -> bool:
        self.drained.append((worker, hand_back))
        return worker != "nobody"


async def call(
    app: AsgiApp,
    path: str,
    method: str = "GET",
    *,
    client: tuple[str, int] | None = ("127.0.0.1", 5),
    headers: list[tuple[bytes, bytes]] | None = None,
    query: bytes = b"",
) -> int:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "method": method, "path": path, "query_string": query, "client": client}
    await app({**scope, "headers": headers or []}, receive, send)
    status: int = sent[0]["status"]
    return status


def make(key: str = "") -> tuple[AsgiApp, FakeDispatcher]:
    dispatcher = FakeDispatcher()
    resolved = Resolved(build({"model": {"path": str(Path("/m"))}}), {})
    keys = (key,) if key else ()
    return build_admin(dispatcher, resolved, lambda: keys, ControllerPort("", b"k" * 32)), dispatcher  # type: ignore[arg-type]


@pytest.mark.parametrize("client", [("10.0.0.1", 5), ("::ffff:10.0.0.1", 5), None])
async def test_without_a_key_only_loopback_is_served(client: tuple[str, int] | None) -> None:
    app, dispatcher = make()
    assert await call(app, "/admin/status", client=client) == 403
    assert await call(app, "/admin/drain/w", "POST", client=client) == 403
    assert dispatcher.drained == []
    assert await call(app, "/admin/status", client=("127.0.0.1", 5)) == 200
    assert await call(app, "/admin/status", client=("::1", 5)) == 200


async def test_with_a_key_everybody_needs_it() -> None:
    app, dispatcher = make("secret key")
    wrong: list[list[tuple[bytes, bytes]]] = [
        [],
        [(b"authorization", b"Bearer wrong")],
        [(b"authorization", b"secret key")],
    ]
    for headers in wrong:
        assert await call(app, "/admin/drain/w", "POST", headers=headers) == 403
    assert dispatcher.drained == []
    right = [(b"authorization", b"Bearer secret key")]
    assert await call(app, "/admin/drain/w", "POST", headers=right, client=("10.0.0.1", 5)) == 200


async def test_drain_names_the_worker_and_how() -> None:
    app, dispatcher = make()
    assert await call(app, "/admin/drain/decode/1", "POST") == 200
    assert await call(app, "/admin/drain/d", "POST", query=b"hand_back=true") == 200
    assert await call(app, "/admin/drain/nobody", "POST") == 404
    assert dispatcher.drained == [("decode/1", False), ("d", True), ("nobody", False)]


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/admin/", "GET", 404),
        ("/admin/status/x", "GET", 404),
        ("/admin/drain", "POST", 404),
        ("/admin/status", "POST", 405),
        ("/admin/drain/w", "GET", 405),
    ],
)
async def test_other_paths_and_methods(path: str, method: str, status: int) -> None:
    assert await call(make()[0], path, method) == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"host", b"127.0.0.1:8000"), (b"origin", b"http://127.0.0.1:8000")], 200),
        ([(b"host", b"localhost:8000")], 200),
        ([(b"host", b"[::1]:8000")], 200),
        ([(b"host", b"127.0.0.1:8000"), (b"origin", b"https://evil.example")], 403),
        ([(b"host", b"127.0.0.1:8000"), (b"origin", b"http://127.0.0.1:9999")], 403),
        ([(b"host", b"127.0.0.1:8000"), (b"origin", b"null")], 403),
        ([(b"host", b"rebound.example:8000")], 403),
    ],
)
async def test_a_strangers_page_in_a_local_browser_is_refused(headers: list[tuple[bytes, bytes]], status: int) -> None:
    app, dispatcher = make()
    assert await call(app, "/admin/drain/w", "POST", headers=headers) == status
    assert len(dispatcher.drained) == (status == 200)


async def test_pools_without_a_controller_are_a_clear_answer() -> None:
    assert await call(make()[0], "/admin/pools") == 409
    assert await call(make()[0], "/admin/pools/decode", "PUT") == 400
