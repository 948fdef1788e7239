"""Latent attention in absorbed form: queries meet the cached latents directly, values are expanded afterwards.

A row walks over its keys in ascending position, whether they are a selection or everything it may see, so a selection
of everything gives the same bits as none. Nothing but the row's own keys is ever read.

Shapes: R rows, N real rows, h heads, D query width, J rope pairs, L latent rank, C = L + 2J cache width,
V value width, K selected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_engine.ops.spec import Selection, made
from llm_engine.ops_cpu.gemm import Gemm, PackedProduct
from llm_engine.ops_cpu.jit import (
    CACHE,
    F2,
    F3,
    I1,
    N2,
    ONE,
    ZERO,
    Cache,
    Floats,
    Ints,
    Longs,
    cache_array,
    exp,
    inline,
    kernel,
    over_rows,
    rotate_interleaved,
    row_at,
    slot_of,
)
from llm_engine.ops_cpu.plan import CpuPlan


@dataclass(frozen=True, slots=True)
class PackedKvB:
    """Both halves of kv_b_proj."""

    absorb: PackedProduct  # [R, h, D] → [h, R, L]
    expand: PackedProduct  # [R, h, L] → [h, R, V]

    @classmethod
    def pack(cls, gemm: Gemm, key_hDL: Tensor, value_hVL: Tensor) -> PackedKvB:
        return cls(gemm.heads(key_hDL), gemm.heads(value_hVL.transpose(1, 2)))


def mla_attend(
    query_RhD: Tensor, plane_BPC: Tensor, plan: CpuPlan, selection: Selection, kv_b: PackedKvB, scale: float
) -> Tensor:
    """See `llm_engine.ops.spec.MlaAttend`."""
    sel_NK = made(selection)
    query = query_RhD.float()
    absorbed_hRL = kv_b.absorb(query[..., : -2 * plan.cos_RJ.shape[1]]).contiguous()
    heads, _, rank = absorbed_hRL.shape
    latent_hRL = torch.empty(absorbed_hRL.shape)
    keys = plan.max_visible if sel_NK is None else sel_NK.shape[1]
    over_rows(
        _attend,
        plan.num_rows,
        2 * heads * rank * keys,
        query.contiguous().numpy(),
        absorbed_hRL.numpy(),
        cache_array(plane_BPC),
        plan.tables_SB,
        plan.seqs_N,
        plan.visible_N,
        plan.block_tokens,
        _NO_SELECTION if sel_NK is None else sel_NK.numpy(),
        plan.cos_RJ,
        plan.sin_RJ,
        scale,
        latent_hRL.numpy(),
    )
    latent_hRL[:, plan.num_rows :] = latent_hRL[:, plan.num_rows - 1 : plan.num_rows]  # padding repeats the last row
    heads_hRV = kv_b.expand(latent_hRL.transpose(0, 1))
    return heads_hRV.transpose(0, 1).contiguous().to(query_RhD.dtype)


_NO_SELECTION = np.empty((0, 0), np.int32)


@inline
def _keys(table: Ints, visible: int, block_tokens: int, sel: Ints, row: int, slots: Longs) -> int:
    """Cache slots of a row's keys in ascending position, and how many they are."""
    if sel.shape[0] == 0:
        for t in range(visible):
            slots[t] = slot_of(table, t, block_tokens)
        return visible
    count = 0
    for k in range(sel.shape[1]):
        t = sel[row, k]
        if t < 0:
            break
        slots[count] = slot_of(table, t, block_tokens)
        count += 1
    return count


