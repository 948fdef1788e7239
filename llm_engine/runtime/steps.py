"""The work of one step: draft, forward, draw, commit. What is planned comes in; what happened goes to the outbox."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from llm_engine.api.handoff import FirstToken
from llm_engine.api.request import FinishReason
from llm_engine.ops import to_device
from llm_engine.runtime.drafts import Drafts
from llm_engine.runtime.layer_feed import LayerFeed, Span
from llm_engine.runtime.outbox import Outbox
from llm_engine.runtime.roster import Roster
from llm_engine.runtime.runner import Runner, StepOutput
from llm_engine.runtime.sampler import INVALID
from llm_engine.runtime.speculate import Speculator
from llm_engine.sched.decode import DecodeScheduler
from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.plan import Chunk, DecodePlan
from llm_engine.sched.prefill import PrefillScheduler
from llm_engine.sched.sequence import Phase, Sequence
from llm_engine.sched.step import Prefilled

_RATE_WEIGHT = 0.2  # of the newest step in the moving average of the prefill rate


class Steps:
    """Computes planned work and commits it. `hands_off`: sequences leave after token 1 instead of decoding here."""

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
        max_len: int,
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
        self._max_len = max_len
        self._clock = clock
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

    def compute(self, plan: DecodePlan, chunks: list[Chunk]) -> None:
        """One forward pass over all planned rows."""
        started = self._clock()
        for chunk in chunks:
            if chunk.seq.slot < 0:
                self._start(chunk.seq, started)
        drafts = Drafts() if self._speculator is None else self._speculator.propose(plan.seqs, plan.num_drafts)
        spans = [] if self._feed is None else self._feed.spans(chunks)
        on_layer = self._feed.on_layer(spans) if self._feed is not None and spans else None
        out = self._runner.run(plan.seqs, chunks, drafts, on_layer)
        now = self._clock()
        if self._hands_off and self._speculator is not None:
            self._mtp_spans += spans
        for i, seq in enumerate(plan.seqs):
            self._commit_decode(seq, out, out.starts[i], out.drawn.drafts[i], now)
        if chunks:
            self._commit_chunks(chunks, out, len(plan.seqs), now)
            self._measure(chunks, self._clock() - started)
        self._outbox.worked()

    def finish_reason(self, seq: Sequence) -> FinishReason | None:
        """Why the newest token of `seq` is its last."""
        if seq.tokens[-1] in seq.stop_ids:
            return FinishReason.STOP
        if seq.num_output >= seq.submit.sampling.max_tokens or len(seq.tokens) >= self._max_len:
            return FinishReason.LENGTH
        return None

    def _start(self, seq: Sequence, now: float) -> None:
        """The first chunk of a sequence is in this step."""
        self._runner.open(seq)
        if seq.started is None:
            seq.started = now
            self._outbox.stats.cached_tokens += seq.num_cached
        if self._feed is not None:
            self._feed.start(seq)

    def _commit_decode(self, seq: Sequence, out: StepOutput, row: int, drafts: list[int], now: float) -> None:
        """Keep drawn tokens up to the first that is not the next row's draft, or that ends the sequence."""
        first_position, num_new = seq.num_computed, 0
        finish = None
        for i, token in enumerate(out.drawn.tokens[row : row + 1 + len(drafts)]):
            if token == INVALID:
                return self._fail_invalid(seq)
            self._append(seq, token, out, row + i)
            num_new += 1
            finish = self.finish_reason(seq)
            if finish is not None or i == len(drafts) or token != drafts[i]:
                break
        self._decode.commit(seq, num_new)
        self._count_decode(len(drafts), num_new)
        if finish is not None:
            return self._roster.finish(seq, finish, now)
        if self._speculator is not None:
            self._speculator.observe(seq, first_position, out.hidden_RH[row : row + num_new])
        self._outbox.tokens(seq, now)
        return None

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
        seq, token = chunk.seq, out.drawn.tokens[row]
        if token == INVALID:
            return self._fail_invalid(seq)
        self._append(seq, token, out, row)
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

    def _append(self, seq: Sequence, token: int, out: StepOutput, row: int) -> None:
        seq.tokens.append(token)
        logprobs = out.drawn.logprobs.get(row)
        if logprobs is not None:
            seq.logprobs.append(logprobs)

    def _fail_invalid(self, seq: Sequence) -> None:
        """The model's output is not finite: what it has cached is not to be trusted, nor found by others."""
        self._cache.distrust(seq)
        self._roster.fail(seq, "internal", "the model's output is not finite", retryable=True)

    def _count_decode(self, num_drafts: int, num_new: int) -> None:
        stats = self._outbox.stats
        stats.decode_rows += 1 + num_drafts
        stats.decode_tokens += num_new
        for i in range(num_drafts):
            if i == len(stats.drafts):
                stats.drafts.append(0)
                stats.accepted.append(0)
            stats.drafts[i] += 1
            stats.accepted[i] += i < num_new - 1

    def _measure(self, chunks: Seq[Chunk], seconds: float) -> None:
        stats = self._outbox.stats
        num_tokens = sum(chunk.length for chunk in chunks)
        stats.prefill_tokens += num_tokens
        stats.prefill_s += seconds
        rate = num_tokens / max(seconds, 1e-9)
        known = self.prefill_tokens_per_s
        self.prefill_tokens_per_s = known + _RATE_WEIGHT * (rate - known) if known else rate


def state_bytes(hidden_H: Tensor) -> bytes:
    """A hidden state as it goes over the wire: the bytes of its elements in the compute dtype."""
    return hidden_H.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def state_from_bytes(data: bytes, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Inverse of `state_bytes`, as one row [1, H]. Raises ValueError when the size does not fit."""
    if len(data) != hidden_size * dtype.itemsize:
        raise ValueError(f"hidden state of {len(data)} bytes: expected {hidden_size * dtype.itemsize}")
    return to_device(torch.frombuffer(bytearray(data), dtype=dtype).unsqueeze(0), device)
