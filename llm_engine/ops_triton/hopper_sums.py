"""How attention on Hopper weighs keys and sums up values: one of two groups of four warps, called sides.

See `attend_hopper` for what they share.
"""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from llm_engine.ops_triton.hopper_lang import (
    CHUNKS,
    HALF,
    HEAD_TILE,
    HEADS_OF_SCORES,
    KEYS,
    KEYS_OF_SCORES,
    LINES,
    SCORES,
    WIDE,
    E,
    Group,
    L,
    Tile,
    gluon_inline,
    sync,
)
from llm_engine.ops_triton.lang import Ptr, Val


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
    return sums * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, sums.type.layout)), 1)


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
    sums: Val, top: Val, total: Val, pair: Val, latents: Tile, rest: Tile, tops: Tile, ready: Tile, SIDE: gl.constexpr
) -> tuple[Any, Val, Val]:
    """Begin to add the other side's tile of a pair: this side's columns under the weights in `rest`."""
    mbarrier.wait(ready.index(1 - SIDE), pair & 1)
    hopper.fence_async_shared()
    new = tops.index(1 - SIDE).load(HEADS_OF_SCORES)
    fade = gl.exp2(top - new)
    other = latents.index(2 * (1 - SIDE) + SIDE)
    product = hopper.warpgroup_mma(rest.index(1 - SIDE), other, _scaled(sums, fade), is_async=True)
    return product, new, total * fade


@gluon_inline
def _add_pair(
    sums: Val, top: Val, total: Val, pair: Val, count: Val, scale: Val, query: Group, keys: Group, tops: Tile,
    bars: Group, SIDE: gl.constexpr,
) -> tuple[Val, Val, Val]:  # fmt: skip
    """Add the other side's last tile and the own one of a pair to this side's columns."""
    full, free, ready, _ = bars
    latents, rest = keys
    near_query, far_query = query[SIDE], query[1 - SIDE]
    # Zero, which the compiler can't know: it would compute every tile's addresses before the loop and spill them.
    first = pair >> 28
    own = SIDE + first
    own_near, own_far = latents.index(2 * own + SIDE), latents.index(2 * own + 1 - SIDE)
    own_rest, phase = rest.index(own), pair & 1
    score = gl.zeros([HEAD_TILE, KEYS], gl.float32, layout=SCORES)
    score = _score_half(score, near_query.index(first), own_near, full, phase, 2 * SIDE, True)
    # At first side 0 has nothing to add from the other: what this makes of leftovers is dropped by the own product.
    product, top, total = _begin_other(sums, top, total, pair - (1 - SIDE), latents, rest, tops, ready, SIDE)
    begun = (pair > 0) | (SIDE == 1)
    score = _score_half(score, far_query.index(first), own_far, full, phase, 2 * SIDE + 1, False)
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
def _put_partial(out: Ptr, parts: Ptr, sums: Val, top: Val, total: Val, SIDE: gl.constexpr) -> None:
    """One side's columns as they are; maxima and totals beside them."""
    head = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(1, sums.type.layout))
    column = SIDE * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, sums.type.layout))
    gl.store(out + gl.expand_dims(head * L, 1) + gl.expand_dims(column, 0), sums)
    if SIDE == 0:
        head = gl.arange(0, HEAD_TILE, layout=HEADS_OF_SCORES)
        gl.store(parts + head * 2, top)
        gl.store(parts + head * 2 + 1, total)


@gluon_inline
def consume(
    rows: Group, limits: Group, query: Group, keys: Group, tops: Tile, bars: Group,
    PARTIAL: gl.constexpr, COLUMNS: gl.constexpr, SIDE: gl.constexpr,
) -> None:  # fmt: skip
    """One side: its columns of all heads' sums. COLUMNS: of one product."""
    latent_query, rest_query, head_stride, cos, sin, out, parts = rows
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
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    sums = gl.zeros([HEAD_TILE, HALF], gl.float32, layout=layout)
    top = gl.full([HEAD_TILE], -1e30, gl.float32, layout=HEADS_OF_SCORES)  # below any score
    total = gl.zeros([HEAD_TILE], gl.float32, layout=HEADS_OF_SCORES)
    for pair in range(pairs):
        sums, top, total = _add_pair(sums, top, total, pair, count, scale, query, keys, tops, bars, SIDE)
    if SIDE == 0:
        product, top, total = _begin_other(sums, top, total, pairs - 1, keys[0], keys[1], tops, ready, SIDE)
        sums = hopper.warpgroup_mma_wait(0, deps=(product,))
    tops.index(2 + SIDE).store(total)
    sync()
    mbarrier.arrive(met, count=1)
    mbarrier.wait(met, 1)
    total += tops.index(3 - SIDE).load(HEADS_OF_SCORES)
    # Where there is nothing, sums may hold 0 · NaN.
    empty = gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, sums.type.layout)) == 0.0, 1)
    if PARTIAL:
        _put_partial(out, parts, gl.where(empty, 0.0, sums), top, total, SIDE)
    else:
        sums = _scaled(sums, 1.0 / gl.where(total == 0.0, 1.0, total))
        spare.store(gl.where(empty, 0.0, sums).to(gl.bfloat16))
        sync()
        head = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(1, WIDE))
        column = SIDE * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, WIDE))
        gl.store(out + gl.expand_dims(head * L, 1) + gl.expand_dims(column, 0), spare.load(WIDE))
