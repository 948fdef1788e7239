"""RMS norms, with and without the addition to the residual stream. Rows come and go in the compute dtype."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from llm_engine.ops_cpu.jit import (
    CACHE,
    F1,
    ONE,
    ZERO,
    Cache,
    Floats,
    inline,
    kernel,
    over_rows,
    row_array,
    row_at,
    store_row,
)

_COST: Final = 4  # of an element, for sharing rows out to threads


def rms_norm(x_RH: Tensor, weight_H: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `llm_engine.ops.spec.RmsNorm`."""
    out_RH = torch.empty(x_RH.shape, dtype=dtype)
    x, weight = row_array(x_RH.to(dtype).contiguous()), weight_H.float().numpy()
    over_rows(_rms_norm, len(x), _COST * x.shape[1], x, weight, eps, row_array(out_RH))
    return out_RH


def add_rms_norm(
    x_RH: Tensor, residual_RH: Tensor, weight_H: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `llm_engine.ops.spec.AddRmsNorm`."""
    out_RH, total_RH = torch.empty(x_RH.shape, dtype=dtype), torch.empty(x_RH.shape, dtype=dtype)
    x, residual, weight = (
        row_array(x_RH.to(dtype).contiguous()),
        row_array(residual_RH.to(dtype).contiguous()),
        weight_H.float().numpy(),
    )
    cost = _COST * x.shape[1]
    over_rows(_add_rms_norm, len(x), cost, x, residual, weight, eps, row_array(out_RH), row_array(total_RH))
    return out_RH, total_RH


@inline
def scale_row(row: Floats, weight: Floats, eps: float) -> None:
    """RMS-norm the first channels of a row in place, as many as there are weights."""
    width = weight.shape[0]
    squares = ZERO
    for c in range(width):
        squares += row[c] * row[c]
    factor = ONE / np.sqrt(squares / np.float32(width) + np.float32(eps))
    for c in range(width):
        row[c] = row[c] * factor * weight[c]


@kernel(f"void(int64, int64, {CACHE}, {F1}, float64, {CACHE})")
def _rms_norm(first: int, end: int, x: Cache, weight: Floats, eps: float, out: Cache) -> None:
    width = x.shape[1]
    row, scratch = np.empty(width, np.float32), np.empty(width, np.float32)
    for r in range(first, end):
        wide = row_at(x, r, scratch)
        for c in range(width):
            row[c] = wide[c]
        scale_row(row, weight, eps)
        store_row(out, r, row)


@kernel(f"void(int64, int64, {CACHE}, {CACHE}, {F1}, float64, {CACHE}, {CACHE})")
def _add_rms_norm(
    first: int, end: int, x: Cache, residual: Cache, weight: Floats, eps: float, out: Cache, total: Cache
) -> None:
    width = x.shape[1]
    row = np.empty(width, np.float32)
    scratch = np.empty((2, width), np.float32)
    for r in range(first, end):
        a, b = row_at(x, r, scratch[0]), row_at(residual, r, scratch[1])
        for c in range(width):
            row[c] = a[c] + b[c]
        store_row(total, r, row)
        scale_row(row, weight, eps)
        store_row(out, r, row)
