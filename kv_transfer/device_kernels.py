"""Kernels over paged planes in device memory: copying scattered blocks to a peer's pages, and their checksums.

Memory is addressed in words of 8 bytes. Both kernels run one program (or column of programs) per block of one plane
row; the block ids come from a table on the device. Names in capitals are constants, one compilation per value.

Under TRITON_INTERPRET=1 they run on CPU tensors, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol, TypeAlias, cast

import triton
import triton.language as tl

Ptr: TypeAlias = tl.tensor
Val: TypeAlias = tl.tensor

COPY_TILE: Final = 512
DIGEST_TILE: Final = 1024
SAMPLE_TILE: Final = 256
SAMPLE_CELLS: Final = 8
SLOTS: Final = 32


class Kernel(Protocol):
    """`kernel[grid](*args, num_warps=…)` launches it on the current stream."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]: ...


def _kernel(function: Callable[..., None]) -> Kernel:
    varying = [name for name in function.__annotations__ if name.startswith("num_")]
    return cast(Kernel, triton.jit(function, do_not_specialize=varying))


@_kernel
def copy_cells(
    source: Ptr,  # int64 words of the writer's memory
    target: Ptr,  # int64 words of the receiver's memory
    rows: Ptr,  # int64[r, 3]: first word of the row in the source, in the target, words of a cell
    source_blocks: Ptr,  # int32[n]
    target_blocks: Ptr,  # int32[n]
    ALIGN: tl.constexpr,  # a power of two that divides starts and cells, in words
    TILE: tl.constexpr,
) -> None:
    """Block source_blocks[i] of every row → block target_blocks[i]. Grid: (n, ⌈longest cell / TILE⌉, r)."""
    cell = tl.program_id(0)
    row = rows + tl.program_id(2) * 3
    words = tl.multiple_of(tl.load(row + 2), ALIGN)
    from_ = tl.load(source_blocks + cell).to(tl.int64) * words + tl.load(row)
    to = tl.load(target_blocks + cell).to(tl.int64) * words + tl.load(row + 1)
    from_ = tl.multiple_of(from_, ALIGN)
    to = tl.multiple_of(to, ALIGN)
    word = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keep = word < words
    values = tl.load(source + from_ + word, mask=keep)
    tl.store(target + to + word, values, mask=keep)


@_kernel
def digest_cells(
    memory: Ptr,  # int64 words
    rows: Ptr,  # int64[, 4]: first word of the row, words of a cell, running number, whether its pages are sampled
    blocks: Ptr,  # int32[n]
    sums: Ptr,  # int64[SLOTS, rows of the layout]: the checksums so far, in parts to be added up
    num_blocks: int,  # n
    num_rows: int,  # of the layout
    num_begin: int,  # of the table: the first of the r rows
    num_first: int,  # position of blocks[0] in the lease
    num_phase: int,  # first sampled word of every page
    SLOTS: tl.constexpr,  # additions to one address wait for each other
    SAMPLED: tl.constexpr,
    CELLS: tl.constexpr,  # of a program: few words of a cell are sampled
    TILE: tl.constexpr,
) -> None:
    """Add the cells of blocks[0 … n) to the checksums of r rows. Grid: (⌈n / CELLS⌉, r)."""
    cell_C = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    real_C = cell_C < num_blocks
    row = rows + (num_begin + tl.program_id(1)) * 4
    words = tl.load(row + 1)
    base_C = tl.load(blocks + cell_C, mask=real_C, other=0).to(tl.int64) * words + tl.load(row)
    taken = words
    in_lines = False
    if SAMPLED:  # a line of every page, then the last line of the cell
        in_lines = tl.load(row + 3) != 0
        taken = tl.where(in_lines, words // 512 * 8 + 8, words)
    total_CT = tl.zeros([CELLS, TILE], dtype=tl.int64)
    for first in range(0, taken, TILE):
        index = first + tl.arange(0, TILE)
        keep = index < taken
        at = index
        if SAMPLED:
            line = tl.where(index < taken - 8, index // 8 * 512 + num_phase + index % 8, words - 8 + index % 8)
            at = tl.where(in_lines, line, index)
        keep_CT = real_C[:, None] & keep[None, :]
        word_CT = tl.load(memory + base_C[:, None] + at[None, :], mask=keep_CT, other=0)
        mixed_CT = (word_CT ^ ((index.to(tl.int64) + 1) * 0x4F1BBCDCBFA53E0B)[None, :]) * 0x3504833333F9DE65
        mixed_CT = (mixed_CT ^ (mixed_CT >> 32)) * 0x5DB3D742C265539D
        total_CT += tl.where(keep_CT, mixed_CT, 0)
    place_C = cell_C.to(tl.int64) + (num_first + 1)
    placed_C = (tl.sum(total_CT, axis=1) ^ (place_C * 0x5DB3D742C265539D)) * 0x4F1BBCDCBFA53E0B
    placed = tl.sum(tl.where(real_C, placed_C ^ (placed_C >> 29), 0), axis=0)
    slot = sums + tl.program_id(0) % SLOTS * num_rows + tl.load(row + 2)
    tl.atomic_add(slot + tl.arange(0, 1), placed)
