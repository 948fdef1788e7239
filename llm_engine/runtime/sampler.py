"""Logits to token ids. Every draw is a function of its own logits, (seed, absolute position) and the parameters alone.

A token is the argmax over the vocabulary of p(v) / E(v): p the distribution after all options, E exponential noise
keyed by (seed, position, v). That is a draw from p (the Gumbel-max rule without its logarithms), and two distributions
that are close mostly draw the same token at the same position: what makes drafts worth verifying at any temperature.

Order of the options: logit bias, penalties, min_tokens, temperature, top_k, top_p. Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_engine.api.request import TokenLogprobs
from llm_engine.ops import to_device
from llm_engine.ops.noise import ExponentialNoise, mix_seed, position_keys
from llm_engine.ops.spec import Race
from llm_engine.runtime.batch import Ints
from llm_engine.runtime.drafts import Drafts
from llm_engine.runtime.logit_edits import LogitEdits
from llm_engine.runtime.readback import Readback
from llm_engine.sched.sequence import Sequence

INVALID = -1  # drawn where the model's output was not finite


@dataclass(frozen=True, slots=True)
class DrawRows:
    """Which token each logits row draws.

    Sequence i has `counts[i]` adjacent rows. Its first row draws the token after its tokens and `given[i]` of its
    drafts, each further row the one after one more draft; they count as output for penalties and `min_tokens`.
    """

    seqs: list[Sequence]
    given: list[int]
    counts: list[int]
    drafts: Drafts = field(default_factory=Drafts)

    def starts(self) -> Ints:
        """First row of each sequence."""
        return np.cumsum([0, *self.counts[:-1]], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token per row, `INVALID` where the row was not finite; log probabilities of the rows that asked for them.

    Shapes: S sequences, K drafts of the sequence that has most.
    """

    tokens_R: Ints
    logprobs: dict[int, TokenLogprobs]
    drafts_SK: Ints
    num_drafts_S: Ints  # up to the first whose row was not finite
    kept_SK: Ints  # [S, 1 + K]
    num_kept_S: Ints  # tokens up to the first that is not the next row's draft

    @property
    def tokens(self) -> list[int]:
        """Of all rows."""
        tokens: list[int] = self.tokens_R.tolist()
        return tokens

    @property
    def drafts(self) -> list[list[int]]:
        """Of each sequence."""
        return _leading(self.drafts_SK, self.num_drafts_S)

    @property
    def kept(self) -> list[list[int]]:
        """Of each sequence: the tokens that hold."""
        return _leading(self.kept_SK, self.num_kept_S)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A draw that was launched. The slots may be others' when it ends, so what it needs of them is noted."""

    logits_RV: Tensor
    rows: DrawRows
    read: Readback  # [R, 2], then the drafts
    counts_S: Ints
    draft_at_SK: Ints  # places among the drafts, padded with -1
    reports: npt.NDArray[np.bool_]  # rows whose log probabilities are asked for


