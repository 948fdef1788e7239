"""Tokens, deltas, statistics and refusals of an engine; each test one promise of its interface."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from torch import Tensor

from llm_engine.api.messages import Role, Submit
from llm_engine.api.request import FinishReason, pack_tokens
from llm_engine.ops import ForwardBatch
from llm_engine.runtime.kv_store import KvStore
from llm_engine.sched import Refusal, Reservation
from tests.unit.runtime.fake_model import BLOCK, EOS, VOCAB, FakeModel, make_store
from tests.unit.runtime.harness import (
    PROMPT,
    Clock,
    expected_output,
    fake_driver,
    prompt_of,
)


@pytest.mark.parametrize("num_drafts", [0, 1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_save_steps_but_change_no_token(num_drafts: int, temperature: float) -> None:
    submits = [prompt_of(f"r{i}", [i, *PROMPT], temperature=temperature, max_tokens=30) for i in range(4)]
    driver = fake_driver(num_drafts=num_drafts)
    for submit in submits:
        driver.add(submit)
    driver.run()
    for submit in submits:
        assert driver.outputs[submit.request_id] == expected_output(submit)
    if num_drafts:
        assert len(driver.results) < 30
    else:
        assert len(driver.results) == 3 + 29  # four prompts of 11 tokens in chunks of 16, then a token a step
    assert max(len(result.stats.drafts) for result in driver.results) == num_drafts


def test_without_drafts_the_draft_layer_never_runs() -> None:
    model = FakeModel()
    driver = fake_driver(model=model, store=make_store(32, with_mtp=True), num_drafts=0)
    driver.add(prompt_of())
    driver.run()
    assert model.num_mtp_passes == 0


def test_a_resumed_request_goes_on_with_the_same_text() -> None:
    submit = prompt_of(temperature=1.0, presence_penalty=1.0, frequency_penalty=0.5, min_tokens=6, logit_bias={4: 1.0})
    whole = expected_output(submit)
    for emitted in range(len(whole)):
        resumed = msgspec.structs.replace(submit, tokens=submit.tokens + pack_tokens(whole[:emitted]), attempt=2)
        driver = fake_driver(num_drafts=1)
        driver.add(resumed)
        driver.run()
        assert driver.outputs["r"] == whole
        assert driver.deltas[0].index == emitted


def test_a_stop_inside_accepted_drafts_cuts_the_step() -> None:
    for stop in expected_output(prompt_of(max_tokens=20)):
        submit = prompt_of(max_tokens=20, stop_token_ids=(stop,))
        driver = fake_driver(num_drafts=3, model=FakeModel(wrong_every=10**9))
        driver.add(submit)
        driver.run()
        assert driver.outputs["r"] == expected_output(submit)
        assert driver.outputs["r"][-1] == stop
        assert driver.finishes["r"] is FinishReason.STOP
        assert driver.engine.is_idle


def test_the_end_token_counts_unless_ignored() -> None:
    seeds = [s for s in range(200) if EOS in expected_output(prompt_of(seed=s, temperature=1.5))]
    submit = prompt_of(seed=seeds[0], temperature=1.5, ignore_eos=False)
    driver = fake_driver()
    driver.add(submit)
    driver.run()
    assert driver.outputs["r"][-1] == EOS
    assert driver.finishes["r"] is FinishReason.STOP


def test_output_ends_where_the_longest_sequence_does() -> None:
    driver = fake_driver(num_drafts=3, model=FakeModel(max_len=20))
    assert driver.engine.max_len == 20
    driver.add(prompt_of(max_tokens=1000))
    driver.run()
    assert len(driver.outputs["r"]) == 10
    assert driver.finishes["r"] is FinishReason.LENGTH
    assert fake_driver(num_blocks=10).engine.max_len == 10 * BLOCK


def test_the_first_delta_carries_cache_hits_and_times() -> None:
    clock = Clock()
    driver = fake_driver(clock=clock)
    driver.add(prompt_of("a"))
    driver.run()
    driver.add(prompt_of("b"))
    clock.now += 3
    driver.run()
    first = [delta for delta in driver.deltas if delta.request_id == "b"]
    assert first[0].cached_tokens == 8
    assert first[0].times is not None
    assert first[0].times.queue_s == 3
    assert all(delta.cached_tokens is None and delta.times is None for delta in first[1:])


def test_deltas_are_grouped_by_router() -> None:
    driver = fake_driver()
    driver.add(prompt_of("a", router_id="x"))
    driver.add(prompt_of("b", [7, *PROMPT], router_id="y"))
    driver.run()
    routers = {router for result in driver.results for router in result.deltas}
    assert routers == {"x", "y"}
    for result in driver.results:
        for router, deltas in result.deltas.items():
            assert {delta.request_id for delta in deltas} <= {"a" if router == "x" else "b"}


def test_logprobs_come_with_every_token() -> None:
    driver = fake_driver(num_drafts=3)
    driver.add(prompt_of(logprobs=2))
    driver.run()
    for delta in driver.deltas:
        assert delta.logprobs is not None
        assert len(delta.logprobs) == len(delta.tokens)
        for token, logprob in zip(delta.tokens, delta.logprobs, strict=True):
            assert logprob.top_ids[0] == token  # greedy
            assert logprob.logprob == logprob.top_logprobs[0]


def test_statistics_add_up() -> None:
    driver = fake_driver(num_drafts=2)
    for i in range(3):
        driver.add(prompt_of(f"r{i}", [i, *PROMPT]))
    driver.run()
    stats = [result.stats for result in driver.results]
    assert sum(s.prefill_tokens for s in stats) == 33
    assert sum(s.decode_tokens for s in stats) == 3 * 11  # the first token of each is prefill's
    assert sum(s.decode_rows for s in stats) == sum(sum(s.drafts) + (s.decode_rows - sum(s.drafts)) for s in stats)
    accepted = [sum(s.accepted[i] for s in stats if i < len(s.accepted)) for i in range(2)]
    drafted = [sum(s.drafts[i] for s in stats if i < len(s.drafts)) for i in range(2)]
    assert 0 < accepted[1] <= accepted[0] <= drafted[0]
    rows_with_tokens = sum(s.decode_rows - sum(s.drafts) for s in stats)
    assert rows_with_tokens + sum(accepted) >= 33


def test_the_rate_of_prefill_counts_passes_that_draw_nothing_with_the_one_that_is_waited_for() -> None:
    """A card has hardly begun the first passes of a prompt when they are launched."""
    clock = Clock()

    class Card(FakeModel):
        def forward(self, batch: ForwardBatch, store: KvStore, on_layer: Any = None) -> Tensor:
            clock.now += 4.0 if max(batch.context_lens) == len(prompt) else 0.5
            return super().forward(batch, store, on_layer)

    prompt = [*range(3, 15)] * 4
    driver = fake_driver(Role.PREFILL, model=Card(), clock=clock, chunk=16)
    driver.add(prompt_of(tokens=prompt))
    driver.run()
    assert driver.engine.load().prefill_tokens_per_s == pytest.approx(48 / 5)


def test_cache_events_reach_the_owner_even_when_nothing_is_computed() -> None:
    driver = fake_driver(num_blocks=8)
    driver.add(prompt_of())
    driver.run()
    mirror: set[bytes] = set()
    for result in driver.results:
        if result.kv_events is not None:
            mirror |= set(result.kv_events.stored)
    assert mirror == set(driver.engine.kv_snapshot().digests) != set()
    big = driver.engine.reserve(prompt_of("big", [9] * 30), 30)
    assert isinstance(big, Reservation)
    evicting = driver.step()
    assert evicting is not None
    assert evicting.kv_events is not None
    assert set(evicting.kv_events.removed) <= mirror
    assert evicting.kv_events.removed != []
    assert driver.step() is None


def test_a_quiet_engine_does_nothing() -> None:
    driver = fake_driver()
    assert driver.step() is None
    driver.add(prompt_of())
    driver.run()
    assert driver.step() is None
    assert driver.engine.is_idle


@pytest.mark.parametrize(
    ("submit", "code", "words"),
    [
        (prompt_of(tokens=[1] * 64), "too_long", "64 tokens"),
        (prompt_of(tokens=[1, VOCAB]), "invalid", "token ids"),
        (prompt_of(tokens=[1, -1]), "invalid", "token ids"),
        (prompt_of(max_tokens=0), "invalid", "max_tokens"),
        (prompt_of(num_prompt=6, max_tokens=4), "invalid", "already emitted"),
        (prompt_of(num_prompt=11), "invalid", "num_prompt"),
        (msgspec.structs.replace(prompt_of(), tokens=b""), "invalid", "num_prompt"),
        (msgspec.structs.replace(prompt_of(), tokens=b"abc"), "invalid", "32-bit"),
        (prompt_of(temperature=float("nan")), "invalid", "temperature"),
        (prompt_of(temperature=-1.0), "invalid", "temperature"),
        (prompt_of(top_p=0.0), "invalid", "top_p"),
        (prompt_of(top_k=-1), "invalid", "top_k"),
        (prompt_of(logit_bias={VOCAB: 1.0}), "invalid", "logit_bias"),
        (prompt_of(presence_penalty=float("inf")), "invalid", "penalties"),
        (prompt_of(logprobs=-1), "invalid", "logprobs"),
    ],
)
def test_what_can_not_be_served_is_refused_with_the_reason(submit: Submit, code: str, words: str) -> None:
    for driver in (fake_driver(), fake_driver(Role.DECODE)):
        engine = driver.engine
        refusal = engine.add(submit) if driver.engine._role is Role.AGGREGATED else engine.reserve(submit, 1)
        assert isinstance(refusal, Refusal)
        assert refusal.code == code
        assert words in refusal.reason
        assert not refusal.retryable
        assert engine.is_idle


def test_a_full_queue_and_a_draining_engine_refuse() -> None:
    driver = fake_driver(max_waiting=1)
    driver.add(prompt_of("a"))
    full = driver.engine.add(prompt_of("b"))
    assert isinstance(full, Refusal)
    assert (full.code, full.retryable) == ("full", True)
    driver.engine.drain()
    draining = driver.engine.add(prompt_of("c"))
    assert isinstance(draining, Refusal)
    assert (draining.code, draining.retryable) == ("draining", True)
    driver.run()
    assert driver.outputs["a"] == expected_output(prompt_of("a"))


def test_a_decode_engine_takes_no_prompts() -> None:
    with pytest.raises(ValueError, match="reserve"):
        fake_driver(Role.DECODE).engine.add(prompt_of())
