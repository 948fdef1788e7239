"""Hand-offs from a card to peers that its copies don't reach: piece by piece through pinned host memory.

card ─ gather a few blocks of a few layers ─▶ one half of the bounce memory ─ link ─▶ the peer's memory
                                              the other half is filled meanwhile

A piece is copied once the card has computed it, and written when its copy has ended; nothing of the card is read any
more when a turn is over. Every session has bounce memory of its own, so that a slow peer holds up nobody else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from kv_transfer.cost import CostMeter
from kv_transfer.device import DeviceRegion, Mark, row_start
from kv_transfer.device_outbox import DeviceOutbox
from kv_transfer.layout import PIECE_BYTES, Blocks, CopyPlan, PlaneLayer, Run, count_runs, merge_runs
from kv_transfer.link import Copy, LeaseKey, Link
from kv_transfer.manifest import Policy
from kv_transfer.mooncake import Engine
from kv_transfer.outbox import Chunk, Granted, Item, Outbox, Turn
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import Grant, KvLayout, Manifest

_HALF_BYTES = 8 << 20  # or one block of a layer, if that is more
_ALIGNMENT = 2 << 20  # for engines that want whole huge pages


class Bounce:
    """Host memory that one session's bytes pass through, in two halves. Used by its sender thread alone."""

    def __init__(self, region: DeviceRegion, layout: KvLayout, engine: Engine | None = None) -> None:
        """Pins memory, which takes milliseconds. `engine`: will read it. Raises TransferError when one refuses."""
        least = max(_HALF_BYTES, CopyPlan(layout, layout).most_layer_bytes)
        self.half_bytes = -(-least // _ALIGNMENT) * _ALIGNMENT
        size = 2 * self.half_bytes
        try:
            with region.copying():  # on the region's card
                pinned = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, pin_memory=region.stream is not None)
        except RuntimeError as exc:
            raise TransferError(f"{size >> 20} MiB of host memory can't be pinned: {exc}") from exc
        first = -pinned.data_ptr() % _ALIGNMENT
        self.memory = pinned[first : first + size]
        self.view = memoryview(self.memory.numpy())  # type: ignore[arg-type]
        self._engine = engine
        if engine is not None:
            engine.add(self.view)

    def close(self) -> None:
        """Nobody reads it any more."""
        if self._engine is not None:
            self._engine.remove(self.view)


class StagedPlan(CopyPlan):
    """A plan whose bytes go through `bounce`."""

    def __init__(self, source: KvLayout, target: KvLayout, bounce: Bounce) -> None:
        super().__init__(source, target)
        self.bounce = bounce


@dataclass(slots=True)
class _Part:
    """Blocks [first, last) of those of an item's chunk that must be sent."""

    item: Item
    chunk: Chunk
    first: int
    last: int

    def blocks(self) -> tuple[Blocks, Blocks]:
        """Here and there."""
        sources, targets = self.chunk.sources, self.chunk.targets
        if self.last - self.first == len(sources):  # the same objects for every layer: their tables are kept
            return sources, targets
        return Blocks(sources[self.first : self.last]), Blocks(targets[self.first : self.last])


@dataclass(slots=True)
class _Piece:
    """What one half holds, once the card has passed `copied`."""

    parts: Sequence[_Part]
    batch: list[tuple[PlaneLayer, Copy]]
    num_bytes: int
    copied: Mark


