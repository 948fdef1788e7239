"""Attention on Hopper: 64 heads of one row a program, written in Gluon.

Two groups of four warps share the work of a pair of key tiles, a third one fetches keys, or two together where they are
stored in fp8. Side 0 weighs the even tiles and sums up the left half of the values' columns, side 1 the odd tiles and
the right half; weights and maxima go to the other side through shared memory. While one side takes exponentials, the
other keeps the tensor cores busy.

A tile [64, 576] lies in two buffers, one for each side, in three parts: left and right half of the latents and the
rotated rest. The weights of a tile replace its rotated keys, which nobody reads any more. A side's own half of its own
tile is called near, the other one far:

- `full`, for every buffer near and far, each in chunks of columns: the chunk has arrived (the far one with the rest).
- `free`, for every buffer near and far: the half can be overwritten. Near halves are given back by their own side, far
  halves, with the weights, by the other one.
- `ready`, for every buffer: weights and maxima are written.

Every barrier completes once a pair, so the parity of the pair says what to wait for. A row's sums go over its tiles in
order; sums depend on nothing but its own keys. Where rows are few, several programs share the keys of one and leave
their sums to be merged.

Shapes: R rows, h heads, L = 512 latent rank, E = 64 rotated columns, T keys.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from llm_engine.ops_triton.hopper_fp8_keys import produce_fp8
from llm_engine.ops_triton.hopper_keys import produce
from llm_engine.ops_triton.hopper_lang import (
    BARRIER,
    CHUNKS,
    HALF,
    HEAD_TILE,
    KEYS,
    PLAIN,
    TILE,
    E,
    L,
    gluon_kernel,
)
from llm_engine.ops_triton.hopper_sums import consume
from llm_engine.ops_triton.lang import Ptr, tile_size

# Of a thread that multiplies; those that fetch have what these leave, and spill where that is too little.
_REGISTERS: Final = 232
_FP8_REGISTERS: Final = 208
_WARPS: Final = 4  # that fetch
_FP8_WARPS: Final = 8


@gluon_kernel
def _attend_pairs(
    latent_query: Ptr, query: Ptr, cos: Ptr, sin: Ptr, plane: Ptr, sel: Ptr, seqs: Ptr, visible: Ptr, tables: Ptr,
    out: Ptr, parts: Ptr, num_rows: int, num_blocks: int, row_stride: int, head_stride: int, scale: float,
    HEADS: gl.constexpr, D: gl.constexpr, K: gl.constexpr, K_TILE: gl.constexpr, P: gl.constexpr, FP8: gl.constexpr,
    PARTIAL: gl.constexpr, REGISTERS: gl.constexpr,
) -> None:  # fmt: skip
    """Arguments and constants are those of `attend._attend`, whose `sums` are called `parts`."""
    head_tiles: gl.constexpr = HEADS // HEAD_TILE
    row, head = (gl.program_id(0) // head_tiles).to(gl.int64), (gl.program_id(0) % head_tiles) * HEAD_TILE
    latents = gl.allocate_shared_memory(gl.bfloat16, [4, KEYS, HALF], TILE)
    rest = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, E], TILE)
    query_left = gl.allocate_shared_memory(gl.bfloat16, [1, HEAD_TILE, HALF], TILE)
    query_right = gl.allocate_shared_memory(gl.bfloat16, [1, HEAD_TILE, HALF], TILE)
    query_rest = gl.allocate_shared_memory(gl.bfloat16, [1, HEAD_TILE, E], TILE)
    tops = gl.allocate_shared_memory(gl.float32, [4, HEAD_TILE], PLAIN)  # maxima of both sides, then totals
    full = gl.allocate_shared_memory(gl.int64, [4 * CHUNKS, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    met = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(4 * CHUNKS):
        if FP8:  # one arrival behind a chunk's stores, and one of every thread's behind copies of rotated keys
            mbarrier.init(full.index(i), count=1 + (32 * gl.num_warps() if i % 4 == 3 else 0))
        else:
            mbarrier.init(full.index(i), count=32 * gl.num_warps())
    for i in gl.static_range(4):
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    mbarrier.init(met, count=2)
    count = gl.load(visible + row)
    if K > 0:
        sel += row * K
        every = gl.arange(0, K_TILE, layout=gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
        count = gl.sum((gl.load(sel + every, mask=every < K, other=-1) >= 0).to(gl.int32), 0)
    first, at = count * 0, row * HEADS + head
    if PARTIAL:
        split = gl.program_id(1)
        share = gl.cdiv(gl.cdiv(count, gl.num_programs(1)), KEYS) * KEYS
        first, at = split * share, at + split.to(gl.int64) * num_rows * HEADS
    end = gl.minimum(first + share, count) if PARTIAL else count
    count = gl.maximum(end - first, 0)
    pairs = gl.maximum((count + 2 * KEYS - 1) // (2 * KEYS), 1)
    seq = gl.load(seqs + row).to(gl.int64)
    start, table = seq * 0, tables
    if P == 0:
        start = gl.load(tables + seq).to(gl.int64)
    else:
        table = tables + seq * num_blocks
    latent_at = (row * HEADS + head) * L
    rest_query = query + row * row_stride + head * head_stride + D
    queries, keys, bars = (query_left, query_right, query_rest), (latents, rest), (full, free, ready, met)
    rows = (
        latent_query + latent_at,
        rest_query,
        head_stride,
        cos + row * (E // 2),
        sin + row * (E // 2),
        out + at * L,
        parts + at * 2 if PARTIAL else out,
    )
    COLUMNS: gl.constexpr = HALF // 2 if FP8 else HALF  # of one product: sixteen warps have fewer registers at first
    limits, sizes = (first, end), (count, pairs, scale)
    gl.warp_specialize(
        [
            (
                produce_fp8 if FP8 else produce,
                (plane, sel, table, start, limits, pairs, keys, bars, K, P, gl.constexpr(head_tiles)),
            ),
            (consume, (rows, sizes, queries, keys, tops, bars, PARTIAL, COLUMNS, gl.constexpr(0))),
            (consume, (rows, sizes, queries, keys, tops, bars, PARTIAL, COLUMNS, gl.constexpr(1))),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


def serves(latent_query: Tensor, keys: Tensor, rest: int) -> bool:
    """Whether the kernel is laid out for such queries [R, h, L] and keys, on a card of Hopper's kind."""
    _, heads, rank = latent_query.shape
    if latent_query.dtype != torch.bfloat16 or keys.dtype not in (torch.bfloat16, torch.uint8):
        return False
    return (heads % HEAD_TILE.value, rank, rest) == (0, L.value, E.value)


