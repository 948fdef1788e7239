"""Losses under load: workers are killed and stopped as processes, messages are lost; no client notices but in time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.fake_worker import FakeWorker
from llm_engine.api.messages import Cancel, Deltas, Submit
from llm_engine.api.request import TokenDelta, unpack_tokens
from router.dispatch_api import GenerationRequest
from router.dispatcher import ClusterDispatcher
from tests.unit.router.router_cluster import FakeProcess, check, dispatching, fakes, request, until

PROMPT = list(range(40))


def addresses(workers: list[FakeWorker]) -> list[str]:
    return [worker.info.request_addr for worker in workers]


def recoveries(dispatcher: ClusterDispatcher) -> dict[str, float]:
    causes = {}
    for line in dispatcher.metrics.render().decode().splitlines():
        if line.startswith("baton_recoveries_total{"):
            name, _, value = line.rpartition(" ")
            causes[name.partition('"')[2].rstrip('"}')] = float(value)
    return causes


class Pool:
    """Two prefill and two decode processes that can be killed and started again at their addresses."""

    def __init__(self) -> None:
        self._options = ["--step-ms", "4", "--prefill-ms", "2"]
        self.roles = ["prefill", "prefill", "decode", "decode"]
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in self.roles]
            for sock in sockets:
                sock.bind(("127.0.0.1", 0))
            self._ports = [sock.getsockname()[1] for sock in sockets]
        self.processes = [
            FakeProcess(role, port, *self._options) for role, port in zip(self.roles, self._ports, strict=True)
        ]
        for process in self.processes:
            process.wait_ready()

    @property
    def addresses(self) -> list[str]:
        return [process.address for process in self.processes]

    def kill(self, index: int) -> None:
        self.processes[index].kill()

    async def restart(self, index: int) -> None:
        self.processes[index] = FakeProcess(self.roles[index], self._ports[index], *self._options)
        await asyncio.to_thread(self.processes[index].wait_ready)

    def close(self) -> None:
        for process in self.processes:
            process.close()


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


def streams(dispatcher: ClusterDispatcher, count: int, max_tokens: int) -> list[asyncio.Task[object]]:
    """Streams of different lengths that start over the next moments."""

    async def one(index: int) -> None:
        await asyncio.sleep(index * 0.01)
        rng = random.Random(index)
        prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 80))]
        await check(dispatcher, request(prompt, rng.randrange(1, max_tokens), seed=index, logprobs=1))

    return [asyncio.create_task(one(index)) for index in range(count)]


async def test_killed_workers_cost_no_token(pool: Pool) -> None:
    """One worker of each pool is killed at a time; the other pairs go on and the killed one is started again."""
    async with dispatching(pool.addresses) as dispatcher:
        running = streams(dispatcher, 50, 300)
        for index in (2, 0, 3, 1):
            await asyncio.sleep(0.2)
            pool.kill(index)
            await pool.restart(index)
        await asyncio.gather(*running)
        causes = recoveries(dispatcher)
        assert causes.get("decode_disconnected", 0) >= 10
        assert set(causes) <= {"decode_disconnected", "prefill_disconnected", "handoff"}
        assert dispatcher.num_open == 0


async def test_streams_outlive_the_loss_of_everything(pool: Pool) -> None:
    async with dispatching(pool.addresses, queue_timeout_s=0.2) as dispatcher:
        running = streams(dispatcher, 50, 300)
        await asyncio.sleep(0.4)
        for index in range(4):
            pool.kill(index)
        await until(lambda: not dispatcher.ready())
        await asyncio.sleep(0.5)
        assert dispatcher.num_open > 10
        await asyncio.gather(*(pool.restart(index) for index in range(4)))
        await asyncio.gather(*running)
        assert dispatcher.num_open == 0


@pytest.mark.parametrize("index", [0, 2])
async def test_stopped_workers_cost_no_token(pool: Pool, index: int) -> None:
    """A worker that is frozen past its heartbeat and wakes up later must not disturb what was recovered elsewhere."""
    async with dispatching(pool.addresses, heartbeat_timeout_s=0.4) as dispatcher:
        running = streams(dispatcher, 25, 300)
        await asyncio.sleep(0.3)
        pool.processes[index].signal(signal.SIGSTOP)
        running += streams(dispatcher, 25, 300)  # some go to it before its silence is noticed
        side = pool.roles[index]
        await until(lambda: recoveries(dispatcher).get(f"{side}_silent", 0) > 0)
        pool.processes[index].signal(signal.SIGCONT)
        await asyncio.gather(*running)
        await until(lambda: all(worker.usable for worker in dispatcher.membership.workers))
        name = next(w.name for w in dispatcher.membership.workers if w.address == pool.addresses[index])
        found = dispatcher.membership.find(name)
        assert found is not None
        await until(lambda: found.load.num_running == 0, 5)


async def test_the_next_attempt_starts_from_prompt_and_emitted_tokens() -> None:
    with fakes("prefill", "decode", "decode", step_s=0.01) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            req = request(PROMPT, 60)
            running = asyncio.create_task(check(dispatcher, req))
            await until(lambda: workers[1]._running)
            workers[1].stop()
            output = await running
            first, second = (m for m in workers[0].log if isinstance(m, Submit))
            assert (first.attempt, second.attempt) == (1, 2)
            resumed = unpack_tokens(second.tokens)
            assert resumed == PROMPT + output.tokens[: len(resumed) - 40]
            assert len(resumed) > 40
            assert second.num_prompt == 40
            assert second.sampling == first.sampling
            assert second.deadline_s < first.deadline_s


async def test_the_loss_of_prefill_after_the_hand_over_is_no_loss() -> None:
    with fakes("prefill", "decode", step_s=0.01) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            running = asyncio.create_task(check(dispatcher, request(PROMPT, 60)))
            await until(lambda: workers[1]._running)
            await asyncio.sleep(0.05)
            workers[0].stop()
            await running
            assert recoveries(dispatcher) == {}


async def test_a_prefill_worker_that_missed_the_take_over_can_not_undo_it() -> None:
    with fakes("prefill", "decode", step_s=0.01, grant_timeout_s=0.2) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            workers[1].settings.swallow_accepts = 1
            await check(dispatcher, request(PROMPT, 100))  # lasts a second
            assert not workers[0]._writing, "it has given up"
            assert recoveries(dispatcher) == {}


async def test_the_loss_of_prefill_before_the_hand_over_is_cancelled_on_decode() -> None:
    with fakes("prefill", "prefill", "decode", prefill_s=0.3) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            running = asyncio.create_task(check(dispatcher, request(PROMPT, 10)))
            await until(lambda: workers[0]._prefilling and workers[2]._receiving)
            workers[0].stop()
            await running
            assert recoveries(dispatcher) == {"prefill_disconnected": 1}
            cancels = [m for m in workers[2].log if isinstance(m, Cancel)]
            assert [cancel.attempt for cancel in cancels] == [1]
            assert not workers[2]._receiving


async def test_progress_clears_the_count_of_attempts() -> None:
    with fakes("prefill", "decode", "decode", step_s=0.01) as workers:
        async with dispatching(addresses(workers), max_attempts=3) as dispatcher:
            workers[0].settings.fail_next = 2
            running = asyncio.create_task(check(dispatcher, request(PROMPT, 60)))
            await until(lambda: workers[1]._running)
            workers[0].settings.fail_next = 1
            workers[1].stop()
            await running
            assert sum(isinstance(m, Submit) for m in workers[0].log) == 5


async def test_everything_that_was_booked_is_given_back() -> None:
    with fakes("prefill", "prefill", "decode", "decode", step_s=0.01) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            workers[1].settings.fail_next = 5
            running = streams(dispatcher, 30, 60)
            await until(lambda: workers[2]._running)
            for task in running[20:]:
                task.cancel()
            workers[3].stop()
            await asyncio.gather(*running[:20])
            await until(lambda: dispatcher.num_open == 0)
            for worker in dispatcher.membership.workers:
                ledger = worker.ledger
                assert (ledger.waiting_tokens, ledger.pending_blocks, ledger.num_seqs) == (0, 0, 0)
                assert not worker.attempts
                assert not worker.prefix._expected


async def test_lost_deltas_are_recovered_when_the_attempt_stalls() -> None:
    with fakes("prefill", "decode", step_s=0.01) as workers:
        async with dispatching(addresses(workers), worker={"stall_timeout_s": 0.3}) as dispatcher:
            running = asyncio.create_task(check(dispatcher, request(PROMPT, 40)))
            await until(lambda: workers[1]._running)
            workers[1].settings.lose_deltas = 2
            await running
            assert recoveries(dispatcher) == {"stalled": 1}


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_that_lost_its_network_for_a_moment_is_used_again(role: str) -> None:
    """Muted, it is lost by silence; what it goes on computing meanwhile is of no use to anybody."""
    with fakes("prefill", "decode", step_s=0.01) as workers:
        async with dispatching(addresses(workers), heartbeat_timeout_s=0.3) as dispatcher:
            running = [asyncio.create_task(check(dispatcher, request([i] * 30, 60, seed=i))) for i in range(10)]
            await until(lambda: len(workers[1]._running) == 10)
            worker = workers[0 if role == "prefill" else 1]
            worker.settings.muted = True
            await until(lambda: not dispatcher.ready())
            worker.settings.muted = False
            await asyncio.gather(*running)
            assert recoveries(dispatcher) == ({} if role == "prefill" else {"decode_silent": 10})


async def test_a_request_that_is_complete_but_for_its_finish_needs_no_other_attempt() -> None:
    """The last token arrived, its message's twin with the finish did not: there is nothing left to draw."""
    with fakes("prefill", "decode", step_s=0.01) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            req = request(PROMPT, 10)
            running = asyncio.create_task(check(dispatcher, req))
            await until(lambda: workers[1]._running)
            flight = dispatcher._lifecycle.flights[req.request_id]
            await until(lambda: len(flight.journal.output) >= 3)
            workers[1].settings.muted = True
            flight.journal.output.extend(
                workers[1]._running[req.request_id].sampler.tokens(len(flight.journal.output), 10)
            )
            workers[1].stop()
            await running
            assert sum(isinstance(m, Submit) for m in workers[0].log) == 1


