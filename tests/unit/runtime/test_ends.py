"""Which token is the last of a sequence, of the tokens that one step gives."""

from __future__ import annotations

import pytest

from llm_engine.api.request import FinishReason
from llm_engine.runtime.draws import INVALID
from llm_engine.runtime.ends import up_to_end

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.mark.parametrize(
    ("new", "room", "kept", "reason"),
    [
        ([3, 4], 3, [3, 4], None),
        ([3, 4], 2, [3, 4], LENGTH),
        ([3, 4], 1, [3], LENGTH),
        ([3, 7, 4], 9, [3, 7], STOP),
        ([3, 7], 2, [3, 7], STOP),
        ([3, 4, 7], 2, [3, 4], LENGTH),
        ([3, INVALID], 9, [3, INVALID], None),
        ([INVALID], 1, [INVALID], None),
        ([3, INVALID], 1, [3], LENGTH),
    ],
)
def test_the_first_end_counts(new: list[int], room: int, kept: list[int], reason: FinishReason | None) -> None:
    """What was not drawn properly ends nothing, even where a request asks to stop at an id that no token has."""
    assert up_to_end(new, room, frozenset([7, INVALID])) == (kept, reason)
