"""From the step thread to a hand-off: nothing lost, nothing reordered, and offers in good time but not too early."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_engine.sched import Sequence
from prefill_worker.handoff import OfferQueue, Outbound, Outbox
from tests.unit.worker.router_client import submit_of


class Taken:
    """A hand-off that remembers the reports it got."""

    def __init__(self) -> None:
        self.reports: list[tuple[range, int, list[int]]] = []

    def layers_ready(self, layers: range, first_block_index: int, block_ids: Seq[int]) -> None:
        self.reports.append((layers, first_block_index, list(block_ids)))


LOOP = asyncio.new_event_loop()


@pytest.fixture(scope="module", autouse=True)
def close_loop() -> Iterator[None]:
    yield
    LOOP.close()


def outbound(request_id: str = "r", tokens: int = 4) -> Outbound:
    return Outbound(submit_of([1] * tokens, request_id=request_id), tokens, LOOP.create_future())


def test_reports_made_before_the_handoff_exists_come_first_and_none_is_lost() -> None:
    box, out, taken = Outbox(), outbound(), Taken()
    box.open(out)
    seq = Sequence.from_submit(out.submit, 0.0)
    halfway = threading.Event()

    def engine() -> None:
        for index in range(2000):
            box.layers_ready(seq, range(1), index, [index])
            if index == 1000:
                halfway.set()

    thread = threading.Thread(target=engine)
    thread.start()
    halfway.wait(10.0)
    out.attach(taken)
    thread.join()
    assert taken.reports == [(range(1), index, [index]) for index in range(2000)]


def test_only_open_attempts_are_reported() -> None:
    box, out, taken = Outbox(), outbound(), Taken()
    started: list[Outbound] = []
    box.on_started = started.append
    seq = Sequence.from_submit(out.submit, 0.0)
    box.started(seq)
    box.open(out)
    out.attach(taken)
    box.started(seq)
    assert started == [out]
    box.close(out)
    box.close(out)
    box.layers_ready(seq, range(1), 0, [1])
    assert taken.reports == []


def test_offers_run_ahead_by_a_few_steps_of_tokens_and_no_more() -> None:
    queue = OfferQueue(lookahead_tokens=100)
    waiting = [outbound(f"r{n}", 60) for n in range(3)]
    for out in waiting:
        queue.add(out)
    assert queue.due() is waiting[0]
    assert queue.due() is None
    queue.start(waiting[0])
    assert queue.due() is waiting[1]
    assert queue.due() is None
    queue.start(waiting[2])  # overtaken by compute: offered at once
    assert queue.due() is waiting[2]


def test_a_prompt_longer_than_the_lookahead_is_offered_when_it_is_next() -> None:
    queue = OfferQueue(lookahead_tokens=100)
    long = outbound("long", 5000)
    queue.add(long)
    assert queue.due() is long


@given(st.lists(st.tuples(st.sampled_from(["add", "due", "start", "remove", "defer"]), st.integers(0, 9)), max_size=60))
def test_every_outbound_is_offered_once_and_in_order(steps: list[tuple[str, int]]) -> None:
    queue = OfferQueue(lookahead_tokens=10)
    added: list[Outbound] = []
    removed: set[Outbound] = set()
    offered: list[Outbound] = []
    for action, number in steps:
        if action == "add":
            added.append(outbound(f"r{len(added)}", number + 1))
            queue.add(added[-1])
        elif action == "due":
            out = queue.due()
            if out is not None:
                assert out not in removed
                offered.append(out)
        elif action == "defer" and offered and not offered[-1].started and offered[-1] not in removed:
            queue.defer(offered.pop())
        elif action in ("start", "remove") and number < len(added):
            (queue.start if action == "start" else queue.remove)(added[number])
            removed |= {added[number]} if action == "remove" else set()
    for out in added:
        queue.start(out)
    while (late := queue.due()) is not None:
        offered.append(late)
    assert len(offered) == len(set(offered))
    assert [out for out in offered if out not in removed] == [out for out in added if out not in removed]
    assert len(queue) == 0
