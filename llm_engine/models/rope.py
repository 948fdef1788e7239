"""Tables of the rotary embedding, with YaRN. How pairs of channels are laid out is the kernels' business."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm_engine.models.spec import RopeSpec, YarnSpec, yarn_mscale


def inverse_frequencies(rope: RopeSpec) -> Tensor:
    """Angle per position of each of the `dim / 2` pairs, fp32."""
    # fp32, in the order of operations that other engines use: one unit in the last place is an angle at position 10⁵.
    wavelengths = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.yarn is None:
        return 1.0 / wavelengths
    kept = 1.0 - _interpolation_ramp(rope.dim, rope.theta, rope.yarn)
    return 1.0 / (rope.yarn.factor * wavelengths) * (1.0 - kept) + 1.0 / wavelengths * kept


def rope_tables(rope: RopeSpec, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [num_positions, dim / 2] in fp32, with YaRN's magnitude factor applied."""
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse_frequencies(rope))
    if rope.yarn is None:
        return angles.cos(), angles.sin()
    yarn = rope.yarn
    magnitude = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return angles.cos() * magnitude, angles.sin() * magnitude


def _interpolation_ramp(dim: int, theta: float, yarn: YarnSpec) -> Tensor:
    """0 for pairs that keep their frequency, 1 for pairs whose frequency is divided by the factor."""

    def pair_turning(rotations: float) -> float:
        """The pair that turns `rotations` times within the original context."""
        return dim * math.log(yarn.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    width = max(high - low, 1e-3)
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
