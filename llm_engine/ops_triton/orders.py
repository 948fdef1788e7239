"""Scores as integers that compare like them, in rows that top-k reads: what its kernels share."""

from __future__ import annotations

import triton.language as tl

from llm_engine.ops_triton.lang import Ptr, Val, inline


@inline
def as_order(score: Val) -> Val:
    """fp32 → uint32 that compares likewise; equal for both zeros, 0 for NaN."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is 0
    order = (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)
    return tl.where(score == score, order, tl.zeros_like(order))


@inline
def load_orders(orders: Ptr, position: Val, count: Val) -> Val:
    """Orders at positions of a row of `count` scores, 0 behind them."""
    return tl.load(orders + position, mask=position < count, other=0).to(tl.uint32, bitcast=True)


@inline
def place_all(sel: Ptr, count: Val, K: tl.constexpr, K_TILE: tl.constexpr) -> None:
    """The selection of a row that has no more than K scores: all of them, then -1."""
    place = tl.arange(0, K_TILE)
    tl.store(sel + place, tl.where(place < count, place, -1), mask=place < K)