class Sampler:
    """Draws tokens for sequences that hold a slot in [0, num_slots). `race`: for rows without top_k and top_p."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, race: Race | None = None) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._race = race
        self._noise = ExponentialNoise(vocab_size, device)
        self._seed_keys = np.zeros(num_slots, dtype=np.uint64)
        self._temperature = np.zeros(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int64)
        self._top_p = np.ones(num_slots, dtype=np.float64)
        self._filtered = np.zeros(num_slots, dtype=bool)
        self._reports = np.zeros(num_slots, dtype=bool)
        if race is not None:  # compile it: no request should wait for that
            ones_R = torch.ones(1, device=device)
            race(torch.zeros(1, vocab_size, device=device), ones_R, ones_R.long())
        self._primed: dict[int, int] = {}  # row key → row of `_primed_noise`
        self._primed_noise_RV = torch.empty(0, vocab_size, device=device)
        self._edits: dict[int, LogitEdits] = {}  # slots whose logits are changed before they are drawn from

    def open(self, seq: Sequence) -> None:
        """Start to draw for the sequence in `seq.slot`."""
        slot, params = seq.slot, seq.submit.sampling
        self._seed_keys[slot] = mix_seed(params.seed)
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        self._top_p[slot] = params.top_p
        self._filtered[slot] = params.top_p < 1 or self._top_k[slot] < self._vocab_size
        self._reports[slot] = params.logprobs is not None
        if LogitEdits.needed(seq):
            self._edits[slot] = LogitEdits(seq, self._vocab_size, self._device)

    def close(self, slot: int) -> None:
        """The slot's sequence draws no more."""
        self._edits.pop(slot, None)

    def prime(self, seqs: list[Sequence], counts: list[int]) -> None:
        """Make the noise of the next `counts[i]` positions of `seqs[i]` in one go. Saves time, changes nothing.

        They are about to be drawn, most of them twice: as drafts and then for good.
        """
        slots = np.array([seq.slot for seq in seqs], dtype=np.int64)
        needed = (self._temperature[slots] > 0) & ~self._raced(slots)
        chosen = [(seq, count) for seq, count, need in zip(seqs, counts, needed, strict=True) if need]
        self._primed = {}
        if chosen:
            rows = DrawRows([seq for seq, _ in chosen], [0] * len(chosen), [count for _, count in chosen])
            keys = self._row_keys(rows)
            self._primed = {key: row for row, key in enumerate(keys.tolist())}
            self._primed_noise_RV = self._noise(keys)

    def draw(self, logits_RV: Tensor, rows: DrawRows, *, best_R2: Tensor | None = None) -> Drawn:
        """One token per row, as `pick`; waits for the device, once unless log probabilities are asked for."""
        return self.finish(self.start(logits_RV, rows, best_R2=best_R2))

    def start(self, logits_RV: Tensor, rows: DrawRows, *, best_R2: Tensor | None = None) -> Drawing:
        """Launch a draw: one token per row, as `pick`. Waits for nothing. What `rows.drafts` holds is read along.

        The logits must be there until it is finished.
        """
        picked_R2 = self.pick(logits_RV, rows, best_R2=best_R2)
        read = Readback(torch.cat([picked_R2, *rows.drafts.drawn()]) if len(rows.drafts) else picked_R2)
        counts = np.array(rows.counts, dtype=np.int64)
        reports = self._reports[np.repeat([seq.slot for seq in rows.seqs], counts)]
        return Drawing(logits_RV, rows, read, counts, rows.drafts.places_of(rows.seqs), reports)

    def finish(self, drawing: Drawing) -> Drawn:
        """Wait for what was drawn, and verify the drafts."""
        read = drawing.read.wait()
        known = read[:, 0].astype(np.int64)
        known[~np.isfinite(read[:, 1])] = INVALID
        num_rows = int(drawing.counts_S.sum())
        tokens, drafted = known[:num_rows], known[num_rows:]
        logprobs, reports = {}, drawing.reports
        if reports.any():
            logprobs = self._logprobs(drawing.logits_RV, tokens.tolist(), drawing.rows, reports)
        return Drawn(tokens, logprobs, *_verify(tokens, drafted, drawing.counts_S, drawing.draft_at_SK))

    def pick(self, logits_RV: Tensor, rows: DrawRows, *, best_R2: Tensor | None = None) -> Tensor:
        """[R, 2] fp64: one token per row of fp32 logits, which are not modified, and its score. Waits for nothing.

        A score that is not finite says that the row was not. `best_R2`: `best_of` the logits, if it is known already.
        """
        slots = np.repeat(np.array([seq.slot for seq in rows.seqs], dtype=np.int64), rows.counts)
        edited_RV = self._edit(logits_RV, rows) if self._edits else logits_RV
        known_R2 = best_R2 if edited_RV is logits_RV else None
        sampled = self._temperature[slots] > 0
        if not sampled.any():
            return best_of(edited_RV) if known_R2 is None else known_R2
        keys, raced = self._row_keys(rows), sampled & self._raced(slots)
        ways = [(self._race_by_kernel, raced), (self._race_by_library, sampled & ~raced)]
        for way, chosen in ways:
            if chosen.all():
                return way(edited_RV, slots, keys)
        drawn_R2 = best_of(edited_RV) if known_R2 is None else known_R2.clone()
        for way, chosen in ways:
            if chosen.any():
                at = np.flatnonzero(chosen)
                where = self._upload(at)
                drawn_R2[where] = way(edited_RV[where], slots[at], keys[at])
        return drawn_R2

    def _raced(self, slots: Ints) -> npt.NDArray[np.bool_]:
        """Which of them, if they are sampled, are so by the kernel."""
        return ~self._filtered[slots] if self._race is not None else np.zeros(len(slots), dtype=bool)

    def _row_keys(self, rows: DrawRows) -> npt.NDArray[np.uint64]:
        """The noise key of each row: its sequence's seed and the absolute position that it draws."""
        first = np.array([len(seq.tokens) + given for seq, given in zip(rows.seqs, rows.given, strict=True)], np.int64)
        positions = np.repeat(first - rows.starts(), rows.counts)
        positions += np.arange(len(positions))
        seed_keys = self._seed_keys[[seq.slot for seq in rows.seqs]]
        return position_keys(np.repeat(seed_keys, rows.counts), positions)

    def _noise_of(self, keys: npt.NDArray[np.uint64]) -> Tensor:
        rows = [self._primed.get(key, -1) for key in keys.tolist()] if self._primed else [-1]
        if min(rows) < 0:
            return self._noise(keys)
        if rows == list(range(len(self._primed))):
            return self._primed_noise_RV
        return self._primed_noise_RV[self._upload(np.array(rows))]

    def _race_by_kernel(self, logits_RV: Tensor, slots: Ints, keys: npt.NDArray[np.uint64]) -> Tensor:
        assert self._race is not None, "rows come here where there is a kernel"
        keys_R = self._upload(keys.view(np.int64))
        return self._race(logits_RV, self._upload(self._temperature[slots]), keys_R)

    def _race_by_library(self, logits_RV: Tensor, slots: Ints, keys: npt.NDArray[np.uint64]) -> Tensor:
        """Of rows that have filters, or all rows where there is no kernel."""
        temperature_R = self._upload(self._temperature[slots])
        probs_RV = (logits_RV / temperature_R.unsqueeze(1)).softmax(dim=-1)
        filtered = self._filtered[slots]
        if filtered.any():
            chosen = np.flatnonzero(filtered)
            where = self._upload(chosen)
            top_k = self._upload(self._top_k[slots[chosen]])
            top_p = self._upload(self._top_p[slots[chosen]])
            probs_RV[where] = keep_most_likely(probs_RV[where], top_k, top_p)
        return best_of(probs_RV.div_(self._noise_of(keys)))

    def _upload(self, values: npt.NDArray[Any]) -> Tensor:
        return to_device(torch.from_numpy(values), self._device)

    def _edit(self, logits_RV: Tensor, rows: DrawRows) -> Tensor:
        """A copy with bias, penalties and bans applied to the rows of sequences that have any."""
        edited_RV = logits_RV
        row = 0
        for seq, given, count in zip(rows.seqs, rows.given, rows.counts, strict=True):
            edits = self._edits.get(seq.slot)
            if edits is not None:
                if edited_RV is logits_RV:
                    edited_RV = logits_RV.clone()
                edits.apply(edited_RV[row : row + count], given, rows.drafts)
            row += count
        return edited_RV

    def _logprobs(
        self, logits_RV: Tensor, tokens: Seq[int], rows: DrawRows, wanted: npt.NDArray[np.bool_]
    ) -> dict[int, TokenLogprobs]:
        asked = np.repeat([seq.submit.sampling.logprobs or 0 for seq in rows.seqs], rows.counts).tolist()
        chosen = [row for row in np.flatnonzero(wanted).tolist() if tokens[row] != INVALID]
        out: dict[int, TokenLogprobs] = {}
        for top in {int(asked[row]) for row in chosen}:  # one top-k width at a time: a row never depends on another's
            group = [row for row in chosen if asked[row] == top]
            logprobs_GV = logits_RV[group].log_softmax(dim=-1)
            values, ids = logprobs_GV.topk(min(top, self._vocab_size), dim=-1)
            own = logprobs_GV.gather(1, torch.tensor([[tokens[row]] for row in group], device=self._device))
            for row, logprob, row_values, row_ids in zip(
                group, own.tolist(), values.tolist(), ids.tolist(), strict=True
            ):
                best = sorted(zip(row_values, row_ids, strict=True), key=lambda item: (-item[0], item[1]))
                out[row] = TokenLogprobs(logprob[0], [token for _, token in best], [value for value, _ in best])
        return out


