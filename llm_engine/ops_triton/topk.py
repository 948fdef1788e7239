"""Exact top-k of rows of different lengths: positions ascending, the lowest position wins a tie.

One program takes a row; few long rows are cut into chunks (`topk_chunks`), with the same result.

Scores come as unsigned integers that compare like them (`as_order`). The smallest chosen one is found by halving an
interval until as many scores as wanted lie above its lower end, or nothing else lies in it. Meanwhile a row stays in
registers, some of its bits at a time; only one too long for that is read again at every step. Counting and the order
of the result do not depend on scheduling, so equal scores give equal choices on every rank.

Shapes: M rows, T positions, K chosen.
"""

from __future__ import annotations

from typing import Final

import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.lang import Ptr, Val, await_inputs, inline, kernel, tile_size
from llm_engine.ops_triton.orders import ALIGNED, load_orders, place_all, place_chosen
from llm_engine.ops_triton.topk_chunks import choose_by_chunks, chunk_width

_TIERS: Final = (8192, 16384, 32768, 65536)  # scores that registers hold, and for how many they are laid out
_FEW_WARPS: Final = 8  # up to the first tier
_WARPS: Final = 16
_PLACED_BY_WARP: Final = 256  # scores at a time


def choose(orders_MT: Tensor, visible_M: Tensor, sel_MK: Tensor) -> None:
    """Fill `sel` (int32) with the K best of the first `visible` scores of each row; all of them, then -1, if fewer.

    `orders`: int32, the bits of `as_order`. Rows are adjacent and a multiple of ALIGNED wide.
    """
    rows, width = orders_MT.shape
    assert orders_MT.is_contiguous(), "rows of scores are adjacent"
    assert width % ALIGNED == 0, "rows of scores are aligned"
    if not rows:
        return
    chunk = chunk_width(rows, width)
    if chunk is None:
        choose_by_rows(orders_MT, visible_M, sel_MK)
    else:
        choose_by_chunks(orders_MT, visible_M, sel_MK, chunk)


def choose_by_rows(orders_MT: Tensor, visible_M: Tensor, sel_MK: Tensor) -> None:
    """`choose` with one program a row."""
    (rows, k), width = sel_MK.shape, orders_MT.shape[1]
    longest = next((tier for tier in _TIERS if width <= tier), 2 * _TIERS[-1])
    tiers = (min(_TIERS[0], tile_size(width)), *_TIERS[1:])
    warps = _FEW_WARPS if longest == _TIERS[0] else _WARPS
    placed = min(tile_size(width), warps * _PLACED_BY_WARP)
    _choose[(rows,)](
        orders_MT, visible_M, sel_MK, width // ALIGNED, k, tile_size(k), ALIGNED, *tiers, longest, placed,
        num_warps=warps,
    )  # fmt: skip


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
    orders: Ptr, first: Val, count: Val, low: Val, shift: Val, bits: Val, PAIRS: tl.constexpr, ALIGNED: tl.constexpr
) -> Val:
    """`bits` at `shift` of 2 · PAIRS scores, two in a number, each under a set bit; 0 if `low` differs above them.

    Subtracting another digit leaves the set bit of those that are at least that.
    """
    prefix, mask = low >> shift >> bits, (tl.full((), 1, tl.uint32) << bits) - 1
    one = load_orders(orders, first, count, PAIRS, ALIGNED) >> shift
    one = tl.where((one >> bits) == prefix, one & mask, tl.zeros_like(one))
    other = load_orders(orders, first + PAIRS, count, PAIRS, ALIGNED) >> shift
    other = tl.where((other >> bits) == prefix, other & mask, tl.zeros_like(other))
    return (one << 16) | other | 0x80008000


@inline
def _reach(pairs: Val, digits: Val) -> Val:
    return ((pairs - digits) >> 15) & 0x00010001


@inline
def _cut_resident(
    orders: Ptr, count: Val, K: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr
) -> tuple[Val, Val]:
    """See _result; `count` is above K. Digits of up to 15 bits at a time are in registers, in four parts."""
    part: tl.constexpr = TILE // 8
    low, high = tl.full((), 0, tl.uint32), tl.full((), 0, tl.uint32)  # 0 stands for 2³²
    at_low, at_high = count, tl.full((), 0, tl.int32)
    for step in range(3):
        shift, bits = tl.where(step == 0, 17, tl.where(step == 1, 2, 0)), tl.where(step == 2, 2, 15)
        if at_low != K:
            base = (low >> shift >> bits) << bits
            a = _digits(orders, 0, count, low, shift, bits, part, ALIGNED)
            b = _digits(orders, 2 * part, count, low, shift, bits, part, ALIGNED)
            c = _digits(orders, 4 * part, count, low, shift, bits, part, ALIGNED)
            d = _digits(orders, 6 * part, count, low, shift, bits, part, ALIGNED)
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
    orders: Ptr, count: Val, K: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr
) -> tuple[Val, Val]:
    """_cut_resident of a row that is read again at every step."""
    low, high = tl.full((), 0, tl.uint32), tl.full((), 0xFFFFFFFF, tl.uint32)
    at_low, at_high = count, tl.full((), 0, tl.int32)
    while (high - low > 1) & (at_low != K):
        middle = low + ((high - low) >> 1)
        counts = tl.zeros((TILE,), tl.int32)
        for start in range(0, count, TILE):
            counts += (load_orders(orders, start, count, TILE, ALIGNED) >= middle).to(tl.int32)
        low, high, at_low, at_high = _halve(low, high, at_low, at_high, middle, tl.sum(counts, 0), K)
    return _result(low, at_low, at_high, K)


@kernel
def _choose(
    orders: Ptr,
    visible: Ptr,
    sel: Ptr,
    num_columns: int,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TIER_1: tl.constexpr,
    TIER_2: tl.constexpr,
    TIER_3: tl.constexpr,
    TIER_4: tl.constexpr,
    LONGEST: tl.constexpr,
    PLACED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """`num_columns`: of a row, in units of ALIGNED. LONGEST: the tier that holds them, beyond the last if none does."""
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(visible + row)
    sel += row * K
    if count <= K:
        place_all(sel, count, K, K_TILE)
        return
    orders += row * num_columns * ALIGNED
    lowest, spare = tl.full((), 0, tl.uint32), tl.full((), 0, tl.int32)
    if count <= TIER_1:
        lowest, spare = _cut_resident(orders, count, K, TIER_1, ALIGNED)
    if (LONGEST > TIER_1) & (count > TIER_1) & (count <= TIER_2):
        lowest, spare = _cut_resident(orders, count, K, TIER_2, ALIGNED)
    if (LONGEST > TIER_2) & (count > TIER_2) & (count <= TIER_3):
        lowest, spare = _cut_resident(orders, count, K, TIER_3, ALIGNED)
    if (LONGEST > TIER_3) & (count > TIER_3) & (count <= TIER_4):
        lowest, spare = _cut_resident(orders, count, K, TIER_4, ALIGNED)
    if (LONGEST > TIER_4) & (count > TIER_4):
        lowest, spare = _cut_streamed(orders, count, K, TIER_2, ALIGNED)
    zero = tl.full((), 0, tl.int32)
    place_chosen(orders, 0, count, count, sel, lowest, spare, zero, zero, PLACED, ALIGNED)
