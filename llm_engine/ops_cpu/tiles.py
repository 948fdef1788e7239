"""Intel's tile registers (AMX) inside compiled loops: bf16 matrices of 16 rows by 64 bytes, and their products.

A tile is named by its number, 0 to 7. All have 16 rows of 64 bytes: fp32 [16, 16], or bf16 [16, 32]. A product's
right side holds pairs of rows side by side: right[p, 2j + i] is element (2p + i, j). The shapes of the tiles are one
setting for all code of a thread, oneDNN's too: a kernel takes the tiles and gives them back as they were.

Only for kernels, and only where `has_tiles()`. Source: Intel 64 Architectures Software Developer's Manual, chapter
"Programming with Intel AMX"; the kernel's arch_prctl for the permission to use them.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final, cast

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

ROWS: Final = 16
PAIRS: Final = 16  # of bf16 in a row

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_LANES: Final = 16  # fp32 of a vector register
_I8: Final = ir.IntType(8)
_I8P: Final = _I8.as_pointer()
_I64: Final = ir.IntType(64)
_F32X16: Final = ir.VectorType(ir.FloatType(), _LANES)
_I16X32: Final = ir.VectorType(ir.IntType(16), 2 * _LANES)


@cache
def has_tiles() -> bool:
    """Whether this CPU multiplies bf16 tiles, numba compiles for it, and the system lets this process use them."""
    features = llvmlite.binding.get_host_cpu_features()
    if platform.system() != "Linux" or not features.get("amx-bf16") or not features.get("avx512bf16"):
        return False
    if any(vars(numba.config)[name] is not None for name in ("CPU_NAME", "CPU_FEATURES")):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def configuration() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What `load_configuration` takes: palette 1, and the shape of all tiles."""
    bytes_64 = np.zeros(64, np.uint8)
    bytes_64[0] = 1
    bytes_64[16:32:2] = 64  # bytes of a row, 16 bits for each tile
    bytes_64[48:56] = ROWS
    return bytes_64


def _instruction(typing: Callable[..., Any]) -> Callable[..., Any]:
    """What numba puts in place of a call: `typing` gives the types and the code."""
    return cast(Callable[..., Any], intrinsic(typing))


def _call(builder: Any, name: str, args: Sequence[Any]) -> Any:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    return builder.call(builder.module.declare_intrinsic(f"llvm.x86.{name}", fnty=kind), args)


