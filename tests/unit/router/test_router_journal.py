"""Whatever the network does, a client sees each token once and in order."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from llm_engine.api.request import FinishReason, SamplingParams, TokenDelta, TokenLogprobs, pack_tokens
from router.journal import MAX_EARLY_TOKENS, Applied, Journal


def logprob(token: int) -> TokenLogprobs:
    return TokenLogprobs(-token / 7, [token], [-token / 7])


def make_journal(max_tokens: int, *, logprobs: bool = False, **sampling: object) -> Journal:
    return Journal(
        request_id="r",
        prompt=pack_tokens([1, 2, 3]),
        num_prompt=3,
        sampling=SamplingParams(seed=0, max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
        arrived_unix=0.0,
        deadline_s=60.0,
        logprobs=[] if logprobs else None,
    )


def delta(
    attempt: int, index: int, tokens: list[int], finish: FinishReason | None = None, logprobs: bool = False
) -> TokenDelta:
    values = [logprob(token) for token in tokens] if logprobs else None
    return TokenDelta(request_id="r", attempt=attempt, index=index, tokens=tokens, finish=finish, logprobs=values)


@dataclass(frozen=True)
class Sent:
    """A message of one attempt that is somewhere in the network."""

    attempt: int
    delta: TokenDelta


class JournalMachine(RuleBasedStateMachine):
    """Prefill sends the first token of an attempt, decode restates it and goes on; messages are delivered in any order,
    any number of times or never, and attempts are given up at any moment."""

    network = Bundle("network")

    @initialize(num_tokens=st.integers(1, 12), logprobs=st.booleans(), stops=st.booleans())
    def start(self, num_tokens: int, logprobs: bool, stops: bool) -> None:
        self.truth = [100 + i for i in range(num_tokens)]
        self.with_logprobs = logprobs
        self.finish = FinishReason.STOP if stops else FinishReason.LENGTH
        self.journal = make_journal(num_tokens + 5 if stops else num_tokens, logprobs=logprobs)
        self.seen: list[int] = []
        self.unsent = 0  # decode's next index
        self.undelivered: list[TokenDelta] = []  # of the current attempt, in order of sending
        self.begin()

    def begin(self) -> None:
        self.journal.begin("p", "d", 0.0, 0)
        self.start_index = self.unsent = len(self.journal.output)
        self.undelivered = []

    def send(self, index: int, count: int) -> Sent:
        tokens = self.truth[index : index + count]
        finish = self.finish if index + count >= len(self.truth) else None
        sent = delta(self.journal.attempt, index, tokens, finish, self.with_logprobs)
        self.undelivered.append(sent)
        return Sent(self.journal.attempt, sent)

    @precondition(lambda self: self.journal.finish is None)
    @rule(target=network)
    def prefill_sends_first_token(self) -> Sent:
        return self.send(self.start_index, 1)

    @precondition(lambda self: self.journal.finish is None and self.unsent < len(self.truth))
    @rule(target=network, count=st.integers(1, 4))
    def decode_sends(self, count: int) -> Sent:
        sent = self.send(self.unsent, count)
        self.unsent = min(self.unsent + count, len(self.truth))
        return sent

    @rule(sent=network)
    def deliver_and_keep(self, sent: Sent) -> None:
        self.deliver(sent.delta)

    @rule(sent=consumes(network))
    def deliver_once(self, sent: Sent) -> None:
        self.deliver(sent.delta)

    def deliver(self, message: TokenDelta) -> None:
        before, late = len(self.journal.output), message.attempt != self.journal.attempt
        applied = self.journal.apply(message)
        assert applied is not Applied.BROKEN
        grown = self.journal.output[before:]
        assert not (late and grown), "an older attempt may not add tokens"
        self.seen += grown

    @precondition(lambda self: self.journal.finish is None)
    @rule()
    def lose_the_attempt(self) -> None:
        self.journal.end("lost", 0.0)
        self.begin()

    @rule()
    def survive_a_restart_of_the_router(self) -> None:
        encoded = msgspec.msgpack.encode(self.journal)
        self.journal = msgspec.msgpack.decode(encoded, type=Journal)

    @invariant()
    def client_sees_a_prefix_of_the_truth(self) -> None:
        if not hasattr(self, "journal"):
            return
        assert self.seen == self.journal.output == self.truth[: len(self.seen)]
        if self.with_logprobs:
            assert self.journal.logprobs == [logprob(token) for token in self.seen]
        assert (self.seen == self.truth) is (self.journal.finish is not None)
        assert self.journal.finish in (None, self.finish)

    def teardown(self) -> None:
        """Once the current attempt's messages have all arrived, nothing is missing."""
        if not hasattr(self, "journal") or self.journal.finish is not None:
            return
        if self.unsent < len(self.truth):
            self.send(self.unsent, len(self.truth) - self.unsent)
        for message in self.undelivered:
            self.deliver(message)
        assert self.seen == self.truth
        assert self.journal.finish is self.finish


