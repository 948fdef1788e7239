from __future__ import annotations

import asyncio
import contextlib
import http.server
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from deploy.autoscaler import Autoscaler
from deploy.desired import Desired
from deploy.pools import Pools
from deploy.scaling_policy import Signals
from deploy.scaling_signals import Scrape, Scraper, Window, parse, percentile
from llm_engine.api.config import AutoscalerConfig, PoolConfig, PoolsConfig
from llm_engine.api.errors import ServingError
from llm_engine.api.messages import Role, WorkerInfo
from router.metrics import RouterMetrics

STAGES = {"router": 0.1, "recovery": 0.0, "prefill_queue": 3.0, "prefill_compute": 0.8, "relay": 0.1}


class Store:
    """A DesiredStore that may be away."""

    def __init__(self) -> None:
        self.saved: list[Desired] = []
        self.away = False

    def desired(self) -> Desired | None:
        return self.saved[-1] if self.saved else None

    def save(self, desired: Desired) -> None:
        if self.away:
            raise ServingError("the store is away")
        self.saved.append(desired)


class Site:
    """Processes that answer /metrics on loopback with what the test says. The fleet as the autoscaler sees it."""

    def __init__(self) -> None:
        self.texts: dict[str, bytes] = {}
        self.infos: list[WorkerInfo] = []
        texts = self.texts

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = texts.get(self.path)
                self.send_response(200 if body is not None else 503)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()

    def members(self) -> Sequence[WorkerInfo]:
        return self.infos

    def ready(self, pool: str) -> int:
        return sum(info.role.value == pool for info in self.infos)

    def worker(self, role: Role, number: int, text: str) -> None:
        name = f"{role}-{number}"
        self.texts[f"/{name}"] = text.encode()
        if all(info.name != name for info in self.infos):
            self.infos.append(
                WorkerInfo(
                    name=name, role=role, incarnation="i", pid=1, request_addr="", control_addr="",
                    metrics_addr=f"{self.url}/{name}", model="m", format_id="f", weight_version="w", block_tokens=16,
                    num_blocks=100, max_model_len=64, max_num_seqs=10,
                )
            )  # fmt: skip


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


def prefill_text(*, busy_s: float, computed: float, waiting: float) -> str:
    return (
        f'baton_step_seconds_sum{{kind="prefill"}} {busy_s}\nbaton_prefill_computed_tokens_total {computed}\n'
        f"baton_waiting_tokens {waiting}\n"
    )


def decode_text(*, live: int, running: int) -> str:
    blocks = f'baton_blocks{{state="free"}} {100 - live}\nbaton_blocks{{state="live"}} {live}\n'
    return f"{blocks}baton_running_sequences {running}\n"


def load(site: Site, *, at: float, waiting: float = 0.0, live: int = 10, running: int = 2, busy: float = 0.5) -> None:
    """What the processes would say at a time of their lives."""
    site.worker(Role.PREFILL, 0, prefill_text(busy_s=busy * at, computed=1000 * busy * at, waiting=waiting))
    site.worker(Role.DECODE, 0, decode_text(live=live, running=running))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(site: Site, store: Store, clock: Clock, pools: PoolsConfig | None = None, **settings: Any) -> Autoscaler:
    config = AutoscalerConfig(**{"mode": "act", "up_after_s": 10.0, "window_s": 20.0, **settings})
    return Autoscaler(config, Pools(pools or PoolsConfig(), store), site, lambda: f"{site.url}/router", clock)


async def looks(scaler: Autoscaler, site: Site, clock: Clock, times: Sequence[float], **what: Any) -> dict[str, int]:
    for at in times:
        clock.now = at
        load(site, at=at, **what)
        decision = await scaler.look()
    return dict(decision.sizes)


