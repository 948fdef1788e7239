"""Exact top-k of rows of different lengths: positions ascending, the lowest position wins a tie. One program a row.

Scores count as unsigned integers of the same order. The smallest chosen one is found by halving an interval until
as many scores as wanted lie above its lower end, or nothing else lies in it. A row stays in registers meanwhile: whole
while short, as its upper and then its lower halves of 16 bits when long; only rows beyond that are read again at every
step. Counting and the order of the result do not depend on scheduling, so equal scores give equal choices on every
rank.

Shapes: M rows, T positions, K chosen.
"""

from __future__ import annotations

import math
from typing import Final

import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.lang import Ptr, Val, inline, kernel, tile_size

_SHORT: Final = 8192  # scores
_MIDDLE: Final = 32768
_LONG: Final = 65536
_WARPS: Final = {_SHORT: 16, _MIDDLE: 32, _LONG: 32, 2 * _LONG: 32}


def choose(scores_MT: Tensor, visible_M: Tensor, sel_MK: Tensor) -> None:
    """Fill `sel` (int32) with the K best of the first `visible` scores of each row; all of them, then -1, if fewer.

    Rows of `scores` are adjacent. A width of some multiple of 128 is read fastest.
    """
    (rows, k), width = sel_MK.shape, scores_MT.shape[1]
    assert scores_MT.is_contiguous(), "rows of scores are adjacent"
    if not rows:
        return
    longest = next((size for size in _WARPS if width <= size), 2 * _LONG)
    aligned = math.gcd(width, 128)
    _choose[(rows,)](
        scores_MT, visible_M, sel_MK, width // aligned, k, tile_size(k), aligned, min(_SHORT, tile_size(width, 16)),
        _MIDDLE, _LONG, longest, num_warps=_WARPS[longest],
    )  # fmt: skip


@inline
def _load_order(scores: Ptr, first: Val, count: Val, TILE: tl.constexpr, COLUMNS: tl.constexpr) -> Val:
    """Scores as unsigned integers that compare like them; equal for both zeros, lowest for NaN, 0 beyond `count`."""
    position = first + tl.arange(0, TILE)
    score = tl.load(scores + position, mask=position < tl.cdiv(count, COLUMNS) * COLUMNS, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    order = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)
    return tl.where((score == score) & (position < count), order, tl.zeros_like(order))


@inline
def _halve(
    low: Val, high: Val, at_low: Val, at_high: Val, middle: Val, at_middle: Val, K: tl.constexpr
) -> tuple[Val, Val, Val, Val]:
    """The half of an interval in which the K-th score lies. `at_…`: how many scores are at least that."""
    enough = at_middle >= K
    return (
        tl.where(enough, middle, low),
        tl.where(enough, high, middle),
        tl.where(enough, at_middle, at_low),
        tl.where(enough, at_high, at_middle),
    )


@inline
def _result(low: Val, at_low: Val, at_high: Val, K: tl.constexpr) -> tuple[Val, Val]:
    """(lowest, spare): chosen are all above `lowest` and the first `spare` that equal it."""
    untied = (at_low == K) & (low > 0)
    return tl.where(untied, low - 1, low), tl.where(untied, 0, K - at_high)


@inline
def _digits(
    scores: Ptr, first: Val, count: Val, low: Val, shift: Val, bits: Val, PAIRS: tl.constexpr, COLUMNS: tl.constexpr
) -> Val:
    """`bits` at `shift` of 2 · PAIRS scores, two in a number, each under a set bit; 0 if `low` differs above them.

    Subtracting another digit leaves the set bit of those that are at least that.
    """
    prefix, mask = low >> shift >> bits, (tl.full((), 1, tl.uint32) << bits) - 1
    one = _load_order(scores, first, count, PAIRS, COLUMNS) >> shift
    one = tl.where((one >> bits) == prefix, one & mask, tl.zeros_like(one))
    other = _load_order(scores, first + PAIRS, count, PAIRS, COLUMNS) >> shift
    other = tl.where((other >> bits) == prefix, other & mask, tl.zeros_like(other))
    return (one << 16) | other | 0x80008000


@inline
def _reach(pairs: Val, digits: Val) -> Val:
    return ((pairs - digits) >> 15) & 0x00010001


