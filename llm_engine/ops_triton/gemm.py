"""Matrix products x · Wᵀ over packed weights: plain, one matrix a head, and with fp8 weights in blocks.

Shapes: R rows, I in, O out, h heads (or one), Z splits of the depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.lang import Ptr, Val, ceil_div, dot, inline, kernel
from llm_engine.ops_triton.quant import BLOCK, Fp8Rows, Fp8Weight, can_be_fp8, quantise_rows, quantise_weight, scaled_mm
from llm_engine.ops_triton.tiles import Cut, Numerics, cut_product

_TORCH_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight [O, I] in the dtype it is read in, and the dtype of the result.

    `in_two`: the weight is [2 · O, I], two bf16 terms over each other whose sum is the fp32 weight to 16 bits.
    """

    weight_OI: Tensor | Fp8Weight
    out_dtype: torch.dtype
    numerics: Numerics
    in_two: bool = False

    @property
    def out(self) -> int:
        """Columns of the product."""
        return self.weight_OI.shape[0]


def pack_linear(
    weight_OI: Tensor, *, fp32: bool = False, dtype: torch.dtype, fp8: bool, numerics: Numerics
) -> PackedLinear:
    """See `llm_engine.ops.spec.PackLinear`. `fp8`: keep what may be quantised in fp8 blocks."""
    if fp32 and weight_OI.dtype == torch.float32 and dtype == torch.bfloat16:
        # Tensor cores multiply no fp32. Products of bf16 are exact in fp32, so two bf16 terms lose next to nothing.
        high = weight_OI.bfloat16()
        return PackedLinear(torch.cat([high, (weight_OI - high).bfloat16()]), torch.float32, numerics, in_two=True)
    if fp8 and not fp32 and can_be_fp8(weight_OI):
        return PackedLinear(quantise_weight(weight_OI), dtype, numerics)
    return PackedLinear(weight_OI.contiguous(), torch.float32 if fp32 else dtype, numerics)


def linear(x_RI: Tensor, packed: PackedLinear) -> Tensor:
    """See `llm_engine.ops.spec.Linear`."""
    y_RO = _linear(x_RI, packed)
    if not packed.in_two:
        return y_RO
    high_RO, low_RO = y_RO.chunk(2, dim=1)
    return high_RO + low_RO


def _linear(x_RI: Tensor, packed: PackedLinear) -> Tensor:
    rows, depth = x_RI.shape
    out_RO = x_RI.new_empty(rows, packed.out, dtype=packed.out_dtype)
    if not rows:
        return out_RO
    cut = cut_product(packed.numerics, rows, depth, packed.out)
    weight = packed.weight_OI
    if isinstance(weight, Fp8Weight):
        quantised = quantise_rows(x_RI)
        if packed.numerics == "fast" and _suits_torch(rows, weight):
            return scaled_mm(quantised, weight)
        _launch_fp8(quantised, weight, out_RO, cut)
    elif packed.numerics == "fast" and x_RI.dtype == weight.dtype == packed.out_dtype == torch.bfloat16:
        return torch.nn.functional.linear(x_RI, weight)
    else:
        _launch(x_RI[:, None], weight[None], out_RO[:, None], cut)
    return out_RO


def _suits_torch(rows: int, weight: Fp8Weight) -> bool:
    """Torch's product of fp8 blocks is the fastest for many rows, where there is one."""
    return rows >= _TORCH_ROWS and weight.wide_scales is not None and weight.values_OI.device.type != "cpu"


def heads_product(x_RhI: Tensor, weight_hOI: Tensor, out_RhO: Tensor, numerics: Numerics) -> None:
    """out[r, h] = x[r, h] · W[h]ᵀ. Rows and heads of `x` and `out` may be strided."""
    rows, heads, depth = x_RhI.shape
    if rows:
        _launch(x_RhI, weight_hOI, out_RhO, cut_product(numerics, rows, depth, weight_hOI.shape[1], heads))


