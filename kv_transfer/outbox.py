"""What one hand-off still has to write.

Filled by the engine's step thread (`put`), opened by the event loop when the grant is there (`open`), emptied by the
peer's sender thread (`pump`), stopped by the loop through `gate`.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kv_transfer.gate import WriteGate
from kv_transfer.layout import PIECE_BYTES, CopyPlan, layer_planes, merge_runs
from kv_transfer.link import Copy, LeaseKey, Link
from kv_transfer.manifest import ManifestBuilder, Policy
from llm_engine.api.errors import LeaseRevoked, ProtocolError
from llm_engine.api.handoff import Grant, KvLayout, Manifest

_TURN_BYTES = 16 << 20  # written for one hand-off before the sender looks at the next
_BATCH_COPIES = 1024


class Pumped(enum.Enum):
    """What is left after a turn of the sender."""

    MORE = "more"  # give it another turn
    IDLE = "idle"  # nothing to write now, or stopped
    WRITTEN = "written"  # every block of every layer has been written; reported once


class _Item(NamedTuple):
    layer: int
    first: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Granted:
    lease: LeaseKey
    plan: CopyPlan
    skip: int  # leading blocks of the sequence that the receiver has
    blocks: tuple[int, ...]


class Outbox:
    """One hand-off's pending writes and the manifest that grows with them."""

    def __init__(self, layout: KvLayout, source: memoryview, num_tokens: int, policy: Policy) -> None:
        self.gate = WriteGate()
        self.num_tokens = num_tokens
        self.num_blocks = -(-num_tokens // layout.block_tokens)  # of the whole sequence
        self.num_bytes = 0  # written
        self.write_s = 0.0
        self._layout = layout
        self._source = source
        self._manifest = ManifestBuilder(layout, policy)
        self._lock = threading.Lock()
        self._items: deque[_Item] = deque()
        self._next = [0] * len(layer_planes(layout))
        self._granted: _Granted | None = None
        self._queued = False  # the sender has been woken and has not begun its turn
        self._left = -1  # (layer, block) pairs still to be written; -1 before the grant

    def put(self, layer: int, first: int, blocks: Sequence[int]) -> bool:
        """Blocks `first …` are complete in `layer`. Any thread. True: wake the sender.

        Raises ValueError if the call leaves a gap, repeats blocks, or names blocks that do not exist.
        """
        if self.gate.stopped():
            return False
        with self._lock:
            if not 0 <= layer < len(self._next) or first != self._next[layer] or first + len(blocks) > self.num_blocks:
                last = first + len(blocks) - 1
                raise ValueError(f"layer {layer}: {first}..{last} are not the next of {self.num_blocks} blocks")
            if not all(0 <= block < self._layout.num_blocks for block in blocks):
                raise ValueError(f"layer {layer}: block ids {list(blocks)}, expected 0..{self._layout.num_blocks - 1}")
            self._next[layer] = first + len(blocks)
            self._items.append(_Item(layer, first, tuple(blocks)))
            return self._wake()

    def open(self, grant: Grant, plan: CopyPlan) -> None:
        """The receiver has reserved its blocks; wake the sender. Raises ProtocolError for an impossible grant."""
        skip, rest = divmod(grant.have_tokens, self._layout.block_tokens)
        expected = self.num_blocks - skip
        if rest or not 0 <= skip <= self.num_blocks or len(grant.blocks) != expected:
            raise ProtocolError(
                f"grant of {len(grant.blocks)} blocks after {grant.have_tokens} tokens for {self.num_tokens} tokens"
            )
        in_range = all(0 <= block < plan.target.num_blocks for block in grant.blocks)
        if not in_range or len(set(grant.blocks)) != expected:
            raise ProtocolError(f"grant names blocks twice or outside 0..{plan.target.num_blocks - 1}")
        with self._lock:
            self._granted = _Granted(LeaseKey(grant.lease_id, grant.epoch), plan, skip, tuple(grant.blocks))
            self._left = len(self._next) * expected
            self._queued = True

    @property
    def lease(self) -> LeaseKey | None:
        """The lease once granted."""
        return self._granted.lease if self._granted is not None else None

    @property
    def have_tokens(self) -> int:
        """Tokens that the receiver found in its own prefix cache."""
        return self._granted.skip * self._layout.block_tokens if self._granted is not None else 0

    @property
    def num_sent_blocks(self) -> int:
        """Blocks that are, or will be, sent."""
        return len(self._granted.blocks) if self._granted is not None else 0

    def manifest(self) -> Manifest:
        """Of everything written; call it after WRITTEN."""
        return self._manifest.build(self.num_tokens, self.num_sent_blocks)

    def pump(self, link: Link) -> Pumped:
        """Sender thread: write what is ready, for one turn. Raises TransferError when the link is broken."""
        with self._lock:
            self._queued = False
            granted = self._granted
        if granted is None or not self.gate.enter():
            return Pumped.IDLE
        started = time.monotonic()
        try:
            self._write_turn(link, granted)
        except LeaseRevoked:  # by our own gate
            return Pumped.IDLE
        finally:
            self.write_s += time.monotonic() - started
            self.gate.leave()
        with self._lock:
            if self._left == 0:
                self._left = -1
                return Pumped.WRITTEN
            return Pumped.MORE if self._wake() else Pumped.IDLE

    def _write_turn(self, link: Link, granted: _Granted) -> None:
        batch: list[Copy] = []
        batch_bytes = turn_bytes = 0
        while turn_bytes < _TURN_BYTES and (item := self._take()) is not None:
            drop = max(0, granted.skip - item.first)
            sources = item.blocks[drop:]
            start = item.first + drop - granted.skip
            runs = merge_runs(sources, granted.blocks[start : start + len(sources)])
            for row in granted.plan.layers[item.layer]:
                for copy in granted.plan.copies(row, runs):
                    self._manifest.add(row, self._source[copy.source : copy.source + copy.num_bytes])
                    batch.append(copy)
                    batch_bytes += copy.num_bytes
                    if batch_bytes >= PIECE_BYTES or len(batch) == _BATCH_COPIES:
                        self._write(link, granted, batch, batch_bytes)
                        turn_bytes += batch_bytes
                        batch, batch_bytes = [], 0
            self._left -= len(sources)
        if batch:
            self._write(link, granted, batch, batch_bytes)

    def _write(self, link: Link, granted: _Granted, batch: list[Copy], num_bytes: int) -> None:
        link.write(granted.lease, self._source, batch, self.gate.stopped)
        self.num_bytes += num_bytes

    def _take(self) -> _Item | None:
        with self._lock:
            return self._items.popleft() if self._items else None

    def _wake(self) -> bool:
        """With the lock held: whether the sender needs a new turn that nobody has asked for yet."""
        if self._granted is None or self._queued or not self._items:
            return False
        self._queued = True
        return True
