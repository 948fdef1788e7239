"""`python -m router` as a process: start, signals, exit codes, several processes behind one port."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from llm_engine.api.config import SECRET_ENV
from llm_engine.api.messages import Cancel
from router.admin import ADMIN_KEY_ENV
from tests.unit.router.router_cluster import KEY, fakes

START_S = 30.0
BODY = {"model": "fake", "prompt": "hello", "max_tokens": 8, "seed": 1}


class RouterProcess:
    """A router on a free port, its standard error in a file."""

    def __init__(self, directory: Path, model_dir: Path, workers: list[str], **settings: Any) -> None:
        self.log = directory / "router.log"
        config = directory / "router.toml"
        values = {"workers": workers, "port": 0, **settings}
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        config.write_text(f'[model]\npath = "{model_dir}"\nname = "fake"\n[router]\n' + "\n".join(lines) + "\n")
        self._sink = self.log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "router", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=self._sink,
            env={**os.environ, SECRET_ENV: KEY.decode(), ADMIN_KEY_ENV: "", "TMPDIR": str(directory)},
        )
        assert self.process.stdout is not None
        watchdog = threading.Timer(START_S, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        assert line.startswith(b"READY "), self.log.read_text()
        self.ready = json.loads(line.removeprefix(b"READY "))
        self.client = httpx.Client(base_url=self.ready["url"], timeout=10.0)
        wait(lambda: self.client.get("/ready").status_code == 200)

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 10.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5.0)
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._sink.close()


def wait(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.01)


@contextlib.contextmanager
def router(directory: Path, model_dir: Path, workers: list[Any], **settings: Any) -> Iterator[RouterProcess]:
    process = RouterProcess(directory, model_dir, [worker.info.request_addr for worker in workers], **settings)
    try:
        yield process
    finally:
        process.close()


def test_it_serves_and_stops(tmp_path: Path, nano_dir: Path) -> None:
    with (
        fakes("prefill", "decode", model="fake") as workers,
        router(tmp_path, nano_dir, workers) as process,
    ):
        answer = process.client.post("/v1/completions", json=BODY).json()
        assert answer["usage"]["completion_tokens"] == 8
        status = process.client.get("/admin/status").json()
        assert status["pools"]["prefill"]["usable"] == 1
        recent = status["recent"][0]["request_id"]
        assert process.client.get(f"/admin/requests/{recent}").json()["finish"] == "length"
        assert process.client.get("/admin/requests/none").status_code == 404
        assert process.client.get("/admin/config").json()["config"]["model"]["name"] == "fake"
        assert KEY.decode() not in process.client.get("/admin/config").text
        assert process.client.get("/admin/drain/decode-1").status_code == 405
        assert process.client.post("/admin/drain/nobody").status_code == 404
        assert process.client.post("/admin/drain/decode-1").json()["draining"] is True
        wait(lambda: workers[1]._draining)
        assert process.client.get("/ready").status_code == 503
        assert process.stop() == 0
        assert "Traceback" not in process.log.read_text()


def test_sigterm_lets_open_streams_finish(tmp_path: Path, nano_dir: Path) -> None:
    with (
        fakes("prefill", "decode", step_s=0.02, model="fake") as workers,
        router(tmp_path, nano_dir, workers, drain_timeout_s=20.0) as process,
        process.client.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 40, "stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        assert list(lines)[-2:][0] == "data: [DONE]"
        assert process.process.wait(10) == 0


@pytest.mark.parametrize(("number", "drain_s"), [(signal.SIGTERM, 0.3), (signal.SIGINT, 30.0)])
def test_streams_that_outlast_the_drain_are_cut_off_and_cancelled(
    tmp_path: Path, nano_dir: Path, number: int, drain_s: float
) -> None:
    with (
        fakes("prefill", "decode", step_s=0.02, model="fake") as workers,
        router(tmp_path, nano_dir, workers, drain_timeout_s=drain_s) as process,
        process.client.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 4000, "stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        assert process.stop(number) == 0
        wait(lambda: any(isinstance(message, Cancel) for message in workers[1].log))
        with contextlib.suppress(httpx.HTTPError):
            assert "data: [DONE]" not in list(lines)


def test_a_pause_of_the_router_is_not_a_silence_of_its_workers(tmp_path: Path, nano_dir: Path) -> None:
    with (
        fakes("prefill", "decode", model="fake") as workers,
        router(tmp_path, nano_dir, workers, heartbeat_timeout_s=0.5) as process,
    ):
        for _ in range(3):
            process.process.send_signal(signal.SIGSTOP)
            time.sleep(0.8)
            process.process.send_signal(signal.SIGCONT)
            assert process.client.post("/v1/completions", json=BODY).status_code == 200
        log = process.log.read_text()
        assert "stood still" in log
        assert "lost worker" not in log


def test_unusable_settings_are_one_line_and_status_2(tmp_path: Path) -> None:
    config = tmp_path / "router.toml"
    config.write_text('[model]\npath = "/nowhere"\n')
    for env, text in (({SECRET_ENV: KEY.decode()}, "/nowhere"), ({SECRET_ENV: ""}, SECRET_ENV)):
        done = subprocess.run(
            [sys.executable, "-m", "router", "--config", str(config)],
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, **env},
        )
        assert done.returncode == 2
        assert text in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_the_router_needs_neither_torch_nor_ray() -> None:
    code = "import router.main, sys; assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_several_processes_share_the_port_and_survive_each_other(tmp_path: Path, nano_dir: Path) -> None:
    with (
        fakes("prefill", "decode", model="fake") as workers,
        router(tmp_path, nano_dir, workers, processes=2) as process,
    ):
        parent = psutil.Process(process.process.pid)
        wait(lambda: len(workers[0]._routers) == 2)
        for _ in range(8):
            with httpx.Client(base_url=process.ready["url"]) as client:  # a connection each: either process may get it
                assert client.post("/v1/completions", json=BODY).json()["usage"]["completion_tokens"] == 8
        total = 'baton_requests_total{outcome="length"} 8.0'  # of both, a moment later
        wait(lambda: total in process.client.get("/metrics").text)
        first, second = parent.children()
        first.kill()
        wait(lambda: first not in parent.children() and len(parent.children()) == 2)
        with httpx.Client(base_url=process.ready["url"], transport=httpx.HTTPTransport(retries=3)) as client:
            assert client.post("/v1/completions", json=BODY).status_code == 200
        children = parent.children()
        assert process.stop() == 0
        assert not any(child.is_running() for child in [*children, second])


def test_a_tenants_limit_holds_over_all_routers_of_the_cluster(tmp_path: Path, nano_dir: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text('[tenants.acme]\nkeys = ["sk-acme-0123456789"]\nmax_concurrent = 4\n', encoding="utf-8")
    settings = {"tenants_file": str(tenants), "drain_timeout_s": 0.1}
    body = {**BODY, "max_tokens": 400, "ignore_eos": True, "stream": True}

    def open_streams(process: RouterProcess, stack: contextlib.ExitStack) -> int:
        """How many this router lets the tenant have at once."""
        headers = {"Authorization": "Bearer sk-acme-0123456789"}
        for count in range(100):
            answer = stack.enter_context(process.client.stream("POST", "/v1/completions", json=body, headers=headers))
            if answer.status_code == 429:
                return count
            lines = answer.iter_lines()
            next(lines)
            stack.callback(lines.close)  # forgotten, it would close the stream
        raise AssertionError

    def both_allow(first: RouterProcess, second: RouterProcess, each: int) -> bool:
        with contextlib.ExitStack() as stack:
            return [open_streams(process, stack) for process in (first, second)] == [each, each]

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with fakes("prefill", "decode", step_s=0.02) as workers, router(tmp_path / "a", nano_dir, workers, **settings) as a:
        with contextlib.ExitStack() as stack:
            assert open_streams(a, stack) == 4
        with router(tmp_path / "b", nano_dir, workers, **settings) as b:
            wait(lambda: both_allow(a, b, 2))
            b.process.kill()
            b.process.wait()

        def alone() -> bool:
            with contextlib.ExitStack() as stack:
                return open_streams(a, stack) == 4

        wait(alone)  # the workers have noticed its silence


def test_the_processes_die_with_their_parent(tmp_path: Path, nano_dir: Path) -> None:
    with (
        fakes("prefill", "decode", model="fake") as workers,
        router(tmp_path, nano_dir, workers, processes=2) as process,
    ):
        children = psutil.Process(process.process.pid).children()
        assert len(children) == 2
        process.stop(signal.SIGKILL)
        _, alive = psutil.wait_procs(children, 5)
        assert not alive
    left = list(tmp_path.glob(f"baton-metrics-{process.process.pid}-*"))
    assert len(left) == 1
    with fakes("prefill", "decode", model="fake") as workers, router(tmp_path, nano_dir, workers, processes=2):
        assert not left[0].exists(), "the next parent removes what a killed one left"
