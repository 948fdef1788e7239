"""How sequences leave a prefill engine: with token 1, or once the MTP layer has caught up with their prompt."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from llm_engine.api.handoff import FirstToken
from llm_engine.runtime.layer_feed import LayerFeed, Span
from llm_engine.runtime.outbox import Outbox
from llm_engine.runtime.roster import Roster
from llm_engine.runtime.speculate import Speculator
from llm_engine.sched.sequence import Phase, Sequence
from llm_engine.sched.step import Prefilled


class Departures:
    """Sequences whose prompt is computed, and the blocks that the MTP layer has yet to complete."""

    def __init__(
        self,
        speculator: Speculator | None,
        feed: LayerFeed | None,
        roster: Roster,
        outbox: Outbox,
        clock: Callable[[], float],
    ) -> None:
        self._speculator = speculator
        self._feed = feed
        self._roster = roster
        self._outbox = outbox
        self._clock = clock
        self._spans: list[Span] = []  # that the next catch-up completes
        self._waiting: list[tuple[Sequence, FirstToken]] = []  # for it

    def computed(self, spans: Seq[Span]) -> None:
        """A pass of the main model has completed these blocks."""
        if self._speculator is not None:
            self._spans += spans

    def add(self, seq: Sequence, first: FirstToken) -> None:
        """Token 1 of a sequence is drawn. Where there is an MTP layer, the rows of its prompt wait for it."""
        if self._speculator is None:
            self._depart(seq, first)
        else:
            self._waiting.append((seq, first))

    def catch_up(self) -> bool:
        """Let the MTP layer catch up with the last step's chunks. True: sequences are ready to hand off, report them.

        It runs after token 1 has been reported, so time to first token does not include it.
        """
        if self._speculator is None:
            return False
        self._speculator.propose()
        if self._feed is not None:
            self._feed.mtp_done([s for s in self._spans if s.seq.phase in (Phase.PREFILLING, Phase.PREFILLED)])
        self._spans = []
        ready = [(seq, first) for seq, first in self._waiting if seq.phase is Phase.PREFILLED]
        self._waiting = []
        for seq, first in ready:
            self._depart(seq, first)
        return bool(ready)

    def _depart(self, seq: Sequence, first: FirstToken) -> None:
        self._roster.retire(seq)
        self._outbox.prefilled(Prefilled(seq, first, self._clock()))
