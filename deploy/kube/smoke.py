"""`helm test`: the service answers a completion through its Service, as a client would see it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from llm_engine.api.errors import ServingError

_POLL_S = 1.0
_REQUEST_S = 60.0


class NotServing(ServingError):
    """What the service did instead."""


def smoke(
    url: str, model: str, *, api_key: str = "", timeout_s: float = 120.0, say: Callable[[str], None] = print
) -> None:
    """Wait until `url` is ready, then stream a short completion. Raises NotServing."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with opener.open(f"{url}/ready", timeout=5.0):
                break
        except OSError as exc:
            if time.monotonic() > deadline:
                raise NotServing(f"{url}/ready: not ready within {timeout_s:g} s: {exc}") from exc
        time.sleep(_POLL_S)
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0, "stream": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    started, first_s, chunks = time.monotonic(), 0.0, 0
    try:
        with opener.open(request, timeout=_REQUEST_S) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    if b'"error"' in line[:16]:
                        raise NotServing(f"{url}: {line.decode().strip()}")
                    first_s = first_s or time.monotonic() - started
                    chunks += 1
    except urllib.error.HTTPError as exc:
        raise NotServing(f"{url}/v1/completions: {exc.code} {exc.read(500).decode(errors='replace')}") from exc
    except OSError as exc:
        raise NotServing(f"{url}/v1/completions: {exc}") from exc
    if not chunks:
        raise NotServing(f"{url}/v1/completions: an empty answer")
    say(f"{model}: first token after {first_s * 1000:.0f} ms, {chunks} chunks in {time.monotonic() - started:.2f} s")
