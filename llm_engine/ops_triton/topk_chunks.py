"""Exact top-k of few long rows, each cut into chunks that have a program each. The same choice as by one program a row.

The smallest chosen score is found digit by digit from the highest, by counting: a launch for every digit counts, chunk
by chunk, the scores that share all higher digits with it, and from those counts every program of the next launch works
out the digit itself. Nothing is added up in memory, so there is nothing to clear and no order to depend on. The last
launch writes the chosen positions, which each chunk knows how many come before.

Programs beyond the end of a row leave at once: the grid follows the bound on the context.

Shapes: M rows, T positions, K chosen, C chunks, D values of a digit, L digits.
"""

from __future__ import annotations

from typing import Final

import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.lang import Ptr, Val, await_inputs, ceil_div, inline, kernel, tile_size
from llm_engine.ops_triton.orders import ALIGNED, load_orders, place_all, place_chosen

_DIGIT_BITS: Final = 8
_NUM_DIGITS: Final = 32 // _DIGIT_BITS
_ALONE: Final = 8192  # scores that one program chooses from in registers, in less time than several launches take
_PROGRAMS: Final = 264  # of all rows: two for every processor
_LEAST_PROGRAMS: Final = 4  # of a row; fewer gain nothing
_MOST_CHUNKS: Final = 32  # every program reads the counts of all chunks of its row
_LEAST_CHUNK: Final = 2048
_WARPS: Final = 8


