"""Device memory without a card: kernels in Triton's interpreter, descriptors, and who can use cuda_ipc."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from kv_transfer.layout import CopyPlan, Run, count_runs, merge_runs
from kv_transfer.negotiate import End, choose
from kv_transfer.transports import usable
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import ConfigError, TransferError
from llm_engine.api.handoff import Grant, LinkOffer
from tests.unit.kv_transfer.rig import make_layout

torch = pytest.importorskip("torch")

from kv_transfer import device  # noqa: E402
from kv_transfer.cost import CostMeter  # noqa: E402
from kv_transfer.device import Descriptor, DeviceRegion, alignment, are_long, check_words  # noqa: E402
from kv_transfer.device_outbox import START, DeviceOutbox  # noqa: E402
from kv_transfer.outbox import Pumped, Turn  # noqa: E402

_KERNELS = """
import json, sys
import torch
from kv_transfer.device import DeviceRegion
from kv_transfer.device_copies import push_blocks
from kv_transfer.device_digests import DeviceDigests
from kv_transfer.layout import CopyPlan
from tests.unit.kv_transfer.rig import block_bytes, make_layout

scale, phase = json.loads(sys.argv[1])
here, there = make_layout(12, scale=scale), make_layout(9, scale=scale)
generator = torch.Generator().manual_seed(1)
source = DeviceRegion(torch.randint(0, 256, (here.arena_bytes,), dtype=torch.uint8, generator=generator))
target = DeviceRegion(torch.zeros(there.arena_bytes, dtype=torch.uint8))
plan, sources, targets = CopyPlan(here, there), [7, 2, 3, 11], [0, 8, 4, 2]
num_bytes = sum(push_blocks(source, target.words, plan, layers, sources, targets) for layers in (range(2), range(2, 4)))
ours, theirs = memoryview(source.memory.numpy()), memoryview(target.memory.numpy())
right = all(block_bytes(here, ours, a) == block_bytes(there, theirs, b) for a, b in zip(sources, targets))
others = sum(sum(block_bytes(there, theirs, b)) for b in range(9) if b not in targets)

def digest(region, layout, blocks, cuts, rehearsed=False):
    sums = DeviceDigests(region, layout, phase)
    for layers in (range(1), range(1, 4)):
        for first, last in zip([0, *cuts], [*cuts, 4]):
            sums.add(layers, blocks[first:last], first)
            if rehearsed:
                sums.rehearse(blocks)
    return sums.values()

whole = digest(source, here, sources, [])
equal = whole == digest(target, there, targets, [1, 3], rehearsed=True)
swapped = whole != digest(target, there, [8, 0, 4, 2], [])
start = there.planes[0].address(2, 4, 9)
line = slice(start + (phase or 0), start + (phase or 0) + 8)
target.memory[line] ^= 1
changed = [a != b for a, b in zip(sum(whole, []), sum(digest(target, there, targets, []), []))]
print(json.dumps([num_bytes, right, others, equal, swapped, changed]))
"""


_VERIFIER = """
import asyncio, json
import torch
from kv_transfer.device import DeviceRegion
from kv_transfer.device_manifest import DeviceManifest
from kv_transfer.device_verifier import DeviceVerifier
from kv_transfer.link import LeaseKey
from tests.unit.kv_transfer.rig import make_layout

layout, key, blocks = make_layout(12), LeaseKey(3, 4), [7, 2, 3, 11]
generator = torch.Generator().manual_seed(1)
region = DeviceRegion(torch.randint(0, 256, (layout.arena_bytes,), dtype=torch.uint8, generator=generator))
sums = DeviceManifest(region, layout, "full", key)
for layers, first, last in ((range(4), 0, 2), (range(3), 2, 4), (range(3, 4), 2, 4)):
    sums.add(layers, blocks[first:last], first)
sums.seal()
manifest, verifier = sums.build(16, 4), DeviceVerifier(layout, region)

