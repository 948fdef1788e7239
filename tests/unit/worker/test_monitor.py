"""The HTTP endpoint: metrics and probes, clients that misbehave."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from llm_engine.api.errors import ConfigError
from llm_engine.serving.monitor import MAX_CONNECTIONS, Monitor


class Patient:
    """Answers the probes of a monitor."""

    def __init__(self) -> None:
        self.trouble: str | None = None
        self.missing: str | None = None


@pytest.fixture
def patient() -> Patient:
    return Patient()


@pytest.fixture
def base(patient: Patient) -> Iterator[str]:
    registry = CollectorRegistry()
    Gauge("baton_answer", "The answer", registry=registry).set(42)
    monitor = Monitor(registry, health=lambda: patient.trouble, ready=lambda: patient.missing)
    address = monitor.start("127.0.0.1", 0)
    assert address.endswith("/metrics")
    yield address.removesuffix("/metrics")
    monitor.close()
    monitor.close()


def get(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False, timeout=10.0)


def test_metrics_are_in_prometheus_format(base: str) -> None:
    families = {f.name: f for f in text_string_to_metric_families(get(f"{base}/metrics").text)}
    assert families["baton_answer"].samples[0].value == 42


def test_probes_answer_what_is_wrong(base: str, patient: Patient) -> None:
    assert (get(f"{base}/health").status_code, get(f"{base}/ready").status_code) == (200, 200)
    patient.trouble, patient.missing = "the step loop made no progress for 61.0 s", "draining"
    health, ready = get(f"{base}/health"), get(f"{base}/ready")
    assert (health.status_code, health.text) == (503, "the step loop made no progress for 61.0 s\n")
    assert (ready.status_code, ready.text) == (503, "draining\n")
    assert get(f"{base}/elsewhere").status_code == 404


def test_idle_connections_are_bounded_and_do_not_lock_others_out_for_good(base: str) -> None:
    host, port = base.removeprefix("http://").split(":")
    threads = threading.active_count()
    idle = [socket.create_connection((host, int(port)), timeout=10.0) for _ in range(MAX_CONNECTIONS + 4)]
    try:
        assert [sock for sock in idle[MAX_CONNECTIONS:] if sock.recv(1) == b""]
        assert threading.active_count() <= threads + MAX_CONNECTIONS
    finally:
        for sock in idle:
            sock.close()
    deadline = time.monotonic() + 10.0
    while True:
        with contextlib.suppress(httpx.TransportError):  # the slots of the idle ones come back one by one
            assert get(f"{base}/health").status_code == 200
            break
        assert time.monotonic() < deadline


def test_a_taken_port_is_one_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monitor = Monitor(CollectorRegistry(), health=lambda: None, ready=lambda: None)
        with pytest.raises(ConfigError, match=rf"worker\.metrics_port={port}: can't listen"):
            monitor.start("127.0.0.1", port)
