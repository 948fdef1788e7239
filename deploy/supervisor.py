"""`baton up` and `baton down`: one process that starts Ray and the controller, reports, and takes everything down.

    lock the run directory → checkpoint → Ray → controller → wait until ready → print where → watch → stop, clean up

Whatever ends it runs through the same clean-up. If the supervisor itself is killed, the kernel ends Ray's processes and
the router with it, and `baton down` (or the next `up`) removes what is left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy import local_ray
from deploy.control import ClusterStatus, ControlClient, ControlRefused, ControlTimeout, GetStatus, StopCluster
from deploy.fleet import one_line
from deploy.identity import ProcessId, descendants, identify, kill_all, wait_gone
from deploy.report import EventPrinter, Say, banner
from deploy.rundir import ClusterRecord, NotRunning, RunDir
from deploy.signals import Signals
from llm_engine.api.config import ClusterConfig, Resolved
from llm_engine.api.errors import ConfigError, ServingError
from llm_engine.serving.preflight import check_checkpoint

_POLL_S = 0.2
_STEADY_POLL_S = 1.0
_FIRST_ANSWER_S = 60.0  # Ray started and the controller listening
_CONTROLLER_SILENT_S = 60.0
_STOP_S = 20.0
_KILL_GRACE_S = 5.0
_MAX_RAY_DIR_CHARS = 24  # a Unix socket's path has at most 107, and Ray adds some 80


class StartFailed(ServingError):
    """The cluster did not come up; the message says which part and why."""


def up(resolved: Resolved, run_dir: RunDir) -> None:
    """Run a cluster until a signal asks for its end. Raises ServingError when it can't start or breaks."""
    started, say = time.monotonic(), Say(sys.stdout)
    config = resolved.config
    left = run_dir.acquire()
    try:
        if left is not None:
            _remove_leftovers(left)
        _check_port(config)
        check_checkpoint(config.model.path)
        for key, source in sorted(resolved.sources.items()):
            say(f"  {key} from {source}")
        with Signals() as signals, _ray_prints_to(run_dir.logs), _Cluster(config, run_dir, signals, say) as cluster:
            status = cluster.wait_ready()
            say(banner(status, config, run_dir.path, time.monotonic() - started))
            cluster.watch()
    except KeyboardInterrupt:
        say("stopped")
    finally:
        run_dir.release()


def down(run_dir: RunDir, timeout_s: float) -> bool:
    """Stop the cluster of this run directory, and only it. False when none was running. Raises ServingError."""
    record = run_dir.cluster()
    if record is None:
        if run_dir.is_locked():
            raise ServingError(f"the cluster in {run_dir.path} is just starting or stopping: try again in a moment")
        return False
    was_alive = record.supervisor.alive()
    if was_alive:
        record.supervisor.send(signal.SIGTERM)
        if wait_gone([record.supervisor], timeout_s):
            record = run_dir.cluster() or record
            record.supervisor.send(signal.SIGKILL)
            wait_gone([record.supervisor], _KILL_GRACE_S)
    _remove_leftovers(record)
    if not run_dir.is_locked():
        run_dir.release()
    return was_alive or bool(record.processes)


def status(run_dir: RunDir, timeout_s: float = 5.0) -> ClusterStatus:
    """Ask the controller. Raises NotRunning or ControlTimeout."""
    with connect(run_dir) as client:
        return client.ask(GetStatus(), timeout_s=timeout_s)


def connect(run_dir: RunDir) -> ControlClient:
    """A client of the running cluster's controller. Raises NotRunning."""
    record = run_dir.control()
    if record is None or not run_dir.is_locked():
        raise NotRunning(f"no cluster is running in {run_dir.path}: start one with `baton up`")
    return ControlClient(record.control_addr, run_dir.key())