def _address(context: Any, builder: Any, kind: Any, array: Any, row: Any, column: Any) -> tuple[Any, Any]:
    """Pointer to an element of a C-contiguous array with two dimensions, and the bytes from row to row."""
    view = context.make_array(kind)(context, builder, array)
    width = builder.extract_value(view.shape, 1)
    pointer = builder.gep(view.data, [builder.add(builder.mul(row, width), column)])
    return pointer, builder.mul(width, _I64(kind.dtype.bitwidth // 8))


def _of_tiles(name: str, numbers: Sequence[Any]) -> Any:
    """An instruction that knows nothing but tiles; None, which numba takes for "no", when one is not a literal."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, name, [_I8(number.literal_value) for number in numbers])

    return (types.void(*numbers), codegen) if all(map(_is_literal, numbers)) else None


def _of_memory(name: str, number: Any, array: Any) -> Any:
    """An instruction that moves one tile."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, stride = _address(context, builder, array, *args[1:])
        return _call(builder, name, [_I8(number.literal_value), builder.bitcast(pointer, _I8P), stride])

    return (types.void(number, array, types.int64, types.int64), codegen) if _is_literal(number) else None


def _is_literal(number: Any) -> bool:
    return isinstance(number, types.IntegerLiteral)


def _of_configuration(name: str, array: Any) -> Any:
    """An instruction that moves the configuration."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = context.make_array(array)(context, builder, args[0])
        return _call(builder, name, [builder.bitcast(view.data, _I8P)])

    return types.void(array), codegen


@_instruction
def clear_tile(typing: Any, tile: Any) -> Any:
    """Fill it with zeros."""
    return _of_tiles("tilezero", [tile])


@_instruction
def multiply_tiles(typing: Any, total: Any, left: Any, right: Any) -> Any:
    """total += left · right."""
    return _of_tiles("tdpbf16ps", [total, left, right])


@_instruction
def load_tile(typing: Any, tile: Any, array: Any, row: Any, column: Any) -> Any:
    """Sixteen rows of a C-contiguous array, from (row, column) on."""
    return _of_memory("tileloadd64", tile, array)


@_instruction
def store_tile(typing: Any, tile: Any, array: Any, row: Any, column: Any) -> Any:
    """Into sixteen rows of a C-contiguous array, from (row, column) on."""
    return _of_memory("tilestored64", tile, array)


@_instruction
def load_configuration(typing: Any, array: Any) -> Any:
    """From 64 bytes."""
    return _of_configuration("ldtilecfg", array)


@_instruction
def store_configuration(typing: Any, array: Any) -> Any:
    """Into 64 bytes."""
    return _of_configuration("sttilecfg", array)


@_instruction
def prefetch(typing: Any, array: Any, row: Any, column: Any) -> Any:
    """Fetch the 64 bytes around an element, which may lie behind its row, into the cache, and wait for nothing."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, _ = _address(context, builder, array, *args)
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [_I8P, i32, i32, i32])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
        return builder.call(function, [builder.bitcast(pointer, _I8P), i32(0), i32(3), i32(1)])

    return types.void(array, types.int64, types.int64), codegen


@_instruction
def store_interleaved(
    typing: Any, first: Any, second: Any, row1: Any, row2: Any, column: Any, out: Any, tile: Any, pair: Any
) -> Any:
    """Pairs (first[row1, column + j], second[row2, column + j]), j < 32, into row `pair` of two tiles in memory.

    `out`: uint16 [n, 32], 16 rows a tile. Tile `tile` gets the j with j mod 8 < 4, the next tile the others: this order
    takes one instruction a register. `store_columns` undoes it.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first, second, row1, row2, column, out, tile, pair = args
        rows = [
            builder.load(
                builder.bitcast(_address(context, builder, kind, a, row, column)[0], _I16X32.as_pointer()), align=2
            )
            for kind, a, row in ((signature.args[0], first, row1), (signature.args[1], second, row2))
        ]
        for half in (0, 1):
            places = [8 * lane + 4 * half + i for lane in range(4) for i in range(4)]
            both = _shuffled(builder, rows, [place for i in places for place in (i, 2 * _LANES + i)])
            at = builder.add(builder.mul(builder.add(tile, _I64(half)), _I64(ROWS)), pair)
            pointer, _ = _address(context, builder, signature.args[5], out, at, _I64(0))
            builder.store(both, builder.bitcast(pointer, _I16X32.as_pointer()), align=2)

    integers = [types.int64] * 3
    return types.void(first, second, *integers, out, types.int64, types.int64), codegen


@_instruction
def store_columns(typing: Any, sums: Any, row: Any, column: Any, out: Any, out_row: Any, out_column: Any) -> Any:
    """sums[row, column:column + 32], two tiles of interleaved columns, as bf16 in their own order into `out`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, row, column, out, out_row, out_column = args
        pointer, _ = _address(context, builder, signature.args[0], sums, row, column)
        pointer = builder.bitcast(pointer, _F32X16.as_pointer())
        halves = [builder.load(builder.gep(pointer, [_I64(i)]), align=4) for i in (0, 1)]
        order = [(j % 8 // 4) * _LANES + j // 8 * 4 + j % 4 for j in range(2 * _LANES)]
        values = builder.fptrunc(_shuffled(builder, halves, order), _BF16X32)
        target, _ = _address(context, builder, signature.args[3], out, out_row, out_column)
        builder.store(values, builder.bitcast(target, _BF16X32.as_pointer()), align=2)

    return types.void(sums, types.int64, types.int64, out, types.int64, types.int64), codegen


def _shuffled(builder: Any, pair: Sequence[Any], places: Sequence[int]) -> Any:
    return builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), list(places)))


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's bf16, for which llvmlite has no name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BF16X32: Final = ir.VectorType(_BFloat(), 2 * _LANES)
