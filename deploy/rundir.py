"""The directory of one running cluster: who runs it, how to reach it, what it should look like, its logs.

lock          held (flock) by the supervisor for its whole life; the kernel frees it whatever happens to it
secret        the cluster's key, readable by its owner only
cluster.json  ClusterRecord: the supervisor and every process it started
control.json  ControlRecord: where the controller listens
desired.json  Desired: replicas per pool, written by every `scale`
config.toml   the resolved configuration, the same for every process
logs/         one file per worker and router, and Ray's own
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from deploy.desired import Desired
from deploy.identity import ProcessId
from llm_engine.api.config import MIN_SECRET_CHARS, SECRET_ENV
from llm_engine.api.errors import ConfigError, ServingError

DEFAULT_RUN_DIR = Path(".baton/run")


class NotRunning(ServingError):
    """No cluster uses this run directory."""


class AlreadyRunning(ServingError):
    """Another cluster uses this run directory."""


class ClusterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What `baton down` needs when the supervisor can't be asked."""

    supervisor: ProcessId
    processes: list[ProcessId] = []
    ray_dir: str = ""  # Ray's own files and sockets, outside the run directory because socket paths must be short
    url: str = ""
    ready: bool = False


class ControlRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses the controller listens on; a restarted controller binds the same ones."""

    control_addr: str
    feed_addr: str


T = TypeVar("T")


class RunDir:
    """Paths and files of one cluster. Files are replaced atomically, so readers never see half of one."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.logs = self.path / "logs"
        self.config = self.path / "config.toml"
        self._lock_fd: int | None = None

    def acquire(self) -> ClusterRecord | None:
        """Become the only supervisor here; returns what a dead one left running. Raises AlreadyRunning."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _lock(fd):
            os.close(fd)
            record = self.cluster()
            who = f"process {record.supervisor.pid}" if record else "it is just starting or stopping"
            raise AlreadyRunning(
                f"a cluster is already running in {self.path} ({who}): stop it with `baton down`, or give "
                "--run-dir and --set router.port=PORT to run a second one"
            )
        self._lock_fd = fd
        self.logs.mkdir(exist_ok=True)
        left = self.cluster()
        self._clear()
        return left

    def release(self) -> None:
        """Remove what only a running cluster needs and let the next supervisor in. Logs and configuration stay."""
        self._clear()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def is_locked(self) -> bool:
        """A supervisor is alive here."""
        try:
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def create_secret(self) -> str:
        """The secret: from the environment where it is set, else a fresh one; kept in a file for `baton status`."""
        secret = os.environ.get(SECRET_ENV, "") or secrets.token_hex(32)
        if len(secret) < MIN_SECRET_CHARS:
            raise ConfigError(
                f"{SECRET_ENV}: expected at least {MIN_SECRET_CHARS} characters, or unset for a fresh one"
            )
        path = self.path / "secret"
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(secret)
        return secret

    def key(self) -> bytes:
        """The key of the control channel. Raises NotRunning."""
        try:
            return (self.path / "secret").read_text(encoding="utf-8").encode()[:64]
        except FileNotFoundError as exc:
            raise NotRunning(f"no cluster is running in {self.path}: start one with `baton up`") from exc

    def cluster(self) -> ClusterRecord | None:
        return self._read("cluster.json", ClusterRecord)

    def control(self) -> ControlRecord | None:
        return self._read("control.json", ControlRecord)

    def desired(self) -> Desired | None:
        return self._read("desired.json", Desired)

    def save(self, desired: Desired) -> None:
        self.write(desired)

    def write(self, record: ClusterRecord | ControlRecord | Desired) -> None:
        """Replace the file that holds this kind of record."""
        names = {ClusterRecord: "cluster.json", ControlRecord: "control.json", Desired: "desired.json"}
        target = self.path / names[type(record)]
        draft = target.with_suffix(f".{os.getpid()}.tmp")
        draft.write_bytes(msgspec.json.encode(record))
        draft.replace(target)

    def _clear(self) -> None:
        for name in ("cluster.json", "control.json", "desired.json", "secret"):
            (self.path / name).unlink(missing_ok=True)

    def _read(self, name: str, kind: type[T]) -> T | None:
        with contextlib.suppress(FileNotFoundError):
            return msgspec.json.decode((self.path / name).read_bytes(), type=kind)
        return None


def _lock(fd: int) -> bool:
    """Take the lock. `is_locked` of another process may hold it for an instant, so one refusal is not yet an answer."""
    for _ in range(5):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.02)
    return False
