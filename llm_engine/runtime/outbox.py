"""Collects what happens to sequences until the owner of the engine takes it."""

from __future__ import annotations

from llm_engine.api.messages import KvEvents
from llm_engine.api.request import FinishReason, StageTimes, TokenDelta
from llm_engine.sched.sequence import Sequence
from llm_engine.sched.step import Failure, Prefilled, StepResult, StepStats


class Outbox:
    """The step result being filled. Deltas are made when it is taken, one a sequence."""

    def __init__(self) -> None:
        self._result = StepResult()
        self._advanced: dict[Sequence, float] = {}  # sequences with tokens to report, and since when
        self._dirty = False

    @property
    def stats(self) -> StepStats:
        """Of the result being filled."""
        return self._result.stats

    def tokens(self, seq: Sequence, now: float) -> None:
        """Report the tokens of `seq` that were not reported yet, and its finish if it has one."""
        self._advanced.setdefault(seq, now)

    def finished(self, seq: Sequence, reason: FinishReason, now: float) -> None:
        """The last tokens of `seq`, and why they are the last."""
        seq.finish = reason
        self.tokens(seq, now)
        self._result.finished.append(seq)

    def failed(self, seq: Sequence, code: str, reason: str, *, retryable: bool) -> None:
        """`seq` has ended without a finish."""
        self._result.failed.append(Failure(seq, code, reason, retryable))
        self._dirty = True

    def prefilled(self, prefilled: Prefilled) -> None:
        """A sequence is ready to be handed off."""
        self._result.prefilled.append(prefilled)
        self._dirty = True

    def worked(self) -> None:
        """A step computed something, though nobody may hear of it yet."""
        self._dirty = True

    def take(self, kv_events: KvEvents | None) -> StepResult | None:
        """Everything since the last call; None if nothing happened."""
        if not self._dirty and not self._advanced and kv_events is None:
            return None
        result, self._result, self._dirty = self._result, StepResult(), False
        for seq, now in self._advanced.items():
            result.deltas.setdefault(seq.router_id, []).append(_delta(seq, now))
        self._advanced = {}
        result.kv_events = kv_events
        return result


def _delta(seq: Sequence, now: float) -> TokenDelta:
    """What was not reported yet, which it is with this."""
    submit, index = seq.submit, seq.num_emitted
    seq.num_emitted = len(seq.tokens) - submit.num_prompt
    logprobs, seq.logprobs = seq.logprobs, []
    first, seq.announced = not seq.announced, True
    return TokenDelta(
        request_id=submit.request_id,
        attempt=submit.attempt,
        index=index,
        tokens=seq.tokens[submit.num_prompt + index :],
        logprobs=logprobs or None,
        finish=seq.finish,
        cached_tokens=min(seq.num_cached, submit.num_prompt) if first else None,
        times=_stage_times(seq, now) if first else None,
    )


def _stage_times(seq: Sequence, now: float) -> StageTimes | None:
    """Of a sequence prefilled here; a handed-off one has its own report."""
    if seq.started is None:
        return None
    return StageTimes(queue_s=seq.started - seq.arrived, compute_s=now - seq.started)
