"""A granted hand-off on the receiver: what of it is here, and which messages speak of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Generic

import msgspec

from kv_transfer.custody import Held
from kv_transfer.offers import Waiting
from kv_transfer.pairs import Pair
from kv_transfer.reserver import R
from kv_transfer.verifier import AnyLanding
from llm_engine.api.handoff import Commit, Tokens
from llm_engine.api.messages import Submit
from llm_engine.api.request import TOKEN_BYTES


@dataclass(slots=True, eq=False)
class Active(Generic[R]):
    """Tokens come once. Commit comes in one part or in two: see there."""

    waiting: Waiting
    held: Held[R]
    landing: AnyLanding
    submit: Submit | None = None  # whole, once its tokens are here
    written: bool = False  # the part with the manifest is here
    verified: bool = False
    last: Commit | None = None  # the part with the first token
    last_at: float = 0.0  # when it came

    def take_tokens(self, message: Tokens, pair: Pair) -> Submit | None:
        """The submit whole; None if the message is not for this lease, comes again, or brings too few or too many."""
        offer = self.waiting.offer
        if self.submit is not None or not self._is_named(message, pair):
            return None
        if len(message.tokens) != offer.num_tokens * TOKEN_BYTES:
            return None
        self.submit = msgspec.structs.replace(offer.submit, tokens=message.tokens)
        return self.submit

    def take_part(self, commit: Commit, pair: Pair) -> bool:
        """Whether a commit is for exactly this lease, and brings parts that were not here yet; they are now."""
        again = (commit.manifest is not None and self.written) or (commit.first is not None and self.last is not None)
        if again or (commit.manifest is None and commit.first is None) or not self._is_named(commit, pair):
            return False
        if commit.manifest is not None:
            self.written = True
            self.waiting.marks.reach("manifest")
        if commit.first is not None:
            self.last, self.last_at = commit, time.monotonic()
            self.waiting.marks.reach("first")
        self.held.sealed = self.written and self.last is not None
        return True

    def _is_named(self, message: Tokens | Commit, pair: Pair) -> bool:
        lease = self.held.lease
        named = (message.attempt, message.lease_id, message.epoch)
        return named == (lease.attempt, *lease.key) and self.held.pair is pair
