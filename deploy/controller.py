"""The controller: one Ray actor that holds a cluster at its desired size and tells routers who its members are.

Its own loss costs nothing: workers and router are detached actors that a restarted controller finds by name, the
desired state is in its store, and it listens on the same ports again. No token passes through it.

    control channel ── scale, drain ──▶ Pools ──▶ plan() ──▶ Fleet: one task per worker
    autoscaler ───────────────────────────┘                     │ reports
    routers ◀── membership feed, on change and every period ────┘
"""

from __future__ import annotations

import asyncio
import logging
import urllib.request
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import tomli_w
import zmq.asyncio
from pydantic import ValidationError

from deploy import desired
from deploy.actors import RouterReport
from deploy.autoscaler import Autoscaler
from deploy.control import (
    ClusterStatus,
    ConfigurePools,
    ControlRequest,
    ControlServer,
    DrainWorker,
    GetStatus,
    Reply,
    RollOut,
    RouterStatus,
    ScalePool,
    StopCluster,
)
from deploy.desired import DesiredStore
from deploy.feed import MembershipFeed
from deploy.fleet import RESTART_PAUSE_S, Fleet, Launch, one_line, wait_event
from deploy.pool_metrics import PoolMetrics
from deploy.pools import Pools
from deploy.rollout import next_drain, with_surge, worker_settings
from deploy.rundir import ControlRecord, RunDir
from llm_engine.api.config import ClusterConfig, PoolsConfig, cluster_key
from llm_engine.api.errors import ConfigError, ServingError

_log = logging.getLogger(__name__)

_ROUTER_MARGIN_S = 2.0  # beyond its own drain
_STOP_S = 10.0
_PROBE_S = 1.0
_WORKER_SECTIONS = ("model", "engine", "kv", "scheduler", "transfer", "worker", "pools")  # what a rollout may change


class RouterHandle(Protocol):
    """The router's actor, as the controller uses it."""

    def run(self) -> asyncio.Future[None]: ...

    def report(self) -> asyncio.Future[RouterReport]: ...

    def stop(self, grace_s: float) -> asyncio.Future[None]: ...

    def kill(self, *, restart: bool) -> None: ...


