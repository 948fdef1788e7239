"""Exact top-k of rows of different lengths: positions ascending, the lowest position wins a tie.

One program takes a row at a time. It reads a row once: a sample of it tells a bound that somewhat more scores than
wanted are likely to reach, those that do are gathered in order, and the choice is made among them. Should they be too
few or too many for that, as among equal scores, the row is read again and again to narrow an interval around the
smallest chosen score. Either way the result is the same, exactly.

Scores come as unsigned integers that compare like them (`as_order`). Counting and the order of the result do not
depend on scheduling, so equal scores give equal choices on every rank.

Shapes: M rows, T positions, K chosen, P programs, C places for candidates.
"""

from __future__ import annotations

from typing import Final

import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.candidates import SAMPLED, bound_of, choose_among, choose_gathered, num_places, they_serve
from llm_engine.ops_triton.lang import Ptr, Val, await_inputs, inline, kernel, nvidia_arch, tile_size
from llm_engine.ops_triton.orders import load_orders, place_all
from llm_engine.ops_triton.topk_chunks import choose_by_chunks, chunk_width

_FEW: Final = 264  # rows: two for every processor
_WARPS: Final = 8
_MOST_WARPS: Final = 4224  # that choose from many rows: 32 for every processor
_REGISTERS: Final = 64  # of a thread then, at most, on Nvidia's cards
_SHORT_REGISTERS: Final = 80
_LINES: Final = 64  # placed at a time
_LONG: Final = 32768  # scores, of which a larger sample is worth its time


def choose(orders_MT: Tensor, visible_M: Tensor, sel_MK: Tensor) -> None:
    """Fill `sel` (int32) with the K best of the first `visible` scores of each row; all of them, then -1, if fewer.

    `orders`: int32, the bits of `as_order`. Rows are adjacent; what lies behind a row's last score is not read.
    """
    (rows, k), width = sel_MK.shape, orders_MT.shape[1]
    assert orders_MT.is_contiguous(), "rows of scores are adjacent"
    if not rows:
        return
    chunk = chunk_width(rows, width, k)
    if chunk is None:
        choose_by_rows(orders_MT, visible_M, sel_MK)
    else:
        choose_by_chunks(orders_MT, visible_M, sel_MK, chunk)


