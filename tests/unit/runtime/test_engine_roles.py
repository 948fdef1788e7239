"""The two halves of a disaggregated pair: what a prefill engine reports and keeps, what a decode engine takes."""

from __future__ import annotations

import msgspec
import pytest

from llm_engine.api.handoff import FirstToken
from llm_engine.api.messages import Role, Submit
from llm_engine.api.request import FinishReason, pack_tokens
from llm_engine.sched import Phase, Refusal, Reservation, Sequence
from tests.unit.runtime.fake_model import NUM_LAYERS, VOCAB, FakeModel, copy_block
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


@pytest.mark.parametrize("num_drafts", [0, 1])
def test_token_one_is_out_before_the_draft_layer_runs(num_drafts: int) -> None:
    model = FakeModel()
    driver = fake_driver(Role.PREFILL, model=model, num_drafts=num_drafts)
    seq = driver.add(prompt_of())
    driver.step()
    assert driver.outputs["r"] == expected_output(prompt_of())[:1]
    assert model.num_mtp_passes == 0
    assert len(driver.prefilled) == (not num_drafts)
    driver.run()
    assert len(driver.prefilled) == 1
    first = driver.prefilled[0].first
    assert first.token == driver.outputs["r"][0]
    assert len(first.hidden) == (8 if num_drafts else 0)
    assert seq.phase is Phase.PREFILLED


def test_blocks_stay_pinned_until_they_are_released() -> None:
    driver = fake_driver(Role.PREFILL, num_blocks=8)
    sent = driver.add(prompt_of("sent"))
    driver.run()
    aborted = driver.add(prompt_of("aborted", [7] * 20, max_tokens=5))
    driver.step()
    assert driver.engine.abort("aborted", 1) is aborted
    assert driver.engine.abort("sent", 1) is sent
    assert blocks_in_use(driver.engine) == 8
    assert not driver.engine.is_idle
    for seq in (sent, aborted, sent):
        driver.engine.release_sent(seq)
    assert blocks_in_use(driver.engine) == 0
    assert driver.engine.is_idle
    driver.engine.check()


def test_blocks_are_not_found_before_the_draft_layer_has_caught_up() -> None:
    """A cancel between a chunk and its draft rows must not leave blocks that are complete in some layers only."""
    driver = fake_driver(Role.PREFILL, num_drafts=1)
    driver.engine.release_sent(_cancelled_after_one_step(driver))
    assert driver.engine.kv_snapshot().digests == []
    without = fake_driver(Role.PREFILL)
    without.engine.release_sent(_cancelled_after_one_step(without))
    assert len(without.engine.kv_snapshot().digests) == 4


def _cancelled_after_one_step(driver: Driver) -> Sequence:
    seq = driver.add(prompt_of(tokens=[1] * 40))
    driver.step()
    assert seq.num_computed == 16
    assert driver.engine.abort("r", 1) is seq
    return seq


def test_a_deadline_does_not_tear_a_hand_off() -> None:
    clock = Clock()
    driver = fake_driver(Role.PREFILL, clock=clock)
    seq = driver.add(prompt_of(deadline_s=5.0))
    driver.run()
    clock.now += 6
    driver.run()
    assert not driver.finishes
    assert seq.phase is Phase.PREFILLED


def test_a_sequence_that_ends_at_token_one_is_finished_not_sent() -> None:
    driver = fake_driver(Role.PREFILL, num_drafts=1)
    seq = driver.add(prompt_of(max_tokens=1))
    driver.run()
    assert driver.finishes["r"] is FinishReason.LENGTH
    assert not driver.prefilled
    assert blocks_in_use(driver.engine) == 3
    driver.engine.release_sent(seq)
    assert driver.engine.is_idle
    driver.add(prompt_of("again"))
    driver.run()
    assert driver.prefilled[-1].first.cached_tokens == 8, "its prompt must be found, complete with draft rows"


def test_a_sequence_at_work_can_not_be_released() -> None:
    driver = fake_driver(Role.PREFILL)
    seq = driver.add(prompt_of(tokens=[1] * 40))
    with pytest.raises(ValueError, match="abort it first"):
        driver.engine.release_sent(seq)
    driver.step()
    with pytest.raises(ValueError, match="abort it first"):
        driver.engine.release_sent(seq)


def test_the_sink_hears_prefix_hits_at_once_and_chunks_as_they_complete() -> None:
    heard: list[tuple[str, int, int, int]] = []

    class Sink:
        def started(self, seq: Sequence) -> None:
            heard.append((seq.request_id, -1, 0, len(seq.blocks)))

        def layers_ready(self, seq, layers, first_block_index, block_ids) -> None:  # type: ignore[no-untyped-def]
            heard.extend((seq.request_id, layer, first_block_index, len(block_ids)) for layer in layers)

    driver = fake_driver(Role.PREFILL, num_drafts=1, chunk=18, on_layer=Sink())
    driver.add(prompt_of("a", [1] * 9))
    driver.run()
    assert heard == [("a", -1, 0, 3), ("a", 0, 0, 3), ("a", 1, 0, 3), ("a", 2, 0, 3)]
    heard.clear()
    driver.add(prompt_of("b", [*[1] * 8, *[2] * 21]))
    driver.run()
    hits = [("b", layer, 0, 2) for layer in range(NUM_LAYERS + 1)]
    first_chunk = [("b", layer, 2, 4) for layer in range(NUM_LAYERS + 1)]  # tokens 8 to 26: block 6 is half done
    last_chunk = [("b", layer, 6, 2) for layer in range(NUM_LAYERS + 1)]
    assert heard == [("b", -1, 0, 8), *hits, *first_chunk, *last_chunk]


