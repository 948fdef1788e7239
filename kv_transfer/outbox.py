"""What one hand-off still has to write.

Filled by the engine's step thread (`put`), opened by the event loop when the grant is there (`open`), emptied by the
peer's sender thread (`pump`), stopped by the loop through `gate`.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, TypeAlias

from kv_transfer.cost import CostMeter
from kv_transfer.gate import WriteGate
from kv_transfer.layout import Blocks, CopyPlan, PlaneLayer, Run, layer_planes, merge_runs
from kv_transfer.link import Copy, LeaseKey, Link
from kv_transfer.manifest import ManifestBuilder, Policy
from kv_transfer.metrics import Marks
from llm_engine.api.errors import LeaseRevoked, ProtocolError
from llm_engine.api.handoff import Grant, KvLayout, Manifest

_BATCH_COPIES = 1024
_PROGRESS_BYTES = 1 << 20  # when idle the receiver is told what it may hash already, if it is so much
_BUSY_PROGRESS_BYTES = 32 << 20  # and while there is more to write, because telling takes time from the copying


News: TypeAlias = tuple[tuple[int, int], ...]  # (layer, blocks of the grant written so far)


class Pumped(enum.Enum):
    """What is left after a turn of the sender."""

    MORE = "more"  # give it another turn
    IDLE = "idle"  # nothing to write now
    STOPPED = "stopped"  # not granted, or the gate is closed
    WRITTEN = "written"  # every block of every layer has been written; reported once


class Turn(NamedTuple):
    """What a turn of the sender needs to know of the world, and may tell it."""

    others_wait: Callable[[], bool]
    tell: Callable[[News], None]  # this has been written
    near: Callable[[], None]  # everything will be within milliseconds


class Item(NamedTuple):
    """Blocks of one layer; `ready`: when they are, for memory that is computed behind the caller's back."""

    layer: int
    first: int
    blocks: tuple[int, ...]
    ready: object
    is_shared: bool  # other items have the same `ready`


@dataclass(frozen=True)
class Chunk:
    """Blocks of the sequence as they are reported for layer after layer, under a grant."""

    first: int
    blocks: tuple[int, ...]
    start: int  # position in the lease of the first block that must be sent
    sources: Blocks  # those that must be sent …
    targets: Blocks  # … and where to

    @cached_property
    def runs(self) -> list[Run]:
        """Neighbours on both ends."""
        return merge_runs(self.sources, self.targets)


@dataclass(frozen=True, slots=True)
class Granted:
    """What a grant says, beside its plan."""

    lease: LeaseKey
    plan: CopyPlan
    skip: int  # leading blocks of the sequence that the receiver has
    blocks: tuple[int, ...]

    def chunk(self, first: int, blocks: tuple[int, ...]) -> Chunk:
        """What of the blocks `first …` of the sequence must be sent, and to where."""
        drop = max(0, self.skip - first)
        sources, start = Blocks.of(blocks[drop:] if drop else blocks), first + drop - self.skip
        return Chunk(first, blocks, start, sources, Blocks(self.blocks[start : start + len(sources)]))


