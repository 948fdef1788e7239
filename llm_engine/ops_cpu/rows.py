"""Row-wise arithmetic whose result for a row never depends on the rows around it.

Most elementwise kernels of torch handle the last few elements of an array with scalar code that rounds differently
from the vector code, so a value may depend on where in the array it stands. The functions here use only operations
without that property: IEEE arithmetic, kernels that work row by row, and exp, which vectorises its tail.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_RH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """fp32 result of w · x / sqrt(mean(x²) + eps)."""
    x_RH = x_RH.float()
    return (x_RH * _inverse_rms(x_RH, eps)).mul_(weight_H)


def rms_norm_into(out_RH: Tensor, x_RH: Tensor, weight_H: Tensor, eps: float) -> None:
    """As rms_norm, into fp32 rows that may be strided."""
    x_RH = x_RH.float()
    torch.mul(x_RH * _inverse_rms(x_RH, eps), weight_H, out=out_RH)


def _inverse_rms(x_RH: Tensor, eps: float) -> Tensor:
    norm_R1: Tensor = torch.linalg.vector_norm(x_RH, dim=-1, keepdim=True)
    return norm_R1.square_().div_(x_RH.shape[-1]).add_(eps).rsqrt_()


def layer_norm(x_RH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float) -> Tensor:
    """fp32 LayerNorm."""
    return torch.nn.functional.layer_norm(x_RH.float(), weight_H.shape, weight_H.float(), bias_H.float(), eps)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) of an fp32 tensor."""
    return torch.neg(x).exp_().add_(1.0).reciprocal_()


def silu_mul(gate_up_R2F: Tensor) -> Tensor:
    """silu(g) · u of fp32 rows [g ‖ u]."""
    gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
    denominator_RF = torch.neg(gate_RF).exp_().add_(1.0)
    return torch.div(gate_RF, denominator_RF, out=denominator_RF).mul_(up_RF)