TestJournal = JournalMachine.TestCase
TestJournal.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_first_delta_of_decode_may_overtake_prefill() -> None:
    journal = make_journal(4)
    journal.begin("p", "d", 0.0, 0)
    assert journal.apply(delta(1, 1, [11, 12])) is Applied.NOTHING
    assert journal.output == []
    assert journal.apply(delta(1, 0, [10])) is Applied.TOKENS
    assert journal.output == [10, 11, 12]
    assert journal.apply(delta(1, 0, [10, 11, 12, 13], FinishReason.LENGTH)) is Applied.TOKENS
    assert (journal.output, journal.finish) == ([10, 11, 12, 13], FinishReason.LENGTH)


def test_a_finish_ahead_of_a_hole_waits_for_the_tokens() -> None:
    journal = make_journal(3)
    journal.begin("p", "d", 0.0, 0)
    journal.apply(delta(1, 2, [12], FinishReason.LENGTH))
    journal.apply(delta(1, 0, [10]))
    assert journal.finish is None
    journal.apply(delta(1, 1, [11]))
    assert (journal.output, journal.finish) == ([10, 11, 12], FinishReason.LENGTH)


def test_nothing_counts_between_two_attempts() -> None:
    journal = make_journal(8)
    journal.begin("p", "d", 0.0, 0)
    journal.apply(delta(1, 0, [10]))
    journal.end("lost", 1.0)
    assert journal.apply(delta(1, 1, [11])) is Applied.NOTHING
    assert journal.output == [10]


def test_early_tokens_of_a_lost_attempt_do_not_fill_holes_of_the_next() -> None:
    journal = make_journal(8)
    journal.begin("p", "d", 0.0, 0)
    journal.apply(delta(1, 1, [99]))
    journal.end("lost", 1.0)
    journal.begin("p", "d", 1.0, 0)
    journal.apply(delta(2, 0, [10]))
    assert journal.output == [10]


@pytest.mark.parametrize(
    "bad",
    [
        delta(1, 7, [1, 2]),  # beyond max_tokens
        delta(1, -1, [1]),
        delta(1, 0, [1], FinishReason.STOP),  # ends before what is already there
    ],
)
def test_impossible_tokens_break_the_attempt_and_change_nothing(bad: TokenDelta) -> None:
    journal = make_journal(8)
    journal.begin("p", "d", 0.0, 0)
    journal.apply(delta(1, 0, [10, 11]))
    assert journal.apply(bad) is Applied.BROKEN
    assert (journal.output, journal.finish) == ([10, 11], None)


def test_tokens_too_far_ahead_break_the_attempt() -> None:
    journal = make_journal(1 << 20)
    journal.begin("p", "d", 0.0, 0)
    assert journal.apply(delta(1, MAX_EARLY_TOKENS, [1])) is Applied.BROKEN
    assert not journal.early


def test_missing_log_probabilities_break_the_attempt() -> None:
    journal = make_journal(8, logprobs=True)
    journal.begin("p", "d", 0.0, 0)
    assert journal.apply(delta(1, 0, [10])) is Applied.BROKEN
    assert journal.apply(delta(1, 0, [10], logprobs=True)) is Applied.TOKENS


@pytest.mark.parametrize(
    ("output", "sampling", "finish"),
    [
        ([], {}, None),
        ([5, 6], {}, None),
        ([5, 6, 7], {}, FinishReason.LENGTH),
        ([5, 2], {}, FinishReason.STOP),  # 2 is the end-of-sequence id
        ([5, 2], {"ignore_eos": True}, None),
        ([5, 9], {"stop_token_ids": (9,)}, FinishReason.STOP),
        ([5, 9], {"stop_token_ids": (9,), "ignore_eos": True}, FinishReason.STOP),
        ([2, 5], {}, None),
    ],
)
def test_emitted_tokens_may_imply_the_finish(
    output: list[int], sampling: dict[str, object], finish: FinishReason | None
) -> None:
    journal = make_journal(3, **sampling)
    journal.begin("p", "d", 0.0, 0)
    journal.apply(delta(1, 0, output))
    assert journal.finish_here(frozenset({2})) is finish
