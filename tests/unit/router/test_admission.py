from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest

from llm_engine.api.errors import Overloaded, TooManyRequests
from router.admission import MAX_RETRY_S, Admission, DepartureRate


@dataclass(eq=False)
class Item:
    over: bool = False
    enqueued: float = 0.0


def admission(max_inflight: int = 2, max_queued: int = 3, queue_timeout_s: float = 10.0) -> Admission[Item]:
    door: Admission[Item] = Admission(max_inflight=max_inflight, max_queued=max_queued, queue_timeout_s=queue_timeout_s)
    door.set_capacity(100, 0.0)
    return door


def place_all(door: Admission[Item]) -> list[Item]:
    placed = []
    while (head := door.head()) is not None:
        door.take()
        placed.append(head)
    return placed


def test_credits_bound_what_is_in_flight_and_the_queue_keeps_its_order() -> None:
    door = admission()
    items = [Item() for _ in range(5)]
    for item in items:
        door.enqueue(item, 0.0)
        if door.num_inflight < 2:
            place_all(door)
    assert door.num_inflight == 2
    assert door.num_queued == 3
    door.release(1.0)
    assert place_all(door) == [items[2]]


def test_a_full_queue_refuses_with_429() -> None:
    door = admission()
    for _ in range(2):
        door.enqueue(Item(), 0.0)
        place_all(door)
    for _ in range(3):
        door.enqueue(Item(), 0.0)
    with pytest.raises(TooManyRequests) as refused:
        door.enqueue(Item(), 0.0)
    assert refused.value.status == 429
    assert refused.value.retry_after_s >= 1.0


def test_without_a_queue_a_free_credit_still_admits() -> None:
    door = admission(max_queued=0)
    for _ in range(2):
        door.enqueue(Item(), 0.0)
        place_all(door)
    with pytest.raises(TooManyRequests):
        door.enqueue(Item(), 0.0)


def test_the_living_workers_bound_the_credits() -> None:
    door = admission(max_inflight=10, max_queued=10)
    door.set_capacity(1, 0.0)
    for _ in range(3):
        door.enqueue(Item(), 0.0)
    assert len(place_all(door)) == 1
    door.set_capacity(100, 1.0)
    assert len(place_all(door)) == 2


def test_requests_that_are_over_lose_their_turn_and_their_place() -> None:
    door = admission(max_inflight=1)
    door.enqueue(Item(), 0.0)
    place_all(door)
    gone, stays = Item(), Item()
    door.enqueue(gone, 0.0)
    door.enqueue(stays, 0.0)
    gone.over = True
    door.left()
    door.enqueue(Item(), 0.0)
    door.enqueue(Item(), 0.0)  # the place that was left
    door.release(0.0)
    assert place_all(door) == [stays]


def saturated(departures_per_s: float, *, max_queued: int = 100_000, queue_timeout_s: float = 10.0) -> Admission[Item]:
    """Ten requests in flight and one waiting for ten seconds, while others leave at a steady rate."""
    door = admission(max_inflight=10, max_queued=max_queued, queue_timeout_s=queue_timeout_s)
    for _ in range(11):
        door.enqueue(Item(), 0.0)
    place_all(door)
    for tick in range(1, int(10 * departures_per_s) + 1):
        now = tick / departures_per_s
        door.enqueue(Item(), now)
        door.release(now)
        place_all(door)
    return door


def test_a_wait_beyond_the_timeout_is_refused_before_it_begins() -> None:
    door = saturated(1.0)
    for _ in range(8):  # ten seconds at one a second, less the one that waits and a margin
        door.enqueue(Item(), 10.0)
    for _ in range(2):
        with contextlib.suppress(Overloaded):
            door.enqueue(Item(), 10.0)
    with pytest.raises(Overloaded) as refused:
        door.enqueue(Item(), 10.0)
    assert refused.value.status == 503
    assert 1.0 <= refused.value.retry_after_s <= 3.0


def test_retry_after_tells_when_a_place_is_expected() -> None:
    door = saturated(2.0, queue_timeout_s=1000.0)
    assert door.retry_after_s(10.0) == pytest.approx(1.0)
    for _ in range(9):
        door.enqueue(Item(), 10.0)
    assert door.retry_after_s(10.0) == pytest.approx(5.0, abs=1.0)


def test_a_quiet_past_is_no_reason_to_refuse_a_burst() -> None:
    door = admission(max_inflight=10, max_queued=100)
    for second in range(100):  # one request every second, served at once
        door.enqueue(Item(), float(second))
        place_all(door)
        door.release(float(second))
    for _ in range(110):
        door.enqueue(Item(), 100.0)
        place_all(door)
    assert door.num_queued == 100


def test_the_queues_clock_stands_still_while_there_is_no_pair() -> None:
    door = admission()
    item = Item()
    door.set_capacity(0, 0.0)
    door.enqueue(item, 1.0)
    assert list(door.expired(500.0)) == []
    door.set_capacity(8, 500.0)
    assert list(door.expired(509.0)) == []
    assert list(door.expired(510.5)) == [item]


def test_only_those_that_waited_too_long_expire() -> None:
    door = admission(max_inflight=0, max_queued=10)
    items = [Item() for _ in range(3)]
    for second, item in enumerate(items):
        door.enqueue(item, float(second))
    items[0].over = True
    assert list(door.expired(11.5)) == [items[1]]


def test_abandoned_requests_do_not_pile_up() -> None:
    door = admission(max_inflight=0, max_queued=5)
    for _ in range(10_000):
        item = Item()
        door.enqueue(item, 0.0)
        item.over = True
        door.left()
    assert len(door._queue) < 200


def test_the_departure_rate_follows_the_last_seconds() -> None:
    rate = DepartureRate()
    rate.restart(0.0)
    assert rate.per_s(1.0) is None
    for tick in range(100):
        rate.departed(tick / 10)  # ten a second for ten seconds
    assert rate.per_s(10.0) == pytest.approx(10.0, rel=0.1)
    for tick in range(20):
        rate.departed(10.0 + tick)  # then one a second
    assert rate.per_s(30.0) == pytest.approx(1.0, rel=0.2)
    assert rate.per_s(1000.0) is None


def test_retry_after_is_bounded() -> None:
    door = saturated(1.0, queue_timeout_s=1e9)
    for _ in range(10_000):
        door.enqueue(Item(), 10.0)
    assert door.retry_after_s(10.0) == MAX_RETRY_S
