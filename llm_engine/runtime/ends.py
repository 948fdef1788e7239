"""Where a sequence ends. `Outlook.going_on` tells the same of many at once, before the tokens are committed."""

from __future__ import annotations

from llm_engine.api.request import FinishReason
from llm_engine.runtime.draws import INVALID
from llm_engine.sched.sequence import Sequence


def up_to_end(new: list[int], room: int, stop_ids: frozenset[int]) -> tuple[list[int], FinishReason | None]:
    """Tokens up to the one that ends the sequence, and why it does. `room`: how many it may have at most.

    Where `INVALID` comes first, none ends it, and it is left in.
    """
    for i, token in enumerate(new, 1):
        if token == INVALID:
            break
        if token in stop_ids:
            return new[:i], FinishReason.STOP
        if i >= room:
            return new[:i], FinishReason.LENGTH
    return new, None


def finish_reason(seq: Sequence) -> FinishReason | None:
    """Why the newest token of `seq` is its last; None: it is not."""
    return up_to_end(seq.tokens[-1:], seq.max_len - len(seq.tokens) + 1, seq.stop_ids)[1]
