"""What one hand-off still has to write from device memory: whole layers at a time, by kernels and copy engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

from kv_transfer.device import DeviceRegion, Mark
from kv_transfer.device_manifest import DeviceManifest
from kv_transfer.layout import CopyPlan, PlaneLayer
from kv_transfer.link import LeaseKey, Link
from kv_transfer.manifest import Policy
from kv_transfer.outbox import Granted, Outbox
from llm_engine.api.handoff import Grant, KvLayout, Manifest

_TURN_BYTES = 1 << 30


class DeviceLink(Protocol):
    """What a link between devices offers beside `Link`; see CudaIpcLink."""

    def push(
        self,
        lease: LeaseKey,
        plan: CopyPlan,
        rows: Sequence[PlaneLayer],
        blocks: tuple[Sequence[int], Sequence[int]],
        ready: Mark,
        stopped: Callable[[], bool],
    ) -> int:
        """Enqueue."""
        ...

    def finish(self) -> None:
        """Wait for what was enqueued."""
        ...


class DeviceOutbox(Outbox):
    """An Outbox whose copies run on the card, each layer's behind the kernels that compute it."""

    def __init__(self, layout: KvLayout, region: DeviceRegion, num_tokens: int) -> None:
        super().__init__(layout, memoryview(b""), num_tokens)
        self._region = region
        self._sums: DeviceManifest

    def open(self, grant: Grant, plan: CopyPlan, policy: Policy) -> None:
        """See Outbox.open."""
        super().open(grant, plan, policy)
        self._sums = DeviceManifest(self._region, self._layout, policy, LeaseKey(grant.lease_id, grant.epoch))

    def manifest(self) -> Manifest:
        """See Outbox.manifest."""
        return self._sums.build(self.num_tokens, self.num_sent_blocks)

    def _mark(self) -> Mark:
        return self._region.mark()

    def _write_turn(self, link: Link, granted: Granted) -> None:
        device = cast(DeviceLink, link)
        turn_bytes = 0
        try:
            while turn_bytes < _TURN_BYTES and (item := self._take()) is not None:
                sources, start = granted.sources(item)
                if sources:
                    rows = granted.plan.layers[item.layer]
                    targets = granted.blocks[start : start + len(sources)]
                    ready = cast(Mark, item.ready)
                    pair = (sources, targets)
                    turn_bytes += device.push(granted.lease, granted.plan, rows, pair, ready, self.gate.stopped)
                    self._sums.add(rows, sources, start)
                self._count(item, sources, start)
        finally:
            device.finish()  # the gate says "nothing in flight" when this turn is over
        self.num_bytes += turn_bytes
        if self._left == 0:
            self._sums.seal()
