"""Requests for scheduler and engine tests."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from llm_engine.api.messages import Submit
from llm_engine.api.request import SamplingParams, pack_tokens
from llm_engine.sched.sequence import Sequence


def submit_of(
    tokens: Seq[int],
    request_id: str = "r",
    *,
    attempt: int = 1,
    num_prompt: int | None = None,
    deadline_s: float = 1e6,
    salt: str = "",
    router_id: str = "router",
    **sampling: Any,
) -> Submit:
    """A submit for `tokens`, greedy with room for 16 tokens unless told otherwise."""
    params = SamplingParams(**{"seed": 7, "max_tokens": 16, "temperature": 0.0, **sampling})
    return Submit(
        request_id=request_id,
        attempt=attempt,
        router_id=router_id,
        tokens=pack_tokens(tokens),
        num_prompt=len(tokens) if num_prompt is None else num_prompt,
        sampling=params,
        deadline_s=deadline_s,
        salt=salt,
    )


def sequence_of(tokens: Seq[int], request_id: str = "r", **options: Any) -> Sequence:
    """A sequence that arrived at time 0."""
    return Sequence.from_submit(submit_of(tokens, request_id, **options), 0.0)
