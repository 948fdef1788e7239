"""Serves an exchange with an ASGI application: for parts whose comfort matters more than their speed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from router.exchange import JSON_TYPE, Exchange

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]

MAX_BODY_BYTES = 64 << 10


async def serve_asgi(app: AsgiApp, exchange: Exchange) -> None:
    """One request, with a small JSON body if it has any, and its complete answer; streams are collected."""
    content = await exchange.json_body(MAX_BODY_BYTES) if _has_body(exchange) else b""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": exchange.method,
        "path": exchange.path,
        "raw_path": exchange.path.encode(),
        "root_path": "",
        "query_string": exchange.query,
        "headers": list(exchange.headers),
        "client": exchange.client(),
        "server": None,
    }
    start: dict[str, Any] = {}
    body: list[bytes] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            body.append(message.get("body", b""))

    await app(scope, receive, send)
    headers = dict(start["headers"])
    media_type = headers.pop(b"content-type", JSON_TYPE)
    headers.pop(b"content-length", None)
    exchange.respond(start["status"], b"".join(body), media_type, headers.items())


def _has_body(exchange: Exchange) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in exchange.headers
    )
