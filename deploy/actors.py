"""Ray's view of a worker and of the router: start, watch, stop. Tokens and hand-offs never pass through here.

Both have one long task, `run`. When the process is killed Ray starts it again and repeats the task, so a caller waiting
for `run` learns only of ends that are not accidents: a finished drain, a stop, a failure of Baton itself. A restarted
controller calls `run` again and joins the task that is already there.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from deploy.fate import bound_command
from llm_engine.api.config import ClusterConfig, on_this_host
from llm_engine.api.control import LinkStatus
from llm_engine.api.errors import ServingError
from llm_engine.api.messages import Role, WorkerInfo

_log = logging.getLogger(__name__)

_WORKERS = {
    Role.PREFILL: ("prefill_worker.worker", "PrefillWorker"),
    Role.DECODE: ("decode_worker.worker", "DecodeWorker"),
    Role.AGGREGATED: ("decode_worker.aggregated", "AggregatedWorker"),
}
_DEVICES_ENV = ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
_READY_PREFIX = b"READY "
_QUICK_DEATH_S = 5.0  # a router that lived shorter than this waits before the next start
_BACKOFF_S = (0.2, 1.0, 2.0, 5.0)


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True):
    """State of a worker's process. `info` is there once it serves."""

    pid: int
    stage: str  # starting | serving | stopped
    info: WorkerInfo | None = None
    sequences: int = 0  # live requests
    pending_handoffs: int = 0
    links: list[LinkStatus] = []
    drain_s: float | None = None  # it was told to stop, and to drain for so long


class RouterReport(msgspec.Struct, frozen=True, kw_only=True):
    """State of the router's process. `pid` 0: none runs just now. `port`: where it listens, once it says so."""

    pid: int
    restarts: int
    port: int


class WorkerActor:
    """One worker in this Ray process. Everything worth testing is in the worker itself."""

    def __init__(self, config_json: str, role: str, name: str, log_file: str) -> None:
        redirect_output(Path(log_file))
        self._config = on_this_host(ClusterConfig.model_validate_json(config_json))
        self._role, self._name = Role(role), name
        self._worker: Any = None
        self._info: WorkerInfo | None = None
        self._stop_after: float | None = None
        self._stage = "starting"
        self._task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Build the worker and serve until it has stopped. Raises ConfigError when it can't be built."""
        if self._task is None:
            self._task = asyncio.create_task(self._serve())
        await asyncio.shield(self._task)

    async def _serve(self) -> None:
        assigned = [f"{name}={os.environ[name]}" for name in _DEVICES_ENV if os.environ.get(name)]
        _log.info("%s: devices assigned by Ray: %s", self._name, ", ".join(assigned) or "none")
        module, kind = _WORKERS[self._role]
        worker_class = getattr(importlib.import_module(module), kind)
        self._worker = await asyncio.to_thread(worker_class.build, self._config, self._name)
        self._info = await self._worker.start()
        self._stage = "serving"
        if self._stop_after is not None:
            self._worker.stop(drain_s=self._stop_after)
        try:
            await self._worker.serve()
        except Exception:
            _log.exception("%s failed", self._name)
            raise
        finally:
            self._stage, self._info = "stopped", None

    async def report(self) -> bytes:
        """A WorkerReport as JSON: this process and the controller may be of different versions."""
        sequences, handoffs = self._worker.held if self._stage == "serving" else (0, 0)
        report = WorkerReport(
            pid=os.getpid(),
            stage=self._stage,
            info=self._info,
            sequences=sequences,
            pending_handoffs=handoffs,
            links=self._worker.links if self._stage == "serving" else [],
            drain_s=self._stop_after,
        )
        return msgspec.json.encode(report)

    async def stop(self, drain_s: float) -> None:
        """Take no new work, wait `drain_s` for what runs, hand the rest back, and let `run` return."""
        self._stop_after = drain_s
        if self._stage == "serving":
            self._worker.stop(drain_s=drain_s)


class RouterActor:
    """Keeps one `python -m router` alive. The child is killed with this process."""

    def __init__(self, config_file: str, log_file: str) -> None:
        self._log_file = Path(log_file)
        redirect_output(self._log_file)
        self._command = bound_command([sys.executable, "-m", "router", "--config", config_file])
        self._child: asyncio.subprocess.Process | None = None
        self._restarts = 0
        self._port = 0
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Start the router again whenever it ends, until `stop`. Raises ServingError when it never got ready."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_alive())
        await asyncio.shield(self._task)

    async def _keep_alive(self) -> None:
        quick_deaths = 0
        while not self._stopping:
            started = time.monotonic()
            status = await self._one_life()
            if self._stopping:
                return
            if status == 2 and self._port == 0:  # the configuration is unusable: the next start would say the same
                raise ServingError(f"the router does not start: {last_line(self._log_file)}")
            quick_deaths = quick_deaths + 1 if time.monotonic() - started < _QUICK_DEATH_S else 0
            self._restarts += 1
            _log.warning("the router ended with status %d; starting it again", status)
            if quick_deaths:
                await asyncio.sleep(_BACKOFF_S[min(quick_deaths, len(_BACKOFF_S)) - 1])

    async def report(self) -> bytes:
        """A RouterReport as JSON."""
        pid = self._child.pid if self._child is not None and self._child.returncode is None else 0
        return msgspec.json.encode(RouterReport(pid=pid, restarts=self._restarts, port=self._port))

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, SIGKILL after `grace_s`; `run` returns."""
        self._stopping = True
        if self._child is None or self._child.returncode is not None:
            return
        self._child.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await self._child.wait()
        except TimeoutError:
            self._child.kill()

    async def _one_life(self) -> int:
        self._child = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
        assert self._child.stdout is not None
        async for line in self._child.stdout:
            if line.startswith(_READY_PREFIX):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self._port = int(json.loads(line.removeprefix(_READY_PREFIX))["port"])
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
        return await self._child.wait()


def redirect_output(path: Path) -> None:
    """Append everything this process and its children print to `path`; logging too."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


def last_line(path: Path, default: str = "no output") -> str:
    """The last line with content in a log."""
    with contextlib.suppress(OSError):
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else default
    return default
