"""The lightning indexer's choice: score all visible positions of a row, keep the k best.

Scores go through memory, so rows are taken in portions that keep them within a bound. Over planes of bytes queries are
quantised like keys, one scale a head, which then is part of the head's weight.

Shapes: R rows, N real rows, h index heads, D index key width, J rope pairs, T positions, K chosen.
"""

from __future__ import annotations

from typing import Final

import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.cache import is_fp8
from llm_engine.ops_triton.lang import (
    Ptr,
    await_inputs,
    ceil_div,
    dot,
    e4m3_ptr,
    kernel,
    let_next_in,
    load_angles,
    pair_columns,
    row_slots,
    tile_size,
    to_e4m3,
    ue8m0,
)
from llm_engine.ops_triton.orders import as_order
from llm_engine.ops_triton.plan import GROUP_ROWS, TritonPlan
from llm_engine.ops_triton.tiles import Numerics
from llm_engine.ops_triton.topk import choose

_WANTED_PROGRAMS: Final = 528  # four for every processor
_MOST_TILES: Final = 32  # steps of one program
_SCORE_BYTES: Final = 256 << 20
_KEYS: Final = 64  # of a tile, which is a block where blocks are as usual
_LINE: Final = 64  # scores; rows begin at whole lines of memory


def index_topk(
    query_RhD: Tensor,
    g_Rh: Tensor,
    plane_BPD: Tensor,
    plan: TritonPlan,
    k: int,
    *,
    interleaved: bool = False,
    numerics: Numerics = "exact",
) -> Tensor | None:
    """See `llm_engine.ops.spec.IndexTopk`."""
    if plan.max_visible <= k:
        return None
    turned_NhD, g_Nh = _turned(query_RhD, g_Rh, plan, interleaved, fp8=is_fp8(plane_BPD))
    sel_NK = query_RhD.new_empty(plan.num_rows, k, dtype=torch.int32)
    width = ceil_div(plan.max_visible, _LINE) * _LINE
    most = ceil_div(_SCORE_BYTES, 4 * width * GROUP_ROWS) * GROUP_ROWS
    orders_MT = turned_NhD.new_empty(min(most, plan.num_rows), width, dtype=torch.int32)
    group, groups = 0, len(plan.group_starts) - 1
    while group < groups:
        first = int(plan.group_starts[group])
        end = int(plan.group_starts.searchsorted(first + most, "right")) - 1
        rows = int(plan.group_starts[end]) - first
        _launch_scores(turned_NhD, g_Nh, plane_BPD, plan, orders_MT, slice(group, end), first, numerics)
        choose(orders_MT[:rows], plan.visible_N[first : first + rows], sel_NK[first : first + rows])
        group = end
    return sel_NK


def _turned(
    query_RhD: Tensor, g_Rh: Tensor, plan: TritonPlan, interleaved: bool, *, fp8: bool
) -> tuple[Tensor, Tensor]:
    """Queries of real rows with their first 2J columns rotated, in the cache's format, and their heads' weights."""
    _, heads, width = query_RhD.shape
    pairs = plan.cos_RJ.shape[1]
    dtype = torch.uint8 if fp8 else query_RhD.dtype
    turned_NhD = query_RhD.new_empty(plan.num_rows, heads, width, dtype=dtype)
    g_Nh = query_RhD.new_empty(plan.num_rows, heads, dtype=torch.float32)
    _turn[(plan.num_rows,)](
        query_RhD, g_Rh, plan.cos_RJ, plan.sin_RJ, turned_NhD, g_Nh, *query_RhD.stride()[:2], g_Rh.stride(0),
        heads, tile_size(heads), width, tile_size(width), pairs, tile_size(pairs), interleaved, fp8, num_warps=4,
    )  # fmt: skip
    return turned_NhD, g_Nh


