"""Logits to token ids. Every draw is a function of its own logits, (seed, absolute position) and the parameters alone.

A token is the argmax over the vocabulary of p(v) / E(v): p the distribution after all options, E exponential noise
keyed by (seed, position, v). That is a draw from p (the Gumbel-max rule without its logarithms), and two distributions
that are close mostly draw the same token at the same position: what makes drafts worth verifying at any temperature.

Order of the options: logit bias, penalties, min_tokens, temperature, top_k, top_p. Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_engine.ops import to_device
from llm_engine.ops.noise import mix_seed, position_keys
from llm_engine.ops.spec import Race
from llm_engine.runtime.batch import Ints
from llm_engine.runtime.draws import INVALID, Drawing, Drawn, DrawRows, verify
from llm_engine.runtime.logit_edits import LogitEdits
from llm_engine.runtime.primed_noise import PrimedNoise
from llm_engine.runtime.ranking import best_of, keep_most_likely, logprobs_of
from llm_engine.runtime.readback import Readback
from llm_engine.sched.sequence import Sequence


class Sampler:
    """Draws tokens for sequences that hold a slot in [0, num_slots). `race`: for rows without top_k and top_p."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, race: Race | None = None) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._race = race
        self._noise = PrimedNoise(vocab_size, device)
        self._seed_keys = np.zeros(num_slots, dtype=np.uint64)
        self._temperature = np.zeros(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int64)
        self._top_p = np.ones(num_slots, dtype=np.float64)
        self._filtered = np.zeros(num_slots, dtype=bool)
        self._reports = np.zeros(num_slots, dtype=bool)
        if race is not None:  # compile it: no request should wait for that
            ones_R = torch.ones(1, device=device)
            race(torch.zeros(1, vocab_size, device=device), ones_R, ones_R.long())
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
        chosen = np.flatnonzero(needed).tolist()
        rows = DrawRows([seqs[i] for i in chosen], [0] * len(chosen), [counts[i] for i in chosen])
        self._noise.prime(self._row_keys(rows) if chosen else None)

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
        reports_R = self._reports[np.repeat([seq.slot for seq in rows.seqs], counts)]
        return Drawing(logits_RV, rows, read, counts, rows.drafts.places_of(rows.seqs), reports_R)

    def finish(self, drawing: Drawing) -> Drawn:
        """Wait for what was drawn, and verify the drafts."""
        read = drawing.read.wait()
        known = read[:, 0].astype(np.int64)
        known[~np.isfinite(read[:, 1])] = INVALID
        num_rows = int(drawing.counts_S.sum())
        tokens_R, drafted_M = known[:num_rows], known[num_rows:]
        logprobs = {}
        if drawing.reports_R.any():
            reported = np.flatnonzero(drawing.reports_R & (tokens_R != INVALID))
            tops = [seq.submit.sampling.logprobs or 0 for seq in drawing.rows.seqs]
            token_of = dict(zip(reported.tolist(), tokens_R[reported].tolist(), strict=True))
            logprobs = logprobs_of(drawing.logits_RV, token_of, np.repeat(tops, drawing.rows.counts).tolist())
        return verify(tokens_R, drafted_M, drawing, logprobs)

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
        return best_of(probs_RV.div_(self._noise.of(keys)))

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