async def test_an_attempt_that_sends_impossible_tokens_is_made_again() -> None:
    with fakes("prefill", "decode", step_s=0.01) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            req = request(PROMPT, 40)
            running = asyncio.create_task(check(dispatcher, req))
            await until(lambda: workers[1]._running)
            bad = TokenDelta(request_id=req.request_id, attempt=1, index=39, tokens=[1, 2])
            decode = dispatcher.membership.find("decode-1")
            assert decode is not None
            decode.received(Deltas(items=[bad]))
            await running
            assert recoveries(dispatcher) == {"broken_stream": 1}


async def test_recoveries_go_before_new_requests() -> None:
    with fakes("prefill", "decode", step_s=0.01, num_blocks=6) as workers:
        async with dispatching(addresses(workers), heartbeat_timeout_s=0.3) as dispatcher:
            order: list[str] = []

            async def one(name: str, tokens: int) -> None:
                await check(dispatcher, request([ord(name[0])] * 60, tokens, seed=1))
                order.append(name)

            first = asyncio.create_task(one("a", 30))
            await until(lambda: workers[1]._running)
            later = [asyncio.create_task(one(name, 20)) for name in ("b", "c")]
            await until(lambda: dispatcher.status()["requests"]["queued"] == 2)
            workers[1].settings.muted = True
            await until(lambda: dispatcher.status()["requests"]["recovering"] == 1)
            workers[1].settings.muted = False
            await asyncio.gather(first, *later)
            assert order == ["a", "b", "c"]


