"""What one hand-off still has to write from device memory: whole layers at a time, by kernels and copy engines."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

from kv_transfer.cost import CostCurve, CostMeter
from kv_transfer.device import DeviceRegion, Mark
from kv_transfer.device_manifest import DeviceManifest
from kv_transfer.layout import CopyPlan
from kv_transfer.link import LeaseKey, Link
from kv_transfer.manifest import Policy
from kv_transfer.outbox import Chunk, Granted, Item, Outbox, Turn
from llm_engine.api.handoff import KvLayout, Manifest

START = CostCurve(50e-6, 200e9)  # of a link between cards, until it is measured
_IN_FLIGHT = 2  # slices: the card has the next one when it ends one
_LEAST_SLICE_S = 500e-6  # slices get smaller towards the end: the receiver checks the last one when all is written
_AHEAD_S = 2e-3  # of compute that may be enqueued as one slice: short layers would cost more than they take
_NEAR_S = 6e-3  # before the end both processes begin to stay awake
_SUM_BYTES = 32 << 20  # fewer are hashed with those that follow, in one go
_NO_LEASE = LeaseKey(0, 0)
_PROGRESS_BYTES = 8 << 20  # the receiver hears of so many, and stays ready to check the last ones at once


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
        """Enqueue. No blocks: go through the motions."""
        ...

    def mark(self) -> Mark:
        """The end of what was enqueued so far."""
        ...

    def finish(self, mark: Mark = None) -> None:
        """Wait for what was enqueued (before `mark`)."""
        ...


class _Slice(NamedTuple):
    """Layers of a chunk whose copies are enqueued."""

    group: list[Item]
    chunk: Chunk
    num_bytes: int
    done: Mark
    ahead: bool  # enqueued while the card was still computing it


class DeviceOutbox(Outbox):
    """An Outbox whose copies run on the card, each layer's behind the kernels that compute it."""

    def __init__(self, layout: KvLayout, region: DeviceRegion, num_tokens: int) -> None:
        super().__init__(layout, memoryview(b""), num_tokens)
        self._region = region
        self._layer_bytes = layout.bytes_per_block() // len(self._next)  # of a block, on average
        self._policy: Policy = "full"
        self._sums: DeviceManifest | None = None
        self._flying: deque[_Slice] = deque()
        self._landed_at = 0.0  # the last slice
        self._built: Manifest | None = None
        self._layer_s = math.inf  # what the card takes to compute a layer of the chunk, as far as known …
        self._cell_s = 0.0  # … and one of its blocks
        self._is_near = False  # the end: that was told
        self._unsummed: tuple[range, Chunk] | None = None  # enqueued, and not yet its checksums

    def prepare(self, link: Link, plan: CopyPlan) -> None:
        """See Outbox.prepare: the first blocks' ids are put on the card; for scattered ones the kernel is warmed up."""
        with self._lock:
            blocks = self._items[0].blocks if self._items else ()
        if not blocks:
            return
        self._region.table(blocks)
        if not self._region.long_runs(blocks, blocks, min(plane.block_bytes for plane in plan.source.planes)):
            cast(DeviceLink, link).push(_NO_LEASE, plan, range(1), ((), ()), None, lambda: False)

    def manifest(self) -> Manifest:
        """See Outbox.manifest."""
        return self._built or self._checksums().build(self.num_tokens, self.num_sent_blocks)

    def _begin(self, policy: Policy, lease: LeaseKey) -> None:
        self._policy = policy

    def _mark(self) -> Mark:
        return self._region.mark()

    def _write_turn(self, link: Link, cost: CostMeter, granted: Granted, turn: Turn) -> None:
        """As long as there is something to write and nobody else waits.

        What the card has computed goes out slice by slice; a layer that it is still computing is enqueued behind it.
        """
        device = cast(DeviceLink, link)
        self._landed_at = time.monotonic()
        try:
            while self._fill(device, cost, granted, turn):
                self._tell(turn, _PROGRESS_BYTES)
                if not self._is_near and self._left_s(cost) <= _NEAR_S:
                    self._is_near = True
                    turn.near()
                if self._unsent() == 0:
                    self.marks.reach("enqueued")
                    if len(self._flying) == 1:  # checksums are there before the copies
                        self._built = self._checksums().build(self.num_tokens, self.num_sent_blocks)
                        self.marks.reach("summed")
                device.finish(self._flying[0].done)
                self._land(cost)
                if self._left == 0:  # the receiver checks it while the manifest is on its way
                    self._tell(turn, 0)
                if not self._flying and turn.others_wait():
                    break
        finally:
            device.finish()  # the gate says "nothing in flight" when this turn is over
            while self._flying:
                self._land(cost)

    def _fill(self, device: DeviceLink, cost: CostMeter, granted: Granted, turn: Turn) -> bool:
        """Enqueue slices until enough are in flight. False: none is, because there is nothing to write."""
        while len(self._flying) < _IN_FLIGHT and not (self._flying and turn.others_wait()):
            group = self._take_group(self._room(cost, granted), granted)
            if not group:
                break
            self._push(device, granted, group)
        return bool(self._flying)

    def _push(self, device: DeviceLink, granted: Granted, group: list[Item]) -> None:
        chunk, ready = self._chunk_of(group[0], granted), cast(Mark, group[-1].ready)
        layers, num_bytes = range(group[0].layer, group[0].layer + len(group)), 0
        ahead = not self._region.reached(ready)
        if chunk.sources:
            pair = (chunk.sources, chunk.targets)
            num_bytes = device.push(granted.lease, granted.plan, layers, pair, ready, self.gate.stopped)
        self._flying.append(_Slice(group, chunk, num_bytes, device.mark(), ahead))
        if chunk.sources:
            begun = time.monotonic()
            self._sum(layers, chunk, ready)
            self.hash_s += time.monotonic() - begun

    def _sum(self, layers: range, chunk: Chunk, ready: Mark) -> None:
        """Enqueue checksums: of small layers that follow each other in one go."""
        is_last, before = self._unsent() == 0, self._unsummed
        if before is not None:
            if before[1] is chunk and before[0].stop == layers.start:
                layers = range(before[0].start, layers.stop)
            else:
                self._checksums().add(before[0], before[1].sources, before[1].start, ready)
            self._unsummed = None
        if not is_last and len(layers) * len(chunk.sources) * self._layer_bytes < _SUM_BYTES:
            self._unsummed = layers, chunk
            return
        self._checksums().add(layers, chunk.sources, chunk.start, ready)
        if is_last:
            self._checksums().seal()

    def _land(self, cost: CostMeter) -> None:
        """The oldest slice has landed."""
        piece, before, self._landed_at = self._flying.popleft(), self._landed_at, time.monotonic()
        for item in piece.group:
            self._count(item.layer, piece.chunk)
        self.num_bytes += piece.num_bytes
        if piece.ahead:
            self._layer_s = max(1e-6, self._landed_at - before) / len(piece.group)
            self._cell_s = self._layer_s / max(1, len(piece.chunk.sources))
        elif piece.num_bytes:
            cost.measured(piece.num_bytes, self._landed_at - before)
        own = (cast(Mark, item.ready) for item in piece.group if not item.is_shared)
        self._region.recycle([piece.done, *own])

    def _unsent(self) -> int:
        """(layer, block) pairs that are not even enqueued."""
        return self._left - sum(len(piece.group) * len(piece.chunk.sources) for piece in self._flying)

    def _left_s(self, cost: CostMeter) -> float:
        """Until everything is written, about."""
        return self._left * max(self._cell_s, self._layer_bytes / cost.curve.bytes_per_s)

    def _room(self, cost: CostMeter, granted: Granted) -> int:
        """Bytes of the next slice: half a turn, or half of what is left."""
        left = self._unsent() * granted.plan.most_layer_bytes
        return max(min(cost.batching.turn_bytes, left) // 2, int(_LEAST_SLICE_S * cost.curve.bytes_per_s))

    def _take_group(self, room: int, granted: Granted) -> list[Item]:
        """The next item, and those after it that are the same blocks of the next layers: as far as computed, or, if
        they are computed quickly, a few at a time."""
        first = self._take()
        if first is None:
            return []
        group = [first]
        most = room // max(1, len(first.blocks) * granted.plan.most_layer_bytes)
        ahead = not self._region.reached(cast(Mark, first.ready))
        if ahead:
            most = min(most, int(_AHEAD_S / self._layer_s), self._unsent() // (2 * max(1, len(first.blocks))))
        with self._lock:
            while self._items and len(group) < most:
                item, last = self._items[0], group[-1]
                if (item.layer, item.first) != (last.layer + 1, last.first):
                    break
                if item.blocks is not last.blocks:
                    break
                if not (ahead or item.ready is last.ready or self._region.reached(cast(Mark, item.ready))):
                    break
                group.append(self._items.popleft())
        return group

    def _checksums(self) -> DeviceManifest:
        """Made behind the first copies, not before them."""
        if self._sums is None:
            assert self._granted is not None
            self._sums = DeviceManifest(self._region, self._layout, self._policy, self._granted.lease)
        return self._sums
