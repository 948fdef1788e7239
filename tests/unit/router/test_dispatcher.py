"""Requests through a dispatcher and fake workers: what clients see, what workers are told."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fake_model import expected_tokens, logprobs_of
from benchmarks.fake_worker import FakeWorker
from llm_engine.api.errors import (
    DeadlineExceeded,
    Overloaded,
    PromptTooLong,
    RequestError,
    ServingError,
    TooManyRequests,
    WorkerLost,
)
from llm_engine.api.messages import Cancel, Submit
from llm_engine.api.request import FinishReason, StageTimes
from router.dispatcher import ClusterDispatcher
from router.flight import Flight
from tests.unit.router.router_cluster import check, collect, dispatching, fakes, request, until

PROMPT = list(range(40))


def addresses(workers: list[FakeWorker]) -> list[str]:
    return [worker.info.request_addr for worker in workers]


def metric(dispatcher: ClusterDispatcher, sample: str) -> float:
    lines = dispatcher.metrics.render().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(sample))


async def test_tokens_arrive_as_they_are_computed() -> None:
    with fakes("prefill", "decode", step_s=0.02) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            output = await check(dispatcher, request(PROMPT, 10))
            assert output.chunks >= 8
            assert output.cached_tokens == 0
            await until(lambda: dispatcher.num_open == 0)


async def test_an_aggregated_worker_serves_alone() -> None:
    with fakes("aggregated") as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            await asyncio.gather(*(check(dispatcher, request([i] * 20, 20, seed=i)) for i in range(10)))


async def test_the_first_token_does_not_wait_for_decode() -> None:
    with fakes("prefill", "decode", step_s=0.02) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            workers[1].settings.muted = True
            async with contextlib.aclosing(dispatcher.submit(request(PROMPT, 10))) as chunks:
                first = await asyncio.wait_for(anext(chunks), 0.5)
                assert first.tokens == expected_tokens(PROMPT, 7, 1)


async def test_a_slow_reader_gets_everything_since_its_last_read_as_one_chunk() -> None:
    with fakes("prefill", "decode", step_s=0.001) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            chunks = dispatcher.submit(request(PROMPT, 50))
            first = await anext(chunks)
            await until(lambda: dispatcher.num_open == 0)
            rest = await anext(chunks)
            assert first.tokens + rest.tokens == expected_tokens(PROMPT, 7, 50)
            assert rest.finish is FinishReason.LENGTH
            with pytest.raises(StopAsyncIteration):
                await anext(chunks)


async def test_log_probabilities_stay_with_their_tokens() -> None:
    with fakes("prefill", "decode") as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            output = await check(dispatcher, request(PROMPT, 30, logprobs=1))
            assert output.logprobs == logprobs_of(output.tokens)


async def test_a_stop_token_ends_the_request() -> None:
    stop = expected_tokens(PROMPT, 7, 6)[5]
    with fakes("prefill", "decode") as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            output = await collect(dispatcher, request(PROMPT, 50, stop_token_ids=(stop,)))
            assert output.tokens[-1] == stop
            assert stop not in output.tokens[:-1]
            assert output.finish is FinishReason.STOP


async def test_a_single_token_needs_no_decode_worker_to_start() -> None:
    with fakes("prefill", "decode") as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            await check(dispatcher, request(PROMPT, 1))
            await until(lambda: not workers[1]._receiving)
            assert not workers[1]._running


async def test_requests_that_share_a_prefix_follow_it() -> None:
    with fakes("prefill", "prefill", "decode", prefill_s=0.02) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            shared = list(range(160))
            await asyncio.gather(*(check(dispatcher, request([*shared, i], 2)) for i in range(4)))
            assert {len(worker._cache) for worker in workers[:2]} == {0, 10}
            output = await check(dispatcher, request([*shared, 99], 2))
            assert output.cached_tokens == 160


async def test_a_prediction_ends_with_the_prefill_and_the_last_position_is_always_computed() -> None:
    with fakes("prefill", "decode") as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            workers[0].settings.swallow_kv_events = 1
            hits = []
            for repaired in (False, False, True):
                if repaired:
                    await check(dispatcher, request([6] * 48, 2))  # shows the gap that the first request left
                    await until(lambda: len(next(iter(dispatcher.membership.workers)).prefix) == 5)
                req = request([5] * 32, 2)
                await check(dispatcher, req)
                timeline = dispatcher.timeline(req.request_id)
                assert timeline is not None
                hits.append(timeline["attempts"][0]["hit_tokens"])
            assert hits == [0, 0, 31]


async def test_load_spreads_over_the_pools() -> None:
    with fakes("prefill", "prefill", "decode", "decode", prefill_s=0.01) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            await asyncio.gather(*(check(dispatcher, request([i] * 64, 40, seed=i)) for i in range(40)))
            submits = [sum(isinstance(m, Submit) for m in worker.log) for worker in workers[:2]]
            assert sum(submits) == 40
            assert min(submits) >= 12
            blocks = [len(worker._cache) for worker in workers[2:]]
            assert min(blocks) >= 12 * 4


@pytest.mark.parametrize("when", ["queued", "prefill", "decode"])
async def test_a_client_that_leaves_is_cancelled_on_both_workers(when: str) -> None:
    with fakes("prefill", "decode", prefill_s=0.3 if when == "prefill" else 0.0, step_s=0.02) as workers:
        async with dispatching(addresses(workers), max_inflight=1) as dispatcher:
            stream = dispatcher.submit(request(PROMPT, 1000))
            reading = asyncio.create_task(_read_all(stream))
            if when == "queued":
                await until(lambda: dispatcher.num_open == 1)
                second = asyncio.create_task(_read_all(dispatcher.submit(request(PROMPT, 1000))))
                await until(lambda: dispatcher.status()["requests"]["queued"] == 1)
                second.cancel()
                await until(lambda: dispatcher.status()["requests"]["queued"] == 0)
                assert sum(isinstance(m, Submit) for m in workers[0].log) <= 1
            else:
                await until(lambda: workers[0]._prefilling if when == "prefill" else workers[1]._running)
            reading.cancel()
            for worker in workers:
                await until(lambda worker=worker: any(isinstance(m, Cancel) for m in worker.log))
            await until(lambda: not workers[1]._running and not workers[1]._receiving)
            assert dispatcher.num_open == 0
            assert dispatcher.status()["requests"]["inflight"] == 0


async def _read_all(stream: object) -> None:
    async with contextlib.aclosing(stream) as chunks:  # type: ignore[type-var]
        async for _ in chunks:
            pass


async def test_a_stream_can_be_closed_while_another_task_reads_it() -> None:
    with fakes("prefill", "decode", prefill_s=0.5) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            stream = dispatcher.submit(request(PROMPT, 10))
            reading = asyncio.create_task(anext(stream, None))
            await until(lambda: workers[0]._prefilling)
            await stream.aclose()
            assert await reading is None
            assert dispatcher.num_open == 0


async def test_a_read_that_is_cancelled_aborts_the_request() -> None:
    with fakes("prefill", "decode", prefill_s=0.5) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            stream = dispatcher.submit(request(PROMPT, 10))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.1)
            assert dispatcher.num_open == 0
            await until(lambda: any(isinstance(m, Cancel) for m in workers[0].log))


async def test_the_deadline_holds_while_queued_running_and_streaming() -> None:
    with fakes("prefill", "decode", step_s=0.02) as workers:
        async with dispatching(addresses(workers), max_inflight=1) as dispatcher:
            streaming = asyncio.create_task(collect(dispatcher, request(PROMPT, 10_000, deadline_s=0.5)))
            await until(lambda: workers[1]._running)
            with pytest.raises(DeadlineExceeded):
                await collect(dispatcher, request(PROMPT, 4, deadline_s=0.2))
            with pytest.raises(DeadlineExceeded, match="tokens so far"):
                await streaming
            await until(lambda: not workers[1]._running)
            with pytest.raises(DeadlineExceeded):
                await collect(dispatcher, request(PROMPT, 4, deadline_s=-1.0))
            await check(dispatcher, request(PROMPT, 4))


async def test_tokens_before_an_error_are_delivered_first() -> None:
    with fakes("prefill", "decode", step_s=0.02) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            stream = dispatcher.submit(request(PROMPT, 10_000, deadline_s=0.3))
            tokens = (await anext(stream)).tokens
            await until(lambda: dispatcher.num_open == 0)
            tokens += (await anext(stream)).tokens
            assert len(tokens) > 2
            assert tokens == expected_tokens(PROMPT, 7, len(tokens))
            with pytest.raises(DeadlineExceeded):
                await anext(stream)


async def test_overload_is_refused_at_once() -> None:
    with fakes("prefill", "decode", step_s=0.02) as workers:
        async with dispatching(addresses(workers), max_inflight=2, max_queued=1, queue_timeout_s=0.3) as dispatcher:
            running = [asyncio.create_task(collect(dispatcher, request(PROMPT, 10_000))) for _ in range(2)]
            await until(lambda: len(workers[1]._running) == 2)
            queued = asyncio.create_task(collect(dispatcher, request(PROMPT, 4)))
            await until(lambda: dispatcher.status()["requests"]["queued"] == 1)
            with pytest.raises(TooManyRequests) as refused:
                await asyncio.wait_for(collect(dispatcher, request(PROMPT, 4)), 0.1)
            assert refused.value.retry_after_s >= 1.0
            with pytest.raises(Overloaded, match="no place within"):
                await queued
            assert metric(dispatcher, 'baton_refusals_total{reason="queue_full"}') == 1
            assert metric(dispatcher, 'baton_refusals_total{reason="queue_timeout"}') == 1
            for task in running:
                task.cancel()
            await until(lambda: dispatcher.num_open == 0)
            await check(dispatcher, request(PROMPT, 4))


async def test_requests_wait_while_decode_has_no_blocks() -> None:
    with fakes("prefill", "decode", step_s=0.01, num_blocks=24) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            outputs = [check(dispatcher, request([i] * 100, 60, seed=i)) for i in range(6)]  # 7 to 10 blocks each
            await asyncio.gather(*outputs)
            assert metric(dispatcher, "baton_recoveries_total") == 0


async def test_a_sequence_that_no_worker_can_hold_is_the_callers_fault() -> None:
    with fakes("prefill", "decode", max_model_len=64) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            assert dispatcher.max_model_len == 64
            with pytest.raises(PromptTooLong, match="64"):
                await collect(dispatcher, request(PROMPT, 25))
            await check(dispatcher, request(PROMPT, 24))


@pytest.mark.parametrize("code", ["full", "handoff", "preempted", "draining"])
async def test_an_attempt_handed_back_is_made_again(code: str) -> None:
    with fakes("prefill", "decode") as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            workers[0].settings.fail_code = code
            workers[0].settings.fail_next = 3
            await check(dispatcher, request(PROMPT, 5))
            assert metric(dispatcher, f'baton_recoveries_total{{cause="{code}"}}') == 3


async def test_a_worker_that_fails_a_request_is_avoided_by_it() -> None:
    with fakes("prefill", "prefill", "decode") as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            workers[0].settings.fail_next = 1 << 30
            await check(dispatcher, request(PROMPT, 5))
            assert sum(isinstance(m, Submit) for m in workers[0].log) == 1


async def test_attempts_without_progress_are_bounded() -> None:
    with fakes("prefill", "decode") as workers:
        async with dispatching(addresses(workers), max_attempts=3) as dispatcher:
            workers[0].settings.fail_next = 1 << 30
            with pytest.raises(WorkerLost, match="3 attempts"):
                await collect(dispatcher, request(PROMPT, 5))
            assert sum(isinstance(m, Submit) for m in workers[0].log) == 3


@pytest.mark.parametrize(
    ("code", "error"), [("too_long", PromptTooLong), ("invalid", RequestError), ("internal", ServingError)]
)
async def test_an_error_that_no_attempt_can_help_ends_the_request(code: str, error: type[ServingError]) -> None:
    with fakes("prefill", "decode") as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            workers[0].settings.fail_code, workers[0].settings.fail_retryable = code, False
            workers[0].settings.fail_next = 1
            with pytest.raises(error, match="prefill-0: told to fail") as raised:
                await collect(dispatcher, request(PROMPT, 5))
            assert type(raised.value) is error
            assert dispatcher.num_open == 0


async def test_the_stages_add_up_to_the_time_to_first_token() -> None:
    with fakes("prefill", "decode", prefill_s=0.05) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            workers[0].settings.fail_next = 1
            req = request(PROMPT, 5)
            await check(dispatcher, req)
            timeline = dispatcher.timeline(req.request_id)
            assert timeline is not None
            stages = timeline["stages"]
            assert list(stages) == ["router", "recovery", "prefill_queue", "prefill_compute", "relay"]
            assert stages["prefill_compute"] == pytest.approx(0.05, abs=0.04)
            assert stages["recovery"] > 0.005
            assert metric(dispatcher, "baton_ttft_seconds_sum") == pytest.approx(sum(stages.values()))
            assert sum(stages.values()) >= timeline["first_token_s"]
            assert metric(dispatcher, "baton_ttft_stage_seconds_sum") == pytest.approx(sum(stages.values()))
            assert [record["outcome"] for record in timeline["attempts"]] == ["full", "finished"]


@given(
    total=st.floats(0, 10),
    sent=st.floats(0, 12),
    again=st.floats(0, 12),
    queue=st.floats(0, 12),
    compute=st.floats(0, 12),
)
def test_stages_add_up_whatever_the_workers_clocks_say(
    total: float, sent: float, again: float, queue: float, compute: float
) -> None:
    async def stages() -> dict[str, float]:
        flight = Flight(request(PROMPT))
        flight.journal.begin("p", "d", sent, 0)
        served = flight.journal.begin("p", "d", sent + again, 0)
        served.times = StageTimes(queue_s=queue, compute_s=compute)
        return flight.ttft_stages(flight.arrived + total, served)

    parts = asyncio.run(stages())
    assert sum(parts.values()) == pytest.approx(total, abs=1e-6)
    assert min(parts.values()) >= 0.0


async def test_metrics_count_requests_and_tokens() -> None:
    with fakes("prefill", "decode") as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            for _ in range(2):
                await check(dispatcher, request(PROMPT, 20))
            assert metric(dispatcher, 'baton_tokens_total{direction="in"}') == 80
            assert metric(dispatcher, 'baton_tokens_total{direction="out"}') == 40
            assert metric(dispatcher, "baton_prefix_hit_tokens_total") == 32
            assert metric(dispatcher, 'baton_requests_total{outcome="length"}') == 2
            assert metric(dispatcher, "baton_e2e_seconds_count") == 2
            assert metric(dispatcher, "baton_tpot_seconds_count") == 2
            assert metric(dispatcher, "baton_handoff_seconds_count") == 2
            gaps = metric(dispatcher, "baton_inter_token_seconds_count")
            assert 20 <= gaps <= 38
            assert metric(dispatcher, 'baton_inter_token_seconds_bucket{le="+Inf"}') == gaps
            await until(lambda: metric(dispatcher, 'baton_router_workers{role="decode",state="alive"}') == 1)


async def test_status_is_json_and_names_the_workers() -> None:
    with fakes("prefill", "decode") as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            await check(dispatcher, request(PROMPT, 20))
            status = msgspec.json.decode(msgspec.json.encode(dispatcher.status()))
            assert status["ready"]
            assert [worker["name"] for worker in status["workers"]] == ["prefill-0", "decode-1"]
            assert status["pools"]["decode"]["usable"] == 1
            assert status["recent"][0]["finish"] == "length"


async def test_only_the_last_timelines_are_kept() -> None:
    with fakes("aggregated", step_s=0.0005) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            requests = [request([1], 1) for _ in range(600)]
            for start in range(0, 600, 100):
                await asyncio.gather(*(collect(dispatcher, req) for req in requests[start : start + 100]))
            kept = [req for req in requests if dispatcher.timeline(req.request_id) is not None]
            assert len(kept) == 512
            assert dispatcher.timeline(requests[-1].request_id) is not None


async def test_an_id_in_use_is_refused() -> None:
    with fakes("prefill", "decode", step_s=0.05) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            req = request(PROMPT, 50)
            stream = dispatcher.submit(req)
            await anext(stream)
            with pytest.raises(RequestError, match="in use"):
                await anext(dispatcher.submit(req))
            await stream.aclose()


async def test_closing_ends_every_stream_and_tells_the_workers() -> None:
    with fakes("prefill", "decode", step_s=0.02) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            running = asyncio.create_task(collect(dispatcher, request(PROMPT, 10_000)))
            await until(lambda: workers[1]._running)
            await dispatcher.close()
            with pytest.raises(Overloaded, match="shutting down"):
                await running
            with pytest.raises(Overloaded, match="shutting down"):
                await collect(dispatcher, request(PROMPT, 4))
            await until(lambda: not workers[1]._running)


async def test_requests_wait_for_the_first_pair() -> None:
    with fakes("prefill", "decode") as workers:
        async with dispatching(addresses(workers), workers=0, queue_timeout_s=0.05) as dispatcher:
            assert not dispatcher.ready()
            await check(dispatcher, request(PROMPT, 4))
            assert dispatcher.ready()


async def test_a_new_worker_gets_work_although_the_others_are_known_to_be_fast() -> None:
    with fakes("prefill", "decode", "decode", step_s=0.005) as workers:
        workers[2].settings.step_s = 0.0  # what a worker says before its first step
        async with dispatching(addresses(workers)) as dispatcher:
            await asyncio.gather(*(check(dispatcher, request([i] * 20, 100, seed=i)) for i in range(4)))
            submits = [message for message in workers[0].log if isinstance(message, Submit)]
            chosen = {submit.decode.name for submit in submits if submit.decode is not None}
            assert chosen == {"decode-1", "decode-2"}
