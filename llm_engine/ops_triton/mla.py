"""Latent attention in absorbed form: queries meet the cached latents directly, values are expanded afterwards.

A row walks over its keys in ascending position, whether they are a selection or everything it may see, in splits of a
number of keys that `exact` fixes. Every split keeps its own maximum and sums; they are merged in order, and one split
alone merges to what it was. So a row's bits depend on its own keys only, and a selection of everything equals none.
With `fast`, rows share their keys evenly among splits, and where many rows read the same fp8 pages these are unpacked
once for all of them. Rows in a few splits at most go to `attend_hopper` on cards of that kind.

Shapes: R rows, N real rows, h heads, D query width without rotated part, J rope pairs, L latent rank, C = L + 2J,
V value width, K selected, Z splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from llm_engine.ops.spec import Selection, made
from llm_engine.ops_triton.attend import _attend, _merge, _unpack
from llm_engine.ops_triton.cache import SCALE_GROUP, is_fp8
from llm_engine.ops_triton.expand import merge_and_expand, serves
from llm_engine.ops_triton.gemm import heads_product
from llm_engine.ops_triton.lang import ceil_div, for_hopper, tile_size
from llm_engine.ops_triton.plan import TritonPlan
from llm_engine.ops_triton.tiles import Numerics

# Tiles and splits were chosen by measuring on an H200, at 128 heads and 2,048 chosen keys.
_KEYS: Final = 64  # of one step; 32 cost half as much again
_HEADS: Final = 64  # of one program, at most: the rows of one product, and their sums fill its registers
_EXACT_SPLIT: Final = 512  # keys
_WANTED_PROGRAMS: Final = 132  # one for every processor, which holds no more
_HOPPER_SPLITS: Final = 4  # above, rows are few and a program's start weighs more than its keys
_PARTIAL_BYTES: Final = 512 << 20
_MERGED_AT_ONCE: Final = 16  # partial sums in flight, at most
_UNPACKED_BYTES: Final = 512 << 20
_UNPACK_READS: Final = 4  # of every unpacked key, from which on unpacking has paid
_UNPACK_KEYS: Final = 16  # of one program
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
    query_RhD: Tensor,
    plane_BPC: Tensor,
    plan: TritonPlan,
    selection: Selection,
    kv_b: PackedKvB,
    scale: float,
    *,
    fp8: bool = False,
) -> Tensor:
    """See `llm_engine.ops.spec.MlaAttend`. `fp8`: values may carry their quantised form."""
    rows, heads, width = query_RhD.shape
    (_, rank, plain), value = kv_b.absorb_hLD.shape, kv_b.expand_hVL.shape[1]
    out_RhV = query_RhD.new_empty(rows, heads, value)
    if not plan.num_rows:
        made(selection)
        return out_RhV.zero_()
    absorbed_RhL = query_RhD.new_empty(rows, heads, rank)
    heads_product(query_RhD[..., :plain], kv_b.absorb_hLD, absorbed_RhL, kv_b.numerics)
    sel_NK = made(selection)
    latent_RhL = query_RhD.new_empty(rows, heads, rank)
    latent_RhL[plan.num_rows :] = 0
    keys = plan.max_visible if sel_NK is None else sel_NK.shape[1]
    unpacked_TC = None
    if kv_b.numerics == "fast" and is_fp8(plane_BPC) and _pays(plan, keys, rank + width - plain):
        unpacked_TC = _unpacked(plane_BPC, plan, rank, query_RhD)
    split, splits, portion = _splits(plan.num_rows, heads, rank, keys, kv_b.numerics)
    at_once = kv_b.numerics == "fast" and rows == plan.num_rows <= portion and serves(rows, splits, kv_b.expand_hVL)
    for first in range(0, plan.num_rows, portion):
        some = slice(first, min(first + portion, plan.num_rows))
        parts = _attend_rows(
            query_RhD, absorbed_RhL, plane_BPC, unpacked_TC, plan, sel_NK, latent_RhL, some, scale, split, splits
        )
        if parts is not None and at_once:
            return merge_and_expand(*parts, kv_b.expand_hVL, fp8=fp8)
        if parts is not None:
            grid, tile = (len(latent_RhL[some]), heads), tile_size(rank)
            _merge[grid](*parts, latent_RhL[some], splits, grid[0], heads, rank, tile, _MERGED_AT_ONCE)
    heads_product(latent_RhL, kv_b.expand_hVL, out_RhV, kv_b.numerics)
    return out_RhV


def _splits(rows: int, heads: int, rank: int, keys: int, numerics: Numerics) -> tuple[int, int, int]:
    """Keys of a split (0: an even share), splits of a row, and how many rows may be in work at a time.

    Partial sums take memory.
    """
    if numerics == "exact":
        split, count = _EXACT_SPLIT, ceil_div(keys, _EXACT_SPLIT)
    else:
        split, wanted = 0, _WANTED_PROGRAMS // (rows * ceil_div(heads, _HEADS))
        count = max(min(wanted, ceil_div(keys, _KEYS)), 1)
    return split, count, rows if count == 1 else max(_PARTIAL_BYTES // (4 * count * heads * rank), 1)


def _pays(plan: TritonPlan, keys: int, width: int) -> bool:
    """Whether unpacking the sequences' keys once costs less than every row unpacking those it reads."""
    if 2 * plan.num_keys * width > _UNPACKED_BYTES:
        return False
    return plan.num_rows * keys >= _UNPACK_READS * plan.num_keys


