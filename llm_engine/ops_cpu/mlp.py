"""SwiGLU MLPs: one product for gate and up projection, the activation, one product down.

Shapes: R rows, H hidden, F inner width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from llm_engine.ops_cpu.gemm import Gemm, PackedProduct
from llm_engine.ops_cpu.jit import (
    B2,
    F2,
    ONE,
    Cache,
    Floats,
    exp,
    inline,
    kernel,
    over_rows,
    row_array,
    row_at,
    store_row,
)

ACTIVATION_COST: Final = 30  # of an element, for sharing rows out to threads


@dataclass(frozen=True, slots=True)
class PackedMlp:
    """Gate and up projection over each other, then down. The weights are kept for merging with routed experts."""

    gate_up: PackedProduct
    down: PackedProduct
    gate_up_2FH: Tensor
    down_HF: Tensor

    @classmethod
    def pack(cls, gemm: Gemm, gate_up_2FH: Tensor, down_HF: Tensor, dtype: torch.dtype) -> PackedMlp:
        return cls(gemm.linear(gate_up_2FH, gemm.inner_dtype), gemm.linear(down_HF, dtype), gate_up_2FH, down_HF)


def mlp(x_RH: Tensor, packed: PackedMlp) -> Tensor:
    """See `llm_engine.ops.spec.Mlp`."""
    return packed.down(silu_mul(packed.gate_up(x_RH)))


def silu_mul(gate_up_R2F: Tensor) -> Tensor:
    """silu(g) · u of contiguous fp32 or bf16 rows [g ‖ u]."""
    rows, width = gate_up_R2F.shape
    out_RF = torch.empty(rows, width // 2, dtype=gate_up_R2F.dtype)
    function = _silu_mul_bf16 if out_RF.dtype == torch.bfloat16 else _silu_mul_fp32
    over_rows(function, rows, ACTIVATION_COST * width // 2, row_array(gate_up_R2F), row_array(out_RF))
    return out_RF


@inline
def silu_mul_row(gate_up: Floats, out: Floats) -> None:
    """silu(g) · u of one row [g ‖ u]."""
    width = out.shape[0]
    for c in range(width):
        gate = gate_up[c]
        out[c] = gate / (ONE + exp(-gate)) * gate_up[width + c]


def _silu_mul(first: int, end: int, gate_up: Cache, out: Cache) -> None:
    wide, row = np.empty(gate_up.shape[1], np.float32), np.empty(out.shape[1], np.float32)
    for r in range(first, end):
        silu_mul_row(row_at(gate_up, r, wide), row)
        store_row(out, r, row)


_silu_mul_fp32 = kernel(f"void(int64, int64, {F2}, {F2})")(_silu_mul)
_silu_mul_bf16 = kernel(f"void(int64, int64, {B2}, {B2})")(_silu_mul)
