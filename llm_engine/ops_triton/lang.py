"""The dialect of the kernels: decorators, products, rotations and cache addresses that all of them share.

Kernels are plain Triton: pointers and masks, no descriptors, no inline assembly, so that other compilers of the
language take them. Arguments named `num_*` vary from step to step and never cause a recompilation; names in capitals
are constants.

Under TRITON_INTERPRET=1 kernels run on CPU tensors, for tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast

import triton
import triton.language as tl

F = TypeVar("F", bound=Callable[..., Any])
Ptr: TypeAlias = tl.tensor  # where a tensor starts in device memory
Val: TypeAlias = tl.tensor  # a tile, or a number known on the device only

INTERPRETED: Final = not isinstance(tl.sum, triton.JITFunction)


class Kernel(Protocol):
    """`kernel[grid](*args, num_warps=…, num_stages=…)` launches it on the current stream."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]: ...


def kernel(function: Callable[..., None]) -> Kernel:
    """A kernel that can be launched. With a last parameter OVERLAP it begins with `await_inputs(OVERLAP)`."""
    names = inspect.signature(function).parameters
    varying = [name for name in names if name.startswith("num_")]
    compiled = cast(Kernel, triton.jit(function, do_not_specialize=varying))
    return _Overlapped(compiled) if "OVERLAP" in names else compiled


class _Overlapped:
    """A kernel that is set up while the one before it ends, where the card can do that."""

    def __init__(self, compiled: Kernel) -> None:
        self._compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        if nvidia_arch() >= 90:
            return partial(self._compiled[grid], OVERLAP=True, launch_pdl=True)
        return partial(self._compiled[grid], OVERLAP=False)


@cache
def nvidia_arch() -> int:
    """Which generation of Nvidia's cards kernels run on, 90 for Hopper; 0 where they run on something else."""
    if INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0


@cache
def for_hopper(name: str) -> ModuleType | None:
    """A module of kernels in Gluon, where the card and the language are those it was written for."""
    if nvidia_arch() != 90:
        return None
    try:
        return import_module(f"llm_engine.ops_triton.{name}")
    except (ImportError, AttributeError):  # Gluon is experimental: names come and go
        return None


def inline(function: F) -> F:
    """A piece of a kernel."""
    return cast(F, triton.jit(function))


def ceil_div(size: int, part: int) -> int:
    """How many parts cover a size."""
    return -(-size // part)


def tile_size(size: int, least: int = 1) -> int:
    """The power of two that covers a size. Products want at least 16."""
    return max(least, 1 << max(size - 1, 0).bit_length())


@inline
def await_inputs(OVERLAP: tl.constexpr) -> None:
    """Wait until what the kernels before this one have written can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@inline
def let_next_in(OVERLAP: tl.constexpr) -> None:
    """Let the programs of the next kernel come in and wait, behind `await_inputs`: no kernel comes in two early.

    Not for kernels whose programs fill processors. Those of the next one then crowd on the others, where they stay.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@inline
def arrives_last(counter: Ptr, count: Val) -> Val:
    """Whether this program is the last of `count` to come here; it then finds what the others have stored before.

    The counter is zero before and after; see `arrivals`.
    """
    tl.debug_barrier()  # all threads have stored before one of them says so
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    tl.store(counter, 0, mask=last)
    return last


@inline
def dot(a: Val, b: Val, acc: Val) -> Val:
    """a · b + acc, accumulated in fp32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@inline
def sigmoid(x: Val) -> Val:
    """1 / (1 + e⁻ˣ)."""
    return 1.0 / (1.0 + tl.exp(-x))


@inline
def row_slots(table: Ptr, positions: Val, mask: Val, P: tl.constexpr) -> Val:
    """Cache rows (int64) of positions, through the block table of their sequence."""
    block = tl.load(table + positions // P, mask=mask, other=0).to(tl.int64)
    return block * P + positions % P


@inline
def load_angles(cos: Ptr, sin: Ptr, row: Val, J: tl.constexpr, J_TILE: tl.constexpr) -> tuple[Val, Val]:
    """Cosines and sines of the J pairs of one row."""
    pair = tl.arange(0, J_TILE)
    at = row.to(tl.int64) * J + pair
    return tl.load(cos + at, mask=pair < J, other=1.0), tl.load(sin + at, mask=pair < J, other=0.0)


@inline
def pair_columns(J: tl.constexpr, J_TILE: tl.constexpr, INTERLEAVED: tl.constexpr) -> tuple[Val, Val]:
    """Columns of the two members of every pair: (2j, 2j + 1), or (j, j + J)."""
    pair = tl.arange(0, J_TILE)
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1
    return pair, pair + J


@inline
def ue8m0(amax: Val) -> Val:
    """The power of two that brings values up to `amax` within e4m3's 448; amax below 1e-4 counts as 1e-4."""
    bits = (tl.maximum(amax, 1e-4) / 448.0).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return (exponent << 23).to(tl.float32, bitcast=True)


@inline
def to_e4m3(x: Val) -> Val:
    """fp32 → e4m3, clamped to ±448: the format has no infinity, larger values would become NaN."""
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)


@inline
def e4m3_ptr(at: Ptr) -> Ptr:
    """A byte pointer as one to e4m3 values."""
    return at.to(tl.pointer_type(tl.float8e4nv))
