"""Arrival times of one stream's chunks, read from a bare socket: shows Nagle delays that a busy client would hide."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any
from urllib.parse import urlsplit


def stream_gaps(url: str, model: str, *, tokens: int, repeats: int) -> dict[str, Any]:
    """Stream `repeats` completions one after the other on one connection: TTFT and gaps between chunks, in ms."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=60)
    body = json.dumps(
        {"model": model, "prompt": "hello", "max_tokens": tokens, "ignore_eos": True, "seed": 1, "stream": True}
    )
    ttft: list[float] = []
    gaps: list[float] = []
    for _ in range(repeats):
        last = time.perf_counter()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        first = True
        for line in response:
            if not line.startswith(b"data: "):
                continue
            now = time.perf_counter()
            (ttft if first else gaps).append((now - last) * 1e3)
            first, last = False, now
    connection.close()
    gaps.sort()
    return {
        "ttft_ms": [round(value, 3) for value in ttft],
        "gap_p50_ms": round(gaps[len(gaps) // 2], 3),
        "gap_max_ms": round(gaps[-1], 3),
    }
