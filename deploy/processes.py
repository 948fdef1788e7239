"""A cluster of plain processes on one machine, without Ray: for tests, benchmarks and other orchestrators.

Every process gets its own TOML file in the run directory and a fixed request port: a restarted worker is found at the
same address.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llm_engine.api.config import SECRET_ENV
from llm_engine.api.errors import ServingError

READY_PREFIX = "READY "
_FIXED_PORTS = range(16384, 32768)
_MODULES = {"prefill": "prefill_worker", "decode": "decode_worker", "aggregated": "decode_worker"}


def dump_toml(values: Mapping[str, Any]) -> str:
    """Dotted keys and plain values as TOML (JSON strings, numbers, booleans and lists are valid TOML)."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago, below the range from which the kernel takes ephemeral ones.

    Raises ServingError when there is none.
    """
    for port in random.sample(_FIXED_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServingError(f"no free port found between {_FIXED_PORTS.start} and {_FIXED_PORTS.stop - 1}")


class Child:
    """One process that announces itself with a READY line; its output is kept in `log`."""

    def __init__(self, name: str, command: list[str], log: Path, env: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        self._ready = threading.Event()
        self._info: dict[str, Any] = {}
        self._sink = log.open("ab")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._sink, stdin=subprocess.DEVNULL, env=dict(env)
        )
        self._reader = threading.Thread(target=self._read, name=f"{name}-output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def wait_ready(self, timeout_s: float) -> dict[str, Any]:
        """The READY line's JSON. Raises ServingError with the end of the log when the process dies or is late."""
        deadline = time.monotonic() + timeout_s
        while not self._ready.wait(0.02):
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = self.log.read_text(errors="replace")[-2000:]
                raise ServingError(f"{self.name} is not ready (exit status {self.process.poll()}): {tail}")
        return self._info

    def signal(self, number: int) -> None:
        """Send a signal; a process that is gone already is fine."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def stop(self, timeout_s: float = 10.0) -> int:
        """SIGTERM, then SIGKILL after `timeout_s`. Returns the exit status."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(timeout_s)
        self._sink.close()
        return self.process.returncode

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for raw in lines:
                text = raw.decode(errors="replace")
                if text.startswith(READY_PREFIX):
                    self._info = json.loads(text.removeprefix(READY_PREFIX))
                    self._ready.set()
                else:
                    self._sink.write(raw)
                    self._sink.flush()


class ProcessCluster:
    """Router and workers as child processes. A context manager: leaving it stops them all."""

    def __init__(
        self,
        run_dir: Path,
        settings: Mapping[str, Any],
        *,
        prefill: int = 1,
        decode: int = 1,
        aggregated: int = 0,
        router: bool = True,
        own: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """`own`: settings of single workers by name, such as `prefill-0`, before those of all."""
        self.run_dir, self.settings = run_dir, dict(settings)
        self._own = own or {}
        self.env = {**os.environ, SECRET_ENV: secrets.token_hex(32)}
        self.port = free_port()
        self._with_router = router
        self._roles = {
            f"{role}-{index}": role
            for role, count in (("prefill", prefill), ("decode", decode), ("aggregated", aggregated))
            for index in range(count)
        }
        self._request_ports = {name: free_port() for name in self._roles}
        self.children: dict[str, Child] = {}
        self.infos: dict[str, dict[str, Any]] = {}

    @property
    def url(self) -> str:
        """Base address of the router."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, timeout_s: float = 60.0) -> None:
        """Start everything at once and wait until each process is ready."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for name in self._roles:
            self.spawn(name)
        if self._with_router:
            self._spawn_router()
        for name in list(self.children):
            self.infos[name] = self.children[name].wait_ready(timeout_s)

    def spawn(self, name: str) -> Child:
        """Start (or start again) one worker; does not wait for it."""
        role = self._roles[name]
        own = self._own.get(name, {})
        config = self._write(name, {**own, "worker.request_port": self._request_ports[name]})
        command = [sys.executable, "-m", _MODULES[role], "--config", str(config), "--name", name]
        if role == "aggregated":
            command += ["--role", role]
        return self._launch(name, command)

    def restart(self, name: str, timeout_s: float = 60.0) -> None:
        """Reap a dead worker, start it again at the same address and wait until it is ready."""
        self.children[name].stop()
        self.infos[name] = self.spawn(name).wait_ready(timeout_s)

    def restart_router(self, timeout_s: float = 60.0) -> None:
        """Let the router finish what is open, and start it again at the same address."""
        self.children["router"].stop(timeout_s)
        self._spawn_router()
        self.infos["router"] = self.children["router"].wait_ready(timeout_s)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to one process."""
        self.children[name].signal(number)

    def stop(self) -> None:
        """Stop every process, router first."""
        for name in sorted(self.children, key=lambda item: item != "router"):
            self.children[name].stop()
        self.children.clear()

    def _spawn_router(self) -> None:
        own = [f"tcp://127.0.0.1:{port}" for port in self._request_ports.values()]
        workers = [*self.settings.get("router.workers", ()), *own]
        config = self._write("router", {"router.port": self.port, "router.workers": workers})
        self._launch("router", [sys.executable, "-m", "router", "--config", str(config)])

    def _write(self, name: str, extra: Mapping[str, Any]) -> Path:
        path = self.run_dir / f"{name}.toml"
        path.write_text(dump_toml({**self.settings, **extra}), encoding="utf-8")
        return path

    def _launch(self, name: str, command: list[str]) -> Child:
        child = Child(name, command, self.run_dir / f"{name}.log", self.env)
        self.children[name] = child
        return child
