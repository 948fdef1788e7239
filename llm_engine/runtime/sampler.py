"""Logits to token ids. Every draw is a function of its own logits, (seed, absolute position) and the parameters alone.

A token is the argmax over the vocabulary of p(v) / E(v): p the distribution after all options, E exponential noise
keyed by (seed, position, v). That is a draw from p (the Gumbel-max rule without its logarithms), and two distributions
that are close mostly draw the same token at the same position: what makes drafts worth verifying at any temperature.

Order of the options: logit bias, penalties, min_tokens, temperature, top_k, top_p. Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_engine.api.request import SamplingParams, TokenLogprobs
from llm_engine.runtime.noise import ExponentialNoise, mix_seed, position_keys
from llm_engine.sched.sequence import Sequence

Ints = npt.NDArray[np.int64]
INVALID = -1  # drawn where the model's output was not finite


@dataclass(frozen=True, slots=True)
class DrawRows:
    """Which token each logits row draws.

    Sequence i has `counts[i]` adjacent rows. Its first row draws the token after `tokens ‖ drafts[:given[i]]`, each
    further row the one after one more draft; drafts count as output for penalties and `min_tokens`.
    """

    seqs: list[Sequence]
    given: list[int]
    counts: list[int]

    def starts(self) -> Ints:
        """First row of each sequence."""
        return np.cumsum([0, *self.counts[:-1]], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token per row, `INVALID` where the row was not finite; log probabilities of the rows that asked for them."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs]


class Sampler:
    """Draws tokens for sequences that hold a slot in [0, num_slots)."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._noise = ExponentialNoise(vocab_size, device)
        self._seed_keys = np.zeros(num_slots, dtype=np.uint64)
        self._temperature = np.zeros(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int64)
        self._top_p = np.ones(num_slots, dtype=np.float64)
        self._filtered = np.zeros(num_slots, dtype=bool)
        self._reports = np.zeros(num_slots, dtype=bool)
        self._edits: dict[int, _Edits] = {}  # slots whose logits are changed before they are drawn from

    def open(self, seq: Sequence) -> None:
        """Start to draw for the sequence in `seq.slot`."""
        slot, params = seq.slot, seq.submit.sampling
        self._seed_keys[slot] = mix_seed(params.seed)
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        self._top_p[slot] = params.top_p
        self._filtered[slot] = params.top_p < 1 or self._top_k[slot] < self._vocab_size
        self._reports[slot] = params.logprobs is not None
        if _is_edited(seq):
            self._edits[slot] = _Edits(seq, self._vocab_size, self._device)

    def close(self, slot: int) -> None:
        """The slot's sequence draws no more."""
        self._edits.pop(slot, None)

    def draw(self, logits_RV: Tensor, rows: DrawRows, *, report: bool = True) -> Drawn:
        """One token per row of fp32 logits, which are not modified. `report`: log probabilities are wanted."""
        slots = np.array([seq.slot for seq in rows.seqs], dtype=np.int64)
        counts = np.array(rows.counts, dtype=np.int64)
        slot_of_row = np.repeat(slots, counts)
        edited_RV = self._edit(logits_RV, rows) if self._edits else logits_RV
        sampled = self._temperature[slot_of_row] > 0
        if not sampled.any():
            tokens_R = edited_RV.argmax(dim=-1)
            scores_R = edited_RV.gather(1, tokens_R.unsqueeze(1))
        else:
            keys = self._row_keys(rows, slot_of_row, counts)
            tokens_R, scores_R = self._draw_sampled(edited_RV, slot_of_row, keys, sampled)
        tokens = [
            token if math.isfinite(score) else INVALID
            for token, score in zip(tokens_R.tolist(), scores_R.flatten().tolist(), strict=True)
        ]
        wanted = self._reports[slot_of_row] if report else np.zeros(0, dtype=bool)
        return Drawn(tokens, self._logprobs(logits_RV, tokens, rows, wanted) if wanted.any() else {})

    def _row_keys(self, rows: DrawRows, slot_of_row: Ints, counts: Ints) -> npt.NDArray[np.uint64]:
        first = np.array([len(seq.tokens) + given for seq, given in zip(rows.seqs, rows.given, strict=True)], np.int64)
        positions = np.repeat(first - rows.starts(), counts) + np.arange(len(slot_of_row))
        return position_keys(self._seed_keys[slot_of_row], positions)

    def _draw_sampled(
        self, logits_RV: Tensor, slots: Ints, keys: npt.NDArray[np.uint64], sampled: npt.NDArray[np.bool_]
    ) -> tuple[Tensor, Tensor]:
        """Rows at temperature 0 take the argmax, the others the race; returns tokens and winning scores."""
        if sampled.all():
            return self._race(logits_RV, slots, keys)
        tokens_R = logits_RV.argmax(dim=-1)
        scores_R = logits_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
        chosen = np.flatnonzero(sampled)
        where = torch.from_numpy(chosen).to(self._device)
        tokens_R[where], scores_R[where] = self._race(logits_RV[where], slots[chosen], keys[chosen])
        return tokens_R, scores_R

    def _race(self, logits_RV: Tensor, slots: Ints, keys: npt.NDArray[np.uint64]) -> tuple[Tensor, Tensor]:
        temperature_R = torch.from_numpy(self._temperature[slots]).to(self._device)
        probs_RV = (logits_RV / temperature_R.unsqueeze(1)).softmax(dim=-1)
        filtered = self._filtered[slots]
        if filtered.any():
            chosen = np.flatnonzero(filtered)
            where = torch.from_numpy(chosen).to(self._device)
            top_k = torch.from_numpy(self._top_k[slots[chosen]]).to(self._device)
            top_p = torch.from_numpy(self._top_p[slots[chosen]]).to(self._device)
            probs_RV[where] = keep_most_likely(probs_RV[where], top_k, top_p)
        scores_RV = probs_RV.div_(self._noise(keys))
        tokens_R = scores_RV.argmax(dim=-1)
        return tokens_R, scores_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)

    def _edit(self, logits_RV: Tensor, rows: DrawRows) -> Tensor:
        """A copy with bias, penalties and bans applied to the rows of sequences that have any."""
        edited_RV = logits_RV
        row = 0
        for seq, given, count in zip(rows.seqs, rows.given, rows.counts, strict=True):
            edits = self._edits.get(seq.slot)
            if edits is not None:
                if edited_RV is logits_RV:
                    edited_RV = logits_RV.clone()
                edits.apply(edited_RV[row : row + count], given)
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


