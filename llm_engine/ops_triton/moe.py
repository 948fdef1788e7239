"""SwiGLU MLPs: dense, and routed experts whose rows were dealt into tiles.

A shared expert of the routed experts' width is one more expert that every row chooses last, with weight one.

Shapes: R rows, H hidden, E experts, F expert width, K chosen, S slots of a deal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.deal import Deal, deal
from llm_engine.ops_triton.gemm import PackedLinear, linear, scaled_group
from llm_engine.ops_triton.lang import Ptr, ceil_div, dot, kernel, sigmoid
from llm_engine.ops_triton.quant import BLOCK, Fp8Weight, can_be_fp8, quantise_rows, quantise_stack, quantise_weight
from llm_engine.ops_triton.tiles import Numerics, Tile, expert_tile

_COMBINE_TILE = 1024


@dataclass(frozen=True, slots=True)
class PackedMlp:
    """Gate rows over up rows, then down."""

    gate_up_2FH: Tensor | Fp8Weight
    down: PackedLinear
    numerics: Numerics


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Stacks of experts. `merged`: the last one is the shared expert."""

    gate_up_E2FH: Tensor | Fp8Weight
    down_EHF: Tensor | Fp8Weight
    merged: bool
    shared: PackedMlp | None
    numerics: Numerics


def pack_mlp(gate_up_2FH: Tensor, down_HF: Tensor, *, dtype: torch.dtype, fp8: bool, numerics: Numerics) -> PackedMlp:
    """See `llm_engine.ops.spec.PackMlp`."""
    gate_up, down = _packed(gate_up_2FH, fp8), _packed(down_HF, fp8)
    return PackedMlp(gate_up, PackedLinear(down, dtype, numerics), numerics)


def pack_experts(
    gate_up_E2FH: Tensor, down_EHF: Tensor, *, shared: PackedMlp | None = None, fp8: bool, numerics: Numerics
) -> PackedExperts:
    """See `llm_engine.ops.spec.PackExperts`."""
    gate_up, down = _packed(gate_up_E2FH, fp8), _packed(down_EHF, fp8)
    merged = shared is not None and shared.gate_up_2FH.shape == gate_up_E2FH.shape[1:]
    if merged and shared is not None:
        gate_up = _with_one_more(gate_up, shared.gate_up_2FH)
        down = _with_one_more(down, shared.down.weight_OI)
    return PackedExperts(gate_up, down, merged, None if merged else shared, numerics)


def _packed(weight: Tensor, fp8: bool) -> Tensor | Fp8Weight:
    # The seam between gate and up rows must fall between blocks.
    if fp8 and can_be_fp8(weight) and weight.shape[-2] % (2 * BLOCK) == 0:
        return quantise_stack(weight) if weight.dim() == 3 else quantise_weight(weight)
    return weight.contiguous()


def _with_one_more(stack: Tensor | Fp8Weight, one: Tensor | Fp8Weight) -> Tensor | Fp8Weight:
    if isinstance(stack, Fp8Weight):
        assert isinstance(one, Fp8Weight), "equal shapes are packed alike"
        values = torch.cat([stack.values_OI, one.values_OI[None]])
        return Fp8Weight(values, torch.cat([stack.scales, one.scales[None]]))
    assert isinstance(one, Tensor), "equal shapes are packed alike"
    return torch.cat([stack, one[None]])


def mlp(x_RH: Tensor, packed: PackedMlp) -> Tensor:
    """See `llm_engine.ops.spec.Mlp`."""
    rows = x_RH.shape[0]
    tile = expert_tile(packed.numerics, rows, x_RH.shape[1])
    return linear(_up(x_RH, packed.gate_up_2FH, None, tile), packed.down)