class _Cluster:
    """The processes of one cluster, from Ray's start to the last one's end."""

    def __init__(self, config: ClusterConfig, run_dir: RunDir, signals: Signals, say: Say) -> None:
        self._config, self._run_dir, self._signals, self._say = config, run_dir, signals, say
        self._events = EventPrinter(say)
        self._controller: Any = None
        supervisor = identify(os.getpid())
        assert supervisor is not None
        self._record = ClusterRecord(supervisor=supervisor, ray_dir=_make_ray_dir())

    def __enter__(self) -> _Cluster:
        try:
            self._save()
            ray_dir = Path(self._record.ray_dir)
            local_ray.set_environment(self._run_dir.create_secret(), ray_dir)
            local_ray.start(ray_dir)
            self._signals.install()  # Ray has put its own handlers in their place
            self._signals.pause(0.0)
            self._controller = local_ray.start_controller(self._config, self._run_dir.path)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Orderly where the controller answers, by force where anything is left."""
        self._say("stopping")
        processes = self._living()
        if self._controller is not None:
            self._ask_to_stop()
        with contextlib.suppress(Exception):  # Ray may be half started or broken: its processes are ended below
            local_ray.stop()
        killed = kill_all({*processes, *self._living()}, grace_s=_KILL_GRACE_S)
        if killed:
            self._say(f"killed {len(killed)} processes that did not stop by themselves")
        _keep_logs(Path(self._record.ray_dir), self._run_dir.logs)

    def wait_ready(self) -> ClusterStatus:
        """Until every pool has its size and the router serves. Raises StartFailed with the first cause there is."""
        deadline = time.monotonic() + self._config.controller.start_timeout_s + _FIRST_ANSWER_S
        while time.monotonic() < deadline:
            current = self._poll(timeout_s=1.0)
            if current is not None:
                self._raise_on_failure(current)
                if current.ready:
                    self._save(url=current.router.url, ready=True)
                    return current
            self._signals.pause(_POLL_S)
        raise StartFailed(f"not ready within {self._config.controller.start_timeout_s:g} s: see {self._run_dir.logs}")

    def watch(self) -> None:
        """Report changes until a signal interrupts. Raises ServingError when the controller is gone for good."""
        heard = time.monotonic()
        while True:
            self._signals.pause(_STEADY_POLL_S)
            if self._poll(timeout_s=_STEADY_POLL_S) is not None:
                heard = time.monotonic()
            elif time.monotonic() - heard > _CONTROLLER_SILENT_S:
                raise ServingError(f"the controller does not answer any more: see {self._run_dir.logs}")
            self._save()

    def _poll(self, timeout_s: float) -> ClusterStatus | None:
        if self._controller.done():
            error = self._controller.exception()
            raise ServingError(f"the controller ended: {'it was told to stop' if error is None else one_line(error)}")
        record = self._run_dir.control()
        if record is None:
            return None
        try:
            with ControlClient(record.control_addr, self._run_dir.key()) as client:
                current = client.ask(GetStatus(), timeout_s=timeout_s)
        except ControlTimeout:
            return None
        self._events.show(current)
        return current

    def _raise_on_failure(self, current: ClusterStatus) -> None:
        for worker in current.workers:
            if worker.error:
                raise StartFailed(f"{worker.name}: {worker.error}")
        if current.router.error:
            raise StartFailed(f"router: {current.router.error}")

    def _ask_to_stop(self) -> None:
        record = self._run_dir.control()
        if record is None or self._controller.done():
            return
        with contextlib.suppress(ControlTimeout, ControlRefused, NotRunning):
            with ControlClient(record.control_addr, self._run_dir.key()) as client:
                client.ask(StopCluster(), timeout_s=2.0)
            with contextlib.suppress(Exception):  # its end is all we want to know
                self._controller.result(timeout=_STOP_S)

    def _living(self) -> list[ProcessId]:
        return descendants(os.getpid())

    def _save(self, *, url: str = "", ready: bool = False) -> None:
        record = ClusterRecord(
            supervisor=self._record.supervisor,
            processes=self._living(),
            ray_dir=self._record.ray_dir,
            url=url or self._record.url,
            ready=ready or self._record.ready,
        )
        if record != self._record or not record.ready:
            self._run_dir.write(record)
            self._record = record


@contextlib.contextmanager
def _ray_prints_to(logs: Path) -> Iterator[None]:
    """Ray's driver prints what it notices to sys.stdout; `Say` has the terminal."""
    with (logs / "ray-driver.log").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


def _check_port(config: ClusterConfig) -> None:
    if config.router.port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.router.host, config.router.port))
        except OSError as exc:
            raise ConfigError(
                f"router.port={config.router.port}: {exc.strerror} on {config.router.host}; "
                "choose another with --set router.port=PORT"
            ) from exc


def _make_ray_dir() -> str:
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="baton-", dir=base if len(base) <= _MAX_RAY_DIR_CHARS else "/tmp")


def _remove_leftovers(record: ClusterRecord) -> None:
    """What a killed supervisor left: processes still ending, and Ray's directory with its sockets."""
    kill_all(record.processes, grace_s=1.0)
    if record.ray_dir:
        shutil.rmtree(record.ray_dir, ignore_errors=True)


def _keep_logs(ray_dir: Path, logs: Path) -> None:
    """Move Ray's logs beside ours and remove everything else of it."""
    target = logs / "ray"
    shutil.rmtree(target, ignore_errors=True)
    source = ray_dir / local_ray.RAY_FILES / "session_latest" / "logs"
    if source.exists():
        with contextlib.suppress(OSError):
            shutil.move(str(source.resolve()), target)
    shutil.rmtree(ray_dir, ignore_errors=True)