def check(claims, end=False, changed=0):
    landing = verifier.land(key, blocks, "full")
    landing.advance(claims)
    verifier._thread.submit(lambda: None).result()
    left = landing.left_bytes()
    region.memory[layout.planes[1].address(2, 3, 12)] ^= changed
    if end:
        landing.end()
    verdict = asyncio.run(verifier.check(manifest, landing, 16))
    region.memory[layout.planes[1].address(2, 3, 12)] ^= changed
    return [left, verdict]

print(json.dumps([
    check([]),
    check([(0, 2), (1, 2), (3, 4), (9, 9)]),
    check([(layer, 4) for layer in range(4)]),
    check([(0, 4)], end=True),
    check([(0, 4), (1, 4)], changed=1),
]))
verifier.close()
"""


def interpreted(script: str, *settings: Any) -> Any:
    """Kernels run in a process of its own, because the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    words = [sys.executable, "-c", script, json.dumps(settings)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("scale", "phase"), [(1, None), (128, 640)])
def test_kernels_copy_blocks_and_notice_what_changed(scale: int, phase: int | None) -> None:
    """Cells of 96 and 40 bytes, and of 12 and 5 KiB; sampled or not."""
    num_bytes, right, others, equal, swapped, changed = interpreted(_KERNELS, scale, phase)
    assert num_bytes == 4 * 544 * scale
    assert right
    assert others == 0, "blocks outside the lease are untouched"
    assert equal, "however the blocks are cut into launches, with rehearsals in between"
    assert swapped, "order counts"
    assert changed == [False, False, True, False, False, False, False, False]


def test_layers_are_verified_as_they_land_and_at_the_end() -> None:
    nothing_early, some, all_early, ended, changed = interpreted(_VERIFIER)
    assert nothing_early == [2176, None]
    assert some == [1088, None]
    assert all_early == [0, None]
    assert ended == [1632, "the lease ended while its blocks were being verified"]
    assert changed == [1088, "plane index, layer 2: the bytes here are not the bytes that were sent"]


def describe(**changes: Any) -> Descriptor:
    fields: dict[str, Any] = {
        "device": "GPU-1",
        "driver": 13000,
        "handle": bytes(64),
        "offset": 512,
        "num_bytes": 1 << 20,
        "allocation_bytes": 2 << 20,
        **changes,
    }
    return Descriptor(**fields)


@pytest.mark.parametrize(
    "changes",
    [{"offset": -1}, {"offset": (1 << 20) + 1}, {"num_bytes": 3 << 20}, {"handle": bytes(63)}, {"num_bytes": 999}],
)
def test_a_descriptor_that_leaves_its_allocation_is_refused(changes: dict[str, Any]) -> None:
    describe().check(1 << 20)
    with pytest.raises(TransferError, match="device region"):
        describe(**changes).check(1000)


def test_long_runs_go_to_the_copy_engines() -> None:
    assert are_long(count_runs(range(64), range(64)), 64, 72 << 10)
    assert not are_long(count_runs(range(0, 128, 2), range(64)), 64, 72 << 10)
    assert merge_runs([1, 2, 3, 9], [4, 5, 6, 7]) == [Run(1, 4, 3), Run(9, 7, 1)]
    assert alignment(32, 48) == 2
    assert alignment(32, 40) == 1


def test_regions_are_flat_words() -> None:
    with pytest.raises(TransferError, match="not the address of a word of 8"):
        DeviceRegion(torch.zeros(16, dtype=torch.uint8)[1:9])
    with pytest.raises(TransferError, match="memory of meta can't be handed over"):
        DeviceRegion(torch.empty(16, dtype=torch.uint8, device="meta"))
    with pytest.raises(TransferError, match="expected flat bytes"):
        DeviceRegion(torch.zeros(16, dtype=torch.int32))


def test_cells_must_be_whole_words() -> None:
    check_words(make_layout(4))
    odd = make_layout(4)
    plane = odd.planes[0]
    import msgspec

    with pytest.raises(TransferError, match="not words of 8"):
        check_words(msgspec.structs.replace(odd, planes=(msgspec.structs.replace(plane, block_bytes=97),)))


