"""Latent attention of single rows for `fast`, straight from the cache's bf16 pages, on tile registers.

Sixteen heads of a row at a time: scores of 64 keys, their softmax, and the weighted sum of 64 columns of the latents.
Sixteen keys of a page are a tile as they lie in the cache, so nothing is gathered, and a sequence's keys stay in a
core's cache between the two products.

Shapes: n rows, h heads, C cache width, L latent rank, S cache slots.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_engine.ops_cpu.jit import (
    B2,
    I1,
    MINUS_INF,
    N2,
    ONE,
    ZERO,
    Cache,
    Floats,
    Ints,
    Longs,
    exp,
    inline,
    kernel,
    over_rows,
    row_array,
    slot_of,
)
from llm_engine.ops_cpu.plan import CpuPlan
from llm_engine.ops_cpu.tiles import (
    PAIRS,
    ROWS,
    clear_tile,
    configuration,
    has_tiles,
    load_configuration,
    load_tile,
    multiply_tiles,
    prefetch,
    store_columns,
    store_configuration,
    store_interleaved,
    store_tile,
)

_HEADS: Final = ROWS  # of one item of work
_KEYS: Final = 4 * ROWS  # scored at a time
_DEPTH: Final = 2 * PAIRS  # channels, or keys, that one product adds up
_COLUMNS: Final = 64  # of the latents, summed at a time
_COST: Final = 16  # multiplications of a tile product in the time of one in a plain loop


def fits(cache_SC: Tensor, rank: int, block_tokens: int) -> bool:
    """Whether `attend_rows` can compute these shapes on this CPU."""
    whole = cache_SC.shape[1] % _DEPTH == 0 and rank % _COLUMNS == 0 and block_tokens % ROWS == 0
    return _attend is not None and cache_SC.dtype == torch.bfloat16 and whole


def attend_rows(query_nhC: Tensor, cache_SC: Tensor, plan: CpuPlan, rows_n: Longs, rank: int, scale: float) -> Tensor:
    """Weighted sums of the latents that each of the rows sees: bf16 [n, h, L]."""
    n, heads, width = query_nhC.shape
    out_nhL = query_nhC.new_empty(n, heads, rank)
    assert _attend is not None
    over_rows(
        _attend,
        n * -(-heads // _HEADS),
        heads * (width + rank) * plan.max_visible // _COST,
        row_array(query_nhC.contiguous().view(-1, width)),
        heads,
        row_array(cache_SC),
        rows_n,
        plan.tables_SB,
        plan.seqs_N,
        plan.visible_N,
        plan.block_tokens,
        scale,
        configuration(),
        row_array(out_nhL.view(-1, rank)),
    )
    return out_nhL


@inline
def _find_tiles(table: Ints, count: int, block_tokens: int, tiles: Longs) -> None:
    """tiles[j] is the cache slot of key 16 j; behind the last of `count` keys its tile is repeated."""
    for j in range(tiles.shape[0]):
        tiles[j] = slot_of(table, min(j, (count - 1) // ROWS) * ROWS, block_tokens)


@inline
def _pack_queries(query: Cache, first: int, count: int, packed: Cache) -> None:
    """packed[p, 2h + i] = query[first + h, 2p + i]: right sides of products over 32 channels each."""
    pairs, turned = query.view(np.uint32), packed.view(np.uint32)
    for h in range(count):
        for p in range(turned.shape[0]):
            turned[p, h] = pairs[first + h, p]


@inline
def _score(cache: Cache, tiles: Longs, count: int, packed: Cache, scores: Floats) -> None:
    """scores[k, h] for whole groups of _KEYS keys in `count` tiles.

    Lines of a tile are far apart, so the processor does not foresee them: the next four tiles are fetched meanwhile,
    behind the last ones those of the next row.
    """
    for j in range(0, count, 4):
        clear_tile(0)
        clear_tile(1)
        clear_tile(2)
        clear_tile(3)
        for s in range(packed.shape[0] // PAIRS):
            load_tile(4, packed, PAIRS * s, 0)
            load_tile(5, cache, tiles[j], _DEPTH * s)
            multiply_tiles(0, 5, 4)
            load_tile(6, cache, tiles[j + 1], _DEPTH * s)
            multiply_tiles(1, 6, 4)
            load_tile(7, cache, tiles[j + 2], _DEPTH * s)
            multiply_tiles(2, 7, 4)
            load_tile(5, cache, tiles[j + 3], _DEPTH * s)
            multiply_tiles(3, 5, 4)
            for i in range(4, 8):
                for line in range(ROWS):
                    prefetch(cache, tiles[j + i], _DEPTH * (ROWS * s + line))
        store_tile(0, scores, ROWS * j, 0)
        store_tile(1, scores, ROWS * j + ROWS, 0)
        store_tile(2, scores, ROWS * j + 2 * ROWS, 0)
        store_tile(3, scores, ROWS * j + 3 * ROWS, 0)


@inline
def _as_half(bits: np.uint32) -> np.uint32:
    """fp32 to bf16, to nearest even. A NaN may come out as a number: the sum that it is in, the row's factor, tells."""
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@inline
def _weigh(
    scores: Floats,
    heads: int,
    count: int,
    scale: np.float32,
    top: Floats,
    factor: Floats,
    weights: Cache,
) -> None:
    """weights[h, k] = e^(scale · (score - top score)) of the first `count` keys as bf16; factor[h] = 1 / their sum.

    Zeros up to the end of a product.
    """
    bits = scores.view(np.uint32)
    for h in range(_HEADS):
        top[h] = MINUS_INF
        factor[h] = ZERO
    for k in range(count):
        for h in range(_HEADS):
            top[h] = max(top[h], scores[k, h])
    for k in range(count):
        for h in range(_HEADS):
            scores[k, h] = exp((scores[k, h] - top[h]) * scale)
            factor[h] += scores[k, h]
        for h in range(_HEADS):
            bits[k, h] = _as_half(bits[k, h])
    for h in range(heads):
        for k in range(count):
            weights[h, k] = np.uint16(bits[k, h])
        weights[h, count : count + -count % _DEPTH] = np.uint16(0)
        factor[h] = ONE / factor[h]


