"""fp8 operands: e4m3 values with fp32 scales, one for 1×128 activations, one for 128×128 weights.

Scales made here are powers of two, those of stored weights are as stored. A product under powers of two is exact but
for the order of its fp32 sum: they only shift exponents.

Shapes: R rows, I in, O out, G groups of 128 along the depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton.language as tl
from torch import Tensor
from torch.nn.functional import ScalingType

from llm_engine.ops.fp8 import Fp8Blocks, Weight, in_full
from llm_engine.ops_triton.lang import Ptr, Val, await_inputs, ceil_div, inline, kernel, let_next_in, to_e4m3, ue8m0
from llm_engine.ops_triton.tiles import quantise_tile

BLOCK: Final = 128
_FORM: Final = "fp8_rows"  # name under which activations carry their quantised form
_TORCH_ROW_UNIT: Final = 4  # rows of torch's product come in such
_E4M3_MAX: Final = 448.0
_MIN_AMAX: Final = 1e-4


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Activations: x ≈ values · scales, group by group."""

    values_RI: Tensor
    scales_GR: Tensor  # fp32; neighbouring rows stand together, as the products read them


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight [O, I] (or a stack of them) in blocks: scales fp32 [⌈O / 128⌉, I / 128].

    `wide_scales`: the same for torch's product, whose rows are multiples of four, None for a stack. That product also
    reads the rows that fill the last block, which lie behind `values_OI`.
    """

    values_OI: Tensor
    scales: Tensor
    wide_scales: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.values_OI.shape


def can_be_fp8(weight_OI: Weight) -> bool:
    """Whether the depth is whole blocks; the last block of rows may be partial."""
    return weight_OI.shape[-1] % BLOCK == 0


def empty_rows(rows: int, depth: int, device: torch.device) -> Fp8Rows:
    """Memory for the quantised form of [rows, depth]."""
    values_RI = torch.empty(rows, depth, dtype=torch.float8_e4m3fn, device=device)
    return Fp8Rows(values_RI, torch.empty(depth // BLOCK, rows, dtype=torch.float32, device=device))


def carry_rows(x_RI: Tensor, rows: Fp8Rows) -> Tensor:
    """`x_RI`, which carries its quantised form from now on, for `quantise_rows`. Nobody may write to it any more.

    Views and results of other operations do not carry it.
    """
    setattr(x_RI, _FORM, rows)
    return x_RI


def quantise_rows(x_RI: Tensor) -> Fp8Rows:
    """Activations [R, …] in groups of 1×128: the form they carry, or quantised on the fly. Rows may be strided."""
    ready: Fp8Rows | None = getattr(x_RI, _FORM, None)
    if ready is not None:
        return ready
    x_RI = x_RI.flatten(1)
    rows, depth = x_RI.shape
    out = empty_rows(rows, depth, x_RI.device)
    if rows:
        tile_rows, tile_groups, warps = quantise_tile(rows)
        grid = (ceil_div(rows, tile_rows), ceil_div(depth // BLOCK, tile_groups))
        _quantise_rows[grid](
            x_RI, out.values_RI, out.scales_GR, rows, x_RI.stride(0), depth, tile_rows, tile_groups, BLOCK,
            num_warps=warps,
        )  # fmt: skip
    return out


def scaled_mm(x: Fp8Rows, weight: Fp8Weight) -> Tensor:
    """x · Wᵀ in bf16 by torch's block-scaled product; for weights that have `wide_scales`, on cards that have it.

    Rows of the result may be strided.
    """
    assert weight.wide_scales is not None, "packed for torch's product"
    (out, depth), rows = weight.shape, len(x.values_RI)
    filled = (-(-out // BLOCK) * BLOCK, depth)
    values_RI, scales_GR = x.values_RI, x.scales_GR
    if rows % _TORCH_ROW_UNIT:
        missing = -rows % _TORCH_ROW_UNIT
        pad = torch.nn.functional.pad
        values_RI = pad(values_RI.view(torch.uint8), (0, 0, 0, missing)).view(torch.float8_e4m3fn)
        scales_GR = pad(scales_GR, (0, missing))
    y_RO = torch.nn.functional.scaled_mm(
        values_RI,
        weight.values_OI.as_strided(filled, (depth, 1)).t(),
        scales_GR.t(),
        ScalingType.BlockWise1x128,
        weight.wide_scales.t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return y_RO[:rows, :out]


def in_blocks(weight_OI: Weight) -> Fp8Weight:
    """A weight [O, I] in 128×128 blocks: as stored, bit for bit, where it is stored in such blocks."""
    if not isinstance(weight_OI, Fp8Blocks) or weight_OI.block != (BLOCK, BLOCK):
        return quantise_weight(in_full(weight_OI))
    values_OI, missing = weight_OI.values, -weight_OI.shape[0] % BLOCK
    if missing:
        filled = torch.nn.functional.pad(values_OI.view(torch.uint8), (0, 0, 0, missing)).view(torch.float8_e4m3fn)
        values_OI = filled[: len(values_OI)]
    return _with_wide_scales(values_OI.contiguous(), weight_OI.scales.contiguous())


def quantise_weight(weight_OI: Tensor) -> Fp8Weight:
    """A weight [O, I] in 128×128 blocks under power-of-two scales, from which dequantised ones come back exactly."""
    out, depth = weight_OI.shape
    padded = torch.nn.functional.pad(weight_OI, (0, 0, 0, -out % BLOCK)) if out % BLOCK else weight_OI
    tiles = padded.reshape(-1, BLOCK, depth // BLOCK, BLOCK)
    amax = tiles.abs().amax(dim=(1, 3)).float().clamp_min(_MIN_AMAX)
    fraction, exponent = torch.frexp(amax / _E4M3_MAX)  # fraction in [½, 1)
    scales = torch.ldexp(torch.ones_like(fraction), exponent - (fraction == 0.5).int())
    values = (tiles / scales[:, None, :, None].to(weight_OI.dtype)).clamp(-_E4M3_MAX, _E4M3_MAX)
    values_OI = values.reshape(padded.shape).to(torch.float8_e4m3fn).contiguous()[:out]
    return _with_wide_scales(values_OI, scales.contiguous())


def _with_wide_scales(values_OI: Tensor, scales: Tensor) -> Fp8Weight:
    return Fp8Weight(values_OI, scales, torch.nn.functional.pad(scales, (0, -scales.shape[1] % 4)))


@inline
def quantise(value: Val, AXIS: tl.constexpr) -> tuple[Val, Val]:
    """fp32 values in e4m3, and the scales that they share along an axis."""
    scales = ue8m0(tl.max(tl.abs(value), AXIS))
    return to_e4m3(value / tl.expand_dims(scales, AXIS)), scales


@kernel
def _quantise_rows(
    x: Ptr,
    values: Ptr,
    scales: Ptr,
    num_rows: int,
    x_stride: int,
    depth: int,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    mask = (row < num_rows)[:, None] & (group < depth // BLOCK)[None, :]
    column = (group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])[None, :, :]
    row_at = row.to(tl.int64)[:, None, None]
    value = tl.load(x + row_at * x_stride + column, mask=mask[:, :, None], other=0.0).to(tl.float32)
    quantised, scale = quantise(value, 2)
    tl.store(values + row_at * depth + column, quantised, mask=mask[:, :, None])
    tl.store(scales + group.to(tl.int64)[None, :] * num_rows + row[:, None], scale, mask=mask)
