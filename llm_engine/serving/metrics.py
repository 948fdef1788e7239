"""Prometheus metrics of a worker. Counters grow once a step; gauges are read from the load when someone scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llm_engine.api.control import LinkStatus
from llm_engine.api.messages import Load, WorkerInfo
from llm_engine.sched import StepResult
from llm_engine.serving.step_loop import StepReport

_STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_HANDOFF_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_MAX_DRAFTS = 3


class WorkerMetrics:
    """The metrics of one worker, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._step_s = Histogram(
            "baton_step_seconds", "Wall time of one engine step", ["kind"], buckets=_STEP_BUCKETS, registry=registry
        )
        self._tokens = Counter("baton_tokens", "Tokens accepted and tokens drawn", ["direction"], registry=registry)
        self._computed = Counter("baton_prefill_computed_tokens", "Prompt tokens computed", registry=registry)
        self._hits = Counter("baton_prefix_hit_tokens", "Prompt tokens found in a cache", ["tier"], registry=registry)
        self._drafts = Counter("baton_draft_tokens", "Drafts verified", ["position"], registry=registry)
        self._accepted = Counter("baton_accepted_tokens", "Drafts accepted", ["position"], registry=registry)
        self._preemptions = Counter("baton_preemptions", "Sequences preempted for want of blocks", registry=registry)
        self._evictions = Counter("baton_evictions", "Blocks evicted from the prefix cache", registry=registry)
        self._refusals = Counter("baton_refusals", "Requests refused by this worker", ["reason"], registry=registry)
        self._frames = Counter("baton_rejected_frames", "Frames dropped unread", ["cause"], registry=registry)
        self._handoff_s = Histogram(
            "baton_handoff_seconds", "Offer to verified commit", buckets=_HANDOFF_BUCKETS, registry=registry
        )
        self._exposed_s = Histogram(
            "baton_handoff_exposed_seconds",
            "End of the last prefill kernel to the sequence being schedulable for decode",
            buckets=_HANDOFF_BUCKETS,
            registry=registry,
        )
        self._handoff_bytes = Counter("baton_handoff_bytes", "KV bytes handed over", registry=registry)
        self._handoff_failures = Counter("baton_handoff_failures", "Failed hand-offs", ["cause"], registry=registry)
        for position in range(_MAX_DRAFTS):
            self._drafts.labels(str(position))
            self._accepted.labels(str(position))
        self._failures_seen: dict[str, int] = {}
        self._tokens_in, self._tokens_out = self._tokens.labels("in"), self._tokens.labels("out")
        self._device_hits = self._hits.labels("device")

    def watch(
        self, info: WorkerInfo, load: Callable[[], Load], links: Callable[[], Sequence[LinkStatus]] = lambda: ()
    ) -> None:
        """Export the gauges of `load`, the worker's identity and its links."""
        self.registry.register(_LoadCollector(info, load, links))

    def device_memory(self, num_bytes: Mapping[str, int]) -> None:
        """What this worker takes of its accelerator, by use."""
        gauge = Gauge("baton_device_memory_bytes", "Device memory by use", ["use"], registry=self.registry)
        for use, count in num_bytes.items():
            gauge.labels(use).set(count)

    def accepted(self, num_tokens: int) -> None:
        """A request of `num_tokens` tokens was taken."""
        self._tokens_in.inc(num_tokens)

    def step(self, report: StepReport[StepResult], *, drawn: int) -> None:
        """One engine step, which drew `drawn` tokens."""
        stats = report.result.stats
        if stats.prefill_tokens or stats.decode_rows:
            kind = "decode" if not stats.prefill_tokens else "mixed" if stats.decode_rows else "prefill"
            self._step_s.labels(kind).observe(report.duration_s)
        self._tokens_out.inc(drawn)
        self._computed.inc(stats.prefill_tokens)
        self._device_hits.inc(stats.cached_tokens)
        self._preemptions.inc(stats.preempted)
        self._evictions.inc(stats.evicted_blocks)
        for position, (drafts, accepted) in enumerate(zip(stats.drafts, stats.accepted, strict=True)):
            self._drafts.labels(str(position)).inc(drafts)
            self._accepted.labels(str(position)).inc(accepted)

    def refused(self, reason: str) -> None:
        """A request or an offer was not taken."""
        self._refusals.labels(reason).inc()

    def frame_rejected(self, cause: str) -> None:
        """A frame of the request plane was dropped."""
        self._frames.labels(cause).inc()

    def handoff(self, *, total_s: float, exposed_s: float, num_bytes: int) -> None:
        """A hand-off was committed."""
        self._handoff_s.observe(total_s)
        self._exposed_s.observe(exposed_s)
        self._handoff_bytes.inc(num_bytes)

    def handoff_failures(self, totals: Mapping[str, int]) -> None:
        """Failed hand-offs so far, by cause."""
        for cause, total in totals.items():
            self._handoff_failures.labels(cause).inc(total - self._failures_seen.get(cause, 0))
        self._failures_seen = dict(totals)


class _LoadCollector(Collector):
    def __init__(self, info: WorkerInfo, load: Callable[[], Load], links: Callable[[], Sequence[LinkStatus]]) -> None:
        self._info = info
        self._load = load
        self._links = links

    def collect(self) -> Iterable[Metric]:
        load, info = self._load(), self._info
        blocks = GaugeMetricFamily("baton_blocks", "Cache blocks by state", labels=["state"])
        for state in ("free", "cached", "live", "leased", "quarantined"):
            blocks.add_metric([state], getattr(load, f"blocks_{state}"))
        yield blocks
        queue = GaugeMetricFamily("baton_queue_depth", "Requests waiting", labels=["queue"])
        queue.add_metric(["prefill"], load.num_waiting)
        yield queue
        yield _gauge("baton_waiting_tokens", "Tokens still to be prefilled", load.waiting_tokens)
        yield _gauge("baton_running_sequences", "Sequences being computed", load.num_running)
        yield _gauge("baton_live_requests", "Requests this worker answers for", load.num_live)
        yield _gauge("baton_pending_handoffs", "Hand-offs that are open on this worker", load.pending_handoffs)
        yield _gauge("baton_step_age_seconds", "Time since the step loop last made progress", load.step_age_s)
        yield _gauge("baton_draining", "1 while no new work is taken", float(load.draining))
        yield _gauge("baton_healthy", "1 while the step loop makes progress", float(load.healthy))
        labels = {
            "name": info.name,
            "role": info.role.value,
            "incarnation": info.incarnation,
            "model": info.model,
            "format_id": info.format_id,
            "weight_version": info.weight_version,
        }
        identity = GaugeMetricFamily("baton_worker_info", "Identity of this worker", labels=list(labels))
        identity.add_metric(list(labels.values()), 1.0)
        yield identity
        link = GaugeMetricFamily(
            "baton_link_info", "Data link to a peer; 1 while it is healthy", labels=["peer", "transport", "reason"]
        )
        rate = GaugeMetricFamily("baton_link_bytes_per_second", "Measured rate of a link", labels=["peer", "transport"])
        call = GaugeMetricFamily("baton_link_call_seconds", "Fixed cost of a link's call", labels=["peer", "transport"])
        for one in self._links():
            link.add_metric([one.peer, one.transport, one.reason], float(one.healthy))
            if one.bytes_per_s:
                rate.add_metric([one.peer, one.transport], one.bytes_per_s)
                call.add_metric([one.peer, one.transport], one.call_s)
        yield rate
        yield call
        yield link


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
