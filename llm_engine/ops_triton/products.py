"""Kernels of products x · Wᵀ, and the pieces that products of experts are made of too.

A tile is a · bᵀ of some rows of x and some rows of W, its columns. TURNED tiles are computed as b · aᵀ: matrix units
multiply many rows by any number of columns, and of few rows of x the weights make the better rows. Loads of weights
then go straight from memory to the unit.

Where splits of the depth run side by side, the last program of a tile to arrive adds what all have left, in the order
of the splits: who is last changes nothing.
"""

from __future__ import annotations

import triton.language as tl

from llm_engine.ops_triton.lang import Ptr, Val, arrives_last, await_inputs, dot, inline, kernel, let_next_in


@inline
def tile_of(program: Val, row_tiles: Val, column_tiles: Val, HEIGHT: tl.constexpr) -> tuple[Val, Val]:
    """Row tile and column tile of a program: HEIGHT row tiles walk the columns together, to share weights."""
    block = program // (HEIGHT * column_tiles)
    height = tl.minimum(row_tiles - block * HEIGHT, HEIGHT)
    within = program % (HEIGHT * column_tiles)
    return block * HEIGHT + within % height, within // height


@inline
def blank(ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr) -> Val:
    """A tile of zeros in fp32."""
    return tl.zeros((COLUMNS, ROWS), tl.float32) if TURNED else tl.zeros((ROWS, COLUMNS), tl.float32)


@inline
def multiply(a: Val, b: Val, acc: Val, TURNED: tl.constexpr) -> Val:
    """The tile a · bᵀ + acc of rows a and columns b."""
    return dot(b, tl.trans(a), acc) if TURNED else dot(a, tl.trans(b), acc)


@inline
def by_row(value: Val, TURNED: tl.constexpr) -> Val:
    """One value a row, to be spread over the columns of a tile."""
    return value[None, :] if TURNED else value[:, None]


@inline
def upright(tile: Val, TURNED: tl.constexpr) -> Val:
    """A tile as rows × columns."""
    return tl.trans(tile) if TURNED else tile


@inline
def store_in_turn(
    part: Val,
    partial_at: Ptr,
    partial_stride: Val,
    out_at: Ptr,
    mask: Val,
    arrivals: Ptr,
    split: Val,
    SPLITS: tl.constexpr,
) -> None:
    """Leave the sum of a split; the last program of a tile stores that of all."""
    tl.store(partial_at + split * partial_stride, part, mask=mask)
    if arrives_last(arrivals, SPLITS):
        total = tl.zeros_like(part)
        for each in tl.static_range(SPLITS):
            total += tl.load(partial_at + each * partial_stride, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(out_at, total.to(out_at.dtype.scalar.element_ty), mask=mask)


@kernel
def _product(
    x: Ptr,
    weight: Ptr,
    out: Ptr,
    partial: Ptr,
    arrivals: Ptr,
    num_rows: int,
    x_stride: int,
    x_head_stride: int,
    out_stride: int,
    out_head_stride: int,
    width: int,
    depth: int,
    num_steps: int,
    SPLITS: tl.constexpr,
    PARALLEL: tl.constexpr,
    TWO: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TURNED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """`num_steps` steps a split. TWO: the weight is two terms over each other. EVEN: only rows may be missing."""
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.cdiv(width, COLUMNS), 8)
    head = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1)  # 0 unless PARALLEL
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    weight_at = weight + (head * width + column.to(tl.int64))[:, None] * depth
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    x_at = x + head * x_head_stride + row.to(tl.int64)[:, None] * x_stride
    row_mask, column_mask = row[:, None] < num_rows, column < width
    total = blank(ROWS, COLUMNS, TURNED)
    last_step = tl.cdiv(depth, STEP)
    for split in range(first, first + 1 if PARALLEL else SPLITS):
        part = blank(ROWS, COLUMNS, TURNED)
        for step in range(split * num_steps, tl.minimum((split + 1) * num_steps, last_step)):
            inner = (step * STEP + tl.arange(0, STEP))[None, :]
            x_mask, weight_mask = row_mask, None
            if not EVEN:
                x_mask, weight_mask = row_mask & (inner < depth), column_mask[:, None] & (inner < depth)
            other = None if EVEN else 0.0
            a = tl.load(x_at + inner, mask=x_mask, other=0.0)
            part = multiply(a, tl.load(weight_at + inner, mask=weight_mask, other=other), part, TURNED)
            if TWO:
                low_at = weight_at + width * depth
                part = multiply(a, tl.load(low_at + inner, mask=weight_mask, other=other), part, TURNED)
        total += part
    at = out + head * out_head_stride + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    mask = row_mask & column_mask[None, :]
    if PARALLEL:
        partial_at = partial + row.to(tl.int64)[:, None] * width + column[None, :]
        store_in_turn(
            upright(total, TURNED), partial_at, num_rows * width, at, mask, arrivals + tl.program_id(0), first, SPLITS
        )
    else:
        tl.store(at, upright(total, TURNED).to(out.dtype.element_ty), mask=mask)