class CardOutbox(DeviceOutbox):
    """An Outbox over a card. The plan that comes with the grant says whether its bytes go through the host."""

    def __init__(self, layout: KvLayout, region: DeviceRegion, num_tokens: int) -> None:
        super().__init__(layout, region, num_tokens)
        self._bounce: Bounce | None = None

    def prepare(self, link: Link, plan: CopyPlan) -> None:
        """See Outbox.prepare."""
        if not isinstance(plan, StagedPlan):
            super().prepare(link, plan)

    def open(self, grant: Grant, plan: CopyPlan, policy: Policy) -> None:
        """See Outbox.open."""
        if isinstance(plan, StagedPlan):
            self._bounce, self._source = plan.bounce, plan.bounce.view
        super().open(grant, plan, policy)

    def manifest(self) -> Manifest:
        """See Outbox.manifest."""
        return super().manifest() if self._bounce is None else Outbox.manifest(self)

    def _begin(self, policy: Policy, lease: LeaseKey) -> None:
        if self._bounce is None:
            super()._begin(policy, lease)
        else:
            Outbox._begin(self, policy, lease)

    def _write_turn(self, link: Link, cost: CostMeter, granted: Granted, turn: Turn) -> None:
        if self._bounce is None:
            super()._write_turn(link, cost, granted, turn)
            return
        flying: deque[_Piece] = deque()  # one is being copied to the host, while the one before it is written
        half = 0
        try:
            for parts in self._pieces(self._bounce, cost, granted, turn):
                if parts:
                    flying.append(self._fetch(self._bounce, half, granted.plan, parts))
                    half = 1 - half
                while len(flying) > (1 if parts else 0):
                    self._send(link, cost, granted, flying.popleft())
        finally:
            for piece in flying:  # the gate says that nothing is read any more when this turn is over
                self._region.wait(piece.copied)

    def _pieces(self, bounce: Bounce, cost: CostMeter, granted: Granted, turn: Turn) -> Iterator[list[_Part]]:
        """What to write in this turn, cut so that each piece fits a half, is worth a call, and waits for no layer that
        is computed later than its first. An empty one: write what is under way, before the card is waited for."""
        call_bytes, turn_bytes = cost.batching
        most = min(bounce.half_bytes, max(call_bytes, granted.plan.most_layer_bytes))
        parts, room, taken = list[_Part](), most, 0
        while taken < turn_bytes and self._items:
            if not self._is_computed(self._items[0]):
                yield parts
                if parts:
                    yield []
                if taken and turn.others_wait():
                    return
                parts, room = [], most
            item = self._items.popleft()  # nobody else takes any
            chunk, per_block = self._chunk_of(item, granted), _block_bytes(granted.plan, item.layer)
            first = 0
            while first < len(chunk.sources):
                count = min(room // per_block, len(chunk.sources) - first)
                if count == 0:
                    yield parts
                    parts, room = [], most
                    continue
                parts.append(_Part(item, chunk, first, first + count))
                first, room, taken = first + count, room - count * per_block, taken + count * per_block
        if parts:
            yield parts
        yield []

    def _is_computed(self, item: Item) -> bool:
        return self._region.reached(cast(Mark, item.ready))

    def _fetch(self, bounce: Bounce, half: int, plan: CopyPlan, parts: Sequence[_Part]) -> _Piece:
        """Wait until the card has computed the parts, then enqueue their way to the host."""
        for part in parts:
            self._region.wait(cast(Mark, part.item.ready))
        batch: list[tuple[PlaneLayer, Copy]] = []
        begin = end = half * bounce.half_bytes
        with self._region.copying():
            for part in parts:
                sources, targets = part.blocks()
                is_run = count_runs(sources, sources) == 1
                runs = merge_runs(range(len(targets)), targets)
                for row in plan.layers[part.item.layer]:
                    cells = _cells(self._region, plan.source, row)
                    if is_run:
                        cells = cells[sources[0] : sources[0] + len(sources)]
                    else:
                        cells = cells.index_select(0, self._region.table(sources))
                    bounce.memory[end : end + cells.numel()].copy_(cells.view(-1), non_blocking=True)
                    batch += [(row, copy) for copy in _copies(plan, row, end, runs)]
                    end += cells.numel()
            return _Piece(parts, batch, end - begin, self._region.copied())

    def _send(self, link: Link, cost: CostMeter, granted: Granted, piece: _Piece) -> None:
        self._region.wait(piece.copied)
        self._write(link, cost, granted.lease, piece.batch, piece.num_bytes)
        self._region.recycle([piece.copied])
        for part in piece.parts:
            if part.last == len(part.chunk.sources):
                self._count(part.item.layer, part.chunk)


def _block_bytes(plan: CopyPlan, layer: int) -> int:
    """Of one block of a layer."""
    return sum(plan.source.planes[row.plane].block_bytes for row in plan.layers[layer])


def _cells(region: DeviceRegion, layout: KvLayout, row: PlaneLayer) -> torch.Tensor:
    """One plane row: [blocks, block_bytes] on the card."""
    size, start = layout.planes[row.plane].block_bytes, row_start(layout, row)
    return region.memory[start : start + layout.num_blocks * size].view(layout.num_blocks, size)


def _copies(plan: CopyPlan, row: PlaneLayer, source: int, runs: Sequence[Run]) -> Iterator[Copy]:
    """From cells that lie one after the other at `source`; none longer than PIECE_BYTES unless a single block is."""
    plane = plan.target.planes[row.plane]
    size, step = plane.block_bytes, max(1, PIECE_BYTES // plane.block_bytes)
    for run in runs:
        to = plane.address(row.layer, run.target, plan.target.num_blocks)
        for first in range(0, run.num_blocks, step):
            length = min(step, run.num_blocks - first) * size
            yield Copy(source + (run.source + first) * size, to + first * size, length)