def _verify(tokens_R: Ints, drafted_M: Ints, counts_S: Ints, draft_at_SK: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """The last four of `Drawn`."""
    width = draft_at_SK.shape[1]
    if not width or not len(drafted_M):
        none_S = np.zeros_like(counts_S)
        return np.empty((len(counts_S), 0), dtype=np.int64), none_S, tokens_R[:, None], none_S + 1
    drafts_SK = np.where(draft_at_SK < 0, INVALID, drafted_M[draft_at_SK])
    starts_S = np.cumsum(counts_S) - counts_S
    rows = np.minimum(starts_S[:, None] + np.arange(width + 1), len(tokens_R) - 1)
    drawn_SK = tokens_R[rows]
    valid_SK = np.logical_and.accumulate(drafts_SK != INVALID, axis=1)
    right_SK = np.logical_and.accumulate(valid_SK & (drawn_SK[:, :width] == drafts_SK), axis=1)
    return drafts_SK, valid_SK.sum(1), drawn_SK, 1 + right_SK.sum(1)


def _leading(values_SK: Ints, num_S: Ints) -> list[list[int]]:
    return [row[:num] for row, num in zip(values_SK.tolist(), num_S.tolist(), strict=True)]


def keep_most_likely(probs_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Zero all but the `top_k` most likely tokens, then all but the fewest of those that hold `top_p` of their mass.

    Between equals the lowest id stays. top_k in [1, V], top_p in (0, 1].
    """
    best_RV = _sorted_descending(probs_RV)
    mass_RV = best_RV.cumsum(dim=-1, dtype=torch.float64)
    top_k_R1 = top_k_R.unsqueeze(1)
    kept_mass_R1 = mass_RV.gather(1, top_k_R1 - 1) * top_p_R.unsqueeze(1)
    in_nucleus_RV = mass_RV - best_RV < kept_mass_R1  # true for a leading part of each row
    num_kept_R1 = in_nucleus_RV.sum(dim=-1, keepdim=True).minimum(top_k_R1).clamp_(min=1)
    threshold_R1 = best_RV.gather(1, num_kept_R1 - 1)
    above_RV = probs_RV > threshold_R1
    tied_RV = probs_RV == threshold_R1
    room_R1 = num_kept_R1 - above_RV.sum(dim=-1, keepdim=True)
    return probs_RV * (above_RV | (tied_RV & (tied_RV.cumsum(dim=-1) <= room_R1)))


def best_of(scores_RV: Tensor) -> Tensor:
    """[R, 2] fp64: the lowest id among the largest scores of each row, and that score. Waits for nothing.

    A NaN is larger than everything. On the CPU numpy searches many times faster than torch.
    """
    best_R = torch.from_numpy(scores_RV.numpy().argmax(axis=-1)) if scores_RV.is_cpu else scores_RV.argmax(dim=-1)
    scores_R = scores_RV.gather(1, best_R.unsqueeze(1)).squeeze(1)
    return torch.stack([best_R.double(), scores_R.double()], 1)  # side by side, so that the host waits once for both


def _sorted_descending(values_RV: Tensor) -> Tensor:
    """Each row from its largest value to its smallest. On the CPU numpy sorts many times faster than torch."""
    if values_RV.is_cpu:
        return torch.from_numpy(np.sort(values_RV.numpy(), axis=-1)[:, ::-1].copy())
    return values_RV.sort(dim=-1, descending=True).values
