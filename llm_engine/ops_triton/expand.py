"""The end of latent attention of next to no rows in one launch: merge the splits, expand values, quantise them.

Shapes: R rows, Z splits, h heads, L latent rank, V value width.
"""

from __future__ import annotations

from typing import Final

import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.lang import Ptr, await_inputs, kernel, tile_size
from llm_engine.ops_triton.quant import BLOCK, carry_rows, empty_rows, quantise

_MOST_ROWS: Final = 2  # each reads all of the weights anew
_STEP: Final = 128  # columns of the latent rank at a time


def serves(rows: int, splits: int, expand_hVL: Tensor) -> bool:
    """Whether this is faster than a merge, a product and a quantisation, and made for weights of such a shape."""
    _, value, rank = expand_hVL.shape
    return rows <= _MOST_ROWS and splits > 1 and rank % _STEP == 0 and value == tile_size(value)


def merge_and_expand(partial_ZRhL: Tensor, sums_ZRh2: Tensor, expand_hVL: Tensor, *, fp8: bool) -> Tensor:
    """Values [R, h, V] of partial sums in fp32, and each split's maximum and total. `fp8`: they carry fp8."""
    splits, rows, heads, rank = partial_ZRhL.shape
    value = expand_hVL.shape[1]
    out_RhV = expand_hVL.new_empty(rows, heads, value)
    quantised = empty_rows(rows, heads * value, out_RhV.device) if fp8 and value == BLOCK else None
    values, scales = (None, None) if quantised is None else (quantised.values_RI, quantised.scales_GR)
    _merge_and_expand[(heads, rows)](
        partial_ZRhL, sums_ZRh2, expand_hVL, out_RhV, values, scales, splits, tile_size(splits), heads, rank, value,
        quantised is not None, _STEP, num_warps=4,
    )  # fmt: skip
    return out_RhV if quantised is None else carry_rows(out_RhV, quantised)


@kernel
def _merge_and_expand(
    partial: Ptr,
    sums: Ptr,
    weight: Ptr,
    out: Ptr,
    out_values: Ptr,
    out_scales: Ptr,
    num_splits: int,
    Z_TILE: tl.constexpr,
    HEADS: tl.constexpr,
    L: tl.constexpr,
    V: tl.constexpr,
    FP8: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """One head of one row."""
    await_inputs(OVERLAP)
    head, row = tl.program_id(0), tl.program_id(1)
    split, value, column = tl.arange(0, Z_TILE), tl.arange(0, V), tl.arange(0, STEP)[None, :]
    there = split < num_splits
    at = (split.to(tl.int64) * tl.num_programs(1) + row) * HEADS + head
    top = tl.load(sums + at * 2, mask=there, other=-1e30)
    share = tl.where(there, tl.exp2(top - tl.max(top, 0)), 0.0)
    total = tl.sum(tl.load(sums + at * 2 + 1, mask=there, other=0.0) * share, 0)
    share /= tl.where(total == 0.0, 1.0, total)
    products = tl.zeros((V, STEP), tl.float32)
    for start in tl.static_range(0, L, STEP):
        part = tl.load(partial + at[:, None] * L + start + column, mask=there[:, None], other=0.0)
        latent = tl.sum(part * share[:, None], 0).to(out.dtype.element_ty).to(tl.float32)
        products += tl.load(weight + (head * V + value)[:, None] * L + start + column).to(tl.float32) * latent[None, :]
    rounded = tl.sum(products, 1).to(out.dtype.element_ty)
    at_out = (row * HEADS + head) * V + value
    tl.store(out + at_out, rounded)
    if FP8:
        values, scale = quantise(rounded.to(tl.float32), 0)
        tl.store(out_values + at_out, values)
        tl.store(out_scales + head * tl.num_programs(1) + row, scale)
