"""SwiGLU MLPs: dense, and routed experts whose rows were dealt into tiles.

A shared expert of the routed experts' width is one more expert that every row chooses last, with weight one.

Shapes: R rows, H hidden, E experts, F expert width, K chosen, S slots of a deal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from llm_engine.ops.fp8 import Weight, in_full
from llm_engine.ops_triton.deal import Deal, SingleDeal, deal
from llm_engine.ops_triton.experts import _combine, _down_kernel, _swiglu, _up_kernel
from llm_engine.ops_triton.gemm import PackedLinear, linear, linear_fp8, suits_torch
from llm_engine.ops_triton.lang import ceil_div, for_hopper, tile_size
from llm_engine.ops_triton.quant import (
    BLOCK,
    Fp8Rows,
    Fp8Weight,
    can_be_fp8,
    empty_rows,
    in_blocks,
    quantise_rows,
    scaled_mm,
)
from llm_engine.ops_triton.tiles import Numerics, Tile, expert_tiles

_COMBINE_TILE = 1024
_SWIGLU_ROWS = 16
_HOPPER_ROWS = 48  # of an expert, from which on its own kernels are faster there, measured on an H200


@dataclass(frozen=True, slots=True)
class PackedMlp:
    """Gate rows over up rows, then down."""

    gate_up_2FH: Tensor | Fp8Weight
    down: PackedLinear
    numerics: Numerics


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Stacks of experts. `merged`: the last one is the shared expert, in one piece of memory with the others."""

    gate_up_E2FH: Tensor | Fp8Weight
    down_EHF: Tensor | Fp8Weight
    merged: bool
    shared: PackedMlp | None
    numerics: Numerics


def pack_mlp(gate_up_2FH: Weight, down_HF: Weight, *, dtype: torch.dtype, fp8: bool, numerics: Numerics) -> PackedMlp:
    """See `llm_engine.ops.spec.PackMlp`."""
    gate_up, down = _packed(gate_up_2FH, fp8), _packed(down_HF, fp8)
    return PackedMlp(gate_up, PackedLinear(down, dtype, numerics), numerics)


def pack_experts(
    experts: Iterable[tuple[Weight, Weight]],
    num_experts: int,
    *,
    shared: PackedMlp | None = None,
    fp8: bool,
    numerics: Numerics,
) -> PackedExperts:
    """See `llm_engine.ops.spec.PackExperts`. One at a time: a stack of experts in full is many gigabytes."""
    stacks: list[Tensor | Fp8Weight] = []
    merged = False
    for place, weights in enumerate(experts):
        pair = [_packed(weight, fp8) for weight in weights]
        if not stacks:
            merged = shared is not None and shared.gate_up_2FH.shape == pair[0].shape
            stacks = [_empty_stack(one, num_experts + merged) for one in pair]
        for stack, one in zip(stacks, pair, strict=True):
            _put(stack, place, one)
    gate_up, down = stacks
    if merged and shared is not None:
        own_gate_up = _put(gate_up, num_experts, shared.gate_up_2FH)
        own_down = _put(down, num_experts, shared.down.weight_OI)
        shared = replace(shared, gate_up_2FH=own_gate_up, down=replace(shared.down, weight_OI=own_down))
    return PackedExperts(gate_up, down, merged, shared, numerics)


def _packed(weight: Weight, fp8: bool) -> Tensor | Fp8Weight:
    # The seam between gate and up rows must fall between blocks.
    if fp8 and can_be_fp8(weight) and weight.shape[0] % (2 * BLOCK) == 0:
        return in_blocks(weight)
    return in_full(weight).contiguous()


def _empty_stack(one: Tensor | Fp8Weight, count: int) -> Tensor | Fp8Weight:
    """Memory for weights like this one."""
    if isinstance(one, Fp8Weight):
        values, scales = one.values_OI, one.scales
        return Fp8Weight(values.new_empty(count, *values.shape), scales.new_empty(count, *scales.shape))
    return one.new_empty(count, *one.shape)


