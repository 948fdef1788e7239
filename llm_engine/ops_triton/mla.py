"""Latent attention in absorbed form: queries meet the cached latents directly, values are expanded afterwards.

A row walks over its keys in ascending position, whether they are a selection or everything it may see, in splits of a
number of keys that `exact` fixes. Every split keeps its own maximum and sums; they are merged in order, and one split
alone merges to what it was. So a row's bits depend on its own keys only, and a selection of everything equals none.

Shapes: R rows, N real rows, h heads, D query width without rotated part, J rope pairs, L latent rank, C = L + 2J,
V value width, K selected, Z splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.cache import SCALE_GROUP, is_fp8
from llm_engine.ops_triton.gemm import heads_product
from llm_engine.ops_triton.lang import (
    Ptr,
    Val,
    ceil_div,
    dot,
    e4m3_ptr,
    inline,
    kernel,
    load_angles,
    pair_columns,
    row_slots,
    tile_size,
)
from llm_engine.ops_triton.plan import TritonPlan
from llm_engine.ops_triton.tiles import Numerics

_KEYS: Final = 64  # of one step
_HEADS: Final = 64  # of one program, at most
_EXACT_SPLIT: Final = 512  # keys
_WANTED_PROGRAMS: Final = 264  # two for every processor
_PARTIAL_BYTES: Final = 512 << 20
_LOG2_E: Final = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class PackedKvB:
    """Both halves of kv_b_proj, [h, out, in]."""

    absorb_hLD: Tensor
    expand_hVL: Tensor
    numerics: Numerics


def pack_kv_b(key_hDL: Tensor, value_hVL: Tensor, *, numerics: Numerics) -> PackedKvB:
    """See `llm_engine.ops.spec.PackKvB`."""
    return PackedKvB(key_hDL.transpose(1, 2).contiguous(), value_hVL.contiguous(), numerics)


def mla_attend(
    query_RhD: Tensor, plane_BPC: Tensor, plan: TritonPlan, sel_NK: Tensor | None, kv_b: PackedKvB, scale: float
) -> Tensor:
    """See `llm_engine.ops.spec.MlaAttend`."""
    rows, heads, width = query_RhD.shape
    (_, rank, plain), value = kv_b.absorb_hLD.shape, kv_b.expand_hVL.shape[1]
    out_RhV = query_RhD.new_empty(rows, heads, value)
    if not plan.num_rows:
        return out_RhV.zero_()
    absorbed_RhC = query_RhD.new_empty(rows, heads, rank + width - plain)
    heads_product(query_RhD[..., :plain], kv_b.absorb_hLD, absorbed_RhC[..., :rank], kv_b.numerics)
    pairs = plan.cos_RJ.shape[1]
    _turn_rest[(rows,)](
        query_RhD, plan.cos_RJ, plan.sin_RJ, absorbed_RhC, *query_RhD.stride()[:2], heads, tile_size(heads), plain,
        rank, pairs, tile_size(pairs), num_warps=4,
    )  # fmt: skip
    latent_RhL = query_RhD.new_empty(rows, heads, rank)
    latent_RhL[plan.num_rows :] = 0
    keys = plan.max_visible if sel_NK is None else sel_NK.shape[1]
    split, portion = _splits(plan.num_rows, heads, rank, keys, kv_b.numerics)
    for first in range(0, plan.num_rows, portion):
        some = slice(first, min(first + portion, plan.num_rows))
        _attend_rows(absorbed_RhC, plane_BPC, plan, sel_NK, latent_RhL, some, scale, split, ceil_div(keys, split))
    heads_product(latent_RhL, kv_b.expand_hVL, out_RhV, kv_b.numerics)
    return out_RhV


def _splits(rows: int, heads: int, rank: int, keys: int, numerics: Numerics) -> tuple[int, int]:
    """Keys of a split, and how many rows may be in work at a time: partial sums take memory."""
    split = _EXACT_SPLIT
    if numerics == "fast":
        wanted = ceil_div(_WANTED_PROGRAMS, rows * ceil_div(heads, _HEADS))
        split = max(ceil_div(ceil_div(keys, wanted), _KEYS), 2) * _KEYS
    count = ceil_div(keys, split)
    return split, rows if count == 1 else max(_PARTIAL_BYTES // (4 * count * heads * rank), 1)


def _attend_rows(
    absorbed_RhC: Tensor,
    plane: Tensor,
    plan: TritonPlan,
    sel_NK: Tensor | None,
    latent_RhL: Tensor,
    some: slice,
    scale: float,
    split: int,
    splits: int,
) -> None:
    """Attention of some rows, in one split or merged from several."""
    _, heads, rank = latent_RhL.shape
    rows, pairs = some.stop - some.start, plan.cos_RJ.shape[1]
    sel = None if sel_NK is None else sel_NK[some]
    out, sums = latent_RhL[some], None
    if splits > 1:
        out = latent_RhL.new_empty(splits, rows, heads, rank, dtype=torch.float32)
        sums = latent_RhL.new_empty(splits, rows, heads, 2, dtype=torch.float32)
    head_tile = min(tile_size(heads, 16), _HEADS)
    _attend[(rows, ceil_div(heads, head_tile), splits)](
        absorbed_RhC[some], plane, sel, plan.seqs_N[some], plan.visible_N[some], plan.tables_SB, out, sums,
        rows, plan.tables_SB.stride(0), scale * _LOG2_E, split, heads, head_tile, rank, tile_size(rank, 16),
        2 * pairs, tile_size(2 * pairs, 16), 0 if sel is None else sel.shape[1], plan.block_tokens, splits > 1,
        is_fp8(plane), SCALE_GROUP, _KEYS, num_warps=8 if head_tile * rank > 8192 else 4, num_stages=2,
    )  # fmt: skip
    if sums is not None:
        _merge[(rows, heads)](out, sums, latent_RhL[some], splits, rows, heads, rank, tile_size(rank))


@kernel
def _turn_rest(
    query: Ptr,
    cos: Ptr,
    sin: Ptr,
    out: Ptr,
    row_stride: int,
    head_stride: int,
    HEADS: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    J: tl.constexpr,
    J_TILE: tl.constexpr,
) -> None:
    """Rotate the last 2J columns of a query into its place behind the absorbed ones."""
    row, head = tl.program_id(0).to(tl.int64), tl.arange(0, HEAD_TILE)[:, None]
    source = query + row * row_stride + head * head_stride + D
    target = out + (row * HEADS + head) * (L + 2 * J) + L
    c, s = load_angles(cos, sin, row, J, J_TILE)
    c, s = c[None, :], s[None, :]
    even, odd = pair_columns(J, J_TILE, True)
    even, odd = even[None, :], odd[None, :]
    mask = (head < HEADS) & (even < 2 * J)
    a = tl.load(source + even, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + odd, mask=mask, other=0.0).to(tl.float32)
    tl.store(target + even, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
    tl.store(target + odd, (b * c + a * s).to(out.dtype.element_ty), mask=mask)


@inline
def _load_keys(
    plane: Ptr,
    slot: Val,
    seen: Val,
    L: tl.constexpr,
    L_TILE: tl.constexpr,
    E: tl.constexpr,
    E_TILE: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[Val, Val]:
    """Latents [KEYS, L] and rotated keys [KEYS, E] of cache rows, zero where not seen."""
    column, rest = tl.arange(0, L_TILE), tl.arange(0, E_TILE)
    latent_mask, rest_mask = seen[:, None] & (column[None, :] < L), seen[:, None] & (rest[None, :] < E)
    if FP8:
        groups: tl.constexpr = L // GROUP
        at = plane + slot * (L + 4 * groups + 2 * E)
        value = tl.load(e4m3_ptr(at)[:, None] + column[None, :], mask=latent_mask, other=0.0).to(tl.float32)
        scale_at = (at + L).to(tl.pointer_type(tl.float32))[:, None] + tl.arange(0, groups)[None, :]
        scale = tl.load(scale_at, mask=seen[:, None], other=0.0)
        spread = tl.reshape(tl.broadcast_to(scale[:, :, None], (KEYS, groups, GROUP)), (KEYS, L))
        latent = (value * spread).to(tl.bfloat16)
        rope_at = (at + L + 4 * groups).to(tl.pointer_type(tl.bfloat16))[:, None] + rest[None, :]
    else:
        at = plane + slot[:, None] * (L + E)
        latent = tl.load(at + column[None, :], mask=latent_mask, other=0.0)
        rope_at = at + L + rest[None, :]
    return latent, tl.load(rope_at, mask=rest_mask, other=0.0)


@kernel
def _attend(
    query: Ptr,
    plane: Ptr,
    sel: Ptr,
    seqs: Ptr,
    visible: Ptr,
    tables: Ptr,
    out: Ptr,
    sums: Ptr,
    num_rows: int,
    num_blocks: int,
    scale: float,
    num_split: int,
    HEADS: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    L: tl.constexpr,
    L_TILE: tl.constexpr,
    E: tl.constexpr,
    E_TILE: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    PARTIAL: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """One row, some heads, one split of its keys. K = 0: no selection. PARTIAL: leave sums and maxima unmerged."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    count = tl.load(visible + row)
    if K > 0:
        count = tl.minimum(count, K)
    first = split * num_split
    end = tl.minimum(first + num_split, count)
    head = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)
    column, rest = tl.arange(0, L_TILE), tl.arange(0, E_TILE)
    head_mask = head[:, None] < HEADS
    query_at = query + (row * HEADS + head[:, None]) * (L + E)
    q_latent = tl.load(query_at + column[None, :], mask=head_mask & (column[None, :] < L), other=0.0)
    q_rest = tl.load(query_at + L + rest[None, :], mask=head_mask & (rest[None, :] < E), other=0.0)
    table = tables + tl.load(seqs + row).to(tl.int64) * num_blocks
    top = tl.full((HEAD_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((HEAD_TILE,), tl.float32)
    value = tl.zeros((HEAD_TILE, L_TILE), tl.float32)
    for start in range(first, end, KEYS):
        position = start + tl.arange(0, KEYS)
        seen = position < end
        if K > 0:
            position = tl.load(sel + row * K + position, mask=seen, other=-1)
            seen = position >= 0
        slot = row_slots(table, position, seen, P)
        latent, rope = _load_keys(plane, slot, seen, L, L_TILE, E, E_TILE, FP8, GROUP, KEYS)
        score = dot(q_rest, tl.trans(rope), dot(q_latent, tl.trans(latent), tl.zeros((HEAD_TILE, KEYS), tl.float32)))
        score = tl.where(seen[None, :], score * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet
        weight = tl.exp2(score - safe_top[:, None])
        fade = tl.exp2(top - safe_top)
        total = total * fade + tl.sum(weight, 1)
        value = dot(weight.to(latent.dtype), latent, value * fade[:, None])
        top = new_top
    mask = head_mask & (column[None, :] < L)
    if PARTIAL:
        at = (split.to(tl.int64) * num_rows + row) * HEADS + head
        tl.store(out + at[:, None] * L + column[None, :], value, mask=mask)
        tl.store(sums + at * 2, top, mask=head < HEADS)
        tl.store(sums + at * 2 + 1, total, mask=head < HEADS)
    else:
        divisor = tl.where(total == 0.0, 1.0, total)
        at = out + (row * HEADS + head[:, None]) * L + column[None, :]
        tl.store(at, (value / divisor[:, None]).to(out.dtype.element_ty), mask=mask)


@kernel
def _merge(
    partial: Ptr,
    sums: Ptr,
    out: Ptr,
    num_splits: int,
    num_rows: int,
    HEADS: tl.constexpr,
    L: tl.constexpr,
    L_TILE: tl.constexpr,
) -> None:
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, L_TILE)
    highest = tl.full((), float("-inf"), tl.float32)
    for split in range(num_splits):
        highest = tl.maximum(highest, tl.load(sums + ((split * num_rows + row) * HEADS + head) * 2))
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.full((), 0.0, tl.float32)
    value = tl.zeros((L_TILE,), tl.float32)
    for split in range(num_splits):
        at = (split * num_rows + row) * HEADS + head
        weight = tl.exp2(tl.load(sums + at * 2) - highest)
        total += tl.load(sums + at * 2 + 1) * weight
        value += tl.load(partial + at * L + column, mask=column < L, other=0.0) * weight
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(out + (row * HEADS + head) * L + column, (value / divisor).to(out.dtype.element_ty), mask=column < L)
