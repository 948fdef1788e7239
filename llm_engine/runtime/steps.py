"""The work of one step: draft, forward, draw; later, commit. Plans come in; what happened goes to the outbox."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from llm_engine.api.handoff import FirstToken
from llm_engine.api.request import FinishReason
from llm_engine.ops import ForwardBatch, to_device
from llm_engine.runtime.batch import States
from llm_engine.runtime.drafts import Drafts
from llm_engine.runtime.draws import INVALID, Drawn
from llm_engine.runtime.layer_feed import LayerFeed, Span
from llm_engine.runtime.outbox import Outbox
from llm_engine.runtime.outlook import Outlook, joined
from llm_engine.runtime.roster import Roster
from llm_engine.runtime.runner import Launched, Passed, Runner, StepOutput
from llm_engine.runtime.speculate import Speculator, VerifiedRows
from llm_engine.sched.decode import DecodeScheduler
from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.plan import Chunk, DecodePlan
from llm_engine.sched.prefill import PrefillScheduler
from llm_engine.sched.sequence import Phase, Sequence
from llm_engine.sched.step import Prefilled

_MOST_STOP_IDS = 16  # of a sequence, for a step to be told beforehand
_SURE = 0.75  # of the time that the last pass took: the next one takes as much
_RATE_WEIGHT = 0.2  # of the newest step in the moving average of the prefill rate


@dataclass(slots=True)
class Flight:
    """A pass from launch to commit."""

    seqs: list[Sequence]  # that decode
    chunks: list[Chunk]
    spans: list[Span]
    launched: Launched
    started: float  # engine clock
    outlook: Outlook | None = None  # None: the next pass starts from what is committed
    out: StepOutput | None = None  # once it has ended
    ended: float = 0.0


@dataclass(frozen=True, slots=True)
class Early:
    """The first pass of a step, launched before the step was planned: the only one, or that of the draft layer."""

    seqs: list[Sequence]
    started: float
    batch: ForwardBatch | None = None
    passed: Passed | None = None


class Steps:
    """Computes planned work and commits it, one pass at a time.

    `hands_off`: sequences leave after token 1 instead of decoding here. `ahead`: passes will be gone on from.
    """

    def __init__(
        self,
        cache: PagedCache,
        prefill: PrefillScheduler,
        decode: DecodeScheduler,
        runner: Runner,
        speculator: Speculator | None,
        feed: LayerFeed | None,
        roster: Roster,
        outbox: Outbox,
        *,
        hands_off: bool,
        ahead: bool,
        clock: Callable[[], float],
    ) -> None:
        self._cache = cache
        self._prefill = prefill
        self._decode = decode
        self._runner = runner
        self._speculator = speculator
        self._feed = feed
        self._roster = roster
        self._outbox = outbox
        self._hands_off = hands_off
        self._ahead = ahead
        self._early: Early | None = None
        self._clock = clock
        self._flight: Flight | None = None
        self._pass_s = 0.0  # what the last pass took
        self._departing: list[tuple[Sequence, FirstToken]] = []  # token 1 is out, the MTP layer is not done
        self._mtp_spans: list[Span] = []  # blocks that the next catch-up completes
        self.prefill_tokens_per_s = 0.0

    def finish_prefills(self) -> bool:
        """Let the MTP layer catch up with the last step's chunks. True: sequences are ready to hand off, report them.

        It runs after token 1 has been reported, so time to first token does not include it.
        """
        if not self._hands_off or self._speculator is None:
            return False
        self._speculator.propose()
        if self._feed is not None:
            self._feed.mtp_done([s for s in self._mtp_spans if s.seq.phase in (Phase.PREFILLING, Phase.PREFILLED)])
        self._mtp_spans = []
        departing = [(seq, first) for seq, first in self._departing if seq.phase is Phase.PREFILLED]
        self._departing = []
        for seq, first in departing:
            self._depart(seq, first)
        return bool(departing)

    @property
    def under_way(self) -> bool:
        """A pass was launched and not committed."""
        return self._flight is not None

    @property
    def rest_s(self) -> float:
        """Seconds for which the pass under way will go on, cautiously, going by the last one; 0 if there is none."""
        if self._flight is None or self._flight.out is not None:
            return 0.0
        return max(self._flight.started + _SURE * self._pass_s - self._clock(), 0.0)

    def launch(self, plan: DecodePlan, chunks: list[Chunk]) -> None:
        """Begin one forward pass over all planned rows. Waits for nothing.

        Until `wait` returns, the device may write the blocks of the sequences that take part, whether they live or
        not: they are held.
        """
        early, self._early = self._early, None
        if early is not None:
            return self._launch_rest(early, plan)
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
        self._flight = Flight(plan.seqs, chunks, spans, launched, started, outlook)
        return None

    def wait(self) -> None:
        """Until the pass under way has ended, if there is one. Changes nothing else."""
        if self._flight is not None and self._flight.out is None:
            self._flight.out = self._runner.finish(self._flight.launched)
            self._flight.ended = self._clock()
            self._pass_s = self._flight.ended - self._flight.started
            self._cache.settle()

    @property
    def went_on(self) -> bool:
        """`go_on` has launched a pass, whose rest waits for `launch`."""
        return self._early is not None

    def go_on(self, running: list[Sequence]) -> None:
        """Launch the first pass of the next step, if it can be told before the last one is committed.

        The one under way has ended. `running`: who decodes now; those without a part in it come last. Nobody of them
        may be ended but by the commit that follows; then comes `launch`.
        """
        flight = self._flight
        if flight is None or flight.outlook is None or flight.out is None or flight.out.drawn is None:
            return
        outlook, drawn = flight.outlook, flight.out.drawn
        here = [True] * len(flight.seqs)
        if running[: len(here)] != flight.seqs:
            here = [seq.phase is Phase.DECODING for seq in flight.seqs]
        going_S, new = outlook.going_on(drawn, here), running[sum(here) :]
        seqs = list(compress(flight.seqs, going_S.tolist()))
        if not seqs or not all(self._cache.grow(seq, seq.num_computed + 1) for seq in new):
            return
        started, everyone = self._clock(), [*seqs, *new]
        self._cache.hold(everyone)
        tables_SB = None if new else outlook.tables_SB[going_S]
        kept_SK, num_S, computed_S = drawn.kept_SK[going_S], drawn.num_kept_S[going_S], outlook.computed_S[going_S]
        if self._speculator is None:
            ids_S = joined(kept_SK[:, 0], [seq.tokens[-1] for seq in new])
            first_S = joined(computed_S + 1, [seq.num_computed for seq in new])
            batch = self._runner.batch(everyone, ids_S, np.ones_like(ids_S), first_S, tables_SB)
            self._early = Early(everyone, started, batch, self._runner.forward(batch))
            return
        there_SK = np.arange(kept_SK.shape[1]) < num_S[:, None]
        rows_SK = np.array(flight.out.starts[: len(going_S)])[going_S][:, None] + np.arange(kept_SK.shape[1])
        states = States(flight.out.hidden_RH, rows_SK[there_SK])
        self._speculator.go_on(VerifiedRows(seqs, kept_SK[there_SK], num_S, computed_S, states, tables_SB))
        self._early = Early(everyone, started)

    def commit(self) -> None:
        """Wait for the pass under way, if there is one, and commit it. Sequences that ended meanwhile are left out."""
        self.wait()
        flight, self._flight = self._flight, None
        if flight is None:
            return
        assert flight.out is not None, "it was waited for"
        out = flight.out
        if self._hands_off and self._speculator is not None:
            self._mtp_spans += flight.spans
        self._commit_decodes(flight.seqs, out, flight.ended)
        if flight.chunks:
            self._commit_chunks(flight.chunks, out, len(flight.seqs), flight.ended)
            self._measure(flight.chunks, self._clock() - flight.started)
        self._outbox.worked()

    def finish_reason(self, seq: Sequence) -> FinishReason | None:
        """Why the newest token of `seq` is its last."""
        return _up_to_end(seq.tokens[-1:], seq.max_len - len(seq.tokens) + 1, seq.stop_ids)[1]

    def _start(self, seq: Sequence, now: float) -> None:
        """The first chunk of a sequence is in this step."""
        self._runner.open(seq)
        if seq.started is None:
            seq.started = now
            self._outbox.stats.cached_tokens += seq.num_cached
        if self._feed is not None:
            self._feed.start(seq)

    def _launch_rest(self, early: Early, plan: DecodePlan) -> None:
        """What follows on the pass that `go_on` has launched."""
        assert plan.seqs == early.seqs, "the pass was launched for others"
        if early.batch is not None and early.passed is not None:
            launched = self._runner.draw(early.passed, early.batch, plan.seqs, [], Drafts())
        else:
            assert self._speculator is not None, "it has launched the pass"
            drafts = self._speculator.propose(plan.seqs, plan.num_drafts)
            launched = self._runner.launch(plan.seqs, [], drafts)
        self._flight = Flight(plan.seqs, [], [], launched, early.started, self._look_ahead(plan))

    def _look_ahead(self, plan: DecodePlan) -> Outlook | None:
        """Prepare the next step, as far as it is known, while the device computes this one. None: it can't be."""
        if not self._ahead or max(len(seq.stop_ids) for seq in plan.seqs) > _MOST_STOP_IDS:
            return None
        most = 2 + max(plan.num_drafts)
        tokens = [min(seq.num_computed + most, seq.max_len) for seq in plan.seqs]
        if not all(map(self._cache.grow, plan.seqs, tokens)):
            return None
        return Outlook.of(plan.seqs, self._runner.tables(plan.seqs, max(tokens)))

    def _commit_decodes(self, seqs: list[Sequence], out: StepOutput, now: float) -> None:
        """Append to each sequence the tokens that hold. Nothing is launched before the last one is served."""
        counted: list[tuple[int, int]] = []  # drafts and new tokens of each sequence
        observe = None if self._speculator is None else self._speculator.observe
        drawn = out.drawn
        if drawn is None:
            return
        num_drafts = drawn.num_drafts_S.tolist()
        for seq, row, new, drafts in zip(seqs, out.starts, drawn.kept, num_drafts, strict=False):
            if seq.phase is not Phase.DECODING:
                continue
            room, finish = seq.max_len - len(seq.tokens), None
            if len(new) >= room or not seq.stop_ids.isdisjoint(new):
                new, finish = _up_to_end(new, room, seq.stop_ids)
            if new[-1] == INVALID:
                self._fail_invalid(seq)
                continue
            first, count = seq.num_computed, len(new)
            seq.tokens += new
            counted.append((drafts, count))
            if drawn.logprobs:
                self._report_logprobs(seq, drawn, range(row, row + count))
            self._decode.commit(seq, count)
            if finish is not None:
                self._roster.finish(seq, finish, now)
                continue
            if observe is not None and not self.went_on:
                observe(seq, first, out.hidden_RH, row, count)
            self._outbox.tokens(seq, now)
        self._count_decodes(counted)

    def _commit_chunks(self, chunks: Seq[Chunk], out: StepOutput, num_decodes: int, now: float) -> None:
        self._prefill.commit(chunks)
        drawn_rows = iter(out.drawn_starts[num_decodes:])
        for i, chunk in enumerate(chunks):
            first = out.starts[num_decodes + i]
            hidden_MH = out.hidden_RH[first : first + chunk.length]
            if chunk.is_last:
                self._commit_first_token(chunk, out, next(drawn_rows), hidden_MH, now)
            elif self._speculator is not None:
                self._speculator.observe(chunk.seq, chunk.start, hidden_MH)

    def _commit_first_token(self, chunk: Chunk, out: StepOutput, row: int, hidden_MH: Tensor, now: float) -> None:
        """A prompt is computed: draw its token, then hand off or decode."""
        assert out.drawn is not None, "a last chunk draws"
        seq, token = chunk.seq, int(out.drawn.tokens_R[row])
        if token == INVALID:
            return self._fail_invalid(seq)
        seq.tokens.append(token)
        self._report_logprobs(seq, out.drawn, range(row, row + 1))
        finish = self.finish_reason(seq)
        if finish is not None:
            if self._speculator is not None:
                self._speculator.observe(seq, chunk.start, hidden_MH[:-1])
                self._speculator.settle(seq)
            return self._roster.finish(seq, finish, now)
        self._outbox.tokens(seq, now)
        if not self._hands_off:
            self._decode.add(seq)
            if self._speculator is not None:
                self._speculator.observe(seq, chunk.start, hidden_MH)
            return None
        hidden = b"" if self._speculator is None else state_bytes(hidden_MH[-1])
        first = FirstToken(
            token=token,
            logprobs=out.drawn.logprobs.get(row),
            hidden=hidden,
            cached_tokens=min(seq.num_cached, seq.submit.num_prompt),
        )
        if self._speculator is None:
            return self._depart(seq, first)
        self._speculator.observe(seq, chunk.start, hidden_MH[:-1])
        self._departing.append((seq, first))
        return None

    def _depart(self, seq: Sequence, first: FirstToken) -> None:
        self._roster.retire(seq)
        self._outbox.prefilled(Prefilled(seq, first, self._clock()))

    def _report_logprobs(self, seq: Sequence, drawn: Drawn, rows: range) -> None:
        """Of the tokens drawn in these rows, if they are asked for."""
        known = drawn.logprobs
        seq.logprobs += [known[row] for row in rows if row in known]

    def _fail_invalid(self, seq: Sequence) -> None:
        """The model's output is not finite: what it has cached is not to be trusted, nor found by others."""
        self._cache.distrust(seq)
        self._roster.fail(seq, "internal", "the model's output is not finite", retryable=True)

    def _count_decodes(self, counted: list[tuple[int, int]]) -> None:
        """Drafts and new tokens of each sequence that was served."""
        stats = self._outbox.stats
        for (num_drafts, num_new), seqs in Counter(counted).items():
            stats.decode_rows += (1 + num_drafts) * seqs
            stats.decode_tokens += num_new * seqs
            for i in range(num_drafts):
                if i == len(stats.drafts):
                    stats.drafts.append(0)
                    stats.accepted.append(0)
                stats.drafts[i] += seqs
                stats.accepted[i] += seqs * (i < num_new - 1)

    def _measure(self, chunks: Seq[Chunk], seconds: float) -> None:
        stats = self._outbox.stats
        num_tokens = sum(chunk.length for chunk in chunks)
        stats.prefill_tokens += num_tokens
        stats.prefill_s += seconds
        rate = num_tokens / max(seconds, 1e-9)
        known = self.prefill_tokens_per_s
        self.prefill_tokens_per_s = known + _RATE_WEIGHT * (rate - known) if known else rate


def _up_to_end(new: list[int], room: int, stop_ids: frozenset[int]) -> tuple[list[int], FinishReason | None]:
    """Tokens up to the one that ends the sequence, and why it does. `room`: how many it may have at most."""
    for i, token in enumerate(new, 1):
        if token == INVALID:
            break
        if token in stop_ids:
            return new[:i], FinishReason.STOP
        if i >= room:
            return new[:i], FinishReason.LENGTH
    return new, None


def state_bytes(hidden_H: Tensor) -> bytes:
    """A hidden state as it goes over the wire: the bytes of its elements in the compute dtype."""
    return hidden_H.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def state_from_bytes(data: bytes, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Inverse of `state_bytes`, as one row [1, H]. Raises ValueError when the size does not fit."""
    if len(data) != hidden_size * dtype.itemsize:
        raise ValueError(f"hidden state of {len(data)} bytes: expected {hidden_size * dtype.itemsize}")
    return to_device(torch.frombuffer(bytearray(data), dtype=dtype).unsqueeze(0), device)