def keep_most_likely(probs_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Zero all but the `top_k` most likely tokens, then all but the fewest of those that hold `top_p` of their mass.

    Between equals the lowest id stays. top_k in [1, V], top_p in (0, 1].
    """
    width = probs_RV.shape[1] if bool((top_p_R < 1).any()) else int(top_k_R.max())
    best_RW = probs_RV.topk(width, dim=-1).values
    mass_RW = best_RW.cumsum(dim=-1, dtype=torch.float64)  # row by row in order: the width changes no bit
    kept_mass_R1 = mass_RW.gather(1, top_k_R.unsqueeze(1) - 1) * top_p_R.unsqueeze(1)
    in_nucleus_RW = (mass_RW - best_RW < kept_mass_R1) & (mass_RW.new_ones(width).cumsum(0) <= top_k_R.unsqueeze(1))
    num_kept_R1 = in_nucleus_RW.sum(dim=-1, keepdim=True).clamp_(min=1)
    threshold_R1 = best_RW.gather(1, num_kept_R1 - 1)
    above_RV = probs_RV > threshold_R1
    tied_RV = probs_RV == threshold_R1
    room_R1 = num_kept_R1 - above_RV.sum(dim=-1, keepdim=True)
    return probs_RV * (above_RV | (tied_RV & (tied_RV.cumsum(dim=-1) <= room_R1)))


def _is_edited(seq: Sequence) -> bool:
    params = seq.submit.sampling
    bans = seq.num_output < params.min_tokens and seq.stop_ids
    return bool(params.logit_bias or params.presence_penalty or params.frequency_penalty or bans)


class _Edits:
    """Changes to the logits of one sequence. Output tokens are counted as they come."""

    def __init__(self, seq: Sequence, vocab_size: int, device: torch.device) -> None:
        params = seq.submit.sampling
        self._seq = seq
        self._params: SamplingParams = params
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        stop_ids = sorted(token for token in seq.stop_ids if 0 <= token < vocab_size)
        self._stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=device)
        penalised = bool(params.presence_penalty or params.frequency_penalty)
        self._counts_V = torch.zeros(vocab_size, dtype=torch.float32, device=device) if penalised else None
        self._num_counted = 0  # output tokens in `_counts_V`

    def apply(self, logits_RV: Tensor, given: int) -> None:
        """Change the adjacent rows that draw after `given`, `given + 1`, … drafts, in place."""
        if len(self._bias_ids):
            logits_RV[:, self._bias_ids] += self._bias
        if self._counts_V is not None:
            counts_RV = self._count(len(logits_RV), given)
            logits_RV.sub_(counts_RV * self._params.frequency_penalty)
            logits_RV.sub_((counts_RV > 0) * self._params.presence_penalty)
        num_banned = self._params.min_tokens - self._seq.num_output - given
        if num_banned > 0 and len(self._stop_ids):
            logits_RV[:num_banned, self._stop_ids] = -math.inf

    def _count(self, num_rows: int, given: int) -> Tensor:
        """How often each token is output before each row; drafts before a row included."""
        assert self._counts_V is not None
        output = self._seq.tokens[self._seq.submit.num_prompt + self._num_counted :]
        _add_ones(self._counts_V, output)
        self._num_counted += len(output)
        counts_RV = self._counts_V.repeat(num_rows, 1)
        drafts = self._seq.drafts
        for row in range(num_rows):
            _add_ones(counts_RV[row], drafts[: given + row])
        return counts_RV


def _add_ones(counts_V: Tensor, tokens: Seq[int]) -> None:
    if tokens:
        ids = torch.tensor(tokens, dtype=torch.int64, device=counts_V.device)
        counts_V.scatter_add_(0, ids, torch.ones(len(tokens), device=counts_V.device))
