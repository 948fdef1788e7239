"""Latent attention in absorbed form: queries meet the cached latents directly, values are expanded afterwards.

A row's keys stand in ascending position in tiles of KEY_TILE slots. Scores are products of one fixed shape a tile;
softmax runs over the whole row; weighted latents are summed tile after tile. Slots behind the last key have probability
zero and a finite latent, so that further tiles add exact zeros and change no bit: a row gives the same result with any
number of tiles, and the same whether its keys come from a selection of everything or from all visible positions.

Shapes: R rows, N real rows, n rows of a group, h heads, D query width without rope, L latent rank, C = L + 2J cache
width, V value width, T or K key slots of a row, a multiple of KEY_TILE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from llm_engine.ops_cpu.gemm import Gemm, PackedProduct
from llm_engine.ops_cpu.plan import CpuPlan, RowGroup

KEY_TILE: Final = 64
_GATHER_BYTES: Final = 768 << 10  # latents gathered at a time, so that they stay in a core's cache
_NO_BIAS: Final = torch.zeros(1, 1, 1)


@dataclass(frozen=True, slots=True)
class PackedKvB:
    """Both halves of kv_b_proj, and its sizes."""

    absorb: PackedProduct  # [n, h, D] → [h, n, L]
    expand: PackedProduct  # [n, h, L] → [h, n, V]
    key_hDL: Tensor
    value_hVL: Tensor

    @classmethod
    def pack(cls, gemm: Gemm, key_hDL: Tensor, value_hVL: Tensor) -> PackedKvB:
        return cls(gemm.heads(key_hDL), gemm.heads(value_hVL.transpose(1, 2)), key_hDL, value_hVL)


def mla_attend(
    query_RhD: Tensor, plane_BPC: Tensor, plan: CpuPlan, sel_NK: Tensor | None, kv_b: PackedKvB, scale: float
) -> Tensor:
    """See `llm_engine.ops.spec.MlaAttend`."""
    rows, heads, _ = query_RhD.shape
    query_RhC = _absorbed(query_RhD.float(), plan, kv_b)
    latents_C = plane_BPC.view(-1, plane_BPC.shape[-1])
    rank = kv_b.key_hDL.shape[2]
    out_RhL = query_RhC.new_empty(rows, heads, rank)
    for group in plan.groups:
        query_nhC = group.take(query_RhC)
        if sel_NK is not None:
            slots_nK, hidden_nK = _selected(group, group.take(sel_NK))
            out = attend_slots(query_nhC, latents_C, slots_nK, hidden_nK, rank, scale)
        elif group.shared:
            out = attend_shared(query_nhC, latents_C, group, rank, scale)
        else:
            out = attend_slots(query_nhC, latents_C, group.slots, group.hidden_nT, rank, scale)
        group.put(out_RhL, out)
    if plan.num_rows < rows:
        out_RhL[plan.num_rows :] = out_RhL[plan.num_rows - 1]
    return kv_b.expand(out_RhL).transpose(0, 1).contiguous().to(query_RhD.dtype)


def _absorbed(query_RhD: Tensor, plan: CpuPlan, kv_b: PackedKvB) -> Tensor:
    """Rotate the rope part and carry the rest into the latent space: [R, h, C]."""
    width = plan.rope.width
    plain, turned = query_RhD[..., :-width], query_RhD[..., -width:]
    absorbed_hRL = kv_b.absorb(plain)
    rank = absorbed_hRL.shape[2]
    out_RhC = query_RhD.new_empty(*query_RhD.shape[:2], rank + width)
    out_RhC[..., :rank] = absorbed_hRL.transpose(0, 1)
    plan.rope.rotate_interleaved(turned, out_RhC[..., rank:])
    return out_RhC


def _selected(group: RowGroup, sel_nK: Tensor) -> tuple[Tensor, Tensor | None]:
    """Slots of selected positions in whole tiles, and which of them are empty (None: none is)."""
    missing = -sel_nK.shape[1] % KEY_TILE
    if missing:
        sel_nK = torch.nn.functional.pad(sel_nK, (0, missing), value=-1)
    elif int(sel_nK[:, -1].amin()) >= 0:
        return group.slots_at(sel_nK), None
    return group.slots_at(sel_nK.clamp_min(0)), sel_nK < 0


def attend_slots(
    query_nhC: Tensor, latents_C: Tensor, slots_nK: Tensor, hidden_nK: Tensor | None, rank: int, scale: float
) -> Tensor:
    """Rows with their own key slots: [n, h, L]."""
    n, heads, width = query_nhC.shape
    keys = slots_nK.shape[1]
    out_nhL = query_nhC.new_empty(n, heads, rank)
    blocks = max(1, -(-n * keys * width * latents_C.itemsize // _GATHER_BYTES))
    step = -(-n // blocks)
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        latents_bKC = latents_C.index_select(0, slots_nK[part].reshape(-1)).view(-1, keys, width).float()
        scores_bhK = _scores(query_nhC[part], latents_bKC, scale)
        weights_bhK = _softmax(scores_bhK, None if hidden_nK is None else hidden_nK[part])
        _weighted_sum(weights_bhK, latents_bKC[..., :rank], out_nhL[part])
    return out_nhL


def attend_shared(query_nhC: Tensor, latents_C: Tensor, group: RowGroup, rank: int, scale: float) -> Tensor:
    """Consecutive rows of one sequence, all of whose positions are visible: [n, h, L]."""
    n, heads, _ = query_nhC.shape
    latents_TC = latents_C.index_select(0, group.slots).float()
    tiles = [tile.expand(n, -1, -1) for tile in torch.split(latents_TC, KEY_TILE)]
    scores = [torch.baddbmm(_NO_BIAS, query_nhC, tile.mT, beta=0, alpha=scale) for tile in tiles]
    weights_nhT = _softmax(torch.cat(scores, dim=-1), group.hidden_nT)
    out_nhL = query_nhC.new_empty(n, heads, rank)
    for index, (weights, tile) in enumerate(zip(torch.split(weights_nhT, KEY_TILE, dim=-1), tiles, strict=True)):
        _accumulate(out_nhL, weights, tile[..., :rank], first=index == 0)
    return out_nhL


def _scores(query_bhC: Tensor, latents_bKC: Tensor, scale: float) -> Tensor:
    """scale · query · latent: [b, h, K], computed tile by tile."""
    b, heads, width = query_bhC.shape
    tiles = latents_bKC.shape[1] // KEY_TILE
    if tiles > 1:
        query_bhC = query_bhC.repeat_interleave(tiles, 0)
    keys_tCK = latents_bKC.view(b * tiles, KEY_TILE, width).mT
    scores = torch.baddbmm(_NO_BIAS, query_bhC, keys_tCK, beta=0, alpha=scale)
    if tiles == 1:
        return scores
    return scores.view(b, tiles, heads, KEY_TILE).transpose(1, 2).reshape(b, heads, -1)


def _softmax(scores_bhK: Tensor, hidden_bK: Tensor | None) -> Tensor:
    """Softmax over a row's visible keys; zero everywhere in a row that has none."""
    if hidden_bK is None:
        return torch.softmax(scores_bhK, -1)
    hidden_b1K = hidden_bK.unsqueeze(1)
    weights = torch.softmax(scores_bhK.masked_fill_(hidden_b1K, -torch.inf), -1)
    return weights.masked_fill_(hidden_b1K, 0.0)


def _weighted_sum(weights_bhK: Tensor, latents_bKL: Tensor, out_bhL: Tensor) -> None:
    pairs = zip(torch.split(weights_bhK, KEY_TILE, dim=-1), torch.split(latents_bKL, KEY_TILE, dim=1), strict=True)
    for index, (weights, latents) in enumerate(pairs):
        _accumulate(out_bhL, weights, latents, first=index == 0)


def _accumulate(out_bhL: Tensor, weights_bhK: Tensor, latents_bKL: Tensor, *, first: bool) -> None:
    if first:
        torch.bmm(weights_bhK, latents_bKL, out=out_bhL)
    else:
        out_bhL.baddbmm_(weights_bhK, latents_bKL)
