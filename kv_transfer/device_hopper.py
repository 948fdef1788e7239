"""Scattered blocks to a peer's pages by the tensor copies of Hopper, in Gluon: through shared memory, a tile at a time.

There is one program of one warp for every processor. It needs so few registers that it runs beside large products,
where programs of more threads have to take their place; and the warp only says what is to be copied.

Both ends are seen as rows of up to 1 KiB that divide every cell and every start. What is left of a cell after whole
tiles is fetched as a tile as well, with rows that are not used, and stored row by row.

Gluon is experimental, so this is imported only where it serves; `copy_cells` does the same everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kv_transfer.device import DeviceRegion
from kv_transfer.device_copies import PeerMemory, Target, first_cells
from kv_transfer.device_kernels import Kernel, Ptr, Val
from kv_transfer.layout import CopyPlan

F = TypeVar("F", bound=Callable[..., Any])
Tile = gl.shared_memory_descriptor

# Names that Triton 3.9 changed.
_load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_view = Tile.reinterpret if hasattr(Tile, "reinterpret") else Tile._reinterpret

PROGRAMS: Final = 132  # one for every processor of an H100 or H200
TILE_BYTES: Final = 8192
ROW_BYTES: Final = (256, 1024)  # at least, and at most
STAGES: Final = gl.constexpr(4)
AHEAD: Final = gl.constexpr(2)  # tiles fetched before they are stored
_LINES: Final = gl.NVMMASharedLayout(0, 32, rank=2)
LINES: Final = gl.constexpr(_LINES)
BARRIER: Final = gl.constexpr(mbarrier.MBarrierLayout())
SOURCE: Final = gl.constexpr(0)
TARGET: Final = gl.constexpr(1)


def _inline(function: F) -> F:
    return cast(F, gluon.jit(function))


def _kernel(function: Callable[..., None]) -> Kernel:
    varying = [name for name in function.__annotations__ if name.startswith("num_")]
    return cast(Kernel, gluon.jit(function, do_not_specialize=varying))


@_inline
def _find(
    index: Val, pieces: Ptr, blocks: Ptr, num_blocks: Val, num_together: Val, SIDE: gl.constexpr
) -> tuple[Ptr, Val]:
    """The piece of a copy, and its first row on one side."""
    turn = index // num_together
    piece = pieces + (turn // num_blocks * num_together + index % num_together) * 4
    block = gl.load(blocks + turn % num_blocks)
    return piece, gl.load(piece + SIDE) + block * gl.load(piece + 2)


@_kernel
def copy_tiles(
    source: tma.tensor_descriptor,  # rows of the writer's memory, by tiles
    target: tma.tensor_descriptor,  # of the receiver's, by tiles
    target_row: tma.tensor_descriptor,  # the same, row by row
    pieces: Ptr,  # int32[p, 4]: first row of block 0 in the source, in the target, rows of a cell, rows of the piece
    source_blocks: Ptr,  # int32[n]
    target_blocks: Ptr,  # int32[n]
    num_blocks: int,  # n
    num_copies: int,  # n · p
    num_together: int,  # divides p: so many pieces of a block, then the next block
    ROWS: gl.constexpr,  # of a tile
    WIDTH: gl.constexpr,  # of a row, in words of 4 bytes
) -> None:
    """Every piece of block source_blocks[i] → block target_blocks[i]. Any number of programs of one warp."""
    lines = gl.allocate_shared_memory(gl.int32, [STAGES * ROWS, 1, WIDTH], LINES)
    tiles = _view(lines, gl.int32, [STAGES, ROWS, WIDTH], LINES)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    hopper.fence_async_shared()
    first, step = gl.program_id(0), gl.num_programs(0)
    count = (num_copies - first + step - 1) // step
    for turn in range(count + AHEAD):
        if turn < count:
            tma.store_wait(STAGES - AHEAD - 1)  # what was in the stage has been read
            stage = turn % STAGES
            _piece, origin = _find(first + turn * step, pieces, source_blocks, num_blocks, num_together, SOURCE)
            mbarrier.expect(full.index(stage), ROWS * WIDTH * 4)
            _load_tile(source, [origin, 0], full.index(stage), tiles.index(stage))
        done = turn - AHEAD
        if done >= 0:
            here = done % STAGES
            piece, place = _find(first + done * step, pieces, target_blocks, num_blocks, num_together, TARGET)
            rows = gl.load(piece + 3)
            mbarrier.wait(full.index(here), (done // STAGES) & 1)
            if rows == ROWS:
                _store_tile(target, [place, 0], tiles.index(here))
            else:
                for row in range(rows):
                    _store_tile(target_row, [place + row, 0], lines.index(here * ROWS + row))
    # `tma.store_wait` waits until shared memory has been read. This waits until the writes are complete, so that the
    # end of the kernel, and an event behind it, mean of them what they mean of stores: they have landed.
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


class TileCopies:
    """Copies of blocks from a region to one target."""

    def __init__(self, region: DeviceRegion, target: Target, plan: CopyPlan, row_bytes: int) -> None:
        """`row_bytes`: see the function of that name."""
        self._row_bytes = row_bytes
        self._rows = TILE_BYTES // row_bytes
        self._pieces, self._starts = _pieces(region, plan, self._rows, row_bytes)
        self._views = (
            self._view(region.words, plan.source.arena_bytes, self._rows),
            self._view(target, plan.target.arena_bytes, self._rows),
            self._view(target, plan.target.arena_bytes, 1),
        )

    def __call__(self, layers: range, source_blocks: Tensor, target_blocks: Tensor) -> None:
        """Enqueue copies of some blocks of consecutive layers on the current stream."""
        pieces = self._pieces[self._starts[layers.start] : self._starts[layers.stop]]
        num_blocks = len(source_blocks)
        num_copies = len(pieces) * num_blocks
        # Layer by layer, where they are alike, and cell by cell: programs that run side by side read and write runs.
        together = len(pieces) // len(layers) if len(pieces) % len(layers) == 0 else 1
        copy_tiles[(max(1, min(PROGRAMS, num_copies)),)](
            *self._views, pieces, source_blocks, target_blocks, num_blocks, num_copies, together,
            ROWS=self._rows, WIDTH=self._row_bytes // 4, num_warps=1,
        )  # fmt: skip

    def _view(self, memory: Target, num_bytes: int, rows: int) -> TensorDescriptor:
        base, width = PeerMemory(memory.data_ptr(), torch.int32), self._row_bytes // 4
        return TensorDescriptor(base, [num_bytes // self._row_bytes, width], [width, 1], [rows, width], _LINES)


def row_bytes(region: DeviceRegion, target: Target, plan: CopyPlan) -> int:
    """Of a row that divides every cell and start of both ends; 0 where that is too little."""
    if region.memory.data_ptr() % 16 or target.data_ptr() % 16:
        return 0
    least, most = ROW_BYTES
    size = math.gcd(most, *itertools.chain.from_iterable(first_cells(plan)))
    return size if size >= least else 0


def _pieces(region: DeviceRegion, plan: CopyPlan, rows: int, row_bytes: int) -> tuple[Tensor, list[int]]:
    """As `copy_tiles` wants them, in the order of layers, and where those of each layer begin; then their number."""
    entries: list[tuple[int, int, int, int]] = []
    starts = [0]
    cells = iter(first_cells(plan))
    for layer in plan.layers:
        for cell in itertools.islice(cells, len(layer)):
            from_, to, size = (num_bytes // row_bytes for num_bytes in cell)
            entries += [(from_ + at, to + at, size, min(rows, size - at)) for at in range(0, size, rows)]
        starts.append(len(entries))
    return region.tensor(np.array(entries, np.int32)), starts
