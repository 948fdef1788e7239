"""Growth, drafts and preemption of decoding sequences."""

from __future__ import annotations

from typing import Any

from llm_engine.sched.decode import DecodeScheduler
from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.sequence import Phase, Sequence
from tests.unit.sched.requests import sequence_of

BLOCK = 4


def _running(cache: PagedCache, scheduler: DecodeScheduler, length: int, start: int, **options: Any) -> Sequence:
    """A sequence that has just drawn its first token."""
    seq = sequence_of(range(start * 1000, start * 1000 + length), f"r{start}", **options)
    assert cache.begin(seq, headroom=0)
    seq.num_computed = length
    seq.tokens.append(1)
    scheduler.add(seq)
    return seq


def _step(scheduler: DecodeScheduler, accept: int = 0) -> list[Sequence]:
    """Plan and commit; every sequence accepts up to `accept` drafts. Returns the preempted."""
    plan = scheduler.plan()
    for seq, num_drafts in zip(plan.seqs, plan.num_drafts, strict=True):
        num_new = 1 + min(accept, num_drafts)
        assert len(seq.blocks) * BLOCK >= seq.num_computed + 1 + num_drafts
        seq.tokens += [1] * num_new
        scheduler.commit(seq, num_new)
    scheduler.check()
    return plan.preempted


def test_blocks_grow_with_the_tokens() -> None:
    cache = PagedCache(8, BLOCK, format_id="f")
    scheduler = DecodeScheduler(cache, num_drafts=0, max_len=99)
    seq = _running(cache, scheduler, 7, 0, max_tokens=99)
    for num_blocks in (2, 3, 3, 3, 3, 4):
        assert _step(scheduler) == []
        assert len(seq.blocks) == num_blocks


def test_the_youngest_makes_room_and_the_oldest_always_advances() -> None:
    cache = PagedCache(6, BLOCK, format_id="f", prefix_cache=False)
    scheduler = DecodeScheduler(cache, num_drafts=0, max_len=99)
    old, middle, young = (_running(cache, scheduler, 7, i, max_tokens=99) for i in range(3))
    preempted: list[Sequence] = []
    for _ in range(8):
        preempted += _step(scheduler)
        cache.check()
    assert preempted == [young, middle]
    assert all(seq.phase is Phase.ENDED and not seq.blocks for seq in preempted)
    assert scheduler.running == [old]
    assert len(old.tokens) == 16


def test_a_lone_sequence_hands_itself_back_when_nothing_is_left() -> None:
    cache = PagedCache(2, BLOCK, format_id="f", prefix_cache=False)
    scheduler = DecodeScheduler(cache, num_drafts=0, max_len=99)
    seq = _running(cache, scheduler, 8, 0)
    assert _step(scheduler) == [seq]
    assert cache.pool.num_available == 2


def test_prefilling_sequences_are_asked_before_anyone_is_preempted() -> None:
    cache = PagedCache(3, BLOCK, format_id="f", prefix_cache=False)
    hoard = cache.pool.take(1)
    assert hoard is not None

    def reclaim() -> bool:
        if not hoard:
            return False
        cache.pool.release(hoard)
        hoard.clear()
        return True

    scheduler = DecodeScheduler(cache, num_drafts=0, max_len=99, reclaim=reclaim)
    _running(cache, scheduler, 8, 0)
    assert _step(scheduler) == []
    assert hoard == []


def test_drafts_never_exceed_what_can_still_be_emitted() -> None:
    cache = PagedCache(8, BLOCK, format_id="f")
    scheduler = DecodeScheduler(cache, num_drafts=3, max_len=99)
    _running(cache, scheduler, 4, 0, max_tokens=7)
    counts = []
    for _ in range(6):
        counts += scheduler.plan().num_drafts
        _step(scheduler)
    assert counts == [3, 3, 3, 2, 1, 0]


def test_drafts_respect_the_longest_sequence() -> None:
    cache = PagedCache(8, BLOCK, format_id="f")
    scheduler = DecodeScheduler(cache, num_drafts=3, max_len=8)
    _running(cache, scheduler, 4, 0, max_tokens=99)
    counts = []
    for _ in range(3):
        counts += scheduler.plan().num_drafts
        _step(scheduler)
    assert counts == [2, 1, 0]


def test_drafts_preempt_nobody() -> None:
    cache = PagedCache(4, BLOCK, format_id="f", prefix_cache=False)
    scheduler = DecodeScheduler(cache, num_drafts=3, max_len=99)
    for i in range(2):
        _running(cache, scheduler, 6, i, max_tokens=99)
    plan = scheduler.plan()
    assert plan.num_drafts == [1, 1]
    assert plan.preempted == []


def test_accepted_drafts_are_progress() -> None:
    cache = PagedCache(8, BLOCK, format_id="f")
    scheduler = DecodeScheduler(cache, num_drafts=3, max_len=99)
    seq = _running(cache, scheduler, 4, 0, max_tokens=99)
    _step(scheduler, accept=3)
    assert (len(seq.tokens), seq.num_computed, seq.num_published) == (9, 8, 2)
