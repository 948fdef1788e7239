"""Passes that go ahead: one is under way while the result of the one before is taken care of."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import pytest
from torch import Tensor

from llm_engine.api.messages import Role, Submit
from llm_engine.api.request import FinishReason
from llm_engine.ops import ForwardBatch
from llm_engine.runtime.kv_store import KvStore
from llm_engine.sched import Phase, Reservation, Sequence
from tests.unit.runtime.fake_model import BLOCK, LateModel
from tests.unit.runtime.harness import (
    PROMPT,
    Clock,
    Driver,
    blocks_in_use,
    expected_output,
    fake_driver,
    fake_pair,
    hand_over,
    prompt_of,
)


def _decoding(submit: Submit | None = None, **options: Any) -> tuple[Driver, Sequence]:
    """A decode engine whose one sequence has a pass under way."""
    p, d, stores = fake_pair(submit or prompt_of(), ahead=True, **options)
    seq, _ = hand_over(p, d, stores)
    d.step()
    assert d.engine.under_way
    return d, seq


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_every_step_reports_what_it_reports_without(num_drafts: int) -> None:
    """No token is later by a call, and none is computed for nothing."""
    reported = []
    submits = [prompt_of(f"r{i}", [i, *PROMPT], max_tokens=7 + 3 * i, temperature=0.8 * i) for i in range(3)]
    for ahead in (False, True):
        p, d, stores = fake_pair(*submits, num_drafts=num_drafts, ahead=ahead)
        for i in range(3):
            hand_over(p, d, stores, i)
        d.run()
        reported.append([(delta.request_id, delta.index, delta.tokens, delta.finish) for delta in d.deltas])
        assert [result.stats.decode_rows for result in d.results].count(0) == 0
    assert reported[0] == reported[1]
    for submit in submits:
        assert d.outputs[submit.request_id] == expected_output(submit)


class Watching(LateModel):
    """Notes by how much the rows of the first pass of each step are ahead of the tokens of its sequences."""

    def __init__(self, num_drafts: int) -> None:
        super().__init__(wrong_every=10**9)
        self.running: list[Sequence] = []
        self.ahead: list[list[int]] = []
        self._num_drafts = num_drafts

    def forward(self, batch: ForwardBatch, store: KvStore, on_layer: Callable[[int], None] | None = None) -> Tensor:
        if not self._num_drafts:
            self._compare(batch.context_lens)
        return super().forward(batch, store, on_layer)

    def mtp(self, batch: ForwardBatch, hidden_RH: Tensor, store: KvStore) -> Tensor:
        if self._launched:  # the first of a step; row i holds token i + 1
            self._compare([length + 1 for length in batch.context_lens])
        return super().mtp(batch, hidden_RH, store)

    def _compare(self, lengths: Seq[int]) -> None:
        self.ahead.append([n - len(seq.tokens) for n, seq in zip(lengths, self.running, strict=True)])


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_a_step_begins_before_the_one_before_it_is_committed(num_drafts: int) -> None:
    """Who was admitted meanwhile takes part; who ends with the last tokens does not."""
    model = Watching(num_drafts)
    lengths = {"short": 2 + 2 * (1 + num_drafts), "long": 30, "late": 30}
    submits = [prompt_of(name, [len(name), *PROMPT], max_tokens=count) for name, count in lengths.items()]
    p, d, stores = fake_pair(*submits, num_drafts=num_drafts, ahead=True, model=model)
    new = 1 + num_drafts
    model.running = [hand_over(p, d, stores, place)[0] for place in (0, 1)]
    d.step()
    assert model.ahead == [[0, 0], [new, new]]
    model.running.append(hand_over(p, d, stores, 2)[0])
    d.step()
    assert model.ahead[2:] == [[new, new, 0]]
    model.running.pop(0)
    d.step()
    assert d.finishes == {"short": FinishReason.LENGTH}
    assert model.ahead[3:] == [[new, new]]
    model.running = []
    model._compare = lambda lengths: None  # type: ignore[method-assign]
    d.run()
    for submit in submits:
        assert d.outputs[submit.request_id] == expected_output(submit)


def test_nothing_is_under_way_when_all_have_ended() -> None:
    d, _ = _decoding()
    d.run()
    assert not d.engine.under_way
    assert d.engine.is_idle
    assert blocks_in_use(d.engine) == 0
    assert d.finishes == {"r": FinishReason.LENGTH}


def test_on_the_host_nothing_goes_ahead_unless_told() -> None:
    driver = fake_driver(ahead=None)  # type: ignore[arg-type]
    driver.add(prompt_of())
    driver.step()
    driver.step()
    assert driver.deltas
    assert not driver.engine.under_way


def test_prefill_never_goes_ahead() -> None:
    driver = fake_driver(Role.PREFILL, ahead=True)
    driver.add(prompt_of(tokens=[1] * 40))
    for _ in range(3):
        driver.step()
        assert not driver.engine.under_way
    aggregated = fake_driver(ahead=True)
    aggregated.add(prompt_of("long", [1] * 40))
    aggregated.step()
    assert not aggregated.engine.under_way, "a prompt is left to compute"


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_blocks_that_a_pass_under_way_writes_go_to_nobody(num_drafts: int) -> None:
    """An abort does not stop the pass: a writer of a hand-off would be written over, and the other way round."""
    d, seq = _decoding(num_drafts=num_drafts, num_blocks=8)
    held, free = set(seq.blocks), d.engine.load().blocks_free
    assert d.engine.abort("r", 1) is seq
    assert not d.engine.is_idle
    assert blocks_in_use(d.engine) == len(held)
    taken = d.engine.reserve(prompt_of("next", [9] * (free * BLOCK + 1)), free * BLOCK + 1)
    assert taken is None, "there is no room but in blocks that are still written"
    taken = d.engine.reserve(prompt_of("small", [9] * (free * BLOCK)), free * BLOCK)
    assert isinstance(taken, Reservation)
    assert not held & {*taken.blocks, *taken.hits}
    d.engine.release_reservation(taken, quarantine=False)
    d.wait()
    assert blocks_in_use(d.engine) == 0
    result = d.step()
    assert result is not None
    assert not result.deltas
    assert d.engine.is_idle


def test_a_sequence_that_is_preempted_gets_its_tokens_first() -> None:
    """Two sequences outgrow the cache: the failure comes with the tokens that the last pass gave, not instead."""
    driver = fake_driver(num_blocks=8, ahead=True)
    for name in ("old", "young"):
        driver.add(prompt_of(name, max_tokens=20))
    driver.run()
    (failure,) = driver.failed
    assert (failure.seq.request_id, failure.code) == ("young", "preempted")
    assert driver.outputs["young"] == failure.seq.tokens[len(PROMPT) :]
    assert driver.outputs["old"] == expected_output(prompt_of("old", max_tokens=20))


def test_a_deadline_comes_with_the_last_tokens() -> None:
    clock = Clock()
    d, _ = _decoding(prompt_of(deadline_s=5.0), clock=clock)
    clock.now += 200.0
    result = d.step()
    assert result is not None
    (delta,) = result.deltas["router"]
    assert (len(delta.tokens), delta.finish) == (1, FinishReason.DEADLINE)
    assert d.engine.is_idle


@pytest.mark.parametrize("waits", [False, True])
def test_who_is_admitted_takes_part_from_the_next_pass_on(waits: bool) -> None:
    """Also between the end of a pass and the step that commits it: the step loop runs commands there."""
    submits = [prompt_of(name, [len(name), *PROMPT]) for name in ("first", "second")]
    p, d, stores = fake_pair(*submits, ahead=True)
    hand_over(p, d, stores, 0)
    d.step()
    if waits:
        d.wait()
    second, _ = hand_over(p, d, stores, 1)
    d.step()
    assert second.num_output == 1
    d.step()
    assert second.num_output == 2
    d.run()
    for submit in submits:
        assert d.outputs[submit.request_id] == expected_output(submit)


def test_what_is_handed_back_has_no_further_tokens() -> None:
    d, seq = _decoding()
    known = len(d.outputs["r"])
    d.engine.drain(hand_back=True)
    assert seq.phase is Phase.ENDED
    d.run()
    assert [failure.code for failure in d.failed] == ["draining"]
    assert len(d.outputs["r"]) == known
    assert blocks_in_use(d.engine) == 0


def test_how_long_a_pass_goes_on_is_told_by_the_last_one() -> None:
    clock = Clock()
    d, _ = _decoding(clock=clock)
    clock.now += 8.0
    d.step()
    assert d.engine.rest_s == 6.0
    clock.now += 5.0
    assert d.engine.rest_s == 1.0
    clock.now += 5.0
    assert d.engine.rest_s == 0.0
    d.step()
    d.wait()
    assert d.engine.rest_s == 0.0
