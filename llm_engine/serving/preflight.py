"""Checks made before a worker spends time on weights. Each failure is one ConfigError line that says what to change."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import psutil

from llm_engine.api.config import ClusterConfig, WorkerConfig
from llm_engine.api.errors import ConfigError
from llm_engine.serving import host_checks

_HEADROOM = 1.1  # weights are read through the page cache, and the step needs activations
_CGROUP = Path("/sys/fs/cgroup")


def check(config: ClusterConfig, *, uses_control_port: bool) -> None:
    """Everything that can be known from the configuration and the host. Raises ConfigError."""
    check_checkpoint(config.model.path)
    hold_ports(config.worker, uses_control_port=uses_control_port).close()
    for host_check in host_checks.required.values():
        host_check(config)


def check_checkpoint(path: Path) -> None:
    """The directory holds a configuration and weights that this process may read."""
    if not path.is_dir():
        raise ConfigError(f"model.path={path}: not a directory; make a test model with `baton model make`")
    files = [path / "config.json", *path.glob("*.safetensors")]
    if len(files) == 1:
        raise ConfigError(f"model.path={path}: no *.safetensors in it")
    for file in files:
        if not os.access(file, os.R_OK):
            raise ConfigError(f"model.path={path}: {file.name} is missing or not readable")


def checkpoint_bytes(path: Path) -> int:
    """Size of the weights on disk."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def hold_ports(worker: WorkerConfig, *, uses_control_port: bool) -> contextlib.ExitStack:
    """Bind every fixed port, without listening, until the result is closed. Raises ConfigError when one is taken.

    Nobody else is given the ports while weights are loading, and this process can listen on them at any time.
    """
    if worker.host in ("0.0.0.0", "::", "*"):
        raise ConfigError(f"worker.host={worker.host}: peers are told this address; set the one that reaches this host")
    ports: dict[int, str] = {}
    with contextlib.ExitStack() as held:
        for name in ["request_port", "metrics_port", *(["control_port"] if uses_control_port else [])]:
            port = getattr(worker, name)
            if port == 0:
                continue
            if port in ports:
                raise ConfigError(f"worker.{name}={port}: the same as worker.{ports[port]}")
            ports[port] = name
            holder = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                holder.bind((worker.host, port))
            except OSError as exc:
                raise ConfigError(f"worker.{name}={port}: can't listen on {worker.host}: {exc.strerror}") from exc
        return held.pop_all()


def check_memory(needed: int) -> None:
    """`needed` bytes, and some more for the computation, are free."""
    available = available_memory()
    if needed * _HEADROOM > available:
        raise ConfigError(
            f"kv.memory_mb: weights and cache need {needed >> 20} MiB and a tenth more, {available >> 20} are free; "
            "lower kv.memory_mb or kv.num_blocks"
        )


def available_memory() -> int:
    """Free bytes: of the host, or of this container where it has a tighter limit (cgroup v2)."""
    available: int = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used -= int(stat.get("inactive_file", 0))  # page cache that gives way
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))
