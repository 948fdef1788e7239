"""Keeps both ends awake between the two parts of Commit: an empty message every millisecond, for a while.

A processor that has slept for some milliseconds takes longer to wake up than all that is left to do takes.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

EVERY_S = 0.001
LONGEST_S = 0.05
_MANY = 8


def can_spare(num_cores: int | None = None) -> bool:
    """Whether staying awake takes no time from those who compute. Default: the cores that this process may use."""
    return (len(os.sched_getaffinity(0)) if num_cores is None else num_cores) >= _MANY


def keep_awake(say_nothing: Callable[[], bool]) -> None:
    """On the loop: call `say_nothing` every EVERY_S until it returns False, or LONGEST_S have passed."""
    loop = asyncio.get_running_loop()
    until = time.monotonic() + LONGEST_S

    def again() -> None:
        if time.monotonic() <= until and say_nothing():
            loop.call_later(EVERY_S, again)

    loop.call_later(EVERY_S, again)
