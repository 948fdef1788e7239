"""Kernels of SwiGLU experts over the slots of a deal. A tile of slots belongs to one expert, or to nobody."""

from __future__ import annotations

import triton.language as tl

from llm_engine.ops_triton.lang import Ptr, Val, await_inputs, inline, kernel, let_next_in, sigmoid
from llm_engine.ops_triton.products import blank, by_row, multiply, tile_of, upright
from llm_engine.ops_triton.quant import quantise


@inline
def expert_of(expert_of_tile: Ptr, tile: Val, SINGLE: tl.constexpr, K: tl.constexpr, LAST: tl.constexpr) -> Val:
    """Expert of a tile, -1: nobody's. SINGLE: of one row's choices each has a tile; behind K named ones comes LAST."""
    named, other = (tile < K, LAST) if SINGLE else (None, None)
    return tl.load(expert_of_tile + tile, mask=named, other=other).to(tl.int64)


@kernel
def _up_kernel(
    x: Ptr,
    x_scales: Ptr,
    weight: Ptr,
    weight_scales: Ptr,
    row_of_slot: Ptr,
    expert_of_tile: Ptr,
    out: Ptr,
    out_scales: Ptr,
    num_rows: int,
    num_tiles: int,
    x_stride: int,
    depth: int,
    width: int,
    GROUPED: tl.constexpr,
    SINGLE: tl.constexpr,
    K: tl.constexpr,
    LAST: tl.constexpr,
    FP8: tl.constexpr,
    QUANTISED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    HEIGHT: tl.constexpr,
    TURNED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """silu(x · Wgᵀ) · (x · Wuᵀ). Without GROUPED slots are rows. QUANTISED: in fp8, COLUMNS are a block.

    SINGLE: one row, see `expert_of`.
    """
    tile, column_tile = tile_of(tl.program_id(0), num_tiles, tl.cdiv(width, COLUMNS), HEIGHT)
    await_inputs(OVERLAP)
    slot = tile * ROWS + tl.arange(0, ROWS)
    expert = tl.full((), 0, tl.int64)
    if GROUPED:
        expert = expert_of(expert_of_tile, tile, SINGLE, K, LAST)
        if expert < 0:
            return
        row = -(slot % ROWS) if SINGLE else tl.load(row_of_slot + slot)
        row_mask = row >= 0
    else:
        row = slot
        row_mask = row < num_rows
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < width
    gate = blank(ROWS, COLUMNS, TURNED)
    up = blank(ROWS, COLUMNS, TURNED)
    x_at = x + row.to(tl.int64)[:, None] * x_stride
    gate_at = weight + (expert * (2 * width) + column[:, None]) * depth
    up_at = gate_at + width * depth
    if FP8:
        groups = depth // STEP
        gate_scale_at = weight_scales + (expert * (2 * width // STEP) + column_tile * COLUMNS // STEP) * groups
        up_scale_at = gate_scale_at + (width // STEP) * groups
        for group in range(groups):
            inner = (group * STEP + tl.arange(0, STEP))[None, :]
            a = tl.load(x_at + inner, mask=row_mask[:, None], other=0.0)
            scale = tl.load(x_scales + group * num_rows + row, mask=row_mask, other=0.0)
            gate_part = multiply(a, tl.load(gate_at + inner), blank(ROWS, COLUMNS, TURNED), TURNED)
            up_part = multiply(a, tl.load(up_at + inner), blank(ROWS, COLUMNS, TURNED), TURNED)
            gate += gate_part * by_row(scale * tl.load(gate_scale_at + group), TURNED)
            up += up_part * by_row(scale * tl.load(up_scale_at + group), TURNED)
    else:
        for start in range(0, depth, STEP):
            inner = (start + tl.arange(0, STEP))[None, :]
            x_mask, weight_mask = row_mask[:, None], None
            if not EVEN:
                x_mask, weight_mask = x_mask & (inner < depth), column_mask[:, None] & (inner < depth)
            other = None if EVEN else 0.0
            a = tl.load(x_at + inner, mask=x_mask, other=0.0)
            gate = multiply(a, tl.load(gate_at + inner, mask=weight_mask, other=other), gate, TURNED)
            up = multiply(a, tl.load(up_at + inner, mask=weight_mask, other=other), up, TURNED)
    value = upright(gate * sigmoid(gate) * up, TURNED)
    # Slots that nobody has are written too: what the down product reads of them must not be NaN from older use.
    written = row_mask | GROUPED
    at = out + slot.to(tl.int64)[:, None] * width + column[None, :]
    if QUANTISED:
        values, scales = quantise(value.to(tl.bfloat16).to(tl.float32), 1)
        tl.store(at, values, mask=written[:, None])
        slots = num_tiles * ROWS if GROUPED else num_rows
        tl.store(out_scales + column_tile * slots + slot, scales, mask=written)
    else:
        tl.store(at, value.to(out.dtype.element_ty), mask=written[:, None] & column_mask[None, :])


@kernel
def _down_kernel(
    x: Ptr,
    x_scales: Ptr,
    weight: Ptr,
    weight_scales: Ptr,
    expert_of_tile: Ptr,
    out: Ptr,
    num_tiles: int,
    depth: int,
    width: int,
    SINGLE: tl.constexpr,
    K: tl.constexpr,
    LAST: tl.constexpr,
    FP8: tl.constexpr,
    PAIRED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    HEIGHT: tl.constexpr,
    TURNED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """x · Wdᵀ. For fp8 only, PAIRED: two tiles of columns beside each other."""
    await_inputs(OVERLAP)
    tile, column_tile = tile_of(tl.program_id(0), num_tiles, tl.cdiv(width, COLUMNS * (1 + PAIRED)), HEIGHT)
    column_tile *= 1 + PAIRED
    expert = expert_of(expert_of_tile, tile, SINGLE, K, LAST)
    if expert < 0:
        return
    slot = tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < width
    x_at = x + slot.to(tl.int64)[:, None] * depth
    weight_at = weight + (expert * width + column[:, None]) * depth
    total = blank(ROWS, COLUMNS, TURNED)
    second = blank(ROWS, COLUMNS, TURNED)
    if FP8:
        groups = depth // STEP
        scales_at = weight_scales + expert * tl.cdiv(width, STEP) * groups
        scale_at = scales_at + (column_tile * COLUMNS // STEP) * groups
        second_at, second_scale_at = (
            weight_at + COLUMNS * depth,
            scales_at + ((column_tile + 1) * COLUMNS // STEP) * groups,
        )
        x_scale_at = x_scales + slot
        for group in range(groups):
            inner = (group * STEP + tl.arange(0, STEP))[None, :]
            a = tl.load(x_at + inner)
            b = tl.load(weight_at + inner, mask=None if EVEN else column_mask[:, None], other=None if EVEN else 0.0)
            scale = tl.load(x_scale_at + group * (num_tiles * ROWS))
            part = multiply(a, b, blank(ROWS, COLUMNS, TURNED), TURNED)
            total += part * by_row(scale * tl.load(scale_at + group), TURNED)
            if PAIRED:
                part = multiply(a, tl.load(second_at + inner), blank(ROWS, COLUMNS, TURNED), TURNED)
                second += part * by_row(scale * tl.load(second_scale_at + group), TURNED)
    else:
        for start in range(0, depth, STEP):
            inner = (start + tl.arange(0, STEP))[None, :]
            x_mask, weight_mask = None, None
            if not EVEN:
                x_mask, weight_mask = inner < depth, column_mask[:, None] & (inner < depth)
            other = None if EVEN else 0.0
            a = tl.load(x_at + inner, mask=x_mask, other=other)
            total = multiply(a, tl.load(weight_at + inner, mask=weight_mask, other=other), total, TURNED)
    at = out + slot.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, upright(total, TURNED).to(out.dtype.element_ty), mask=column_mask[None, :])
    if PAIRED:
        tl.store(at + COLUMNS, upright(second, TURNED).to(out.dtype.element_ty))


@kernel
def _swiglu(
    gate_up: Ptr,
    out: Ptr,
    out_scales: Ptr,
    num_rows: int,
    width: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """silu(gate) · up of rows [2 · width] in fp8. COLUMNS are a block."""
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row, column_tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < num_rows)[:, None]
    gate_at = gate_up + row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=mask, other=0.0).to(tl.float32)
    values, scales = quantise((gate * sigmoid(gate) * up).to(tl.bfloat16).to(tl.float32), 1)
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], values, mask=mask)
    tl.store(out_scales + column_tile.to(tl.int64) * num_rows + row, scales, mask=row < num_rows)


@inline
def slot_at(slot_of_choice: Ptr, choice: Val, SINGLE_ROWS: tl.constexpr) -> Val:
    """Slot of a choice; see `_combine`."""
    return choice * SINGLE_ROWS if SINGLE_ROWS else tl.load(slot_of_choice + choice).to(tl.int64)


@kernel
def _combine(
    down: Ptr,
    slot_of_choice: Ptr,
    weights: Ptr,
    shared: Ptr,
    out: Ptr,
    HIDDEN: tl.constexpr,
    K: tl.constexpr,
    SINGLE_ROWS: tl.constexpr,
    MERGED: tl.constexpr,
    SHARED: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Σ_k weight_k · down of its slot, in rank order, plus the shared expert: a slot too if MERGED.

    SINGLE_ROWS: rows of a tile, where the k-th choice of a single row has the k-th tile; or 0.
    """
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < HIDDEN
    total = tl.zeros((TILE,), tl.float32)
    for k in tl.static_range(K):
        slot = slot_at(slot_of_choice, row * (K + MERGED) + k, SINGLE_ROWS)
        weight = tl.load(weights + row * K + k)
        total += weight * tl.load(down + slot * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
    if MERGED:
        slot = slot_at(slot_of_choice, row * (K + MERGED) + K, SINGLE_ROWS)
        total += tl.load(down + slot * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
    if SHARED:
        total += tl.load(shared + row * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * HIDDEN + column, total.to(out.dtype.element_ty), mask=mask)
