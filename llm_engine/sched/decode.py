"""Decode: every running sequence draws at least one token a step; when blocks run out the youngest makes room."""

from __future__ import annotations

from collections.abc import Callable

from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.plan import DecodePlan
from llm_engine.sched.sequence import Phase, Sequence


class DecodeScheduler:
    """The sequences being decoded, oldest first.

    `max_len`: tokens of the longest sequence. `reclaim` is asked for blocks before a running sequence is preempted: it
    frees some and answers True, or has nothing to free.
    """

    def __init__(
        self, cache: PagedCache, *, num_drafts: int, max_len: int, reclaim: Callable[[], bool] = lambda: False
    ) -> None:
        self._cache = cache
        self._num_drafts = num_drafts
        self._max_len = max_len
        self._reclaim = reclaim
        self.running: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        """A sequence whose tokens but the last are in the cache starts to decode."""
        seq.phase = Phase.DECODING
        self.running.append(seq)

    def plan(self) -> DecodePlan:
        """Give every running sequence room for its next tokens.

        Drafts only use blocks that can be had without preemption. The oldest sequence is served first and preempts the
        youngest, so that some sequence always finishes.
        """
        plan = DecodePlan()
        block_tokens = self._cache.block_tokens
        served = 0
        while served < len(self.running):
            seq = self.running[served]
            if seq.num_computed >= len(seq.blocks) * block_tokens and not self._cache.grow(seq, seq.num_computed + 1):
                if not self._reclaim():
                    plan.preempted.append(self._preempt())
                continue
            served += 1
        plan.seqs.extend(self.running)
        plan.num_drafts.extend(map(self._drafts_for, self.running) if self._num_drafts else [0] * len(self.running))
        return plan

    def commit(self, seq: Sequence, num_new: int) -> None:
        """The only place where decode progress moves: `num_new` tokens were appended, all but the last are cached."""
        seq.num_computed += num_new
        assert seq.num_computed == len(seq.tokens) - 1
        if seq.num_computed >= (seq.num_published + 1) * self._cache.block_tokens:
            self._cache.publish(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence; its blocks are the caller's."""
        self.running.remove(seq)

    def check(self) -> None:
        """Verify every invariant. Raises AssertionError."""
        for seq in self.running:
            assert seq.phase is Phase.DECODING
            assert seq.num_computed == len(seq.tokens) - 1
            assert len(seq.blocks) >= self._cache.blocks_for(seq.num_computed)

    def _drafts_for(self, seq: Sequence) -> int:
        """Drafts that could still be emitted with one drawn token after them, and that fit the blocks at hand."""
        wanted = min(self._num_drafts, min(seq.max_len, self._max_len) - len(seq.tokens) - 1)
        room = len(seq.blocks) * self._cache.block_tokens - seq.num_computed - 1
        if wanted > room and not self._cache.grow(seq, seq.num_computed + 1 + wanted):
            wanted = room
        return max(wanted, 0)

    def _preempt(self) -> Sequence:
        victim = self.running.pop()
        self._cache.free(victim)
        victim.phase = Phase.ENDED
        return victim