def test_waiting_sequences_are_listed_in_order() -> None:
    driver = fake_driver(Role.PREFILL)
    seqs = [driver.add(prompt_of(f"r{i}", [i] * 12)) for i in range(3)]
    assert list(driver.engine.waiting()) == seqs
    driver.step()
    assert list(driver.engine.waiting()) == seqs[2:]
    load = driver.engine.load()
    assert (load.num_waiting, load.num_running, load.waiting_tokens) == (1, 1, 12 + 8)


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_a_handed_over_sequence_restates_token_one_and_goes_on(num_drafts: int) -> None:
    submit = prompt_of(temperature=1.0, logprobs=1)
    p, d, stores = fake_pair(submit, num_drafts=num_drafts)
    hand_over(p, d, stores)
    d.run()
    assert d.outputs["r"] == expected_output(submit)
    assert d.deltas[0].index == 0
    assert d.deltas[0].tokens[0] == p.outputs["r"][0]
    assert d.deltas[0].logprobs is not None
    assert d.deltas[0].logprobs[0] == p.deltas[0].logprobs[0]  # type: ignore[index]
    assert d.engine.is_idle


def test_the_decode_side_asks_only_for_what_it_lacks() -> None:
    p, d, stores = fake_pair(prompt_of("a"), prompt_of("b", [*PROMPT[:8], *PROMPT]))
    _, first = hand_over(p, d, stores, 0)
    _, second = hand_over(p, d, stores, 1)
    assert (first.have_tokens, len(first.blocks)) == (0, 3)
    assert (second.have_tokens, len(second.blocks)) == (8, 3)
    d.run()
    assert d.outputs["b"] == expected_output(prompt_of("b", [*PROMPT[:8], *PROMPT]))


def test_reservations_wait_for_room_and_slots() -> None:
    d = fake_driver(Role.DECODE, num_blocks=8, max_num_seqs=2)
    first = d.engine.reserve(prompt_of("a", [1] * 20), 20)
    assert isinstance(first, Reservation)
    assert d.engine.reserve(prompt_of("b", [2] * 20), 20) is None
    second = d.engine.reserve(prompt_of("b", [2] * 8), 8)
    assert isinstance(second, Reservation)
    assert d.engine.reserve(prompt_of("c", [3]), 1) is None, "no more sequences than may run"
    d.engine.release_reservation(first, quarantine=True)
    assert d.engine.reserve(prompt_of("d", [2] * 20), 20) is None, "quarantined blocks are nobody's"
    d.engine.free_quarantined(first)
    d.engine.release_reservation(second, quarantine=False)
    d.engine.check()
    assert d.engine.is_idle


def test_blocks_are_reserved_by_digests_and_tokens_must_have_them() -> None:
    """Who offers says which prefix it is; nothing is admitted, and nobody else's blocks are shared, on its word."""
    p, d, stores = fake_pair()
    p.add(prompt_of("a"))
    p.add(prompt_of("b"))
    p.run()
    hand_over(p, d, stores, 0)
    seq, first = p.prefilled[1].seq, p.prefilled[1].first
    later, digests = msgspec.structs.replace(seq.submit, tokens=b""), p.engine.digests(seq)
    assert len(digests) == 2
    for wrong in ([1] * len(PROMPT), [*PROMPT[:-1], VOCAB], PROMPT[:-1]):
        reservation = d.engine.reserve(later, len(PROMPT), digests)
        assert isinstance(reservation, Reservation)
        assert reservation.have_tokens == 8
        submit = msgspec.structs.replace(later, tokens=pack_tokens(wrong))
        d.engine.expect(submit, reservation)
        with pytest.raises(ValueError, match=r"not those whose digests|token ids must lie|were handed over|num_prompt"):
            d.engine.admit(submit, reservation, first)
        d.engine.release_reservation(reservation, quarantine=False)
    reservation = d.engine.reserve(later, len(PROMPT), digests)
    assert isinstance(reservation, Reservation)
    submit = msgspec.structs.replace(later, tokens=seq.submit.tokens)
    d.engine.expect(submit, reservation)
    copy_block(stores[0], seq.blocks[2], stores[1], reservation.blocks[0])
    assert d.engine.admit(submit, reservation, first) is reservation.expected
    d.run()
    assert d.outputs["b"] == expected_output(prompt_of("b"))
    d.engine.check()


