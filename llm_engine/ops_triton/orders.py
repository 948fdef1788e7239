"""Scores as integers that compare like them, in rows that top-k reads: what its kernels share."""

from __future__ import annotations

from typing import Final

import triton.language as tl

from llm_engine.ops_triton.lang import Ptr, Val, inline

ALIGNED: Final = 64  # columns; what lies behind a row's last score, up to a multiple of that, is 0


@inline
def as_order(score: Val) -> Val:
    """fp32 → uint32 that compares likewise; equal for both zeros, 0 for NaN."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    order = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)
    return tl.where(score == score, order, tl.zeros_like(order))


@inline
def load_orders(orders: Ptr, first: Val, count: Val, TILE: tl.constexpr, ALIGNED: tl.constexpr) -> Val:
    """TILE orders of a row of `count` scores, 0 behind them."""
    position = first + tl.arange(0, TILE)
    there = position < tl.cdiv(count, ALIGNED) * ALIGNED
    return tl.load(orders + position, mask=there, other=0).to(tl.uint32, bitcast=True)


@inline
def place_all(sel: Ptr, count: Val, K: tl.constexpr, K_TILE: tl.constexpr) -> None:
    """The selection of a row that has no more than K scores: all of them, then -1."""
    place = tl.arange(0, K_TILE)
    tl.store(sel + place, tl.where(place < count, place, -1), mask=place < K)


@inline
def place_chosen(
    orders: Ptr,
    begin: Val,
    end: Val,
    count: Val,
    sel: Ptr,
    lowest: Val,
    spare: Val,
    placed: Val,
    ties: Val,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Write the chosen positions of [begin, end): all above `lowest`, and of those that equal it the row's first
    `spare`. Before `begin` there are `placed` of the former and `ties` of the latter.
    """
    # Sums of short lines, then of lines, keep nearly all of a running sum within a few threads.
    line = tl.arange(0, TILE // ALIGNED)[:, None] * ALIGNED + tl.arange(0, ALIGNED)[None, :]
    for start in range(begin, end, TILE):
        position = start + line
        there = position < tl.cdiv(count, ALIGNED) * ALIGNED
        order = tl.load(orders + position, mask=there, other=0).to(tl.uint32, bitcast=True)
        larger = order > lowest
        equal = (order == lowest) & (position < count)
        both = larger.to(tl.int32) + (equal.to(tl.int32) << 16)  # two sums at once
        lines = tl.sum(both, 1)
        upto = tl.cumsum(both, 1) + (tl.cumsum(lines, 0) - lines)[:, None]
        rank = ties + (upto >> 16)
        place = placed + (upto & 0xFFFF) + tl.minimum(rank, spare) - 1
        tl.store(sel + place, position, mask=larger | (equal & (rank <= spare)))
        whole = tl.sum(lines, 0)
        placed += whole & 0xFFFF
        ties += whole >> 16
