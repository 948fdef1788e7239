"""From /metrics of routers and workers to the signals of the scaling policy.

Counters and histograms are compared with the oldest scrape inside the window, process by process, so that a restarted
process, whose counters begin again, is no worse than a new one. A process that does not answer is left out.
"""

from __future__ import annotations

import asyncio
import socket
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from deploy.scaling_policy import Signals
from llm_engine.api.messages import Role, WorkerInfo

_TIMEOUT_S = 2.0
_PERCENTILE = 0.9
_WANTED = (
    "baton_ttft_seconds_bucket",
    "baton_tpot_seconds_bucket",
    "baton_ttft_stage_seconds_sum",
    "baton_queued_requests",
    "baton_step_seconds_sum",
    "baton_prefill_computed_tokens_total",
    "baton_waiting_tokens",
    "baton_running_sequences",
    "baton_pending_handoffs",
    "baton_blocks",
)
_IN_USE = ("live", "leased", "quarantined")

Sample = Mapping[tuple[str, str], float]  # (metric, value of its label or "") → value


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one process said. `role` None: a router."""

    sample: Sample
    role: Role | None = None
    max_seqs: int = 0


@dataclass(slots=True)
class Window:
    """Scrapes of the last `length_s` seconds, by address."""

    length_s: float
    _scrapes: deque[tuple[float, Mapping[str, Scrape]]] = field(default_factory=deque)

    def add(self, now: float, scrapes: Mapping[str, Scrape]) -> None:
        """The newest scrape of everybody. One that is older than the window stays, as its far end."""
        self._scrapes.append((now, scrapes))
        while len(self._scrapes) > 2 and now - self._scrapes[1][0] >= self.length_s:
            self._scrapes.popleft()

    def signals(self) -> Signals:
        """What the window shows; with fewer than two scrapes, nothing."""
        if len(self._scrapes) < 2 or self._scrapes[-1][0] <= self._scrapes[0][0]:
            return Signals()
        (since, old), (now, new) = self._scrapes[0], self._scrapes[-1]
        grown = {name: _grown(scrape, old.get(name)) for name, scrape in new.items()}
        routers = [grown[name] for name, scrape in new.items() if scrape.role is None]
        prefill = {name: scrape for name, scrape in new.items() if scrape.role is Role.PREFILL}
        decode = [scrape for scrape in new.values() if scrape.role is Role.DECODE]
        stages = _labelled(routers, "baton_ttft_stage_seconds_sum")
        queued = _gauge((scrape for scrape in new.values() if scrape.role is None), "baton_queued_requests")
        busy_s, recent_s = _busy_s(prefill, old), _busy_s(prefill, self._scrapes[-2][1])
        computed = sum(grown[name].get(("baton_prefill_computed_tokens_total", ""), 0.0) for name in prefill)
        waiting = _gauge(prefill.values(), "baton_waiting_tokens")
        running = _gauge(decode, "baton_running_sequences")
        pending = _gauge(decode, "baton_pending_handoffs")
        places = sum(scrape.max_seqs for scrape in decode)
        looks = [_decode_shares([s for s in scrapes.values() if s.role is Role.DECODE]) for _, scrapes in self._scrapes]
        shares = [share for share in looks if share is not None]
        per_request = computed / served if (served := _served(routers)) else 0.0
        return Signals(
            ttft_s=percentile(_labelled(routers, "baton_ttft_seconds_bucket"), _PERCENTILE),
            queue_share=stages.get("prefill_queue", 0.0) / sum(stages.values()) if sum(stages.values()) else 0.0,
            backlog_s=_backlog_s(waiting, computed, busy_s, len(prefill)),
            prefill_busy=_share(busy_s, now - since, len(prefill)),
            prefill_busy_now=_share(recent_s, now - self._scrapes[-2][0], len(prefill)) or 0.0,
            queued_s=_backlog_s(queued * per_request, computed, busy_s, len(prefill)) or 0.0,
            tpot_s=percentile(_labelled(routers, "baton_tpot_seconds_bucket"), _PERCENTILE),
            decode_kv=shares[-1][0] if looks[-1] else None,
            decode_kv_mean=sum(kv for kv, _ in shares) / len(shares) if shares else 0.0,
            decode_seqs=shares[-1][1] if looks[-1] else None,
            decode_seqs_mean=sum(seqs for _, seqs in shares) / len(shares) if shares else 0.0,
            queued_seqs=(pending + queued) / places if places else 0.0,
            seqs_per_decode=running / len(decode) if decode else 0.0,
        )


def percentile(buckets: Mapping[str, float], share: float) -> float | None:
    """Of a histogram's cumulative buckets (upper bound → count), as PromQL's histogram_quantile; None if empty."""
    bounds = sorted((float(bound), count) for bound, count in buckets.items())
    if not bounds or bounds[-1][1] <= 0:
        return None
    rank = share * bounds[-1][1]
    low, below = 0.0, 0.0
    for bound, count in bounds:
        if count >= rank:
            if bound == float("inf"):
                return low
            return low + (bound - low) * ((rank - below) / (count - below) if count > below else 1.0)
        low, below = bound, count
    return low


def parse(text: str) -> Sample:
    """The metrics that matter here. Each has at most one label of interest."""
    sample: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for entry in family.samples:
            if entry.name in _WANTED:
                labels = entry.labels
                label = labels.get("le") or labels.get("stage") or labels.get("state") or labels.get("kind") or ""
                sample[entry.name, label] = sample.get((entry.name, label), 0.0) + entry.value
    return sample


class Scraper:
    """Asks every process once a round, side by side."""

    def __init__(self) -> None:
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    async def scrape(self, routers: Sequence[str], workers: Iterable[WorkerInfo]) -> dict[str, Scrape]:
        """`routers`: URLs of /metrics; a name with several addresses stands for a router behind each."""
        known = {info.metrics_addr: info for info in workers}
        addresses = [found for url in routers for found in await asyncio.to_thread(resolve, url)]
        urls = [*addresses, *known]
        texts = await asyncio.gather(*(asyncio.to_thread(self._get, url) for url in urls))
        scrapes: dict[str, Scrape] = {}
        for url, text in zip(urls, texts, strict=True):
            if text is not None:
                info = known.get(url)
                scrapes[url] = Scrape(parse(text), info.role if info else None, info.max_num_seqs if info else 0)
        return scrapes

    def _get(self, url: str) -> str | None:
        try:
            with self._opener.open(url, timeout=_TIMEOUT_S) as response:
                return str(response.read().decode())
        except (OSError, ValueError):
            return None


def resolve(url: str) -> list[str]:
    """The URL once per address of its host: a headless service names many."""
    parts = urllib.parse.urlsplit(url)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError:
        return []
    hosts = sorted({str(entry[4][0]) for entry in found})
    return [f"http://{f'[{h}]' if ':' in h else h}:{parts.port or 80}{parts.path}" for h in hosts]


def _grown(scrape: Scrape, before: Scrape | None) -> dict[tuple[str, str], float]:
    """By how much each number grew; a smaller one belongs to a new process and counts as a whole."""
    if before is None:
        return dict(scrape.sample)
    old = before.sample
    return {
        key: value - old.get(key, 0.0) if value >= old.get(key, 0.0) else value for key, value in scrape.sample.items()
    }


def _labelled(samples: Iterable[Mapping[tuple[str, str], float]], metric: str) -> dict[str, float]:
    """Sums over processes, by label."""
    sums: dict[str, float] = {}
    for sample in samples:
        for (name, label), value in sample.items():
            if name == metric:
                sums[label] = sums.get(label, 0.0) + value
    return sums


def _busy_s(workers: Mapping[str, Scrape], before: Mapping[str, Scrape]) -> float:
    """Seconds that these workers computed since an earlier scrape."""
    grown = (_grown(scrape, before.get(name)) for name, scrape in workers.items())
    return sum(_labelled(grown, "baton_step_seconds_sum").values())


def _share(busy_s: float, seconds: float, workers: int) -> float | None:
    """Of the time of so many workers; None without any."""
    return min(1.0, busy_s / (seconds * workers)) if workers and seconds > 0 else None


def _served(routers: Iterable[Mapping[tuple[str, str], float]]) -> float:
    """Requests that got their first token."""
    return _labelled(routers, "baton_ttft_seconds_bucket").get("+Inf", 0.0)


def _backlog_s(waiting: float, computed: float, busy_s: float, workers: int) -> float | None:
    """Seconds of work that wait; None while the speed of the pool is unknown."""
    if not workers:
        return None
    if waiting == 0:
        return 0.0
    return waiting * busy_s / (computed * workers) if computed > 0 and busy_s > 0 else None


def _decode_shares(decode: Sequence[Scrape]) -> tuple[float, float] | None:
    """Of KV blocks in use, and of places taken; None when no worker said so."""
    blocks = _labelled((scrape.sample for scrape in decode), "baton_blocks")
    total, places = sum(blocks.values()), sum(scrape.max_seqs for scrape in decode)
    if not total or not places:
        return None
    in_use = sum(blocks.get(state, 0.0) for state in _IN_USE)
    return in_use / total, _gauge(decode, "baton_running_sequences") / places


def _gauge(scrapes: Iterable[Scrape], metric: str) -> float:
    """The sum over processes of a metric without labels."""
    return sum(scrape.sample.get((metric, ""), 0.0) for scrape in scrapes)
