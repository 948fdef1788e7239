"""One `baton` cluster on a host of its own, for tests."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.rundir import ClusterRecord, RunDir
from tests.e2e import netns

Json = dict[str, Any]
_START_S = 120.0


class Site:
    """A host with a run directory, and the `baton` command in it."""

    def __init__(self, host: netns.Host, model: Path, directory: Path) -> None:
        self.host, self.run_dir = host, directory / "run"
        self.config = directory / "cluster.toml"
        self.config.write_text(
            f'[model]\npath = "{model}"\nname = "nano"\n[kv]\nmemory_mb = 32\n[worker]\ndrain_timeout_s = 10.0\n',
            encoding="utf-8",
        )
        self.output = directory / "up.out"
        self.ready_s = 0.0

    def baton(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.host.run(sys.executable, "-m", "deploy.cli", *words, "--run-dir", str(self.run_dir))

    def begin(self) -> subprocess.Popen[bytes]:
        """`baton up` as the leader of a process group, as a shell starts it."""
        words = ["up", "--config", str(self.config), "--run-dir", str(self.run_dir)]
        command = self.host.command("setsid", "--wait", sys.executable, "-m", "deploy.cli", *words)
        with self.output.open("wb") as out:
            return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    def until_told(self, process: subprocess.Popen[bytes], text: bytes) -> None:
        """Wait until `baton up` has printed it."""
        deadline = time.monotonic() + _START_S
        while text not in self.output.read_bytes():
            assert process.poll() is None, self.told()
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.05)

    def start(self) -> tuple[subprocess.Popen[bytes], float]:
        """A running cluster, and after how many seconds it was ready."""
        started = time.monotonic()
        process = self.begin()
        self.until_told(process, b"Try it")
        return process, time.monotonic() - started

    def record(self) -> ClusterRecord:
        """What the run directory says about the running cluster."""
        record = RunDir(self.run_dir).cluster()
        assert record is not None
        return record

    def status(self) -> Json:
        done = self.baton("status", "--json")
        assert done.returncode in (0, 4), done.stderr
        status: Json = json.loads(done.stdout)
        return status

    def worker(self, name: str) -> Json:
        return next(worker for worker in self.status()["workers"] if worker["name"] == name)

    def until(self, condition: Callable[[Json], bool], timeout_s: float = 60.0) -> Json:
        deadline = time.monotonic() + timeout_s
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, f"{status}\n{self.told()}"
        return status

    def told(self) -> str:
        """Everything a person would look at after a failure."""
        logs = sorted((self.run_dir / "logs").glob("*.log"))
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-3000:]}" for log in (self.output, *logs))

    def assert_nothing_left(self, shm_before: set[str], ray_dir: str) -> None:
        """No process, listener, shared memory or file of a cluster that has ended."""
        assert self.host.processes() == []
        assert self.host.listeners() == []
        assert netns.shared_memory() <= shm_before
        assert not Path(ray_dir).exists()
        assert {path.name for path in self.run_dir.iterdir()} == {"lock", "config.toml", "logs"}


def worker_of(status: Json, name: str) -> Json:
    return next(worker for worker in status["workers"] if worker["name"] == name)
