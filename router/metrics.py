"""Prometheus metrics of a router process.

What happens per token and per request is collected in plain Python numbers and flushed a few times a second; what is
rarer is counted directly. With PROMETHEUS_MULTIPROC_DIR set, `render` merges all processes that share the directory.
"""

from __future__ import annotations

import collections
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

MULTIPROC_ENV = "PROMETHEUS_MULTIPROC_DIR"
STAGES = ("router", "recovery", "prefill_queue", "prefill_compute", "relay")
_GRID = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)
_LATENCY_BUCKETS = (*(round(step * 10.0**power, 6) for power in range(-3, 2) for step in _GRID), 100.0, 300.0)
_TOKEN_BUCKETS = (*(round(step * 10.0**power, 7) for power in range(-4, 1) for step in _GRID), 10.0, 60.0)
_HTTP_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class BatchHistogram(Histogram):
    """A histogram that takes in many observations at once."""

    def observe_batch(self, counts: Sequence[int], total: float) -> None:
        """Add `counts[i]` observations to bucket i (the last one is +Inf), `total` to the sum."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(total)


class Tally:
    """Observations on their way to a histogram: noting one costs a twentieth of observing it."""

    def __init__(self, histogram: BatchHistogram, bounds: Sequence[float]) -> None:
        self._histogram = histogram
        self._bounds = bounds
        self._values: list[float] = []
        self.add = self._values.append  # one observation

    def flush(self) -> None:
        """Hand over what has been collected."""
        values = self._values
        if values:
            values.sort()
            below = [bisect_right(values, bound) for bound in self._bounds]
            counts = [upper - lower for lower, upper in pairwise([0, *below, len(values)])]
            self._histogram.observe_batch(counts, sum(values))
            values.clear()


class RouterMetrics:
    """The metrics of one process, in a registry of their own. See docs/operations.md for what each one means."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._tallies: list[Tally] = []
        self._ttft = self._tally("baton_ttft_seconds", "Arrival of the HTTP request to the first chunk written")
        stage = BatchHistogram(
            "baton_ttft_stage_seconds",
            "Parts of the time to first token; they add up to it",
            ["stage"],
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self._stages = {name: Tally(stage.labels(name), _LATENCY_BUCKETS) for name in STAGES}
        self._tallies.extend(self._stages.values())
        self._tpot = self._tally(
            "baton_tpot_seconds", "Mean time per output token after the first, per request", _TOKEN_BUCKETS
        )
        self._inter_token = self._tally(
            "baton_inter_token_seconds", "Time between two deliveries of one sequence", _TOKEN_BUCKETS
        )
        self._e2e = self._tally("baton_e2e_seconds", "Arrival of the request to its last token")
        self._handoff = self._tally("baton_handoff_seconds", "Offer to verified commit")
        self._exposed = self._tally(
            "baton_handoff_exposed_seconds",
            "End of the last prefill kernel to the sequence being schedulable for decode",
        )
        self._handoff_bytes = Counter("baton_handoff_bytes", "KV bytes handed over", registry=registry)
        tokens = Counter("baton_tokens", "Prompt and output tokens served", ["direction"], registry=registry)
        self._tokens_in, self._tokens_out = tokens.labels("in"), tokens.labels("out")
        self._hits = Counter(
            "baton_prefix_hit_tokens", "Prompt tokens found in a cache", ["tier"], registry=registry
        ).labels("device")
        self._requests = Counter("baton_requests", "Sequences by how they ended", ["outcome"], registry=registry)
        self._recoveries = Counter("baton_recoveries", "Attempts started again elsewhere", ["cause"], registry=registry)
        self._refusals = Counter("baton_refusals", "Requests refused at the door", ["reason"], registry=registry)
        self._losses = Counter("baton_worker_losses", "Workers lost", ["role", "cause"], registry=registry)
        self._http_tallies: dict[tuple[str, int], Tally] = {}
        self._http = BatchHistogram(
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
        self._outcomes: collections.Counter[str] = collections.Counter()
        self._num_in = self._num_out = self._num_hits = self._num_bytes = 0

    # the hot path: plain numbers

    def gap(self, seconds: float) -> None:
        """Time since the previous delivery of a sequence."""
        self._inter_token.add(seconds)

    def output_tokens(self, count: int) -> None:
        """New output tokens of one worker step."""
        self._num_out += count

    def flush(self) -> None:
        """Move the collected numbers into the exported metrics."""
        for tally in self._tallies:
            tally.flush()
        for outcome, count in self._outcomes.items():
            self._requests.labels(outcome).inc(count)
        self._outcomes.clear()
        for child, count in (
            (self._tokens_in, self._num_in),
            (self._tokens_out, self._num_out),
            (self._hits, self._num_hits),
            (self._handoff_bytes, self._num_bytes),
        ):
            child.inc(count)
        self._num_in = self._num_out = self._num_hits = self._num_bytes = 0

    # once per request

    def prompt(self, num_tokens: int, num_cached: int) -> None:
        """A prompt was prefilled (its first attempt)."""
        self._num_in += num_tokens
        self._num_hits += num_cached

    def first_token(self, stages: Mapping[str, float]) -> None:
        """Stages of the time to first token, in seconds; their sum is the time to first token."""
        self._ttft.add(sum(stages.values()))
        for name, seconds in stages.items():
            self._stages[name].add(seconds)

    def finished(self, outcome: str, e2e_s: float, tpot_s: float | None) -> None:
        """A sequence ended; times only if it ran to its end."""
        self._outcomes[outcome] += 1
        if outcome in ("stop", "length"):
            self._e2e.add(e2e_s)
            if tpot_s is not None:
                self._tpot.add(tpot_s)

    def handed_off(self, handoff_s: float, exposed_s: float, num_bytes: int) -> None:
        """A decode worker took a sequence over."""
        self._handoff.add(handoff_s)
        self._exposed.add(exposed_s)
        self._num_bytes += num_bytes

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
        tally = self._http_tallies.get((route, status))
        if tally is None:
            tally = self._http_tallies[route, status] = Tally(self._http.labels(route, str(status)), _HTTP_BUCKETS)
            self._tallies.append(tally)
        tally.add(seconds)

    def _tally(self, name: str, text: str, buckets: Sequence[float] = _LATENCY_BUCKETS) -> Tally:
        tally = Tally(BatchHistogram(name, text, buckets=buckets, registry=self.registry), buckets)
        self._tallies.append(tally)
        return tally

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
