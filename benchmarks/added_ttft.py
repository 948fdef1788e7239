"""The router's own share of the time to first token: what a client waits, less what the worker says it took.

Each client streams on a kept-alive connection and rests between two streams, REST_S on average, as long as a short
answer would take to decode: without a rest the queue in front of the router would be measured. The share holds
everything but the worker: the client's HTTP, the router, both hops of the request plane, and on a busy machine the wait
for a core.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import re
import time
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import uvloop

from router.report import MAX_TIMELINES

_REQUEST_ID = re.compile(rb"x-request-id: ([\w-]+)")
WARM_UP = 50  # requests
REST_S = 0.01
TIMEOUT_S = 60.0


class _Client(asyncio.Protocol):
    """One connection: `count` streams, one after the other. `seen`: request id and TTFT in seconds."""

    def __init__(self, request: bytes, count: int, seen: list[tuple[str, float]]) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request, self._left, self._seen = request, count, seen
        self._answer, self._waits, self._begun = b"", False, 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        """Too early unless all streams are done."""
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the router closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Note the first event; go on at the end of the answer."""
        now = time.perf_counter()
        self._answer += data
        if self._waits and b"\r\ndata: " in self._answer:
            self._waits = False
            found = _REQUEST_ID.search(self._answer)
            if found is not None:
                self._seen.append((found[1].decode(), now - self._begun))
        if self._answer.endswith(b"0\r\n\r\n"):
            asyncio.get_running_loop().call_later(random.expovariate(1 / REST_S), self._next)

    def _next(self) -> None:
        if self._left == 0:
            self.done.set_result(None)
            self._transport.close()
            return
        self._left -= 1
        self._answer, self._waits = b"", True
        self._begun = time.perf_counter()
        self._transport.write(self._request)


def added_ttft(url: str, model: str, *, connections: int) -> dict[str, Any]:
    """Percentiles in ms of the TTFT at the client, and of what is left of it without the worker."""
    uvloop.run(_stream(url, model, connections, WARM_UP))
    seen = uvloop.run(_stream(url, model, connections, MAX_TIMELINES))
    with httpx.Client(base_url=url, trust_env=False) as client:
        added = [ttft - _worker_s(client.get(f"/admin/requests/{name}-0").json()) for name, ttft in seen]
    return {"ttft": _percentiles([ttft for _, ttft in seen]), "added": _percentiles(added)}


async def _stream(url: str, model: str, connections: int, total: int) -> list[tuple[str, float]]:
    parts = urlsplit(url)
    body = json.dumps({"model": model, "prompt": "hello", "max_tokens": 2, "seed": 1, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    seen: list[tuple[str, float]] = []
    loop = asyncio.get_running_loop()
    clients = [_Client(request, total // connections, seen) for _ in range(connections)]
    for client in clients:
        await loop.create_connection(functools.partial(_same, client), parts.hostname or "", parts.port or 80)
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*(client.done for client in clients))
    return seen


def _same(client: _Client) -> _Client:
    return client


def _worker_s(timeline: dict[str, Any]) -> float:
    """What the prefill worker measured from receipt to first token; 0 where the decode worker's tokens came first."""
    times = timeline["attempts"][-1]["times"] or {}
    return float(times.get("queue_s", 0.0) + times.get("compute_s", 0.0))


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{q}_ms": round(ordered[len(ordered) * q // 100] * 1e3, 3) for q in (50, 99)}
