"""Drafts from the MTP layer: what each decoding sequence proposes for verification in the next forward pass.

The layer's cache row i belongs to (final hidden state of position i, token i + 1). After a forward pass the states of
the newly verified positions wait here; the next `propose` runs them through the layer ("catch-up"), which overwrites
the rows that earlier drafts had left, and goes on from the last one. A draft never enters `Sequence.tokens`, and a
wrong one costs time only. Shapes: R rows (padding included), M rows of one sequence, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_engine.ops import to_device
from llm_engine.runtime.batch import Ints, States, Tables
from llm_engine.runtime.drafts import Drafts
from llm_engine.runtime.draws import DrawRows
from llm_engine.runtime.runner import Passed, Runner
from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.sequence import Sequence


class _Verified(NamedTuple):
    """States `states_MH[start : start + num]` of the positions from `first` on."""

    first: int
    num: int
    states_MH: Tensor
    start: int


@dataclass(frozen=True, slots=True)
class VerifiedRows:
    """`counts_S[i]` rows of sequence i from position `first_S[i]` on: the token after each, its state."""

    seqs: list[Sequence]
    token_ids_N: Ints
    counts_S: Ints
    first_S: Ints
    states: States
    tables_SB: Tables | None = None  # block tables, if they are known

    def beside(self, other: VerifiedRows) -> VerifiedRows:
        """These and then the others."""
        offset = len(self.states.source_MH)
        source_MH = torch.cat([self.states.source_MH, other.states.source_MH])
        return VerifiedRows(
            [*self.seqs, *other.seqs],
            np.append(self.token_ids_N, other.token_ids_N),
            np.append(self.counts_S, other.counts_S),
            np.append(self.first_S, other.first_S),
            States(source_MH, np.append(self.states.at_N, offset + other.states.at_N)),
        )


@dataclass(frozen=True, slots=True)
class _CaughtUp:
    """What the layer gives for the last row of each sequence, and the tokens that have a row of it then."""

    seqs: list[Sequence]
    passed: Passed
    reached: list[int]


class Speculator:
    """Catch-up rows and drafts. Exists only where drafts are verified."""

    def __init__(self, runner: Runner, cache: PagedCache) -> None:
        self._runner = runner
        self._cache = cache
        self._pending: dict[Sequence, _Verified] = {}
        self._early: _CaughtUp | None = None

    def observe(self, seq: Sequence, first: int, states_MH: Tensor, start: int = 0, count: int | None = None) -> None:
        """Rows `start` … of `states_MH`, all unless told, are the states of verified positions from `first` on.

        The token after each of them is in `seq.tokens` by the next propose.
        """
        assert seq not in self._pending, "the previous rows have not been caught up with"
        count = len(states_MH) if count is None else count
        if count:
            self._pending[seq] = _Verified(first, count, states_MH, start)

    def forget(self, seq: Sequence) -> None:
        """The sequence draws no more."""
        self._pending.pop(seq, None)

    def settle(self, seq: Sequence) -> None:
        """Catch up with one sequence that will not draft, so that what it has cached is complete for others."""
        if seq in self._pending:
            pending, self._pending = self._pending, {seq: self._pending.pop(seq)}
            self.propose()
            self._pending = pending

    def propose(self, seqs: Seq[Sequence] = (), num_drafts: Seq[int] = ()) -> Drafts:
        """Catch up with every waiting row, then draw up to `num_drafts[i]` drafts of `seqs[i]`. Waits for nothing.

        A draft feeds the pass for the next one as it comes from the sampler, on the device.
        """
        drafts = Drafts()
        early, self._early = self._early, None
        if early is None:
            if not self._pending:
                return drafts
            early = self._run(self._take())
        place = {seq: i for i, seq in enumerate(early.seqs)}
        wanted = {seq: num for seq, num in zip(seqs, num_drafts, strict=True) if num and seq in place}
        active, num_drawn = list(wanted), 0
        passed = early.passed
        if active != early.seqs:
            at = np.array([place[seq] for seq in active], dtype=np.int64)
            passed = passed.rows(to_device(torch.from_numpy(at), self._runner.device))
        for seq, reached in zip(early.seqs, early.reached, strict=True):
            if seq.blocks:  # it is still here
                seq.num_drafted = reached
                self._cache.publish(seq)
        if not wanted:
            return drafts
        self._runner.sampler.prime(active, [1 + num for num in wanted.values()])
        while active:
            ids_N = drafts.add(active, self._pick(active, passed, num_drawn, drafts))
            num_drawn += 1
            places = [place for place, seq in enumerate(active) if wanted[seq] > num_drawn]
            active = [active[place] for place in places]
            if active:
                passed = self._chain(active, num_drawn, np.array(places), passed, ids_N)
        return drafts

    def go_on(self, rows: VerifiedRows) -> None:
        """Catch up with rows that are not committed yet, and with those that wait; `propose` takes it from there."""
        self._early = self._run(rows.beside(self._take()) if self._pending else rows)

    def _take(self) -> VerifiedRows:
        """All rows that wait."""
        pending, self._pending = self._pending, {}
        seqs, (firsts, nums, sources, starts) = list(pending), zip(*pending.values(), strict=True)
        tokens = [seq.tokens[first + 1 : first + 1 + num] for seq, first, num in zip(seqs, firsts, nums, strict=True)]
        counts = np.array(nums)
        states = _side_by_side(sources, starts, counts)
        return VerifiedRows(seqs, np.array(list(chain.from_iterable(tokens))), counts, np.array(firsts), states)

    def _run(self, rows: VerifiedRows) -> _CaughtUp:
        """The layer over some rows; what it gives for the last one of each sequence."""
        batch = self._runner.batch(rows.seqs, rows.token_ids_N, rows.counts_S, rows.first_S, rows.tables_SB)
        passed = self._runner.mtp(batch, rows.states)
        return _CaughtUp(rows.seqs, passed, (rows.first_S + rows.counts_S).tolist())

    def _chain(self, active: list[Sequence], num_drawn: int, places: Ints, passed: Passed, ids_N: Tensor) -> Passed:
        """Run the newest draft of each sequence, token `places[i]` of those that only the device knows."""
        first = np.array([len(seq.tokens) - 2 + num_drawn for seq in active], dtype=np.int64)
        states = States(passed.states_NH, places)
        batch = self._runner.batch(active, -1 - places, np.ones_like(places), first)
        return self._runner.mtp(batch, states, late_M=ids_N)

    def _pick(self, seqs: list[Sequence], passed: Passed, num_drawn: int, drafts: Drafts) -> Tensor:
        """The next draft of each sequence, drawn as its token will be: at the same position, with the same noise."""
        rows = DrawRows(seqs, [num_drawn] * len(seqs), [1] * len(seqs), drafts)
        return self._runner.pick_drafts(passed, rows)


def _side_by_side(sources: Seq[Tensor], starts: Seq[int], counts: Ints) -> States:
    """The states of all rows: `counts[i]` of `sources[i]` from row `starts[i]` on. Mostly they are from one pass."""
    start_S, source_MH = np.array(starts), sources[0]
    if any(source is not source_MH for source in sources):
        distinct = {id(source): source for source in sources}
        lengths = [len(source) for source in distinct.values()]
        offsets = dict(zip(distinct, accumulate(lengths, initial=0), strict=False))
        start_S += [offsets[id(source)] for source in sources]
        source_MH = torch.cat(list(distinct.values()))
    return States(source_MH, np.repeat(start_S - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum())))


def state_bytes(hidden_H: Tensor) -> bytes:
    """A hidden state as it goes over the wire: the bytes of its elements in the compute dtype."""
    return hidden_H.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def state_from_bytes(data: bytes, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Inverse of `state_bytes`, as one row [1, H]. Raises ValueError when the size does not fit."""
    if len(data) != hidden_size * dtype.itemsize:
        raise ValueError(f"hidden state of {len(data)} bytes: expected {hidden_size * dtype.itemsize}")
    return to_device(torch.frombuffer(bytearray(data), dtype=dtype).unsqueeze(0), device)
