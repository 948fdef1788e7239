"""Writing cache rows: norm, rotation and the place in the paged planes."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from llm_engine.ops_cpu.jit import (
    CACHE,
    F1,
    F2,
    F2S,
    I1,
    ONE,
    ZERO,
    Cache,
    Floats,
    Longs,
    cache_array,
    kernel,
    rotate_half,
    rotate_interleaved,
    store_row,
)
from llm_engine.ops_cpu.norm import scale_row
from llm_engine.ops_cpu.plan import CpuPlan


def write_latent(plane_BPC: Tensor, kv_RC: Tensor, weight_L: Tensor, eps: float, plan: CpuPlan) -> None:
    """See `llm_engine.ops.spec.WriteLatent`."""
    kv, weight = kv_RC.float().numpy(), weight_L.float().numpy()
    _write_latent(cache_array(plane_BPC), plan.slots_N, kv, weight, eps, plan.cos_RJ, plan.sin_RJ)


def write_index_keys(
    plane_BPD: Tensor,
    key_RD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    plan: CpuPlan,
    *,
    interleaved: bool = False,
) -> None:
    """See `llm_engine.ops.spec.WriteIndexKeys`."""
    key, weight, bias = key_RD.float().numpy(), weight_D.float().numpy(), bias_D.float().numpy()
    cache = cache_array(plane_BPD)
    _write_index_keys(cache, plan.slots_N, key, weight, bias, eps, plan.cos_RJ, plan.sin_RJ, interleaved)


@kernel(f"void({CACHE}, {I1}, {F2S}, {F1}, float64, {F2}, {F2})")
def _write_latent(cache: Cache, slots: Longs, kv: Floats, weight: Floats, eps: float, cos: Floats, sin: Floats) -> None:
    row = np.empty(kv.shape[1], np.float32)
    for r in range(slots.shape[0]):
        for c in range(kv.shape[1]):
            row[c] = kv[r, c]
        scale_row(row, weight, eps)
        rotate_interleaved(row, weight.shape[0], cos[r], sin[r])
        store_row(cache, slots[r], row)


@kernel(f"void({CACHE}, {I1}, {F2S}, {F1}, {F1}, float64, {F2}, {F2}, boolean)")
def _write_index_keys(
    cache: Cache,
    slots: Longs,
    key: Floats,
    weight: Floats,
    bias: Floats,
    eps: float,
    cos: Floats,
    sin: Floats,
    interleaved: bool,
) -> None:
    width = key.shape[1]
    row = np.empty(width, np.float32)
    for r in range(slots.shape[0]):
        total = ZERO
        for c in range(width):
            row[c] = key[r, c]
            total += row[c]
        mean = total / np.float32(width)
        squares = ZERO
        for c in range(width):
            row[c] -= mean
            squares += row[c] * row[c]
        factor = ONE / np.sqrt(squares / np.float32(width) + np.float32(eps))
        for c in range(width):
            row[c] = row[c] * factor * weight[c] + bias[c]
        if interleaved:
            rotate_interleaved(row, 0, cos[r], sin[r])
        else:
            rotate_half(row, cos[r], sin[r])
        store_row(cache, slots[r], row)
