"""Attention of many rows over bf16 keys on Hopper: 64 heads of one row a program, written in Gluon.

Two groups of four warps share the work of a pair of key tiles, a third one fetches keys. Side 0 weighs the even tiles
and sums up the left half of the values' columns, side 1 the odd tiles and the right half; weights and maxima go to the
other side through shared memory. While one side takes exponentials, the other keeps the tensor cores busy.

A tile [64, 576] lies in two buffers, one for each side, in three parts: left and right half of the latents and the
rotated rest. The weights of a tile replace its rotated keys, which nobody reads any more. A side's own half of its own
tile is called near, the other one far:

- `full`, for every buffer near and far, each in chunks of columns: the chunk has arrived (the far one with the rest).
- `free`, for every buffer near and far: the half can be overwritten. Near halves are given back by their own side, far
  halves, with the weights, by the other one.
- `ready`, for every buffer: weights and maxima are written.

Every barrier completes once a pair, so the parity of the pair says what to wait for. A row's sums go over its tiles in
order; sums depend on nothing but its own keys.

Shapes: R rows, h heads, L = 512 latent rank, E = 64 rotated columns, T keys.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from llm_engine.ops_triton.hopper_keys import produce
from llm_engine.ops_triton.hopper_lang import (
    BARRIER,
    CHUNKS,
    EVERY,
    HALF,
    HEAD_TILE,
    HEADS_OF_SCORES,
    KEYS,
    KEYS_OF_SCORES,
    LINES,
    PLAIN,
    SCORES,
    SUMS,
    TILE,
    WIDE,
    E,
    Group,
    L,
    Tile,
    gluon_inline,
    gluon_kernel,
    sync,
)
from llm_engine.ops_triton.lang import Ptr, Val, tile_size

_CONSUMER_REGISTERS: Final = 232  # of a thread; the producer's have what they leave
_PRODUCERS: Final = gl.constexpr(128)  # threads


@gluon_inline
def _put_latent_query(source: Ptr, target: Tile) -> None:
    """Half the columns of some heads' latent queries."""
    head = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(1, WIDE))
    column = gl.arange(0, HALF, layout=gl.SliceLayout(0, WIDE))
    target.store(gl.load(source + gl.expand_dims(head * L, 1) + gl.expand_dims(column, 0)))


@gluon_inline
def _put_turned_query(source: Ptr, head_stride: Val, cos: Ptr, sin: Ptr, target: Tile) -> None:
    """Some heads' rotated part."""
    head = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(1, LINES))
    column = gl.arange(0, E, layout=gl.SliceLayout(0, LINES))
    at = source + gl.expand_dims(head * head_stride, 1)
    own = gl.load(at + gl.expand_dims(column, 0)).to(gl.float32)
    partner = gl.load(at + gl.expand_dims(column ^ 1, 0)).to(gl.float32)
    s = gl.load(sin + column // 2)
    turned = own * gl.expand_dims(gl.load(cos + column // 2), 0)
    turned += partner * gl.expand_dims(gl.where(column % 2 == 0, -s, s), 0)
    target.store(turned.to(gl.bfloat16))


@gluon_inline
def _scaled(sums: Val, factor: Val) -> Val:
    return sums * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, SUMS)), 1)


@gluon_inline
def _score_half(
    score: Val, query: Tile, half: Tile, full: Tile, phase: Val, AT: gl.constexpr, FRESH: gl.constexpr
) -> Val:
    """Begin to add what half the columns contribute to a tile's scores, chunk by chunk as they arrive."""
    width: gl.constexpr = HALF // CHUNKS
    for chunk in gl.static_range(CHUNKS):
        mbarrier.wait(full.index(AT * CHUNKS + chunk), phase)
        hopper.fence_async_shared()
        some = half.slice(chunk * width, width, dim=1).permute((1, 0))
        score = hopper.warpgroup_mma(
            query.slice(chunk * width, width, dim=1), some, score, use_acc=not (FRESH and chunk == 0), is_async=True
        )
    return score


@gluon_inline
def _begin_other(
    sums: Val, top: Val, total: Val, pair: Val, half: Tile, rest: Tile, tops: Tile, ready: Tile, SIDE: gl.constexpr
) -> tuple[Any, Val, Val]:
    """Begin to add the other side's tile of a pair: this side's columns, `half`, under the weights in `rest`."""
    mbarrier.wait(ready.index(1 - SIDE), pair & 1)
    hopper.fence_async_shared()
    new = tops.index(1 - SIDE).load(HEADS_OF_SCORES)
    fade = gl.exp2(top - new)
    product = hopper.warpgroup_mma(rest.index(1 - SIDE), half.index(1 - SIDE), _scaled(sums, fade), is_async=True)
    return product, new, total * fade


