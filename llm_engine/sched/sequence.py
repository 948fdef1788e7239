"""A request inside one engine, and the two answers that are not one: a refusal and a reservation."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from llm_engine.api.messages import Submit
from llm_engine.api.request import FinishReason, TokenLogprobs, unpack_tokens


class Phase(enum.Enum):
    """Where a sequence is, which is to say what it owns."""

    WAITING = "waiting"  # accepted; owns nothing
    PREFILLING = "prefilling"  # owns blocks for all its tokens; some are computed
    PREFILLED = "prefilled"  # all computed; decodes next, or is being handed off with its blocks pinned
    DECODING = "decoding"  # owns blocks; draws tokens every step
    ENDED = "ended"  # finished, failed or aborted; on a prefill engine blocks stay pinned until `release_sent`


@dataclass(slots=True, eq=False)
class Sequence:
    """One attempt of one request.

    `tokens` are verified: the client's prompt, output of earlier attempts, output drawn here. The newest drawn token is
    not in the cache yet, so a decoding sequence has `num_computed == len(tokens) - 1`. Drafts are never in `tokens`.
    """

    submit: Submit
    tokens: list[int]
    arrived: float  # engine clock
    deadline: float  # engine clock
    max_len: int  # tokens when it ends at the latest
    stop_ids: frozenset[int] = frozenset()  # ids that end the sequence

    phase: Phase = Phase.WAITING
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # chain digests of the full blocks of `tokens`, as far as known
    num_computed: int = 0  # tokens whose KV is in the cache
    num_drafted: int = 0  # tokens whose row of the MTP layer is in the cache, where that layer is used
    num_cached: int = 0  # tokens found in the prefix cache (on a decode engine: by the prefill engine)
    num_published: int = 0  # leading blocks already entered in the prefix index
    num_emitted: int = 0  # leading output tokens already reported in deltas, or emitted by earlier attempts
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the tokens not yet reported, if asked for
    slot: int = -1  # row of the runner's per-sequence arrays; -1: none
    started: float | None = None  # first chunk planned, engine clock
    announced: bool = False  # a delta was reported
    finish: FinishReason | None = None

    @classmethod
    def from_submit(cls, submit: Submit, now: float) -> Sequence:
        """Raises ValueError when the packed tokens are not whole ids."""
        tokens = unpack_tokens(submit.tokens)
        return cls(
            submit=submit,
            tokens=tokens,
            arrived=now,
            deadline=now + submit.deadline_s,
            max_len=submit.num_prompt + submit.sampling.max_tokens,
            num_emitted=len(tokens) - submit.num_prompt,
        )

    @property
    def request_id(self) -> str:
        return self.submit.request_id

    @property
    def attempt(self) -> int:
        return self.submit.attempt

    @property
    def router_id(self) -> str:
        return self.submit.router_id

    @property
    def num_output(self) -> int:
        """Output tokens so far, those of earlier attempts included."""
        return len(self.tokens) - self.submit.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is still to be computed."""
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a submit was not taken. `code` is one of those of `messages.Failed`."""

    code: str  # full | too_long | draining | stale | invalid
    reason: str
    retryable: bool


@dataclass(slots=True, eq=False)
class Reservation:
    """Blocks of a decode engine set aside for a hand-off: pinned prefix hits, then leased blocks for the rest."""

    request_id: str
    attempt: int
    num_tokens: int
    deadline: float  # engine clock
    have_tokens: int  # a multiple of block_tokens: found in this engine's prefix cache
    hits: list[int]  # blocks of tokens [0, have_tokens)
    blocks: list[int]  # leased: blocks[i] receives tokens [have_tokens + i·block_tokens, …)
    digests: list[bytes]  # of the full blocks of the reserved tokens, as they were offered
    expected: Sequence | Refusal | None = None  # once the tokens are here: checked, or why they won't do
    state: str = "reserved"  # reserved | admitted | quarantined | released
