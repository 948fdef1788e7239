"""Rotary embedding of rows, as plain multiplications and additions so that no rounding depends on a row's place.

A rotation is x · cos + partner(x) · sin, with the sign folded into the sine. Interleaved pairs are complex numbers:
where their count is a multiple of the widest vector, torch's complex product computes the same in one pass.

Shapes: R rows, h heads, J pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_VECTOR_PAIRS: Final = 16  # one unrolled vector step of torch's complex product
_SERIAL_PAIRS: Final = 32_768  # from this size on torch splits a product over threads, at any element


@dataclass(frozen=True, slots=True)
class RopeRows:
    """cos and sin of a batch's rows, in the forms the two layouts need; one entry for all heads of a row."""

    complex_R1J: Tensor  # cos + i·sin
    half_cos_R1D: Tensor  # [cos ‖ cos]
    half_sin_R1D: Tensor  # [-sin ‖ sin]

    @classmethod
    def at(cls, positions_R: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> RopeRows:
        cos_R1J = cos_TJ.index_select(0, positions_R).unsqueeze(1)
        sin_R1J = sin_TJ.index_select(0, positions_R).unsqueeze(1)
        half_cos, half_sin = torch.cat([cos_R1J, cos_R1J], -1), torch.cat([-sin_R1J, sin_R1J], -1)
        return cls(torch.complex(cos_R1J, sin_R1J), half_cos, half_sin)

    @property
    def width(self) -> int:
        """2J, the number of rotated channels."""
        return self.half_cos_R1D.shape[-1]

    def rotate_half(self, x_RhD: Tensor) -> Tensor:
        """Pairs (j, j + J) of fp32 rows [R, h, 2J]."""
        low, high = x_RhD.chunk(2, dim=-1)
        partner = torch.cat([high, low], dim=-1).mul_(self.half_sin_R1D)
        return (x_RhD * self.half_cos_R1D).add_(partner)

    def rotate_interleaved(self, x_RhD: Tensor, out_RhD: Tensor) -> None:
        """Pairs (2j, 2j + 1) of fp32 rows [R, h, 2J] into fp32 rows that may be strided."""
        pairs = self.complex_R1J.shape[-1]
        if pairs % _VECTOR_PAIRS:
            real, imag = x_RhD[..., ::2], x_RhD[..., 1::2]
            cos, sin = self.complex_R1J.real, self.complex_R1J.imag
            torch.sub(real * cos, imag * sin, out=out_RhD[..., ::2])
            torch.add(imag * cos, real * sin, out=out_RhD[..., 1::2])
            return
        x_RhJ = torch.view_as_complex(x_RhD.view(*x_RhD.shape[:-1], pairs, 2))
        out_RhJ = torch.view_as_complex(out_RhD.view(*out_RhD.shape[:-1], pairs, 2))
        step = max(1, (_SERIAL_PAIRS - 1) // (x_RhJ.shape[1] * pairs))
        for first in range(0, x_RhJ.shape[0], step):
            part = slice(first, first + step)
            torch.mul(x_RhJ[part], self.complex_R1J[part], out=out_RhJ[part])
