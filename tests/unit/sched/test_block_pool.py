"""The block pool against a slow, obvious model of its state diagram."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_engine.sched.block_pool import BlockPool, PoolCounts

NUM_BLOCKS = 12


class PoolModel(RuleBasedStateMachine):
    """`held` are lists of blocks as sequences hold them; one reference each."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[int] = []
        self.pool = BlockPool(NUM_BLOCKS, self.evicted.append)
        self.held: list[list[int]] = []
        self.leased: list[list[int]] = []
        self.quarantined: list[list[int]] = []
        self.indexed: set[int] = set()
        self.cached: list[int] = []  # oldest first

    @property
    def free(self) -> set[int]:
        used = {b for group in (*self.held, *self.leased, *self.quarantined) for b in group}
        return set(range(NUM_BLOCKS)) - used - set(self.cached)

    def _expect_claim(self, n: int, blocks: list[int] | None) -> bool:
        """Account for eviction. Whether the claim succeeded."""
        free = self.free
        if n > len(free) + len(self.cached):
            assert blocks is None
            return False
        assert blocks is not None
        num_evicted = max(0, n - len(free))
        gone = self.cached[:num_evicted]
        assert self.evicted == gone, "eviction must take the oldest cached blocks, and no more than needed"
        self.evicted.clear()
        del self.cached[:num_evicted]
        self.indexed -= set(gone)
        assert len(set(blocks)) == n
        assert set(blocks) <= free | set(gone)
        return True

    @rule(n=st.integers(0, 6), after=st.integers(-1, NUM_BLOCKS))
    def take(self, n: int, after: int) -> None:
        blocks = self.pool.take(n, after)
        if self._expect_claim(n, blocks):
            self.held.append(blocks or [])

    @rule(n=st.integers(0, 6))
    def lease(self, n: int) -> None:
        blocks = self.pool.lease(n)
        if self._expect_claim(n, blocks):
            self.leased.append(blocks or [])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def index(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        for block in blocks[: data.draw(st.integers(0, len(blocks)))]:
            self.pool.mark_indexed(block)
            self.indexed.add(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unmark(self, data: st.DataObject) -> None:
        for block in data.draw(st.sampled_from(self.held)):
            self.pool.unmark_indexed(block)
            self.indexed.discard(block)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        shareable = sorted({b for group in self.held for b in group} | set(self.cached))
        blocks = data.draw(st.lists(st.sampled_from(shareable), unique=True)) if shareable else []
        self.pool.share(blocks)
        self.cached = [b for b in self.cached if b not in blocks]
        self.held.append(list(blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(blocks)
        still_held = {b for group in self.held for b in group}
        self.cached += [b for b in reversed(blocks) if b in self.indexed and b not in still_held]

    @precondition(lambda self: self.leased)
    @rule(how=st.sampled_from(["admit", "release", "quarantine"]))
    def end_lease(self, how: str) -> None:
        blocks = self.leased.pop(0)
        if how == "admit":
            self.pool.admit(blocks)
            self.held.append(blocks)
        elif how == "release":
            self.pool.release_leased(blocks)
        else:
            self.pool.quarantine(blocks)
            self.quarantined.append(blocks)

    @precondition(lambda self: self.quarantined)
    @rule()
    def free_quarantined(self) -> None:
        self.pool.free_quarantined(self.quarantined.pop())

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check()
        live = len({b for group in self.held for b in group})
        leased, quarantined = (sum(map(len, groups)) for groups in (self.leased, self.quarantined))
        assert self.pool.counts() == PoolCounts(len(self.free), live, len(self.cached), leased, quarantined)
        assert self.pool.indexed_blocks() == self.indexed


TestPool = PoolModel.TestCase


def test_a_released_chain_is_evicted_from_its_tail() -> None:
    evicted: list[int] = []
    pool = BlockPool(4, evicted.append)
    chain = pool.take(4)
    assert chain is not None
    for block in chain:
        pool.mark_indexed(block)
    pool.release(chain)
    pool.take(3)
    assert evicted == chain[:0:-1]


def test_blocks_of_an_empty_pool_are_contiguous() -> None:
    pool = BlockPool(16)
    assert pool.take(5) == [0, 1, 2, 3, 4]
    assert pool.take(3, after=5) == [5, 6, 7]


@pytest.mark.parametrize("verb", ["admit", "release_leased", "quarantine", "free_quarantined", "release", "share"])
def test_a_block_in_the_wrong_state_is_an_error(verb: str) -> None:
    pool = BlockPool(4)
    with pytest.raises(AssertionError, match="block 0"):
        getattr(pool, verb)([0])


def test_quarantined_blocks_are_never_handed_out() -> None:
    pool = BlockPool(4)
    blocks = pool.lease(3)
    assert blocks is not None
    pool.quarantine(blocks)
    assert pool.take(2) is None
    assert pool.lease(2) is None
    pool.free_quarantined(blocks)
    assert pool.take(4) is not None
