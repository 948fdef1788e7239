"""FP8 block weights: e4m3 values with one scale for every block of rows and columns.

The block size always comes from the configuration: a tensor of 576 rows has five 128-row blocks, the last one half
full, and no ratio of shapes can tell that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

E4M3_MAX = 448.0
_MIN_AMAX = 1e-4  # keeps the scale of an all-zero block finite


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """A weight [N, K] as stored, its scales as numbers. `dtype` is what it dequantises to.

    Raises ValueError when the scale grid does not cover the weight.
    """

    values: Tensor  # e4m3
    scales: Tensor  # fp32 [⌈N/rows⌉, ⌈K/columns⌉]
    block: tuple[int, int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        check_grid(self.values, self.scales, self.block)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dequantised(self) -> Tensor:
        """The weight in `dtype`."""
        return dequantise_blocks(self.values, self.scales, self.block).to(self.dtype)


Weight: TypeAlias = Tensor | Fp8Blocks


def in_full(weight: Weight) -> Tensor:
    """A weight as a plain tensor."""
    return weight.dequantised() if isinstance(weight, Fp8Blocks) else weight


def over_each_other(weights: Sequence[Weight]) -> Weight:
    """Weights [N, K] as one [ΣN, K]: still in blocks if all but the last are of whole blocks of rows."""
    blocks = [weight for weight in weights if isinstance(weight, Fp8Blocks)]
    kinds = {(weight.block, weight.dtype) for weight in blocks}
    if len(blocks) < len(weights) or len(kinds) > 1 or any(w.shape[0] % w.block[0] for w in blocks[:-1]):
        return torch.cat([in_full(weight) for weight in weights])
    values = torch.cat([weight.values.view(torch.uint8) for weight in blocks]).view(torch.float8_e4m3fn)
    return Fp8Blocks(values, torch.cat([weight.scales for weight in blocks]), *kinds.pop())


def quantise_blocks(weight: Tensor, block: tuple[int, int], *, power_of_two: bool = True) -> tuple[Tensor, Tensor]:
    """Split a [N, K] weight into e4m3 values and fp32 scales [⌈N/rows⌉, ⌈K/columns⌉]; weight ≈ values · scale.

    `power_of_two` rounds scales up to powers of two, which makes the product exact in bf16.
    """
    rows, columns = weight.shape
    grid = (_ceil(rows, block[0]), _ceil(columns, block[1]))
    padded = torch.zeros(grid[0] * block[0], grid[1] * block[1])
    padded[:rows, :columns] = weight
    tiles = padded.view(grid[0], block[0], grid[1], block[1])
    scale = tiles.abs().amax(dim=(1, 3)).clamp_min(_MIN_AMAX) / E4M3_MAX
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    values = padded / _spread(scale, block, padded.shape[0], padded.shape[1])
    # e4m3 has no infinity: anything above the largest value would become NaN.
    return values.clamp(-E4M3_MAX, E4M3_MAX)[:rows, :columns].to(torch.float8_e4m3fn), scale


def dequantise_blocks(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The fp32 weight [N, K] of e4m3 `values` [N, K] and `scale` [⌈N/rows⌉, ⌈K/columns⌉] in fp32 or e8m0 bytes.

    Raises ValueError when the scale grid does not cover the weight.
    """
    check_grid(values, scale, block)
    return values.to(torch.float32) * _spread(decode_scale(scale), block, *values.shape)


def check_grid(values: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    """Raise ValueError unless there is one scale for every block."""
    rows, columns = values.shape
    grid = (_ceil(rows, block[0]), _ceil(columns, block[1]))
    if tuple(scale.shape) != grid:
        raise ValueError(f"scale grid {tuple(scale.shape)}, expected {grid} for {rows}×{columns} in blocks of {block}")


def decode_scale(scale: Tensor) -> Tensor:
    """Scales as fp32; e8m0 bytes `b` (also when stored as uint8) mean 2^(b-127)."""
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.to(torch.float32) - 127.0)
    return scale.to(torch.float32)


def _spread(scale: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def _ceil(size: int, block: int) -> int:
    return -(-size // block)
