"""Prefill and decode workers as processes on one card and on two, behind the router; one of them is killed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from deploy.processes import ProcessCluster
from tests.e2e.client import Ask, complete_all, essence, random_asks
from tests.gpu.conftest import Note

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

_START_S = 90.0  # a process that finds no compiled kernels makes them
_WHOLE: dict[str, Any] = {
    "model.name": "baton",
    "model.max_len": 512,
    "engine.backend": "triton",
    "engine.dtype": "bf16",
    "engine.numerics": "exact",
    "engine.num_drafts": 1,
    "kv.num_blocks": 512,
    "scheduler.max_num_seqs": 16,
    "router.heartbeat_timeout_s": 1.5,
    "router.queue_timeout_s": 100.0,
}


def cluster(
    path: Path,
    run_dir: Path,
    transport: str,
    pages: str,
    *,
    decode_card: int = 0,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    **pools: int,
) -> ProcessCluster:
    settings = {**_WHOLE, "model.path": str(path), "transfer.transport": transport, "kv.format": pages}
    own = own or {"decode-0": {"engine.device": decode_card}}
    return ProcessCluster(run_dir, settings, own=own, **pools)


def started(running: ProcessCluster) -> ProcessCluster:
    try:
        running.start(_START_S)
    except BaseException:
        running.stop()
        raise
    return running


def served(running: ProcessCluster, asks: list[Ask], at_once: int) -> list[Any]:
    return [essence(c) for c in asyncio.run(complete_all(running.url, asks, at_once=at_once, streaming=True))]


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    return random_asks(24, seed=3, longest=200, max_tokens=40)


@pytest.fixture(scope="module")
def reference(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory, asks: list[Ask]) -> list[Any]:
    """One aggregated worker, one request at a time."""
    run_dir = tmp_path_factory.mktemp("aggregated")
    running = started(cluster(tiny_dir, run_dir, "auto", "fp8", prefill=0, decode=0, aggregated=1))
    try:
        return served(running, asks, at_once=1)
    finally:
        running.stop()


@pytest.fixture(
    scope="module",
    params=[("shm", 1), ("tcp", 1), ("cuda_ipc", 1), ("auto", 1), ("shm", 2), ("cuda_ipc", 2), ("auto", 2)],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def pair(
    request: pytest.FixtureRequest, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessCluster]:
    transport, num_cards = request.param
    if num_cards > torch.accelerator.device_count():
        pytest.skip(f"needs {num_cards} cards")
    run_dir = tmp_path_factory.mktemp("pair")
    running = started(cluster(tiny_dir, run_dir, transport, "fp8", decode_card=num_cards - 1))
    yield running
    running.stop()


def test_two_processes_give_the_tokens_of_one(
    pair: ProcessCluster, asks: list[Ask], reference: list[Any], note: Note
) -> None:
    begun = time.monotonic()
    assert served(pair, asks, at_once=12) == reference
    seconds = round(time.monotonic() - begun, 2)
    asked_for = pair.settings["transfer.transport"]
    expected = "cuda_ipc" if asked_for == "auto" else asked_for
    for worker, peer in (("prefill-0", "decode-0"), ("decode-0", "prefill-0")):
        assert links(pair, worker)[peer] == (expected, f"{expected}: best of both offers"), worker
    note(seconds=seconds, requests=len(asks), **memory(pair))


def test_a_killed_worker_costs_no_token(pair: ProcessCluster, asks: list[Ask], reference: list[Any]) -> None:
    for victim in ("decode-0", "prefill-0"):

        async def disturbed(name: str = victim) -> list[Any]:
            serving = asyncio.create_task(complete_all(pair.url, asks, at_once=12, streaming=True))
            await asyncio.sleep(0.3)  # some are under way; where exactly does not matter
            pair.kill(name, signal.SIGKILL)
            await asyncio.to_thread(pair.restart, name, _START_S)
            return await serving

        assert [essence(choice) for choice in asyncio.run(disturbed())] == reference, victim


@pytest.mark.parametrize("num_cards", [1, 2])
def test_auto_takes_for_every_pair_what_works_and_says_why(
    num_cards: int,
    tiny_dir: Path,
    tmp_path: Path,
    asks: list[Ask],
    reference: list[Any],
    note: Note,
) -> None:
    """One decode worker is reached from card to card, the other takes tcp only."""
    if num_cards > torch.accelerator.device_count():
        pytest.skip(f"needs {num_cards} cards")
    card = {"engine.device": num_cards - 1}
    own = {"decode-0": card, "decode-1": {**card, "transfer.transport": "tcp"}}
    running = started(cluster(tiny_dir, tmp_path, "auto", "fp8", own=own, decode=2))
    try:
        assert served(running, asks, at_once=12) == reference
        assert links(running, "prefill-0") == {
            "decode-0": ("cuda_ipc", "cuda_ipc: best of both offers"),
            "decode-1": (
                "tcp",
                "tcp: best of both offers (decode-1 does not offer cuda_ipc; decode-1 does not offer shm)",
            ),
        }
    finally:
        running.stop()


def test_auto_falls_back_where_memory_can_not_be_shared_and_says_so(
    tiny_dir: Path, tmp_path: Path, asks: list[Ask], reference: list[Any], note: Note
) -> None:
    """Memory in expandable segments has no handle for other processes."""
    running = cluster(tiny_dir, tmp_path, "auto", "fp8")
    running.env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    started(running)
    try:
        assert served(running, asks, at_once=12) == reference
        for worker, peer in (("prefill-0", "decode-0"), ("decode-0", "prefill-0")):
            transport, reason = links(running, worker)[peer]
            note(transport=transport, reason=reason)
            assert transport == "shm"
            assert "decode-0 does not offer cuda_ipc: cuIpcGetMemHandle: error " in reason
            assert "allocate it without expandable segments" in reason
    finally:
        running.stop()


def links(running: ProcessCluster, worker: str) -> dict[str, tuple[str, str]]:
    """Peer → transport and reason, from a worker's metrics; all of them healthy."""
    text = httpx.get(running.infos[worker]["metrics_addr"], trust_env=False).text
    [family] = [family for family in text_string_to_metric_families(text) if family.name == "baton_link_info"]
    assert all(sample.value == 1.0 for sample in family.samples), family.samples
    return {s.labels["peer"].partition("/")[0]: (s.labels["transport"], s.labels["reason"]) for s in family.samples}


def memory(running: ProcessCluster) -> dict[str, float]:
    """The memory report of the decode worker, in MiB, from its metrics."""
    address = running.infos["decode-0"]["metrics_addr"]
    text = httpx.get(address, trust_env=False).text
    lines = [line for line in text.splitlines() if line.startswith("baton_device_memory_bytes{")]
    found = {line.split('"')[1]: round(float(line.split()[-1]) / (1 << 20), 1) for line in lines}
    assert found, "no memory report"
    return found