def _launch(x_RhI: Tensor, weight_hOI: Tensor, out_RhO: Tensor, cut: Cut) -> None:
    (rows, heads, depth), out = x_RhI.shape, weight_hOI.shape[1]
    assert x_RhI.stride(2) == out_RhO.stride(2) == 1, "columns are adjacent"
    tile, splits = cut.tile, cut.splits
    partial_ZRO = out_RhO
    if cut.parallel:
        assert heads == 1, "products by head are not split"
        partial_ZRO = x_RhI.new_empty(splits, rows, out, dtype=torch.float32)
    grid = (ceil_div(rows, tile.rows) * ceil_div(out, tile.columns), splits if cut.parallel else 1, heads)
    strides = (x_RhI.stride(0), x_RhI.stride(1), *((out, 0) if cut.parallel else out_RhO.stride()[:2]))
    _product[grid](
        x_RhI, weight_hOI, partial_ZRO, rows, *strides, out, depth,
        splits, cut.parallel, tile.rows, tile.columns, tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if cut.parallel:
        _add_partials(partial_ZRO, out_RhO[:, 0])


def _launch_fp8(x: Fp8Rows, weight: Fp8Weight, out_RO: Tensor, cut: Cut) -> None:
    (rows, out), depth = out_RO.shape, weight.shape[1]
    tile, splits = cut.tile, cut.splits
    partial_ZRO = x.scales_GR.new_empty(splits, rows, out) if cut.parallel else out_RO
    grid = (ceil_div(rows, tile.rows) * ceil_div(out, tile.columns), splits if cut.parallel else 1)
    _product_fp8[grid](
        x.values_RI, x.scales_GR, weight.values_OI, weight.scales, partial_ZRO, rows, out, depth,
        splits, cut.parallel, tile.rows, tile.columns, BLOCK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if cut.parallel:
        _add_partials(partial_ZRO, out_RO)


def _add_partials(partial_ZRO: Tensor, out_RO: Tensor) -> None:
    splits, rows, out = partial_ZRO.shape
    assert out_RO.stride(1) == 1, "columns are adjacent"
    _sum_partials[(rows, ceil_div(out, 1024))](partial_ZRO, out_RO, rows, out_RO.stride(0), out, splits, 1024)


@inline
def tile_of(num_rows: Val, OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tuple[Val, Val]:
    """Row tile and column tile of a program: blocks of eight row tiles walk the columns together, to share weights."""
    program = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(OUT, COLUMNS)
    block = program // (8 * column_tiles)
    height = tl.minimum(row_tiles - block * 8, 8)
    within = program % (8 * column_tiles)
    return block * 8 + within % height, within // height


@kernel
def _product(
    x: Ptr,
    weight: Ptr,
    out: Ptr,
    num_rows: int,
    x_stride: int,
    x_head_stride: int,
    out_stride: int,
    out_head_stride: int,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PARALLEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    row_tile, column_tile = tile_of(num_rows, OUT, ROWS, COLUMNS)
    head = tl.program_id(2).to(tl.int64)
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    x_at = x + head * x_head_stride + row[:, None] * x_stride
    weight_at = weight + (head * OUT + column.to(tl.int64)[None, :]) * DEPTH
    row_mask, column_mask = row[:, None] < num_rows, column[None, :] < OUT
    steps: tl.constexpr = (DEPTH + STEP * SPLITS - 1) // (STEP * SPLITS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(1)  # 0 unless PARALLEL
    for split in range(first, first + 1 if PARALLEL else SPLITS):
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(steps):
            inner = (split * steps + step) * STEP + tl.arange(0, STEP)
            a = tl.load(x_at + inner[None, :], mask=row_mask & (inner[None, :] < DEPTH), other=0.0)
            b = tl.load(weight_at + inner[:, None], mask=column_mask & (inner[:, None] < DEPTH), other=0.0)
            part = dot(a, b, part)
        total += part
    if PARALLEL:
        out += first.to(tl.int64) * num_rows * OUT
    at = out + head * out_head_stride + row[:, None] * out_stride + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=row_mask & column_mask)


@kernel
def _product_fp8(
    x: Ptr,
    x_scales: Ptr,
    weight: Ptr,
    weight_scales: Ptr,
    out: Ptr,
    num_rows: int,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PARALLEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row_tile, column_tile = tile_of(num_rows, OUT, ROWS, COLUMNS)
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = row < num_rows, column < OUT
    groups: tl.constexpr = DEPTH // BLOCK
    steps: tl.constexpr = (groups + SPLITS - 1) // SPLITS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(1)  # 0 unless PARALLEL
    for split in range(first, first + 1 if PARALLEL else SPLITS):
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        for group in range(split * steps, min((split + 1) * steps, groups)):
            part += scaled_group(
                x + row[:, None] * DEPTH,
                x_scales + row,
                num_rows,
                weight + column.to(tl.int64)[None, :] * DEPTH,
                weight_scales + (column // BLOCK) * groups,
                group,
                row_mask,
                column_mask,
                BLOCK,
            )
        total += part
    if PARALLEL:
        out += first.to(tl.int64) * num_rows * OUT
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(out + row[:, None] * OUT + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@inline
def scaled_group(
    x_at: Ptr,
    x_scale_at: Ptr,
    x_scale_step: Val,
    weight_at: Ptr,
    weight_scale_at: Ptr,
    group: Val,
    row_mask: Val,
    column_mask: Val,
    BLOCK: tl.constexpr,
) -> Val:
    """What one group of BLOCK values along the depth adds to a tile of x · Wᵀ, scaled in fp32."""
    inner = group * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x_at + inner[None, :], mask=row_mask[:, None], other=0.0)
    b = tl.load(weight_at + inner[:, None], mask=column_mask[None, :], other=0.0)
    scale = tl.load(x_scale_at + group * x_scale_step, mask=row_mask, other=0.0)[:, None]
    scale = scale * tl.load(weight_scale_at + group, mask=column_mask, other=0.0)[None, :]
    return dot(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32)) * scale


@kernel
def _sum_partials(
    partial: Ptr,
    out: Ptr,
    num_rows: int,
    out_stride: int,
    OUT: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < OUT
    total = tl.zeros((TILE,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial + (split * num_rows + row) * OUT + column, mask=mask, other=0.0)
    tl.store(out + row * out_stride + column, total.to(out.dtype.element_ty), mask=mask)
