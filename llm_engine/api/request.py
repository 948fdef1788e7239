"""What a request asks for and what a worker answers, as immutable wire structs."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence

import msgspec

TOKEN_BYTES = 4


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int32 bytes: one copy on the wire instead of one integer object a token."""
    return array("i", tokens).tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """Inverse of `pack_tokens`. Raises ValueError when `data` is not a whole number of ids."""
    out = array("i")
    out.frombytes(data)
    return out.tolist()


class FinishReason(enum.StrEnum):
    """Why a sequence ended on the worker. Stop strings and tool calls are decided by the router."""

    STOP = "stop"  # end-of-sequence or a stop token id
    LENGTH = "length"  # max_tokens or the served context is used up
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to draw tokens. Greedy when `temperature` is 0. The router draws `seed` if the client gave none.

    Every draw is keyed by (seed, absolute position), so a continuation after a lost worker is the same text.
    """

    seed: int
    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: off; n: the drawn token and the n most likely ones


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of a drawn token under the raw model distribution, and the most likely alternatives."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class StageTimes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Durations in seconds measured by one worker on its own monotonic clock."""

    queue_s: float = 0.0  # Submit received → first chunk planned
    compute_s: float = 0.0  # first chunk planned → first token drawn
    handoff_s: float = 0.0  # Offer received → Commit verified
    exposed_s: float = 0.0  # last prefill kernel end → decode may schedule (from the sender's report)


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New output tokens of one attempt. `index` is the output position (0 = first output token) of `tokens[0]`.

    Deltas may repeat earlier tokens (the decode worker restates the first one); the router keeps each index once.
    """

    request_id: str
    attempt: int
    index: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    cached_tokens: int | None = None  # prompt tokens found in the worker's prefix cache; with the first delta
    times: StageTimes | None = None
