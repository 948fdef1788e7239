"""Clients that keep a cluster busy with streams whose text is known."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.e2e.site import Site

URL = "http://127.0.0.1:8000"
STREAMS = 4


class Traffic:
    """Clients that stream the same completion again and again, each in the cluster's network."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._enough = threading.Event()
        self._pool = ThreadPoolExecutor(STREAMS)
        with site.host.network(), httpx.Client(trust_env=False, timeout=60.0) as http:
            self.expected = stream(http)

    def __enter__(self) -> Traffic:
        self._running = [self._pool.submit(self._client) for _ in range(STREAMS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._pool.shutdown()

    def texts(self) -> list[str]:
        """Stop; every text that was streamed. Raises what any client met."""
        self._enough.set()
        return [text for client in self._running for text in client.result(timeout=120)]

    def _client(self) -> list[str]:
        texts = []
        with self._site.host.network(), httpx.Client(trust_env=False, timeout=60.0) as http:
            while not self._enough.is_set():
                texts.append(stream(http))
        return texts


def stream(http: httpx.Client) -> str:
    """The text of one streamed completion, which must be complete."""
    body = {"model": "nano", "prompt": "The quick brown fox", "max_tokens": 200, "seed": 7, "ignore_eos": True}
    pieces: list[str] = []
    with http.stream("POST", f"{URL}/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        assert '"error"' not in line, line
        pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
    return "".join(pieces)
