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

COPY_TILE: Final = 4096
DIGEST_TILE: Final = 1024


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
    source_blocks: Ptr,  # int32[n]
    target_blocks: Ptr,  # int32[n]
    num_source_start: int,  # first word of the plane row in the source
    num_target_start: int,
    WORDS: tl.constexpr,  # of a cell
    ALIGN: tl.constexpr,  # a power of two that divides starts and cells, in words
    TILE: tl.constexpr,
) -> None:
    """Block source_blocks[i] of a plane row → block target_blocks[i]. Grid: (n, ⌈WORDS / TILE⌉)."""
    cell = tl.program_id(0)
    from_ = tl.load(source_blocks + cell).to(tl.int64) * WORDS + num_source_start
    to = tl.load(target_blocks + cell).to(tl.int64) * WORDS + num_target_start
    from_ = tl.multiple_of(from_, ALIGN)
    to = tl.multiple_of(to, ALIGN)
    word = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keep = word < WORDS
    values = tl.load(source + from_ + word, mask=keep)
    tl.store(target + to + word, values, mask=keep)


@_kernel
def digest_cells(
    memory: Ptr,  # int64 words
    blocks: Ptr,  # int32[n]
    sums: Ptr,  # int64[1]: the row's checksum so far
    num_start: int,  # first word of the plane row
    num_first: int,  # position of blocks[0] in the lease
    num_phase: int,  # first sampled word of every page
    WORDS: tl.constexpr,  # of a cell
    TAKEN: tl.constexpr,  # of them count
    SAMPLED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Add the cells of blocks[0 … n) to the row's checksum. Grid: (n,)."""
    cell = tl.program_id(0)
    base = tl.load(blocks + cell).to(tl.int64) * WORDS + num_start
    total = tl.zeros([TILE], dtype=tl.int64)
    for first in range(0, TAKEN, TILE):
        index = first + tl.arange(0, TILE)
        keep = index < TAKEN
        at = index
        if SAMPLED:  # a line of every page, then the last line of the cell
            in_pages = index < TAKEN - 8
            at = tl.where(in_pages, index // 8 * 512 + num_phase + index % 8, WORDS - 8 + index % 8)
        word = tl.load(memory + base + at, mask=keep, other=0)
        mixed = (word ^ ((index.to(tl.int64) + 1) * 0x4F1BBCDCBFA53E0B)) * 0x3504833333F9DE65
        mixed = (mixed ^ (mixed >> 32)) * 0x5DB3D742C265539D
        total += tl.where(keep, mixed, 0)
    one = tl.zeros([1], dtype=tl.int64)  # a tile of one: products of whole numbers wrap around in tiles
    place = one + num_first + cell + 1
    placed = ((one + tl.sum(total, axis=0)) ^ (place * 0x5DB3D742C265539D)) * 0x4F1BBCDCBFA53E0B
    tl.atomic_add(sums + tl.arange(0, 1), placed ^ (placed >> 29))