def attend_pairs(
    latent_query: Tensor, query: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, sel: Tensor | None, seqs: Tensor,
    visible: Tensor, tables: Tensor, out: Tensor, parts: Tensor | None, num_blocks: int, scale: float, page: int,
) -> None:  # fmt: skip
    """Attention of rows. `keys` are pages, or side by side where `page` is 0; `tables` then says where each sequence
    begins. `scale`: of the exponents of two.

    Without `parts` goes to `out`, bf16 [R, h, L]. Otherwise `out` is fp32 [Z, R, h, L], the sums of rows that share
    their keys evenly among Z programs, and `parts` [Z, R, h, 2], maxima and totals.
    """
    rows, heads, _ = latent_query.shape
    chosen, fp8 = 0 if sel is None else sel.shape[1], keys.dtype == torch.uint8
    _attend_pairs[(rows * heads // HEAD_TILE.value, 1 if parts is None else len(parts))](
        latent_query, query, cos, sin, keys, sel, seqs, visible, tables, out, parts, rows, num_blocks,
        *query.stride()[:2], scale, heads, query.shape[2] - E.value, chosen, tile_size(chosen, 128), page, fp8,
        parts is not None, _FP8_REGISTERS if fp8 else _REGISTERS, num_warps=_FP8_WARPS if fp8 else _WARPS,
    )  # fmt: skip
