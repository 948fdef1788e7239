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
from llm_engine.runtime.drafts import Drafts
from llm_engine.runtime.runner import Passed, Runner
from llm_engine.runtime.sampler import DrawRows
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

    def propose(self, seqs: Seq[Sequence] = (), num_drafts: Seq[int] = ()) -> Drafts:
        """Catch up with every waiting row, then draw up to `num_drafts[i]` drafts of `seqs[i]`. Waits for nothing.

        A draft feeds the pass for the next one as it comes from the sampler, on the device.
        """
        drafts = Drafts()
        if not self._pending:
            return drafts
        passed, last_row = self._catch_up()
        wanted = {seq: num for seq, num in zip(seqs, num_drafts, strict=True) if num and seq in last_row}
        if not wanted:
            return drafts
        active, num_drawn = list(wanted), 0
        self._runner.sampler.prime(active, [1 + num for num in wanted.values()])
        passed = self._rows_of(passed, [last_row[seq] for seq in active])
        while active:
            ids_N = drafts.add(active, self._pick(active, passed, num_drawn, drafts))
            num_drawn += 1
            places = [place for place, seq in enumerate(active) if wanted[seq] > num_drawn]
            active = [active[place] for place in places]
            if active:
                rows = [_chained_row(seq, num_drawn, place) for seq, place in zip(active, places, strict=True)]
                passed = self._runner.mtp(rows, self._rows_of(passed, places).states_NH, ids_N)
        return drafts

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

    def _pick(self, seqs: list[Sequence], passed: Passed, num_drawn: int, drafts: Drafts) -> Tensor:
        """The next draft of each sequence, drawn as its token will be: at the same position, with the same noise."""
        rows = DrawRows(seqs, [num_drawn] * len(seqs), [1] * len(seqs), drafts)
        return self._runner.pick_drafts(passed, rows)

    def _rows_of(self, passed: Passed, rows: list[int]) -> Passed:
        if rows == list(range(len(passed.states_NH))):
            return passed
        return passed.rows(to_device(torch.tensor(rows, dtype=torch.int64), self._runner.device))


def _chained_row(seq: Sequence, num_drawn: int, place: int) -> SequenceRows:
    """The newest of a sequence's drafts, token `place` of those that only the device knows, before its own position."""
    return SequenceRows([-1 - place], len(seq.tokens) - 2 + num_drawn, seq.blocks)
