"""Block ids and who may touch them. Ids only, no tensors, no lock: called from the engine's thread alone.

                    take                       release, content indexed
        FREE ───────────────▶ LIVE (refs ≥ 1) ─────────────────────────▶ CACHED ── share ──▶ LIVE
         ▲ ▲                   │  ▲                                        │
         │ └──── release ──────┘  └──── admit ─────┐                       │ evicted by take or lease
         │                     lease               │                       ▼
         ├──────────────────────────────────────▶ LEASED ── quarantine ──▶ QUARANTINED        FREE
         └───────────────── release_leased ────────┘ ◀──── free_quarantined ────┘ (to FREE)

LEASED blocks are written by a peer under a lease; QUARANTINED ones may still be written by a peer that is not known to
have stopped. No timer frees either.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from llm_engine.sched.free_runs import FreeRuns


class BlockState(enum.IntEnum):
    """Exactly one per block."""

    FREE = 0  # content is meaningless
    LIVE = 1  # referenced by sequences or reservations
    CACHED = 2  # unreferenced, but the prefix index knows its content: evictable
    LEASED = 3  # a peer may write it
    QUARANTINED = 4  # a peer might still write it although its lease is gone


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """Blocks by state."""

    free: int
    live: int
    cached: int
    leased: int
    quarantined: int


class BlockPool:
    """Owns the ids 0 … num_blocks-1. `on_evict(block)` is called when a cached block's content is given up."""

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] = lambda block: None) -> None:
        self.num_blocks = num_blocks
        self.num_evicted = 0
        self._on_evict = on_evict
        self._states = [BlockState.FREE] * num_blocks
        self._refs = [0] * num_blocks
        self._free = FreeRuns(num_blocks)
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._indexed: set[int] = set()  # blocks that become CACHED instead of FREE
        self._num_leased = 0
        self._num_quarantined = 0

    @property
    def num_available(self) -> int:
        """Blocks that `take` and `lease` can hand out."""
        return len(self._free) + len(self._cached)

    def counts(self) -> PoolCounts:
        away = self._num_leased + self._num_quarantined
        live = self.num_blocks - self.num_available - away
        return PoolCounts(len(self._free), live, len(self._cached), self._num_leased, self._num_quarantined)

    def take(self, n: int, after: int = -1) -> list[int] | None:
        """`n` blocks with one reference each, contiguous where possible, or None: a full pool is an expected answer.

        Evicts the longest unused cached blocks. `after`: the block next to which the first one should lie.
        """
        if n > self.num_available:
            return None
        blocks = self._claim(n, after)
        for block in blocks:
            self._states[block] = BlockState.LIVE
            self._refs[block] = 1
        return blocks

    def share(self, blocks: Seq[int]) -> None:
        """One more reference to live or cached blocks."""
        for block in blocks:
            if self._refs[block] == 0:
                assert self._states[block] is BlockState.CACHED, f"block {block} has nothing to share"
                del self._cached[block]
                self._states[block] = BlockState.LIVE
            self._refs[block] += 1

    def release(self, blocks: Seq[int]) -> None:
        """One reference less, tail first: the head of a chain, which most requests share, is evicted last."""
        freed = []
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is not referenced"
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if block in self._indexed:
                self._states[block] = BlockState.CACHED
                self._cached[block] = None
            else:
                self._states[block] = BlockState.FREE
                freed.append(block)
        self._free.add(freed)

    def mark_indexed(self, block: int) -> None:
        """The prefix index now knows the content of this live block."""
        assert self._states[block] is BlockState.LIVE, f"block {block} is not live"
        self._indexed.add(block)

    def unmark_indexed(self, block: int) -> None:
        """The content of this live block is not to be found again."""
        assert self._states[block] is BlockState.LIVE, f"block {block} is not live"
        self._indexed.discard(block)

    def indexed_blocks(self) -> set[int]:
        """The blocks marked so and not evicted since."""
        return set(self._indexed)

    def lease(self, n: int) -> list[int] | None:
        """As `take`, for blocks that a peer will write."""
        if n > self.num_available:
            return None
        blocks = self._claim(n, -1)
        self._move(blocks, BlockState.FREE, BlockState.LEASED)
        self._num_leased += n
        return blocks

    def admit(self, blocks: Seq[int]) -> None:
        """Leased blocks whose content is verified and whose writer has stopped become live with one reference."""
        self._move(blocks, BlockState.LEASED, BlockState.LIVE)
        self._num_leased -= len(blocks)
        for block in blocks:
            self._refs[block] = 1

    def release_leased(self, blocks: Seq[int]) -> None:
        """The writer has stopped (or never started); the content is not used."""
        self._move(blocks, BlockState.LEASED, BlockState.FREE)
        self._num_leased -= len(blocks)
        self._free.add(blocks)

    def quarantine(self, blocks: Seq[int]) -> None:
        """The lease is gone but its writer may not know yet."""
        self._move(blocks, BlockState.LEASED, BlockState.QUARANTINED)
        self._num_leased -= len(blocks)
        self._num_quarantined += len(blocks)

    def free_quarantined(self, blocks: Seq[int]) -> None:
        """The writer of these blocks is proven stopped."""
        self._move(blocks, BlockState.QUARANTINED, BlockState.FREE)
        self._num_quarantined -= len(blocks)
        self._free.add(blocks)

    def check(self) -> None:
        """Verify every invariant. Raises AssertionError."""
        free = {block for start, length in self._free.runs() for block in range(start, start + length)}
        members = {state: {b for b, s in enumerate(self._states) if s is state} for state in BlockState}
        assert free == members[BlockState.FREE]
        assert len(self._free) == len(free)
        assert set(self._cached) == members[BlockState.CACHED]
        assert len(members[BlockState.LEASED]) == self._num_leased
        assert len(members[BlockState.QUARANTINED]) == self._num_quarantined
        assert all((refs > 0) == (b in members[BlockState.LIVE]) for b, refs in enumerate(self._refs))
        assert members[BlockState.CACHED] <= self._indexed
        assert self._indexed <= members[BlockState.CACHED] | members[BlockState.LIVE]

    def _claim(self, n: int, after: int) -> list[int]:
        while len(self._free) < n:
            block, _ = self._cached.popitem(last=False)
            self._indexed.discard(block)
            self._states[block] = BlockState.FREE
            self._free.add((block,))
            self.num_evicted += 1
            self._on_evict(block)
        return self._free.take(n, after)

    def _move(self, blocks: Seq[int], old: BlockState, new: BlockState) -> None:
        for block in blocks:
            assert self._states[block] is old, f"block {block} is {self._states[block].name}, not {old.name}"
            self._states[block] = new
