"""A host of its own for a test: network, process table and mounts, gone with everything in it when the test ends.

It has loopback and one more interface with an address and a default route, so that a listener that is not bound to
loopback shows. Needs root and the tools below; `missing()` names what is not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import psutil

_TOOLS = ("unshare", "nsenter", "setsid", "ip", "ss", "ps", "pgrep")
_CLONE_NEWNET = 0x40000000
_SETUP = """
ip link set lo up
ip link add outside type veth peer name peer
ip address add 192.0.2.1/24 dev outside
ip link set outside up
ip link set peer up
ip route add default via 192.0.2.254
trap '' CHLD
echo ready
exec cat
"""  # cat is process 1: it lives until its input is closed, and the kernel reaps its children (SIGCHLD ignored)


def missing() -> str:
    """Why there can be no such host here, or ""."""
    tools = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if tools:
        return f"needs {', '.join(tools)}"
    probe = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "ip", "link", "set", "lo", "up"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"unshare (needs root): {done.stderr.strip()}" if done.returncode else ""


class Host:
    """Use as a context manager. Process ids below are those inside."""

    def __enter__(self) -> Self:
        command = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-e", "-c", _SETUP]
        self._unshare = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._unshare.stdout is not None
        assert self._unshare.stdout.readline() == b"ready\n"
        self._init = psutil.Process(self._unshare.pid).children()[0].pid
        return self

    def __exit__(self, *_: object) -> None:
        self._unshare.communicate(timeout=30)

    def command(self, *words: str) -> list[str]:
        """The argument vector that runs a command inside."""
        return ["nsenter", "--target", str(self._init), "--net", "--pid", "--mount", f"--wdns={os.getcwd()}", *words]

    def run(
        self, *words: str, env: Mapping[str, str] | None = None, timeout_s: float = 110.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside and wait for its end."""
        command = self.command(*words)
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=env, check=False)

    def kill(self, pid: int, signal: str = "KILL") -> None:
        """Send a signal to a process inside, or, to a negative number, to a process group."""
        self.run("sh", "-c", f"kill -s {signal} -- {pid}").check_returncode()

    def processes(self) -> list[str]:
        """Command lines of all living processes but the first one."""
        rows = [line.split(maxsplit=2) for line in self.run("ps", "-ww", "-eo", "pid=,stat=,args=").stdout.splitlines()]
        return [row[2] for row in rows if row[0] != "1" and "Z" not in row[1] and not row[2].startswith("ps -ww")]

    def listeners(self) -> list[str]:
        """Addresses of all TCP and UDP listeners."""
        return [line.split()[4] for line in self.run("ss", "-Hltun").stdout.splitlines()]

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """This thread's new sockets belong to the host inside."""
        with open("/proc/thread-self/ns/net", "rb") as own, open(f"/proc/{self._init}/ns/net", "rb") as inner:
            _set_network(inner.fileno())
            try:
                yield
            finally:
                _set_network(own.fileno())


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def is_loopback(address: str) -> bool:
    """Of an `address:port` as ss prints it."""
    return address.startswith(("127.", "[::1]", "[::ffff:127."))


def _set_network(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