def _launch_scores(
    turned_NhD: Tensor,
    g_Nh: Tensor,
    plane: Tensor,
    plan: TritonPlan,
    orders_MT: Tensor,
    groups: slice,
    first: int,
    numerics: Numerics,
) -> None:
    _, heads, width = turned_NhD.shape
    columns, count = orders_MT.shape[1], groups.stop - groups.start
    # The fastest on an H200. A row's sum over its heads takes one form with `exact`: that of whole groups.
    alone = numerics == "fast" and count == int(plan.group_starts[groups.stop] - plan.group_starts[groups.start])
    fp8 = is_fp8(plane)
    rows, warps, stages = (1, 4, 3) if alone else (GROUP_ROWS, 8, 3) if fp8 else (GROUP_ROWS, 4, 2)
    tiles = ceil_div(columns, _KEYS)
    share = min(ceil_div(tiles * count, _WANTED_PROGRAMS), _MOST_TILES)
    _scores[(ceil_div(tiles, share), count)](
        turned_NhD, g_Nh, plane, plan.group_starts_G[groups], plan.group_sizes_G[groups], plan.seqs_N, plan.visible_N,
        plan.tables_SB, orders_MT, first, plan.tables_SB.stride(0), columns, share,
        heads, tile_size(heads, 16), width, tile_size(width, 16), plan.block_tokens, rows, _KEYS, fp8,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


@kernel
def _turn(
    query: Ptr,
    g: Ptr,
    cos: Ptr,
    sin: Ptr,
    out: Ptr,
    g_out: Ptr,
    row_stride: int,
    head_stride: int,
    g_stride: int,
    HEADS: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    J: tl.constexpr,
    J_TILE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FP8: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row, head = tl.program_id(0).to(tl.int64), tl.arange(0, HEAD_TILE)
    head_mask = head[:, None] < HEADS
    source = query + row * row_stride + head[:, None] * head_stride
    target = out + (row * HEADS + head[:, None]) * D
    column = tl.arange(0, D_TILE)[None, :]
    rest = head_mask & (column >= 2 * J) & (column < D)
    plain = tl.load(source + column, mask=rest, other=0.0).to(tl.float32)
    c, s = load_angles(cos, sin, row, J, J_TILE)
    first, second = pair_columns(J, J_TILE, INTERLEAVED)
    first, second = first[None, :], second[None, :]
    paired = head_mask & (tl.arange(0, J_TILE)[None, :] < J)
    a = tl.load(source + first, mask=paired, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=paired, other=0.0).to(tl.float32)
    a, b = a * c[None, :] - b * s[None, :], b * c[None, :] + a * s[None, :]
    weight = tl.load(g + row * g_stride + head, mask=head < HEADS, other=0.0).to(tl.float32)
    if FP8:
        amax = tl.maximum(tl.max(tl.abs(plain), 1), tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 1))
        scale = ue8m0(amax)
        weight = weight * scale
        target = e4m3_ptr(target)
        tl.store(target + column, to_e4m3(plain / scale[:, None]), mask=rest)
        tl.store(target + first, to_e4m3(a / scale[:, None]), mask=paired)
        tl.store(target + second, to_e4m3(b / scale[:, None]), mask=paired)
    else:
        tl.store(target + column, plain.to(out.dtype.element_ty), mask=rest)
        tl.store(target + first, a.to(out.dtype.element_ty), mask=paired)
        tl.store(target + second, b.to(out.dtype.element_ty), mask=paired)
    tl.store(g_out + row * HEADS + head, weight, mask=head < HEADS)


@kernel
def _scores(
    query: Ptr,
    g: Ptr,
    plane: Ptr,
    group_starts: Ptr,
    group_sizes: Ptr,
    seqs: Ptr,
    visible: Ptr,
    tables: Ptr,
    orders: Ptr,
    num_skipped: int,
    num_blocks: int,
    num_columns: int,
    num_share: int,
    HEADS: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    FP8: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Orders of scores of `num_share` tiles of KEYS positions for the rows of one group; see `choose`."""
    await_inputs(OVERLAP)
    first = tl.load(group_starts + tl.program_id(1))
    end = first + tl.load(group_sizes + tl.program_id(1))
    last_visible = tl.load(visible + end - 1)  # of the group's last row, which sees most
    begin = tl.program_id(0) * num_share * KEYS
    stop = tl.minimum(begin + num_share * KEYS, last_visible)
    table = tables + tl.load(seqs + first).to(tl.int64) * num_blocks
    block = tl.load(table + begin // P, mask=begin // P < num_blocks, other=0)
    if begin >= stop:
        return
    column = tl.arange(0, D_TILE)
    wide = tl.arange(0, ROWS * HEAD_TILE)  # heads of one row, then those of the next
    row, head = (first + wide // HEAD_TILE).to(tl.int64), wide % HEAD_TILE
    there = (row < end) & (head < HEADS)
    query_at = (e4m3_ptr(query) if FP8 else query) + (row * HEADS + head)[None, :] * D + column[:, None]
    q = tl.load(query_at, mask=there[None, :] & (column[:, None] < D), other=0.0)
    weight = tl.load(g + row * HEADS + head, mask=there, other=0.0)
    member = first + tl.arange(0, ROWS)
    own = tl.load(visible + member, mask=member < end, other=0)
    offset = tl.arange(0, KEYS)
    out = orders + (member - num_skipped).to(tl.int64)[None, :] * num_columns + offset[:, None]
    size: tl.constexpr = P * (D + 4) if FP8 else P * D  # of a block: keys, then their scales
    for start in range(begin, stop, KEYS):
        if KEYS == P:
            # A tile is a block: its keys need no addresses of their own, and its number is known a step ahead.
            page, within, seen = plane + block.to(tl.int64) * size, offset, offset < P
            block = tl.load(table + start // P + 1, mask=start + P < stop, other=0)
        else:
            seen = start + offset < last_visible
            slot = row_slots(table, start + offset, seen, P)
            page, within = plane + slot // P * size, slot % P
        key_at = (page + within * D)[:, None] + column[None, :]
        key_mask = seen[:, None] & (column[None, :] < D)
        if FP8:
            key = tl.load(e4m3_ptr(key_at), mask=key_mask, other=0.0)
            scale = tl.load((page + P * D).to(tl.pointer_type(tl.float32)) + within, mask=seen, other=0.0)
        else:
            key = tl.load(key_at, mask=key_mask, other=0.0)
            scale = tl.full((KEYS,), 1.0, tl.float32)
        products = dot(key, q, tl.zeros((KEYS, ROWS * HEAD_TILE), tl.float32))
        products = tl.maximum(products, 0.0) * weight[None, :]
        score = tl.sum(tl.reshape(products, (KEYS, ROWS, HEAD_TILE)), 2) * scale[:, None]
        order = as_order(score).to(tl.int32, bitcast=True)
        tl.store(out + start, order, mask=offset[:, None] < (own - start)[None, :])
