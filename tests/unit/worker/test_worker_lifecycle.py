"""Whole workers inside the test's own process: real engines and sockets, and faults that only the inside can cause."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from decode_worker.aggregated import AggregatedWorker
from decode_worker.worker import DecodeWorker
from llm_engine.api.config import SECRET_ENV, ClusterConfig, build
from llm_engine.api.errors import ConfigError
from llm_engine.api.messages import PROTOCOL_VERSION, Hello
from prefill_worker.worker import PrefillWorker
from tests.e2e.mini_router import MiniRouter, Stream
from tests.unit.worker.in_process import SECRET, serving


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_ENV, SECRET)


@pytest.fixture
def config(nano_dir: Path) -> ClusterConfig:
    return config_of(nano_dir)


def config_of(model: Path, **sections: dict[str, Any]) -> ClusterConfig:
    tree: dict[str, Any] = {
        "model": {"path": str(model)},
        "kv": {"memory_mb": 8},
        "worker": {"heartbeat_s": 0.05, "stall_timeout_s": 0.3},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return build(tree)


async def test_a_pair_serves_within_one_process(config: ClusterConfig) -> None:
    async with serving(PrefillWorker.build(config, "p"), DecodeWorker.build(config, "d")) as router:
        stream = router.stream([7, 8, 9] * 20, max_tokens=10)
        await router.submit(stream, "p", "d")
        await router.finished(stream)
        assert len(stream.tokens) == 10
        await router.clean("p", "d")


async def test_an_engine_that_fails_takes_the_worker_down_and_the_router_hears_of_it(config: ClusterConfig) -> None:
    worker = AggregatedWorker.build(config, "a")
    info = await worker.start()
    serve = asyncio.create_task(worker.serve())
    async with MiniRouter(SECRET.encode()) as router:
        await router.connect("a", info.request_addr)
        stream = router.stream([7, 8, 9], max_tokens=4000)
        await router.submit(stream, "a")
        await router.until(lambda: len(stream.tokens) > 2)
        worker._steps.post(lambda engine: engine.release_sent(object()))  # type: ignore[arg-type]
        failure = await router.failed(stream)
        assert (failure.code, failure.retryable) == ("internal", True)
        with pytest.raises(AttributeError):
            await serve
    assert worker._vitals.trouble() == "the step loop has ended"


async def test_a_step_that_hangs_makes_the_worker_unhealthy_while_heartbeats_go_on(config: ClusterConfig) -> None:
    release = threading.Event()
    worker = AggregatedWorker.build(config, "a")
    try:
        async with serving(worker) as router:
            health = worker.info.metrics_addr.removesuffix("/metrics") + "/health"
            assert (await fetch(health)).status_code == 200
            seen = router.loads["a"].seq
            worker._steps.post(lambda engine: release.wait(20.0))
            await router.until(lambda: not router.loads["a"].healthy)
            assert router.loads["a"].step_age_s > 0.3
            assert router.loads["a"].seq >= seen + 4
            answer = await fetch(health)
            assert answer.status_code == 503
            assert answer.text.startswith("the step loop made no progress for 0.")
            release.set()
            await router.until(lambda: router.loads["a"].healthy)
    finally:
        release.set()


async def test_heartbeats_are_not_starved_by_compute(nano_dir: Path) -> None:
    worker = AggregatedWorker.build(config_of(nano_dir, scheduler={"max_step_tokens": 4096}), "a")
    async with serving(worker) as router:
        long = [router.stream([5] * 4000, max_tokens=2)]
        for stream in long:
            await router.submit(stream, "a")
        await router.until(lambda: router.loads["a"].num_running > 0 or router.loads["a"].step_age_s > 0)
        arrivals = []
        while len(arrivals) < 8 and not long[-1].finish:
            seen = router.loads["a"].seq
            await router.until(lambda seen=seen: router.loads["a"].seq > seen)  # type: ignore[misc]
            arrivals.append(time.monotonic())
        gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
        assert gaps, "the prompts were computed before a heartbeat was due"
        assert max(gaps) < 1.0  # the period is 0.05 s
        await router.finished(*long)


async def test_a_full_queue_is_refused_with_a_reason(nano_dir: Path) -> None:
    worker = AggregatedWorker.build(config_of(nano_dir, scheduler={"max_waiting": 1, "max_num_seqs": 1}), "a")
    async with serving(worker) as router:
        streams = [router.stream([5 + n] * 40, max_tokens=4900) for n in range(6)]
        for stream in streams:
            await router.submit(stream, "a")
        await router.until(lambda: any(s.failed for s in streams))
        refused = [s.failures[0] for s in streams if s.failed]
        assert {(f.code, f.retryable) for f in refused} == {("full", True)}
        for stream in streams:
            await router.cancel(stream, "a")
        await router.clean("a", timeout_s=5.0)  # far less than the tokens would take


async def test_streams_of_a_router_that_fell_behind_fail_without_a_gap(config: ClusterConfig) -> None:
    """The worker drops a router that does not read; tokens between that and its next Hello must not be missing."""
    worker = AggregatedWorker.build(config, "a")
    async with serving(worker) as router:
        stream = router.stream([7, 8, 9], max_tokens=200)
        await router.submit(stream, "a")
        await router.until(lambda: len(stream.tokens) > 5)
        route = worker._plane._routers.route(router.router_id)
        assert route is not None
        worker._plane._lose(router.router_id, "slow")
        worker._plane._hello(Hello(version=PROTOCOL_VERSION, router_id=router.router_id), route)
        failure = await router.failed(stream)  # owed, and paid at the next Hello, here at once
        assert (failure.code, failure.retryable) == ("router", True)
        await router.clean("a")
        await router.persist(stream, "a")
        assert len(stream.tokens) == 200


async def test_a_decode_worker_short_of_blocks_hands_sequences_back_and_loses_nothing(nano_dir: Path) -> None:
    small = config_of(nano_dir, kv={"num_blocks": 14}, transfer={"grant_timeout_s": 20.0})
    roomy = config_of(nano_dir)
    prompts = [[10 * n + i % 7 for i in range(30)] for n in range(1, 5)]

    def streams(router: MiniRouter) -> list[Stream]:
        return [router.stream(prompt, max_tokens=70, temperature=1.0, seed=n) for n, prompt in enumerate(prompts)]

    async with serving(AggregatedWorker.build(roomy, "a")) as router:
        expected = streams(router)
        for stream in expected:
            await router.persist(stream, "a")
    async with serving(PrefillWorker.build(roomy, "p"), DecodeWorker.build(small, "d")) as router:
        crowded = streams(router)
        await asyncio.gather(*(router.persist(stream, "p", "d") for stream in crowded))
        assert [s.tokens for s in crowded] == [s.tokens for s in expected]
        assert "preempted" in {failure.code for s in crowded for failure in s.failures}
        await router.clean("p", "d")


async def test_more_requests_than_handoffs_may_be_under_way_wait_their_turn(nano_dir: Path) -> None:
    config = config_of(nano_dir, transfer={"max_pending": 2})
    async with serving(PrefillWorker.build(config, "p"), DecodeWorker.build(config, "d")) as router:
        streams = [router.stream([n, n + 1, n + 2] * 9, max_tokens=6) for n in range(12)]
        for stream in streams:
            await router.submit(stream, "p", "d")
        await router.finished(*streams)
        assert all(len(s.tokens) == 6 for s in streams)
        await router.clean("p", "d")


async def test_stop_works_from_any_thread_and_twice(config: ClusterConfig) -> None:
    worker = AggregatedWorker.build(config, "a")
    await worker.start()
    serve = asyncio.create_task(worker.serve())
    for _ in range(2):
        await asyncio.to_thread(worker.stop, drain_s=5.0)
    await asyncio.wait_for(serve, 5.0)
    worker.stop()


async def test_a_port_that_was_taken_meanwhile_is_one_clear_error(nano_dir: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sockets = num_sockets()
    worker = DecodeWorker.build(config_of(nano_dir, worker={"metrics_port": port}), "d")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ConfigError, match=rf"worker\.metrics_port={port}"):
            await worker.serve()
    assert num_sockets() <= sockets


def num_sockets() -> int:
    """Open sockets and event descriptors of this process."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor that lists the directory
            links.append(os.readlink(entry))
    return sum(link.startswith(("socket:", "anon_inode:")) for link in links)


async def fetch(url: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False, timeout=10.0) as http:
        return await http.get(url)
