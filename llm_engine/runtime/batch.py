"""Builds the tensors of one forward pass from plain lists. Work grows with sequences; per token it is vectorised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_engine.ops import ForwardBatch


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """One sequence's part of a pass: `token_ids` at positions `start`, `start` + 1, … of the sequence.

    `blocks` is its block table and covers every position up to the last one computed here; more is allowed.
    A token id of -1 - j stands for the j-th of tokens that only the device knows; see `fill_in`.
    """

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]


def build_batch(sequences: Sequence[SequenceRows], *, block_tokens: int, row_tile: int) -> ForwardBatch:
    """Flatten the rows of all sequences, in order, and pad them to a multiple of `row_tile`.

    Raises ValueError when a block table is too short for its rows: computing on would write over another's block.
    """
    counts = [len(rows.token_ids) for rows in sequences]
    starts = [0, *accumulate(counts)]
    context_lens = [rows.start + count for rows, count in zip(sequences, counts, strict=True)]
    num_rows = starts[-1]
    padded = -(-num_rows // row_tile) * row_tile
    token_ids = np.zeros(padded, dtype=np.int64)
    token_ids[:num_rows] = np.fromiter(chain.from_iterable(s.token_ids for s in sequences), np.int64, num_rows)
    tables = _block_tables(sequences, context_lens, block_tokens)
    seq_of_row = np.repeat(np.arange(len(sequences)), counts)
    positions = np.zeros(padded, dtype=np.int64)
    first_position = np.array([rows.start for rows in sequences], dtype=np.int64)
    positions[:num_rows] = np.arange(num_rows) - np.array(starts[:-1])[seq_of_row] + first_position[seq_of_row]
    if padded > num_rows:  # padding repeats the last row, so that it wakes no further expert
        token_ids[num_rows:], positions[num_rows:] = token_ids[num_rows - 1], positions[num_rows - 1]
    block, offset = np.divmod(positions[:num_rows], block_tokens)
    slots = tables[seq_of_row, block].astype(np.int64) * block_tokens + offset
    return ForwardBatch(
        token_ids_R=torch.from_numpy(token_ids),
        positions_R=torch.from_numpy(positions),
        slots_N=torch.from_numpy(slots),
        block_tables_SB=torch.from_numpy(tables),
        row_starts=tuple(starts),
        context_lens=tuple(context_lens),
    )


def fill_in(token_ids_R: Tensor, late_M: Tensor) -> Tensor:
    """Put token ids that only the device knows, int64, in the places of rows that stand for them."""
    return torch.where(token_ids_R < 0, late_M[(-1 - token_ids_R).clamp_(min=0)], token_ids_R)


def _block_tables(
    sequences: Sequence[SequenceRows], context_lens: Sequence[int], block_tokens: int
) -> npt.NDArray[np.int32]:
    needed = [-(-length // block_tokens) for length in context_lens]
    tables = np.full((len(sequences), max(needed, default=0)), -1, dtype=np.int32)
    for row, rows, count in zip(tables, sequences, needed, strict=True):
        if len(rows.blocks) < count:
            raise ValueError(
                f"{len(rows.blocks)} blocks for {count * block_tokens} positions: the block table is too short"
            )
        row[:count] = rows.blocks[:count]
    return tables
