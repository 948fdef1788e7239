"""What every worker is, whatever its role: an engine on a step thread, a request plane, metrics, and a life cycle.

build (weights, blocking) → start (bind, first heartbeat) → serve until stop or failure → drained, closed.
Roles subclass `Worker`: they take submits, tell what to do with prefilled sequences, and run their peers' side.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

from llm_engine.api.config import ClusterConfig
from llm_engine.api.control import LinkStatus
from llm_engine.api.messages import Cancel, Drain, Failed, Load, Role, Submit, WorkerInfo
from llm_engine.runtime.engine import Engine
from llm_engine.sched import Failure, Prefilled, StepResult
from llm_engine.serving.assembly import Assembly, thread_setup
from llm_engine.serving.errands import Errands
from llm_engine.serving.ledger import Ledger, Live
from llm_engine.serving.metrics import WorkerMetrics
from llm_engine.serving.monitor import Monitor
from llm_engine.serving.request_plane import RequestPlane
from llm_engine.serving.step_loop import StepLoop, StepReport
from llm_engine.serving.vitals import PeerReport, Vitals

_log = logging.getLogger(__name__)

_HAND_BACK_S = 2.0  # after a drain ran out of time: for handed-back sequences to leave
_JOIN_S = 2.0

D = TypeVar("D")


class Worker(ABC, Generic[D]):
    """One replica of a pool. Except for `stop`, everything public belongs to one asyncio loop."""

    def __init__(self, config: ClusterConfig, name: str, role: Role, key: bytes, assembly: Assembly) -> None:
        self.config = config
        self.name = name or f"{role}-{os.getpid()}"
        self.role = role
        self._assembly = assembly
        self._metrics = WorkerMetrics()
        self._ledger: Ledger[D] = Ledger()
        self._plane = RequestPlane(
            key,
            self,
            heartbeat_s=config.worker.heartbeat_s,
            silence_s=config.worker.peer_timeout_s,
            on_reject=self._metrics.frame_rejected,
        )
        self._steps: StepLoop[Engine, StepResult] = StepLoop(
            assembly.engine,
            self._on_step,
            idle_s=config.worker.heartbeat_s,
            on_thread_start=thread_setup(config),
            on_result=self._on_result,
        )
        self._vitals = Vitals(self._steps, stall_s=config.worker.stall_timeout_s)
        self._errands = Errands(self._steps.fail)
        self._monitor = Monitor(self._metrics.registry, health=self._vitals.trouble, ready=self._unready)
        self._info: WorkerInfo | None = None
        self._draining = False
        self._stop_after: float | None = None  # seconds of drain, once a stop was asked for
        self._stop_asked = asyncio.Event()
        self._empty = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._services: list[asyncio.Task[None]] = []

    # -- life cycle ---------------------------------------------------------------------------------------------------

    @property
    def info(self) -> WorkerInfo:
        """Identity and addresses; known once `start` has returned."""
        assert self._info is not None, "start() has not returned yet"
        return self._info

    async def start(self) -> WorkerInfo:
        """Bind every address, start the step thread and serve. Raises ConfigError when a port is taken."""
        self._loop = asyncio.get_running_loop()
        try:
            self._info = info = self._bind()
            self._steps.start()
            await self._steps.call(lambda engine: None)  # the thread runs, and the first load is known
            if self._assembly.memory is not None:
                self._metrics.device_memory(dataclasses.asdict(self._assembly.memory))
            self._metrics.watch(info, lambda: self._vitals.load, lambda: self.links)
            services = (self._plane.run(info), *self._peer_services(info))
            self._services = [asyncio.create_task(service) for service in services]
        except BaseException:
            await self._shut_down("internal", "the worker did not start")
            raise
        return info

    async def serve(self) -> None:
        """Serve until `stop`; starts first if need be. Raises what made the worker fail, after telling its routers."""
        if self._info is None:
            await self.start()
        assert self._steps.failure is not None
        code, reason = "draining", "the worker stops"
        stopped = asyncio.create_task(self._until_stopped())
        try:
            done, _ = await asyncio.wait(
                {stopped, self._steps.failure, *self._services}, return_when=asyncio.FIRST_COMPLETED
            )
            for future in done:
                future.result()
            if stopped not in done:
                raise RuntimeError("a service of the worker ended by itself")
        except Exception as exc:
            code, reason = "internal", f"the worker failed: {exc}"
            raise
        finally:
            stopped.cancel()
            await self._shut_down(code, reason)

    def drain(self, *, hand_back: bool = False) -> None:
        """Take no new work; with `hand_back`, return what has not left the engine to its routers."""
        if not self._draining:
            _log.info("draining: %d requests are live", len(self._ledger))
        self._draining = True
        self._steps.post(lambda engine: engine.drain(hand_back=hand_back))
        self._drain_peers()
        self._plane.beat()

    @property
    def held(self) -> tuple[int, int]:
        """Live requests and open hand-offs: exact counts."""
        return len(self._ledger), self._peers().pending

    @property
    def links(self) -> list[LinkStatus]:
        """Data links to peers, with the transport of each and the reason for it."""
        return list(self._peers().links)

    @property
    def drained(self) -> bool:
        """Draining, and nothing is left: no live request, no open hand-off."""
        return self._draining and self.held == (0, 0)

    def stop(self, *, drain_s: float = 0.0) -> None:
        """Make `serve` return: at once, or after a drain of at most `drain_s`. Callable from any thread, repeatedly."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ask_stop, drain_s)

    def load(self) -> Load:
        """State of this worker now."""
        if self.drained:
            self._empty.set()
        peers = self._peers()
        self._metrics.handoff_failures(peers.failed)
        return self._vitals.beat(draining=self._draining, peers=peers, num_live=len(self._ledger))

    # -- for roles ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def on_submit(self, submit: Submit) -> None:
        """A router wants `submit` computed here."""

    @abstractmethod
    def _end(self, live: Live[D], reason: str) -> None:
        """Free everything a request holds that was live until now. Nothing more is sent about it."""

    def _on_prefilled(self, prefilled: Prefilled) -> None:
        raise AssertionError("only prefill engines hand sequences out")

    def _on_finished(self, live: Live[D]) -> None:
        """The engine finished a sequence and its last delta has been sent."""

    def _num_drawn(self, result: StepResult) -> int:
        """Tokens that this step drew."""
        return sum(len(delta.tokens) for deltas in result.deltas.values() for delta in deltas)

    def _after_step(self, result: StepResult) -> None:
        """End of a delivery."""

    def _bind_peers(self) -> str:
        """Listen for the other pool; returns the control address, "" if the role has none."""
        return ""

    def _peer_services(self, info: WorkerInfo) -> list[Coroutine[Any, Any, None]]:
        """Coroutines that run until the worker closes; the end of one is the end of the worker."""
        return []

    async def _close_peers(self) -> None:
        """Revoke and close what `_bind_peers` and `_peer_services` opened."""

    def _drain_peers(self) -> None:
        """Take no new hand-offs."""

    def _peers(self) -> PeerReport:
        """State of the hand-offs with the other pool."""
        return PeerReport()

    def _refuse(self, submit: Submit, code: str, reason: str, *, retryable: bool) -> None:
        """Turn a request down that is not live."""
        self._metrics.refused(code)
        self._send_failed(submit.router_id, submit.request_id, submit.attempt, code, reason, retryable=retryable)

    def _fail(self, live: Live[D], code: str, reason: str, *, retryable: bool = True) -> None:
        """End a live request and tell its router."""
        if self._ledger.close(live.request_id, live.attempt) is not live:
            return
        self._end(live, reason)
        self._send_failed(live.router_id, live.request_id, live.attempt, code, reason, retryable=retryable)

    def _take_over(self, submit: Submit, data: D) -> Live[D] | None:
        """Make a new attempt live, ending older ones; None when the attempt itself is stale."""
        if self._ledger.is_stale(submit.request_id, submit.attempt):
            return None
        older = self._ledger.close(submit.request_id, submit.attempt - 1)
        if older is not None:
            self._end(older, "superseded")
        return self._ledger.open(submit, time.monotonic(), data)

    # -- request plane ------------------------------------------------------------------------------------------------

    def on_cancel(self, cancel: Cancel) -> None:
        """Stop an attempt and every older one, also if they arrive later."""
        live = self._ledger.close(cancel.request_id, cancel.attempt)
        if live is not None:
            self._end(live, "cancelled")

    def on_drain(self, drain: Drain) -> None:
        """A router or an operator wants this worker empty."""
        self.drain(hand_back=drain.hand_back)

    def on_snapshot_request(self, router_id: str) -> None:
        """Answer in the order of events: the snapshot leaves between the events before and after it."""
        self._steps.post(lambda engine: engine.kv_snapshot(), lambda snapshot: self._send(router_id, snapshot))

    def on_router_lost(self, router_id: str) -> None:
        """End the streams of a router that can't be reached; it hears of it when it is back."""
        for live in self._ledger.of_router(router_id):
            self._fail(live, "router", "the connection to the router was lost")

    # -- engine results -----------------------------------------------------------------------------------------------

    def _on_result(self, result: StepResult) -> None:
        """What can't wait for the asyncio thread; on the step thread. Nothing, unless a role says so."""

    def _on_step(self, report: StepReport[StepResult]) -> None:
        result = report.result
        self._vitals.stepped(report.duration_s)
        self._metrics.step(report, drawn=self._num_drawn(result))
        for router_id, deltas in result.deltas.items():
            live = [delta for delta in deltas if self._ledger.get(delta.request_id, delta.attempt) is not None]
            if live:
                self._plane.send_deltas(router_id, live)
        if result.kv_events is not None:
            self._plane.broadcast(result.kv_events)
        for prefilled in result.prefilled:
            self._on_prefilled(prefilled)
        for seq in result.finished:
            finished = self._ledger.close(seq.request_id, seq.attempt)
            if finished is not None:
                self._on_finished(finished)
        for failure in result.failed:
            self._on_failure(failure)
        self._after_step(result)

    def _on_failure(self, failure: Failure) -> None:
        live = self._ledger.get(failure.seq.request_id, failure.seq.attempt)
        if live is not None:
            self._fail(live, failure.code, failure.reason, retryable=failure.retryable)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _send(self, router_id: str, message: Any) -> None:
        self._plane.send(router_id, message)

    def _send_failed(
        self, router_id: str, request_id: str, attempt: int, code: str, reason: str, *, retryable: bool
    ) -> None:
        failed = Failed(request_id=request_id, attempt=attempt, code=code, reason=reason, retryable=retryable)
        self._plane.send(router_id, failed)

    def _bind(self) -> WorkerInfo:
        worker = self.config.worker
        return WorkerInfo(
            name=self.name,
            role=self.role,
            incarnation=secrets.token_hex(8),
            pid=os.getpid(),
            request_addr=self._plane.bind(worker.host, worker.request_port),
            control_addr=self._bind_peers(),
            metrics_addr=self._monitor.start(worker.host, worker.metrics_port),
            model=self.config.model.served_name,
            format_id=self._assembly.format_id,
            weight_version=self._assembly.weight_version,
            block_tokens=self._assembly.layout.block_tokens,
            num_blocks=self._assembly.layout.num_blocks,
            max_model_len=self._assembly.engine.max_len,
            max_num_seqs=self.config.scheduler.max_num_seqs,
        )

    def _unready(self) -> str | None:
        if self._info is None:
            return "starting"
        return "draining" if self._draining else self._vitals.trouble()

    def _ask_stop(self, drain_s: float) -> None:
        self._stop_after = drain_s if self._stop_after is None else min(drain_s, self._stop_after)
        self._stop_asked.set()

    async def _until_stopped(self) -> None:
        await self._stop_asked.wait()
        if not self._stop_after:
            return
        self.drain()
        if await self._wait_drained(self._stop_after):
            return
        _log.warning("drain ran out of time: handing %d requests back", len(self._ledger))
        self.drain(hand_back=True)
        await self._wait_drained(_HAND_BACK_S)

    async def _wait_drained(self, timeout_s: float) -> bool:
        """Whether the worker became empty in time. Heartbeats notice."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        return self.drained

    async def _shut_down(self, code: str, reason: str) -> None:
        for live in self._ledger.all():
            self._ledger.close(live.request_id, live.attempt)
            self._send_failed(live.router_id, live.request_id, live.attempt, code, reason, retryable=True)
        for service in self._services:
            service.cancel()
        await asyncio.gather(*self._services, return_exceptions=True)
        await self._errands.cancel()
        await self._close_peers()
        if not await self._steps.stop(_JOIN_S):
            _log.warning("the step thread is still busy; leaving it behind")
        self._monitor.close()
        await asyncio.to_thread(self._plane.close)
