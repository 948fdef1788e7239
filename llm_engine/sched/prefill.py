"""Prefill: first come, first served, in chunks.

A sequence gets the blocks of all its tokens before its first chunk, so two half-prefilled sequences can never wait for
each other's blocks, and the blocks come out contiguous.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq

from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.plan import Chunk
from llm_engine.sched.sequence import Phase, Refusal, Sequence

LOOK_AHEAD = 8  # sequences behind a head that lacks blocks which are tried in its place
MAX_OVERTAKES = 16  # then nobody starts before the head does


class PrefillScheduler:
    """The queue and the sequences being prefilled. `max_step_tokens` bounds the rows of one step's chunks."""

    def __init__(self, cache: PagedCache, *, max_step_tokens: int, max_waiting: int) -> None:
        self._cache = cache
        self._max_step_tokens = max_step_tokens
        self._max_waiting = max_waiting
        self._overtakes = 0  # sequences that started before the present head
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []  # PREFILLING, in the order in which they started

    def add(self, seq: Sequence) -> Refusal | None:
        """Queue a sequence, or say that the queue is full."""
        if len(self.waiting) >= self._max_waiting:
            return Refusal("full", f"{len(self.waiting)} requests are waiting for prefill", retryable=True)
        self.waiting.append(seq)
        return None

    def plan(self, max_active: int, headroom: int = 0) -> list[Chunk]:
        """Chunks of this step, oldest sequence first.

        At most `max_active` sequences are active; a start leaves `headroom` blocks for sequences that are decoding.
        """
        chunks: list[Chunk] = []
        budget = self._max_step_tokens
        for seq in self.active:
            if budget == 0:
                return chunks
            chunks.append(Chunk.next_of(seq, budget))
            budget -= chunks[-1].length
        while budget and len(self.active) < max_active:
            started = self._start_next(headroom)
            if started is None:
                break
            chunks.append(Chunk.next_of(started, budget))
            budget -= chunks[-1].length
        return chunks

    def commit(self, chunks: Seq[Chunk]) -> list[Sequence]:
        """The only place where prefill progress moves. Returns the sequences whose tokens are now all computed."""
        done = []
        for chunk in chunks:
            seq = chunk.seq
            if chunk.is_last:
                done.append(seq)
                self.active.remove(seq)
                seq.phase = Phase.PREFILLED
            seq.num_computed = chunk.end
            self._cache.publish(seq)
        return done

    def yield_youngest(self) -> Sequence | None:
        """Send the youngest active sequence back to the head of the queue to free its blocks. None: nobody is active.

        What it had published stays in the prefix cache until someone needs the blocks.
        """
        if not self.active:
            return None
        seq = self.active.pop()
        self._cache.free(seq)
        seq.phase = Phase.WAITING
        seq.num_computed = seq.num_drafted = seq.num_cached = 0
        self.waiting.appendleft(seq)
        return seq

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, wherever it is in here; its blocks are the caller's."""
        if seq.phase is Phase.WAITING:
            if self.waiting[0] is seq:
                self._overtakes = 0
            self.waiting.remove(seq)
        elif seq.phase is Phase.PREFILLING:
            self.active.remove(seq)

    def check(self) -> None:
        """Verify every invariant. Raises AssertionError."""
        assert all(seq.phase is Phase.WAITING and not seq.blocks for seq in self.waiting)
        for seq in self.active:
            assert seq.phase is Phase.PREFILLING
            assert 0 <= seq.num_computed < len(seq.tokens)
            assert len(seq.blocks) == self._cache.blocks_for(len(seq.tokens))

    def _start_next(self, headroom: int) -> Sequence | None:
        """Start the head of the queue, or one close behind it when the head lacks blocks and may still be overtaken."""
        ahead = LOOK_AHEAD if self._overtakes < MAX_OVERTAKES else 0
        for place in range(min(len(self.waiting), 1 + ahead)):
            seq = self.waiting[place]
            if not self._cache.begin(seq, headroom):
                continue
            del self.waiting[place]
            self._overtakes = self._overtakes + 1 if place else 0
            seq.phase = Phase.PREFILLING
            self.active.append(seq)
            return seq
        return None
