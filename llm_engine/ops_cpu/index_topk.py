"""The lightning indexer's choice: score all visible positions of a row, keep the k best.

Shapes: R rows, N real rows, h index heads, D index key width, T positions, K chosen.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_engine.ops_cpu.jit import (
    CACHE,
    F2,
    F2S,
    F3,
    I1,
    N2,
    ZERO,
    Cache,
    Floats,
    Ints,
    Longs,
    cache_array,
    inline,
    kernel,
    over_rows,
    rotate_half,
    rotate_interleaved,
    row_at,
    slot_of,
)
from llm_engine.ops_cpu.plan import CpuPlan

Bits = npt.NDArray[np.uint32]
_SIGN: Final = np.uint32(0x80000000)
_INFINITY: Final = np.uint32(0x7F800000)


def index_topk(
    query_RhD: Tensor, g_Rh: Tensor, plane_BPD: Tensor, plan: CpuPlan, k: int, *, interleaved: bool = False
) -> Tensor | None:
    """See `llm_engine.ops.spec.IndexTopk`."""
    if plan.max_visible <= k:
        return None
    sel_NK = torch.empty(plan.num_rows, k, dtype=torch.int32)
    cost = query_RhD.shape[1] * query_RhD.shape[2] * plan.max_visible
    over_rows(
        _index_topk,
        plan.num_rows,
        cost,
        query_RhD.float().contiguous().numpy(),
        g_Rh.float().numpy(),
        cache_array(plane_BPD),
        plan.tables_SB,
        plan.seqs_N,
        plan.visible_N,
        plan.block_tokens,
        plan.cos_RJ,
        plan.sin_RJ,
        interleaved,
        sel_NK.numpy(),
    )
    return sel_NK


@inline
def _weighted_relu(query: Floats, g: Floats, key0: Floats, key1: Floats) -> tuple[np.float32, np.float32]:
    """Σ_h g[h] · relu(query[h] · key) of two keys, four heads at a time."""
    heads, width = query.shape
    score0, score1 = ZERO, ZERO
    quads = heads - heads % 4
    for h in range(0, quads, 4):
        q0, q1, q2, q3 = query[h], query[h + 1], query[h + 2], query[h + 3]
        a0, a1, a2, a3 = ZERO, ZERO, ZERO, ZERO
        b0, b1, b2, b3 = ZERO, ZERO, ZERO, ZERO
        for c in range(width):
            a, b = key0[c], key1[c]
            a0 += q0[c] * a
            a1 += q1[c] * a
            a2 += q2[c] * a
            a3 += q3[c] * a
            b0 += q0[c] * b
            b1 += q1[c] * b
            b2 += q2[c] * b
            b3 += q3[c] * b
        score0 += (g[h] * max(a0, ZERO) + g[h + 1] * max(a1, ZERO)) + (
            g[h + 2] * max(a2, ZERO) + g[h + 3] * max(a3, ZERO)
        )
        score1 += (g[h] * max(b0, ZERO) + g[h + 1] * max(b1, ZERO)) + (
            g[h + 2] * max(b2, ZERO) + g[h + 3] * max(b3, ZERO)
        )
    for h in range(quads, heads):
        a0, b0 = ZERO, ZERO
        for c in range(width):
            a0 += query[h, c] * key0[c]
            b0 += query[h, c] * key1[c]
        score0 += g[h] * max(a0, ZERO)
        score1 += g[h] * max(b0, ZERO)
    return score0, score1


@inline
def as_order(scores: Floats) -> Bits:
    """The scores, in place, as integers that compare like them; equal for both zeros, lowest for NaN."""
    order = scores.view(np.uint32)
    for t in range(order.shape[0]):
        bits = order[t]
        if bits & ~_SIGN > _INFINITY:
            order[t] = np.uint32(0)
        elif bits > _SIGN:
            order[t] = ~bits
        else:
            order[t] = bits | _SIGN
    return order


@inline
def _largest(order: Bits, sel: Ints) -> None:
    """Positions of the largest entries, ascending; the lowest position wins a tie.

    The smallest chosen entry is found byte by byte, from the highest, by counting.
    """
    counts = np.empty(256, np.int64)
    lowest, known, spare = np.uint32(0), np.uint32(0), sel.shape[0]
    for byte in range(4):
        shift = np.uint32(24 - 8 * byte)
        for digit in range(256):
            counts[digit] = 0
        for t in range(order.shape[0]):
            if order[t] & known == lowest:
                counts[(order[t] >> shift) & np.uint32(255)] += 1
        digit = 255
        while counts[digit] < spare:
            spare -= counts[digit]
            digit -= 1
        lowest |= np.uint32(digit) << shift
        known |= np.uint32(255) << shift
    found = 0
    for t in range(order.shape[0]):
        if order[t] > lowest or (order[t] == lowest and spare > 0):
            spare -= order[t] == lowest
            sel[found] = t
            found += 1


@kernel(f"void(int64, int64, {F3}, {F2S}, {CACHE}, {N2}, {I1}, {I1}, int64, {F2}, {F2}, boolean, {N2})")
def _index_topk(
    first: int,
    end: int,
    query: Floats,
    g: Floats,
    cache: Cache,
    tables: Ints,
    seqs: Longs,
    visible: Longs,
    block_tokens: int,
    cos: Floats,
    sin: Floats,
    interleaved: bool,
    sel: Ints,
) -> None:
    heads, width, k = query.shape[1], query.shape[2], sel.shape[1]
    turned = np.empty((heads, width), np.float32)
    gates = np.empty(heads, np.float32)
    scratch = np.empty((2, width), np.float32)
    for r in range(first, end):
        count = visible[r]
        if count <= k:
            for t in range(k):
                sel[r, t] = t if t < count else -1
            continue
        for h in range(heads):
            gates[h] = g[r, h]
            for c in range(width):
                turned[h, c] = query[r, h, c]
            if interleaved:
                rotate_interleaved(turned[h], 0, cos[r], sin[r])
            else:
                rotate_half(turned[h], cos[r], sin[r])
        scores = np.empty(count, np.float32)
        table = tables[seqs[r]]
        for t in range(0, count, 2):
            key0 = row_at(cache, slot_of(table, t, block_tokens), scratch[0])
            key1 = row_at(cache, slot_of(table, min(t + 1, count - 1), block_tokens), scratch[1])
            score0, score1 = _weighted_relu(turned, gates, key0, key1)
            scores[t] = score0
            if t + 1 < count:
                scores[t + 1] = score1
        _largest(as_order(scores), sel[r])