def _put(stack: Tensor | Fp8Weight, place: int, one: Tensor | Fp8Weight) -> Tensor | Fp8Weight:
    """Copy a weight into a stack. Returns that part of the stack."""
    if isinstance(stack, Fp8Weight):
        assert isinstance(one, Fp8Weight), "equal shapes are packed alike"
        stack.values_OI[place], stack.scales[place] = one.values_OI, one.scales
        return Fp8Weight(stack.values_OI[place], stack.scales[place], one.wide_scales)
    assert isinstance(one, Tensor), "equal shapes are packed alike"
    stack[place] = one
    return stack[place]


def mlp(x_RH: Tensor, packed: PackedMlp) -> Tensor:
    """See `llm_engine.ops.spec.Mlp`."""
    gate_up, down = packed.gate_up_2FH, packed.down
    rows, depth = x_RH.shape
    if isinstance(gate_up, Fp8Weight) and packed.numerics == "fast" and suits_torch(rows, gate_up):
        return linear_fp8(_swiglu_fp8(scaled_mm(quantise_rows(x_RH), gate_up)), down)
    width = gate_up.shape[0] // 2
    tile, _ = expert_tiles(packed.numerics, rows, 1, depth, width, fp8=isinstance(gate_up, Fp8Weight))
    inner = _up(x_RH, gate_up, None, tile, isinstance(down.weight_OI, Fp8Weight))
    return linear_fp8(inner, down) if isinstance(inner, Fp8Rows) else linear(inner, down)


def moe(x_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor, packed: PackedExperts) -> Tensor:
    """See `llm_engine.ops.spec.Moe`."""
    (rows, hidden), top_k = x_RH.shape, ids_RK.shape[1]
    out_RH = x_RH.new_empty(rows, hidden)
    if not rows:
        return out_RH
    gate_up, down = packed.gate_up_E2FH, packed.down_EHF
    experts, fp8 = gate_up.shape[0], isinstance(gate_up, Fp8Weight)
    shared = packed.shared
    merged = packed.merged and shared is not None and not _alone_is_faster(rows, shared)
    awake = min(experts, rows * (top_k + merged))
    special = _for_hopper(packed, rows * top_k / experts)
    dealt: Deal | SingleDeal
    if special is not None:
        dealt = deal(ids_RK, experts, special.ROWS.value, with_shared=merged)
        down_SH: Tensor = special.experts(quantise_rows(x_RH), dealt, gate_up, down)
    else:
        width = gate_up.shape[-2] // 2
        tiles = expert_tiles(packed.numerics, rows * top_k / experts, awake, hidden, width, fp8=fp8)
        if rows == 1:
            dealt = SingleDeal(ids_RK[0], merged, experts - 1, tiles[0].rows)
        else:
            dealt = deal(ids_RK, experts, tiles[0].rows, with_shared=merged)
        inner = _up(x_RH, gate_up, dealt, tiles[0], isinstance(down, Fp8Weight))
        down_SH = _down(inner, down, dealt, tiles[1], x_RH.dtype)
    shared_RH = None if merged or shared is None else mlp(x_RH, shared)
    _combine[(rows, ceil_div(hidden, _COMBINE_TILE))](
        down_SH, dealt.slot_of_choice_RK if isinstance(dealt, Deal) else None, weights_RK, shared_RH, out_RH,
        hidden, top_k, 0 if isinstance(dealt, Deal) else dealt.tile_rows, merged, shared_RH is not None, _COMBINE_TILE,
    )  # fmt: skip
    return out_RH


def _for_hopper(packed: PackedExperts, rows_an_expert: float) -> ModuleType | None:
    """`experts_hopper` where it serves, which is for many rows."""
    if packed.numerics != "fast" or rows_an_expert < _HOPPER_ROWS:
        return None
    gate_up, down = packed.gate_up_E2FH, packed.down_EHF
    if not (isinstance(gate_up, Fp8Weight) and isinstance(down, Fp8Weight)):
        return None
    special = for_hopper("experts_hopper")
    return special if special is not None and special.serves(down) else None


def _alone_is_faster(rows: int, shared: PackedMlp) -> bool:
    """Whether the shared expert is better not dealt to with the others, but multiplied by torch."""
    gate_up = shared.gate_up_2FH
    return shared.numerics == "fast" and isinstance(gate_up, Fp8Weight) and suits_torch(rows, gate_up)


