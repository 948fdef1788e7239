"""How a worker is: the load it reports, and whether its two loops make progress."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from llm_engine.api.control import LinkStatus
from llm_engine.api.messages import Load
from llm_engine.serving.step_loop import StepLoop

_STEP_WEIGHT = 0.1  # of the newest step in the moving average


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerReport:
    """Hand-offs of one worker: open ones (an exact count), peers not to be used, failures so far by cause, links."""

    pending: int = 0
    bad: list[str] = field(default_factory=list)
    failed: Mapping[str, int] = field(default_factory=dict)
    links: Sequence[LinkStatus] = ()


class Vitals:
    """Written by the asyncio thread; `load` and `trouble` may be read from any."""

    def __init__(self, steps: StepLoop[Any, Any], *, stall_s: float) -> None:
        self._steps = steps
        self._stall_s = stall_s
        self._step_s = 0.0
        self._beat_at: float | None = None  # None: the worker does not serve (yet)
        self.load = Load(seq=0)  # the newest report; replaced, never changed

    def stepped(self, duration_s: float) -> None:
        """A step took this long."""
        self._step_s += _STEP_WEIGHT * (duration_s - self._step_s)

    def beat(self, *, draining: bool, peers: PeerReport, num_live: int) -> Load:
        """Report anew; called every heartbeat."""
        self._beat_at = time.monotonic()
        self.load = msgspec.structs.replace(
            self._steps.load,
            seq=self.load.seq + 1,
            num_live=num_live,
            pending_handoffs=peers.pending,
            step_s=self._step_s,
            step_age_s=self._steps.age_s,
            draining=draining,
            healthy=self.trouble() is None,
            bad_peers=peers.bad,
        )
        return self.load

    def trouble(self) -> str | None:
        """What is wrong, in one line; None while everything moves."""
        if self._beat_at is None:
            return None
        if not self._steps.alive:
            return "the step loop has ended"
        for loop, age in (("step", self._steps.age_s), ("event", time.monotonic() - self._beat_at)):
            if age > self._stall_s:
                return f"the {loop} loop made no progress for {age:.1f} s"
        return None
