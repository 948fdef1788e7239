"""Serves an exchange with an ASGI application: for parts whose comfort matters more than their speed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from router.exchange import JSON_TYPE, Exchange

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


async def serve_asgi(app: AsgiApp, exchange: Exchange) -> None:
    """One request without a body and its complete answer; streams are collected."""
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
        return {"type": "http.request", "body": b"", "more_body": False}

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
