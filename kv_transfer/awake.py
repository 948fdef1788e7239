"""Keeps both ends awake around the end of a hand-off: an empty message every millisecond, for a while.

A processor that has slept for some milliseconds takes several times as long for everything that is left to do.
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


class Awake:
    """Of one hand-off. On the loop."""

    def __init__(self, say_nothing: Callable[[], bool]) -> None:
        """`say_nothing`: False when there is no need any more."""
        self._say_nothing = say_nothing
        self._until = 0.0
        self._running = False

    def stay(self) -> None:
        """Stay awake for LONGEST_S from now, if there are cores to spare."""
        if can_spare():
            self._until = time.monotonic() + LONGEST_S
            if not self._running:
                self._go_on()

    def _go_on(self) -> None:
        self._running = time.monotonic() <= self._until and self._say_nothing()
        if self._running:
            asyncio.get_running_loop().call_later(EVERY_S, self._go_on)
