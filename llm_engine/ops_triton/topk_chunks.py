"""Exact top-k of few long rows: the candidates of a row are gathered by several programs, a chunk each.

The same choice as by one program a row, made by the last of them to arrive. Programs beyond the end of a row leave at
once: the grid follows the bound on the context.

Shapes: M rows, T positions, K chosen, C chunks, S scores of a chunk.
"""

from __future__ import annotations

from typing import Final

import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton import arrivals
from llm_engine.ops_triton.candidates import SAMPLED, bound_of, choose_gathered, num_places
from llm_engine.ops_triton.lang import Ptr, arrives_last, await_inputs, ceil_div, kernel, tile_size
from llm_engine.ops_triton.orders import load_orders, place_all

_PROGRAMS: Final = 264  # of all rows: two for every processor
_LEAST_CHUNK: Final = 2048
_MOST_CHUNK: Final = 8192  # that registers hold
_MOST_CHUNKS: Final = 32  # of a row; a program looks at the lists of all
_WARPS: Final = 8


def chunk_width(rows: int, width: int, k: int) -> int | None:
    """How many scores of `rows` rows, none of more than `width`, one program takes; None: those of a whole row."""
    if width <= num_places(k):
        return None
    chunk = max(tile_size(ceil_div(width * rows, _PROGRAMS)), _LEAST_CHUNK)
    if chunk > _MOST_CHUNK:
        return None
    return max(chunk, min(tile_size(ceil_div(width, _MOST_CHUNKS)), _MOST_CHUNK))


def choose_by_chunks(orders_MT: Tensor, visible_M: Tensor, sel_MK: Tensor, chunk: int) -> None:
    """`topk.choose` with programs of `chunk` scores, a power of two."""
    (rows, k), width = sel_MK.shape, orders_MT.shape[1]
    chunks, places = ceil_div(width, chunk), num_places(k)
    candidates_2MCS = orders_MT.new_empty(2, rows, chunks, chunk)
    nums_MC = orders_MT.new_empty(rows, chunks)
    assert rows <= arrivals.MOST, "many rows are chosen from one at a time"
    _choose_chunk[(chunks, rows)](
        orders_MT, visible_M, *candidates_2MCS, nums_MC, arrivals.counters(orders_MT.device), sel_MK, width, k,
        tile_size(k), places, SAMPLED, chunk, tile_size(chunks), num_warps=_WARPS,
    )  # fmt: skip


@kernel
def _choose_chunk(
    orders: Ptr,
    visible: Ptr,
    candidates: Ptr,
    positions: Ptr,
    nums: Ptr,
    arrivals: Ptr,
    sel: Ptr,
    num_columns: int,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    PLACES: tl.constexpr,
    SAMPLED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Gather candidates of one chunk: scores, positions and how many they are. The last program of a row chooses."""
    await_inputs(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(visible + row)
    orders += row * num_columns
    sel += row * K
    if count <= K:
        if chunk == 0:
            place_all(sel, count, K, K_TILE)
        return
    if chunk * CHUNK >= count:
        return
    lane, line = tl.arange(0, 32)[:, None], tl.arange(0, CHUNK // 32)[None, :]
    position = chunk * CHUNK + line * 32 + lane
    order = load_orders(orders, position, count)
    bound = bound_of(orders, count, tl.full((), PLACES // 2, tl.int32), SAMPLED, 8)
    taken = order >= bound
    lines = tl.sum(taken.to(tl.int32), 0)
    place = tl.cumsum(taken.to(tl.int32), 0) + (tl.cumsum(lines, 0) - lines)[None, :] - 1
    slot = row * tl.num_programs(0)
    at = (slot + chunk) * CHUNK + place
    tl.store(candidates + at, order.to(tl.int32, bitcast=True), mask=taken)
    tl.store(positions + at, position, mask=taken)
    tl.store(nums + slot + chunk, tl.sum(lines, 0))
    chunks = tl.cdiv(count, CHUNK)
    if arrives_last(arrivals + row, chunks):
        other = tl.arange(0, CHUNK_TILE)
        num = tl.load(nums + slot + other, mask=other < chunks, other=0)
        choose_gathered(
            orders, count, bound, num, candidates + slot * CHUNK, positions + slot * CHUNK, sel, K, PLACES,
            PLACES // 32, CHUNK, 2 * SAMPLED,
        )  # fmt: skip
