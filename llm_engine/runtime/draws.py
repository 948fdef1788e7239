"""What is asked of the sampler and what it gives: rows to draw, a draw under way, tokens that hold.

Shapes: R rows, V vocabulary, S sequences, M drafts of the step, K drafts of the sequence that has most.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from llm_engine.api.request import TokenLogprobs
from llm_engine.runtime.batch import Ints
from llm_engine.runtime.drafts import Drafts
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
        """[S]: first row of each sequence."""
        return np.cumsum([0, *self.counts[:-1]], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A draw that was launched. The slots may be others' when it ends, so what it needs of them is noted."""

    logits_RV: Tensor
    rows: DrawRows
    read: Readback  # [R + M, 2]: the rows' tokens and scores, then those of the drafts
    counts_S: Ints
    draft_at_SK: Ints  # places among the drafts, padded with -1
    reports_R: npt.NDArray[np.bool_]  # rows whose log probabilities are asked for


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token per row, `INVALID` where the row was not finite; log probabilities of the rows that asked for them."""

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


def verify(tokens_R: Ints, drafted_M: Ints, drawing: Drawing, logprobs: dict[int, TokenLogprobs]) -> Drawn:
    """Compare what the rows of a draw have drawn with the drafts that they were computed from.

    A draft holds if it and all before it are what was drawn in their places.
    """
    counts_S, draft_at_SK = drawing.counts_S, drawing.draft_at_SK
    width = draft_at_SK.shape[1]
    if not width or not len(drafted_M):
        none_S = np.zeros_like(counts_S)
        none_SK = np.empty((len(counts_S), 0), dtype=np.int64)
        return Drawn(tokens_R, logprobs, none_SK, none_S, tokens_R[:, None], none_S + 1)
    drafts_SK = np.where(draft_at_SK < 0, INVALID, drafted_M[draft_at_SK])
    starts_S = np.cumsum(counts_S) - counts_S
    rows = np.minimum(starts_S[:, None] + np.arange(width + 1), len(tokens_R) - 1)
    drawn_SK = tokens_R[rows]
    valid_SK = np.logical_and.accumulate(drafts_SK != INVALID, axis=1)
    right_SK = np.logical_and.accumulate(valid_SK & (drawn_SK[:, :width] == drafts_SK), axis=1)
    return Drawn(tokens_R, logprobs, drafts_SK, valid_SK.sum(1), drawn_SK, 1 + right_SK.sum(1))


def _leading(values_SK: Ints, num_S: Ints) -> list[list[int]]:
    return [row[:num] for row, num in zip(values_SK.tolist(), num_S.tolist(), strict=True)]