@inline
def _score(query: Floats, key0: Floats, key1: Floats, scale: np.float32, weights: Floats, k: int) -> None:
    """weights[h, k], weights[h, k + 1] = scale · query[h] · key0, key1."""
    heads, width = query.shape
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
        weights[h, k], weights[h, k + 1] = a0 * scale, b0 * scale
        weights[h + 1, k], weights[h + 1, k + 1] = a1 * scale, b1 * scale
        weights[h + 2, k], weights[h + 2, k + 1] = a2 * scale, b2 * scale
        weights[h + 3, k], weights[h + 3, k + 1] = a3 * scale, b3 * scale
    for h in range(quads, heads):
        q0 = query[h]
        a0, b0 = ZERO, ZERO
        for c in range(width):
            a0 += q0[c] * key0[c]
            b0 += q0[c] * key1[c]
        weights[h, k], weights[h, k + 1] = a0 * scale, b0 * scale


@inline
def _add_weighted(
    weights: Floats, k: int, key0: Floats, key1: Floats, key2: Floats, key3: Floats, row: int, out: Floats
) -> None:
    """out[h, row] += Σ_i weights[h, k + i] · key_i."""
    heads, rank = out.shape[0], out.shape[2]
    for h in range(heads):  # one output row at a time: with more, the compiler gives up on telling the rows apart
        w0, w1, w2, w3 = weights[h, k], weights[h, k + 1], weights[h, k + 2], weights[h, k + 3]
        total = out[h, row]
        for c in range(rank):
            total[c] += (w0 * key0[c] + w1 * key1[c]) + (w2 * key2[c] + w3 * key3[c])


@inline
def _softmax(weights: Floats) -> None:
    top = weights[0]
    for k in range(weights.shape[0]):
        top = max(top, weights[k])
    total = ZERO
    for k in range(weights.shape[0]):
        weights[k] = exp(weights[k] - top)
        total += weights[k]
    factor = ONE / total
    for k in range(weights.shape[0]):
        weights[k] *= factor


@kernel(f"void(int64, int64, {F3}, {F3}, {CACHE}, {N2}, {I1}, {I1}, int64, {N2}, {F2}, {F2}, float64, {F3})")
def _attend(
    first: int,
    end: int,
    query: Floats,
    absorbed: Floats,
    cache: Cache,
    tables: Ints,
    seqs: Longs,
    visible: Longs,
    block_tokens: int,
    sel: Ints,
    cos: Floats,
    sin: Floats,
    scale: float,
    out: Floats,
) -> None:
    heads, rank, rope = query.shape[1], absorbed.shape[2], 2 * cos.shape[1]
    most = sel.shape[1]
    if sel.shape[0] == 0:
        for r in range(first, end):
            most = max(most, visible[r])
    slots = np.empty(most + 3, np.int64)
    weights = np.empty((heads, most + 3), np.float32)
    turned = np.empty((heads, rank + rope), np.float32)
    scratch = np.empty((4, rank + rope), np.float32)
    for r in range(first, end):
        for h in range(heads):
            for c in range(rank):
                turned[h, c] = absorbed[h, r, c]
                out[h, r, c] = ZERO
            for c in range(rope):
                turned[h, rank + c] = query[r, h, query.shape[2] - rope + c]
            rotate_interleaved(turned[h], rank, cos[r], sin[r])
        count = _keys(tables[seqs[r]], visible[r], block_tokens, sel, r, slots)
        if count:
            for k in range(count, count + -count % 4):  # whole quads: repeat the last key with weight zero
                slots[k] = slots[count - 1]
            for k in range(0, count, 2):
                key0, key1 = row_at(cache, slots[k], scratch[0]), row_at(cache, slots[k + 1], scratch[1])
                _score(turned, key0, key1, np.float32(scale), weights, k)
            for h in range(heads):
                _softmax(weights[h, :count])
                weights[h, count : count + -count % 4] = ZERO
        for k in range(0, count, 4):
            key0, key1 = row_at(cache, slots[k], scratch[0]), row_at(cache, slots[k + 1], scratch[1])
            key2, key3 = row_at(cache, slots[k + 2], scratch[2]), row_at(cache, slots[k + 3], scratch[3])
            _add_weighted(weights, k, key0, key1, key2, key3, r, out)
