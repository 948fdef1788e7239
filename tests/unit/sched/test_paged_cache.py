"""What sequences find, hold and leave behind in the paged cache."""

from __future__ import annotations

from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.sequence import Reservation, Sequence
from tests.unit.sched.requests import sequence_of

BLOCK = 4


def _cache(num_blocks: int = 16, *, prefix_cache: bool = True, format_id: str = "f") -> PagedCache:
    return PagedCache(num_blocks, BLOCK, format_id=format_id, prefix_cache=prefix_cache)


def _prefilled(cache: PagedCache, seq: Sequence) -> Sequence:
    assert cache.begin(seq, headroom=0)
    seq.num_computed = len(seq.tokens)
    cache.publish(seq)
    return seq


def test_only_full_blocks_are_found_and_one_token_is_left_to_compute() -> None:
    cache = _cache()
    for length, found in ((7, 4), (8, 4), (9, 8), (11, 8), (12, 8), (13, 12)):
        cache.free(_prefilled(cache, sequence_of(range(12))))
        again = sequence_of(range(length))
        assert cache.begin(again, headroom=0)
        assert again.num_cached == again.num_computed == found, length
        cache.free(again)
        cache.check()


def test_a_shared_prefix_is_one_set_of_blocks() -> None:
    cache = _cache()
    first = _prefilled(cache, sequence_of(range(10)))
    second = sequence_of([*range(8), 50, 51])
    assert cache.begin(second, headroom=0)
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    cache.free(first)
    cache.check()
    assert cache.pool.counts().live == 3
    cache.free(second)
    assert cache.pool.counts().live == 0


def test_salts_and_formats_never_share() -> None:
    cache = _cache()
    cache.free(_prefilled(cache, sequence_of(range(9), salt="a")))
    for salt in ("", "b"):
        other = sequence_of(range(9), salt=salt)
        assert cache.begin(other, headroom=0)
        assert other.num_cached == 0
        cache.free(other)
    assert cache.digests(range(8), "a") != _cache(format_id="g").digests(range(8), "a")


def test_identical_blocks_computed_side_by_side_stay_private_to_the_second() -> None:
    cache = _cache()
    first, second = sequence_of(range(9)), sequence_of(range(9), "s")
    assert cache.begin(first, headroom=0)
    assert cache.begin(second, headroom=0)
    for seq in (first, second):
        seq.num_computed = 9
        cache.publish(seq)
    cache.check()
    assert cache.index.find(first.digests) == first.blocks[:2]
    cache.free(second)
    assert cache.pool.counts().cached == 0, "blocks nobody can find must not be kept"
    cache.free(first)
    assert cache.pool.counts().cached == 2
    cache.check()


def test_without_room_nothing_changes() -> None:
    cache = _cache(num_blocks=4)
    cache.free(_prefilled(cache, sequence_of(range(9))))
    before = cache.pool.counts()
    assert not cache.begin(sequence_of([*range(8), *range(20, 30)]), headroom=0)
    assert not cache.begin(sequence_of(range(12)), headroom=2)
    assert cache.pool.counts() == before
    cache.check()


def test_output_tokens_extend_the_chain_that_a_longer_prompt_finds() -> None:
    cache = _cache()
    seq = _prefilled(cache, sequence_of(range(6)))
    for token in range(6, 14):
        assert cache.grow(seq, len(seq.tokens) + 1)
        seq.tokens.append(token)
        seq.num_computed += 1
        cache.publish(seq)
    cache.free(seq)
    again = sequence_of(range(14))
    assert cache.begin(again, headroom=0)
    assert again.num_cached == 12


def test_growth_prolongs_the_last_run() -> None:
    cache = _cache()
    seq = _prefilled(cache, sequence_of(range(6)))
    assert cache.grow(seq, 9)
    assert seq.blocks == [0, 1, 2]
    assert not cache.grow(seq, 100)
    assert seq.blocks == [0, 1, 2]


def test_doubtful_blocks_are_never_found_again() -> None:
    cache = _cache()
    seq = _prefilled(cache, sequence_of(range(9)))
    cache.index.take_events()
    cache.distrust(seq)
    cache.check()
    events = cache.index.take_events()
    assert events is not None
    assert sorted(events.removed) == sorted(seq.digests)
    assert cache.index.find(seq.digests) == []
    cache.free(seq)
    assert cache.pool.counts().cached == 0


def test_a_reservation_pins_its_hits_and_may_find_everything() -> None:
    cache = _cache(num_blocks=5)
    cache.free(_prefilled(cache, sequence_of(range(8))))
    digests = cache.digests(range(8), "")
    found = cache.reserve(8, digests, headroom=0)
    assert found is not None
    hits, leased = found
    assert len(hits) == 2
    assert leased == []
    assert cache.reserve(16, cache.digests(range(100, 116), ""), headroom=0) is None, (
        "pinned blocks must not be evicted"
    )
    seq = sequence_of(range(8))
    reservation = Reservation("r", 1, 8, 1e6, 8, hits, leased, digests)
    cache.adopt(seq, reservation)
    assert seq.blocks == hits
    assert seq.num_computed == 8
    cache.free(seq)
    cache.check()


def test_an_adopted_hand_off_enters_the_prefix_index() -> None:
    cache = _cache()
    digests = cache.digests(range(10), "")
    found = cache.reserve(10, digests, headroom=0)
    assert found is not None
    hits, leased = found
    assert (hits, len(leased)) == ([], 3)
    assert cache.index.find(digests) == [], "leased blocks are not to be found before they are verified"
    seq = sequence_of(range(10))
    cache.adopt(seq, Reservation("r", 1, 10, 1e6, 0, hits, leased, digests))
    assert cache.index.find(digests) == leased[:2]
    cache.check()


def test_switched_off_nothing_is_ever_found() -> None:
    cache = _cache(prefix_cache=False)
    cache.free(_prefilled(cache, sequence_of(range(9))))
    again = sequence_of(range(9))
    assert cache.begin(again, headroom=0)
    assert again.num_cached == 0
    assert cache.index.take_events() is None
