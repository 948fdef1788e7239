"""The cluster's secret is replaced, process by process, while clients stream."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from deploy.processes import ProcessCluster
from llm_engine.api.config import SECRET_ALSO_ENV, SECRET_ENV

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

NEW = "the-new-secret-0123456789"
WORKERS = ("prefill-0", "decode-0", "prefill-1", "decode-1")


def stream(http: httpx.Client) -> str:
    body = {"model": "nano", "prompt": "The quick brown fox", "max_tokens": 300, "seed": 7, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.status_code == 200
    assert lines[-1] == "data: [DONE]", lines[-1]
    assert not any('"error"' in line for line in lines)
    return "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1])


def test_no_stream_breaks_while_the_secret_is_replaced(nano_planted_dir: Path, tmp_path: Path) -> None:
    settings = {
        "model.path": str(nano_planted_dir),
        "model.name": "nano",
        "kv.memory_mb": 32,
        "worker.drain_timeout_s": 10.0,
        "router.drain_timeout_s": 60.0,
    }
    with ProcessCluster(tmp_path, settings, prefill=2, decode=2) as cluster:
        old = cluster.env[SECRET_ENV]
        enough = threading.Event()

        def client() -> list[str]:
            texts = []
            while not enough.is_set():
                with httpx.Client(base_url=cluster.url, trust_env=False, timeout=90.0) as http:
                    texts.append(stream(http))
            return texts

        with httpx.Client(base_url=cluster.url, trust_env=False, timeout=60.0) as http:
            expected = stream(http)
        with ThreadPoolExecutor(3) as pool:
            for own, also in ((old, NEW), (NEW, old), (NEW, "")):
                enough.clear()
                clients = [pool.submit(client) for _ in range(3)]
                cluster.env = {**cluster.env, SECRET_ENV: own, SECRET_ALSO_ENV: also}
                for name in WORKERS:
                    cluster.restart(name)
                enough.set()
                texts = [text for done in clients for text in done.result(timeout=120)]
                assert len(texts) >= 3
                assert set(texts) == {expected}
                cluster.restart_router()
        with httpx.Client(base_url=cluster.url, trust_env=False, timeout=60.0) as http:
            assert stream(http) == expected
