"""Writing cache rows: norm, rotation and the place in the paged planes. One program a row; a slot of -1 is not written.

A plane of bytes holds fp8 pages. Latent rows are then 656 bytes: 512 e4m3 values, one fp32 power-of-two scale for every
128 of them, the rotated part in bf16. An index page of P rows is P·128 e4m3 values, then P fp32 scales.

Shapes: R rows, L latent rank, J rope pairs, C = L + 2J, D index key width.
"""

from __future__ import annotations

from typing import Final

import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.lang import (
    Ptr,
    Val,
    await_inputs,
    e4m3_ptr,
    inline,
    kernel,
    let_next_in,
    load_angles,
    pair_columns,
    tile_size,
    to_e4m3,
    ue8m0,
)
from llm_engine.ops_triton.norm import rms_scale
from llm_engine.ops_triton.plan import TritonPlan

SCALE_GROUP: Final = 128  # values that share a scale


def is_fp8(plane: Tensor) -> bool:
    """Whether a plane holds fp8 pages."""
    return plane.dtype == torch.uint8


def write_latent(plane_BPC: Tensor, kv_RC: Tensor, weight_L: Tensor, eps: float, plan: TritonPlan) -> None:
    """See `llm_engine.ops.spec.WriteLatent`."""
    rank, pairs = weight_L.shape[0], plan.cos_RJ.shape[1]
    if not plan.num_rows:
        return
    args = (plane_BPC, plan.slots_N, kv_RC, weight_L, plan.cos_RJ, plan.sin_RJ, kv_RC.stride(0), eps)
    if is_fp8(plane_BPC):
        _write_latent_fp8[(plan.num_rows,)](*args, rank, rank // SCALE_GROUP, SCALE_GROUP, pairs, num_warps=4)
    else:
        _write_latent[(plan.num_rows,)](*args, rank, tile_size(rank), pairs, tile_size(pairs), num_warps=1)


def write_index_keys(
    plane_BPD: Tensor,
    key_RD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    plan: TritonPlan,
    *,
    interleaved: bool = False,
) -> None:
    """See `llm_engine.ops.spec.WriteIndexKeys`."""
    if not plan.num_rows:
        return
    width, pairs = key_RD.shape[1], plan.cos_RJ.shape[1]
    args = (plane_BPD, plan.slots_N, key_RD, weight_D, bias_D, plan.cos_RJ, plan.sin_RJ, key_RD.stride(0), eps)
    shape = (width, tile_size(width), pairs, tile_size(pairs), interleaved)
    fp8 = is_fp8(plane_BPD)
    _write_index_keys[(plan.num_rows,)](*args, *shape, plan.block_tokens, fp8, num_warps=1)


@kernel
def _write_latent(
    plane: Ptr,
    slots: Ptr,
    kv: Ptr,
    weight: Ptr,
    cos: Ptr,
    sin: Ptr,
    kv_stride: int,
    eps: float,
    L: tl.constexpr,
    L_TILE: tl.constexpr,
    J: tl.constexpr,
    J_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    source = kv + row.to(tl.int64) * kv_stride
    target = plane + slot * (L + 2 * J)
    column = tl.arange(0, L_TILE)
    mask = column < L
    latent = tl.load(source + column, mask=mask, other=0.0).to(tl.float32)
    latent = latent * rms_scale(latent, eps, L) * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(target + column, latent.to(plane.dtype.element_ty), mask=mask)
    c, s = load_angles(cos, sin, row, J, J_TILE)
    even, odd = pair_columns(J, J_TILE, True)
    a = tl.load(source + L + even, mask=even < 2 * J, other=0.0).to(tl.float32)
    b = tl.load(source + L + odd, mask=odd < 2 * J, other=0.0).to(tl.float32)
    tl.store(target + L + even, (a * c - b * s).to(plane.dtype.element_ty), mask=even < 2 * J)
    tl.store(target + L + odd, (b * c + a * s).to(plane.dtype.element_ty), mask=odd < 2 * J)


@inline
def put_latent_fp8(
    plane: Ptr,
    slots: Ptr,
    kv: Ptr,
    weight: Ptr,
    cos: Ptr,
    sin: Ptr,
    row: Val,
    kv_stride: Val,
    eps: Val,
    L: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    J: tl.constexpr,
) -> None:
    """The latent row of one row in an fp8 page."""
    slot = tl.load(slots + row)
    if slot >= 0:
        source = kv + row.to(tl.int64) * kv_stride
        target = plane + slot * (L + 4 * GROUPS + 4 * J)
        group = tl.arange(0, GROUPS)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        latent = tl.load(source + column).to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(tl.sum(latent * latent, 1), 0) / L + eps)
        latent = latent * factor * tl.load(weight + column).to(tl.float32)
        scale = ue8m0(tl.max(tl.abs(latent), 1))
        tl.store(e4m3_ptr(target) + column, to_e4m3(latent / scale[:, None]))
        tl.store((target + L).to(tl.pointer_type(tl.float32)) + group, scale)
        rope = (target + L + 4 * GROUPS).to(tl.pointer_type(tl.bfloat16))
        c, s = load_angles(cos, sin, row, J, J)
        even, odd = pair_columns(J, J, True)
        a, b = tl.load(source + L + even).to(tl.float32), tl.load(source + L + odd).to(tl.float32)
        tl.store(rope + even, (a * c - b * s).to(tl.bfloat16))
        tl.store(rope + odd, (b * c + a * s).to(tl.bfloat16))


@kernel
def _write_latent_fp8(
    plane: Ptr,
    slots: Ptr,
    kv: Ptr,
    weight: Ptr,
    cos: Ptr,
    sin: Ptr,
    kv_stride: int,
    eps: float,
    L: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    J: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    put_latent_fp8(plane, slots, kv, weight, cos, sin, tl.program_id(0), kv_stride, eps, L, GROUPS, GROUP, J)


@inline
def put_index_key(
    plane: Ptr,
    slots: Ptr,
    key: Ptr,
    weight: Ptr,
    bias: Ptr,
    cos: Ptr,
    sin: Ptr,
    row: Val,
    key_stride: Val,
    eps: Val,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    J: tl.constexpr,
    J_TILE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    P: tl.constexpr,
    FP8: tl.constexpr,
) -> None:
    """The index key of one row in its page."""
    slot = tl.load(slots + row)
    if slot >= 0:
        source = key + row.to(tl.int64) * key_stride
        column = tl.arange(0, D_TILE)
        mask = column < D
        value = tl.load(source + column, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(value, 0) / D
        centred = tl.where(mask, value - mean, 0.0)
        factor = rms_scale(centred, eps, D)
        plain = centred * factor * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        plain += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
        c, s = load_angles(cos, sin, row, J, J_TILE)
        first, second = pair_columns(J, J_TILE, INTERLEAVED)
        paired = tl.arange(0, J_TILE) < J
        a = (tl.load(source + first, mask=paired, other=0.0).to(tl.float32) - mean) * factor
        b = (tl.load(source + second, mask=paired, other=0.0).to(tl.float32) - mean) * factor
        a = a * tl.load(weight + first, mask=paired, other=0.0).to(tl.float32)
        b = b * tl.load(weight + second, mask=paired, other=0.0).to(tl.float32)
        a += tl.load(bias + first, mask=paired, other=0.0).to(tl.float32)
        b += tl.load(bias + second, mask=paired, other=0.0).to(tl.float32)
        a, b = a * c - b * s, b * c + a * s
        rest = mask & (column >= 2 * J)
        if FP8:
            amax = tl.max(tl.where(rest, tl.abs(plain), 0.0), 0)
            pair_max = tl.where(paired, tl.maximum(tl.abs(a), tl.abs(b)), 0.0)
            scale = ue8m0(tl.maximum(amax, tl.max(pair_max, 0)))
            page = plane + (slot // P) * (P * (D + 4))
            target = e4m3_ptr(page + (slot % P) * D)
            tl.store(target + column, to_e4m3(plain / scale), mask=rest)
            tl.store(target + first, to_e4m3(a / scale), mask=paired)
            tl.store(target + second, to_e4m3(b / scale), mask=paired)
            tl.store((page + P * D).to(tl.pointer_type(tl.float32)) + slot % P, scale)
        else:
            target = plane + slot * D
            tl.store(target + column, plain.to(plane.dtype.element_ty), mask=rest)
            tl.store(target + first, a.to(plane.dtype.element_ty), mask=paired)
            tl.store(target + second, b.to(plane.dtype.element_ty), mask=paired)


@kernel
def _write_index_keys(
    plane: Ptr,
    slots: Ptr,
    key: Ptr,
    weight: Ptr,
    bias: Ptr,
    cos: Ptr,
    sin: Ptr,
    key_stride: int,
    eps: float,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    J: tl.constexpr,
    J_TILE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    P: tl.constexpr,
    FP8: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    put_index_key(
        plane, slots, key, weight, bias, cos, sin, tl.program_id(0), key_stride, eps, D, D_TILE, J, J_TILE, INTERLEAVED,
        P, FP8,
    )  # fmt: skip
