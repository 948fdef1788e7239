"""A rig whose ends stand for workers on cards: their caches are memory of this process, which a driver of its own maps.

What a real card does (streams, kernels, copy engines, handles between processes) is tested in tests/gpu.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

import pytest
import torch

from kv_transfer import cuda_ipc, device, device_copies, transports
from kv_transfer.cuda_ipc import CudaIpcLink
from kv_transfer.device import DeviceRegion, Mark
from kv_transfer.device_copies import PeerMemory
from kv_transfer.fault import Fault, FaultyLink
from kv_transfer.layout import CopyPlan
from kv_transfer.link import Copy, LeaseKey, Sent, no_news
from kv_transfer.receiver import Ground, HandoffServer
from llm_engine.api.errors import TransferError
from llm_engine.api.messages import Submit
from tests.unit.kv_transfer.rig import BLOCK_TOKENS, KEY, Pool, Reservation, Rig, block_bytes, make_layout

_HANDLE = struct.Struct("<Q56x")


class HostDriver:
    """Hands addresses of this process out as handles. `reason`: why it maps nothing, if it does not."""

    version = 13000
    reason = ""

    def __init__(self) -> None:
        self.mapped: set[int] = set()

    def bind(self, ordinal: int) -> None:
        pass

    def export(self, address: int) -> tuple[bytes, int, int]:
        return _HANDLE.pack(address), 0, 1 << 40

    def open(self, handle: bytes) -> int:
        if self.reason:
            raise TransferError(self.reason)
        (address,) = _HANDLE.unpack(handle)
        self.mapped.add(address)
        return int(address)

    def close(self, address: int) -> None:
        self.mapped.remove(address)


def push(
    region: DeviceRegion,
    target: PeerMemory,
    plan: CopyPlan,
    layers: range,
    sources: Sequence[int],
    targets: Sequence[int],
    ready: Mark,
) -> int:
    """`device_copies.push_blocks` by the processor."""
    total = 0
    for row in (row for layer in layers for row in plan.layers[layer]):
        here, there = plan.source.planes[row.plane], plan.target.planes[row.plane]
        for source, block in zip(sources, targets, strict=True):
            from_ = region.memory.data_ptr() + here.address(row.layer, source, plan.source.num_blocks)
            to = target.address + there.address(row.layer, block, plan.target.num_blocks)
            ctypes.memmove(to, from_, here.block_bytes)
            total += here.block_bytes
    return total


def write(
    link: CudaIpcLink,
    lease: LeaseKey,
    source: memoryview,
    copies: Sequence[Copy],
    stopped: Callable[[], bool],
    sent: Sent = no_news,
) -> None:
    """`CudaIpcLink.write` by the processor."""
    for copy in copies:
        data = bytes(source[copy.source : copy.source + copy.num_bytes])
        ctypes.memmove(link._target.address + copy.target, data, copy.num_bytes)


class FaultyCards(FaultyLink):
    """Cards that do not reach each other, whatever they say."""

    def __init__(self, inner: CudaIpcLink) -> None:
        super().__init__(inner, lambda: Fault.FLIP)
        self.push, self.mark, self.finish = inner.push, inner.mark, inner.finish


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    """What stands for NVIDIA's."""
    made = HostDriver()
    for module in (cuda_ipc, device, device_copies):
        monkeypatch.setattr(module, "driver", lambda: made)
    for module in (cuda_ipc, device):
        monkeypatch.setattr(module, "missing", lambda region: "")
    monkeypatch.setattr(cuda_ipc, "push_blocks", push)
    monkeypatch.setattr(CudaIpcLink, "write", write)
    monkeypatch.setattr(DeviceRegion, "uuid", "card")
    return made


def move_writers_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that are opened from now on come from another host."""
    monkeypatch.setattr(device, "place_id", lambda: "elsewhere/1/13000")
    monkeypatch.setattr(transports, "host_id", lambda: "elsewhere")


class CardRig(Rig):
    """Both ends on cards. The rig's arena and pool are the slots; `caches` and `cached` are what is on the card.

    Without checksums, which on cards are kernels, and those are interpreted by one thread at a time only; the rig
    compares the bytes.
    """

    def __init__(self, transport: str = "auto", **options: float | str) -> None:
        super().__init__(transport, **{"checksum": "count", **options})  # type: ignore[arg-type]
        self.card = DeviceRegion(torch.frombuffer(self.source.buffer, dtype=torch.uint8))
        self.caches_layout = make_layout(48)
        self.caches = DeviceRegion(torch.zeros(self.caches_layout.arena_bytes, dtype=torch.uint8))
        self.cached = Pool(48, on_admit=self._check_caches)

    def make_server(self) -> HandoffServer[Reservation]:
        return HandoffServer(
            config=self.receiver_config,
            key=KEY,
            layout=self.caches_layout,
            arena=self.caches,
            reserver=self.cached,
            staging=Ground(self.layout, self.arena, self.pool),
        )

    def _check_caches(self, submit: Submit, reservation: Reservation) -> None:
        ours = memoryview(self.caches.memory.numpy())  # type: ignore[arg-type]
        sources = self.sent[submit.request_id, submit.attempt][reservation.have_tokens // BLOCK_TOKENS :]
        for source, target in zip(sources, reservation.blocks, strict=True):
            sent = block_bytes(self.source_layout, self.source.buffer, source)
            assert block_bytes(self.caches_layout, ours, target) == sent
