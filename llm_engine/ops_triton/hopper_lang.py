"""The dialect of kernels in Gluon for Hopper, and the shapes and layouts of the one for attention.

Gluon says what Triton leaves to its compiler: where values and tiles lie, what waits for what, which warps do which
part. It is experimental, so only this package's modules on Hopper import this one, when there is such a card.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias, TypeVar, cast

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from llm_engine.ops_triton.lang import Kernel

F = TypeVar("F", bound=Callable[..., Any])
Tile: TypeAlias = gl.shared_memory_descriptor
Group: TypeAlias = gl.tuple  # of tiles: halves of latents, rests; of barriers: full, free, ready, met

# Names that Triton 3.9 changed.
copy_async = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)
sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
view = Tile.reinterpret if hasattr(Tile, "reinterpret") else Tile._reinterpret

HEAD_TILE: Final = gl.constexpr(64)
KEYS: Final = gl.constexpr(64)  # of a tile
L: Final = gl.constexpr(512)
HALF: Final = gl.constexpr(256)
E: Final = gl.constexpr(64)
CHUNKS: Final = gl.constexpr(2)  # of half a tile; one costs a tenth, four gain nothing

_SCORES: Final = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
SCORES: Final = gl.constexpr(_SCORES)
HEADS_OF_SCORES: Final = gl.constexpr(gl.SliceLayout(1, _SCORES))
KEYS_OF_SCORES: Final = gl.constexpr(gl.SliceLayout(0, _SCORES))
LINES: Final = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 128 bytes for eight threads
WIDE: Final = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
TILE: Final = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
PLAIN: Final = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
BARRIER: Final = gl.constexpr(mbarrier.MBarrierLayout())


def gluon_inline(function: F) -> F:
    """A piece of a kernel."""
    return cast(F, gluon.jit(function))


def gluon_kernel(function: Callable[..., None]) -> Kernel:
    """A kernel that can be launched."""
    return cast(Kernel, gluon.jit(function, do_not_specialize=["num_blocks"]))
