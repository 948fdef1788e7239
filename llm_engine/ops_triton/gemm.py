"""Matrix products x · Wᵀ over packed weights: plain, one matrix a head, and with fp8 weights in blocks.

Shapes: R rows, I in, O out, h heads (or one), Z splits of the depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from llm_engine.ops.fp8 import Weight, in_full
from llm_engine.ops_triton import arrivals
from llm_engine.ops_triton.lang import ceil_div
from llm_engine.ops_triton.products import _product, _product_fp8
from llm_engine.ops_triton.quant import (
    BLOCK,
    Fp8Rows,
    Fp8Weight,
    can_be_fp8,
    in_blocks,
    quantise_rows,
    scaled_mm,
)
from llm_engine.ops_triton.tiles import Cut, Numerics, cut_product

_OWN_HEAD_ROWS: Final = 1  # up to which products by head are faster here than with torch, measured on an H200
_TORCH_ROWS: Final = 128  # from which on torch's products are faster than these, measured on an H200
_WIDE_TORCH_ROWS: Final = 64  # above which that holds for products of bf16 in fp32 too


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
        return self.weight_OI.shape[0] >> self.in_two


def pack_linear(
    weight_OI: Weight, *, fp32: bool = False, dtype: torch.dtype, fp8: bool, numerics: Numerics
) -> PackedLinear:
    """See `llm_engine.ops.spec.PackLinear`. `fp8`: keep what may be quantised in fp8 blocks."""
    if fp8 and not fp32 and can_be_fp8(weight_OI):
        return PackedLinear(in_blocks(weight_OI), dtype, numerics)
    full_OI = in_full(weight_OI)
    if fp32 and full_OI.dtype == torch.float32 and dtype == torch.bfloat16:
        # Tensor cores multiply no fp32. Products of bf16 are exact in fp32, so two bf16 terms lose next to nothing.
        high = full_OI.bfloat16()
        return PackedLinear(torch.cat([high, (full_OI - high).bfloat16()]), torch.float32, numerics, in_two=True)
    return PackedLinear(full_OI.contiguous(), torch.float32 if fp32 else dtype, numerics)


def linear(x_RI: Tensor, packed: PackedLinear) -> Tensor:
    """See `llm_engine.ops.spec.Linear`."""
    weight = packed.weight_OI
    if isinstance(weight, Fp8Weight):
        return linear_fp8(quantise_rows(x_RI), packed)
    x_RI = x_RI.flatten(1)
    rows, depth = x_RI.shape
    if packed.numerics == "fast" and x_RI.dtype == weight.dtype == packed.out_dtype == torch.bfloat16:
        return torch.nn.functional.linear(x_RI, weight)
    plain = x_RI.dtype == weight.dtype == torch.bfloat16 and not packed.in_two
    if packed.numerics == "fast" and plain and rows > _WIDE_TORCH_ROWS and x_RI.device.type == "cuda":
        return torch.mm(x_RI, weight.t(), out_dtype=torch.float32)
    out_RO = x_RI.new_empty(rows, packed.out, dtype=packed.out_dtype)
    if rows:
        cut = cut_product(packed.numerics, rows, depth, packed.out)
        _launch(x_RI[:, None], weight[None], out_RO[:, None], cut, in_two=packed.in_two)
    return out_RO


def linear_fp8(x: Fp8Rows, packed: PackedLinear) -> Tensor:
    """x · Wᵀ of rows that are quantised, with a weight in fp8."""
    weight = packed.weight_OI
    assert isinstance(weight, Fp8Weight), "packed in fp8"
    rows, depth = x.values_RI.shape
    if packed.numerics == "fast" and suits_torch(rows, weight):
        return scaled_mm(x, weight)
    out_RO = x.scales_GR.new_empty(rows, packed.out, dtype=packed.out_dtype)
    if rows:
        _launch_fp8(x, weight, out_RO, cut_product(packed.numerics, rows, depth, packed.out, fp8=True))
    return out_RO


def suits_torch(rows: int, weight: Fp8Weight) -> bool:
    """Torch's product of fp8 blocks is the fastest for many rows, where there is one."""
    return rows >= _TORCH_ROWS and weight.wide_scales is not None and weight.values_OI.device.type != "cpu"


def heads_product(x_RhI: Tensor, weight_hOI: Tensor, out_RhO: Tensor, numerics: Numerics) -> None:
    """out[r, h] = x[r, h] · W[h]ᵀ. Rows and heads of `x` and `out` may be strided."""
    rows, heads, depth = x_RhI.shape
    by_torch = numerics == "fast" and x_RhI.dtype == out_RhO.dtype == torch.bfloat16
    if by_torch and (rows > _OWN_HEAD_ROWS or x_RhI.device.type == "cpu"):
        torch.bmm(x_RhI.transpose(0, 1), weight_hOI.transpose(1, 2), out=out_RhO.transpose(0, 1))
    elif rows:
        _launch(x_RhI, weight_hOI, out_RhO, cut_product(numerics, rows, depth, weight_hOI.shape[1], heads))


def _launch(x_RhI: Tensor, weight_hOI: Tensor, out_RhO: Tensor, cut: Cut, *, in_two: bool = False) -> None:
    (rows, heads, depth), out = x_RhI.shape, out_RhO.shape[2]
    assert x_RhI.stride(2) == out_RhO.stride(2) == 1, "columns are adjacent"
    assert heads == 1 or not cut.parallel, "products by head are not split"
    tile, splits = cut.tile, cut.splits
    grid = (ceil_div(rows, tile.rows) * ceil_div(out, tile.columns), splits if cut.parallel else 1, heads)
    even, steps = depth % tile.depth == 0 and out % tile.columns == 0, _steps(depth, tile.depth, splits)
    _product[grid](
        x_RhI, weight_hOI, out_RhO, *_meeting(out_RhO[:, 0], grid[0], cut), rows, x_RhI.stride(0), x_RhI.stride(1),
        out_RhO.stride(0), out_RhO.stride(1), out, depth, steps,
        splits, cut.parallel, in_two, even, tile.rows, tile.columns, tile.depth, tile.turned,
        **tile.options(),
    )  # fmt: skip


def _launch_fp8(x: Fp8Rows, weight: Fp8Weight, out_RO: Tensor, cut: Cut) -> None:
    (rows, out), depth = out_RO.shape, weight.shape[1]
    tile, splits = cut.tile, cut.splits
    grid = (ceil_div(rows, tile.rows) * ceil_div(out, tile.columns), splits if cut.parallel else 1)
    even, steps = out % tile.columns == 0, _steps(depth, BLOCK, splits)
    _product_fp8[grid](
        x.values_RI, x.scales_GR, weight.values_OI, weight.scales, out_RO, *_meeting(out_RO, grid[0], cut), rows,
        out, depth, steps,
        splits, cut.parallel, even, tile.rows, tile.columns, BLOCK, tile.turned,
        **tile.options(),
    )  # fmt: skip


def _steps(depth: int, step: int, splits: int) -> int:
    return ceil_div(ceil_div(depth, step), splits)


def _meeting(out_RO: Tensor, tiles: int, cut: Cut) -> tuple[Tensor | None, Tensor | None]:
    """Where the splits of a product leave their sums, and the counters of those that have; for splits side by side."""
    if not cut.parallel:
        return None, None
    assert tiles <= arrivals.MOST, "products of many tiles are not split"
    rows, out = out_RO.shape
    return out_RO.new_empty(cut.splits, rows, out, dtype=torch.float32), arrivals.counters(out_RO.device)