async def test_a_backlog_is_measured_decided_and_written_with_its_reason(site: Site) -> None:
    store, clock = Store(), Clock()
    scaler = make(site, store, clock)
    assert await looks(scaler, site, clock, [0.0, 10.0], waiting=5000) == {"prefill": 1, "decode": 1}
    assert await looks(scaler, site, clock, [20.0], waiting=5000) == {"prefill": 2, "decode": 1}
    (saved,) = store.saved
    assert saved.replicas == {"prefill": 2, "decode": 1, "aggregated": 0}
    (change,) = saved.changes
    assert (change.pool, change.before, change.after, change.by) == ("prefill", 1, 2, "autoscaler")
    assert change.reason == "prefill backlog 5 s (target 1 s)"


async def test_a_dry_run_recommends_and_changes_nothing(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    store, clock = Store(), Clock()
    scaler = make(site, store, clock, mode="recommend")
    assert await looks(scaler, site, clock, [0.0, 10.0, 20.0, 30.0], live=99, running=10) == {"prefill": 1, "decode": 2}
    assert store.saved == []
    said = [line for line in caplog.messages if "recommended, not carried out" in line]
    assert said == ["autoscaler: recommended, not carried out: decode 1 → 2: decode KV 99% in use (target 80%)"]


async def test_a_bound_of_the_pool_holds(site: Site) -> None:
    pools = PoolsConfig(prefill=PoolConfig(replicas=1, max_replicas=1))
    store, clock = Store(), Clock()
    assert (await looks(make(site, store, clock, pools), site, clock, [0.0, 10.0, 30.0], waiting=9e4))["prefill"] == 1
    assert store.saved == []


async def test_cards_of_other_pools_count(site: Site) -> None:
    pools = PoolsConfig(aggregated=PoolConfig(replicas=1, cards=2))
    store, clock = Store(), Clock()
    scaler = make(site, store, clock, pools, max_cards=4)
    assert (await looks(scaler, site, clock, [0.0, 10.0, 30.0], waiting=9e4))["prefill"] == 1
    assert (await looks(make(site, store, clock, pools, max_cards=5), site, clock, [40.0, 50.0, 70.0], waiting=9e4))[
        "prefill"
    ] == 2


async def test_processes_that_do_not_answer_change_nothing(site: Site) -> None:
    store, clock = Store(), Clock()
    scaler = make(
        site, store, clock, down_after_s=0.0, cooldown_s=0.0, pools=PoolsConfig(decode=PoolConfig(replicas=3))
    )
    for at in (0.0, 100.0, 200.0):
        clock.now = at
        load(site, at=at)
        site.texts.clear()
        await scaler.look()
    assert store.saved == []


async def test_a_store_that_is_away_stops_one_decision_and_not_the_loop(site: Site) -> None:
    store, clock = Store(), Clock()
    scaler = make(site, store, clock, period_s=0.01, up_after_s=0.0)
    store.away = True
    load(site, at=1.0, waiting=5000)
    task = asyncio.create_task(scaler.run())

    async def advance(until_saved: bool) -> None:
        async with asyncio.timeout(10.0):
            rounds = 0
            while (not store.saved) if until_saved else rounds < 20:
                rounds += 1
                clock.now += 5.0
                load(site, at=clock.now, waiting=5000)
                await asyncio.sleep(0.02)

    await advance(until_saved=False)
    assert not task.done()
    store.away = False
    await advance(until_saved=True)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert store.saved[0].replicas["prefill"] == 2


def test_the_routers_own_metrics_become_signals() -> None:
    metrics = RouterMetrics()
    window = Window(30.0)
    window.add(0.0, {"r": Scrape(parse(metrics.render().decode()))})
    for _ in range(10):
        metrics.first_token(STAGES)
        metrics.finished("stop", 5.0, 0.03)
    metrics.gauge("queued_requests", 3)
    window.add(10.0, {"r": Scrape(parse(metrics.render().decode()))})
    signals = window.signals()
    assert signals.queue_share == pytest.approx(0.75)
    assert signals.ttft_s == pytest.approx(4.0, rel=0.3)
    assert signals.tpot_s == pytest.approx(0.03, rel=0.4)
    assert signals.backlog_s is None, "no prefill worker was seen"


def router_text(*, queued: int, first_tokens: int) -> str:
    return f'baton_queued_requests {queued}\nbaton_ttft_seconds_bucket{{le="+Inf"}} {first_tokens}\n'


def test_queued_requests_become_seconds_of_prefill_and_shares_of_decode_places() -> None:
    window = Window(30.0)
    for at, busy, first, running in ((0.0, 0.0, 0, 1), (10.0, 2.0, 20, 1), (12.0, 4.0, 40, 4)):
        prefill = prefill_text(busy_s=busy, computed=1000 * busy, waiting=500)
        decode = f"{decode_text(live=10, running=running)}baton_pending_handoffs 2\n"
        window.add(
            at,
            {
                "r": Scrape(parse(router_text(queued=6, first_tokens=first))),
                "p": Scrape(parse(prefill), Role.PREFILL, 10),
                "d": Scrape(parse(decode), Role.DECODE, 10),
            },
        )
    signals = window.signals()
    assert signals.prefill_busy == pytest.approx(4.0 / 12.0)
    assert signals.prefill_busy_now == pytest.approx(1.0), "of the time since the last look"
    assert signals.backlog_s == pytest.approx(0.5)
    assert signals.queued_s == pytest.approx(0.6), "6 requests of 100 tokens at 1000 tokens a second"
    assert signals.decode_seqs == pytest.approx(0.4)
    assert signals.queued_seqs == pytest.approx(0.8)
    assert signals.decode_seqs_mean == pytest.approx(0.2), "a peak at the last look is not the rule"


def test_a_restarted_process_counts_from_zero_and_old_scrapes_leave_the_window() -> None:
    window = Window(20.0)
    for at, busy in ((0.0, 100.0), (10.0, 105.0), (20.0, 5.0)):
        text = prefill_text(busy_s=busy, computed=busy * 10, waiting=0)
        window.add(at, {"p": Scrape(parse(text), Role.PREFILL, 10)})
    assert window.signals().prefill_busy == pytest.approx(5.0 / 20.0)
    for at in (30.0, 40.0):
        text = prefill_text(busy_s=at - 15, computed=10, waiting=0)
        window.add(at, {"p": Scrape(parse(text), Role.PREFILL, 10)})
    assert window.signals().prefill_busy == pytest.approx(1.0)
    assert Window(20.0).signals() == Signals()


@given(st.lists(st.floats(0.001, 50), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_percentile_lies_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    bounds = [0.01, 0.1, 1.0, 10.0, 100.0]
    registry = CollectorRegistry()
    histogram = Histogram("baton_ttft_seconds", "", buckets=bounds, registry=registry)
    for value in values:
        histogram.observe(value)
    sample = parse(generate_latest(registry).decode())
    found = percentile({label: value for (_, label), value in sample.items()}, share)
    true = sorted(values)[math.ceil(share * len(values) - 1e-9) - 1]
    low = max((b for b in [0.0, *bounds] if b < true), default=0.0)
    assert found is not None
    assert low <= found <= min(b for b in bounds if b >= true)


def test_a_percentile_of_nothing_is_nothing() -> None:
    assert percentile({}, 0.9) is None
    assert percentile({"1.0": 0.0, "+Inf": 0.0}, 0.9) is None
    assert percentile({"1.0": 0.0, "+Inf": 4.0}, 0.9) == 1.0


async def test_a_name_with_several_addresses_is_several_routers(site: Site) -> None:
    site.texts["/metrics"] = b"baton_queued_requests 1\n"
    found = await Scraper().scrape([f"http://localhost:{site.server.server_port}/metrics"], [])
    assert [scrape.sample for scrape in found.values()] == [{("baton_queued_requests", ""): 1.0}]
