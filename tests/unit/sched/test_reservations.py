"""One end for every reservation; offers that wait are parsed and hashed once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.reservations import Reservations
from llm_engine.sched.sequence import Reservation
from tests.unit.sched.requests import sequence_of

BLOCK = 4


def _taken(reservations: Reservations, length: int = 10) -> Reservation:
    reservation = reservations.take(sequence_of(range(length)), length, headroom=0)
    assert reservation is not None
    return reservation


@pytest.mark.parametrize(
    ("ends", "states"),
    [
        (["adopt"], ["admitted"]),
        (["release"], ["released"]),
        (["quarantine", "free"], ["quarantined", "released"]),
    ],
)
def test_each_way_to_its_one_end(ends: list[str], states: list[str]) -> None:
    cache = PagedCache(8, BLOCK, format_id="f")
    reservations = Reservations(cache)
    reservation = _taken(reservations)
    assert (len(reservations), reservations.num_reserved) == (1, 1)
    seq = sequence_of(range(10))
    actions: dict[str, Callable[[], None]] = {
        "adopt": lambda: reservations.adopt(seq, reservation),
        "release": lambda: reservations.release(reservation, quarantine=False),
        "quarantine": lambda: reservations.release(reservation, quarantine=True),
        "free": lambda: reservations.free(reservation),
    }
    for end, state in zip(ends, states, strict=True):
        actions[end]()
        assert reservation.state == state
        assert reservations.num_reserved == 0
    assert len(reservations) == 0
    for action in actions.values():
        with pytest.raises(ValueError, match=f"is {states[-1]}"):
            action()
    cache.free(seq)
    cache.check()
    assert cache.pool.counts().live == 0


def test_an_offer_without_room_is_remembered_until_it_is_taken_or_dropped() -> None:
    reservations = Reservations(PagedCache(4, BLOCK, format_id="f"))
    hog = _taken(reservations)
    waiting = sequence_of(range(100, 108), "w")
    assert reservations.take(waiting, 8, headroom=0) is None
    assert reservations.recall("w", 1) is waiting
    assert reservations.recall("w", 2) is None
    reservations.release(hog, quarantine=False)
    assert reservations.take(waiting, 8, headroom=0) is not None
    assert reservations.recall("w", 1) is None
    dropped = sequence_of(range(200, 216), "d")
    assert reservations.take(dropped, 16, headroom=0) is None
    reservations.forget("d", 1)
    assert reservations.recall("d", 1) is None


def test_what_is_remembered_is_bounded() -> None:
    reservations = Reservations(PagedCache(1, BLOCK, format_id="f"))
    for i in range(200):
        assert reservations.take(sequence_of(range(8), f"r{i}"), 8, headroom=0) is None
    remembered = [i for i in range(200) if reservations.recall(f"r{i}", 1) is not None]
    assert remembered == list(range(200 - len(remembered), 200))
    assert len(remembered) == 64


def test_headroom_is_left_for_those_that_decode() -> None:
    reservations = Reservations(PagedCache(4, BLOCK, format_id="f"))
    assert reservations.take(sequence_of(range(12)), 12, headroom=2) is None
    assert reservations.take(sequence_of(range(12)), 12, headroom=1) is not None
