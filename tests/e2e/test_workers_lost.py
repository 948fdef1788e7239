"""Workers that die or stand still: what the survivors keep, what they free, and the text that goes on elsewhere."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from deploy.processes import ProcessCluster
from llm_engine.ops.load import load_ops
from tests.e2e.mini_router import MiniRouter, Stream, prompts
from tests.e2e.test_workers import routing

P0, P1, D0, D1 = "prefill-0", "prefill-1", "decode-0", "decode-1"
LONG = prompts(1, seed=9, longest=400)[0] * 6


@pytest.fixture(scope="module", params=["shm", "tcp"])
def cluster(request: pytest.FixtureRequest, nano_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings: dict[str, Any] = {
        "model.path": str(nano_dir),
        "model.name": "baton",
        "kv.memory_mb": 32,
        "scheduler.max_step_tokens": 16,  # prefill in many small steps: time to die in the middle
        "transfer.transport": request.param,
        "transfer.grant_timeout_s": 2.0,
        "transfer.commit_timeout_s": 2.0,
        "worker.heartbeat_s": 0.1,
    }
    load_ops("cpu")  # compiles what is not compiled yet, once: the processes find it
    with ProcessCluster(tmp_path_factory.mktemp("lost"), settings, prefill=2, decode=2, router=False) as running:
        yield running


@pytest.fixture(autouse=True)
def everyone_alive(cluster: ProcessCluster) -> None:
    revive(cluster)


def revive(cluster: ProcessCluster) -> None:
    """Restart whoever was killed."""
    dead = [name for name, child in cluster.children.items() if child.process.poll() is not None]
    for name in dead:
        cluster.children[name].stop()
        cluster.spawn(name)
    for name in dead:
        cluster.infos[name] = cluster.children[name].wait_ready(60.0)


async def undisturbed(router: MiniRouter, prompt: list[int], **sampling: Any) -> Stream:
    stream = router.stream(prompt, **sampling)
    await router.submit(stream, P0, D0)
    await router.finished(stream)
    return stream


def kill(cluster: ProcessCluster, *names: str) -> None:
    for name in names:
        cluster.kill(name)
    for name in names:
        cluster.children[name].process.wait(10)


async def test_a_prefill_worker_killed_while_computing(cluster: ProcessCluster) -> None:
    async with routing(cluster) as router:
        whole = await undisturbed(router, LONG, max_tokens=20, seed=1, temperature=1.0)
        prompt = LONG[1:]  # not cached
        stream = router.stream(prompt, max_tokens=20, seed=1, temperature=1.0)
        await router.submit(stream, P1, D0)
        await router.until(lambda: router.loads[D0].blocks_leased > 0)
        kill(cluster, P1)
        assert stream.tokens == []
        await router.clean(D0)  # the lease is revoked, its writer proven dead, its blocks free again
        await router.submit(stream, P0, D0)
        await router.finished(stream)
        again = await undisturbed(router, prompt, max_tokens=20, seed=1, temperature=1.0)
        assert stream.tokens == again.tokens
        assert len(whole.tokens) == 20
        await router.clean(P0, D0)


async def test_a_decode_worker_killed_while_decoding(cluster: ProcessCluster) -> None:
    async with routing(cluster) as router:
        whole = await undisturbed(router, prompts(1)[0], max_tokens=600, seed=2, temperature=1.0)
        stream = router.stream(whole.prompt, max_tokens=600, seed=2, temperature=1.0)
        await router.submit(stream, P0, D1)
        await router.until(lambda: len(stream.tokens) > 40)
        kill(cluster, D1)
        await router.submit(stream, P0, D0)
        await router.finished(stream)
        assert stream.tokens == whole.tokens
        assert set(stream.sources[1:]) == {D0, D1, P0}
        await router.clean(P0, D0)


async def test_a_decode_worker_killed_during_the_handoff(cluster: ProcessCluster) -> None:
    async with routing(cluster) as router:
        prompt = LONG[2:]
        stream = router.stream(prompt, max_tokens=20, seed=3, temperature=1.0)
        await router.submit(stream, P0, D1)
        await router.until(lambda: router.loads[D1].blocks_leased > 0)
        kill(cluster, D1)
        failure = await router.failed(stream)
        assert (failure.code, failure.retryable) == ("handoff", True)
        await router.clean(P0)
        await router.submit(stream, P0, D0)
        await router.finished(stream)
        whole = await undisturbed(router, prompt, max_tokens=20, seed=3, temperature=1.0)
        assert stream.tokens == whole.tokens
        await router.clean(P0, D0)


async def test_a_decode_worker_that_stands_still_and_comes_back(cluster: ProcessCluster) -> None:
    async with routing(cluster) as router:
        whole = await undisturbed(router, prompts(1)[0], max_tokens=600, seed=4, temperature=1.0)
        stream = router.stream(whole.prompt, max_tokens=600, seed=4, temperature=1.0)
        await router.submit(stream, P0, D1)
        await router.until(lambda: len(stream.tokens) > 20)
        cluster.kill(D1, signal.SIGSTOP)
        seen = router.loads[D1].seq
        await router.submit(stream, P0, D0)
        old_attempt = stream.attempt - 1
        await router.finished(stream)
        assert stream.tokens == whole.tokens
        cluster.kill(D1, signal.SIGCONT)
        await router.until(lambda: router.loads[D1].seq > seen)
        await router.cancel(stream, D1, attempt=old_attempt)
        await router.clean(P0, D0, D1)


async def test_a_prefill_worker_that_stands_still_loses_its_lease(cluster: ProcessCluster) -> None:
    async with routing(cluster) as router:
        prompt = LONG[3:]
        stream = router.stream(prompt, max_tokens=20, seed=5, temperature=1.0)
        await router.submit(stream, P1, D0)
        await router.until(lambda: router.loads[D0].blocks_leased > 0)
        cluster.kill(P1, signal.SIGSTOP)
        await router.cancel(stream, D0)
        await router.until(lambda: router.loads[D0].blocks_leased == 0)
        await router.submit(stream, P0, D0)
        await router.finished(stream)
        assert set(stream.sources) == {P0, D0}
        cluster.kill(P1, signal.SIGCONT)
        await router.clean(P0, P1, D0)
        whole = await undisturbed(router, prompt, max_tokens=20, seed=5, temperature=1.0)
        assert stream.tokens == whole.tokens


@pytest.mark.slow
async def test_files_and_threads_of_dead_peers_do_not_pile_up(cluster: ProcessCluster) -> None:
    before: dict[str, tuple[int, int]] = {}
    for round_number in range(2):
        async with routing(cluster) as router:

            async def serve(count: int, router: MiniRouter = router) -> None:
                streams = [router.stream(prompt, max_tokens=4) for prompt in prompts(count, seed=count)]
                for index, stream in enumerate(streams):
                    await router.submit(stream, (P0, P1)[index % 2], (D0, D1)[index // 2 % 2])
                await router.finished(*streams)
                await router.clean(P0, P1, D0, D1)

            await serve(8 + round_number)
            deadline = time.monotonic() + 10.0
            while (now := held(cluster, P0, D0)) != (before or now):
                assert time.monotonic() < deadline, f"descriptors, threads: {now}, before the losses {before}"
                await serve(4)
            before = now
        if round_number == 0:
            kill(cluster, P1, D1)
            revive(cluster)


def held(cluster: ProcessCluster, *names: str) -> dict[str, tuple[int, int]]:
    """Open descriptors and threads."""

    def count(name: str, what: str) -> int:
        return len(os.listdir(f"/proc/{cluster.children[name].pid}/{what}"))

    return {name: (count(name, "fd"), count(name, "task")) for name in names}
