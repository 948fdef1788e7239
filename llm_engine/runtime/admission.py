"""Takes sequences into an engine: prompts to prefill, and hand-offs, for which blocks are set aside beforehand."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from torch import Tensor

from llm_engine.api.handoff import FirstToken
from llm_engine.api.messages import Submit
from llm_engine.runtime.ends import finish_reason
from llm_engine.runtime.intake import Limits, accept, misfit
from llm_engine.runtime.roster import Roster
from llm_engine.runtime.runner import Runner
from llm_engine.runtime.speculate import Speculator, state_from_bytes
from llm_engine.sched.decode import DecodeScheduler
from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.prefill import PrefillScheduler
from llm_engine.sched.reservations import Reservations
from llm_engine.sched.sequence import Refusal, Reservation, Sequence


class Admission:
    """`Engine.add`, `reserve`, `expect` and `admit`, which tell what they promise. `draining`: take no new work."""

    def __init__(
        self,
        cache: PagedCache,
        prefill: PrefillScheduler,
        decode: DecodeScheduler,
        reservations: Reservations,
        runner: Runner,
        speculator: Speculator | None,
        roster: Roster,
        *,
        limits: Limits,
        max_num_seqs: int,
        clock: Callable[[], float],
    ) -> None:
        self.draining = False
        self._cache = cache
        self._prefill = prefill
        self._decode = decode
        self._reservations = reservations
        self._runner = runner
        self._speculator = speculator
        self._roster = roster
        self._limits = limits
        self._max_num_seqs = max_num_seqs
        self._clock = clock

    def add(self, submit: Submit) -> Sequence | Refusal:
        """`Engine.add`, on an engine that prefills."""
        refusal = self._turned_away(submit)
        if refusal is not None:
            return refusal
        seq = accept(submit, self._limits, self._clock())
        if isinstance(seq, Refusal):
            return seq
        refusal = self._prefill.add(seq)
        if refusal is not None:
            return refusal
        self._roster.supersede(submit.request_id)
        self._roster.enter(seq)
        return seq

    def reserve(self, submit: Submit, num_tokens: int, digests: Seq[bytes] | None) -> Reservation | Refusal | None:
        """`Engine.reserve`."""
        refusal = self._turned_away(submit)
        if refusal is not None:
            return refusal
        expected = self._accept(submit) if digests is None else None
        if isinstance(expected, Refusal):
            return expected
        most = self._limits.max_len - 1 if expected is None else len(expected.tokens)
        if num_tokens > most and expected is None:
            return Refusal("too_long", f"{num_tokens} tokens: this worker takes up to {most}", retryable=False)
        if not 0 < num_tokens <= most:
            return Refusal("invalid", f"num_tokens={num_tokens}: expected 1 to {most}", retryable=False)
        if expected is not None:
            digests = expected.digests[: num_tokens // self._cache.block_tokens]
        self._roster.supersede(submit.request_id)
        if len(self._decode.running) + self._reservations.num_reserved >= self._max_num_seqs:
            return None
        reservation = self._reservations.take(
            submit.request_id,
            submit.attempt,
            num_tokens,
            digests or (),
            deadline=self._clock() + submit.deadline_s,
            headroom=len(self._decode.running),
        )
        if reservation is not None:
            reservation.expected = expected
        return reservation

    def expect(self, submit: Submit, reservation: Reservation) -> Sequence | Refusal:
        """`Engine.expect`."""
        seq = self._accept(submit)
        offered = reservation.digests
        if isinstance(seq, Sequence) and seq.digests and offered and seq.digests[: len(offered)] != offered:
            seq = Refusal("invalid", "the tokens are not those whose digests were offered", retryable=False)
        reservation.expected = seq
        return seq

    def admit(self, submit: Submit, reservation: Reservation, first: FirstToken) -> Sequence:
        """`Engine.admit`."""
        self._reservations.expect(reservation, "reserved")
        seq = reservation.expected
        if seq is None or (isinstance(seq, Sequence) and seq.submit is not submit):
            seq = self.expect(submit, reservation)
        if isinstance(seq, Refusal):
            raise ValueError(seq.reason)
        if self._roster.newest_attempt(submit.request_id) >= submit.attempt:
            raise ValueError(f"{submit.request_id}: attempt {submit.attempt} is stale")
        problem = misfit(seq, reservation, first, self._limits)
        if problem is not None:
            raise ValueError(problem)
        state_1H = None if self._speculator is None else self._state(first)
        self._roster.supersede(submit.request_id)
        self._reservations.adopt(seq, reservation)
        self._enter(seq, reservation, first, state_1H)
        return seq

    def _accept(self, submit: Submit) -> Sequence | Refusal:
        """A fresh sequence with its digests, or why there can't be one."""
        seq = accept(submit, self._limits, self._clock())
        if isinstance(seq, Sequence):
            self._cache.digests_of(seq)
        return seq

    def _turned_away(self, submit: Submit) -> Refusal | None:
        """Why this engine takes no such submit now, whatever is in it."""
        if self.draining:
            return Refusal("draining", "this worker takes no new work", retryable=True)
        if self._roster.newest_attempt(submit.request_id) >= submit.attempt:
            return Refusal("stale", f"attempt {submit.attempt} is known or superseded", retryable=False)
        return None

    def _state(self, first: FirstToken) -> Tensor:
        model = self._runner.model
        return state_from_bytes(first.hidden, model.spec.hidden_size, model.dtype, self._runner.device)

    def _enter(self, seq: Sequence, reservation: Reservation, first: FirstToken, state_1H: Tensor | None) -> None:
        """The sequence decodes from its first token on, if that is not its last. `state_1H`: for the MTP layer."""
        seq.deadline = reservation.deadline
        seq.num_cached = first.cached_tokens
        seq.tokens.append(first.token)
        if first.logprobs is not None:
            seq.logprobs.append(first.logprobs)
        self._runner.open(seq)
        self._decode.add(seq)
        self._roster.enter(seq)
        finish = finish_reason(seq)
        if finish is not None:
            self._roster.finish(seq, finish, self._clock())
        elif self._speculator is not None and state_1H is not None:
            self._speculator.observe(seq, seq.num_computed - 1, state_1H)