@inline
def _add_up(
    weights: Cache, cache: Cache, slots: Longs, count: int, blank: Cache, right: Cache, sums: Floats, column: int
) -> None:
    """sums[h] = Σ_k weights[h, k] · cache[slots[k], column:column + 64], columns interleaved."""
    clear_tile(0)
    clear_tile(1)
    clear_tile(2)
    clear_tile(3)
    for k in range(0, count, _DEPTH):
        for p in range(PAIRS):
            a, b = k + 2 * p, k + 2 * p + 1
            if b < count:
                store_interleaved(cache, cache, slots[a], slots[b], column, right, 0, p)
                store_interleaved(cache, cache, slots[a], slots[b], column + _DEPTH, right, 2, p)
            elif a < count:  # what lies behind the last key may be no number: it must not be multiplied, even by zero
                store_interleaved(cache, blank, slots[a], 0, column, right, 0, p)
                store_interleaved(cache, blank, slots[a], 0, column + _DEPTH, right, 2, p)
            else:
                store_interleaved(blank, blank, 0, 0, column, right, 0, p)
                store_interleaved(blank, blank, 0, 0, column + _DEPTH, right, 2, p)
        load_tile(4, weights, 0, k)
        load_tile(5, right, 0, 0)
        multiply_tiles(0, 4, 5)
        load_tile(6, right, ROWS, 0)
        multiply_tiles(1, 4, 6)
        load_tile(7, right, 2 * ROWS, 0)
        multiply_tiles(2, 4, 7)
        load_tile(5, right, 3 * ROWS, 0)
        multiply_tiles(3, 4, 5)
    store_tile(0, sums, 0, 0)
    store_tile(1, sums, 0, 16)
    store_tile(2, sums, 0, 32)
    store_tile(3, sums, 0, 48)


def _attend_items(
    first: int,
    end: int,
    query: Cache,
    heads: int,
    cache: Cache,
    rows: Longs,
    tables: Ints,
    seqs: Longs,
    visible: Longs,
    block_tokens: int,
    scale: float,
    tile_shapes: npt.NDArray[np.uint8],
    out: Cache,
) -> None:
    """Item by item: up to 16 heads of one row."""
    width, rank = query.shape[1], out.shape[1]
    parts = -(-heads // _HEADS)
    most = 0
    for item in range(first, end):
        most = max(most, visible[rows[item // parts]])
    most += -most % _KEYS
    packed = np.zeros((width // _DEPTH * PAIRS, 2 * _HEADS), np.uint16)
    slots, tiles = np.empty(most, np.int64), np.empty(most // ROWS + 4, np.int64)
    scores, weights = np.empty((most, _HEADS), np.float32), np.empty((_HEADS, most), np.uint16)
    top, factor = np.empty(_HEADS, np.float32), np.empty(_HEADS, np.float32)
    blank, right = np.zeros((1, width), np.uint16), np.empty((4 * ROWS, 2 * PAIRS), np.uint16)
    sums = np.empty((_HEADS, _COLUMNS), np.float32)
    before = np.empty(64, np.uint8)
    store_configuration(before)
    load_configuration(tile_shapes)
    for item in range(first, end):
        row, head = rows[item // parts], item // parts * heads + item % parts * _HEADS
        mine = min(_HEADS, heads - item % parts * _HEADS)
        count, following = visible[row], rows[min(item + 1, end - 1) // parts]
        whole = (count + -count % _KEYS) // ROWS
        _find_tiles(tables[seqs[row]], count, block_tokens, tiles[:whole])
        _find_tiles(tables[seqs[following]], visible[following], block_tokens, tiles[whole : whole + 4])
        for k in range(count):
            slots[k] = tiles[k // ROWS] + k % ROWS
        _pack_queries(query, head, mine, packed)
        _score(cache, tiles, whole, packed, scores)
        _weigh(scores, mine, count, np.float32(scale), top, factor, weights)
        for c in range(0, rank, _COLUMNS):
            _add_up(weights, cache, slots, count, blank, right, sums, c)
            for h in range(mine):
                for i in range(_COLUMNS):
                    sums[h, i] *= factor[h]
                store_columns(sums, h, 0, out, head + h, c)
                store_columns(sums, h, 32, out, head + h, c + 32)
    load_configuration(before)


_SIGNATURE: Final = f"void(int64, int64, {B2}, int64, {B2}, {I1}, {N2}, {I1}, {I1}, int64, float64, uint8[::1], {B2})"
_attend = kernel(_SIGNATURE)(_attend_items) if has_tiles() else None
