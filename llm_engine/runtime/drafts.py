"""Tokens proposed for verification. Only the device knows them until the tokens of the step are read, in one wait.

Shapes: M drafts of a step, N drafts of one round (the first of every sequence, the second …).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from llm_engine.runtime.batch import Ints
from llm_engine.sched.sequence import Sequence


class Drafts:
    """The proposals of one step, in the order in which they were drawn."""

    def __init__(self) -> None:
        self._drawn: list[Tensor] = []  # by round: [N, 2] fp64, as `ranking.best_of`
        self._ids: list[Tensor] = []  # by round: [N] int64
        self._places: dict[Sequence, list[int]] = {}
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def add(self, seqs: Seq[Sequence], drawn_N2: Tensor) -> Tensor:
        """One more draft of each of `seqs`; returns their ids [N].

        A draft whose score is not finite stands for none, and so do those after it; its id is one of the vocabulary.
        """
        ids_N = drawn_N2[:, 0].long()
        self._drawn.append(drawn_N2.clone())  # the next replay of a recording writes over its results
        self._ids.append(ids_N)
        for seq in seqs:
            self._places.setdefault(seq, []).append(self._num)
            self._num += 1
        return ids_N

    def places(self, seq: Sequence) -> list[int]:
        """Which of the M drafts are those of `seq`, first to last."""
        return self._places.get(seq, [])

    def places_of(self, seqs: Seq[Sequence]) -> Ints:
        """[S, K] as `places`, padded with -1; K is the most that a sequence has."""
        if not self._num:
            return np.empty((len(seqs), 0), dtype=np.int64)
        rows = [self._places.get(seq, []) for seq in seqs]
        width = max(map(len, rows), default=0)
        if min(map(len, rows), default=0) == width:
            return np.array(rows, dtype=np.int64).reshape(len(rows), width)
        return np.array([row + [-1] * (width - len(row)) for row in rows], dtype=np.int64)

    def drawn(self) -> list[Tensor]:
        """Tensors [·, 2] fp64 of ids and scores, M rows together."""
        return self._drawn

    def ids(self) -> Tensor | None:
        """[M] int64 on the device; None if there are no drafts."""
        if len(self._ids) == 1:
            return self._ids[0]
        return torch.cat(self._ids) if self._ids else None

    def ids_of(self, seq: Sequence) -> Tensor:
        """[n] int64 on the device: the drafts of a sequence that has some."""
        ids_M = torch.cat(self._ids)
        return torch.stack([ids_M[place] for place in self.places(seq)])
