"""RMS norms, with and without the addition to the residual stream."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llm_engine.ops_cpu.jit import F1, F2, F2S, ONE, ZERO, Floats, inline, kernel


def rms_norm(x_RH: Tensor, weight_H: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `llm_engine.ops.spec.RmsNorm`."""
    out_RH = torch.empty(x_RH.shape)
    _rms_norm(x_RH.float().numpy(), weight_H.float().numpy(), eps, out_RH.numpy())
    return out_RH.to(dtype)


def add_rms_norm(
    x_RH: Tensor, residual_RH: Tensor, weight_H: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `llm_engine.ops.spec.AddRmsNorm`."""
    out_RH, total_RH = torch.empty(x_RH.shape), torch.empty(x_RH.shape)
    x, residual, weight = x_RH.float().numpy(), residual_RH.float().numpy(), weight_H.float().numpy()
    _add_rms_norm(x, residual, weight, eps, out_RH.numpy(), total_RH.numpy())
    return out_RH.to(dtype), total_RH.to(dtype)


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


@kernel(f"void({F2S}, {F1}, float64, {F2})")
def _rms_norm(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[r, c] = x[r, c]
        scale_row(out[r], weight, eps)


@kernel(f"void({F2S}, {F2S}, {F1}, float64, {F2}, {F2})")
def _add_rms_norm(x: Floats, residual: Floats, weight: Floats, eps: float, out: Floats, total: Floats) -> None:
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            value = x[r, c] + residual[r, c]
            total[r, c] = value
            out[r, c] = value
        scale_row(out[r], weight, eps)