class Outbox:
    """One hand-off's pending writes and the manifest that grows with them."""

    def __init__(self, layout: KvLayout, source: memoryview, num_tokens: int) -> None:
        self.gate = WriteGate()
        self.num_tokens = num_tokens
        self.num_blocks = -(-num_tokens // layout.block_tokens)  # of the whole sequence
        self.num_bytes = 0  # written
        self.write_s = 0.0
        self.marks = Marks()
        self.hash_s = 0.0
        self._layout = layout
        self._source = source
        self._hashes = False  # the receiver compares checksums
        self._manifest: ManifestBuilder
        self._written: dict[int, int] = {}  # layer → blocks written, where the receiver has not been told
        self._told_bytes = 0
        self._lock = threading.Lock()
        self._items: deque[Item] = deque()
        self._next = [0] * len(layer_planes(layout))
        self._checked = Blocks()
        self._last: tuple[int, ...] | None = None  # as it was given; nobody can have changed it since
        self._chunk: Chunk | None = None  # the sender's last
        self._granted: Granted | None = None
        self._queued = False  # the sender has been woken; until its turn has ended
        self._left = -1  # (layer, block) pairs still to be written; -1 before the grant

    def put(self, layers: range, first: int, blocks: Sequence[int]) -> bool:
        """Blocks `first …` are complete in these layers. Any thread. True: wake the sender.

        Raises ValueError if the call leaves a gap, repeats blocks, or names blocks or layers that do not exist.
        """
        if self.gate.stopped():
            return False
        ready = self._mark()
        with self._lock:
            fits = 0 <= layers.start < layers.stop <= len(self._next) and first + len(blocks) <= self.num_blocks
            if not fits or any(self._next[layer] != first for layer in layers):
                last = first + len(blocks) - 1
                raise ValueError(f"layers {layers}: {first}..{last} are not the next of {self.num_blocks} blocks")
            # Every layer of a chunk reports the same blocks, most often in the same tuple.
            if blocks is not self._last and tuple(blocks) != self._checked:
                if len(blocks) and not (min(blocks) >= 0 and max(blocks) < self._layout.num_blocks):
                    expected = f"expected 0..{self._layout.num_blocks - 1}"
                    raise ValueError(f"layers {layers}: block ids {list(blocks)}, {expected}")
                self._checked = Blocks(blocks)
            self._last = blocks if isinstance(blocks, tuple) else None
            self._next[layers.start : layers.stop] = [first + len(blocks)] * len(layers)
            self._items.extend(Item(layer, first, self._checked, ready, len(layers) > 1) for layer in layers)
            return self._wake()

    def prepare(self, link: Link, plan: CopyPlan) -> None:
        """Sender thread: what can be done for what is ready before the grant is here."""

    def open(self, grant: Grant, plan: CopyPlan, policy: Policy) -> None:
        """The receiver has reserved its blocks; wake the sender. Raises ProtocolError for an impossible grant."""
        skip, rest = divmod(grant.have_tokens, self._layout.block_tokens)
        expected = self.num_blocks - skip
        if rest or not 0 <= skip <= self.num_blocks or len(grant.blocks) != expected:
            raise ProtocolError(
                f"grant of {len(grant.blocks)} blocks after {grant.have_tokens} tokens for {self.num_tokens} tokens"
            )
        in_range = not expected or (min(grant.blocks) >= 0 and max(grant.blocks) < plan.target.num_blocks)
        if not in_range or len(set(grant.blocks)) != expected:
            raise ProtocolError(f"grant names blocks twice or outside 0..{plan.target.num_blocks - 1}")
        lease = LeaseKey(grant.lease_id, grant.epoch)
        self._hashes = policy != "count"
        self._begin(policy, lease)
        with self._lock:
            self._granted = Granted(lease, plan, skip, tuple(grant.blocks))
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

    def pump(self, link: Link, cost: CostMeter, turn: Turn) -> Pumped:
        """Sender thread: write what is ready, for one turn. Raises TransferError when the link is broken.

        `cost`: what the link's calls take; decides how much goes into one, and into a turn.
        """
        granted = self._granted
        if granted is None or not self.gate.enter():
            return Pumped.STOPPED
        started = time.monotonic()
        self.marks.reach("writing")
        try:
            self._write_turn(link, cost, granted, turn)
        except LeaseRevoked:  # by our own gate
            return Pumped.STOPPED
        finally:
            self.write_s += time.monotonic() - started
            self.gate.leave()
        with self._lock:
            if self._left == 0:
                self._left = -1
                return Pumped.WRITTEN
            more = self._queued = bool(self._items)
        self._tell(turn, _BUSY_PROGRESS_BYTES if more else _PROGRESS_BYTES)
        return Pumped.MORE if more else Pumped.IDLE

    def _tell(self, turn: Turn, least: int) -> None:
        """Sender thread: say what was written, if it is as much as `least` bytes."""
        if self._hashes and self.num_bytes - self._told_bytes >= least:
            self._told_bytes = self.num_bytes
            written, self._written = self._written, {}
            turn.tell(tuple(written.items()))

    def _write_turn(self, link: Link, cost: CostMeter, granted: Granted, turn: Turn) -> None:
        batch: list[tuple[PlaneLayer, Copy]] = []
        batch_bytes = turn_bytes = 0
        call_bytes, limit = cost.batching
        while turn_bytes + batch_bytes < limit and (item := self._take()) is not None:
            chunk = self._chunk_of(item, granted)
            for row in granted.plan.layers[item.layer]:
                for copy in granted.plan.copies(row, chunk.runs):
                    batch.append((row, copy))
                    batch_bytes += copy.num_bytes
                    if batch_bytes >= call_bytes or len(batch) == _BATCH_COPIES:
                        self._write(link, cost, granted.lease, batch, batch_bytes)
                        turn_bytes += batch_bytes
                        batch, batch_bytes = [], 0
            self._count(item.layer, chunk)
        if batch:
            self._write(link, cost, granted.lease, batch, batch_bytes)

    def _write(
        self,
        link: Link,
        cost: CostMeter,
        lease: LeaseKey,
        batch: Sequence[tuple[PlaneLayer, Copy]],
        num_bytes: int,
    ) -> None:
        """Copy, and hash every piece while it is in the cache. On return nothing reads the source any more."""
        copies = [copy for _, copy in batch]
        started = time.monotonic()
        if self._manifest.policy == "full":
            link.write(lease, self._source, copies, self.gate.stopped, partial(self._hash_piece, batch))
        else:  # samples are few: fewer and larger calls are worth more than the cache
            link.write(lease, self._source, copies, self.gate.stopped)
            if self._manifest.hashes:
                for row, begin, end in _merged(batch):
                    self._hash(row, begin, end)
        cost.measured(num_bytes, time.monotonic() - started)
        self.num_bytes += num_bytes

    def _hash_piece(self, batch: Sequence[tuple[PlaneLayer, Copy]], index: int, first: int, last: int) -> None:
        started = time.perf_counter()
        row, copy = batch[index]
        self._manifest.add(row, self._source[copy.source + first : copy.source + last])
        self.hash_s += time.perf_counter() - started

    def _hash(self, row: PlaneLayer, begin: int, end: int) -> None:
        started = time.monotonic()
        self._manifest.add(row, self._source[begin:end])
        self.hash_s += time.monotonic() - started

    def _begin(self, policy: Policy, lease: LeaseKey) -> None:
        """The policy is known."""
        self._manifest = ManifestBuilder(self._layout, policy, lease)

    def _mark(self) -> object:
        """Host memory holds what it holds when it is reported."""
        return None

    def _chunk_of(self, item: Item, granted: Granted) -> Chunk:
        """Sender thread. Every layer of a chunk has the same blocks, so that this is worked out once."""
        last = self._chunk
        if last is None or last.blocks is not item.blocks or last.first != item.first:
            last = self._chunk = granted.chunk(item.first, item.blocks)
        return last

    def _count(self, layer: int, chunk: Chunk) -> None:
        self._left -= len(chunk.sources)
        if chunk.sources:
            self._written[layer] = chunk.start + len(chunk.sources)

    def _take(self) -> Item | None:
        with self._lock:
            return self._items.popleft() if self._items else None

    def _wake(self) -> bool:
        """With the lock held: whether the sender needs a new turn that nobody has asked for yet."""
        if self._granted is None or self._queued or not self._items:
            return False
        self._queued = True
        return True


def _merged(batch: Sequence[tuple[PlaneLayer, Copy]]) -> Iterator[tuple[PlaneLayer, int, int]]:
    """The same source bytes in the same order, as (row, begin, end) in fewer pieces."""
    row, begin, end = batch[0][0], batch[0][1].source, batch[0][1].source
    for each, copy in batch:
        if each is not row or copy.source != end:
            yield row, begin, end
            row, begin, end = each, copy.source, copy.source
        end += copy.num_bytes
    yield row, begin, end
