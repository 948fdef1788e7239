"""How attention on Hopper fetches fp8 keys: through registers, which unpack them into tiles of bf16.

Two groups of four warps run this as one: a tile's buffer stays empty for as long as it takes to unpack into it.

Cache rows are looked up some tiles ahead, by one thread each, and L2 is asked for them then; so the loads, which are
one chunk ahead of what is unpacked, find them there. That keeps few registers in use: a spilled one costs this group
more than anything it could be kept for. Tiles, halves and barriers are those of `attend_hopper`, a chunk of columns is
what shares a scale.
"""

from __future__ import annotations

from typing import Final

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from llm_engine.ops_triton.hopper_keys import position
from llm_engine.ops_triton.hopper_lang import (
    CHUNKS,
    KEYS,
    PLAIN,
    E,
    Group,
    L,
    Tile,
    copy_async,
    gluon_inline,
    sync,
    view,
)
from llm_engine.ops_triton.lang import Ptr, Val

GROUP: Final = gl.constexpr(128)  # columns that share a scale: those of a chunk
STORED: Final = gl.constexpr(656)  # bytes of a cache row: latents, their scales, rotated keys
ROTATED: Final = gl.constexpr(528)  # where the rotated keys begin
AHEAD: Final = gl.constexpr(2)  # tiles that L2 is asked for; none costs a tenth, four or six a little
RING: Final = gl.constexpr(4)  # tiles whose cache rows are kept

# Neighbouring threads take 16 columns of two rows, which makes them write to all banks.
_WORDS: Final = gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [32, 0]], [[0, 4], [0, 8], [1, 0], [0, 16], [2, 0]], [[4, 0], [8, 0], [16, 0]], [], [64, 32]
)
WORDS: Final = gl.constexpr(_WORDS)
ROWS_OF_WORDS: Final = gl.constexpr(gl.SliceLayout(1, _WORDS))
WORDS_OF_ROWS: Final = gl.constexpr(gl.SliceLayout(0, _WORDS))
LINES: Final = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
# Eight lanes of a warp have a row each, and the others the same ones.
_LANES: Final = [[1], [2], [4], [0], [0]]
_WARPS: Final = [[8], [16], [32]]
ROWS: Final = gl.constexpr(gl.DistributedLinearLayout([], _LANES, _WARPS, [], [64]))
FIRST_ROWS: Final = gl.constexpr(gl.DistributedLinearLayout([[64]], _LANES, _WARPS, [], [128]))
PAIRS: Final = gl.constexpr(gl.NVMMASharedLayout(128, 32, rank=2))  # of bf16

# Two of the same, of a scale.
FACTOR: Final = gl.constexpr("cvt.rn.bf16x2.f32 $0, $1, $1;")
# Four e4m3 values: their bits where bf16 has them, times 2^120 for the difference of the exponents' biases, and scaled.
UNPACK: Final = gl.constexpr("""{
.reg .b32 a, b, bias;
mov.b32 bias, 0x7B807B80;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.u32 $0, a, 4;
shr.u32 $1, b, 4;
and.b32 $0, $0, 0x07f007f0;
and.b32 $1, $1, 0x07f007f0;
lop3.b32 $0, a, 0x80008000, $0, 0xEA;
lop3.b32 $1, b, 0x80008000, $1, 0xEA;
mul.bf16x2 $0, $0, bias;
mul.bf16x2 $1, $1, bias;
mul.bf16x2 $0, $0, $3;
mul.bf16x2 $1, $1, $3;
}""")
ASK: Final = gl.constexpr("""{
.reg .pred asks;
.reg .b32 lane;
mov.u32 lane, %laneid;
setp.ne.u32 asks, $3, 0;
setp.lt.and.u32 asks, lane, 8, asks;
@asks cp.async.bulk.prefetch.L2.global [$1], 656;
mov.u32 $0, $2;
}""")


@gluon_inline
def _places(tile: Val, limits: Group) -> Val:
    """Where a tile's keys stand among the row's, one a thread."""
    return limits[0] + tile * KEYS + gl.arange(0, KEYS, layout=ROWS)