@gluon_inline
def _add_pair(
    sums: Val, top: Val, total: Val, pair: Val, count: Val, scale: Val, query: Group, keys: Group, tops: Tile,
    bars: Group, SIDE: gl.constexpr,
) -> tuple[Val, Val, Val]:  # fmt: skip
    """Add the other side's last tile and the own one of a pair to this side's columns."""
    full, free, ready, _ = bars
    left, right, rest = keys
    near, far, near_query, far_query = left, right, query[0], query[1]
    if SIDE == 1:
        near, far, near_query, far_query = right, left, query[1], query[0]
    # Zero, which the compiler can't know: it would compute every tile's addresses before the loop and spill them.
    first = pair >> 28
    own = SIDE + first
    own_near, own_rest, phase = near.index(own), rest.index(own), pair & 1
    score = gl.zeros([HEAD_TILE, KEYS], gl.float32, layout=SCORES)
    score = _score_half(score, near_query.index(first), own_near, full, phase, 2 * SIDE, True)
    # At first side 0 has nothing to add from the other: what this makes of leftovers is dropped by the own product.
    product, top, total = _begin_other(sums, top, total, pair - (1 - SIDE), near, rest, tops, ready, SIDE)
    begun = (pair > 0) | (SIDE == 1)
    score = _score_half(score, far_query.index(first), far.index(own), full, phase, 2 * SIDE + 1, False)
    score = hopper.warpgroup_mma(query[2].index(first), own_rest.permute((1, 0)), score, is_async=True)
    sums = hopper.warpgroup_mma_wait(CHUNKS + 1, deps=(product,))
    sync()
    mbarrier.arrive(free.index(2 * (1 - SIDE) + 1), count=1, pred=begun)
    score = hopper.warpgroup_mma_wait(0, deps=(score,))
    sync()  # all warps have read the rotated keys, which the weights replace
    left_over = count - (2 * pair + SIDE) * KEYS
    if left_over < KEYS:
        place = gl.arange(0, KEYS, layout=KEYS_OF_SCORES)
        score = gl.where(gl.expand_dims(place < left_over, 0), score, float("-inf"))
    new = gl.maximum(top, gl.max(score, 1) * scale)
    weight = gl.exp2(score * scale - gl.expand_dims(new, 1))
    own_rest.store(weight.to(gl.bfloat16))
    tops.index(SIDE).store(new)
    hopper.fence_async_shared()
    sync()
    mbarrier.arrive(ready.index(SIDE), count=1)
    fade = gl.exp2(top - new)
    product = hopper.warpgroup_mma(own_rest, own_near, _scaled(sums, fade), use_acc=begun, is_async=True)
    total = total * fade + gl.sum(weight, 1)
    sums = hopper.warpgroup_mma_wait(0, deps=(product,))
    sync()
    mbarrier.arrive(free.index(2 * SIDE), count=1)
    return sums, new, total


@gluon_inline
def _consume(
    rows: Group, limits: Group, query: Group, keys: Group, tops: Tile, bars: Group, SIDE: gl.constexpr
) -> None:
    """One side: its columns of all heads' sums."""
    latent_query, rest_query, head_stride, cos, sin, out = rows
    count, pairs, scale = limits
    _, _, ready, met = bars
    spare = query[SIDE].index(0)
    _put_latent_query(latent_query + SIDE * HALF, spare)
    if SIDE == 0:
        tops.index(1).store(gl.full([HEAD_TILE], -1e30, gl.float32, layout=HEADS_OF_SCORES))
    else:
        _put_turned_query(rest_query, head_stride, cos, sin, query[2].index(0))
    hopper.fence_async_shared()
    sync()
    mbarrier.arrive(met, count=1)
    mbarrier.wait(met, 0)
    hopper.fence_async_shared()
    sums = gl.zeros([HEAD_TILE, HALF], gl.float32, layout=SUMS)
    top = gl.full([HEAD_TILE], -1e30, gl.float32, layout=HEADS_OF_SCORES)  # below any score
    total = gl.zeros([HEAD_TILE], gl.float32, layout=HEADS_OF_SCORES)
    for pair in range(pairs):
        sums, top, total = _add_pair(sums, top, total, pair, count, scale, query, keys, tops, bars, SIDE)
    if SIDE == 0:
        product, top, total = _begin_other(sums, top, total, pairs - 1, keys[0], keys[2], tops, ready, SIDE)
        sums = hopper.warpgroup_mma_wait(0, deps=(product,))
    tops.index(2 + SIDE).store(total)
    sync()
    mbarrier.arrive(met, count=1)
    mbarrier.wait(met, 1)
    total += tops.index(3 - SIDE).load(HEADS_OF_SCORES)
    sums = _scaled(sums, 1.0 / gl.where(total == 0.0, 1.0, total))
    empty = gl.convert_layout(total, gl.SliceLayout(1, SUMS)) == 0.0  # sums may then hold 0 · NaN
    spare.store(gl.where(gl.expand_dims(empty, 1), 0.0, sums).to(gl.bfloat16))
    sync()
    head = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(1, WIDE))
    column = SIDE * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, WIDE))
    gl.store(out + gl.expand_dims(head * L, 1) + gl.expand_dims(column, 0), spare.load(WIDE))


