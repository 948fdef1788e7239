"""Workers whose caches peers can't reach: hand-offs go through slots of another memory, as with caches on a card.

Here both lie on the host and every copy is real; there are fewer slots than the requests' blocks.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from decode_worker.aggregated import AggregatedWorker
from decode_worker.worker import DecodeWorker
from kv_transfer.memory import Arena
from llm_engine.api.config import SECRET_ENV, ClusterConfig, build, cluster_key
from llm_engine.api.messages import Role
from llm_engine.sched import LayerSink
from llm_engine.serving import assembly
from llm_engine.serving.staging import Mirror, staging_layout
from prefill_worker.handoff import Outbox
from prefill_worker.worker import PrefillWorker
from tests.e2e.mini_router import answers, outcomes, prompts
from tests.unit.worker.in_process import SECRET, serving


@pytest.fixture(scope="module", autouse=True)
def secret() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SECRET_ENV, SECRET)
        yield


def config_of(model: Path, transport: str) -> ClusterConfig:
    return build(
        {
            "model": {"path": str(model), "max_len": 512},
            "engine": {"num_drafts": 1},
            "kv": {"memory_mb": 16, "staging_mb": 1},
            "scheduler": {"max_step_tokens": 64},
            "transfer": {"transport": transport},
            "worker": {"heartbeat_s": 0.1},
        }
    )


def staged(config: ClusterConfig, role: Role, on_layer: LayerSink | None = None) -> tuple[assembly.Assembly, Arena]:
    """An engine whose caches are private, and the slots beside it."""
    planned = assembly.plan(config, uses_control_port=False)
    made = assembly.assemble(config, planned, lambda size: Arena.create(size, shared=False).buffer, role, on_layer)
    region = staging_layout(made.layout, config.kv, made.engine.max_len)
    assert region.num_blocks < made.layout.num_blocks
    slots = Arena.create(region.arena_bytes, shared=config.transfer.transport == "shm")
    mirror = Mirror(made.store, region, torch.frombuffer(slots.buffer, dtype=torch.uint8), planned.ops)
    return dataclasses.replace(made, region=region, mirror=mirror), slots


def pair(config: ClusterConfig) -> tuple[PrefillWorker, DecodeWorker]:
    outbox = Outbox()
    key = cluster_key()
    prefill = PrefillWorker(config, "p", key, *staged(config, Role.PREFILL, outbox), outbox)
    return prefill, DecodeWorker(config, "d", key, *staged(config, Role.DECODE))


@pytest.fixture(scope="module")
def reference(nano_dir: Path, secret: None) -> list[Any]:
    async def serve() -> list[Any]:
        async with serving(AggregatedWorker.build(config_of(nano_dir, "auto"), "a")) as router:
            return outcomes(await answers(router, "a", at_once=False))

    return asyncio.run(serve())


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_the_same_tokens_cold_and_warm(transport: str, nano_dir: Path, reference: list[Any]) -> None:
    prefill, decode = pair(config_of(nano_dir, transport))
    async with serving(prefill, decode) as router:
        for _ in ("cold", "warm"):
            streams = await answers(router, "p", "d", at_once=True)
            assert outcomes(streams) == reference
            assert all(stream.sources == ["p"] + ["d"] * 11 for stream in streams)
        await router.clean("p", "d")


async def test_slots_come_back_from_requests_that_end_early(nano_dir: Path, reference: list[Any]) -> None:
    """Many cancelled at every stage; afterwards as many slots are there as before."""
    prefill, decode = pair(config_of(nano_dir, "shm"))
    async with serving(prefill, decode) as router:
        streams = [router.stream(prompt * 3, max_tokens=40, seed=1) for prompt in prompts(24)]
        for stream in streams:
            await router.submit(stream, "p", "d")
        for stage, stream in enumerate(streams[::2]):
            await router.until(lambda stage=stage: sum(len(s.tokens) for s in streams) >= 6 * stage)
            await router.cancel(stream, "p", "d")
        await router.finished(*streams[1::2], timeout_s=60.0)
        await router.clean("p", "d")
        assert outcomes(await answers(router, "p", "d", at_once=True)) == reference
        await router.clean("p", "d")
    assert prefill._stager is not None
    assert prefill._stager.num_free == prefill._assembly.region.num_blocks
    assert decode._slots is not None
    assert decode._slots.num_free == decode._assembly.region.num_blocks
