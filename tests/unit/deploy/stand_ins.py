"""Actors without Ray: what they report and when they die is for the test to say."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from deploy.actors import RouterReport, WorkerReport
from deploy.desired import pool_of
from llm_engine.api.config import ClusterConfig, build
from llm_engine.api.control import LinkStatus
from llm_engine.api.messages import Role, WorkerInfo

_pids = itertools.count(100)


def config(**worker: float) -> ClusterConfig:
    """Everything happens a hundred times faster than in production."""
    return build(
        {
            "model": {"path": Path("/m")},
            "worker": {"peer_timeout_s": 0.2, "drain_timeout_s": 5.0, **worker},
            "controller": {"period_s": 0.01, "start_timeout_s": 5.0},
        }
    )


class StandInWorker:
    """A WorkerHandle. `crash` is what a SIGKILL and Ray's restart look like from the controller."""

    def __init__(self, name: str, *, busy: bool = False) -> None:
        self.name, self.busy = name, busy
        self.killed: list[bool] = []
        self.stopped_with: list[float] = []
        self.silent = False
        self.links: list[LinkStatus] = []
        self.reports = 0
        self._run: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._starts()

    def _starts(self) -> None:
        self.pid = next(_pids)
        self.info: WorkerInfo | None = None

    def serves(self) -> None:
        self.info = WorkerInfo(
            name=self.name,
            role=Role(pool_of(self.name)),
            incarnation=f"i{self.pid}",
            pid=self.pid,
            request_addr=f"tcp://127.0.0.1:{self.pid}",
            control_addr="",
            metrics_addr="",
            model="m",
            format_id="f",
            weight_version="w",
            block_tokens=16,
            num_blocks=8,
            max_model_len=64,
            max_num_seqs=4,
        )

    def crash(self) -> None:
        self._starts()

    def finish(self) -> None:
        if not self._run.done():
            self._run.set_result(None)

    def finish_if_stopped(self) -> None:
        """What it still held is done."""
        if self.stopped_with:
            self.finish()

    def fail(self, error: Exception) -> None:
        self._run.set_exception(error)

    def run(self) -> asyncio.Future[None]:
        return self._run

    def report(self) -> asyncio.Future[WorkerReport]:
        self.reports += 1
        answer: asyncio.Future[WorkerReport] = asyncio.get_running_loop().create_future()
        if not self.silent:
            stage = "starting" if self.info is None else "serving"
            told = self.stopped_with[-1] if self.stopped_with else None
            answer.set_result(WorkerReport(pid=self.pid, stage=stage, info=self.info, links=self.links, drain_s=told))
        return answer

    def stop(self, drain_s: float) -> asyncio.Future[None]:
        self.stopped_with.append(drain_s)
        if not self.busy:
            self.finish()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answer.set_result(None)
        return answer

    def kill(self, *, restart: bool) -> None:
        self.killed.append(restart)


class StandInRouter:
    """A RouterHandle whose process answers at `port`."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.stopped = False
        self._run: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def run(self) -> asyncio.Future[None]:
        return self._run

    def fail(self, error: Exception) -> None:
        self._run.set_exception(error)

    def report(self) -> asyncio.Future[RouterReport]:
        answer: asyncio.Future[RouterReport] = asyncio.get_running_loop().create_future()
        answer.set_result(RouterReport(pid=1, restarts=0, port=self.port))
        return answer

    def stop(self, grace_s: float) -> asyncio.Future[None]:
        self.stopped = True
        if not self._run.done():
            self._run.set_result(None)
        return self._run

    def kill(self, *, restart: bool) -> None:
        self.stopped = True
