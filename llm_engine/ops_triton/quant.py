"""fp8 operands: e4m3 values with power-of-two scales, one for 1×128 activations, one for 128×128 weights.

A product of such operands is exact but for the order of its fp32 sum: scales only shift exponents.

Shapes: R rows, I in, O out, G groups of 128 along the depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.lang import Ptr, kernel, to_e4m3, ue8m0

BLOCK: Final = 128
_E4M3_MAX: Final = 448.0
_MIN_AMAX: Final = 1e-4


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Activations: x ≈ values · scales, group by group."""

    values_RI: Tensor
    scales_RG: Tensor  # fp32


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight [O, I] (or a stack of them) in blocks: scales fp32 [⌈O / 128⌉, I / 128]."""

    values_OI: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values_OI.shape


def can_be_fp8(weight_OI: Tensor) -> bool:
    """Whether the depth is whole blocks; the last block of rows may be partial."""
    return weight_OI.shape[-1] % BLOCK == 0


def quantise_rows(x_RI: Tensor) -> Fp8Rows:
    """Activations in groups of 1×128, quantised on the fly. Rows may be strided."""
    rows, depth = x_RI.shape
    values_RI = x_RI.new_empty(rows, depth, dtype=torch.float8_e4m3fn)
    scales_RG = x_RI.new_empty(rows, depth // BLOCK, dtype=torch.float32)
    if rows:
        grid = (rows, depth // BLOCK)
        _quantise_rows[grid](x_RI, values_RI, scales_RG, x_RI.stride(0), depth, BLOCK, num_warps=1)
    return Fp8Rows(values_RI, scales_RG)


def quantise_weight(weight_OI: Tensor) -> Fp8Weight:
    """A weight [O, I] in 128×128 blocks. Weights that were dequantised from such blocks come back exactly."""
    out, depth = weight_OI.shape
    padded = torch.nn.functional.pad(weight_OI, (0, 0, 0, -out % BLOCK)) if out % BLOCK else weight_OI
    tiles = padded.reshape(-1, BLOCK, depth // BLOCK, BLOCK)
    amax = tiles.abs().amax(dim=(1, 3)).float().clamp_min(_MIN_AMAX)
    fraction, exponent = torch.frexp(amax / _E4M3_MAX)  # fraction in [½, 1)
    scales = torch.ldexp(torch.ones_like(fraction), exponent - (fraction == 0.5).int())
    values = (tiles / scales[:, None, :, None].to(weight_OI.dtype)).clamp(-_E4M3_MAX, _E4M3_MAX)
    values_OI = values.reshape(padded.shape)[:out].to(torch.float8_e4m3fn)
    return Fp8Weight(values_OI.contiguous(), scales.contiguous())


def quantise_stack(weights_EOI: Tensor) -> Fp8Weight:
    """Several weights of one shape, one at a time: a stack of experts in full is many gigabytes."""
    experts, out, depth = weights_EOI.shape
    values = weights_EOI.new_empty(experts, out, depth, dtype=torch.float8_e4m3fn)
    scales = weights_EOI.new_empty(experts, -(-out // BLOCK), depth // BLOCK, dtype=torch.float32)
    for expert in range(experts):
        packed = quantise_weight(weights_EOI[expert])
        values[expert], scales[expert] = packed.values_OI, packed.scales
    return Fp8Weight(values, scales)


@kernel
def _quantise_rows(x: Ptr, values: Ptr, scales: Ptr, x_stride: int, DEPTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = group * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column).to(tl.float32)
    scale = ue8m0(tl.max(tl.abs(value), 0))
    tl.store(values + row * DEPTH + column, to_e4m3(value / scale))
    tl.store(scales + row * (DEPTH // BLOCK) + group, scale)
