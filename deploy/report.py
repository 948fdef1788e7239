"""What `baton up` and `baton status` print."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TextIO

from deploy.control import ClusterStatus, WorkerStatus
from llm_engine.api.config import ClusterConfig
from llm_engine.api.control import LinkStatus

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def banner(status: ClusterStatus, config: ClusterConfig, run_dir: Path, took_s: float) -> str:
    """Where the cluster can be reached, and a request to try."""
    url = status.router.url
    pools = " + ".join(f"{pool.ready} {name}" for name, pool in status.pools.items())
    body = json.dumps(
        {"model": status.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32, "stream": True}
    )
    return "\n".join(
        [
            "",
            f"Baton is ready after {took_s:.1f} s: {status.model} on {pools}",
            f"  API      {url}/v1",
            f"  health   {url}/health   {url}/ready",
            f"  metrics  {url}/metrics   {url}/dashboard",
            f"  logs     {_short(run_dir / 'logs')}",
            "",
            "Try it:",
            f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
            f"    -d {shlex.quote(body)}",
            "",
            *(["The API is open to the network.", ""] if config.router.host not in _LOOPBACK else []),
        ]
    )


def table(status: ClusterStatus) -> str:
    """`baton status` for people."""
    rows = [("NAME", "STATE", "PID", "RESTARTS", "METRICS")]
    router = "ready" if status.router.ready else "starting" if not status.router.error else "failed"
    rows.append(
        ("router", router, _number(status.router.pid), str(status.router.restarts), f"{status.router.url}/metrics")
    )
    rows.extend((w.name, _state(w), _number(w.pid), str(w.restarts), w.metrics_addr) for w in status.workers)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    pools = ", ".join(f"{name} {pool.ready}/{pool.desired}" for name, pool in status.pools.items())
    links = [
        f"{worker.name} → {_link(link)}"
        for worker in status.workers
        if worker.role == "prefill"
        for link in worker.links
    ]
    errors = [f"{worker.name}: {worker.error}" for worker in status.workers if worker.error]
    head = f"{status.model}: {'ready' if status.ready else 'not ready'} at {status.router.url}/v1 ({pools})"
    advice = [
        f"{name}: {pool.recommended} recommended: {pool.reason}"
        for name, pool in status.pools.items()
        if pool.recommended is not None and pool.recommended != pool.desired
    ]
    return "\n".join([head, *lines, *links, *errors, *advice])


class Say:
    """Prints lines to one stream, at once."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __call__(self, text: str) -> None:
        self._out.write(f"{text}\n")
        self._out.flush()


class EventPrinter:
    """Prints one line for every change between two states of a cluster."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._seen: dict[str, str] = {}

    def show(self, status: ClusterStatus) -> None:
        """Compare with the state shown last."""
        router = f"ready, process {status.router.pid}" if status.router.ready else "not ready"
        current = {worker.name: f"{worker.state}, process {worker.pid}" for worker in status.workers}
        current = {name: text.removesuffix(", process 0") for name, text in current.items()}
        if status.router.pid:
            current["router"] = router
        for name, text in current.items():
            if self._seen.get(name) != text:
                self._say(f"{name}: {text}")
        for name in self._seen.keys() - current.keys() - {"router"}:
            self._say(f"{name}: gone")
        self._seen = current


def _state(worker: WorkerStatus) -> str:
    """Of a draining worker also what it still holds: it goes when both counts are 0."""
    if worker.state != "draining":
        return worker.state
    return f"draining ({worker.sequences} sequences, {worker.pending_handoffs} hand-offs)"


def _link(link: LinkStatus) -> str:
    """A peer and how it is reached. The reason of a link begins with its transport."""
    trouble = "" if link.healthy else f", not healthy: {link.detail}"
    cost = f", {link.bytes_per_s / 1e9:.2f} GB/s + {link.call_s * 1e6:.0f} µs a call" if link.bytes_per_s else ""
    return f"{link.peer}: {link.reason or 'not connected'}{cost}{trouble}"


def _number(pid: int) -> str:
    return str(pid) if pid else "-"


def _short(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
