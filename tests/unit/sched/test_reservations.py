"""One end for every reservation, and room for those that decode."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.reservations import Reservations
from llm_engine.sched.sequence import Reservation
from tests.unit.sched.requests import sequence_of

BLOCK = 4


def _taken(reservations: Reservations, length: int = 10) -> Reservation:
    reservation = reservations.take("r", 1, length, [], deadline=1e6, headroom=0)
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


def test_headroom_is_left_for_those_that_decode() -> None:
    reservations = Reservations(PagedCache(4, BLOCK, format_id="f"))
    assert reservations.take("r", 1, 12, [], deadline=1e6, headroom=2) is None
    assert reservations.take("r", 1, 12, [], deadline=1e6, headroom=1) is not None
