"""Processes by identity: a pid together with its start time, so that a reused pid is never mistaken for ours."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import psutil

_POLL_S = 0.05


class ProcessId(msgspec.Struct, frozen=True, kw_only=True):
    """One process of this boot. `started` is in clock ticks since boot."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Still there and not a zombie."""
        stat = _stat(self.pid)
        return stat is not None and stat[1] == self.started and stat[0] != "Z"

    def send(self, signum: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)


def identify(pid: int) -> ProcessId | None:
    """The identity of a living process, or None."""
    stat = _stat(pid)
    return None if stat is None else ProcessId(pid=pid, started=stat[1])


def descendants(pid: int) -> list[ProcessId]:
    """Every living process below `pid`."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [known for child in children if (known := identify(child.pid)) is not None]


def wait_gone(processes: Iterable[ProcessId], timeout_s: float) -> list[ProcessId]:
    """Those still alive when all have ended or the time is up."""
    deadline = time.monotonic() + timeout_s
    left = [process for process in processes if process.alive()]
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        left = [process for process in left if process.alive()]
    return left


def kill_all(processes: Iterable[ProcessId], *, grace_s: float) -> list[ProcessId]:
    """Wait for the processes to end by themselves, then SIGKILL the rest; returns those that had to be killed."""
    left = wait_gone(processes, grace_s)
    for process in left:
        process.send(signal.SIGKILL)
    wait_gone(left, 5.0)
    return left


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time. The command in /proc/PID/stat may hold blanks and parentheses: skip to its end."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[19])
