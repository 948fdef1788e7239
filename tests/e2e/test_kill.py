"""Promise 3: a worker killed at any moment costs time, never an error, a lost token or a repeated one."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.processes import ProcessCluster
from tests.e2e.client import Ask, complete_all, essence, random_asks

NUM_STREAMS = 100


class Reaper(threading.Thread):
    """Kills random workers, and restarts the dead like a supervisor.

    With `mercy` one worker of a pool dies at a time and the next kill waits until the pool is whole again.
    """

    def __init__(self, cluster: ProcessCluster, *, seed: int, kills: int, mercy: bool, number: int) -> None:
        super().__init__(name="reaper")
        self.cluster, self.kills, self.mercy, self.number = cluster, kills, mercy, number
        self.rng = random.Random(seed)
        self.done_kills = 0
        self.calm = threading.Event()
        self.errors: list[BaseException] = []

    def run(self) -> None:
        try:
            while self.done_kills < self.kills and not self.calm.wait(self.rng.uniform(0.1, 0.8)):
                names = [name for name in self.cluster.infos if name != "router"]
                victims = [self.rng.choice(names)] if self.mercy else self.rng.sample(names, k=2)
                for name in victims:
                    self.cluster.kill(name, self.number)
                    self.done_kills += 1
                if self.number == signal.SIGSTOP:
                    self.calm.wait(3.0)
                    for name in victims:
                        self.cluster.kill(name, signal.SIGCONT)
                else:
                    for name in victims:
                        self.cluster.restart(name)
        except BaseException as exc:
            self.errors.append(exc)


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    return random_asks(NUM_STREAMS, seed=11, longest=120, max_tokens=160)


@pytest.fixture(scope="module")
def cluster(nano_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    config: dict[str, Any] = {
        "model.path": str(nano_dir),
        "model.name": "baton",
        "engine.num_drafts": 1,
        "kv.memory_mb": 64,
        "router.heartbeat_timeout_s": 1.5,
        "router.queue_timeout_s": 100.0,
    }
    with ProcessCluster(tmp_path_factory.mktemp("kill"), config, prefill=2, decode=2) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(cluster: ProcessCluster, asks: list[Ask]) -> list[Any]:
    return [essence(c) for c in asyncio.run(complete_all(cluster.url, asks, at_once=NUM_STREAMS, streaming=True))]


def admin_status(cluster: ProcessCluster) -> dict[str, Any]:
    status: dict[str, Any] = httpx.get(f"{cluster.url}/admin/status", trust_env=False).json()
    return status


def wait_until_clean(cluster: ProcessCluster, timeout_s: float = 20.0) -> None:
    """No running sequence, live block, lease, quarantined block or pending hand-off on any worker."""
    deadline = time.monotonic() + timeout_s
    while True:
        workers = admin_status(cluster)["workers"]
        keys = ("num_running", "num_waiting", "blocks_live", "blocks_leased", "blocks_quarantined", "pending_handoffs")
        dirty = {w["name"]: {k: w["load"][k] for k in keys if w["load"][k]} for w in workers}
        if len(workers) == len(cluster.infos) - 1 and not any(dirty.values()):
            return
        assert time.monotonic() < deadline, f"left behind: {dirty}"
        time.sleep(0.1)


def open_files(cluster: ProcessCluster, name: str) -> int:
    return len(os.listdir(f"/proc/{cluster.children[name].pid}/fd"))


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("mercy", "number", "kills"),
    [
        pytest.param(True, signal.SIGKILL, 4, id="one-at-a-time", marks=pytest.mark.slow),
        pytest.param(False, signal.SIGKILL, 4, id="no-mercy", marks=pytest.mark.slow),
        pytest.param(True, signal.SIGSTOP, 2, id="stopped"),
    ],
)
def test_killed_workers_cost_no_token(
    mercy: bool, number: int, kills: int, cluster: ProcessCluster, asks: list[Ask], undisturbed: list[Any]
) -> None:
    wait_until_clean(cluster)
    segments, files = set(os.listdir("/dev/shm")), open_files(cluster, "router")
    reaper = Reaper(cluster, seed=kills + mercy, kills=kills, mercy=mercy, number=number)
    reaper.start()
    try:
        results: list[Any] = []
        while reaper.is_alive():
            results.append(asyncio.run(complete_all(cluster.url, asks, at_once=NUM_STREAMS, streaming=True)))
    finally:
        reaper.calm.set()
        reaper.join()
    assert not reaper.errors, reaper.errors
    assert reaper.done_kills >= kills
    for run in results:
        assert [essence(c) for c in run] == undisturbed
    wait_until_clean(cluster)
    assert set(os.listdir("/dev/shm")) == segments
    assert open_files(cluster, "router") <= files + 8