@gluon_kernel
def _attend_pairs(
    latent_query: Ptr, query: Ptr, cos: Ptr, sin: Ptr, plane: Ptr, sel: Ptr, seqs: Ptr, visible: Ptr, tables: Ptr,
    out: Ptr, num_blocks: int, row_stride: int, head_stride: int, scale: float, HEADS: gl.constexpr, D: gl.constexpr,
    K: gl.constexpr, K_TILE: gl.constexpr, P: gl.constexpr, REGISTERS: gl.constexpr,
) -> None:  # fmt: skip
    """Arguments and constants are those of `attend._attend`."""
    head_tiles: gl.constexpr = HEADS // HEAD_TILE
    row, head = (gl.program_id(0) // head_tiles).to(gl.int64), (gl.program_id(0) % head_tiles) * HEAD_TILE
    left = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, HALF], TILE)
    right = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, HALF], TILE)
    rest = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, E], TILE)
    query_left = gl.allocate_shared_memory(gl.bfloat16, [1, HEAD_TILE, HALF], TILE)
    query_right = gl.allocate_shared_memory(gl.bfloat16, [1, HEAD_TILE, HALF], TILE)
    query_rest = gl.allocate_shared_memory(gl.bfloat16, [1, HEAD_TILE, E], TILE)
    tops = gl.allocate_shared_memory(gl.float32, [4, HEAD_TILE], PLAIN)  # maxima of both sides, then totals
    full = gl.allocate_shared_memory(gl.int64, [4 * CHUNKS, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    met = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(4 * CHUNKS):
        mbarrier.init(full.index(i), count=_PRODUCERS)
    for i in gl.static_range(4):
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    mbarrier.init(met, count=2)
    count = gl.load(visible + row)
    if K > 0:
        sel += row * K
        every = gl.arange(0, K_TILE, layout=EVERY)
        count = gl.sum((gl.load(sel + every, mask=every < K, other=-1) >= 0).to(gl.int32), 0)
    pairs = gl.maximum((count + 2 * KEYS - 1) // (2 * KEYS), 1)
    seq = gl.load(seqs + row).to(gl.int64)
    start, table = seq * 0, tables
    if P == 0:
        start = gl.load(tables + seq).to(gl.int64)
    else:
        table = tables + seq * num_blocks
    latent_at = (row * HEADS + head) * L
    rest_query = query + row * row_stride + head * head_stride + D
    queries, keys, bars = (query_left, query_right, query_rest), (left, right, rest), (full, free, ready, met)
    rows = (
        latent_query + latent_at,
        rest_query,
        head_stride,
        cos + row * (E // 2),
        sin + row * (E // 2),
        out + latent_at,
    )
    limits = (count, pairs, scale)
    gl.warp_specialize(
        [
            (produce, (plane, sel, table, start, count, pairs, keys, bars, K, P)),
            (_consume, (rows, limits, queries, keys, tops, bars, gl.constexpr(0))),
            (_consume, (rows, limits, queries, keys, tops, bars, gl.constexpr(1))),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


def serves(latent_query: Tensor, keys: Tensor, rest: int) -> bool:
    """Whether the kernel is laid out for such queries [R, h, L] and keys, on a card of Hopper's kind."""
    _, heads, rank = latent_query.shape
    if latent_query.dtype != torch.bfloat16 or keys.dtype != torch.bfloat16:
        return False
    return (heads % HEAD_TILE.value, rank, rest) == (0, L.value, E.value)


def attend_pairs(
    latent_query: Tensor, query: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, sel: Tensor | None, seqs: Tensor,
    visible: Tensor, tables: Tensor, out: Tensor, num_blocks: int, scale: float, page: int,
) -> None:  # fmt: skip
    """Attention of rows into `out` bf16 [R, h, L]. `keys` are pages, or side by side where `page` is 0.

    `tables` then says where each sequence begins. `scale`: of the exponents of two.
    """
    rows, heads, _ = latent_query.shape
    chosen = 0 if sel is None else sel.shape[1]
    _attend_pairs[(rows * heads // HEAD_TILE.value,)](
        latent_query, query, cos, sin, keys, sel, seqs, visible, tables, out, num_blocks, *query.stride()[:2], scale,
        heads, query.shape[2] - E.value, chosen, tile_size(chosen, 128), page, _CONSUMER_REGISTERS, num_warps=4,
    )  # fmt: skip
