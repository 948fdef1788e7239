"""The lightning indexer's choice: score all visible positions of a row, keep the k best.

Shapes: N real rows, n rows of a group, h index heads, D index key width, T positions of the group, K chosen.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from llm_engine.ops_cpu.plan import CpuPlan, RowGroup

_TILE: Final = 128  # keys a product handles; the group's width is a multiple


def index_topk(
    query_RhD: Tensor, g_Rh: Tensor, plane_BPD: Tensor, plan: CpuPlan, k: int, *, interleaved: bool = False
) -> Tensor | None:
    """See `llm_engine.ops.spec.IndexTopk`."""
    if all(group.max_visible <= k for group in plan.groups):
        return None
    query_RhD = _rotated(query_RhD.float(), plan, interleaved)
    g_Rh = g_Rh.float()
    parts = [(group, _choose(query_RhD, g_Rh, plane_BPD, group, k)) for group in plan.groups]
    if len(parts) == 1:
        return parts[0][1]
    sel_NK = torch.empty(plan.num_rows, k, dtype=torch.int64)
    for group, sel_nK in parts:
        group.put(sel_NK, sel_nK)
    return sel_NK


def _rotated(query_RhD: Tensor, plan: CpuPlan, interleaved: bool) -> Tensor:
    width = plan.rope.width
    front, rest = query_RhD[..., :width], query_RhD[..., width:]
    if not interleaved:
        return torch.cat([plan.rope.rotate_half(front), rest], dim=-1)
    out_RhD = query_RhD.clone()
    plan.rope.rotate_interleaved(front, out_RhD[..., :width])
    return out_RhD


def _choose(query_RhD: Tensor, g_Rh: Tensor, plane_BPD: Tensor, group: RowGroup, k: int) -> Tensor:
    """Chosen positions [n, k] of a group, ascending, -1 behind."""
    if group.max_visible <= k:
        positions_K = torch.arange(k).expand(len(group.hidden_nT), k)
        visible_n1 = (~group.hidden_nT).sum(1, keepdim=True)
        return torch.where(positions_K < visible_n1, positions_K, -1)
    keys_D = plane_BPD.view(-1, plane_BPD.shape[-1])
    score = _scores_shared if group.shared else _scores_single
    scores_nT = score(group.take(query_RhD), group.take(g_Rh), keys_D, group.slots)
    scores_nT.masked_fill_(group.hidden_nT, -torch.inf)
    return _largest(scores_nT, group, k)


def _scores_single(query_nhD: Tensor, g_nh: Tensor, keys_D: Tensor, slots_nT: Tensor) -> Tensor:
    """Σ_h g · relu(query · key), every row with its own keys."""
    n, width = slots_nT.shape
    tiles = width // _TILE
    keys = keys_D.index_select(0, slots_nT.view(-1)).view(n * tiles, _TILE, -1).float()
    if tiles > 1:
        query_nhD = query_nhD.repeat_interleave(tiles, 0)
        g_nh = g_nh.repeat_interleave(tiles, 0)
    heads = torch.bmm(query_nhD, keys.transpose(1, 2)).relu_()
    return torch.bmm(g_nh.unsqueeze(1), heads).view(n, width)


def _scores_shared(query_nhD: Tensor, g_nh: Tensor, keys_D: Tensor, slots_T: Tensor) -> Tensor:
    """The same for rows that share their keys: the same products, tile after tile."""
    keys_TD = keys_D.index_select(0, slots_T).float()
    g_n1h = g_nh.unsqueeze(1)
    parts = []
    for key_tile in torch.split(keys_TD, _TILE):
        heads = torch.bmm(query_nhD, key_tile.t().expand(query_nhD.shape[0], -1, -1)).relu_()
        parts.append(torch.bmm(g_n1h, heads).squeeze(1))
    return torch.cat(parts, dim=1)


def _largest(scores_nT: Tensor, group: RowGroup, k: int) -> Tensor:
    """Positions of the k largest scores, ascending; the lowest position wins a tie; -inf is never chosen."""
    width = scores_nT.shape[1]
    values, positions = scores_nT.topk(k, sorted=False)
    chosen = scores_nT >= values.amin(-1, keepdim=True)
    all_full = group.min_visible >= k
    if not all_full:
        chosen &= ~group.hidden_nT
        positions.masked_fill_(group.hidden_nT.gather(1, positions), width)
    expected = k * len(chosen) if all_full else int((~group.hidden_nT).sum(1).clamp_(max=k).sum())
    if int(torch.count_nonzero(chosen)) != expected:
        positions = _resolve_ties(scores_nT, group.hidden_nT, k)
        all_full = False
    positions = positions.sort(-1).values
    return positions if all_full else positions.masked_fill_(positions == width, -1)


def _resolve_ties(scores_nT: Tensor, hidden_nT: Tensor, k: int) -> Tensor:
    """As `_largest` where several positions share the lowest chosen score; width of the row where there is none."""
    scores_nT = scores_nT.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    lowest = scores_nT.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, tied = scores_nT > lowest, (scores_nT == lowest) & ~hidden_nT
    chosen = above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    width = scores_nT.shape[1]
    return torch.where(chosen, torch.arange(width), width).topk(k, largest=False).values
