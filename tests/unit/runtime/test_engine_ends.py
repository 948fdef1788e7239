"""However a sequence ends, everything it held is free again and nothing doubtful remains."""

from __future__ import annotations

import pytest

from llm_engine.api.messages import Role
from llm_engine.api.request import FinishReason
from llm_engine.sched import Phase, Refusal, Reservation
from tests.unit.runtime.fake_model import FakeModel
from tests.unit.runtime.harness import (
    PROMPT,
    Clock,
    blocks_in_use,
    expected_output,
    fake_driver,
    fake_pair,
    prompt_of,
)


def test_a_newer_attempt_ends_the_older_and_an_older_is_refused() -> None:
    driver = fake_driver()
    driver.add(prompt_of(attempt=2))
    driver.step()
    stale = driver.engine.add(prompt_of(attempt=2))
    assert isinstance(stale, Refusal)
    assert stale.code == "stale"
    driver.add(prompt_of(attempt=3))
    driver.run()
    assert [(f.seq.attempt, f.code, f.retryable) for f in driver.failed] == [(2, "stale", False)]
    assert driver.outputs["r"] == expected_output(prompt_of())


@pytest.mark.parametrize("steps", range(5))
def test_a_cancel_frees_everything_at_any_point(steps: int) -> None:
    driver = fake_driver(num_drafts=1)
    driver.add(prompt_of(tokens=[1] * 40, max_tokens=20))
    for _ in range(steps):
        driver.step()
    assert driver.engine.abort("r", 0) is None, "an older cancel must not stop a newer attempt"
    seq = driver.engine.abort("r", 1)
    assert seq is not None
    assert seq.phase is Phase.ENDED
    assert driver.engine.is_idle
    assert blocks_in_use(driver.engine) == 0
    driver.run()
    assert not driver.finishes
    assert driver.engine.abort("r", 1) is None


@pytest.mark.parametrize("steps", range(5))
def test_a_deadline_finishes_at_any_point(steps: int) -> None:
    clock = Clock()
    driver = fake_driver(clock=clock)
    driver.add(prompt_of("late", [1] * 40, deadline_s=5.0))
    driver.add(prompt_of("free"))
    for _ in range(steps):
        driver.step()
    clock.now += 4.9
    driver.step()
    assert "late" not in driver.finishes
    clock.now += 0.2
    driver.step()
    assert driver.finishes["late"] is FinishReason.DEADLINE
    driver.run()
    assert driver.outputs["free"] == expected_output(prompt_of("free"))
    assert driver.engine.is_idle


def test_who_is_cancelled_after_token_one_is_not_handed_off() -> None:
    """The draft layer has yet to catch up with its prompt."""
    driver = fake_driver(Role.PREFILL, num_drafts=1)
    seq = driver.add(prompt_of("cancelled"))
    driver.add(prompt_of("kept", [7] * 5))
    driver.step()
    assert set(driver.outputs) == {"cancelled", "kept"}
    driver.engine.abort("cancelled", 1)
    driver.run()
    assert [prefilled.seq.request_id for prefilled in driver.prefilled] == ["kept"]
    driver.engine.release_sent(seq)


def test_a_newer_hand_off_ends_an_older_one_that_was_admitted_meanwhile() -> None:
    p, d, _ = fake_pair(prompt_of(attempt=2))
    older, newer = (d.engine.reserve(prompt_of(attempt=attempt), 10) for attempt in (1, 2))
    assert isinstance(older, Reservation)
    assert isinstance(newer, Reservation)
    ended = d.engine.admit(prompt_of(attempt=1), older, p.prefilled[0].first)
    seq = d.engine.admit(prompt_of(attempt=2), newer, p.prefilled[0].first)
    assert (ended.phase, seq.phase) == (Phase.ENDED, Phase.DECODING)
    assert d.engine.abort("r", 2) is seq
    d.run()
    assert [(failure.seq, failure.code) for failure in d.failed] == [(ended, "stale")]
    assert d.engine.is_idle


def test_handing_back_fails_what_is_running() -> None:
    driver = fake_driver(max_num_seqs=2)
    for i in range(4):
        driver.add(prompt_of(f"r{i}", [i] * 12))
    for _ in range(3):
        driver.step()
    driver.engine.drain(hand_back=True)
    driver.run()
    assert {f.seq.request_id for f in driver.failed} == {f"r{i}" for i in range(4)} - set(driver.finishes)
    assert all((f.code, f.retryable) == ("draining", True) for f in driver.failed)
    assert driver.engine.is_idle
    assert driver.engine.load().draining


def test_output_that_is_not_finite_is_never_emitted_nor_cached() -> None:
    model = FakeModel()
    driver = fake_driver(model=model, num_drafts=1)
    model.poison = 16
    driver.add(prompt_of())
    driver.run()
    assert [(f.code, f.retryable) for f in driver.failed] == [("internal", True)]
    expected = expected_output(prompt_of())
    assert driver.outputs["r"] == expected[: len(driver.outputs["r"])]
    assert len(driver.outputs["r"]) <= 7
    assert driver.engine.kv_snapshot().digests == []
    assert driver.engine.is_idle


def test_a_prompt_whose_state_is_not_finite_fails() -> None:
    model = FakeModel()
    driver = fake_driver(Role.PREFILL, model=model, num_drafts=1)
    model.poison = len(PROMPT) - 1
    seq = driver.add(prompt_of())
    driver.run()
    assert [f.code for f in driver.failed] == ["internal"]
    assert not driver.deltas
    assert not driver.prefilled
    driver.engine.release_sent(seq)
    assert driver.engine.is_idle