@inline
def _cut_resident(
    scores: Ptr, count: Val, K: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr
) -> tuple[Val, Val]:
    """See _result; `count` is above K. Digits of up to 15 bits at a time are in registers, in four parts."""
    part: tl.constexpr = TILE // 8
    low, high = tl.full((), 0, tl.uint32), tl.full((), 0x8000, tl.uint32) << 16 << 1  # 2³², which is 0
    at_low, at_high = count, tl.full((), 0, tl.int32)
    for step in range(3):
        shift, bits = tl.where(step == 0, 17, tl.where(step == 1, 2, 0)), tl.where(step == 2, 2, 15)
        if at_low != K:
            base = (low >> shift >> bits) << bits
            a = _digits(scores, 0, count, low, shift, bits, part, COLUMNS)
            b = _digits(scores, 2 * part, count, low, shift, bits, part, COLUMNS)
            c = _digits(scores, 4 * part, count, low, shift, bits, part, COLUMNS)
            d = _digits(scores, 6 * part, count, low, shift, bits, part, COLUMNS)
            beyond = at_high
            lower, upper = (low >> shift) - base, ((high - 1) >> shift) + 1 - base
            while (upper - lower > 1) & (at_low != K):
                middle = lower + ((upper - lower) >> 1)
                both = middle | (middle << 16)
                sums = tl.sum(_reach(a, both) + _reach(b, both) + _reach(c, both) + _reach(d, both), 0)
                at_middle = beyond + (sums & 0xFFFF).to(tl.int32) + (sums >> 16).to(tl.int32)
                lower, upper, at_low, at_high = _halve(lower, upper, at_low, at_high, middle, at_middle, K)
            low, high = (base + lower) << shift, (base + upper) << shift
    return _result(low, at_low, at_high, K)


@inline
def _cut_streamed(
    scores: Ptr, count: Val, K: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr
) -> tuple[Val, Val]:
    """_cut_resident of a row that is read again at every step."""
    low, high = tl.full((), 0, tl.uint32), tl.full((), 0xFFFFFFFF, tl.uint32)
    at_low, at_high = count, tl.full((), 0, tl.int32)
    while (high - low > 1) & (at_low != K):
        middle = low + ((high - low) >> 1)
        counts = tl.zeros((TILE,), tl.int32)
        for start in range(0, count, TILE):
            counts += (_load_order(scores, start, count, TILE, COLUMNS) >= middle).to(tl.int32)
        at_middle = tl.sum(counts, 0)
        low, high, at_low, at_high = _halve(low, high, at_low, at_high, middle, at_middle, K)
    return _result(low, at_low, at_high, K)


@kernel
def _choose(
    scores: Ptr,
    visible: Ptr,
    sel: Ptr,
    num_columns: int,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHORT: tl.constexpr,
    MIDDLE: tl.constexpr,
    LONG: tl.constexpr,
    LONGEST: tl.constexpr,
) -> None:
    """`num_columns`: of a row, in COLUMNS. No row is longer than LONGEST, unless that is more than LONG."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(visible + row)
    sel += row * K
    if count <= K:
        place = tl.arange(0, K_TILE)
        tl.store(sel + place, tl.where(place < count, place, -1), mask=place < K)
        return
    scores += row * num_columns * COLUMNS
    lowest, spare = tl.full((), 0, tl.uint32), tl.full((), 0, tl.int32)
    if count <= SHORT:
        lowest, spare = _cut_resident(scores, count, K, SHORT, COLUMNS)
    if (LONGEST > SHORT) & (count > SHORT) & (count <= MIDDLE):
        lowest, spare = _cut_resident(scores, count, K, MIDDLE, COLUMNS)
    if (LONGEST > MIDDLE) & (count > MIDDLE) & (count <= LONG):
        lowest, spare = _cut_resident(scores, count, K, LONG, COLUMNS)
    if (LONGEST > LONG) & (count > LONG):
        lowest, spare = _cut_streamed(scores, count, K, MIDDLE // 2, COLUMNS)
    _place(scores, count, sel, lowest, spare, SHORT, COLUMNS)


@inline
def _place(
    scores: Ptr, count: Val, sel: Ptr, lowest: Val, spare: Val, TILE: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    """Write the chosen positions."""
    above, ties = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)  # so far
    for start in range(0, count, TILE):
        position = start + tl.arange(0, TILE)
        order = _load_order(scores, start, count, TILE, COLUMNS)
        larger = order > lowest
        equal = (order == lowest) & (position < count)
        both = larger.to(tl.int32) + (equal.to(tl.int32) << 16)  # two sums at once
        upto = tl.cumsum(both, 0)
        rank = ties + (upto >> 16)
        place = above + (upto & 0xFFFF) + tl.minimum(rank, spare) - 1
        tl.store(sel + place, position, mask=larger | (equal & (rank <= spare)))
        whole = tl.sum(both, 0)
        above += whole & 0xFFFF
        ties += whole >> 16
