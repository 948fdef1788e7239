"""Builds the tensors of one forward pass from plain lists or from arrays. Per token and per sequence it is vectorised.

Shapes: N rows, S sequences, B blocks of the longest table, H width of a state.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_engine.ops import ForwardBatch, to_device
from llm_engine.sched.sequence import Sequence

Ints = npt.NDArray[np.int64]
Tables = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """One sequence's part of a pass: `token_ids` at positions `start`, `start` + 1, … of the sequence.

    `blocks` is its block table and covers every position up to the last one computed here; more is allowed.
    A token id of -1 - j stands for the j-th of tokens that only the device knows; see `fill_in`.
    """

    token_ids: Seq[int]
    start: int
    blocks: Seq[int]


@dataclass(frozen=True, slots=True)
class States:
    """The hidden states of N rows: row i has `source_MH[at_N[i]]`."""

    source_MH: Tensor
    at_N: Ints

    def gather(self) -> Tensor:
        """[N, H]."""
        if len(self.at_N) == len(self.source_MH) and (self.at_N == np.arange(len(self.at_N))).all():
            return self.source_MH
        return self.source_MH[to_device(torch.from_numpy(self.at_N), self.source_MH.device)]


class BlockTables:
    """The block tables of sequences that hold a slot, in one array: a table is copied as it grows, not in every pass.

    While a sequence holds its slot, its `blocks` are only ever appended to.
    """

    def __init__(self, num_slots: int, max_blocks: int) -> None:
        self._tables = np.full((num_slots, max_blocks), -1, dtype=np.int32)
        self._known = [0] * num_slots  # leading blocks copied

    def open(self, slot: int) -> None:
        """Another sequence holds the slot."""
        self._tables[slot] = -1
        self._known[slot] = 0

    def of(self, seqs: Seq[Sequence], num_blocks: int) -> Tables:
        """[S, num_blocks], a copy: the first blocks of each sequence, padded with -1."""
        known = self._known
        for seq in seqs:
            count = len(seq.blocks)
            if count != known[seq.slot]:
                self._tables[seq.slot, known[seq.slot] : count] = seq.blocks[known[seq.slot] :]
                known[seq.slot] = count
        return self._tables[[seq.slot for seq in seqs], :num_blocks]


def build_batch(sequences: Seq[SequenceRows], *, block_tokens: int, row_tile: int) -> ForwardBatch:
    """Flatten the rows of all sequences, in order, and pad them to a multiple of `row_tile`.

    Raises ValueError when a block table is too short for its rows: computing on would write over another's block.
    """
    counts = np.array([len(rows.token_ids) for rows in sequences], dtype=np.int64)
    token_ids = np.fromiter(chain.from_iterable(rows.token_ids for rows in sequences), np.int64, int(counts.sum()))
    first = np.array([rows.start for rows in sequences], dtype=np.int64)
    widths = [-(-int(length) // block_tokens) for length in first + counts]
    tables = np.full((len(sequences), max(widths, default=0)), -1, dtype=np.int32)
    for row, rows, width in zip(tables, sequences, widths, strict=True):
        blocks = rows.blocks[:width]
        row[: len(blocks)] = blocks
    return batch_of(token_ids, counts, first, tables, block_tokens=block_tokens, row_tile=row_tile)


def batch_of(
    token_ids_N: Ints, counts_S: Ints, first_S: Ints, tables_SB: Tables, *, block_tokens: int, row_tile: int
) -> ForwardBatch:
    """A batch of `counts_S[i]` adjacent rows of sequence i, whose positions count up from `first_S[i]`.

    Rows are padded to a multiple of `row_tile`. Raises ValueError as `build_batch`.
    """
    num_rows = len(token_ids_N)
    ends = np.cumsum(counts_S)
    seq_of_row = np.repeat(np.arange(len(counts_S)), counts_S)
    positions = np.arange(num_rows) + (first_S - ends + counts_S)[seq_of_row]
    block, offset = np.divmod(positions, block_tokens)
    blocks = tables_SB[seq_of_row, block].astype(np.int64)
    if num_rows and blocks.min() < 0:
        position = positions[int(blocks.argmin())]
        raise ValueError(f"no block for position {position}: the block table is too short")
    padding = -num_rows % row_tile
    if padding:  # it repeats the last row, so that it wakes no further expert
        token_ids_N, positions = (np.append(rows, rows[-1:].repeat(padding)) for rows in (token_ids_N, positions))
    return ForwardBatch(
        token_ids_R=torch.from_numpy(token_ids_N),
        positions_R=torch.from_numpy(positions),
        slots_N=torch.from_numpy(blocks * block_tokens + offset),
        block_tables_SB=torch.from_numpy(tables_SB),
        row_starts=(0, *ends.tolist()),
        context_lens=tuple((first_S + counts_S).tolist()),
    )


def fill_in(token_ids_R: Tensor, late_M: Tensor) -> Tensor:
    """Put token ids that only the device knows, int64, in the places of rows that stand for them."""
    return torch.where(token_ids_R < 0, late_M[(-1 - token_ids_R).clamp_(min=0)], token_ids_R)