def _swiglu_fp8(gate_up_R2F: Tensor) -> Fp8Rows:
    rows, width = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    out = empty_rows(rows, width, gate_up_R2F.device)
    grid = (ceil_div(rows, _SWIGLU_ROWS), width // BLOCK)
    _swiglu[grid](gate_up_R2F, out.values_RI, out.scales_GR, rows, width, _SWIGLU_ROWS, BLOCK)
    return out


def _up(
    x_RH: Tensor, gate_up: Tensor | Fp8Weight, dealt: Deal | SingleDeal | None, tile: Tile, quantised: bool
) -> Tensor | Fp8Rows:
    """silu(x · Wgᵀ) · (x · Wuᵀ) for every slot of a deal, or for every row with one expert only.

    In fp8 if `quantised` and the tile has room for whole blocks.
    """
    rows, depth = x_RH.shape
    width = gate_up.shape[-2] // 2
    tiles = ceil_div(rows, tile.rows) if dealt is None else dealt.num_tiles
    slots = rows if dealt is None else tiles * tile.rows
    x, x_scales, weight, scales = _operands(x_RH, gate_up)
    quantised = quantised and isinstance(gate_up, Fp8Weight) and tile.columns == BLOCK
    fp8_out = empty_rows(slots, width, x_RH.device) if quantised else None
    out = x_RH.new_empty(slots, width) if fp8_out is None else fp8_out.values_RI
    row_of_slot = dealt.row_of_slot if isinstance(dealt, Deal) else None
    of_tile, *experts = _experts(dealt)
    even = depth % tile.depth == 0 and width % tile.columns == 0
    if rows:
        _up_kernel[(tiles * ceil_div(width, tile.columns),)](
            x, x_scales, weight, scales, row_of_slot, of_tile, out,
            None if fp8_out is None else fp8_out.scales_GR, rows, tiles, x.stride(0), depth, width,
            dealt is not None, *experts, x_scales is not None, quantised, even,
            tile.rows, tile.columns, tile.depth, tile.height, tile.turned, **tile.options(),
        )  # fmt: skip
    return out if fp8_out is None else fp8_out


def _down(
    inner: Tensor | Fp8Rows, down: Tensor | Fp8Weight, dealt: Deal | SingleDeal, tile: Tile, dtype: torch.dtype
) -> Tensor:
    """x · Wdᵀ for every slot of a deal."""
    x, x_scales, weight, scales = _operands(inner, down)
    fp8 = scales is not None
    (slots, depth), out = x.shape, down.shape[-2]
    step = min(tile.depth, tile_size(depth, 16))
    y_SH = torch.empty(slots, out, dtype=dtype, device=x.device)
    paired = tile.paired and fp8 and out % (2 * tile.columns) == 0
    of_tile, *experts = _experts(dealt)
    _down_kernel[(dealt.num_tiles * ceil_div(out, tile.columns << paired),)](
        x, x_scales, weight, scales, of_tile, y_SH, dealt.num_tiles, depth, out,
        *experts, fp8, paired, depth % step == 0 and out % tile.columns == 0,
        tile.rows, tile.columns, step, tile.height, tile.turned, **tile.options(),
    )  # fmt: skip
    return y_SH


def _experts(dealt: Deal | SingleDeal | None) -> tuple[Tensor | None, bool, int, int]:
    """What tells kernels the expert of a tile: see `experts.expert_of`."""
    if dealt is None:
        return None, False, 0, 0
    if isinstance(dealt, Deal):
        return dealt.expert_of_tile_T, False, 0, 0
    return dealt.ids_K, True, len(dealt.ids_K), dealt.last


def _operands(x: Tensor | Fp8Rows, weight: Tensor | Fp8Weight) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """What a kernel reads: rows and their scales, weights and theirs."""
    if isinstance(weight, Fp8Weight):
        rows = x if isinstance(x, Fp8Rows) else quantise_rows(x)
        return rows.values_RI, rows.scales_GR, weight.values_OI, weight.scales
    assert isinstance(x, Tensor), "rows are quantised for weights that are"
    return x, None, weight, None
