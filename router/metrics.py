"""Prometheus metrics of a router process.

What happens per token (`inter_token_seconds`, token counters) is collected in plain Python numbers and flushed a few
times a second; what happens per request is observed directly. With PROMETHEUS_MULTIPROC_DIR set, `render` merges all
processes that share the directory.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

MULTIPROC_ENV = "PROMETHEUS_MULTIPROC_DIR"
STAGES = ("router", "recovery", "prefill_queue", "prefill_compute", "relay")
_GRID = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)
_LATENCY_BUCKETS = (*(round(step * 10.0**power, 6) for power in range(-3, 2) for step in _GRID), 100.0, 300.0)
_TOKEN_BUCKETS = (*(round(step * 10.0**power, 7) for power in range(-4, 1) for step in _GRID), 10.0, 60.0)
_HTTP_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class BatchHistogram(Histogram):
    """A histogram without labels that takes in many observations at once."""

    def observe_batch(self, counts: Sequence[int], total: float) -> None:
        """Add `counts[i]` observations to bucket i (the last one is +Inf), `total` to the sum."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(total)


class RouterMetrics:
    """The metrics of one process, in a registry of their own. See docs/operations.md for what each one means."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._ttft = Histogram(
            "baton_ttft_seconds",
            "Arrival of the HTTP request to the first chunk written",
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        stage = Histogram(
            "baton_ttft_stage_seconds",
            "Parts of the time to first token; they add up to it",
            ["stage"],
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self._stages = {name: stage.labels(name) for name in STAGES}
        self._tpot = Histogram(
            "baton_tpot_seconds",
            "Mean time per output token after the first, per request",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self._inter_token = BatchHistogram(
            "baton_inter_token_seconds",
            "Time between two deliveries of one sequence",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self._e2e = Histogram(
            "baton_e2e_seconds",
            "Arrival of the request to its last token",
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self._handoff = Histogram(
            "baton_handoff_seconds", "Offer to verified commit", buckets=_LATENCY_BUCKETS, registry=registry
        )
        self._exposed = Histogram(
            "baton_handoff_exposed_seconds",
            "End of the last prefill kernel to the sequence being schedulable for decode",
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self._handoff_bytes = Counter("baton_handoff_bytes", "KV bytes handed over", registry=registry)
        self._tokens = Counter("baton_tokens", "Prompt and output tokens served", ["direction"], registry=registry)
        self._hits = Counter(
            "baton_prefix_hit_tokens", "Prompt tokens found in a cache", ["tier"], registry=registry
        ).labels("device")
        self._requests = Counter("baton_requests", "Sequences by how they ended", ["outcome"], registry=registry)
        self._recoveries = Counter("baton_recoveries", "Attempts started again elsewhere", ["cause"], registry=registry)
        self._refusals = Counter("baton_refusals", "Requests refused at the door", ["reason"], registry=registry)
        self._losses = Counter("baton_worker_losses", "Workers lost", ["role", "cause"], registry=registry)
        self._http = Histogram(
            "baton_http_request_seconds",
            "HTTP exchanges by route and status",
            ["route", "status"],
            buckets=_HTTP_BUCKETS,
            registry=registry,
        )
        self._gauges = {
            name: Gauge(f"baton_{name}", text, registry=registry, multiprocess_mode="livesum")
            for name, text in (
                ("inflight_requests", "Sequences sent to workers and not finished"),
                ("queued_requests", "Sequences waiting for their first place"),
                ("recovering_requests", "Sequences waiting for a new place"),
                ("event_loop_lag_seconds", "How late the last tick of the router was"),
            )
        }
        self._workers = Gauge(
            "baton_router_workers", "Workers seen by the router", ["role", "state"], registry=registry,
            multiprocess_mode="max",
        )  # fmt: skip
        self._gap_counts = [0] * (len(_TOKEN_BUCKETS) + 1)
        self._gap_sum = 0.0
        self._num_in = self._num_out = self._num_hits = 0

    # the hot path: plain numbers

    def gap(self, seconds: float) -> None:
        """Time since the previous delivery of a sequence."""
        self._gap_counts[bisect_left(_TOKEN_BUCKETS, seconds)] += 1
        self._gap_sum += seconds

    def output_tokens(self, count: int) -> None:
        """New output tokens of one worker step."""
        self._num_out += count

    def flush(self) -> None:
        """Move the collected numbers into the exported metrics."""
        if any(self._gap_counts):
            self._inter_token.observe_batch(self._gap_counts, self._gap_sum)
            self._gap_counts = [0] * len(self._gap_counts)
            self._gap_sum = 0.0
        for child, count in (
            (self._tokens.labels("in"), self._num_in),
            (self._tokens.labels("out"), self._num_out),
            (self._hits, self._num_hits),
        ):
            child.inc(count)
        self._num_in = self._num_out = self._num_hits = 0

    # once per request

    def prompt(self, num_tokens: int, num_cached: int) -> None:
        """A prompt was prefilled (its first attempt)."""
        self._num_in += num_tokens
        self._num_hits += num_cached

    def first_token(self, stages: Mapping[str, float]) -> None:
        """Stages of the time to first token, in seconds; their sum is the time to first token."""
        self._ttft.observe(sum(stages.values()))
        for name, seconds in stages.items():
            self._stages[name].observe(seconds)

    def finished(self, outcome: str, e2e_s: float, tpot_s: float | None) -> None:
        """A sequence ended; times only if it ran to its end."""
        self._requests.labels(outcome).inc()
        if outcome in ("stop", "length"):
            self._e2e.observe(e2e_s)
            if tpot_s is not None:
                self._tpot.observe(tpot_s)

    def handed_off(self, handoff_s: float, exposed_s: float, num_bytes: int) -> None:
        """A decode worker took a sequence over."""
        self._handoff.observe(handoff_s)
        self._exposed.observe(exposed_s)
        self._handoff_bytes.inc(num_bytes)

    def recovery(self, cause: str) -> None:
        """An attempt was given up and the request goes on elsewhere."""
        self._recoveries.labels(cause).inc()

    def refusal(self, reason: str) -> None:
        """A request was refused without being tried."""
        self._refusals.labels(reason).inc()

    def worker_lost(self, role: str, cause: str) -> None:
        """A worker was lost."""
        self._losses.labels(role, cause).inc()

    def http_response(self, route: str, status: int, seconds: float) -> None:
        """One finished HTTP exchange; `route` is a path template."""
        self._http.labels(route, str(status)).observe(seconds)

    # a few times a second, and on demand

    def gauge(self, name: str, value: float) -> None:
        """Set one of the unlabelled gauges, named without prefix."""
        self._gauges[name].set(value)

    def workers(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Workers by (role, state); a combination once reported must be reported again, with 0 if need be."""
        for (role, state), count in counts.items():
            self._workers.labels(role, state).set(count)

    def render(self) -> bytes:
        """The exposition in the Prometheus text format."""
        self.flush()
        if os.environ.get(MULTIPROC_ENV):
            merged = CollectorRegistry()
            MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
            return generate_latest(merged)
        return generate_latest(self.registry)
