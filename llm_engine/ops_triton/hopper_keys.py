"""How attention on Hopper fetches its keys: by copies that pass the registers by.

One group of four warps runs this. See `attend_hopper` for halves, chunks and barriers.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from llm_engine.ops_triton.hopper_lang import (
    CHUNKS,
    HALF,
    KEYS,
    LINES,
    E,
    Group,
    L,
    Tile,
    copy_async,
    gluon_inline,
)
from llm_engine.ops_triton.lang import Ptr, Val


@gluon_inline
def _slots(sel: Ptr, table: Ptr, start: Val, tile: Val, count: Val, K: gl.constexpr, P: gl.constexpr) -> Val:
    """Cache rows of a tile's keys; beyond the end that of the last key again."""
    place = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, LINES))
    position = gl.maximum(gl.minimum(place, count - 1), 0)
    if K > 0:
        position = gl.maximum(gl.load(sel + position), 0)
    if P == 0:
        return start + position.to(gl.int64)
    return gl.load(table + position // P).to(gl.int64) * P + position % P


@gluon_inline
def _fetch(target: Tile, rows: Val, first: gl.constexpr, width: gl.constexpr) -> None:
    column = first + gl.arange(0, width, layout=gl.SliceLayout(0, LINES))
    copy_async(target, gl.expand_dims(rows, 1) + gl.expand_dims(column, 0))


@gluon_inline
def _fetch_half(
    half: Tile, rest: Tile, rows: Val, full: Tile, FIRST: gl.constexpr, AT: gl.constexpr, FAR: gl.constexpr
) -> None:
    """The AT-th half of a pair, columns from FIRST on; with a far one the rest."""
    width: gl.constexpr = HALF // CHUNKS
    for chunk in gl.static_range(CHUNKS):
        _fetch(half.slice(chunk * width, width, dim=1), rows, FIRST + chunk * width, width)
        if FAR == 1 and chunk == CHUNKS - 1:
            _fetch(rest, rows, L, E)
        async_copy.mbarrier_arrive(full.index(AT * CHUNKS + chunk), increment_count=False)


@gluon_inline
def produce(
    plane: Ptr, sel: Ptr, table: Ptr, start: Val, count: Val, pairs: Val, keys: Group, bars: Group,
    K: gl.constexpr, P: gl.constexpr,
) -> None:  # fmt: skip
    """Fetch all tiles, in the order in which halves become free."""
    left, right, rest = keys
    full, free, _, _ = bars
    slot = _slots(sel, table, start, 0, count, K, P)
    for pair in range(pairs):
        for side in gl.static_range(2):
            rows = plane + slot * (L + E)
            slot = _slots(sel, table, start, 2 * pair + side + 1, count, K, P)
            for far in gl.static_range(2):
                mbarrier.wait(free.index(2 * side + far), (pair & 1) ^ 1)
                if side == far:
                    _fetch_half(left.index(side), rest.index(side), rows, full, 0, 2 * side + far, far)
                else:
                    _fetch_half(right.index(side), rest.index(side), rows, full, HALF, 2 * side + far, far)
