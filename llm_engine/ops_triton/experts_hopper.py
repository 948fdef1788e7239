"""Products of experts for many rows on Hopper, in fp8 blocks: tiles of 128 rows by twice 128 weights, in Gluon.

Programs stay, and whoever is free takes the next tile: row tiles of one expert begin together then, and its weights are
read once. One group of four warps fetches: rows by copies from wherever they lie, weights by the card's tensor copies.
Two more groups multiply 64 rows each. Every block of 128 products is summed up by the tensor cores and scaled as it is
added; while one group adds, the other one multiplies. The upper 64 rows of a tile that nobody has are left out.

- `full`, `free`, for every stage: rows and weights have arrived; both groups are done with them.
- `told`, `heard`, for two places: a tile to multiply is named; both groups know.

A row's sums go over its blocks in order; they depend on nothing but its own values.

Shapes: S slots, E experts, F expert width, H hidden.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from llm_engine.ops_triton.deal import Deal
from llm_engine.ops_triton.experts_hopper_lang import (
    BLOCK,
    PRODUCERS,
    PROGRAMS,
    REGISTERS,
    SIDE,
    SUMS,
    TILE,
    TILE_LAYOUT,
    copy_tile,
    fp8_kernel,
    hear,
    tell,
)
from llm_engine.ops_triton.hopper_lang import BARRIER, PLAIN, Group, Tile, copy_async, gluon_inline, sync
from llm_engine.ops_triton.lang import Ptr, Val
from llm_engine.ops_triton.quant import Fp8Rows, Fp8Weight, empty_rows

ROWS: Final = gl.constexpr(128)
STAGES: Final = gl.constexpr(4)
HEIGHT: Final = gl.constexpr(8)  # row tiles that walk the columns together, to share weights
BYTES: Final = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))


@gluon_inline
def _tile_of(index: Val, row_tiles: Val, column_tiles: Val) -> tuple[Val, Val]:
    """See `products.tile_of`."""
    block = index // (HEIGHT * column_tiles)
    height = gl.minimum(row_tiles - block * HEIGHT, HEIGHT)
    within = index % (HEIGHT * column_tiles)
    return block * HEIGHT + within % height, within // height


@gluon_inline
def _fetch(
    low: Ptr, high: Ptr, both: Val, weight: tma.tensor_descriptor, first_row: Val, second_row: Val, depth: Val,
    step: Val, tiles: Group, bars: Group,
) -> None:  # fmt: skip
    """A tile's rows from `low` and, if `both`, `high` on, and the two blocks of weights, step by step."""
    rows, first, second, _names = tiles
    full, free, _told, _heard = bars
    for start in range(0, depth, BLOCK):
        stage = step % STAGES
        mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * BLOCK * BLOCK)
        copy_tile(weight, [first_row, start], full.index(stage), first.index(stage))
        copy_tile(weight, [second_row, start], full.index(stage), second.index(stage))
        copy_async(rows.index(stage).slice(0, SIDE), low + start)
        if both:
            copy_async(rows.index(stage).slice(SIDE, SIDE), high + start)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        step += 1


