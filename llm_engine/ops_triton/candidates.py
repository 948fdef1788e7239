"""Exact choice among the scores of a row that reach some bound: what the ways of `topk` share.

A sample of a row tells a bound that somewhat more scores than wanted are likely to reach. The caller gathers those that
do, segment by segment and in order, and the choice is made among them. Should they be too few or too many for that, as
among equal scores, the row is read again and again to narrow an interval around the smallest chosen score. Either way
the result is the same, exactly.

Shapes: T positions, K chosen, S segments.
"""

from __future__ import annotations

from typing import Final

import triton.language as tl

from llm_engine.ops_triton.lang import Ptr, Val, inline, tile_size
from llm_engine.ops_triton.orders import load_orders

SAMPLED: Final = 2048  # scores of a row
_FEWEST: Final = 8192  # places for candidates
_SPARE: Final = 4  # places, as a multiple of how many scores are chosen


def num_places(k: int) -> int:
    """For candidates of a row, of which registers hold as many. They are at least twice SAMPLED."""
    return max(_FEWEST, _SPARE * tile_size(k))


@inline
def _halve(
    low: Val, high: Val, at_low: Val, at_high: Val, middle: Val, at_middle: Val, wanted: Val
) -> tuple[Val, Val, Val, Val]:
    """The part of an interval, below or above `middle`, in which the `wanted`-th score lies.

    `at_…`: how many scores are at least that.
    """
    up, down = (at_middle >= wanted) & (middle > low), (at_middle < wanted) & (middle < high)
    return (
        tl.where(up, middle, low),
        tl.where(down, middle, high),
        tl.where(up, at_middle, at_low),
        tl.where(down, at_middle, at_high),
    )


@inline
def _narrow(
    orders: Val, low: Val, high: Val, at_low: Val, at_high: Val, wanted: Val, enough: Val
) -> tuple[Val, Val, Val]:
    """(low, at_low, at_high): the interval around the `wanted`-th of scores in registers, once no more than `enough`
    are at least its lower end, or nothing lies between its ends.
    """
    while (high - low > 1) & (at_low > enough):
        middle = low + ((high - low) >> 1)
        at_middle = tl.sum((orders >= middle).to(tl.int32))
        low, high, at_low, at_high = _halve(low, high, at_low, at_high, middle, at_middle, wanted)
    return low, at_low, at_high


@inline
def _narrow_streamed(
    orders: Ptr, count: Val, low: Val, high: Val, at_low: Val, at_high: Val, K: tl.constexpr, TILE: tl.constexpr,
) -> tuple[Val, Val, Val]:  # fmt: skip
    """`_narrow` to the K-th of a row that is read again at every step. Rows have less than 1024 tiles."""
    while (high - low > 1) & (at_low > K):
        step = tl.maximum((high - low) >> 2, 1)
        a, b, c = low + step, low + 2 * step, low + 3 * step
        counts = tl.zeros((TILE,), tl.int32)  # three, of ten bits
        for start in range(0, count, TILE):
            order = load_orders(orders, start + tl.arange(0, TILE), count)
            counts += tl.where(order >= a, 1, 0) + tl.where(order >= b, 1 << 10, 0) + tl.where(order >= c, 1 << 20, 0)
        low, high, at_low, at_high = _halve(low, high, at_low, at_high, a, tl.sum(counts & 1023), K)
        low, high, at_low, at_high = _halve(low, high, at_low, at_high, b, tl.sum((counts >> 10) & 1023), K)
        low, high, at_low, at_high = _halve(low, high, at_low, at_high, c, tl.sum(counts >> 20), K)
    return low, at_low, at_high


@inline
def _result(low: Val, at_low: Val, at_high: Val, K: tl.constexpr) -> tuple[Val, Val]:
    """(lowest, spare): chosen are all above `lowest` and the first `spare` that equal it."""
    untied = (at_low == K) & (low > 0)
    return tl.where(untied, low - 1, low), tl.where(untied, 0, K - at_high)


