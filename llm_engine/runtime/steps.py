"""Launches the passes of steps and waits for them: draft, forward, draw. Their results are for `Commits`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress

import numpy as np
import numpy.typing as npt

from llm_engine.runtime.batch import Ints, States, Tables
from llm_engine.runtime.drafts import Drafts
from llm_engine.runtime.draws import Drawn
from llm_engine.runtime.flight import Early, Flight, Landed
from llm_engine.runtime.layer_feed import LayerFeed
from llm_engine.runtime.outbox import Outbox
from llm_engine.runtime.outlook import Outlook
from llm_engine.runtime.runner import Runner, StepOutput
from llm_engine.runtime.speculate import Speculator, VerifiedRows
from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.plan import Chunk, DecodePlan
from llm_engine.sched.sequence import Phase, Sequence

_MOST_STOP_IDS = 16  # of a sequence, for a step to be told beforehand
_SURE = 0.75  # of the time that the last pass took: the next one takes as much


class Steps:
    """One pass at a time, from `launch` by `wait` to `take`. `ahead`: the one after it may be begun before `take`."""

    def __init__(
        self,
        cache: PagedCache,
        runner: Runner,
        speculator: Speculator | None,
        feed: LayerFeed | None,
        outbox: Outbox,
        *,
        ahead: bool,
        clock: Callable[[], float],
    ) -> None:
        self._cache = cache
        self._runner = runner
        self._speculator = speculator
        self._feed = feed
        self._outbox = outbox
        self._ahead = ahead
        self._clock = clock
        self._flight: Flight | None = None
        self._landed: Landed | None = None  # there is at most one of the two
        self._early: Early | None = None
        self._pass_s = 0.0  # what the last pass took

    @property
    def under_way(self) -> bool:
        """A pass was launched and not taken."""
        return self._flight is not None or self._landed is not None

    @property
    def rest_s(self) -> float:
        """Seconds for which the pass under way will go on, cautiously, going by the last one; 0 if there is none."""
        if self._flight is None:
            return 0.0
        return max(self._flight.started + _SURE * self._pass_s - self._clock(), 0.0)

    def launch(self, plan: DecodePlan, chunks: list[Chunk]) -> None:
        """Begin one forward pass over all planned rows. Waits for nothing.

        Until `wait` returns, the device may write the blocks of the sequences that take part, whether they live or
        not: they are held.
        """
        assert not self.under_way, "one pass at a time"
        early, self._early = self._early, None
        self._flight = self._launch(plan, chunks) if early is None else self._launch_rest(early, plan)

    def wait(self) -> None:
        """Until the pass under way has ended, if there is one. Changes nothing else.

        However long that takes: where a device hangs the step loop makes no progress, which the worker's health tells.
        """
        flight = self._flight
        if flight is None:
            return
        out, ended = self._runner.finish(flight.launched), self._clock()
        self._pass_s = ended - flight.started
        self._flight, self._landed = None, Landed(flight, out, ended)
        self._cache.settle()

    def take(self) -> Landed | None:
        """Wait for the pass under way, if there is one, and give it away."""
        self.wait()
        landed, self._landed = self._landed, None
        return landed

    @property
    def went_on(self) -> bool:
        """`go_on` has launched a pass, whose rest waits for `launch`."""
        return self._early is not None

    def go_on(self, running: list[Sequence]) -> None:
        """Launch the first pass of the next step, if it can be told before the last one is committed.

        The one under way has ended. `running`: who decodes now; those without a part in it come last. Nobody of them
        may be ended but by the commit that follows; then comes `launch`.
        """
        landed = self._landed
        if landed is None or landed.flight.outlook is None or landed.out.drawn is None:
            return
        took_part, outlook, drawn = landed.flight.seqs, landed.flight.outlook, landed.out.drawn
        here = [True] * len(took_part)
        if running[: len(here)] != took_part:
            here = [seq.phase is Phase.DECODING for seq in took_part]
        going_S, new = outlook.going_on(drawn, here), running[sum(here) :]
        seqs = list(compress(took_part, going_S.tolist()))
        if not seqs or not all(self._cache.grow(seq, seq.num_computed + 1) for seq in new):
            return
        started, everyone = self._clock(), [*seqs, *new]
        self._cache.hold(everyone)
        tables_SB = None if new else outlook.tables_SB[going_S]
        if self._speculator is not None:
            self._speculator.go_on(_verified(seqs, going_S, outlook, drawn, landed.out, tables_SB))
            self._early = Early(everyone, started)
            return
        ids_S = _with(drawn.kept_SK[going_S, 0], [seq.tokens[-1] for seq in new])
        first_S = _with(outlook.computed_S[going_S] + 1, [seq.num_computed for seq in new])
        batch = self._runner.batch(everyone, ids_S, np.ones_like(ids_S), first_S, tables_SB)
        self._early = Early(everyone, started, (batch, self._runner.forward(batch)))

    def _launch(self, plan: DecodePlan, chunks: list[Chunk]) -> Flight:
        started = self._clock()
        for chunk in chunks:
            if chunk.seq.slot < 0:
                self._start(chunk.seq, started)
        self._cache.hold([*plan.seqs, *(chunk.seq for chunk in chunks)])
        drafts = Drafts() if self._speculator is None else self._speculator.propose(plan.seqs, plan.num_drafts)
        spans = [] if self._feed is None else self._feed.spans(chunks)
        on_layer = self._feed.on_layer(spans) if self._feed is not None and spans else None
        launched = self._runner.launch(plan.seqs, chunks, drafts, on_layer)
        outlook = None if chunks else self._look_ahead(plan)
        return Flight(plan.seqs, chunks, spans, launched, started, outlook)

    def _launch_rest(self, early: Early, plan: DecodePlan) -> Flight:
        """What follows on the pass that `go_on` has launched."""
        assert plan.seqs == early.seqs, "the pass was launched for others"
        if early.main is not None:
            batch, passed = early.main
            launched = self._runner.draw(passed, batch, plan.seqs, [], Drafts())
        else:
            assert self._speculator is not None, "it has launched the pass"
            drafts = self._speculator.propose(plan.seqs, plan.num_drafts)
            launched = self._runner.launch(plan.seqs, [], drafts)
        return Flight(plan.seqs, [], [], launched, early.started, self._look_ahead(plan))

    def _start(self, seq: Sequence, now: float) -> None:
        """The first chunk of a sequence is in this step."""
        self._runner.open(seq)
        if seq.started is None:
            seq.started = now
            self._outbox.stats.cached_tokens += seq.num_cached
        if self._feed is not None:
            self._feed.start(seq)

    def _look_ahead(self, plan: DecodePlan) -> Outlook | None:
        """Prepare the next step, as far as it is known, while the device computes this one. None: it can't be."""
        if not self._ahead or max(len(seq.stop_ids) for seq in plan.seqs) > _MOST_STOP_IDS:
            return None
        most = 2 + max(plan.num_drafts)
        tokens = [min(seq.num_computed + most, seq.max_len) for seq in plan.seqs]
        if not all(map(self._cache.grow, plan.seqs, tokens)):
            return None
        return Outlook.of(plan.seqs, self._runner.tables(plan.seqs, max(tokens)))


def _with(known_S: Ints, further: list[int]) -> Ints:
    """Values of sequences that go on, then those of sequences that are new."""
    return np.append(known_S, np.array(further, dtype=np.int64)) if further else known_S


def _verified(
    seqs: list[Sequence],
    going_S: npt.NDArray[np.bool_],
    outlook: Outlook,
    drawn: Drawn,
    out: StepOutput,
    tables_SB: Tables | None,
) -> VerifiedRows:
    """What the draft layer has to catch up with: the tokens that hold of the sequences that go on, which are `seqs`."""
    kept_SK, num_S = drawn.kept_SK[going_S], drawn.num_kept_S[going_S]
    within_K = np.arange(kept_SK.shape[1])
    there_SK = within_K < num_S[:, None]
    rows_SK = np.array(out.starts[: len(going_S)])[going_S][:, None] + within_K
    states = States(out.hidden_RH, rows_SK[there_SK])
    return VerifiedRows(seqs, kept_SK[there_SK], num_S, outlook.computed_S[going_S], states, tables_SB)