@gluon_inline
def _slot(table: Ptr, at: Val, P: gl.constexpr) -> Val:
    return gl.load(table + at // P) * P + at % P


@gluon_inline
def _ask(plane: Ptr, slot: Val, place: Val, limits: Group, PROGRAMS: gl.constexpr) -> None:
    """Have L2 fetch keys, which the programs of a row share among themselves."""
    asks = (place < limits[1]) & (place % PROGRAMS == gl.program_id(0) % PROGRAMS)
    at = plane + slot.to(gl.int64) * STORED
    gl.inline_asm_elementwise(ASK, "=r,l,r,r", [at, slot, asks.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)


@gluon_inline
def _rows(plane: Ptr, slots: Tile, tile: Val, LAYOUT: gl.constexpr) -> Val:
    return plane + slots.index(tile % RING).load(LAYOUT).to(gl.int64) * STORED


@gluon_inline
def _load(plane: Ptr, slots: Tile, tile: Val, group: Val) -> tuple[Val, Val]:
    """A chunk of a tile as words of four values, and its scales."""
    rows = _rows(plane, slots, tile, ROWS_OF_WORDS)
    scale = gl.load((rows + L + 4 * group).to(gl.pointer_type(gl.float32)))
    words = (rows + group * GROUP).to(gl.pointer_type(gl.int32))
    return gl.load(gl.expand_dims(words, 1) + gl.expand_dims(gl.arange(0, GROUP // 4, WORDS_OF_ROWS), 0)), scale


@gluon_inline
def _unpack_to(target: Tile, words: Val, scale: Val) -> None:
    factor = gl.inline_asm_elementwise(FACTOR, "=r,f", [scale], dtype=gl.int32, is_pure=True, pack=1)
    factor = gl.expand_dims(factor, 1).broadcast_to(KEYS, GROUP // 4)
    low, high = gl.inline_asm_elementwise(
        UNPACK, "=&r,=&r,r,r", [words, factor], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    target.store(gl.reshape(gl.join(low, high), (KEYS, GROUP // 2)))


@gluon_inline
def _put_chunk(
    plane: Ptr, slots: Tile, chunks: Tile, rest: Tile, bars: Group, tile: Val, words: Val, scale: Val, AT: gl.constexpr
) -> tuple[Val, Val]:
    """The AT-th chunk of a tile, of the near half first; the one behind it is on its way meanwhile."""
    full, free, _, _ = bars
    far: gl.constexpr = AT // 2
    side, phase = tile & 1, tile >> 1 & 1
    if AT < 3:
        next_words, next_scale = _load(plane, slots, tile, 2 * (side ^ ((AT + 1) // 2)) + (AT + 1) % 2)
    else:
        next_words, next_scale = _load(plane, slots, tile + 1, 2 * (side ^ 1))
    if AT % 2 == 0:
        mbarrier.wait(free.index(2 * side + far), phase ^ 1)
    if AT == 2:
        rotated = (_rows(plane, slots, tile, gl.SliceLayout(1, LINES)) + ROTATED).to(gl.pointer_type(gl.bfloat16))
        column = gl.arange(0, E, gl.SliceLayout(0, LINES))
        copy_async(rest.index(side), gl.expand_dims(rotated, 1) + gl.expand_dims(column, 0))
    _unpack_to(chunks.index(4 * side + 2 * (side ^ far) + AT % 2), words, scale)
    sync()
    arrived = full.index((2 * side + far) * CHUNKS + AT % 2)
    if AT == 3:
        async_copy.mbarrier_arrive(arrived, increment_count=False)
    mbarrier.arrive(arrived, count=1)
    return next_words, next_scale


@gluon_inline
def produce_fp8(
    plane: Ptr, sel: Ptr, table: Ptr, _start: Val, limits: Group, pairs: Val, keys: Group, bars: Group,
    K: gl.constexpr, P: gl.constexpr, PROGRAMS: gl.constexpr,
) -> None:  # fmt: skip
    """Unpack all tiles of keys `limits[0]` to `limits[1]`, in the order in which halves become free."""
    latents, rest = keys
    chunks = view(latents, gl.int32, [8, KEYS, GROUP // 2], PAIRS)
    slots = gl.allocate_shared_memory(gl.int32, [RING, KEYS], PLAIN)
    first = limits[0] + gl.arange(0, AHEAD * KEYS, layout=FIRST_ROWS)
    found = _slot(table, position(sel, first, limits[1], K), P)
    slot = _slot(table, position(sel, _places(AHEAD, limits), limits[1], K), P)
    next_at = position(sel, _places(AHEAD + 1, limits), limits[1], K)
    view(slots, gl.int32, [RING // AHEAD, AHEAD * KEYS], PLAIN).index(0).store(found)
    words, scale = _load(plane, slots, 0, 0)
    _ask(plane, found, first, limits, PROGRAMS)
    for tile in range(2 * pairs):
        slots.index((tile + AHEAD) % RING).store(slot)
        _ask(plane, slot, _places(tile + AHEAD, limits), limits, PROGRAMS)
        slot = _slot(table, next_at, P)
        next_at = position(sel, _places(tile + AHEAD + 2, limits), limits[1], K)
        for chunk in gl.static_range(4):
            words, scale = _put_chunk(plane, slots, chunks, rest, bars, tile, words, scale, chunk)
