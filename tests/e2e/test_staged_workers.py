"""Workers whose caches peers can't reach: hand-offs go through other memory on both ends, as with caches on a card.

Here all of it lies on the host and every copy is real; there are fewer slots than the requests' blocks.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import generate_latest

from decode_worker.aggregated import AggregatedWorker
from decode_worker.worker import DecodeWorker
from kv_transfer.device import DeviceRegion
from kv_transfer.memory import Arena
from llm_engine.api.config import SECRET_ENV, ClusterConfig, TransferConfig, build, cluster_key
from llm_engine.api.errors import ConfigError
from llm_engine.api.messages import Role
from llm_engine.ops import load_ops
from llm_engine.sched import LayerSink
from llm_engine.serving import assembly
from llm_engine.serving.staging import Mirror, staging_layout
from prefill_worker.handoff import Outbox
from prefill_worker.worker import PrefillWorker
from tests.e2e.mini_router import answers, outcomes, prompts
from tests.unit.kv_transfer.card_rig import HostDriver, driver
from tests.unit.worker.in_process import SECRET, serving

__all__ = ["driver"]


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


def private(config: ClusterConfig, role: Role, on_layer: LayerSink | None = None) -> assembly.Assembly:
    """An engine whose caches no peer can reach."""
    planned = assembly.plan(config, uses_control_port=False)
    return assembly.assemble(config, planned, lambda size: Arena.create(size, shared=False).buffer, role, on_layer)


def with_slots(config: ClusterConfig, made: assembly.Assembly) -> tuple[assembly.Assembly, Arena]:
    """The same with slots beside the caches."""
    layout = staging_layout(made.layout, config.kv, made.engine.max_len)
    assert layout.num_blocks < made.layout.num_blocks
    slots = Arena.create(layout.arena_bytes, shared=True, populate=False)
    mirror = Mirror(made.store, layout, torch.frombuffer(slots.buffer, dtype=torch.uint8), load_ops("cpu"))
    return dataclasses.replace(made, slots=layout, mirror=mirror), slots


def pair(config: ClusterConfig) -> tuple[PrefillWorker, DecodeWorker]:
    outbox, key = Outbox(), cluster_key()
    made = private(config, Role.PREFILL, outbox)
    prefill = PrefillWorker(config, "p", key, made, DeviceRegion(made.store.arena), outbox)
    return prefill, DecodeWorker(config, "d", key, *with_slots(config, private(config, Role.DECODE)))


@pytest.fixture(scope="module")
def reference(nano_dir: Path, secret: None) -> list[Any]:
    async def serve() -> list[Any]:
        async with serving(AggregatedWorker.build(config_of(nano_dir, "auto"), "a")) as router:
            return outcomes(await answers(router, "a", at_once=False))

    return asyncio.run(serve())


@pytest.mark.parametrize("transport", ["shm", "tcp", "auto"])
async def test_the_same_tokens_cold_and_warm(transport: str, nano_dir: Path, reference: list[Any]) -> None:
    prefill, decode = pair(config_of(nano_dir, transport))
    async with serving(prefill, decode) as router:
        for _ in ("cold", "warm"):
            streams = await answers(router, "p", "d", at_once=True)
            assert outcomes(streams) == reference
            assert all(stream.sources == ["p"] + ["d"] * 11 for stream in streams)
        await router.clean("p", "d")


async def test_automatic_choice_says_why_it_is_not_the_best(nano_dir: Path, reference: list[Any]) -> None:
    prefill, decode = pair(config_of(nano_dir, "auto"))
    async with serving(prefill, decode) as router:
        assert outcomes(await answers(router, "p", "d", at_once=True)) == reference
        reason = (
            "shm: best of both offers (p does not offer cuda_ipc: the caches are on cpu, not on a card; "
            "d does not offer cuda_ipc: the caches are on cpu, not on a card)"
        )
        for worker in (prefill, decode):
            assert [(link.transport, link.reason, link.healthy) for link in worker.links] == [("shm", reason, True)]
            exported = generate_latest(worker._metrics.registry).decode()
            assert f'reason="{reason}",transport="shm"}} 1.0' in exported


async def test_slots_cost_nothing_where_cards_reach_each_other(
    nano_dir: Path, reference: list[Any], driver: HostDriver
) -> None:
    config = config_of(nano_dir, "auto")
    config = config.model_copy(update={"transfer": TransferConfig(checksum="count", canary_period_s=0.1)})
    prefill, decode = pair(config)
    async with serving(prefill, decode) as router:
        for _ in ("cold", "warm"):
            assert outcomes(await answers(router, "p", "d", at_once=True)) == reference
        for worker in (prefill, decode):
            assert [link.reason for link in worker.links] == ["cuda_ipc: best of both offers"]
        await router.clean("p", "d")
        assert decode._slots is not None
        assert not decode._slots.is_prepared


async def test_without_memory_for_slots_hand_offs_are_refused_and_say_so(nano_dir: Path) -> None:
    config = config_of(nano_dir, "auto")
    config = config.model_copy(update={"transfer": TransferConfig(canary_period_s=0.05)})
    prefill, decode = pair(config)
    mirror = decode._assembly.mirror
    assert mirror is not None

    def refuse(host: torch.Tensor) -> None:
        raise ConfigError("kv.staging_mb: 1 MiB of host memory can't be pinned")

    mirror._ops = dataclasses.replace(mirror._ops, pin=refuse)
    async with serving(prefill, decode) as router:
        stream = router.stream(prompts(1)[0], max_tokens=4, seed=1)
        await router.submit(stream, "p", "d")
        assert "kv.staging_mb: 1 MiB of host memory can't be pinned" in (await router.failed(stream)).reason
        assert prefill._client is not None
        stats = prefill._client.stats
        await router.until(lambda: stats().probes.get("skipped", 0) > 0)
        assert stats().probes.get("failed", 0) == 0
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
    assert decode._slots is not None
    assert decode._assembly.slots is not None
    assert decode._slots.num_free == decode._assembly.slots.num_blocks
