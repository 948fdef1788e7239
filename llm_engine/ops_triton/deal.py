"""Dealing rows to experts: every expert's rows stand together, in whole tiles, in the order of the batch.

All sizes are bounds that follow from the shapes, so nothing is read back from the device. No atomics: the place of a
choice is the number of equal choices before it.

Shapes: R rows, K choices a row, E experts, M rows of a tile, T tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.lang import Ptr, Val, await_inputs, ceil_div, inline, kernel, let_next_in, tile_size

_SCAN, _LONG_SCAN = 1024, 8192  # choices that a program looks at together: of few, and of many


@dataclass(frozen=True, slots=True)
class Deal:
    """Where each choice went. Slot s is row s % M of tile s // M."""

    slot_of_choice_RK: Tensor  # int32
    row_of_slot: Tensor  # int32 [T · M], -1: nobody
    expert_of_tile_T: Tensor  # int32, -1: the tile is not used
    tile_rows: int  # M

    @property
    def num_tiles(self) -> int:
        """T, an upper bound of the tiles in use."""
        return self.expert_of_tile_T.shape[0]


@dataclass(frozen=True, slots=True)
class SingleDeal:
    """A single row needs no dealing: choice k has the first slot of tile k, and behind them comes expert `last`."""

    ids_K: Tensor
    with_shared: bool
    last: int
    tile_rows: int

    @property
    def num_tiles(self) -> int:
        """T."""
        return self.ids_K.shape[0] + self.with_shared


def deal(ids_RK: Tensor, experts: int, tile_rows: int, *, with_shared: bool) -> Deal:
    """Deal rows to their chosen experts; `with_shared`: and all rows to the last expert, which no id names."""
    rows, top_k = ids_RK.shape
    width = top_k + with_shared
    choices = rows * width
    tiles = min(choices, ceil_div(choices, tile_rows) + min(experts, choices))
    counts_E = ids_RK.new_empty(experts, dtype=torch.int32)
    slot_of_choice = ids_RK.new_empty(rows, width, dtype=torch.int32)
    row_of_slot = ids_RK.new_empty(tiles * tile_rows, dtype=torch.int32)
    expert_of_tile = ids_RK.new_empty(tiles, dtype=torch.int32)
    ids_RK = ids_RK.contiguous()
    scan, warps = (_SCAN, 4) if choices <= _LONG_SCAN else (_LONG_SCAN, 8)
    _count[(experts,)](ids_RK, counts_E, choices, top_k, width, experts, scan, num_warps=warps)
    _place[(experts,)](
        ids_RK, counts_E, slot_of_choice, row_of_slot, expert_of_tile, choices, tiles,
        top_k, width, experts, tile_size(experts), tile_rows, scan, num_warps=warps,
    )  # fmt: skip
    return Deal(slot_of_choice, row_of_slot, expert_of_tile, tile_rows)


@inline
def _chosen(ids: Ptr, choice: Val, num_choices: Val, K: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr) -> Val:
    """Expert of each choice; -1 beyond the last one."""
    rank = choice % WIDTH
    named = tl.load(ids + (choice // WIDTH) * K + rank, mask=(choice < num_choices) & (rank < K), other=E - 1)
    return tl.where(choice < num_choices, named.to(tl.int32), -1)


@kernel
def _count(
    ids: Ptr,
    counts: Ptr,
    num_choices: int,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    SCAN: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    expert = tl.program_id(0)
    count = tl.zeros((SCAN,), tl.int32)
    for start in range(0, num_choices, SCAN):
        count += (_chosen(ids, start + tl.arange(0, SCAN), num_choices, K, WIDTH, E) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(count, 0))


@kernel
def _place(
    ids: Ptr,
    counts: Ptr,
    slot_of_choice: Ptr,
    row_of_slot: Ptr,
    expert_of_tile: Ptr,
    num_choices: int,
    num_tiles: int,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    E_TILE: tl.constexpr,
    M: tl.constexpr,
    SCAN: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    expert = tl.program_id(0)
    each = tl.arange(0, E_TILE)
    tiles = (tl.load(counts + each, mask=each < E, other=0) + M - 1) // M
    first = tl.sum(tl.where(each < expert, tiles, 0), 0)
    own = tl.sum(tl.where(each == expert, tiles, 0), 0)
    used = tl.sum(tiles, 0)
    scan = tl.arange(0, SCAN)
    placed = 0
    for start in range(0, num_choices, SCAN):
        choice = start + scan
        mine = _chosen(ids, choice, num_choices, K, WIDTH, E) == expert
        rank = placed + tl.cumsum(mine.to(tl.int32), 0) - 1
        slot = first * M + rank
        tl.store(slot_of_choice + choice, slot, mask=mine)
        tl.store(row_of_slot + slot, choice // WIDTH, mask=mine)
        placed += tl.sum(mine.to(tl.int32), 0)
    for start in range(placed, own * M, SCAN):
        tl.store(row_of_slot + first * M + start + scan, -1, mask=start + scan < own * M)
    for start in range(0, own, SCAN):
        tl.store(expert_of_tile + first + start + scan, expert, mask=start + scan < own)
    if expert == E - 1:
        for start in range(used, num_tiles, SCAN):
            tl.store(expert_of_tile + start + scan, -1, mask=start + scan < num_tiles)
