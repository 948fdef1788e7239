"""The shapes and layouts of `experts_hopper`, and how its warps hand on what is to be done; see `hopper_lang`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Final, cast

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from llm_engine.ops_triton.hopper_lang import Tile, gluon_inline, sync
from llm_engine.ops_triton.lang import Kernel, Val

# A name that Triton 3.9 changed.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

SIDE: Final = gl.constexpr(64)  # rows that a group of four warps multiplies
BLOCK: Final = gl.constexpr(128)  # depth of a step, and columns of a product
PRODUCERS: Final = gl.constexpr(128)  # threads that fetch
REGISTERS: Final = 232  # of a thread that multiplies; those that fetch have what they leave
PROGRAMS: Final = 132  # one for every processor

SUMS_LAYOUT: Final = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
SUMS: Final = gl.constexpr(SUMS_LAYOUT)
TILE_LAYOUT: Final = gl.NVMMASharedLayout(128, 8, rank=2)
TILE: Final = gl.constexpr(TILE_LAYOUT)
ONE: Final = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


def fp8_kernel(function: Callable[..., None]) -> Kernel:
    """A kernel that can be launched. As elsewhere, arguments named `num_*` never cause a recompilation."""
    varying = [name for name in inspect.signature(function).parameters if name.startswith("num_")]
    return cast(Kernel, gluon.jit(function, do_not_specialize=varying))


@gluon_inline
def tell(index: Val, turn: Val, names: Tile, told: Tile, heard: Tile) -> None:
    """Name the next piece of work to two groups of warps; below 0: nothing any more.

    `told` and `heard`, for each of two places: a name is there; both groups have read it.
    """
    mbarrier.wait(heard.index(turn & 1), ((turn >> 1) & 1) ^ 1)
    names.index(turn & 1).store(gl.full([1], 0, gl.int32, layout=ONE) + index)
    sync()
    mbarrier.arrive(told.index(turn & 1), count=1)


@gluon_inline
def hear(turn: Val, names: Tile, told: Tile, heard: Tile) -> Val:
    """What was named."""
    mbarrier.wait(told.index(turn & 1), (turn >> 1) & 1)
    index = gl.sum(names.index(turn & 1).load(ONE), 0)
    sync()
    mbarrier.arrive(heard.index(turn & 1), count=1)
    return index