@kernel
def _product_fp8(
    x: Ptr,
    x_scales: Ptr,
    weight: Ptr,
    weight_scales: Ptr,
    out: Ptr,
    partial: Ptr,
    arrivals: Ptr,
    num_rows: int,
    width: int,
    depth: int,
    num_steps: int,
    SPLITS: tl.constexpr,
    PARALLEL: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """`num_steps` groups of BLOCK values a split. EVEN: only rows may be missing. COLUMNS divide BLOCK."""
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.cdiv(width, COLUMNS), 8)
    first = tl.program_id(1)  # 0 unless PARALLEL
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    weight_at = weight + column.to(tl.int64)[:, None] * depth
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    row_mask, column_mask = row < num_rows, column < width
    groups = depth // BLOCK
    x_at = x + row.to(tl.int64)[:, None] * depth
    scale_at = weight_scales + (column_tile * COLUMNS // BLOCK) * groups
    total = blank(ROWS, COLUMNS, TURNED)
    for split in range(first, first + 1 if PARALLEL else SPLITS):
        part = blank(ROWS, COLUMNS, TURNED)
        end = tl.minimum((split + 1) * num_steps, groups)
        begin = tl.minimum(split * num_steps, groups - 1)
        weight_scale = tl.load(scale_at + begin)
        row_scale = tl.load(x_scales + begin * num_rows + row, mask=row_mask, other=0.0)
        for group in range(split * num_steps, end):
            # The next scales are on their way while this step is computed: nothing else hides how far they are.
            following = tl.minimum(group + 1, groups - 1)
            next_weight_scale = tl.load(scale_at + following)
            next_row_scale = tl.load(x_scales + following * num_rows + row, mask=row_mask, other=0.0)
            inner = (group * BLOCK + tl.arange(0, BLOCK))[None, :]
            a = tl.load(x_at + inner, mask=row_mask[:, None], other=0.0)
            b = tl.load(weight_at + inner, mask=None if EVEN else column_mask[:, None], other=None if EVEN else 0.0)
            scale = row_scale * weight_scale
            part += multiply(a, b, blank(ROWS, COLUMNS, TURNED), TURNED) * by_row(scale, TURNED)
            weight_scale, row_scale = next_weight_scale, next_row_scale
        total += part
    at = out + row.to(tl.int64)[:, None] * width + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if PARALLEL:
        partial_at = partial + row.to(tl.int64)[:, None] * width + column[None, :]
        store_in_turn(
            upright(total, TURNED), partial_at, num_rows * width, at, mask, arrivals + tl.program_id(0), first, SPLITS
        )
    else:
        tl.store(at, upright(total, TURNED).to(out.dtype.element_ty), mask=mask)
