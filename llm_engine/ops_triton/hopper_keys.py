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
def position(sel: Ptr, place: Val, end: Val, K: gl.constexpr) -> Val:
    """Positions of some of a row's keys; beyond the end that of the last key again."""
    at = gl.maximum(gl.minimum(place, end - 1), 0)
    if K > 0:
        at = gl.maximum(gl.load(sel + at), 0)
    return at


@gluon_inline
def _slots(sel: Ptr, table: Ptr, start: Val, tile: Val, limits: Group, K: gl.constexpr, P: gl.constexpr) -> Val:
    """Cache rows of a tile's keys."""
    at = position(sel, limits[0] + tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, LINES)), limits[1], K)
    if P == 0:
        return start + at.to(gl.int64)
    return gl.load(table + at // P).to(gl.int64) * P + at % P


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
    plane: Ptr, sel: Ptr, table: Ptr, start: Val, limits: Group, pairs: Val, keys: Group, bars: Group,
    K: gl.constexpr, P: gl.constexpr, _PROGRAMS: gl.constexpr,
) -> None:  # fmt: skip
    """Fetch all tiles of keys `limits[0]` to `limits[1]`, in the order in which halves become free."""
    latents, rest = keys
    full, free, _, _ = bars
    slot = _slots(sel, table, start, 0, limits, K, P)
    for pair in range(pairs):
        for side in gl.static_range(2):
            rows = plane + slot * (L + E)
            slot = _slots(sel, table, start, 2 * pair + side + 1, limits, K, P)
            for far in gl.static_range(2):
                mbarrier.wait(free.index(2 * side + far), (pair & 1) ^ 1)
                half = latents.index(2 * side + (side ^ far))
                _fetch_half(half, rest.index(side), rows, full, (side ^ far) * HALF, 2 * side + far, far)