class Controller:
    """Reconciles until `StopCluster`. Built and run on one asyncio loop."""

    def __init__(
        self,
        config: ClusterConfig,
        run_dir: RunDir,
        launch_worker: Launch,
        launch_router: Callable[[], RouterHandle] | None,
        store: DesiredStore | None = None,
    ) -> None:
        """`launch_router` None: routers run elsewhere. `store`: of the desired state (default: the run directory)."""
        self._config, self._run_dir = config, run_dir
        self._launch_router = launch_router
        self._pools = Pools(config.pools, store or run_dir, max_cards=config.autoscaler.max_cards)
        self._fleet = Fleet(config, launch_worker)
        self._router = RouterStatus(ready=launch_router is None)
        self._autoscaler = Autoscaler(config.autoscaler, self._pools, self._fleet, lambda: self._router.url)
        self._latest = self.status()  # replaced every period: what other threads may read
        self._router_handle: RouterHandle | None = None
        self._tending: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()

    async def run(self, existing: Mapping[str, int] = MappingProxyType({})) -> None:
        """Serve until stopped. `existing`: workers that a controller before this one has started, and their revisions.

        A rollout that was under way goes on: the desired state has the revision that all should have.
        """
        await self._pools.obey(self._config.pools, worker_settings(self._config))
        self._fleet.adopt(self._config, self._pools.revision)
        context = zmq.asyncio.Context()
        key = cluster_key()
        control, feed = ControlServer(context, key, self._handle), MembershipFeed(context, key)
        metrics = PoolMetrics(lambda: self._latest)
        try:
            self._listen(control, feed)
            metrics.start(self._config.controller)
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(coroutine)
                    for coroutine in (
                        control.run(),
                        self._publish(feed),
                        self._keep_router(),
                        self._reconcile(tasks),
                        self._autoscaler.run(),
                    )
                ]
                running.extend(tasks.create_task(self._fleet.add(*worker)) for worker in existing.items())
                await self._stopping.wait()
                await self._stop()
                for task in (*running, *self._tending):
                    task.cancel()
        finally:
            metrics.close()
            control.close()
            feed.close()
            context.term()

    def _listen(self, control: ControlServer, feed: MembershipFeed) -> None:
        known, host = self._run_dir.control(), self._config.controller.host
        ports = self._config.controller.control_port or "*", self._config.controller.feed_port or "*"
        record = ControlRecord(
            control_addr=control.bind(known.control_addr if known else f"tcp://{host}:{ports[0]}"),
            feed_addr=feed.bind(known.feed_addr if known else f"tcp://{host}:{ports[1]}"),
        )
        addresses = {"membership": record.feed_addr, "controller": record.control_addr, "workers": ()}
        router = self._config.router.model_copy(update=addresses)
        self._config = self._config.model_copy(update={"router": router})
        self._write_config()
        self._run_dir.write(record)

    def _write_config(self) -> None:
        """For routers, and for the next controller."""
        tree = self._config.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        self._run_dir.config.write_text(tomli_w.dumps(tree), encoding="utf-8")

    async def _reconcile(self, tasks: asyncio.TaskGroup) -> None:
        await self._fleet.introduced(self._config.worker.peer_timeout_s)
        while True:
            self._pools.changed.clear()
            pools, members = self._pools, self._fleet.rolling()
            sizes = with_surge(pools.sizes, members, pools.cards, pools.max_cards)
            steps = desired.plan(sizes, self._fleet.present(), pools.cards, pools.max_cards)
            old = next_drain(sizes, members)
            for name in (*steps.drain, *([old] if old is not None else [])):
                self._fleet.drain(name, self._config.worker.drain_timeout_s)
            for _, name in steps.start:
                task = tasks.create_task(self._fleet.add(name))
                self._tending.add(task)
                task.add_done_callback(self._tending.discard)
            await wait_event(self._pools.changed, self._config.controller.period_s)

    async def _publish(self, feed: MembershipFeed) -> None:
        while True:
            self._fleet.changed.clear()
            self._latest = self.status()
            await feed.publish(self._fleet.members())
            await wait_event(self._fleet.changed, self._config.controller.period_s)

    async def _keep_router(self) -> None:
        pauses = 0
        if self._launch_router is None:
            return
        while not self._stopping.is_set():
            handle = self._router_handle = self._launch_router()
            run = asyncio.ensure_future(handle.run())
            while not run.done():
                await self._look_at_router(handle, run)
            self._router = RouterStatus(error=one_line(exc) if (exc := run.exception()) else "")
            if self._stopping.is_set():
                return
            _log.error("the router failed: %s", self._router.error)
            handle.kill(restart=False)
            await asyncio.sleep(RESTART_PAUSE_S[min(pauses, len(RESTART_PAUSE_S) - 1)])
            pauses += 1

    async def _look_at_router(self, handle: RouterHandle, run: asyncio.Future[None]) -> None:
        period_s = self._config.controller.period_s
        report = asyncio.ensure_future(handle.report())
        outstanding: set[asyncio.Future[Any]] = {run, report}
        await asyncio.wait(outstanding, return_when=asyncio.FIRST_COMPLETED)
        if not report.done() or report.exception() is not None:
            return
        said = report.result()
        url = f"http://{self._config.router.host}:{said.port or self._config.router.port}"
        ready = said.pid != 0 and await asyncio.to_thread(answers, f"{url}/ready")
        self._router = RouterStatus(url=url, pid=said.pid, restarts=said.restarts, ready=ready)
        await asyncio.wait({run}, timeout=period_s if ready else period_s / 4)

    async def _handle(self, request: ControlRequest) -> Reply:
        error = ""
        try:
            match request:
                case GetStatus():
                    pass
                case ScalePool():
                    await self._pools.scale(request.pool, request.replicas, by=request.by, reason=request.reason)
                case ConfigurePools(pools=pools):
                    await self._pools.obey(PoolsConfig.model_validate(pools))
                case DrainWorker(worker=name):
                    if not self._fleet.has(name):
                        raise ServingError(f"no worker is called {name!r}: `baton status` lists them")
                    self._fleet.drain(name, self._config.worker.drain_timeout_s)
                    self._pools.changed.set()
                case RollOut(config=text):
                    await self._roll_out(text)
                case StopCluster():
                    self._stopping.set()
        except (ServingError, ValidationError) as exc:
            error = " ".join(str(exc).split())
        return Reply(status=self.status(), error=error)

    async def _roll_out(self, text: str) -> None:
        """New workers get the new configuration, as far as it is theirs. Raises ServingError, ValidationError."""
        config = self._config
        if text:
            new = ClusterConfig.model_validate_json(text)
            if new.model.served_name != config.model.served_name:
                raise ConfigError(
                    f"model.name={new.model.served_name!r}: routers serve {config.model.served_name!r}, and a rollout "
                    "keeps that name"
                )
            config = config.model_copy(update={section: getattr(new, section) for section in _WORKER_SECTIONS})
        before, self._config = self._config, config
        self._write_config()  # should this process end here, the next one finds other settings and rolls them out
        try:
            await self._pools.revise(worker_settings(config))
        except ServingError:
            self._config = before
            self._write_config()
            raise
        self._fleet.adopt(config, self._pools.revision)
        _log.info("rolling out revision %d", self._fleet.revision)

    def status(self) -> ClusterStatus:
        """The cluster now."""
        pools = self._autoscaler.advise(self._pools.status(self._fleet.ready))
        return ClusterStatus(
            ready=self._router.ready and all(pool.ready >= pool.desired for pool in pools.values()),
            model=self._config.model.served_name,
            router=self._router,
            pools=pools,
            workers=self._fleet.status(),
            changes=self._pools.changes,
            autoscaler=self._config.autoscaler.mode,
            revision=self._fleet.revision,
        )

    async def _stop(self) -> None:
        """The router first, so that clients see an end instead of retries; then the workers."""
        self._pools.clear()
        if self._router_handle is not None:
            grace_s = self._config.router.drain_timeout_s + _ROUTER_MARGIN_S
            await asyncio.wait({self._router_handle.stop(grace_s)}, timeout=grace_s + _ROUTER_MARGIN_S)
        for worker in self._fleet.present():
            self._fleet.drain(worker.name, 0.0)
        await self._fleet.emptied(_STOP_S)


def answers(url: str) -> bool:
    """A GET of `url` gives 200 within a second."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_PROBE_S) as response:
            return bool(response.status == 200)
    except OSError:
        return False
