"""The dispatcher: one router process's view of the cluster, put together.

    plane ──▶ membership, workers ──▶ inbox ──▶ lifecycle ──▶ the clients' streams
                                                   └──▶ placement (policy, ledgers, prefix maps) ──▶ plane

Everything runs on one event loop. `run` is the only task; it ticks the clocks and is supervised by the process.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from llm_engine.api.config import ClusterConfig
from router.admission import Admission
from router.dispatch_api import GenerationRequest, OutputChunk
from router.feed import MembershipFeed
from router.flight import Flight, OutputStream
from router.inbox import Inbox
from router.lifecycle import Lifecycle
from router.membership import Membership
from router.metrics import RouterMetrics
from router.placement import Placer
from router.plane import CLOSE_LINGER_MS, Plane
from router.policy import Policy, cheapest_pair
from router.report import Timeline, pool_status, worker_counts, worker_status
from router.worker import Worker, WorkMessage

TICK_S = 0.05
RECENT_REQUESTS = 20  # timelines shown in the status


class ClusterDispatcher:
    """Implements `router.dispatch_api.Dispatcher`. Construct on the running event loop, keep `run()` running.

    `context_len` and `eos_ids` come from the checkpoint: its longest context and the tokens that end a sequence.
    """

    def __init__(
        self,
        config: ClusterConfig,
        key: bytes,
        *,
        context_len: int | None = None,
        eos_ids: frozenset[int] = frozenset(),
        metrics: RouterMetrics | None = None,
        policy: Policy = cheapest_pair,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        settings = config.router
        self.config = config
        self.router_id = f"router-{secrets.token_hex(6)}"
        self.metrics = metrics or RouterMetrics()
        self._clock = clock
        self._started = clock()
        self._context_len = context_len
        loop = asyncio.get_running_loop()
        self._plane = Plane(key, self.router_id, loop)
        self.membership = Membership(
            self._plane,
            self,
            self._plane.codec,
            router_id=self.router_id,
            model=config.model.served_name,
            heartbeat_s=config.worker.heartbeat_s,
            timeout_s=settings.heartbeat_timeout_s,
            clock=clock,
        )
        self._placer = Placer(self.membership, self.router_id, policy)
        self._admission: Admission[Flight] = Admission(
            max_inflight=-(-settings.max_inflight // settings.processes),
            max_queued=-(-settings.max_queued // settings.processes),
            queue_timeout_s=settings.queue_timeout_s,
        )
        self.model_names = (config.model.served_name,)
        self.max_model_len = 0
        self._lifecycle = Lifecycle(
            self._placer,
            self._admission,
            self.metrics,
            eos_ids=eos_ids,
            max_attempts=settings.max_attempts,
            stall_timeout_s=config.worker.stall_timeout_s,
            clock=clock,
        )
        self._inbox = Inbox(
            self._lifecycle, self.metrics, stall_timeout_s=config.worker.stall_timeout_s, clock=clock
        )  # fmt: skip
        self._bound_context()
        for address in settings.workers:
            self.membership.add(address)
        self._feed = (
            MembershipFeed(settings.membership, key, loop, self.membership.update) if settings.membership else None
        )

    # Dispatcher

    def ready(self) -> bool:
        return self._placer.has_pair()

    def submit(self, request: GenerationRequest) -> AsyncGenerator[OutputChunk, None]:
        return OutputStream(self._lifecycle, request)

    def status(self) -> Mapping[str, Any]:
        now = self._clock()
        workers = self.membership.workers
        return {
            "router_id": self.router_id,
            "model": self.config.model.served_name,
            "ready": self.ready(),
            "uptime_s": round(now - self._started, 3),
            "feed": {
                "version": self.membership.feed_version,
                "age_s": None if self.membership.feed_seen is None else round(now - self.membership.feed_seen, 3),
            },
            "requests": {**self._lifecycle.counts(), "limit": self._admission.limit},
            "pools": pool_status(workers),
            "workers": [worker_status(worker, now) for worker in workers],
            "bad_frames": self._plane.num_bad_frames,
            "recent": self._lifecycle.timelines.recent(RECENT_REQUESTS),
        }

    # for operators

    @property
    def num_routers(self) -> int:
        """Living router processes of the cluster, this one included."""
        return self.membership.num_routers

    def drain(self, worker: str, *, hand_back: bool = False) -> bool:
        """Ask a worker, by name, to take no new work. False: there is no such worker, or it can't be reached."""
        found = self.membership.find(worker)
        return found is not None and found.drain(hand_back)

    def timeline(self, request_id: str) -> Mapping[str, Any] | None:
        """Attempts, stages and workers of a running or recent request; None: unknown by now."""
        flight = self._lifecycle.flights.get(request_id)
        found = self._lifecycle.timelines.get(request_id) if flight is None else Timeline.of(flight)
        return None if found is None else found.as_json()

    # life cycle

    @property
    def num_open(self) -> int:
        """Requests that are not over."""
        return len(self._lifecycle.flights)

    async def run(self) -> None:
        """Tick until cancelled: heartbeats, silence, deadlines and stalls are noticed here."""
        due = self._clock()
        while True:
            now = self._clock()
            self.metrics.gauge("event_loop_lag_seconds", max(0.0, now - due))
            self.membership.tick()
            self._lifecycle.tick(now)
            self._bound_context()
            self._export()
            due = now + TICK_S
            await asyncio.sleep(TICK_S)

    async def close(self) -> None:
        """Fail what is left, tell the workers, close every socket. New requests are refused from now on."""
        self._lifecycle.close()
        if self._feed is not None:
            self._feed.close()
        self.membership.close(CLOSE_LINGER_MS)
        await asyncio.get_running_loop().run_in_executor(None, self._plane.close)  # waits for the last messages

    # WorkListener

    def pools_changed(self) -> None:
        self._bound_context()
        capacity = -(-self._placer.capacity() // self.config.router.processes)
        self._admission.set_capacity(capacity, self._clock())
        self._lifecycle.pump()

    def load_changed(self) -> None:
        self._lifecycle.pump()

    def worker_lost(self, worker: Worker, attempts: Mapping[str, int], cause: str) -> None:
        self.metrics.worker_lost(worker.info.role.value if worker.info is not None else "unknown", cause)
        self._inbox.lost(worker, attempts, cause)

    def worker_said(self, worker: Worker, message: WorkMessage) -> None:
        self._inbox.accept(worker, message)

    def _bound_context(self) -> None:
        """The longest sequence that the model and the known workers can hold, at most the configured length."""
        bounds = (self._placer.longest_sequence(), self.config.model.max_len, self._context_len)
        self.max_model_len = min((bound for bound in bounds if bound is not None), default=0)

    def _export(self) -> None:
        counts = self._lifecycle.counts()
        for name, count in counts.items():
            self.metrics.gauge(f"{name}_requests", count)
        self.metrics.workers(worker_counts(self.membership.workers))
        self.metrics.flush()
