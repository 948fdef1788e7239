"""Order, budgets and fairness of prefill."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.prefill import LOOK_AHEAD, MAX_OVERTAKES, PrefillScheduler
from llm_engine.sched.sequence import Phase, Refusal, Sequence
from tests.unit.sched.requests import sequence_of

BLOCK = 4


def _scheduler(num_blocks: int = 64, budget: int = 16, max_waiting: int = 100) -> tuple[PrefillScheduler, PagedCache]:
    cache = PagedCache(num_blocks, BLOCK, format_id="f")
    return PrefillScheduler(cache, max_step_tokens=budget, max_waiting=max_waiting), cache


def _prompt(length: int, start: int) -> Sequence:
    return sequence_of(range(start * 1000, start * 1000 + length), f"r{start}")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 20), st.integers(1, 4))
def test_every_token_is_computed_once_in_order_within_the_budget(lengths: list[int], budget: int, active: int) -> None:
    scheduler, _ = _scheduler(num_blocks=200, budget=budget)
    seqs = [_prompt(length, i) for i, length in enumerate(lengths)]
    for seq in seqs:
        assert scheduler.add(seq) is None
    finished: list[Sequence] = []
    progress = dict.fromkeys(seqs, 0)
    for _ in range(sum(lengths) + 1):
        chunks = scheduler.plan(active)
        if not chunks:
            break
        assert sum(chunk.length for chunk in chunks) <= budget
        assert len(scheduler.active) <= active
        for chunk in chunks:
            assert chunk.start == progress[chunk.seq]
            progress[chunk.seq] = chunk.end
            assert chunk.is_last == (chunk.end == len(chunk.seq.tokens))
        full = sum(chunk.length for chunk in chunks) == budget
        assert full or not scheduler.waiting or len(scheduler.active) == active
        finished += scheduler.commit(chunks)
        scheduler.check()
    assert finished == seqs, "prefill is first come, first served"
    assert all(seq.num_computed == len(seq.tokens) for seq in seqs)


def test_a_full_queue_refuses() -> None:
    scheduler, _ = _scheduler(max_waiting=2)
    assert scheduler.add(_prompt(4, 0)) is None
    assert scheduler.add(_prompt(4, 1)) is None
    refusal = scheduler.add(_prompt(4, 2))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.retryable) == ("full", True)


def test_small_requests_overtake_a_head_without_blocks_but_not_for_ever() -> None:
    scheduler, cache = _scheduler(num_blocks=8, budget=1000)
    hog = _prompt(16, 0)
    scheduler.add(hog)
    scheduler.commit(scheduler.plan(99))
    big = _prompt(32, 1)
    scheduler.add(big)
    overtaking = 0
    for i in range(2, 2 + MAX_OVERTAKES + 5):
        small = _prompt(4, i)
        scheduler.add(small)
        chunks = scheduler.plan(99)
        overtaking += len(chunks)
        for done in scheduler.commit(chunks):
            done.phase = Phase.ENDED
            cache.free(done)
    assert overtaking == MAX_OVERTAKES
    hog.phase = Phase.ENDED
    cache.free(hog)
    chunks = scheduler.plan(99)
    assert chunks[0].seq is big
    scheduler.check()


def test_a_head_that_leaves_gives_the_next_its_own_patience() -> None:
    scheduler, cache = _scheduler(num_blocks=8, budget=1000)
    hog = _prompt(16, 0)
    scheduler.add(hog)
    scheduler.commit(scheduler.plan(99))
    heads = [_prompt(32, 1), _prompt(28, 2)]
    for head in heads:
        scheduler.add(head)
    for i in range(3, 3 + MAX_OVERTAKES):
        scheduler.add(_prompt(4, i))
        for done in scheduler.commit(scheduler.plan(99)):
            done.phase = Phase.ENDED
            cache.free(done)
    scheduler.add(_prompt(4, 50))
    assert scheduler.plan(99) == []
    scheduler.remove(heads[0])
    assert len(scheduler.plan(99)) == 1


def test_look_ahead_is_bounded() -> None:
    scheduler, _ = _scheduler(num_blocks=8, budget=1000)
    scheduler.add(_prompt(16, 0))
    scheduler.commit(scheduler.plan(99))
    for i in range(1, LOOK_AHEAD + 2):
        scheduler.add(_prompt(32, i))
    scheduler.add(_prompt(4, 90))
    assert scheduler.plan(99) == []
    scheduler.remove(scheduler.waiting[0])
    assert [chunk.seq.request_id for chunk in scheduler.plan(99)] == ["r90"]


def test_a_start_leaves_room_for_sequences_that_are_decoding() -> None:
    scheduler, _ = _scheduler(num_blocks=4)
    scheduler.add(_prompt(12, 0))
    assert scheduler.plan(9, headroom=2) == []
    assert len(scheduler.plan(9, headroom=1)) == 1


def test_the_youngest_yields_and_starts_over_with_what_it_had_cached() -> None:
    scheduler, cache = _scheduler(num_blocks=16, budget=12)
    old, young = _prompt(8, 0), _prompt(30, 1)
    scheduler.add(old)
    scheduler.add(young)
    scheduler.commit(scheduler.plan(9))
    scheduler.commit(scheduler.plan(9))
    assert young.num_computed == 16
    later = _prompt(4, 2)
    scheduler.add(later)
    assert scheduler.yield_youngest() is young
    assert list(scheduler.waiting) == [young, later]
    assert (young.phase, young.blocks, young.num_computed) == (Phase.WAITING, [], 0)
    assert scheduler.yield_youngest() is None
    scheduler.check()
    cache.check()
    chunk = scheduler.plan(9)[0]
    assert (chunk.seq, chunk.start) == (young, 16)


def test_removal_from_anywhere() -> None:
    scheduler, _ = _scheduler(budget=4)
    first, second = _prompt(8, 0), _prompt(8, 1)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.commit(scheduler.plan(9))
    scheduler.remove(first)
    scheduler.remove(second)
    assert scheduler.plan(9) == []
