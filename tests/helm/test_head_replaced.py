"""Another head pod while clients stream: with Ray's tables in Redis the workers stay, and no stream notices."""

from __future__ import annotations

import json
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.helm.charts import tool
from tests.helm.pods import URL, Pods, open_pods, serving, start_head

REDIS_PORT = "6399"
FAULT_TOLERANT = {
    "RAY_REDIS_ADDRESS": f"127.0.0.1:{REDIS_PORT}",
    "RAY_external_storage_namespace": "baton",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # as the operator sets it
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]


def stream(http: httpx.Client) -> str:
    body = {"model": "nano", "prompt": "The quick brown fox", "max_tokens": 150, "seed": 7, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.status_code == 200
    assert lines[-1] == "data: [DONE]", lines[-1]
    assert not any('"error"' in line for line in lines)
    return "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1])


def client(pods: Pods, enough: threading.Event) -> list[str]:
    texts = []
    with pods.host.network(), httpx.Client(base_url=URL, trust_env=False, timeout=60.0) as http:
        while not enough.is_set():
            texts.append(stream(http))
    return texts


def test_workers_and_streams_outlive_the_head(tmp_path: Path, nano_dir: Path) -> None:
    redis = tool("redis-server")
    with open_pods(tmp_path, nano_dir) as pods, tempfile.TemporaryDirectory(prefix="head-", dir="/tmp") as own_files:
        pods.start("redis", redis, "--bind", "127.0.0.1", "--port", REDIS_PORT, "--save", "")
        with serving(pods, **FAULT_TOLERANT) as (api, head), ThreadPoolExecutor(2) as clients:
            before = pods.until(lambda now: now.ready)
            enough = threading.Event()
            running = [clients.submit(client, pods, enough) for _ in range(2)]
            try:
                pods.kill(head)
                pods.mount(memory_mb=17)  # the upgrade that brought the new head changes a setting of workers, too
                start_head(pods, api, **FAULT_TOLERANT, RAY_TMPDIR=own_files)
                pids = {worker.pid for worker in before.workers}
                pods.until(lambda now: {worker.pid for worker in now.workers} >= pids)  # taken over, not started anew
                after = pods.until(lambda now: now.ready and {worker.revision for worker in now.workers} == {1})
            finally:
                enough.set()
            texts = [text for one in running for text in one.result(timeout=60)]
            assert len(texts) > 2
            assert len(set(texts)) == 1
            assert {worker.pid for worker in after.workers}.isdisjoint(pids)
            scaled = pods.run("baton", "scale", "decode", "2")
            assert (scaled.returncode, scaled.stdout) == (0, "decode: 2 ready\n"), scaled.stderr + pods.logs()
