"""What attention needs to know of a batch: which cache slots each row may see, and the rows' rotations.

Rows are put in groups. A prefill chunk is split in groups of consecutive rows of one sequence, which share its slots.
All other rows (decode, draft verification) form groups of similar context length, each row with its own slots.
A slot a row may not see is replaced by the slot of its sequence's first position: whatever stale values the cache
holds there, they are never read, so that not even a NaN can pass through a product with a probability of zero.

Shapes: N real rows, n rows of a group, T positions of a group, a multiple of PLAN_TILE.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from llm_engine.ops import ForwardBatch
from llm_engine.ops_cpu.rope import RopeRows

PLAN_TILE: Final = 128
_MIN_CHUNK_ROWS: Final = 16  # fewer rows of one sequence are treated one by one
_CHUNK_GROUP_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that attention handles together."""

    rows: slice | Tensor  # which of the N rows, ascending
    slots: Tensor  # int64 [n, T], or [T] when the rows share them
    hidden_nT: Tensor  # bool: position t is not visible to the row
    min_visible: int
    max_visible: int

    @property
    def shared(self) -> bool:
        return self.slots.dim() == 1

    def take(self, x_N: Tensor) -> Tensor:
        """The group's rows of a tensor over all rows."""
        return x_N[self.rows] if isinstance(self.rows, slice) else x_N.index_select(0, self.rows)

    def put(self, out_N: Tensor, values_n: Tensor) -> None:
        """Store the group's rows into a tensor over all rows."""
        if isinstance(self.rows, slice):
            out_N[self.rows] = values_n
        else:
            out_N.index_copy_(0, self.rows, values_n)

    def slots_at(self, positions_nK: Tensor) -> Tensor:
        """Slots of visible positions (int64, none negative)."""
        return self.slots[positions_nK] if self.shared else self.slots.gather(1, positions_nK)


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """One batch, ready for every layer's attention."""

    num_rows: int
    slots_N: Tensor
    rope: RopeRows  # of all R rows
    groups: tuple[RowGroup, ...]


def plan(batch: ForwardBatch, *, block_tokens: int, cos_TJ: Tensor, sin_TJ: Tensor) -> CpuPlan:
    """See `llm_engine.ops.spec.Plan`."""
    rope = RopeRows.at(batch.positions_R, cos_TJ, sin_TJ)
    groups = (*_single_groups(batch, block_tokens), *_chunk_groups(batch, block_tokens))
    return CpuPlan(batch.num_rows, batch.slots_N, rope, groups)


def _single_groups(batch: ForwardBatch, block_tokens: int) -> Iterator[RowGroup]:
    members: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)  # bucket → (row, sequence, visible)
    for seq, (first, end) in enumerate(zip(batch.row_starts, batch.row_starts[1:], strict=False)):
        if end - first >= _MIN_CHUNK_ROWS:
            continue
        for row in range(first, end):
            visible = batch.context_lens[seq] - (end - 1 - row)
            members[((visible - 1) // (2 * PLAN_TILE)).bit_length()].append((row, seq, visible))
    for bucket in members.values():
        rows, seqs, lengths = ([member[i] for member in bucket] for i in range(3))
        max_visible = max(lengths)
        tables_nB = batch.block_tables_SB.index_select(0, torch.tensor(seqs))
        slots_nT, hidden_nT = _slots(tables_nB, torch.tensor(lengths).unsqueeze(1), max_visible, block_tokens)
        everything = len(rows) == batch.num_rows
        where = slice(0, len(rows)) if everything else torch.tensor(rows)
        yield RowGroup(where, slots_nT, hidden_nT, min(lengths), max_visible)


def _chunk_groups(batch: ForwardBatch, block_tokens: int) -> Iterator[RowGroup]:
    for seq, (first, end) in enumerate(zip(batch.row_starts, batch.row_starts[1:], strict=False)):
        if end - first < _MIN_CHUNK_ROWS:
            continue
        context_len = batch.context_lens[seq]
        table_1B = batch.block_tables_SB[seq : seq + 1]
        slots_1T, _ = _slots(table_1B, torch.tensor([[context_len]]), context_len, block_tokens)
        for start in range(first, end, _CHUNK_GROUP_ROWS):
            stop = min(start + _CHUNK_GROUP_ROWS, end)
            lowest, highest = context_len - (end - 1 - start), context_len - (end - stop)
            width = -(-highest // PLAN_TILE) * PLAN_TILE
            visible_n1 = torch.arange(lowest, highest + 1).unsqueeze(1)
            hidden_nT = torch.arange(width) >= visible_n1
            yield RowGroup(slice(start, stop), slots_1T[0, :width], hidden_nT, lowest, highest)


def _slots(tables_nB: Tensor, visible_n1: Tensor, max_visible: int, block_tokens: int) -> tuple[Tensor, Tensor]:
    """Slot of every position (invisible ones: the slot of position 0), and which are invisible. Width: whole tiles."""
    width = -(-max_visible // PLAN_TILE) * PLAN_TILE
    positions_T = torch.arange(width)
    blocks_T = positions_T.div(block_tokens, rounding_mode="floor").clamp_(max=tables_nB.shape[1] - 1)
    slots_nT = tables_nB.index_select(1, blocks_T).long().mul_(block_tokens).add_(positions_T % block_tokens)
    hidden_nT = positions_T >= visible_n1
    return torch.where(hidden_nT, slots_nT[:, :1], slots_nT), hidden_nT
