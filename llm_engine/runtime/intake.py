"""Checks what comes to an engine against what it can compute, before anything is allocated or changed for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_engine.api.handoff import FirstToken
from llm_engine.api.messages import Submit
from llm_engine.api.request import SamplingParams
from llm_engine.sched.sequence import Refusal, Reservation, Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_len`: tokens of the longest sequence. `vocab_size`: ids that have an embedding. `eos_ids`: the model's."""

    max_len: int
    vocab_size: int
    eos_ids: tuple[int, ...]


def accept(submit: Submit, limits: Limits, now: float) -> Sequence | Refusal:
    """A fresh sequence, or why there can't be one. A request that can't be served here is not retryable."""
    try:
        seq = Sequence.from_submit(submit, now)
    except ValueError:
        return _invalid("tokens are not a whole number of 32-bit ids")
    params = submit.sampling
    if not 0 < submit.num_prompt <= len(seq.tokens):
        return _invalid(f"num_prompt={submit.num_prompt}: expected 1 to {len(seq.tokens)}")
    if not 0 <= min(seq.tokens) <= max(seq.tokens) < limits.vocab_size:
        return _invalid(f"token ids must lie in [0, {limits.vocab_size})")
    if len(seq.tokens) >= limits.max_len:
        reason = f"{len(seq.tokens)} tokens leave no room for output: this worker holds {limits.max_len} a sequence"
        return Refusal("too_long", reason, retryable=False)
    if params.max_tokens <= seq.num_output:
        return _invalid(f"max_tokens={params.max_tokens}: {seq.num_output} tokens are already emitted")
    problem = _sampling_problem(params, limits.vocab_size)
    if problem:
        return _invalid(problem)
    seq.max_len = min(seq.max_len, limits.max_len)
    seq.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(limits.eos_ids))
    return seq


def misfit(seq: Sequence, reservation: Reservation, first: FirstToken, limits: Limits) -> str | None:
    """Why what was handed over is not for this sequence. None: it is."""
    if (reservation.request_id, reservation.attempt) != (seq.request_id, seq.attempt):
        return f"{seq.request_id}: the reservation is for {reservation.request_id}"
    if reservation.num_tokens != len(seq.tokens):
        return f"{reservation.num_tokens} tokens were handed over, the request has {len(seq.tokens)}"
    if not 0 <= first.token < limits.vocab_size:
        return f"first token {first.token} is not in the vocabulary"
    return None


def _sampling_problem(params: SamplingParams, vocab_size: int) -> str:
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        return f"temperature={params.temperature}: expected a finite number ≥ 0"
    if not 0 < params.top_p <= 1:
        return f"top_p={params.top_p}: expected a number in (0, 1]"
    if params.top_k < 0:
        return f"top_k={params.top_k}: expected a number ≥ 0"
    if not (math.isfinite(params.presence_penalty) and math.isfinite(params.frequency_penalty)):
        return "penalties must be finite"
    if not all(0 <= token < vocab_size and math.isfinite(bias) for token, bias in params.logit_bias.items()):
        return f"logit_bias must map ids in [0, {vocab_size}) to finite numbers"
    if params.logprobs is not None and params.logprobs < 0:
        return f"logprobs={params.logprobs}: expected a number ≥ 0"
    return ""


def _invalid(reason: str) -> Refusal:
    return Refusal("invalid", reason, retryable=False)