@gluon_inline
def _produce(
    x: Ptr, weight: tma.tensor_descriptor, counter: Ptr, deal: Group, sizes: Group, tiles: Group, bars: Group,
    UP: gl.constexpr,
) -> None:  # fmt: skip
    row_of_slot, expert_of_tile = deal
    row_tiles, column_tiles, depth, height = sizes
    names, told, heard = tiles[3], bars[2], bars[3]
    place = gl.arange(0, SIDE, layout=gl.SliceLayout(1, BYTES))
    column = gl.expand_dims(gl.arange(0, BLOCK, layout=gl.SliceLayout(0, BYTES)), 0)
    step, turn, index = 0, 0, gl.program_id(0)
    while index < row_tiles * column_tiles:
        tile, column_tile = _tile_of(index, row_tiles, column_tiles)
        expert = gl.load(expert_of_tile + tile)
        if expert >= 0:
            tell(index, turn, names, told, heard)
            turn += 1
            low = tile * ROWS + place
            high = low + SIDE
            both = gl.load(row_of_slot + tile * ROWS + SIDE) >= 0
            if UP:
                # Places that nobody has hold the first row: anything but NaN will do.
                low, high = gl.maximum(gl.load(row_of_slot + low), 0), gl.maximum(gl.load(row_of_slot + high), 0)
            low_at = x + gl.expand_dims(low.to(gl.int64) * depth, 1) + column
            high_at = x + gl.expand_dims(high.to(gl.int64) * depth, 1) + column
            first_row = expert * height + column_tile * (BLOCK if UP else 2 * BLOCK)
            second_row = first_row + (height // 2 if UP else BLOCK)
            _fetch(low_at, high_at, both, weight, first_row, second_row, depth, step, tiles, bars)
            step += depth // BLOCK
        index = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
    tell(-1, turn, names, told, heard)


@gluon_inline
def _multiply(a: Tile, b: Tile, spent: Val, never: Val) -> Any:
    return hopper.warpgroup_mma(a, b.permute((1, 0)), spent, use_acc=never, is_async=True)


@gluon_inline
def _added(total: Val, part: Val, factor: Val) -> Val:
    total += part * gl.expand_dims(factor, 1)
    # A wait for nothing, before which the sum must be there: the next product takes the registers of this one.
    return hopper.warpgroup_mma_wait(0, deps=(total,))


@gluon_inline
def _sum_up(
    scale_at: Ptr, num_rows: Val, first_at: Ptr, second_at: Ptr, groups: Val, step: Val, tiles: Group, bars: Group,
    PART: gl.constexpr,
) -> tuple[Val, Val]:  # fmt: skip
    """Both halves of a tile, of 64 of its rows."""
    rows, first, second, _names = tiles
    full, free, _told, _heard = bars
    scale, own, other = gl.load(scale_at), gl.load(first_at), gl.load(second_at)
    one = gl.zeros([SIDE, BLOCK], gl.float32, layout=SUMS)
    two = gl.zeros([SIDE, BLOCK], gl.float32, layout=SUMS)
    part = gl.zeros([SIDE, BLOCK], gl.float32, layout=SUMS)
    for group in range(groups):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        hopper.fence_async_shared()
        never = step < 0  # which the compiler can't know: it would use other registers for every product
        side = rows.index(stage).slice(PART * SIDE, SIDE)
        product = _multiply(side, first.index(stage), part, never)
        factor, second_factor = scale * own, scale * other
        after = gl.minimum(group + 1, groups - 1)
        scale = gl.load(scale_at + after * num_rows)
        own, other = gl.load(first_at + after), gl.load(second_at + after)
        part = hopper.warpgroup_mma_wait(0, deps=(product,))
        one = _added(one, part, factor)
        product = _multiply(side, second.index(stage), part, never)
        part = hopper.warpgroup_mma_wait(0, deps=(product,))
        sync()
        mbarrier.arrive(free.index(stage), count=1)
        two = _added(two, part, second_factor)
        step += 1
    return one, two


@gluon_inline
def _pass_by(groups: Val, step: Val, full: Tile, free: Tile) -> None:
    """Let the other group have a tile for itself."""
    for _ in range(groups):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        sync()
        mbarrier.arrive(free.index(stage), count=1)
        step += 1


@gluon_inline
def _put_up(gate: Val, up: Val, out: Ptr, out_scales: Ptr, slot: Val, width: Val) -> None:
    """silu(gate) · up in fp8, as `experts._up_kernel` makes it."""
    value = (gate / (1.0 + gl.exp(-gate)) * up).to(gl.bfloat16).to(gl.float32)
    bits = (gl.maximum(gl.max(gl.abs(value), 1), 1e-4) / 448.0).to(gl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(gl.int32)
    scale = (exponent << 23).to(gl.float32, bitcast=True)
    value = gl.minimum(gl.maximum(value * gl.expand_dims(1.0 / scale, 1), -448.0), 448.0).to(gl.float8e4nv)
    column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SUMS))
    gl.store(out + gl.expand_dims(slot.to(gl.int64) * width, 1) + gl.expand_dims(column, 0), value)
    gl.store(out_scales + slot, scale)


@gluon_inline
def _put_down(one: Val, two: Val, out: Ptr, slot: Val, height: Val) -> None:
    column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SUMS))
    at = out + gl.expand_dims(slot.to(gl.int64) * height, 1) + gl.expand_dims(column, 0)
    gl.store(at, one.to(gl.bfloat16))
    gl.store(at + BLOCK, two.to(gl.bfloat16))


