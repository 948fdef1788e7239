"""Latent attention in expanded form, for `fast`: keys and values of all heads are computed from the latents first.

Cheaper than the absorbed form where many rows of one sequence share their keys, as in a prefill chunk: 320 instead of
1088 multiplications per head, row and key with the released model's widths. Other rows stay in absorbed form.

Shapes: R rows, n rows of a chunk, T positions they may see, h heads, D query width, E the rotated part of a key,
L latent rank, C = L + 2J cache width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from torch import Tensor

from llm_engine.ops_cpu import mla
from llm_engine.ops_cpu.gemm import Gemm
from llm_engine.ops_cpu.plan import CpuPlan

_MIN_CHUNK_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class BothKvB:
    """kv_b_proj for both forms."""

    absorbed: mla.PackedKvB
    key_hLD: Tensor
    value_hLV: Tensor

    @classmethod
    def pack(cls, gemm: Gemm, key_hDL: Tensor, value_hVL: Tensor) -> BothKvB:
        absorbed = mla.PackedKvB.pack(gemm, key_hDL, value_hVL)
        return cls(absorbed, key_hDL.transpose(1, 2).contiguous(), value_hVL.transpose(1, 2).contiguous())


def mla_attend(
    query_RhD: Tensor, plane_BPC: Tensor, plan: CpuPlan, sel_NK: Tensor | None, kv_b: BothKvB, scale: float
) -> Tensor:
    """See `llm_engine.ops.spec.MlaAttend`. Expanded for the chunks of a batch in which nothing is left out."""
    spans = [] if sel_NK is not None else list(pairwise(plan.row_starts))
    chunks = [(first, end) for first, end in spans if end - first >= _MIN_CHUNK_ROWS]
    if not chunks:
        return mla.mla_attend(query_RhD, plane_BPC, plan, sel_NK, kv_b.absorbed, scale)
    out_RhV = query_RhD.new_zeros(*query_RhD.shape[:2], kv_b.value_hLV.shape[2])
    for first, end in chunks:
        out_RhV[first:end] = _attend_chunk(query_RhD[first:end], plane_BPC, plan, first, kv_b, scale)
    singles = [row for first, end in spans if end - first < _MIN_CHUNK_ROWS for row in range(first, end)]
    if singles:
        rows = np.array(singles)
        query = query_RhD[torch.from_numpy(rows)]
        out_RhV[torch.from_numpy(rows)] = mla.mla_attend(query, plane_BPC, plan.only(rows), None, kv_b.absorbed, scale)
    return out_RhV


def _attend_chunk(
    query_nhD: Tensor, plane_BPC: Tensor, plan: CpuPlan, first: int, kv_b: BothKvB, scale: float
) -> Tensor:
    """Consecutive rows of one sequence, from row `first` of the batch on: [n, h, V]."""
    n = len(query_nhD)
    visible_n = torch.from_numpy(plan.visible_N[first : first + n])
    positions_T = np.arange(int(visible_n[-1]))
    blocks_T = plan.tables_SB[plan.seqs_N[first], positions_T // plan.block_tokens].astype(np.int64)
    slots_T = torch.from_numpy(blocks_T * plan.block_tokens + positions_T % plan.block_tokens)
    rows_TC = plane_BPC.view(-1, plane_BPC.shape[-1]).index_select(0, slots_T)
    latents_TL, turned_TE = rows_TC.split_with_sizes([kv_b.key_hLD.shape[1], 2 * plan.cos_RJ.shape[1]], dim=1)
    heads = query_nhD.shape[1]
    key_hTD = torch.cat([latents_TL @ kv_b.key_hLD, turned_TE.expand(heads, -1, -1)], dim=-1)
    attended_hnV = torch.nn.functional.scaled_dot_product_attention(
        _rotated(query_nhD, plan, first).transpose(0, 1).unsqueeze(0),
        key_hTD.unsqueeze(0),
        (latents_TL @ kv_b.value_hLV).unsqueeze(0),
        attn_mask=torch.arange(len(rows_TC)) < visible_n.unsqueeze(1),
        scale=scale,
    )[0]
    return attended_hnV.transpose(0, 1)


def _rotated(query_nhD: Tensor, plan: CpuPlan, first: int) -> Tensor:
    """The query with its last 2J channels rotated in interleaved pairs."""
    n, pairs = len(query_nhD), plan.cos_RJ.shape[1]
    cos = torch.from_numpy(plan.cos_RJ[first : first + n]).unsqueeze(1)
    sin = torch.from_numpy(plan.sin_RJ[first : first + n]).unsqueeze(1)
    out_nhD = query_nhD.float().clone()
    even, odd = query_nhD[..., -2 * pairs :: 2].float(), query_nhD[..., -2 * pairs + 1 :: 2].float()
    out_nhD[..., -2 * pairs :: 2] = even * cos - odd * sin
    out_nhD[..., -2 * pairs + 1 :: 2] = odd * cos + even * sin
    return out_nhD.to(query_nhD.dtype)
