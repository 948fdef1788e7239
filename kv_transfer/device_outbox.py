"""What one hand-off still has to write from device memory: whole layers at a time, by kernels and copy engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from kv_transfer.cost import CostCurve, CostMeter
from kv_transfer.device import DeviceRegion, Mark
from kv_transfer.device_manifest import DeviceManifest
from kv_transfer.layout import CopyPlan
from kv_transfer.link import LeaseKey, Link
from kv_transfer.manifest import Policy
from kv_transfer.outbox import Granted, Item, Outbox
from llm_engine.api.handoff import Grant, KvLayout, Manifest

START = CostCurve(50e-6, 200e9)  # of a link between cards, until it is measured


class DeviceLink(Protocol):
    """What a link between devices offers beside `Link`; see CudaIpcLink."""

    def push(
        self,
        lease: LeaseKey,
        plan: CopyPlan,
        layers: range,
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

    def _write_turn(self, link: Link, cost: CostMeter, granted: Granted) -> None:
        """What the card has computed goes out at once; one layer that it is still computing is enqueued behind it."""
        device = cast(DeviceLink, link)
        turn_bytes, limit = 0, cost.batching.turn_bytes
        started = time.monotonic()
        ahead = False
        try:
            while turn_bytes < limit and not ahead and (group := self._take_group(limit - turn_bytes, granted)):
                item = group[0]
                chunk = self._chunk_of(item, granted)
                if chunk.sources:
                    ready = cast(Mark, group[-1].ready)
                    ahead = not self._region.reached(ready)
                    layers = range(item.layer, item.layer + len(group))
                    pair = (chunk.sources, chunk.targets)
                    turn_bytes += device.push(granted.lease, granted.plan, layers, pair, ready, self.gate.stopped)
                    begun = time.monotonic()
                    self._sums.add(layers, chunk.sources, chunk.start, ready)
                    self.hash_s += time.monotonic() - begun
                for each in group:
                    self._count(each.layer, chunk)
            if self._left == 0:
                self._sums.seal()
        finally:
            device.finish()  # the gate says "nothing in flight" when this turn is over
        if turn_bytes and not ahead:  # else the card's own time is in it
            cost.measured(turn_bytes, time.monotonic() - started)
        self.num_bytes += turn_bytes

    def _take_group(self, room: int, granted: Granted) -> list[Item]:
        """The next item, and those after it that are the same blocks of the next layers, as far as computed."""
        first = self._take()
        if first is None:
            return []
        group = [first]
        per_layer = len(first.blocks) * max(
            sum(self._layout.planes[row.plane].block_bytes for row in rows) for rows in granted.plan.layers
        )
        while (len(group) + 1) * per_layer <= room and self._region.reached(cast(Mark, group[-1].ready)):
            with self._lock:
                item = self._items[0] if self._items else None
                last = group[-1]
                if item is None or (item.layer, item.first) != (last.layer + 1, last.first):
                    break
                if item.blocks is not last.blocks or not self._region.reached(cast(Mark, item.ready)):
                    break
                group.append(self._items.popleft())
        return group