@inline
def bound_of(orders: Ptr, count: Val, aim: Val, SAMPLED: tl.constexpr, LEEWAY: tl.constexpr) -> Val:
    """What about `aim` scores of a row are at least, by SAMPLED of them that are spread over the row; up to a
    LEEWAY-th more of those may reach it. For a row of no more than `aim`: 1, which all are at least but NaN.
    """
    low = tl.full((), 1, tl.uint32)
    if count > aim:
        index = tl.arange(0, SAMPLED)
        position = index // 8 * (count // 8) // (SAMPLED // 8) * 8 + index % 8  # eight neighbours are read together
        sample = tl.load(orders + position).to(tl.uint32, bitcast=True)
        high, zero = tl.full((), 0xFFFFFFFF, tl.uint32), tl.full((), 0, tl.int32)
        wanted = tl.maximum((aim.to(tl.int64) * SAMPLED // count).to(tl.int32), 1)
        low, _, _ = _narrow(sample, low, high, zero + SAMPLED, zero, wanted, wanted + wanted // LEEWAY)
    return low


@inline
def _lines(nums: Val, index: Val, PLACES: tl.constexpr) -> tuple[Val, Val]:
    """Where lines of 32 scores begin that segments of `nums` scores, PLACES apart, consist of; how many are left there,
    which is 0 or less where there is no such line.
    """
    lines = tl.cdiv(nums, 32)
    passed = tl.cumsum(lines, 0)[None, :] <= index[:, None]
    segment = tl.sum(passed.to(tl.int32), 1)
    within = (index - tl.sum(tl.where(passed, lines[None, :], 0), 1)) * 32
    own = tl.arange(0, nums.shape[0])[None, :] == segment[:, None]
    return segment * PLACES + within, tl.sum(tl.where(own, nums[None, :], 0), 1) - within


@inline
def _load_lines(orders: Ptr, nums: Val, first: Val, LINES: tl.constexpr, PLACES: tl.constexpr) -> tuple[Val, Val, Val]:
    """Orders of [32, LINES] scores, where they are, and which there are."""
    lane = tl.arange(0, 32)[:, None]
    line, left = _lines(nums, first + tl.arange(0, LINES), PLACES)
    at, there = lane + line[None, :], lane < left[None, :]
    return tl.load(orders + at, mask=there, other=0).to(tl.uint32, bitcast=True), at, there


@inline
def _place(
    orders: Ptr, positions: Ptr | None, nums: Val, sel: Ptr, lowest: Val, spare: Val, LINES: tl.constexpr,
    PLACES: tl.constexpr,
) -> None:  # fmt: skip
    """Write the chosen positions, LINES at a time: all above `lowest`, and of those that equal it the first `spare`."""
    placed, ties = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for first in range(0, tl.sum(tl.cdiv(nums, 32), 0), LINES):
        order, at, there = _load_lines(orders, nums, first, LINES, PLACES)
        larger, equal = order > lowest, (order == lowest) & there
        both = larger.to(tl.int32) + (equal.to(tl.int32) << 16)  # two sums at once
        # Sums of short lines, then of lines, keep nearly all of a running sum within a warp.
        lines = tl.sum(both, 0)
        upto = tl.cumsum(both, 0) + (tl.cumsum(lines, 0) - lines)[None, :]
        rank = ties + (upto >> 16)
        chosen = larger | (equal & (rank <= spare))
        position = at if positions is None else tl.load(positions + at, mask=chosen, other=0)
        tl.store(sel + placed + (upto & 0xFFFF) + tl.minimum(rank, spare) - 1, position, mask=chosen)
        whole = tl.sum(lines, 0)
        placed += whole & 0xFFFF
        ties += whole >> 16


@inline
def choose_among(
    orders: Ptr, positions: Ptr | None, nums: Val, low: Val, sel: Ptr, K: tl.constexpr, TILE: tl.constexpr,
    LINES: tl.constexpr, PLACES: tl.constexpr,
) -> None:  # fmt: skip
    """Choose from segments of `nums` scores, none below `low`, that are TILE or fewer in all, but no less than K.

    `positions`: of the scores, which are those of a row unless given.
    """
    order, _, _ = _load_lines(orders, nums, 0, TILE // 32, PLACES)
    high, zero = tl.max(order) + 1, tl.full((), 0, tl.int32)
    low, at_low, at_high = _narrow(order, low, high, tl.sum(nums, 0), zero, K, K)
    lowest, spare = _result(low, at_low, at_high, K)
    _place(orders, positions, nums, sel, lowest, spare, LINES, PLACES)


@inline
def they_serve(nums: Val, K: tl.constexpr, TILE: tl.constexpr, PLACES: tl.constexpr) -> Val:
    """Whether segments of `nums` candidates, up to PLACES of each, hold the K best and no more than TILE."""
    return (tl.sum(nums, 0) >= K) & (tl.max(nums, 0) <= PLACES) & (tl.sum(tl.cdiv(nums, 32), 0) <= TILE // 32)


@inline
def choose_gathered(
    orders: Ptr, count: Val, bound: Val, nums: Val, candidates: Ptr, positions: Ptr, sel: Ptr, K: tl.constexpr,
    TILE: tl.constexpr, LINES: tl.constexpr, PLACES: tl.constexpr, STREAMED: tl.constexpr,
) -> None:  # fmt: skip
    """Choose from a row of more than K scores, of whose segments `nums` are at least `bound`.

    Of each segment up to PLACES of those are `candidates`. They serve if there are enough of them and no more than
    TILE in lines of 32; otherwise the row itself is read.
    """
    num = tl.sum(nums, 0)
    if they_serve(nums, K, TILE, PLACES):
        choose_among(candidates, positions, nums, bound, sel, K, TILE, LINES, PLACES)
    else:
        over = num > K
        low, high = tl.where(over, bound, 0), tl.where(over, tl.full((), 0xFFFFFFFF, tl.uint32), bound)
        at_low, at_high = tl.where(over, num, count), tl.where(over, 0, num)
        low, at_low, at_high = _narrow_streamed(orders, count, low, high, at_low, at_high, K, STREAMED)
        lowest, spare = _result(low, at_low, at_high, K)
        _place(orders, None, tl.zeros((1,), tl.int32) + count, sel, lowest, spare, LINES, PLACES)