def chunk_width(rows: int, width: int) -> int | None:
    """How many scores of `rows` rows, none of more than `width`, one program takes; None: those of a whole row."""
    programs = min(_PROGRAMS // max(rows, 1), _MOST_CHUNKS)
    if width <= _ALONE or programs < _LEAST_PROGRAMS:
        return None
    return ceil_div(width, programs * _LEAST_CHUNK) * _LEAST_CHUNK


def choose_by_chunks(orders_MT: Tensor, visible_M: Tensor, sel_MK: Tensor, chunk: int) -> None:
    """`topk.choose` with programs of `chunk` scores, a multiple of `_LEAST_CHUNK`."""
    (rows, k), width = sel_MK.shape, orders_MT.shape[1]
    chunks = ceil_div(width, chunk)
    counts_LMCD = orders_MT.new_empty(_NUM_DIGITS, rows, chunks, 1 << _DIGIT_BITS)
    found_LM2 = orders_MT.new_empty(_NUM_DIGITS, rows, 2)
    above_MC = orders_MT.new_empty(rows, chunks)
    tensors = (orders_MT, visible_M, counts_LMCD, found_LM2, above_MC)
    sizes = (chunk, tile_size(chunks), _LEAST_CHUNK, ALIGNED, _DIGIT_BITS)
    for digit in range(_NUM_DIGITS):
        _count_digit[(chunks, rows)](*tensors, width // ALIGNED, k, *sizes, digit, num_warps=_WARPS)
    _place_chunk[(chunks, rows)](
        *tensors, sel_MK, width // ALIGNED, k, tile_size(k), *sizes, _NUM_DIGITS, num_warps=_WARPS
    )


@inline
def _next_digit(
    counts: Ptr, wanted: Val, num_there: Val, CHUNK_TILE: tl.constexpr, D: tl.constexpr
) -> tuple[Val, Val, Val, Val]:
    """From counts [C, D] of a digit: its value in the `wanted`-th largest score, how many are wanted of those that
    have it, and, of each chunk [CHUNK_TILE], how many have a larger one and how many have it.
    """
    chunk, value = tl.arange(0, CHUNK_TILE)[:, None], tl.arange(0, D)[None, :]
    own = tl.load(counts + chunk * D + value, mask=chunk < num_there, other=0)
    at_least = tl.cumsum(tl.sum(own, 0), 0, reverse=True)
    digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    larger = tl.sum(tl.where(value > digit, own, 0), 1)
    return digit, wanted - tl.sum(larger, 0), larger, tl.sum(tl.where(value == digit, own, 0), 1)


@inline
def _known(
    counts: Ptr, found: Ptr, num_there: Val, row: Val,
    K: tl.constexpr, CHUNK_TILE: tl.constexpr, BITS: tl.constexpr, DIGIT: tl.constexpr,
) -> tuple[Val, Val, Val, Val]:  # fmt: skip
    """The first DIGIT digits of the smallest chosen score, 0 behind them, and what `_next_digit` says of the last."""
    rows, chunks = tl.num_programs(1), tl.num_programs(0)
    prefix, wanted = tl.full((), 0, tl.int32), tl.full((), K, tl.int32)
    if DIGIT > 1:
        before = found + ((DIGIT - 2) * rows + row) * 2
        prefix, wanted = tl.load(before), tl.load(before + 1)
    counts += ((DIGIT - 1) * rows + row) * chunks * (1 << BITS)
    digit, wanted, larger, equal = _next_digit(counts, wanted, num_there, CHUNK_TILE, 1 << BITS)
    return prefix | (digit << (32 - BITS * DIGIT)), wanted, larger, equal


@kernel
def _count_digit(
    orders: Ptr,
    visible: Ptr,
    counts: Ptr,
    found: Ptr,
    above: Ptr,
    num_columns: int,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_TILE: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BITS: tl.constexpr,
    DIGIT: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Count the values of a digit in one chunk, among the scores whose higher digits are those of the smallest chosen.

    `num_columns`: of a row, in units of ALIGNED. `found`: those digits, and how many scores are wanted that have them.
    `above`: how many scores of each chunk are larger by a higher digit.
    """
    await_inputs(OVERLAP)
    chunk, row, chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    count, begin = tl.load(visible + row), chunk * CHUNK
    if (count <= K) | (begin >= count):
        return
    shift: tl.constexpr = 32 - BITS * (DIGIT + 1)
    prefix = tl.full((), 0, tl.uint32)
    if DIGIT > 0:
        known, wanted, larger, _ = _known(counts, found, tl.cdiv(count, CHUNK), row, K, CHUNK_TILE, BITS, DIGIT)
        prefix = known.to(tl.uint32, bitcast=True) >> shift >> BITS
        own = tl.sum(tl.where(tl.arange(0, CHUNK_TILE) == chunk, larger, 0), 0)
        if DIGIT > 1:
            own += tl.load(above + row * chunks + chunk)
        tl.store(above + row * chunks + chunk, own)
        if chunk == 0:
            at = found + ((DIGIT - 1) * tl.num_programs(1) + row) * 2
            tl.store(at, known)
            tl.store(at + 1, wanted)
    orders += row * num_columns * ALIGNED
    total = tl.zeros((1 << BITS,), tl.int32)
    for start in range(begin, tl.minimum(begin + CHUNK, count), TILE):
        order = load_orders(orders, start, count, TILE, ALIGNED) >> shift
        there = start + tl.arange(0, TILE) < count
        if DIGIT > 0:
            there = there & ((order >> BITS) == prefix)
        total += tl.histogram((order & ((1 << BITS) - 1)).to(tl.int32), 1 << BITS, mask=there)
    counts += ((DIGIT * tl.num_programs(1) + row) * chunks + chunk) * (1 << BITS)
    tl.store(counts + tl.arange(0, 1 << BITS), total)


@kernel
def _place_chunk(
    orders: Ptr,
    visible: Ptr,
    counts: Ptr,
    found: Ptr,
    above: Ptr,
    sel: Ptr,
    num_columns: int,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_TILE: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BITS: tl.constexpr,
    DIGITS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Write the chosen positions of one chunk. A row of no more than K scores is the first program's."""
    await_inputs(OVERLAP)
    chunk, row, chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    count, begin = tl.load(visible + row), chunk * CHUNK
    sel += row * K
    if count <= K:
        if chunk == 0:
            place_all(sel, count, K, K_TILE)
        return
    if begin >= count:
        return
    lowest, spare, larger, equal = _known(counts, found, tl.cdiv(count, CHUNK), row, K, CHUNK_TILE, BITS, DIGITS)
    other = tl.arange(0, CHUNK_TILE)
    larger += tl.load(above + row * chunks + other, mask=other < tl.cdiv(count, CHUNK), other=0)
    placed, ties = tl.sum(tl.where(other < chunk, larger, 0), 0), tl.sum(tl.where(other < chunk, equal, 0), 0)
    place_chosen(
        orders + row * num_columns * ALIGNED, begin, tl.minimum(begin + CHUNK, count), count, sel,
        lowest.to(tl.uint32, bitcast=True), spare, placed, ties, TILE, ALIGNED,
    )  # fmt: skip
