"""What the results of a pass do to its sequences: tokens are appended, reported and may be the last; progress moves."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from torch import Tensor

from llm_engine.api.handoff import FirstToken
from llm_engine.runtime.departures import Departures
from llm_engine.runtime.draws import INVALID, Drawn
from llm_engine.runtime.ends import finish_reason, up_to_end
from llm_engine.runtime.flight import Landed
from llm_engine.runtime.outbox import Outbox
from llm_engine.runtime.roster import Roster
from llm_engine.runtime.runner import StepOutput
from llm_engine.runtime.speculate import Speculator, state_bytes
from llm_engine.sched.decode import DecodeScheduler
from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.plan import Chunk
from llm_engine.sched.prefill import PrefillScheduler
from llm_engine.sched.sequence import Phase, Sequence

_RATE_WEIGHT = 0.2  # of the newest step in the moving average of the prefill rate


class Commits:
    """Commits passes that have ended, in the order in which they were launched.

    `departures`: sequences leave after token 1 (None: they go on to decode here).
    """

    def __init__(
        self,
        cache: PagedCache,
        prefill: PrefillScheduler,
        decode: DecodeScheduler,
        speculator: Speculator | None,
        departures: Departures | None,
        roster: Roster,
        outbox: Outbox,
        clock: Callable[[], float],
    ) -> None:
        self._cache = cache
        self._prefill = prefill
        self._decode = decode
        self._speculator = speculator
        self._departures = departures
        self._roster = roster
        self._outbox = outbox
        self._clock = clock
        self.prefill_tokens_per_s = 0.0  # moving average, wall time
        self._unrated = (0, 0.0)  # tokens and seconds of the passes since the last one that was waited for

    def commit(self, landed: Landed, *, went_on: bool) -> None:
        """Commit a pass. Sequences that ended meanwhile are left out.

        `went_on`: the draft layer has caught up with the rows of this pass already, in one that goes on from it.
        """
        flight, out = landed.flight, landed.out
        if self._departures is not None:
            self._departures.computed(flight.spans)
        if out.drawn is not None:
            self._commit_decodes(flight.seqs, out, out.drawn, landed.ended, observe=not went_on)
        if flight.chunks:
            self._commit_chunks(flight.chunks, out, len(flight.seqs), landed.ended)
            self._measure(flight.chunks, self._clock() - flight.started, waited=out.drawn is not None)
        self._outbox.worked()

    def _commit_decodes(self, seqs: Seq[Sequence], out: StepOutput, drawn: Drawn, now: float, *, observe: bool) -> None:
        """Append to each sequence the tokens that hold. Nothing is launched before the last one is served."""
        counted: list[tuple[int, int]] = []  # drafts and new tokens of each sequence
        speculator = self._speculator if observe else None
        num_drafts = drawn.num_drafts_S.tolist()
        for seq, row, new, drafts in zip(seqs, out.starts, drawn.kept, num_drafts, strict=False):
            if seq.phase is not Phase.DECODING:
                continue
            room, finish = seq.max_len - len(seq.tokens), None
            if len(new) >= room or not seq.stop_ids.isdisjoint(new):
                new, finish = up_to_end(new, room, seq.stop_ids)
            if new[-1] == INVALID:
                self._fail_invalid(seq)
                continue
            first, count = seq.num_computed, len(new)
            seq.tokens += new
            counted.append((drafts, count))
            if drawn.logprobs:
                _keep_logprobs(seq, drawn, range(row, row + count))
            self._decode.commit(seq, count)
            if finish is not None:
                self._roster.finish(seq, finish, now)
                continue
            if speculator is not None:
                speculator.observe(seq, first, out.hidden_RH, row, count)
            self._outbox.tokens(seq, now)
        self._outbox.stats.count_decodes(counted)

    def _commit_chunks(self, chunks: Seq[Chunk], out: StepOutput, num_decodes: int, now: float) -> None:
        self._prefill.commit(chunks)
        drawn_rows = iter(out.drawn_starts[num_decodes:])
        for chunk, first in zip(chunks, out.starts[num_decodes:], strict=False):  # one more start: the end
            hidden_MH = out.hidden_RH[first : first + chunk.length]
            if chunk.is_last:
                assert out.drawn is not None, "a last chunk draws"
                self._commit_first_token(chunk, out.drawn, next(drawn_rows), hidden_MH, now)
            elif self._speculator is not None:
                self._speculator.observe(chunk.seq, chunk.start, hidden_MH)

    def _commit_first_token(self, chunk: Chunk, drawn: Drawn, row: int, hidden_MH: Tensor, now: float) -> None:
        """A prompt is computed, and its token drawn: hand off, decode, or end."""
        seq, token = chunk.seq, int(drawn.tokens_R[row])
        if token == INVALID:
            self._fail_invalid(seq)
            return
        seq.tokens.append(token)
        _keep_logprobs(seq, drawn, range(row, row + 1))
        finish = finish_reason(seq)
        goes_on_here = finish is None and self._departures is None
        if self._speculator is not None:  # the row of the last position is computed where the sequence decodes
            self._speculator.observe(seq, chunk.start, hidden_MH if goes_on_here else hidden_MH[:-1])
        if finish is not None:
            if self._speculator is not None:
                self._speculator.settle(seq)
            self._roster.finish(seq, finish, now)
            return
        self._outbox.tokens(seq, now)
        if self._departures is None:
            self._decode.add(seq)
            return
        first = FirstToken(
            token=token,
            logprobs=drawn.logprobs.get(row),
            hidden=b"" if self._speculator is None else state_bytes(hidden_MH[-1]),
            cached_tokens=min(seq.num_cached, seq.submit.num_prompt),
        )
        self._departures.add(seq, first)

    def _fail_invalid(self, seq: Sequence) -> None:
        """The model's output is not finite: what it has cached is not to be trusted, nor found by others."""
        self._cache.distrust(seq)
        self._roster.fail(seq, "internal", "the model's output is not finite", retryable=True)

    def _measure(self, chunks: Seq[Chunk], seconds: float, *, waited: bool) -> None:
        """A step with chunks has taken so long. One that draws nothing is not waited for: the next one waits for it."""
        num_tokens = sum(chunk.length for chunk in chunks)
        self._outbox.stats.prefill_tokens += num_tokens
        self._outbox.stats.prefill_s += seconds
        self._unrated = self._unrated[0] + num_tokens, self._unrated[1] + seconds
        if not waited:
            return
        rate, self._unrated = self._unrated[0] / max(self._unrated[1], 1e-9), (0, 0.0)
        known = self.prefill_tokens_per_s
        self.prefill_tokens_per_s = known + _RATE_WEIGHT * (rate - known) if known else rate


def _keep_logprobs(seq: Sequence, drawn: Drawn, rows: range) -> None:
    """Those of the tokens drawn in these rows, if they were asked for: the next delta takes them."""
    seq.logprobs += [drawn.logprobs[row] for row in rows if row in drawn.logprobs]
