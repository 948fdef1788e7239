"""Promise 1 for workers: the same tokens and logprobs whatever serves them. Real sockets and links, one process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from decode_worker.aggregated import AggregatedWorker
from decode_worker.worker import DecodeWorker
from llm_engine.api.config import SECRET_ENV, ClusterConfig, build
from prefill_worker.worker import PrefillWorker
from tests.e2e.mini_router import answers, outcomes
from tests.unit.worker.in_process import SECRET, serving


@pytest.fixture(scope="module", autouse=True)
def secret() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SECRET_ENV, SECRET)
        yield


def config_of(
    model: Path, *, drafts: int, transport: str = "auto", chunk: int = 64, cache: bool = True
) -> ClusterConfig:
    return build(
        {
            "model": {"path": str(model)},
            "engine": {"num_drafts": drafts},
            "kv": {"memory_mb": 16, "prefix_cache": cache},
            "scheduler": {"max_step_tokens": chunk},
            "transfer": {"transport": transport},
            "worker": {"heartbeat_s": 0.1},
        }
    )


@pytest.fixture(scope="module")
def reference(nano_dir: Path, secret: None) -> list[Any]:
    """Aggregated, no speculation, no prefix cache, one at a time."""

    async def serve() -> list[Any]:
        worker = AggregatedWorker.build(config_of(nano_dir, drafts=0, cache=False), "a")
        async with serving(worker) as router:
            return outcomes(await answers(router, "a", at_once=False))

    return asyncio.run(serve())


@pytest.mark.parametrize(
    ("transport", "drafts", "chunk"),
    [("shm", 0, 64), ("shm", 1, 16), ("shm", 3, 256), ("tcp", 0, 16), ("tcp", 1, 256), ("tcp", 3, 64)],
)
async def test_handed_over_sequences_cold_and_warm(
    transport: str, drafts: int, chunk: int, nano_dir: Path, reference: list[Any]
) -> None:
    config = config_of(nano_dir, drafts=drafts, transport=transport, chunk=chunk)
    async with serving(PrefillWorker.build(config, "p"), DecodeWorker.build(config, "d")) as router:
        cold = await answers(router, "p", "d", at_once=True)
        warm = await answers(router, "p", "d", at_once=True)
        await router.clean("p", "d")
    assert outcomes(cold) == reference
    assert outcomes(warm) == reference
    assert {stream.sources[0] for stream in cold + warm} >= {"p"}  # token 1 comes straight from prefill
    for stream in cold + warm:
        assert stream.sources[1:] == ["d"] * 11  # decode restates token 1, and may be the first to do so
        assert len(stream.started) == 1
        assert stream.started[0].exposed_s > 0
    assert sum(s.started[0].num_bytes for s in warm) < sum(s.started[0].num_bytes for s in cold) / 3
    assert all(s.cached_tokens[0] > 0 for s in warm if len(s.prompt) > 32)


@pytest.mark.parametrize("drafts", [1, 3])
async def test_aggregated_with_speculation_in_mixed_batches(drafts: int, nano_dir: Path, reference: list[Any]) -> None:
    async with serving(AggregatedWorker.build(config_of(nano_dir, drafts=drafts), "a")) as router:
        for _ in ("cold", "warm"):
            assert outcomes(await answers(router, "a", at_once=True)) == reference
        await router.clean("a")


def test_the_comparison_can_fail(reference: list[Any]) -> None:
    assert len({repr(outcome) for outcome in reference}) == len(reference)
