"""Drafts from the MTP layer: what each decoding sequence proposes for verification in the next forward pass.

The layer's cache row i belongs to (final hidden state of position i, token i + 1). After a forward pass the states of
the newly verified positions wait here; the next `propose` runs them through the layer ("catch-up"), which overwrites
the rows that earlier drafts had left, and goes on from the last one. A draft never enters `Sequence.tokens`, and a
wrong one costs time only. Shapes: R rows (padding included), M rows of one sequence, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from llm_engine.ops import to_device
from llm_engine.runtime.batch import SequenceRows
from llm_engine.runtime.runner import Passed, Runner
from llm_engine.runtime.sampler import INVALID, DrawRows
from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.sequence import Sequence


class Speculator:
    """Catch-up rows and drafts. Exists only where drafts are verified."""

    def __init__(self, runner: Runner, cache: PagedCache) -> None:
        self._runner = runner
        self._cache = cache
        self._pending: dict[Sequence, tuple[int, Tensor]] = {}  # first position, hidden states [M, H]

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    def observe(self, seq: Sequence, first: int, hidden_MH: Tensor) -> None:
        """States of verified positions from `first` on; the token after each is in `seq.tokens` by the next propose."""
        assert seq not in self._pending, "the previous rows have not been caught up with"
        if len(hidden_MH):
            self._pending[seq] = (first, hidden_MH)

    def forget(self, seq: Sequence) -> None:
        """The sequence draws no more."""
        self._pending.pop(seq, None)

    def settle(self, seq: Sequence) -> None:
        """Catch up with one sequence that will not draft, so that what it has cached is complete for others."""
        if seq in self._pending:
            pending, self._pending = self._pending, {seq: self._pending.pop(seq)}
            self._catch_up()
            self._pending = pending

    def propose(self, seqs: Seq[Sequence] = (), num_drafts: Seq[int] = ()) -> None:
        """Catch up with every waiting row, then fill `drafts` of `seqs` with up to `num_drafts[i]` tokens each."""
        for seq in seqs:
            seq.drafts = []
        if not self._pending:
            return
        passed, last_row = self._catch_up()
        active = [(seq, wanted) for seq, wanted in zip(seqs, num_drafts, strict=True) if wanted and seq in last_row]
        if active:
            self._runner.sampler.prime([seq for seq, _ in active], [1 + wanted for _, wanted in active])
        passed = self._rows_of(passed, [last_row[seq] for seq, _ in active])
        while active:
            tokens = self._draw([seq for seq, _ in active], passed)
            unfinished = []
            for place, ((seq, wanted), token) in enumerate(zip(active, tokens, strict=True)):
                if token != INVALID:
                    seq.drafts.append(token)
                    if len(seq.drafts) < wanted:
                        unfinished.append(place)
            active = [active[place] for place in unfinished]
            if active:
                chained = [self._chained_row(seq) for seq, _ in active]
                passed = self._runner.mtp(chained, self._rows_of(passed, unfinished).states_NH)

    def _catch_up(self) -> tuple[Passed, dict[Sequence, int]]:
        """Run all waiting rows; returns what the layer gives and each sequence's last row in it."""
        rows, last_row, num_rows = [], {}, 0
        for seq, (first, hidden_MH) in self._pending.items():
            count = len(hidden_MH)
            rows.append(SequenceRows(seq.tokens[first + 1 : first + 1 + count], first, seq.blocks))
            num_rows += count
            last_row[seq] = num_rows - 1
            seq.num_drafted = first + count
        passed = self._runner.mtp(rows, torch.cat([hidden_MH for _, hidden_MH in self._pending.values()]))
        self._pending = {}
        for seq in last_row:
            self._cache.publish(seq)
        return passed, last_row

    def _draw(self, seqs: list[Sequence], passed: Passed) -> list[int]:
        """The next draft of each sequence, drawn as its token will be: at the same position, with the same noise."""
        rows = DrawRows(seqs, [len(seq.drafts) for seq in seqs], [1] * len(seqs))
        return self._runner.draw_drafts(passed, rows)

    def _rows_of(self, passed: Passed, rows: list[int]) -> Passed:
        if rows == list(range(len(passed.states_NH))):
            return passed
        return passed.rows(to_device(torch.tensor(rows, dtype=torch.int64), self._runner.device))

    def _chained_row(self, seq: Sequence) -> SequenceRows:
        """The newest draft, at the position before its own."""
        return SequenceRows(seq.drafts[-1:], len(seq.tokens) - 2 + len(seq.drafts), seq.blocks)