async def test_nobody_overtakes_a_recovery_that_waits_for_room() -> None:
    with fakes("prefill", "decode", "decode", step_s=0.01, num_blocks=6) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            order: list[str] = []

            async def one(name: str, prompt: int, tokens: int) -> None:
                await check(dispatcher, request([ord(name)] * prompt, tokens))
                order.append(name)

            big = asyncio.create_task(one("a", 60, 30))
            await until(lambda: workers[1]._running)
            other = asyncio.create_task(one("f", 40, 50))
            await until(lambda: workers[2]._running)
            workers[1].stop()
            await until(lambda: dispatcher.status()["requests"]["recovering"] == 1)
            small = asyncio.create_task(one("b", 1, 1))  # there is room for this one
            await asyncio.gather(big, other, small)
            assert order[0] == "f"


async def test_a_third_attempt_hits_what_the_second_one_computed() -> None:
    with fakes("prefill", "decode", "decode", "decode", step_s=0.01) as workers:
        async with dispatching(addresses(workers)) as dispatcher:
            req = request(PROMPT, 120)
            running = asyncio.create_task(check(dispatcher, req))
            for decode in workers[1:3]:
                await until(lambda decode=decode: decode._running and _output(dispatcher, req) >= 30)
                decode.stop()
                await until(lambda decode=decode: _attempts(dispatcher, req)[-1]["decode"] != decode.settings.name)
            await running
            second, third = _attempts(dispatcher, req)[1:]
            assert second["hit_tokens"] == 32
            assert third["hit_tokens"] == (40 + second["num_emitted"]) // 16 * 16 >= 64


def _attempts(dispatcher: ClusterDispatcher, req: GenerationRequest) -> list[dict[str, Any]]:
    timeline = dispatcher.timeline(req.request_id)
    assert timeline is not None
    attempts: list[dict[str, Any]] = timeline["attempts"]
    return attempts


def _output(dispatcher: ClusterDispatcher, req: GenerationRequest) -> int:
    timeline = dispatcher.timeline(req.request_id)
    assert timeline is not None
    return int(timeline["num_output"])
