"""Workers as processes, without router and Ray: the same tokens however they are made, and nothing left over."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.processes import ProcessCluster
from llm_engine.api.config import SECRET_ENV
from llm_engine.api.messages import Cancel, Drain, KvSnapshot, SnapshotRequest
from llm_engine.api.request import FinishReason
from llm_engine.ops.load import load_ops
from tests.e2e.mini_router import MiniRouter, answers, prompts

PREFILL, DECODE = "prefill-0", "decode-0"


@pytest.fixture(scope="module")
def pair(nano_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    """`PREFILL` and `DECODE` are left as they were by every test; those that end a worker have one of their own."""
    config: dict[str, Any] = {
        "model.path": str(nano_dir),
        "model.name": "baton",
        "engine.num_drafts": 1,
        "kv.memory_mb": 32,
        "scheduler.max_step_tokens": 64,
        "worker.heartbeat_s": 0.1,
        "worker.drain_timeout_s": 4.0,
    }
    load_ops("cpu")  # compiles what is not compiled yet, once: the processes find it
    with ProcessCluster(tmp_path_factory.mktemp("workers"), config, prefill=2, decode=4, router=False) as cluster:
        yield cluster


@asynccontextmanager
async def routing(cluster: ProcessCluster, *names: str) -> AsyncIterator[MiniRouter]:
    """A router that knows these workers; by default all of them."""
    async with MiniRouter(cluster.env[SECRET_ENV].encode()) as router:
        for name in names or cluster.infos:
            await router.connect(name, cluster.infos[name]["request_addr"])
        yield router


async def test_a_continuation_has_the_same_tokens(pair: ProcessCluster) -> None:
    """A later attempt starts from prompt and emitted tokens; so does the router after a loss."""
    async with routing(pair, PREFILL, DECODE) as router:
        whole = router.stream(prompts(1)[0], max_tokens=24, temperature=1.0, seed=3)
        await router.submit(whole, PREFILL, DECODE)
        await router.finished(whole)
        part = router.stream(whole.prompt, max_tokens=24, temperature=1.0, seed=3)
        part.tokens, part.attempt = whole.tokens[:9], 4
        await router.submit(part, PREFILL, DECODE)
        await router.finished(part)
        assert part.tokens == whole.tokens
        assert len(part.sent) == 15


# -- requests that end early ------------------------------------------------------------------------------------------


async def test_one_token_needs_no_decode_worker(pair: ProcessCluster) -> None:
    async with routing(pair, PREFILL, DECODE) as router:
        stream = router.stream(prompts(1)[0], max_tokens=1)
        await router.submit(stream, PREFILL, DECODE)
        await router.finished(stream)
        assert (len(stream.tokens), stream.finish, stream.started) == (1, FinishReason.LENGTH, [])
        await router.clean(PREFILL, DECODE)


async def test_a_cancelled_request_leaves_nothing_behind_at_any_stage(pair: ProcessCluster) -> None:
    async with routing(pair, PREFILL, DECODE) as router:
        for stage in range(4):
            stream = router.stream(prompts(9)[stage] * 4, max_tokens=2000, seed=stage)
            await router.submit(stream, PREFILL, DECODE)
            if stage:
                await router.until(lambda stream=stream, stage=stage: len(stream.tokens) > (stage - 1) * 10)
            await router.cancel(stream, PREFILL, DECODE)
            await router.clean(PREFILL, DECODE)
            assert not stream.finish
            # The decode worker's revocation may reach the prefill worker before the router's own cancel does.
            assert all(failure.code == "handoff" for failure in stream.failures)


async def test_a_prefill_worker_withdraws_what_is_cancelled_while_it_computes(pair: ProcessCluster) -> None:
    async with routing(pair, PREFILL, DECODE) as router:
        stream = router.stream(prompts(1, longest=400)[0] * 12, max_tokens=5)
        await router.submit(stream, PREFILL, DECODE)
        await router.until(lambda: router.loads[DECODE].blocks_leased > 0)
        await router.cancel(stream, PREFILL)
        await router.clean(PREFILL, DECODE, timeout_s=5.0)
        assert stream.tokens == []


async def test_a_request_cancelled_before_its_offer_is_not_taken(pair: ProcessCluster) -> None:
    async with routing(pair, PREFILL, DECODE) as router:
        stream = router.stream(prompts(1)[0], max_tokens=5)
        await router.send(DECODE, Cancel(request_id=stream.request_id, attempt=0))
        await router.submit(stream, PREFILL, DECODE)
        failure = await router.failed(stream)
        assert (failure.code, failure.retryable) == ("handoff", True)
        await router.persist(stream, PREFILL, DECODE)
        assert len(stream.tokens) == 5
        await router.clean(PREFILL, DECODE)


async def test_a_deadline_ends_a_request_on_its_worker(pair: ProcessCluster) -> None:
    async with routing(pair, PREFILL, DECODE) as router:
        stream = router.stream(prompts(1)[0], max_tokens=4000)
        await router.submit(stream, PREFILL, DECODE, deadline_s=0.5)
        await router.finished(stream)
        assert stream.finish is FinishReason.DEADLINE
        assert 0 < len(stream.tokens) < 4000
        await router.clean(PREFILL, DECODE)


async def test_the_streams_of_a_router_that_vanishes_end(pair: ProcessCluster) -> None:
    async with routing(pair, PREFILL, DECODE) as watcher:
        async with routing(pair, PREFILL, DECODE) as router:
            stream = router.stream(prompts(1)[0], max_tokens=4000)
            await router.submit(stream, PREFILL, DECODE)
            await router.until(lambda: len(stream.tokens) > 5)
        await watcher.clean(PREFILL, DECODE)


@pytest.mark.parametrize(
    ("tokens", "to", "decode", "code"),
    [
        ([5] * 9000, PREFILL, DECODE, "too_long"),
        ([5, -1], PREFILL, DECODE, "invalid"),
        ([5, 100_000], PREFILL, DECODE, "invalid"),
        ([5, 6], PREFILL, None, "invalid"),
        ([5, 6], DECODE, DECODE, "invalid"),
    ],
    ids=["too-long", "negative", "beyond-vocabulary", "no-decode-worker", "wrong-pool"],
)
async def test_a_request_that_cannot_be_served_is_refused_for_good(
    tokens: list[int], to: str, decode: str | None, code: str, pair: ProcessCluster
) -> None:
    async with routing(pair, PREFILL, DECODE) as router:
        stream = router.stream(tokens, max_tokens=5)
        await router.submit(stream, to, decode)
        failure = await router.failed(stream)
        assert (failure.code, failure.retryable) == (code, False)
        await router.clean(PREFILL, DECODE)


# -- what routers and operators see -----------------------------------------------------------------------------------


async def test_events_and_snapshot_tell_the_same_prefix_cache(pair: ProcessCluster) -> None:
    async with routing(pair, PREFILL, DECODE) as router:
        await router.send(PREFILL, SnapshotRequest())
        streams = await answers(router, PREFILL, DECODE, at_once=True)
        assert streams
        await router.send(PREFILL, SnapshotRequest())
        await router.until(lambda: sum(isinstance(e, KvSnapshot) for e in router.events.get(PREFILL, [])) == 2)
        known: set[bytes] = set()
        seq = -1
        for event in router.events[PREFILL]:
            if isinstance(event, KvSnapshot):
                assert seq in (-1, event.seq)
                assert seq == -1 or known == set(event.digests)
                known, seq = set(event.digests), event.seq
            elif seq >= 0:
                assert event.seq == seq + 1
                known, seq = (known | set(event.stored)) - set(event.removed), event.seq
        assert known


async def test_metrics_and_probes_tell_what_happened(pair: ProcessCluster) -> None:
    before = {name: metrics(pair, name) for name in (PREFILL, DECODE)}
    async with routing(pair, PREFILL, DECODE) as router:
        streams = await answers(router, PREFILL, DECODE, at_once=True)
        await router.clean(PREFILL, DECODE)
    prefill, decode = ({k: v - before[n].get(k, 0.0) for k, v in metrics(pair, n).items()} for n in (PREFILL, DECODE))
    num_prompt = sum(len(s.prompt) for s in streams)
    assert prefill["baton_tokens_total/in"] == num_prompt
    assert prefill["baton_tokens_total/out"] == len(streams)
    assert decode["baton_tokens_total/out"] == sum(len(s.tokens) - 1 for s in streams)
    hits = prefill["baton_prefix_hit_tokens_total/device"]
    assert prefill["baton_prefill_computed_tokens_total/"] + hits == num_prompt
    assert decode["baton_handoff_seconds_count/"] == len(streams)
    assert decode["baton_handoff_exposed_seconds_count/"] == len(streams)
    assert decode["baton_handoff_bytes_total/"] == sum(s.started[0].num_bytes for s in streams)
    assert 0 < decode["baton_accepted_tokens_total/0"] <= decode["baton_draft_tokens_total/0"]
    for name in (PREFILL, DECODE):
        assert get(pair, name, "/health").status_code == 200
        assert get(pair, name, "/ready").status_code == 200


def get(cluster: ProcessCluster, name: str, path: str) -> httpx.Response:
    address: str = cluster.infos[name]["metrics_addr"]
    return httpx.get(address.removesuffix("/metrics") + path, trust_env=False)


def metrics(cluster: ProcessCluster, name: str) -> dict[str, float]:
    """Samples as name/first label value."""
    text = get(cluster, name, "/metrics").text
    return {
        f"{sample.name}/{next(iter(sample.labels.values()), '')}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# -- leaving ----------------------------------------------------------------------------------------------------------


async def test_a_drained_worker_finishes_its_streams_and_exits_with_0(pair: ProcessCluster) -> None:
    async with routing(pair, "prefill-1", "decode-1") as router:
        running = [router.stream(prompt, max_tokens=60) for prompt in prompts(4)]
        for stream in running:
            await router.submit(stream, "prefill-1", "decode-1")
        await router.until(lambda: all(len(s.tokens) > 2 for s in running))
        for name in ("decode-1", "prefill-1"):
            pair.kill(name, signal.SIGTERM)
        await router.until(lambda: router.loads["decode-1"].draining and router.loads["prefill-1"].draining)
        await router.finished(*running)
        assert all(len(s.tokens) == 60 for s in running)
        assert [pair.children[name].process.wait(10) for name in ("decode-1", "prefill-1")] == [0, 0]


async def test_a_drain_that_takes_too_long_hands_running_streams_back(pair: ProcessCluster) -> None:
    async with routing(pair, PREFILL, "decode-2") as router:
        stream = router.stream(prompts(1)[0], max_tokens=4900)
        await router.submit(stream, PREFILL, "decode-2")
        await router.until(lambda: len(stream.tokens) > 5)
        pair.kill("decode-2", signal.SIGTERM)
        failure = await router.failed(stream)
        assert (failure.code, failure.retryable) == ("draining", True)
        assert pair.children["decode-2"].process.wait(10) == 0
        await router.clean(PREFILL)


async def test_an_interrupt_leaves_at_once_and_tells_the_router(pair: ProcessCluster) -> None:
    async with routing(pair, PREFILL, "decode-3") as router:
        stream = router.stream(prompts(1)[0], max_tokens=4900)
        await router.submit(stream, PREFILL, "decode-3")
        await router.until(lambda: len(stream.tokens) > 5)
        pair.kill("decode-3", signal.SIGINT)
        assert (await router.failed(stream)).retryable
        assert pair.children["decode-3"].process.wait(5) == 130


async def test_a_draining_worker_hands_new_work_back(pair: ProcessCluster) -> None:
    async with routing(pair, PREFILL, DECODE) as router:
        await router.send(DECODE, Drain())
        await router.until(lambda: router.loads[DECODE].draining)
        refused = router.stream(prompts(1)[0], max_tokens=5)
        await router.submit(refused, PREFILL, DECODE)
        failure = await router.failed(refused)
        assert (failure.code, failure.retryable) == ("handoff", True)
        await router.send(PREFILL, Drain())
        late = router.stream(prompts(1)[0], max_tokens=5)
        await router.submit(late, PREFILL, DECODE)
        failure = await router.failed(late)
        assert (failure.code, failure.retryable) == ("draining", True)
        assert get(pair, PREFILL, "/ready").text == "draining\n"
