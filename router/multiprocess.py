"""Several router processes behind one port: the kernel spreads connections over them (SO_REUSEPORT).

The parent serves nothing. It reserves the port, starts the children, says READY when all of them are, starts a child
again when it ends, and passes its stop signal on. Children die with it.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from prometheus_client.multiprocess import mark_process_dead

from llm_engine.api.config import RouterConfig
from llm_engine.api.errors import ConfigError
from router.metrics import MULTIPROC_ENV

READY_TIMEOUT_S = 30.0
RESTART_PAUSE_S = 1.0
KILL_AFTER_S = 5.0  # beyond the drain
EXIT_FAILED = 1
_METRICS_PREFIX = "baton-metrics-"


def supervise(settings: RouterConfig, arguments: Sequence[str]) -> int:
    """Run `settings.processes` children with the given command line until a signal; returns the exit code."""
    _remove_leftovers()
    prefix = f"{_METRICS_PREFIX}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix) as metrics_dir, _reserve(settings) as reserved:
        host, port = reserved.getsockname()[:2]
        command = [sys.executable, "-m", "router", *arguments, "--override", f"router.port={port}"]
        children = _Children([*command, "--child-of", str(os.getpid())], metrics_dir)
        stop = _StopSignal()
        try:
            for _ in range(settings.processes):
                children.start()
            if not children.wait_ready(READY_TIMEOUT_S, stop):
                return 0 if stop.number else EXIT_FAILED
            name = f"[{host}]" if ":" in host else host
            ready = {"url": f"http://{name}:{port}", "host": host, "port": port, "pid": os.getpid()}
            print("READY " + json.dumps({**ready, "processes": settings.processes}), flush=True)
            while not stop.number:
                stop.wait(RESTART_PAUSE_S)
                if not stop.number:
                    children.replace_dead()
            return 0
        finally:
            children.stop(stop.number or signal.SIGTERM, settings.drain_timeout_s + KILL_AFTER_S)


def _remove_leftovers() -> None:
    """Delete the metrics of parents that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_METRICS_PREFIX}*-*"):
        owner = path.name.removeprefix(_METRICS_PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _reserve(settings: RouterConfig) -> socket.socket:
    """A bound socket that does not listen: it keeps the port ours and gets no connection."""
    reserved = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((settings.host, settings.port))
    except OSError as exc:
        reserved.close()
        raise ConfigError(f"router.host={settings.host!r} router.port={settings.port}: {exc.strerror}") from exc
    return reserved


class _StopSignal:
    """Notes SIGTERM or SIGINT and wakes a waiting main thread."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def wait(self, timeout_s: float) -> None:
        """Return after `timeout_s`, or soon after a signal."""
        deadline = time.monotonic() + timeout_s
        while not self.number and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number


class _Children:
    """The serving processes."""

    def __init__(self, command: list[str], metrics_dir: str) -> None:
        self._command = command
        self._metrics_dir = metrics_dir
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._running.append(
            subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                env={**os.environ, MULTIPROC_ENV: self._metrics_dir},
            )
        )

    def wait_ready(self, timeout_s: float, stop: _StopSignal) -> bool:
        """Whether every child says READY in time; False also if one ends or a stop signal arrives."""
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for child in self._running:
                assert child.stdout is not None
                selector.register(child.stdout, selectors.EVENT_READ)
            while selector.get_map():
                if stop.number or time.monotonic() > deadline:
                    return False
                for key, _ in selector.select(0.1):
                    if not os.read(key.fd, 4096).startswith(b"READY "):
                        return False
                    selector.unregister(key.fileobj)
        return True

    def replace_dead(self) -> None:
        """Start a child for each one that has ended."""
        for child in [child for child in self._running if child.poll() is not None]:
            print(
                f"router: process {child.pid} ended with status {child.returncode}; starting another", file=sys.stderr
            )
            self._forget(child)
            self.start()

    def stop(self, number: int, timeout_s: float) -> None:
        """Pass a signal on, wait, kill what is left."""
        for child in self._running:
            child.send_signal(number)
        deadline = time.monotonic() + timeout_s
        for child in list(self._running):
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            self._forget(child)

    def _forget(self, child: subprocess.Popen[bytes]) -> None:
        self._running.remove(child)
        mark_process_dead(child.pid, self._metrics_dir)  # type: ignore[no-untyped-call]
        if child.stdout is not None:
            child.stdout.close()
