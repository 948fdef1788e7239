"""Compiled loops for everything that is not a matrix product, and the small pieces they share.

A kernel walks over rows and treats each one alone, so its result cannot depend on the batch: this is how `exact` is
kept outside of the matrix products, and one compiled loop is far cheaper than the dozen tensor operations it replaces.
Sums may be reordered by the compiler, always in the same way for rows of equal length.

Every signature is spelled out and compiled by `compile_kernels`, never during a step. Machine code is cached on disk.
bf16 caches are seen as uint16, fp32 ones as float32: `Cache` arrays below.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba.extending import overload
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
Floats = npt.NDArray[np.float32]
Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
Cache = npt.NDArray[np.float32] | npt.NDArray[np.uint16]

F1: Final = "float32[::1]"
F2: Final = "float32[:, ::1]"
F3: Final = "float32[:, :, ::1]"
F2S: Final = "float32[:, :]"  # rows may be strided
I1: Final = "int64[::1]"
I2: Final = "int64[:, ::1]"
N2: Final = "int32[:, ::1]"
CACHE: Final = "{cache}[:, ::1]"  # float32 or uint16, by the dtype of the caches
B2: Final = "uint16[:, ::1]"  # bf16

# No flag that lets the compiler assume the absence of NaN or infinity.
_FASTMATH: Final = {"contract", "reassoc", "nsz", "arcp"}
_LOG2_E: Final = np.float32(1.4426950408889634)
_LN2_HIGH: Final = np.float32(0.693359375)
_LN2_LOW: Final = np.float32(-2.12194440e-4)
ZERO: Final = np.float32(0.0)
ONE: Final = np.float32(1.0)
_THREAD_COST: Final = 1_000_000  # multiplications that are worth waking a thread for
MINUS_INF: Final = np.float32(-np.inf)


def _cache_dir(configured: str) -> Path:
    """Where machine code is kept: a folder of its own for this state of the sources.

    numba notices a change of the file a kernel is in, but not of a file whose pieces were compiled into it.
    """
    here = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))
    name = f"kernels-{hashlib.blake2b(sources, digest_size=8).hexdigest()}"
    bases = [Path(configured)] if configured else [here / "__pycache__", Path.home() / ".cache" / "baton"]
    for base in bases:
        with contextlib.suppress(OSError):
            (base / name).mkdir(parents=True, exist_ok=True)
            if os.access(base / name, os.W_OK):
                return base / name
    return Path(tempfile.mkdtemp(prefix=name))  # nothing lasting is writable: compile anew in every process


_settings: dict[str, Any] = vars(numba.config)
_settings["CACHE_DIR"] = str(_cache_dir(_settings["CACHE_DIR"]))
_kernels: list[tuple[Any, str]] = []  # dispatcher and signature of every kernel, filled by `kernel`


def kernel(signature: str) -> Callable[[F], F]:
    """Register a function for compilation; it releases the interpreter lock while running."""

    def register(function: F) -> F:
        dispatcher = numba.njit(fastmath=_FASTMATH, error_model="numpy", nogil=True, cache=True)(function)
        _kernels.append((dispatcher, signature))
        return cast(F, dispatcher)

    return register


def inline(function: F) -> F:
    """A piece of a kernel."""
    return cast(F, numba.njit(fastmath=_FASTMATH, error_model="numpy", nogil=True)(function))


def in_order(function: F) -> F:
    """A piece of a kernel in which every operation is carried out and rounded as written."""
    return cast(F, numba.njit(fastmath=False, error_model="numpy", nogil=True)(function))


def compile_kernels(dtype: torch.dtype) -> None:
    """Compile every kernel for caches of `dtype`, or load it from disk: seconds the first time on a machine."""
    cache = "uint16" if dtype == torch.bfloat16 else "float32"
    for dispatcher, signature in _kernels:
        dispatcher.disable_compile(False)  # allows `compile`, until below
        dispatcher.compile(signature.replace("{cache}", cache))
        dispatcher.disable_compile()


def over_rows(function: Callable[..., None], rows: int, cost: int, *args: Any) -> None:
    """Run function(first, end, *args) over all rows, on as many threads as torch uses where that pays.

    `cost`: multiplications of an average row. Threads take the next few rows when they are done with theirs, because
    later rows of a prompt see more keys.
    """
    threads = min(torch.get_num_threads(), rows, rows * cost // _THREAD_COST)
    if threads <= 1:
        function(0, rows, *args)
        return
    step = max(1, rows // (4 * threads))
    starts = iter(range(0, rows, step))  # shared: every `next` takes the interpreter lock

    def work() -> None:
        for first in starts:
            function(first, min(first + step, rows), *args)

    helpers = [_pool().submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        helper.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kernel")


def cache_array(plane_BPC: Tensor) -> Cache:
    """Cache rows [slots, C] of a plane, as kernels see them."""
    return row_array(plane_BPC.view(-1, plane_BPC.shape[-1]))


def row_array(rows_RC: Tensor) -> Cache:
    """fp32 or bf16 rows as kernels see them."""
    array: Cache = (rows_RC.view(torch.uint16) if rows_RC.dtype == torch.bfloat16 else rows_RC).numpy()
    return array


@in_order
def exp(x: np.float32) -> np.float32:
    """e^x to about one unit in the last place, from operations that vectorise; NaN stays NaN."""
    if x > np.float32(88.0):
        x = np.float32(88.0)
    if x < np.float32(-87.0):
        x = np.float32(-87.0)
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power: np.float32 = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)  # 2^n
    result: np.float32 = (p * (r * r) + r + ONE) * power
    return result


@inline
def slot_of(table: Ints, position: int, block_tokens: int) -> np.int64:
    """Cache row of a position."""
    return np.int64(table[position // block_tokens]) * block_tokens + position % block_tokens


def row_at(cache: Cache, slot: int | np.int64, scratch: Floats) -> Floats:
    """Cache row `slot` as fp32: the row itself, or converted into `scratch`."""
    raise NotImplementedError("for kernels only")


def store_row(cache: Cache, slot: int, row: Floats) -> None:
    """Write an fp32 row into a cache, rounding to nearest even."""
    raise NotImplementedError("for kernels only")


@overload(row_at)
def _row_at(cache: Any, slot: Any, scratch: Any) -> Callable[..., Any]:
    def direct(cache: Any, slot: Any, scratch: Any) -> Any:
        return cache[slot]

    def widen(cache: Any, slot: Any, scratch: Any) -> Any:
        bits = scratch.view(np.uint32)
        for c in range(scratch.shape[0]):
            bits[c] = np.uint32(cache[slot, c]) << np.uint32(16)
        return scratch

    return direct if cache.dtype == numba.types.float32 else widen


@overload(store_row)
def _store_row(cache: Any, slot: Any, row: Any) -> Callable[..., Any]:
    def copy(cache: Any, slot: Any, row: Any) -> None:
        for c in range(row.shape[0]):
            cache[slot, c] = row[c]

    def narrow(cache: Any, slot: Any, row: Any) -> None:
        bits = row.view(np.uint32)
        for c in range(row.shape[0]):
            odd = (bits[c] >> np.uint32(16)) & np.uint32(1)
            rounded = (bits[c] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            cache[slot, c] = np.uint16(rounded) if row[c] == row[c] else np.uint16(0x7FC0)

    return copy if cache.dtype == numba.types.float32 else narrow


@inline
def rotate_interleaved(row: Floats, start: int, cos: Floats, sin: Floats) -> None:
    """Rotate pairs (start + 2j, start + 2j + 1) in place."""
    for j in range(cos.shape[0]):
        a, b = row[start + 2 * j], row[start + 2 * j + 1]
        row[start + 2 * j] = a * cos[j] - b * sin[j]
        row[start + 2 * j + 1] = b * cos[j] + a * sin[j]


@inline
def rotate_half(row: Floats, cos: Floats, sin: Floats) -> None:
    """Rotate pairs (j, j + J) of the first 2J channels in place."""
    half = cos.shape[0]
    for j in range(half):
        a, b = row[j], row[half + j]
        row[j] = a * cos[j] - b * sin[j]
        row[half + j] = b * cos[j] + a * sin[j]
