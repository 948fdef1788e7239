"""RMS norms, with and without the addition to the residual stream, in fp8 too where that is read. One program a row.

Shapes: R rows, H channels.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.lang import Ptr, Val, await_inputs, inline, kernel, let_next_in, tile_size
from llm_engine.ops_triton.quant import BLOCK, carry_rows, empty_rows, quantise


def rms_norm(x_RH: Tensor, weight_H: Tensor, eps: float, dtype: torch.dtype, *, fp8: bool = False) -> Tensor:
    """See `llm_engine.ops.spec.RmsNorm`. `fp8`: the result carries its quantised form, for products in fp8."""
    return _norm(x_RH, None, weight_H, eps, dtype, fp8)[0]


def add_rms_norm(
    x_RH: Tensor, residual_RH: Tensor, weight_H: Tensor, eps: float, dtype: torch.dtype, *, fp8: bool = False
) -> tuple[Tensor, Tensor]:
    """See `llm_engine.ops.spec.AddRmsNorm`; `fp8` as for `rms_norm`."""
    return _norm(x_RH, residual_RH, weight_H, eps, dtype, fp8)


def _norm(
    x_RH: Tensor, residual_RH: Tensor | None, weight_H: Tensor, eps: float, dtype: torch.dtype, fp8: bool
) -> tuple[Tensor, Tensor]:
    rows, width = x_RH.shape
    out_RH, total_RH = x_RH.new_empty(rows, width, dtype=dtype), x_RH
    residual_stride = 0
    if residual_RH is not None:
        total_RH, residual_stride = x_RH.new_empty(rows, width, dtype=dtype), residual_RH.stride(0)
    quantised = empty_rows(rows, width, x_RH.device) if fp8 and width % BLOCK == 0 else None
    values, scales = (None, None) if quantised is None else (quantised.values_RI, quantised.scales_GR)
    tile = max(tile_size(width), BLOCK)
    if rows:
        _rms_norm[(rows,)](
            x_RH, residual_RH, weight_H, out_RH, total_RH, values, scales, rows, x_RH.stride(0), residual_stride, eps,
            width, tile, residual_RH is not None, quantised is not None, BLOCK, num_warps=_warps(tile),
        )  # fmt: skip
    return (out_RH if quantised is None else carry_rows(out_RH, quantised)), total_RH


def _warps(tile: int) -> int:
    return min(max(tile // 512, 1), 16)


@inline
def rms_scale(x: Val, eps: Val, WIDTH: tl.constexpr) -> Val:
    """1 / sqrt(mean(x²) + eps); what lies beyond WIDTH must be zero."""
    return 1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)


@inline
def norm_row(
    x: Ptr,
    residual: Ptr,
    weight: Ptr,
    out: Ptr,
    total: Ptr,
    out_values: Ptr,
    out_scales: Ptr,
    row: Val,
    num_rows: Val,
    x_stride: Val,
    residual_stride: Val,
    eps: Val,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ADDED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row normed, and quantised if FP8."""
    column = tl.arange(0, TILE)
    mask = column < WIDTH
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(residual + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + row * WIDTH + column, value.to(total.dtype.element_ty), mask=mask)
    scaled = value * rms_scale(value, eps, WIDTH) * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    rounded = scaled.to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + column, rounded, mask=mask)
    if FP8:
        group = tl.arange(0, TILE // BLOCK)
        values, scales = quantise(tl.reshape(rounded.to(tl.float32), (TILE // BLOCK, BLOCK)), 1)
        at = row * WIDTH + group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(out_values + at, values, mask=(group < WIDTH // BLOCK)[:, None])
        tl.store(out_scales + group.to(tl.int64) * num_rows + row, scales, mask=group < WIDTH // BLOCK)


@kernel
def _rms_norm(
    x: Ptr,
    residual: Ptr,
    weight: Ptr,
    out: Ptr,
    total: Ptr,
    out_values: Ptr,
    out_scales: Ptr,
    num_rows: int,
    x_stride: int,
    residual_stride: int,
    eps: float,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ADDED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    norm_row(
        x, residual, weight, out, total, out_values, out_scales, row, num_rows, x_stride, residual_stride, eps, WIDTH,
        TILE, ADDED, FP8, BLOCK,
    )  # fmt: skip
