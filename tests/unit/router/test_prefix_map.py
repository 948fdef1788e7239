from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_engine.api.messages import KvEvents, KvSnapshot
from router.prefix_map import PrefixMap

CHAIN = [bytes([i]) * 16 for i in range(20)]


def restored(digests: list[bytes], seq: int = 0, capacity: int = 100) -> PrefixMap:
    prefix = PrefixMap(capacity)
    prefix.restore(KvSnapshot(seq=seq, digests=digests))
    return prefix


@given(length=st.integers(0, 20), present=st.integers(0, 20))
def test_match_counts_the_leading_blocks(length: int, present: int) -> None:
    assert restored(CHAIN[:present]).match(CHAIN[:length]) == min(length, present)


def test_a_tail_without_its_head_is_no_hit() -> None:
    assert restored(CHAIN[1:]).match(CHAIN) == 0


def test_events_before_the_first_snapshot_are_not_trusted() -> None:
    prefix = PrefixMap(100)
    prefix.apply(KvEvents(seq=1, stored=CHAIN[:2]))
    assert not prefix.in_step
    assert prefix.match(CHAIN) == 0


def test_events_follow_the_snapshot() -> None:
    prefix = restored(CHAIN[:2], seq=5)
    prefix.apply(KvEvents(seq=5, removed=CHAIN[:2]))  # part of the snapshot already
    assert prefix.match(CHAIN) == 2
    prefix.apply(KvEvents(seq=6, stored=CHAIN[2:4]))
    assert prefix.match(CHAIN) == 4
    prefix.apply(KvEvents(seq=7, removed=CHAIN[1:4]))
    assert prefix.match(CHAIN) == 1


def test_a_gap_asks_for_a_snapshot_and_keeps_what_was_known() -> None:
    prefix = restored(CHAIN[:2], seq=5)
    prefix.apply(KvEvents(seq=7, stored=CHAIN[2:4]))
    assert not prefix.in_step
    prefix.apply(KvEvents(seq=8, stored=CHAIN[4:6]))
    assert prefix.match(CHAIN) == 2
    prefix.restore(KvSnapshot(seq=8, digests=CHAIN[:6]))
    assert prefix.in_step
    assert prefix.match(CHAIN) == 6
    assert prefix.num_gaps == 1


def test_the_mirror_is_bounded_by_the_workers_blocks() -> None:
    prefix = restored(CHAIN, capacity=4)
    assert len(prefix) == 4
    prefix.apply(KvEvents(seq=1, stored=CHAIN[10:]))
    assert not prefix.in_step


def test_requests_on_their_way_count_as_stored() -> None:
    prefix = restored([])
    prefix.expect(CHAIN[:3])
    prefix.expect(CHAIN[:5])
    assert prefix.match(CHAIN) == 5
    prefix.unexpect(CHAIN[:5])
    assert prefix.match(CHAIN) == 3
    prefix.unexpect(CHAIN[:3])
    assert prefix.match(CHAIN) == 0
