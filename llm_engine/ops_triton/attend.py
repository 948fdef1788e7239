"""Kernels of latent attention: one row, some heads and one split of its keys a program; the merge; unpacked keys.

Shapes: R rows, h heads, J rope pairs, L latent rank, E = 2J, C = L + E, T keys of all sequences.
"""

from __future__ import annotations

import triton.language as tl

from llm_engine.ops_triton.lang import Ptr, Val, await_inputs, dot, e4m3_ptr, inline, kernel, load_angles, row_slots


@inline
def _turned(
    source: Ptr, mask: Val, c: Val, s: Val, HEAD_TILE: tl.constexpr, E: tl.constexpr, E_TILE: tl.constexpr
) -> Val:
    """Some heads' rotated part [HEAD_TILE, E_TILE] of a query."""
    column = tl.arange(0, E_TILE)[None, :]
    plain = tl.load(source + column, mask=mask & (column < E), other=0.0)
    a, b = tl.split(tl.reshape(plain.to(tl.float32), (HEAD_TILE, E_TILE // 2, 2)))
    c, s = c[None, :], s[None, :]
    return tl.reshape(tl.join(a * c - b * s, b * c + a * s), (HEAD_TILE, E_TILE)).to(plain.dtype)


@inline
def _load_rows(
    plane: Ptr,
    slot: Val,
    L: tl.constexpr,
    L_TILE: tl.constexpr,
    E: tl.constexpr,
    E_TILE: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[Val, Val]:
    """Latents [KEYS, L] and rotated keys [KEYS, E] of cache rows."""
    column, rest = tl.arange(0, L_TILE), tl.arange(0, E_TILE)
    if FP8:
        # With three bits of mantissa and a scale that is a power of two, values are exact in bf16.
        groups: tl.constexpr = L // GROUP
        at = plane + slot * (L + 4 * groups + 2 * E)
        group = tl.arange(0, groups)
        value_at = e4m3_ptr(at)[:, None, None] + group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
        scale_at = (at + L).to(tl.pointer_type(tl.float32))[:, None] + group[None, :]
        value = tl.load(value_at).to(tl.float32).to(tl.bfloat16)  # faster than at once
        latent = tl.reshape(value * tl.load(scale_at).to(tl.bfloat16)[:, :, None], (KEYS, L))
        rope_at = (at + L + 4 * groups).to(tl.pointer_type(tl.bfloat16))[:, None] + rest[None, :]
    else:
        at = plane + slot[:, None] * (L + E)
        latent = tl.load(at + column[None, :], mask=column[None, :] < L, other=0.0)
        rope_at = at + L + rest[None, :]
    return latent, tl.load(rope_at, mask=rest[None, :] < E, other=0.0)


@kernel
def _attend(
    latent_query: Ptr,
    query: Ptr,
    cos: Ptr,
    sin: Ptr,
    plane: Ptr,
    sel: Ptr,
    seqs: Ptr,
    visible: Ptr,
    tables: Ptr,
    out: Ptr,
    sums: Ptr,
    num_rows: int,
    num_blocks: int,
    row_stride: int,
    head_stride: int,
    scale: float,
    HEADS: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    L_TILE: tl.constexpr,
    E: tl.constexpr,
    E_TILE: tl.constexpr,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    P: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTIAL: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """K = 0: no selection. P = 0: `tables` says where a sequence's keys start, which lie side by side.

    SPLIT = 0: the programs of a row share its keys evenly. PARTIAL: sums and maxima are left to `_merge`.
    """
    await_inputs(OVERLAP)
    head_tiles: tl.constexpr = (HEADS + HEAD_TILE - 1) // HEAD_TILE
    row, split = (tl.program_id(0) // head_tiles).to(tl.int64), tl.program_id(1)
    head = (tl.program_id(0) % head_tiles) * HEAD_TILE + tl.arange(0, HEAD_TILE)
    count = tl.load(visible + row)
    if K > 0:
        every = tl.arange(0, K_TILE)
        chosen = tl.load(sel + row * K + every, mask=every < K, other=-1)
        count = tl.sum((chosen >= 0).to(tl.int32), 0)
    share = SPLIT if SPLIT > 0 else tl.cdiv(tl.cdiv(count, tl.num_programs(1)), KEYS) * KEYS
    first = split * share
    end = tl.minimum(first + share, count)
    column = tl.arange(0, L_TILE)
    head_mask = head[:, None] < HEADS
    latent_at = latent_query + (row * HEADS + head[:, None]) * L + column[None, :]
    q_latent = tl.load(latent_at, mask=head_mask & (column[None, :] < L), other=0.0)
    c, s = load_angles(cos, sin, row, E // 2, E_TILE // 2)
    rest_at = query + row * row_stride + head[:, None] * head_stride + D
    q_rest = _turned(rest_at, head_mask, c, s, HEAD_TILE, E, E_TILE)
    seq = tl.load(seqs + row).to(tl.int64)
    start_slot = tl.load(tables + seq).to(tl.int64) if P == 0 else 0
    table = tables + seq * num_blocks
    top = tl.full((HEAD_TILE,), -1e30, tl.float32)  # below any score, and its difference to itself is zero
    total = tl.zeros((HEAD_TILE,), tl.float32)
    # What follows suits Triton's way with Hopper's products. The sum is kept as bits, so that it is awaited where it is
    # made: left in flight into the next step, it makes the assembler issue all products one by one. The larger product
    # for the scores stands in a branch, always taken, which hides that another one follows: seeing that, the compiler
    # lets all warps compute the same rows.
    bits = tl.zeros((HEAD_TILE, L_TILE), tl.int32)
    for start in range(first, end, KEYS):
        place = start + tl.arange(0, KEYS)
        position = tl.minimum(place, end - 1)  # beyond the end the last key again, unseen
        if K > 0:
            position = tl.load(sel + row * K + position)
        if P == 0:
            slot = start_slot + position.to(tl.int64)
        else:
            slot = tl.load(table + position // P).to(tl.int64) * P + position % P
        latent, rope = _load_rows(plane, slot, L, L_TILE, E, E_TILE, FP8, GROUP, KEYS)
        score = tl.zeros((HEAD_TILE, KEYS), tl.float32)
        if end > first:
            score = dot(q_latent, tl.trans(latent), score)
        score = dot(q_rest, tl.trans(rope), score)
        score = tl.where((place < end)[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale)
        weight = tl.exp2(score * scale - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, 1)
        value = dot(weight.to(latent.dtype), latent, bits.to(tl.float32, bitcast=True) * fade[:, None])
        bits = value.to(tl.int32, bitcast=True)
        top = new_top
    value = bits.to(tl.float32, bitcast=True)
    mask = head_mask & (column[None, :] < L)
    if PARTIAL:
        at = (split.to(tl.int64) * num_rows + row) * HEADS + head
        tl.store(out + at[:, None] * L + column[None, :], value, mask=mask)
        tl.store(sums + at * 2, top, mask=head < HEADS)
        tl.store(sums + at * 2 + 1, total, mask=head < HEADS)
    else:
        divisor = tl.where(total == 0.0, 1.0, total)
        at = out + (row * HEADS + head[:, None]) * L + column[None, :]
        tl.store(at, (value / divisor[:, None]).to(out.dtype.element_ty), mask=mask)


@kernel
def _merge(
    partial: Ptr,
    sums: Ptr,
    out: Ptr,
    num_splits: int,
    num_rows: int,
    HEADS: tl.constexpr,
    L: tl.constexpr,
    L_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """One head of one row. SPLITS partial sums are in flight at a time; they are added in order."""
    await_inputs(OVERLAP)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, L_TILE)
    highest = tl.full((), -1e30, tl.float32)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        at = (split.to(tl.int64) * num_rows + row) * HEADS + head
        highest = tl.maximum(highest, tl.max(tl.load(sums + at * 2, mask=split < num_splits, other=-1e30), 0))
    total = tl.full((), 0.0, tl.float32)
    value = tl.zeros((L_TILE,), tl.float32)
    for first in range(0, num_splits, SPLITS):
        for member in tl.static_range(SPLITS):
            split = first + member
            at = (split.to(tl.int64) * num_rows + row) * HEADS + head
            there = split < num_splits
            weight = tl.where(there, tl.exp2(tl.load(sums + at * 2, mask=there, other=0.0) - highest), 0.0)
            total += tl.load(sums + at * 2 + 1, mask=there, other=0.0) * weight
            mask = (column < L) & (column * 0 + split < num_splits)
            value += tl.load(partial + at * L + column, mask=mask, other=0.0) * weight
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(out + (row * HEADS + head) * L + column, (value / divisor).to(out.dtype.element_ty), mask=column < L)


@kernel
def _unpack(
    plane: Ptr,
    tables: Ptr,
    starts: Ptr,
    lengths: Ptr,
    out: Ptr,
    num_blocks: int,
    num_stride: int,
    L: tl.constexpr,
    E: tl.constexpr,
    E_TILE: tl.constexpr,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """KEYS positions of one sequence, from fp8 pages to bf16 rows side by side."""
    seq = tl.program_id(1)
    length = tl.load(lengths + seq * num_stride)
    position = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    seen = position < length
    nearest = tl.maximum(tl.minimum(position, length - 1), 0)
    slot = row_slots(tables + seq.to(tl.int64) * num_blocks, nearest, nearest < length, P)
    latent, rope = _load_rows(plane, slot, L, L, E, E_TILE, True, GROUP, KEYS)
    at = out + (tl.load(starts + seq).to(tl.int64) + position)[:, None] * (L + E)
    column, rest = tl.arange(0, L)[None, :], tl.arange(0, E_TILE)[None, :]
    tl.store(at + column, latent, mask=seen[:, None])
    tl.store(at + L + rest, rope, mask=seen[:, None] & (rest < E))