def moe(x_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor, packed: PackedExperts) -> Tensor:
    """See `llm_engine.ops.spec.Moe`."""
    (rows, hidden), top_k = x_RH.shape, ids_RK.shape[1]
    out_RH = x_RH.new_empty(rows, hidden)
    if not rows:
        return out_RH
    experts = packed.gate_up_E2FH.shape[0]
    tile = expert_tile(packed.numerics, rows * top_k / experts, hidden)
    dealt = deal(ids_RK, experts, tile.rows, with_shared=packed.merged)
    down_SH = _down(_up(x_RH, packed.gate_up_E2FH, dealt, tile), packed.down_EHF, dealt, tile, x_RH.dtype)
    shared_RH = None if packed.shared is None else mlp(x_RH, packed.shared)
    _combine[(rows, ceil_div(hidden, _COMBINE_TILE))](
        down_SH, dealt.slot_of_choice_RK, weights_RK, shared_RH, out_RH,
        hidden, top_k, packed.merged, packed.shared is not None, _COMBINE_TILE,
    )  # fmt: skip
    return out_RH


def _up(x_RH: Tensor, gate_up: Tensor | Fp8Weight, dealt: Deal | None, tile: Tile) -> Tensor:
    """silu(x · Wgᵀ) · (x · Wuᵀ) for every slot of a deal, or for every row with one expert only."""
    rows, depth = x_RH.shape
    width = gate_up.shape[-2] // 2
    tiles = ceil_div(rows, tile.rows) if dealt is None else dealt.num_tiles
    out_SF = x_RH.new_empty(rows if dealt is None else tiles * tile.rows, width)
    row_of_slot, expert_of_tile = (None, None) if dealt is None else (dealt.row_of_slot, dealt.expert_of_tile_T)
    if not rows:
        return out_SF
    fp8 = isinstance(gate_up, Fp8Weight)
    if isinstance(gate_up, Fp8Weight):
        quantised = quantise_rows(x_RH)
        x, x_scales, weight, scales = quantised.values_RI, quantised.scales_GR, gate_up.values_OI, gate_up.scales
    else:
        x, x_scales, weight, scales = x_RH, None, gate_up, None
    _up_kernel[(tiles, ceil_div(width, tile.columns))](
        x, x_scales, weight, scales, row_of_slot, expert_of_tile, out_SF, rows, x.stride(0), depth, width,
        dealt is not None, fp8, tile.rows, tile.columns, BLOCK if fp8 else tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_SF


def _down(x_SF: Tensor, down: Tensor | Fp8Weight, dealt: Deal, tile: Tile, dtype: torch.dtype) -> Tensor:
    """x · Wdᵀ for every slot of a deal."""
    slots, depth = x_SF.shape
    out = down.shape[-2]
    y_SH = x_SF.new_empty(slots, out, dtype=dtype)
    fp8 = isinstance(down, Fp8Weight)
    if isinstance(down, Fp8Weight):
        quantised = quantise_rows(x_SF)
        x, x_scales, weight, scales = quantised.values_RI, quantised.scales_GR, down.values_OI, down.scales
    else:
        x, x_scales, weight, scales = x_SF, None, down, None
    _down_kernel[(dealt.num_tiles, ceil_div(out, tile.columns))](
        x, x_scales, weight, scales, dealt.expert_of_tile_T, y_SH, slots, depth, out,
        fp8, tile.rows, tile.columns, BLOCK if fp8 else min(tile.depth, 128),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_SH


@kernel
def _up_kernel(
    x: Ptr,
    x_scales: Ptr,
    weight: Ptr,
    weight_scales: Ptr,
    row_of_slot: Ptr,
    expert_of_tile: Ptr,
    out: Ptr,
    num_rows: int,
    x_stride: int,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPED: tl.constexpr,
    FP8: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    slot = tile * ROWS + tl.arange(0, ROWS)
    expert = tl.full((), 0, tl.int64)
    if GROUPED:
        expert = tl.load(expert_of_tile + tile).to(tl.int64)
        if expert < 0:
            return
        row = tl.load(row_of_slot + slot).to(tl.int64)
        row_mask = row >= 0
    else:
        row = slot.to(tl.int64)
        row_mask = row < num_rows
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < WIDTH
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    x_at = x + row[:, None] * x_stride
    gate_at = weight + (expert * (2 * WIDTH) + column[None, :]) * DEPTH
    if FP8:
        groups: tl.constexpr = DEPTH // STEP
        scale_at = weight_scales + (expert * (2 * WIDTH // STEP) + column // STEP) * groups
        up_at, up_scale_at = gate_at + WIDTH * DEPTH, scale_at + (WIDTH // STEP) * groups
        x_scale_at = x_scales + row
        for group in range(groups):
            gate += scaled_group(x_at, x_scale_at, num_rows, gate_at, scale_at, group, row_mask, column_mask, STEP)
            up += scaled_group(x_at, x_scale_at, num_rows, up_at, up_scale_at, group, row_mask, column_mask, STEP)
    else:
        for start in range(0, DEPTH, STEP):
            inner = start + tl.arange(0, STEP)
            a = tl.load(x_at + inner[None, :], mask=row_mask[:, None] & (inner[None, :] < DEPTH), other=0.0)
            mask = column_mask[None, :] & (inner[:, None] < DEPTH)
            gate = dot(a, tl.load(gate_at + inner[:, None], mask=mask, other=0.0), gate)
            up = dot(a, tl.load(gate_at + WIDTH * DEPTH + inner[:, None], mask=mask, other=0.0), up)
    value = (gate * sigmoid(gate) * up).to(out.dtype.element_ty)
    # Slots that nobody has are written too: what the down product reads of them must not be NaN from older use.
    mask = (row_mask | GROUPED)[:, None] & column_mask[None, :]
    tl.store(out + slot.to(tl.int64)[:, None] * WIDTH + column[None, :], value, mask=mask)


@kernel
def _down_kernel(
    x: Ptr,
    x_scales: Ptr,
    weight: Ptr,
    weight_scales: Ptr,
    expert_of_tile: Ptr,
    out: Ptr,
    num_slots: int,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
    FP8: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    expert = tl.load(expert_of_tile + tile).to(tl.int64)
    if expert < 0:
        return
    slot = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < OUT
    x_at = x + slot[:, None] * DEPTH
    weight_at = weight + (expert * OUT + column[None, :]) * DEPTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if FP8:
        groups: tl.constexpr = DEPTH // STEP
        scale_at = weight_scales + (expert * ((OUT + STEP - 1) // STEP) + column // STEP) * groups
        every = slot >= 0
        for group in range(groups):
            total += scaled_group(
                x_at, x_scales + slot, num_slots, weight_at, scale_at, group, every, column_mask, STEP
            )
    else:
        for start in range(0, DEPTH, STEP):
            inner = start + tl.arange(0, STEP)
            a = tl.load(x_at + inner[None, :], mask=inner[None, :] < DEPTH, other=0.0)
            mask = column_mask[None, :] & (inner[:, None] < DEPTH)
            total = dot(a, tl.load(weight_at + inner[:, None], mask=mask, other=0.0), total)
    tl.store(out + slot[:, None] * OUT + column[None, :], total.to(out.dtype.element_ty), mask=column_mask[None, :])


@kernel
def _combine(
    down: Ptr,
    slot_of_choice: Ptr,
    weights: Ptr,
    shared: Ptr,
    out: Ptr,
    HIDDEN: tl.constexpr,
    K: tl.constexpr,
    MERGED: tl.constexpr,
    SHARED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < HIDDEN
    total = tl.zeros((TILE,), tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slot_of_choice + row * (K + MERGED) + k).to(tl.int64)
        weight = tl.load(weights + row * K + k)
        total += weight * tl.load(down + slot * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
    if MERGED:
        slot = tl.load(slot_of_choice + row * (K + MERGED) + K).to(tl.int64)
        total += tl.load(down + slot * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
    if SHARED:
        total += tl.load(shared + row * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * HIDDEN + column, total.to(out.dtype.element_ty), mask=mask)
