"""RMS norms, with and without the addition to the residual stream. One program a row.

Shapes: R rows, H channels.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.lang import Ptr, Val, inline, kernel, tile_size


def rms_norm(x_RH: Tensor, weight_H: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `llm_engine.ops.spec.RmsNorm`."""
    rows, width = x_RH.shape
    out_RH = x_RH.new_empty(rows, width, dtype=dtype)
    tile = tile_size(width)
    if rows:
        _rms_norm[(rows,)](x_RH, weight_H, out_RH, x_RH.stride(0), eps, width, tile, num_warps=_warps(tile))
    return out_RH


def add_rms_norm(
    x_RH: Tensor, residual_RH: Tensor, weight_H: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `llm_engine.ops.spec.AddRmsNorm`."""
    rows, width = x_RH.shape
    out_RH, total_RH = x_RH.new_empty(rows, width, dtype=dtype), x_RH.new_empty(rows, width, dtype=dtype)
    tile, strides = tile_size(width), (x_RH.stride(0), residual_RH.stride(0))
    if rows:
        _add_rms_norm[(rows,)](
            x_RH, residual_RH, weight_H, out_RH, total_RH, *strides, eps, width, tile, num_warps=_warps(tile)
        )
    return out_RH, total_RH


def _warps(tile: int) -> int:
    return min(max(tile // 512, 1), 16)


@inline
def rms_scale(x: Val, eps: Val, WIDTH: tl.constexpr) -> Val:
    """1 / sqrt(mean(x²) + eps); what lies beyond WIDTH must be zero."""
    return 1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)


@kernel
def _rms_norm(
    x: Ptr, weight: Ptr, out: Ptr, x_stride: int, eps: float, WIDTH: tl.constexpr, TILE: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    mask = column < WIDTH
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    scaled = value * rms_scale(value, eps, WIDTH) * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, scaled.to(out.dtype.element_ty), mask=mask)


@kernel
def _add_rms_norm(
    x: Ptr,
    residual: Ptr,
    weight: Ptr,
    out: Ptr,
    total: Ptr,
    x_stride: int,
    residual_stride: int,
    eps: float,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    mask = column < WIDTH
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(residual + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(total + row * WIDTH + column, value.to(total.dtype.element_ty), mask=mask)
    scaled = value * rms_scale(value, eps, WIDTH) * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, scaled.to(out.dtype.element_ty), mask=mask)
