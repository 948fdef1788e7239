"""The mooncake transport beside what every transport must do: its engine's call contract and its settings."""

from __future__ import annotations

import gc
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kv_transfer.link import Copy
from kv_transfer.mooncake import Engine
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import ConfigError
from tests.unit.kv_transfer.rig import Rig, needs_engine, until

CALLS = {  # method → parameter types, as the engine publishes them
    "initialize": ["str", "str", "str", "str"],
    "register_memory": ["int", "int"],
    "unregister_memory": ["int"],
    "get_first_buffer_address": ["str"],
    "get_rpc_port": [],
    "batch_transfer_sync_write": ["str", "list[int]", "list[int]", "list[int]"],
}


@needs_engine
def test_the_engine_takes_the_calls_that_are_made() -> None:
    from mooncake.engine import TransferEngine

    for name, expected in CALLS.items():
        signature = getattr(TransferEngine, name).__doc__.splitlines()[0]
        parameters = re.findall(r": ([\w\[\]]+)(?: = [^,)]*)?(?=[,)])", signature.partition(" -> ")[0])
        required = parameters[: len(expected)]
        assert [p.replace("collections.abc.Sequence", "list") for p in required] == expected, signature


@needs_engine
async def test_hand_offs_and_probes_run_over_the_engine() -> None:
    async with Rig("mooncake", canary_period_s=0.05, scale=20) as rig:
        assert (await rig.hand_off("r1", 40)).transport == "mooncake"  # the rig compares every byte
        rig.pool.finish("r1")
        await rig.hand_off("r2", 128, blocks=range(39, 7, -1))  # no two blocks are neighbours in order
        rig.pool.finish("r2")
        await until(lambda: rig.client.stats().probes.get("ok", 0) > 0)
        assert rig.client.bad_peers() == []


def usage() -> tuple[int, int, int]:
    """Threads, descriptors, and resident MiB of this process."""
    gc.collect()
    threads, descriptors = (len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("task", "fd"))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return threads, descriptors, pages * os.sysconf("SC_PAGE_SIZE") >> 20


@needs_engine
@pytest.mark.slow
async def test_writers_that_come_and_go_leave_nothing_behind() -> None:
    """Connect, hand off, close: threads, descriptors and memory stay what they were after the first few."""
    async with Rig("mooncake", scale=200) as rig:
        seen = []
        for number in range(16):
            client = await rig.add_client(f"prefill-{number + 1}")
            running = rig._tasks.pop()
            await rig.hand_off(f"r{number}", 64, client=client)
            rig.pool.finish(f"r{number}")
            await client.close()
            await running
            rig.clients.remove(client)
            del client, running
            seen.append(usage())
        threads, descriptors, memory = zip(*seen[3:], strict=True)
        assert max(threads) <= threads[0] + 6  # helpers of the event loop, started as they are needed
        assert max(descriptors) <= descriptors[0] + 1
        assert max(memory) <= memory[0] + 8


class Recorded:
    """Stands in for the engine of a card that is not here: writes down how it is called."""

    calls: list[tuple[Any, ...]] = []
    answer = 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.calls.append((name, *args))
            return 4711 if name == "get_rpc_port" else self.answer

        return call


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    module = types.ModuleType("mooncake.engine")
    module.TransferEngine = Recorded  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mooncake", types.ModuleType("mooncake"))
    monkeypatch.setitem(sys.modules, "mooncake.engine", module)
    monkeypatch.setattr(Recorded, "calls", [])
    return Recorded


def aligned(num_bytes: int) -> memoryview:
    raw = np.zeros(num_bytes + (2 << 20), np.uint8)
    first = -raw.ctypes.data % (2 << 20)
    return memoryview(raw[first : first + num_bytes])


@pytest.mark.parametrize(("protocol", "device"), [("rdma", "mlx5_0"), ("ascend", "")])
def test_other_protocols_are_settings_of_the_same_calls(recorded: type[Recorded], protocol: str, device: str) -> None:
    config = TransferConfig(transport="mooncake", mooncake_protocol=protocol, mooncake_device=device)
    engine = Engine(aligned(4 << 20), "192.0.2.1", config)
    assert engine.address == "192.0.2.1:4711"
    assert engine.write("peer:1", 1000, [Copy(0, 8, 4), Copy(64, 16, 2)], 500)
    assert recorded.calls == [
        ("initialize", "192.0.2.1", "P2PHANDSHAKE", protocol, device),
        ("register_memory", engine.base, 4 << 20),
        ("get_rpc_port",),
        ("batch_transfer_sync_write", "peer:1", [500, 564], [1008, 1016], [4, 2]),
    ]


def test_ascend_needs_whole_large_pages(recorded: type[Recorded]) -> None:
    config = TransferConfig(transport="mooncake", mooncake_protocol="ascend")
    for memory in (aligned(4 << 20)[4096 : 4096 + (2 << 20)], aligned(4 << 20)[:4096]):
        with pytest.raises(ConfigError, match="2 MiB"):
            Engine(memory, "192.0.2.1", config)
    assert recorded.calls == []


def test_an_engine_that_does_not_start_says_where(recorded: type[Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "answer", -1)
    config = TransferConfig(transport="mooncake", mooncake_protocol="rdma", mooncake_device="mlx5_0")
    with pytest.raises(ConfigError, match=r"mooncake_protocol=rdma: the engine does not start on 192\.0\.2\.1, mlx5_0"):
        Engine(aligned(4096), "192.0.2.1", config)
