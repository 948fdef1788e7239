"""Exact top-k of rows of different lengths: positions ascending, the lowest position wins a tie. One program a row.

The smallest chosen score is found digit by digit, eight bits at a time from the highest, by counting. Counting and the
order of the result do not depend on scheduling, so equal scores give equal choices on every rank.

Shapes: M rows, T positions, K chosen.
"""

from __future__ import annotations

from typing import Final

import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.lang import Ptr, Val, inline, kernel, tile_size

_TILE: Final = 4096


def choose(scores_MT: Tensor, visible_M: Tensor, sel_MK: Tensor) -> None:
    """Fill `sel` (int32) with the K best of the first `visible` scores of each row; all of them, then -1, if fewer."""
    rows, k = sel_MK.shape
    tile = min(_TILE, tile_size(scores_MT.shape[1]))
    if rows:
        _choose[(rows,)](scores_MT, visible_M, sel_MK, scores_MT.stride(0), k, tile_size(k), tile, num_warps=8)


@inline
def _as_order(score: Val) -> Val:
    """Scores as unsigned integers that compare like them; equal for both zeros, lowest for NaN."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    order = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)
    return tl.where(score == score, order, tl.zeros_like(order))


@inline
def _count_digits(scores: Ptr, count: Val, lowest: Val, shift: Val, TILE: tl.constexpr) -> Val:
    """How many entries have each digit at bit `shift`, of those that equal `lowest` above it. Digit 256: all others."""
    counts = tl.zeros((512,), tl.int32)
    for start in range(0, count, TILE):
        position = start + tl.arange(0, TILE)
        order = _as_order(tl.load(scores + position, mask=position < count, other=0.0))
        # Shifting by 8 and by the rest: a shift by all 32 bits is undefined.
        alive = (position < count) & ((order >> shift >> 8) == (lowest >> shift >> 8))
        counts += tl.histogram(tl.where(alive, ((order >> shift) & 255).to(tl.int32), 256), 512)
    return counts


@kernel
def _choose(
    scores: Ptr,
    visible: Ptr,
    sel: Ptr,
    num_columns: int,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(visible + row)
    sel += row * K
    if count <= K:
        place = tl.arange(0, K_TILE)
        tl.store(sel + place, tl.where(place < count, place, -1), mask=place < K)
        return
    scores += row * num_columns
    lane, digits = tl.arange(0, TILE), tl.arange(0, 512)
    lowest = tl.full((), 0, tl.uint32)
    spare = tl.full((), K, tl.int32)  # how many entries equal to `lowest`, as far as it is known, are chosen
    for byte in range(4):
        shift = 24 - 8 * byte
        counts = tl.where(digits < 256, _count_digits(scores, count, lowest, shift, TILE), 0)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # entries with a larger digit
        found = tl.max(tl.where((above + counts >= spare) & (digits < 256), digits, 0), 0)
        spare -= tl.sum(tl.where(digits == found, above, 0), 0)
        lowest = lowest | (found.to(tl.uint32) << shift)
    placed = tl.full((), 0, tl.int32)
    for start in range(0, count, TILE):
        position = start + lane
        order = _as_order(tl.load(scores + position, mask=position < count, other=0.0))
        inside = position < count
        equal = inside & (order == lowest)
        rank = tl.cumsum(equal.to(tl.int32), 0)
        chosen = (inside & (order > lowest)) | (equal & (rank <= spare))
        place = placed + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(sel + place, position, mask=chosen)
        placed += tl.sum(chosen.to(tl.int32), 0)
        spare -= tl.sum(equal.to(tl.int32), 0)  # below zero once all are placed
