"""The journal of one request: everything needed to go on with it on other workers, or in another router process.

Tokens reach the router from two sides (the first one from prefill, all from decode) and from attempts that may be void.
`Journal.apply` turns that into one sequence: every output index once, in order, from the current attempt only.

An attempt's deltas may run ahead of a hole (the decode worker's first message overtakes the prefill worker's); what is
ahead waits in `early` until the hole is filled. A recovery drops `early`: the next attempt draws the same tokens again,
because every draw is keyed by the request's seed and the token's position.
"""

from __future__ import annotations

import enum

import msgspec

from llm_engine.api.request import FinishReason, SamplingParams, StageTimes, TokenDelta, TokenLogprobs, unpack_tokens

MAX_EARLY_TOKENS = 1024  # ahead of a hole; more means that the tokens of the hole were lost


class Applied(enum.Enum):
    """What a delta did."""

    NOTHING = "nothing"  # repeated, void, or ahead of a hole
    TOKENS = "tokens"  # new output, a finish, or both
    BROKEN = "broken"  # it contradicts the request: the attempt can't be trusted to complete


class AttemptRecord(msgspec.Struct, kw_only=True):
    """One attempt. Times are seconds since the request arrived; None: it did not get that far."""

    number: int
    prefill: str
    decode: str
    sent_s: float
    num_emitted: int  # output tokens that earlier attempts had delivered
    hit_tokens: int = 0  # predicted by the router
    first_token_s: float | None = None
    started_s: float | None = None
    ended_s: float | None = None
    outcome: str = ""  # finished, or why it was given up
    times: StageTimes | None = None  # as reported by the prefill worker
    handoff_s: float | None = None
    exposed_s: float | None = None
    handoff_bytes: int | None = None


class Journal(msgspec.Struct, kw_only=True):
    """One request and what came of it so far. Plain data: msgspec encodes and decodes it."""

    request_id: str
    prompt: bytes  # pack_tokens
    num_prompt: int
    sampling: SamplingParams
    arrived_unix: float
    deadline_s: float  # since arrival
    salt: str = ""
    output: list[int] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None  # one per output token, if asked for
    finish: FinishReason | None = None
    cached_tokens: int | None = None
    attempt: int = 0  # 0: not sent yet
    live: bool = False  # the current attempt counts
    attempts: list[AttemptRecord] = msgspec.field(default_factory=list)
    early: dict[int, tuple[int, TokenLogprobs | None]] = msgspec.field(default_factory=dict)
    early_finish: tuple[int, FinishReason] | None = None  # (output length at which it holds, reason)

    @property
    def record(self) -> AttemptRecord:
        """The current attempt. Only after the first `begin`."""
        return self.attempts[-1]

    @property
    def num_left(self) -> int:
        """Output tokens that may still be drawn."""
        return self.sampling.max_tokens - len(self.output)

    def begin(self, prefill: str, decode: str, sent_s: float, hit_tokens: int) -> AttemptRecord:
        """Open the next attempt; deltas of all older ones are void from now on."""
        self.attempt += 1
        self.live = True
        self.early, self.early_finish = {}, None
        record = AttemptRecord(
            number=self.attempt,
            prefill=prefill,
            decode=decode,
            sent_s=sent_s,
            num_emitted=len(self.output),
            hit_tokens=hit_tokens,
        )
        self.attempts.append(record)
        return record

    def end(self, outcome: str, ended_s: float) -> None:
        """Close the current attempt: whatever still arrives from it is void."""
        self.live = False
        record = self.attempts[-1] if self.attempts else None
        if record is not None and record.ended_s is None:
            record.ended_s = ended_s
            record.outcome = outcome

    def apply(self, delta: TokenDelta) -> Applied:
        """Take in a delta of any attempt, in any order, any number of times."""
        if delta.attempt != self.attempt or self.finish is not None or not self.live:
            return Applied.NOTHING
        have, end = len(self.output), delta.index + len(delta.tokens)
        if end > self.sampling.max_tokens or delta.index < 0:
            return Applied.BROKEN
        if self.logprobs is not None and len(delta.logprobs or ()) != len(delta.tokens):
            return Applied.BROKEN
        if delta.index == have and delta.finish is None and not self.early and self.early_finish is None:
            self._append(delta, 0)  # the usual case
            return Applied.TOKENS if delta.tokens else Applied.NOTHING
        if end - have > MAX_EARLY_TOKENS or (delta.finish is not None and end < have):
            return Applied.BROKEN
        self._merge(delta, have)
        if self.early_finish is not None and self.early_finish[0] <= len(self.output):
            self.finish = self.early_finish[1]
        return Applied.TOKENS if len(self.output) > have or self.finish is not None else Applied.NOTHING

    def finish_here(self, eos_ids: frozenset[int]) -> FinishReason | None:
        """The finish that the emitted tokens themselves imply.

        A worker sends the finish together with the last token; this covers an attempt that was lost in between, so that
        a recovery never asks for a token beyond the end.
        """
        if not self.output:
            return None
        last, sampling = self.output[-1], self.sampling
        if last in sampling.stop_token_ids or (last in eos_ids and not sampling.ignore_eos):
            return FinishReason.STOP  # never drawn before min_tokens
        return FinishReason.LENGTH if self.num_left <= 0 else None

    def tokens(self) -> list[int]:
        """Prompt and output: what the next attempt starts from."""
        return unpack_tokens(self.prompt) + self.output

    def _merge(self, delta: TokenDelta, have: int) -> None:
        """Repeated tokens, tokens ahead of a hole, tokens that fill one, a finish."""
        end = delta.index + len(delta.tokens)
        if delta.finish is not None:
            self.early_finish = (end, delta.finish)
        if delta.index <= have:
            self._append(delta, have - delta.index)
        else:
            for offset, token in enumerate(delta.tokens):
                self.early[delta.index + offset] = (token, delta.logprobs[offset] if delta.logprobs else None)
        while (ready := self.early.pop(len(self.output), None)) is not None:
            self.output.append(ready[0])
            if self.logprobs is not None and ready[1] is not None:
                self.logprobs.append(ready[1])
        if self.early:
            self.early = {index: item for index, item in self.early.items() if index > len(self.output)}

    def _append(self, delta: TokenDelta, skip: int) -> None:
        """Append the tokens of a delta from its `skip`-th on."""
        self.output.extend(delta.tokens[skip:] if skip else delta.tokens)
        if self.logprobs is not None and delta.logprobs is not None:
            self.logprobs.extend(delta.logprobs[skip:] if skip else delta.logprobs)