def _unpacked(plane: Tensor, plan: TritonPlan, rank: int, like: Tensor) -> Tensor:
    """Latents and rotated keys of all sequences side by side, bf16 [T, C]."""
    rest = 2 * plan.cos_RJ.shape[1]
    out_TC = like.new_empty(plan.num_keys, rank + rest, dtype=torch.bfloat16)
    _unpack[(ceil_div(plan.max_visible, _UNPACK_KEYS), len(plan.lengths_S))](
        plane, plan.tables_SB, plan.starts_S, plan.lengths_S, out_TC, plan.tables_SB.stride(0),
        plan.lengths_S.stride(0), rank, rest, tile_size(rest), plan.block_tokens, SCALE_GROUP, _UNPACK_KEYS,
        num_warps=4,
    )  # fmt: skip
    return out_TC


def _attend_rows(
    query_RhD: Tensor,
    absorbed_RhL: Tensor,
    plane: Tensor,
    unpacked_TC: Tensor | None,
    plan: TritonPlan,
    sel_NK: Tensor | None,
    latent_RhL: Tensor,
    some: slice,
    scale: float,
    split: int,
    splits: int,
) -> tuple[Tensor, Tensor] | None:
    """Attention of some rows. Of several splits: their sums [Z, R, h, L], and maxima and totals [Z, R, h, 2]."""
    _, heads, rank = latent_RhL.shape
    rows, pairs = some.stop - some.start, plan.cos_RJ.shape[1]
    sel = None if sel_NK is None else sel_NK[some]
    out, sums = latent_RhL[some], None
    if splits > 1:
        out = latent_RhL.new_empty(splits, rows, heads, rank, dtype=torch.float32)
        sums = latent_RhL.new_empty(splits, rows, heads, 2, dtype=torch.float32)
    head_tile, chosen = min(tile_size(heads, 16), _HEADS), 0 if sel is None else sel.shape[1]
    keys, tables, page = plane, plan.tables_SB, plan.block_tokens
    if unpacked_TC is not None:
        keys, tables, page = unpacked_TC, plan.starts_S, 0
    special = for_hopper("attend_hopper") if not split and splits <= _HOPPER_SPLITS else None
    if special is not None and special.serves(absorbed_RhL, keys, 2 * pairs):
        special.attend_pairs(
            absorbed_RhL[some], query_RhD[some], plan.cos_RJ[some], plan.sin_RJ[some], keys, sel, plan.seqs_N[some],
            plan.visible_N[some], tables, out, sums, plan.tables_SB.stride(0), scale * _LOG2_E, page,
        )  # fmt: skip
    else:
        # Triton keeps as many tiles of keys in flight as stages are left by looking up where they are; two tiles fit.
        listed = not is_fp8(keys) and (sel is not None or unpacked_TC is None)
        _attend[(rows * ceil_div(heads, head_tile), splits)](
            absorbed_RhL[some], query_RhD[some], plan.cos_RJ[some], plan.sin_RJ[some], keys, sel, plan.seqs_N[some],
            plan.visible_N[some], tables, out, sums, rows, plan.tables_SB.stride(0), *query_RhD.stride()[:2],
            scale * _LOG2_E, heads, head_tile, query_RhD.shape[2] - 2 * pairs, rank, tile_size(rank, 16),
            2 * pairs, tile_size(2 * pairs, 16), chosen, tile_size(chosen), page,
            is_fp8(keys), SCALE_GROUP, _KEYS, split, splits > 1,
            num_warps=8 if head_tile * rank > 8192 else 4, num_stages=3 if listed else 2,
        )  # fmt: skip
    return None if sums is None else (out, sums)