@gluon_inline
def _consume(
    scales: Group, results: Group, deal: Group, sizes: Group, tiles: Group, bars: Group, PART: gl.constexpr,
    UP: gl.constexpr,
) -> None:  # fmt: skip
    x_scales, weight_scales, num_rows = scales
    out, out_scales = results
    row_of_slot, expert_of_tile = deal
    row_tiles, column_tiles, depth, height = sizes
    full, free, told, heard = bars
    groups = depth // BLOCK
    step, turn = 0, 0
    index = hear(turn, tiles[3], told, heard)
    while index >= 0:
        tile, column_tile = _tile_of(index, row_tiles, column_tiles)
        start = tile * ROWS + PART * SIDE
        if gl.load(row_of_slot + start) >= 0:
            slot = start + gl.arange(0, SIDE, layout=gl.SliceLayout(1, SUMS))
            row = gl.maximum(gl.load(row_of_slot + slot), 0) if UP else slot
            first_block = gl.load(expert_of_tile + tile) * (height // BLOCK) + column_tile * (1 if UP else 2)
            second_block = first_block + (height // (2 * BLOCK) if UP else 1)
            first_at, second_at = weight_scales + first_block * groups, weight_scales + second_block * groups
            one, two = _sum_up(x_scales + row, num_rows, first_at, second_at, groups, step, tiles, bars, PART)
            # Plus zero, which the compiler can't know: it would work out addresses before the loop and spill them.
            slot += step >> 30
            if UP:
                scales_at = out_scales + column_tile.to(gl.int64) * (row_tiles * ROWS)
                _put_up(one, two, out + column_tile * BLOCK, scales_at, slot, height // 2)
            else:
                _put_down(one, two, out + column_tile * (2 * BLOCK), slot, height)
        else:
            _pass_by(groups, step, full, free)
        step += groups
        turn += 1
        index = hear(turn, tiles[3], told, heard)


@fp8_kernel
def _expert_product(
    x: Ptr, x_scales: Ptr, weight: tma.tensor_descriptor, weight_scales: Ptr, row_of_slot: Ptr, expert_of_tile: Ptr,
    counter: Ptr, out: Ptr, out_scales: Ptr, num_rows: int, num_tiles: int, column_tiles: int, depth: int, height: int,
    UP: gl.constexpr, MAX_REGISTERS: gl.constexpr,
) -> None:  # fmt: skip
    """`height`: of a weight, that is twice the width for UP. `counter`: 0 at first."""
    rows = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, ROWS, BLOCK], TILE)
    first = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK, BLOCK], TILE)
    second = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK, BLOCK], TILE)
    names = gl.allocate_shared_memory(gl.int32, [2, 1], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    told = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=PRODUCERS + 1)
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(told.index(i), count=1)
        mbarrier.init(heard.index(i), count=2)
    hopper.fence_async_shared()
    deal, sizes = (row_of_slot, expert_of_tile), (num_tiles, column_tiles, depth, height)
    tiles, bars = (rows, first, second, names), (full, free, told, heard)
    scales, results = (x_scales, weight_scales, num_rows), (out, out_scales)
    gl.warp_specialize(
        [
            (_produce, (x, weight, counter, deal, sizes, tiles, bars, UP)),
            (_consume, (scales, results, deal, sizes, tiles, bars, gl.constexpr(0), UP)),
            (_consume, (scales, results, deal, sizes, tiles, bars, gl.constexpr(1), UP)),
        ],
        [4, 4],
        [MAX_REGISTERS, MAX_REGISTERS],
    )


def serves(down: Fp8Weight) -> bool:
    """Whether the kernel is laid out for experts of such a width."""
    hidden, width = down.shape[-2:]
    return (hidden % (2 * BLOCK.value), width % BLOCK.value) == (0, 0)


def experts(x: Fp8Rows, dealt: Deal, gate_up: Fp8Weight, down: Fp8Weight) -> Tensor:
    """What SwiGLU experts [E, 2 · F, H] and [E, H, F] make of every slot: bf16 [S, H], undefined where nobody is.

    Tiles of the deal have ROWS rows.
    """
    assert dealt.tile_rows == ROWS.value, "dealt for these kernels"
    slots, (hidden, width) = len(dealt.row_of_slot), down.shape[-2:]
    inner = empty_rows(slots, width, x.values_RI.device)
    _launch(x, dealt, gate_up, inner.values_RI, inner.scales_GR)
    out_SH = torch.empty(slots, hidden, dtype=torch.bfloat16, device=x.values_RI.device)
    _launch(inner, dealt, down, out_SH, None)
    return out_SH


def _launch(x: Fp8Rows, dealt: Deal, weight: Fp8Weight, out: Tensor, out_scales: Tensor | None) -> None:
    (_, height, depth), tiles = weight.shape, dealt.num_tiles
    columns = height // (2 * BLOCK.value)
    counter = torch.zeros(1, dtype=torch.int32, device=out.device)
    described = TensorDescriptor.from_tensor(weight.values_OI.view(-1, depth), [BLOCK.value, BLOCK.value], TILE_LAYOUT)
    _expert_product[(min(PROGRAMS, tiles * columns),)](
        x.values_RI, x.scales_GR, described, weight.scales, dealt.row_of_slot, dealt.expert_of_tile_T, counter, out,
        out_scales, x.scales_GR.shape[1], tiles, columns, depth, height, out_scales is not None, REGISTERS, num_warps=4,
    )  # fmt: skip