def test_memory_that_is_on_no_card_is_a_start_up_error_that_says_so() -> None:
    region = DeviceRegion(torch.zeros(64, dtype=torch.uint8))
    layout = make_layout(4)
    with pytest.raises(ConfigError, match=r"^transfer.transport=auto: cuda_ipc: the caches are on cpu, not"):
        usable(TransferConfig(transport="auto"), None, layout, card=region, by_host=False)
    with pytest.raises(ConfigError, match=r"transport=tcp: copies from host memory"):
        usable(TransferConfig(transport="tcp"), None, layout, card=region, by_host=False)
    with pytest.raises(ConfigError, match=r"transport=cuda_ipc: the caches are in host memory, not on a card$"):
        usable(TransferConfig(transport="cuda_ipc"), None, layout)
    with pytest.raises(ConfigError, match=r"transport=cuda_ipc: the caches are on cpu, not on a card$"):
        usable(TransferConfig(transport="cuda_ipc"), None, layout, card=region)


def test_cuda_ipc_wins_where_both_ends_share_a_driver_and_says_why_where_not() -> None:
    def offers(place: str) -> list[LinkOffer]:
        return [LinkOffer(transport="cuda_ipc", host_id=place), LinkOffer(transport="tcp", address="h:1")]

    assert choose(End("p", offers("host/13000")), End("d", offers("host/13000")))[0].transport == "cuda_ipc"
    link, reason = choose(End("p", offers("host/13000")), End("d", offers("host/12080")))
    assert link.transport == "tcp"
    assert "cuda_ipc needs one host, network and PID namespace, user and driver" in reason


class Marked(DeviceRegion):
    """Its marks can be told apart."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(torch.zeros(num_bytes, dtype=torch.uint8))
        self.free: list[Any] = []

    def mark(self) -> Any:
        return object()

    def reached(self, mark: Any) -> bool:
        return True

    def recycle(self, marks: Iterable[Any]) -> None:
        self.free += [mark for mark in marks if mark is not None]


class Pushes:
    """A link that writes down what is pushed."""

    transport = "cuda_ipc"

    def __init__(self) -> None:
        self.calls: list[tuple[range, int]] = []

    def push(self, lease: Any, plan: Any, layers: range, blocks: Any, ready: Any, stopped: Any) -> int:
        self.calls.append((layers, len(blocks[0])))
        return len(blocks[0])

    def mark(self) -> None:
        return None

    def finish(self, mark: None = None) -> None:
        pass


def test_a_mark_of_several_layers_is_not_used_again_but_one_of_a_layer_is() -> None:
    layout, link = make_layout(12), Pushes()
    region, plan = Marked(layout.arena_bytes), CopyPlan(layout, layout)
    box = DeviceOutbox(layout, region, 16)
    box.put(range(4), 0, [7, 2])
    box.put(range(1), 2, [3, 11])
    own = box._items[-1].ready
    grant = Grant(request_id="r", attempt=0, lease_id=1, epoch=1, have_tokens=0, blocks=(0, 1, 2, 3))
    box.open(grant, plan, "count")
    turn = Turn(lambda: False, lambda _: None, lambda: None)
    assert box.pump(link, CostMeter(START), turn) is Pumped.IDLE  # type: ignore[arg-type]
    assert region.free == [own]
    box.put(range(1, 4), 2, [3, 11])
    assert box.pump(link, CostMeter(START), turn) is Pumped.WRITTEN  # type: ignore[arg-type]
    assert region.free == [own]


@pytest.mark.parametrize(("run_bytes", "expected"), [(1 << 40, [(range(1), 0)]), (1, [])])
def test_the_kernel_is_warmed_up_for_scattered_blocks(
    run_bytes: int, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_ENGINE_RUN_BYTES", run_bytes)
    layout, link = make_layout(12), Pushes()
    box = DeviceOutbox(layout, Marked(layout.arena_bytes), 16)
    box.prepare(link, CopyPlan(layout, layout))  # type: ignore[arg-type]
    assert link.calls == [], "nothing is ready"
    box.put(range(4), 0, [5, 6, 7, 8])
    box.prepare(link, CopyPlan(layout, layout))  # type: ignore[arg-type]
    assert link.calls == expected
