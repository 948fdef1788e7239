"""Prometheus metrics of the controller: what each pool should be and what it is."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deploy.control import ClusterStatus
from llm_engine.api.config import ControllerConfig
from llm_engine.serving.monitor import Monitor

STATES = ("starting", "ready", "draining", "silent", "failed")


class PoolMetrics:
    """Serves the status of a cluster on a thread of its own, between `start` and `close`."""

    def __init__(self, status: Callable[[], ClusterStatus]) -> None:
        self._status = status
        registry = CollectorRegistry()
        registry.register(_PoolCollector(status))
        self._monitor = Monitor(registry, health=lambda: None, ready=self._unready)

    def start(self, settings: ControllerConfig) -> None:
        """Listen, if a port is configured. Raises ConfigError when it is taken."""
        if settings.metrics_port is not None:
            self._monitor.start(settings.host, settings.metrics_port)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._monitor.close()

    def _unready(self) -> str | None:
        behind = [
            f"{name} {pool.ready}/{pool.desired}"
            for name, pool in self._status().pools.items()
            if pool.ready < pool.desired
        ]
        return f"workers ready: {', '.join(behind)}" if behind else None


class _PoolCollector(Collector):
    def __init__(self, status: Callable[[], ClusterStatus]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked of the controller before it runs."""
        return ()

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        desired = GaugeMetricFamily("baton_pool_desired_replicas", "Replicas wanted", labels=["pool"])
        ready = GaugeMetricFamily("baton_pool_ready_replicas", "Replicas that serve", labels=["pool"])
        recommended = GaugeMetricFamily(
            "baton_pool_recommended_replicas", "What the autoscaler would choose", labels=["pool"]
        )
        workers = GaugeMetricFamily("baton_pool_workers", "Workers by state", labels=["pool", "state"])
        restarts = CounterMetricFamily(
            "baton_worker_restarts", "Restarts of the workers that exist now", labels=["name"]
        )
        counts = collections.Counter((worker.role.value, worker.state) for worker in status.workers)
        for name, pool in status.pools.items():
            desired.add_metric([name], pool.desired)
            ready.add_metric([name], pool.ready)
            if pool.recommended is not None:
                recommended.add_metric([name], pool.recommended)
            for state in STATES:
                workers.add_metric([name, state], counts[name, state])
        for worker in status.workers:
            restarts.add_metric([worker.name], worker.restarts)
        yield from (desired, ready, recommended, workers, restarts)