def choose_by_rows(orders_MT: Tensor, visible_M: Tensor, sel_MK: Tensor) -> None:
    """`choose` with one program a row."""
    (rows, k), width = sel_MK.shape, orders_MT.shape[1]
    most = num_places(k)
    short, many = width <= most, rows > _FEW
    # Where rows are many, what counts is how many programs a processor holds.
    if many and not short:
        _choose_from_many(orders_MT, visible_M, sel_MK, most // 2)
        return
    tile = min(tile_size(width, 32), most)
    candidates_P2SC = orders_MT.new_empty(0 if short else rows, 2, _WARPS, most // 2)
    registers = {"maxnreg": _SHORT_REGISTERS} if many and nvidia_arch() else {}
    _choose[(rows,)](
        orders_MT, visible_M, candidates_P2SC, sel_MK, rows, width, k, tile_size(k), short, tile, tile // 2, SAMPLED,
        8, _WARPS, most // 2, min(tile // 32, _LINES) if many else tile // 32, num_warps=_WARPS, **registers,
    )  # fmt: skip


def _choose_from_many(orders_MT: Tensor, visible_M: Tensor, sel_MK: Tensor, places: int) -> None:
    """Rows longer than the places for their candidates."""
    (rows, k), width = sel_MK.shape, orders_MT.shape[1]
    warps, sampled = (4, SAMPLED) if width <= _LONG else (8, 2 * SAMPLED)
    programs = min(rows, _MOST_WARPS // warps)
    candidates_P2SC = orders_MT.new_empty(programs, 2, warps, places // 2)
    registers = {"maxnreg": _REGISTERS} if nvidia_arch() else {}
    _choose[(programs,)](
        orders_MT, visible_M, candidates_P2SC, sel_MK, rows, width, k, tile_size(k), False, places, 7 * places // 10,
        sampled, 32, warps, places // 2, 8 * warps, num_warps=warps, **registers,
    )  # fmt: skip


@inline
def _put(order: Val, position: Val, target: Ptr, rank: Val, taken: Val, AWAY: tl.constexpr) -> None:
    tl.store(target + rank, order.to(tl.int32, bitcast=True), mask=taken)
    tl.store(target + AWAY + rank, position, mask=taken)


@inline
def _append(
    a: Val, b: Val, c: Val, d: Val, position: Val, bound: Val, num: Val, target: Ptr, PLACES: tl.constexpr,
    AWAY: tl.constexpr,
) -> Val:  # fmt: skip
    """Add what is at least `bound` of four adjacent lines [32, SEGMENTS] to lists that have `num`; those then have."""
    packed = (a >= bound).to(tl.int32) + ((b >= bound).to(tl.int32) << 8)  # four sums at once
    packed += ((c >= bound).to(tl.int32) << 16) + ((d >= bound).to(tl.int32) << 24)
    total = tl.sum(packed, 0)
    upto = tl.cumsum(packed, 0) + (total * 0x01010100)[None, :]
    target, left = target + (num - 1)[None, :], (PLACES - num)[None, :]
    rank = upto & 255
    _put(a, position, target, rank, (a >= bound) & (rank <= left), AWAY)
    rank = (upto >> 8) & 255
    _put(b, position + 32, target, rank, (b >= bound) & (rank <= left), AWAY)
    rank = (upto >> 16) & 255
    _put(c, position + 64, target, rank, (c >= bound) & (rank <= left), AWAY)
    rank = (upto >> 24) & 255
    _put(d, position + 96, target, rank, (d >= bound) & (rank <= left), AWAY)
    return num + (((total * 0x01010101) >> 24) & 255)


@inline
def _gather(orders: Ptr, count: Val, bound: Val, candidates: Ptr, SEGMENTS: tl.constexpr, PLACES: tl.constexpr) -> Val:
    """How many scores of each segment of a row are at least `bound`; the first PLACES of each go to `candidates`.

    A segment has a warp to itself, so that none waits for another.
    """
    away: tl.constexpr = SEGMENTS * PLACES
    width = tl.cdiv(tl.cdiv(count, SEGMENTS), 256) * 256
    segment, lane = tl.arange(0, SEGMENTS)[None, :], tl.arange(0, 32)[:, None]
    target, num = candidates + segment * PLACES, tl.zeros((SEGMENTS,), tl.int32)
    at = segment * width + lane
    a, b = load_orders(orders, at, count), load_orders(orders, at + 32, count)
    c, d = load_orders(orders, at + 64, count), load_orders(orders, at + 96, count)
    e, f = load_orders(orders, at + 128, count), load_orders(orders, at + 160, count)
    g, h = load_orders(orders, at + 192, count), load_orders(orders, at + 224, count)
    for _ in range(0, width, 256):
        next_a, next_b = load_orders(orders, at + 256, count), load_orders(orders, at + 288, count)
        next_c, next_d = load_orders(orders, at + 320, count), load_orders(orders, at + 352, count)
        num = _append(a, b, c, d, at, bound, num, target, PLACES, away)
        a, b, c, d = next_a, next_b, next_c, next_d
        next_e, next_f = load_orders(orders, at + 384, count), load_orders(orders, at + 416, count)
        next_g, next_h = load_orders(orders, at + 448, count), load_orders(orders, at + 480, count)
        num = _append(e, f, g, h, at + 128, bound, num, target, PLACES, away)
        e, f, g, h = next_e, next_f, next_g, next_h
        at += 256
    return num


@kernel
def _choose(
    orders: Ptr,
    visible: Ptr,
    candidates: Ptr,
    sel: Ptr,
    num_rows: int,
    num_columns: int,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    SHORT: tl.constexpr,
    TILE: tl.constexpr,
    AIM: tl.constexpr,
    SAMPLED: tl.constexpr,
    LEEWAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PLACES: tl.constexpr,
    LINES: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """`num_columns`: of a row. SHORT: no row has more than TILE scores; AIM at as many candidates otherwise."""
    await_inputs(OVERLAP)
    candidates += tl.program_id(0).to(tl.int64) * (2 * SEGMENTS * PLACES)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        count = tl.load(visible + row)
        wide = tl.full((), 0, tl.int64) + row
        source, target = orders + wide * num_columns, sel + wide * K
        if count <= K:
            place_all(target, count, K, K_TILE)
        elif SHORT:
            nums = tl.zeros((1,), tl.int32) + count
            choose_among(source, None, nums, tl.full((), 0, tl.uint32), target, K, TILE, LINES, TILE)
        else:
            nums, bound = tl.zeros((SEGMENTS,), tl.int32), tl.full((), 1, tl.uint32)
            aim, tries = tl.full((), AIM, tl.int32), tl.full((), 0, tl.int32)
            while (tries < 2) & ~they_serve(nums, K, TILE, PLACES):
                bound = bound_of(source, count, aim, SAMPLED, LEEWAY)
                tl.debug_barrier()  # the candidates of the row before have been read
                nums = _gather(source, count, bound, candidates, SEGMENTS, PLACES)
                tl.debug_barrier()  # those of this row have been written
                # Where the sample was unlike the row, it is known now by how much.
                aim = tl.minimum(aim.to(tl.int64) * AIM // tl.maximum(tl.sum(nums, 0), 1), count).to(tl.int32)
                tries += 1
            positions = candidates + SEGMENTS * PLACES
            choose_gathered(
                source, count, bound, nums, candidates, positions, target, K, TILE, LINES, PLACES, 2 * SAMPLED
            )