def test_offers_without_tokens_are_bounded_by_what_a_sequence_may_hold() -> None:
    d = fake_driver(Role.DECODE)
    most = d.engine._admission._limits.max_len - 1
    for num_tokens, code in ((most + 1, "too_long"), (0, "invalid"), (-1, "invalid")):
        refusal = d.engine.reserve(msgspec.structs.replace(prompt_of(), tokens=b""), num_tokens, [])
        assert isinstance(refusal, Refusal)
        assert refusal.code == code
    assert d.engine.is_idle


def test_an_offer_that_waited_does_not_end_a_newer_attempt() -> None:
    p, d, stores = fake_pair(prompt_of(attempt=2))
    hog = d.engine.reserve(prompt_of("hog", [1] * 60, deadline_s=9.0), 60)
    assert isinstance(hog, Reservation)
    hogs = [d.engine.reserve(prompt_of(f"hog{i}", [i] * 60), 60) for i in range(2)]
    assert hogs[0] is not None
    assert d.engine.reserve(prompt_of(attempt=1), 10) is None
    d.engine.release_reservation(hog, quarantine=False)
    hand_over(p, d, stores)
    stale = d.engine.reserve(prompt_of(attempt=1), 10)
    assert isinstance(stale, Refusal)
    assert stale.code == "stale"
    d.run()
    assert d.outputs["r"] == expected_output(prompt_of())


def test_a_reservation_has_one_end() -> None:
    d = fake_driver(Role.DECODE)
    reservation = d.engine.reserve(prompt_of(), 10)
    assert isinstance(reservation, Reservation)
    with pytest.raises(ValueError, match="not quarantined"):
        d.engine.free_quarantined(reservation)
    d.engine.release_reservation(reservation, quarantine=False)
    with pytest.raises(ValueError, match="is released"):
        d.engine.release_reservation(reservation, quarantine=True)
    with pytest.raises(ValueError, match="is released"):
        d.engine.admit(prompt_of(), reservation, FirstToken(token=1, logprobs=None, hidden=b"", cached_tokens=0))


@pytest.mark.parametrize(
    ("first", "submit", "words"),
    [
        (FirstToken(token=1, logprobs=None, hidden=b"123", cached_tokens=0), prompt_of(), "3 bytes"),
        (FirstToken(token=VOCAB, logprobs=None, hidden=bytes(8), cached_tokens=0), prompt_of(), "vocabulary"),
        (FirstToken(token=1, logprobs=None, hidden=bytes(8), cached_tokens=0), prompt_of(tokens=[1, 2]), "handed over"),
        (FirstToken(token=1, logprobs=None, hidden=bytes(8), cached_tokens=0), prompt_of("x"), "reservation is for"),
    ],
)
def test_a_commit_that_does_not_fit_changes_nothing(first: FirstToken, submit: Submit, words: str) -> None:
    d = fake_driver(Role.DECODE, num_drafts=1)
    reservation = d.engine.reserve(prompt_of(), 10)
    assert isinstance(reservation, Reservation)
    with pytest.raises(ValueError, match=words):
        d.engine.admit(submit, reservation, first)
    d.engine.release_reservation(reservation, quarantine=False)
    d.engine.check()
    assert d.engine.is_idle


def test_preemption_hands_the_youngest_back_with_its_tokens() -> None:
    submits = [prompt_of(f"r{i}", [i] * 12, max_tokens=40) for i in range(2)]
    p, d, stores = fake_pair(*submits, num_blocks=9)
    for i in range(2):
        hand_over(p, d, stores, i)
    d.run()
    assert [(f.seq.request_id, f.code, f.retryable) for f in d.failed] == [("r1", "preempted", True)]
    for submit in submits:
        output = d.outputs[submit.request_id]
        assert output == expected_output(submit, max_len=36)[: len(output)]
    assert len(d.outputs["r0"]) == 24
    assert d.engine.is_idle


def test_a_deadline_counts_from_the_offer() -> None:
    clock = Clock()
    p, d, _ = fake_pair(prompt_of(deadline_s=5.0), clock=clock)
    reservation = d.engine.reserve(prompt_of(deadline_s=5.0), 10)
    assert isinstance(reservation, Reservation)
    clock.now += 6
    d.engine.admit(prompt_of(deadline_s=5.0), reservation, p.prefilled[0].first)
    d.run()
    assert d.finishes["r"] is FinishReason.DEADLINE


def test_a_first_token_that_ends_the_request_ends_it_here_too() -> None:
    p, d, _ = fake_pair(prompt_of())
    reservation = d.engine.reserve(prompt_of(max_tokens=1), 10)
    assert isinstance(reservation, Reservation)
    d.engine.admit(prompt_of(max_tokens=1), reservation, p.prefilled[0].first)
    d.run()
    assert d.finishes["r"] is FinishReason.LENGTH
    assert d.outputs["r"] == [p.prefilled[0].first.token]
    assert d.engine.is_idle
