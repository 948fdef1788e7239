"""Latent attention for `fast` in two forms.

Absorbed: a row's heads are the queries, and its cache rows are keys and values at once: on tile registers where the CPU
has them (`mla_tiles`), else through torch's attention over gathered cache rows, one call for rows with about as many
keys. Expanded, for chunks in which nothing is left out: keys and values of all heads are computed from the
latents first, which is cheaper where many rows share their keys: 320 instead of 1088 multiplications per head, row and
key with the released model's widths.

Torch's fused attention wants one width for queries, keys and values: values get columns that are dropped afterwards.

Shapes: R rows, n rows of a group or chunk, T their keys, h heads, D query width without rotated part, E rotated part,
L latent rank, C = L + E cache width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from llm_engine.ops import ForwardBatch
from llm_engine.ops.spec import Selection, made
from llm_engine.ops_cpu import mla_tiles
from llm_engine.ops_cpu.gemm import Gemm, PackedProduct
from llm_engine.ops_cpu.jit import (
    CACHE,
    F2,
    Cache,
    Floats,
    Longs,
    kernel,
    over_rows,
    rotate_interleaved,
    row_array,
    row_at,
    store_row,
)
from llm_engine.ops_cpu.plan import CpuPlan
from llm_engine.ops_cpu.plan import plan as cpu_plan

_MIN_CHUNK_ROWS: Final = 16
_GROUP_KEYS: Final = 8192  # gathered at a time
_TURN_COST: Final = 4  # of an element, for sharing rows out to threads


@dataclass(frozen=True, slots=True)
class FreeKvB:
    """kv_b_proj for both forms."""

    absorb: PackedProduct  # [R, h, D] → [h, R, L]
    values: PackedProduct  # [R, h, L] → [h, R, V]
    keys_values: PackedProduct  # [T, L] → [T, h · (D + V)]
    key_width: int
    value_width: int

    @classmethod
    def pack(cls, gemm: Gemm, dtype: torch.dtype, key_hDL: Tensor, value_hVL: Tensor) -> FreeKvB:
        return cls(
            gemm.heads(key_hDL),
            gemm.heads(value_hVL.transpose(1, 2)),
            gemm.linear(torch.cat([key_hDL, value_hVL], dim=1).flatten(0, 1), dtype),
            key_hDL.shape[1],
            value_hVL.shape[1],
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that attend in one call, and the cache slots of their keys; short rows repeat a key that is masked."""

    rows_n: Tensor
    slots_nT: Tensor
    seen_nT: Tensor | None  # None: everything
    keyless_n: Tensor | None  # rows without any key; None: there are none


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one sequence, and the cache slots of everything that the last one sees."""

    first: int
    end: int
    slots_T: Tensor
    seen_nT: Tensor | None  # None: the sequence starts here, each row sees one more


@dataclass(frozen=True)
class FreePlan(CpuPlan):
    """What all layers do when nothing is left out."""

    spans: tuple[Span, ...]
    alone_n: Longs  # rows outside of the spans

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Of the rows outside of the spans."""
        return tuple(_groups(self, self.alone_n, None))


def plan(batch: ForwardBatch, *, block_tokens: int, cos_TJ: Tensor, sin_TJ: Tensor) -> FreePlan:
    """See `llm_engine.ops.spec.Plan`."""
    base = cpu_plan(batch, block_tokens=block_tokens, cos_TJ=cos_TJ, sin_TJ=sin_TJ)
    bounds = [(first, end) for first, end in pairwise(base.row_starts) if end - first >= _MIN_CHUNK_ROWS]
    alone = np.ones(base.num_rows, dtype=bool)
    for first, end in bounds:
        alone[first:end] = False
    spans = tuple(_span(base, first, end) for first, end in bounds)
    inherited: dict[str, Any] = {field.name: getattr(base, field.name) for field in fields(base)}
    return FreePlan(**inherited, spans=spans, alone_n=np.flatnonzero(alone))


def _span(plan: CpuPlan, first: int, end: int) -> Span:
    visible_n = plan.visible_N[first:end]
    positions_T = np.arange(visible_n[-1])
    slots_T = _slots(plan, plan.seqs_N[first : first + 1], positions_T[None])[0]
    seen_nT = None if visible_n[0] == 1 else torch.from_numpy(positions_T < visible_n[:, None])
    return Span(first, end, slots_T, seen_nT)


def _slots(plan: CpuPlan, seqs_n: Longs, positions_nT: Longs) -> Tensor:
    """Cache rows of positions."""
    blocks_nT = plan.tables_SB[seqs_n[:, None], positions_nT // plan.block_tokens].astype(np.int64)
    return torch.from_numpy(blocks_nT * plan.block_tokens + positions_nT % plan.block_tokens)


def _groups(plan: CpuPlan, rows: Longs, sel_NK: Longs | None) -> list[Group]:
    """Deal rows into groups of at most _GROUP_KEYS keys, padding included."""
    if not len(rows):
        return []
    counts = plan.visible_N[rows] if sel_NK is None else (sel_NK[rows] >= 0).sum(axis=1)
    if len(rows) * counts.max() <= _GROUP_KEYS:
        return [_group(plan, rows, counts, sel_NK)]
    order = counts.argsort(kind="stable")  # rows with about as many keys together
    rows, counts = rows[order], counts[order]
    bounds = [0]
    for row, count in enumerate(counts.tolist()):
        if row > bounds[-1] and (row + 1 - bounds[-1]) * count > _GROUP_KEYS:
            bounds.append(row)
    spans = pairwise([*bounds, len(rows)])
    return [_group(plan, rows[first:end], counts[first:end], sel_NK) for first, end in spans]


def _group(plan: CpuPlan, rows_n: Longs, counts_n: Longs, sel_NK: Longs | None) -> Group:
    last_n = np.maximum(counts_n - 1, 0)
    places_nT = np.minimum(np.arange(last_n.max() + 1), last_n[:, None])
    positions_nT = places_nT
    if sel_NK is not None:
        positions_nT = np.maximum(np.take_along_axis(sel_NK[rows_n], places_nT, axis=1), 0)
    seen_nT = None
    if counts_n.min() < counts_n.max():
        seen_nT = torch.from_numpy(np.arange(places_nT.shape[1]) <= last_n[:, None])
    keyless_n = torch.from_numpy(counts_n == 0) if counts_n.min() == 0 else None
    return Group(torch.from_numpy(rows_n), _slots(plan, plan.seqs_N[rows_n], positions_nT), seen_nT, keyless_n)


def mla_attend(
    query_RhD: Tensor, plane_BPC: Tensor, plan: FreePlan, selection: Selection, kv_b: FreeKvB, scale: float
) -> Tensor:
    """See `llm_engine.ops.spec.MlaAttend`."""
    sel_NK = made(selection)
    turned_RhD = _turned(query_RhD, plan)
    cache_SC = plane_BPC.view(-1, plane_BPC.shape[-1])
    spans = plan.spans if sel_NK is None else ()
    rank = cache_SC.shape[1] - (query_RhD.shape[2] - kv_b.key_width)
    if sel_NK is None and mla_tiles.fits(cache_SC, rank, plan.block_tokens):
        rows_n = torch.from_numpy(plan.alone_n)
        attend = partial(mla_tiles.attend_rows, cache_SC=cache_SC, plan=plan, rows_n=plan.alone_n, scale=scale)
    else:
        groups = plan.groups if sel_NK is None else _groups(plan, np.arange(plan.num_rows), sel_NK.long().numpy())
        rows_n = torch.cat([group.rows_n for group in groups]) if groups else torch.empty(0, dtype=torch.int64)
        attend = partial(_attend_groups, cache_SC=cache_SC, groups=groups, scale=scale)
    if len(turned_RhD) == len(rows_n) > 0 and bool((rows_n[1:] > rows_n[:-1]).all()):
        return _attend_absorbed(turned_RhD, rank, attend, kv_b)
    out_RhV = turned_RhD.new_empty(*turned_RhD.shape[:2], kv_b.value_width)
    for span in spans:
        out_RhV[span.first : span.end] = _attend_expanded(turned_RhD, cache_SC, span, kv_b, scale)
    if len(rows_n):
        out_RhV[rows_n] = _attend_absorbed(turned_RhD[rows_n], rank, attend, kv_b)
    return out_RhV


def _attend_absorbed(turned_nhD: Tensor, rank: int, attend: Callable[..., Tensor], kv_b: FreeKvB) -> Tensor:
    """`attend(query_nhC, rank=L)` gives the weighted sums of the latents, [n, h, L]."""
    absorbed_nhL = kv_b.absorb(turned_nhD[..., : kv_b.key_width]).transpose(0, 1)
    query_nhC = torch.cat([absorbed_nhL.to(turned_nhD.dtype), turned_nhD[..., kv_b.key_width :]], dim=-1)
    return kv_b.values(attend(query_nhC, rank=rank)).transpose(0, 1).to(turned_nhD.dtype)


def _attend_groups(query_nhC: Tensor, cache_SC: Tensor, groups: Seq[Group], rank: int, scale: float) -> Tensor:
    """Rows in the order in which they stand in the groups."""
    queries = torch.split(query_nhC, [len(group.rows_n) for group in groups])
    parts = [_attend_group(query_nhC, cache_SC, group, scale) for query_nhC, group in zip(queries, groups, strict=True)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[..., :rank]


def _attend_group(query_nhC: Tensor, cache_SC: Tensor, group: Group, scale: float) -> Tensor:
    n, keys = group.slots_nT.shape
    rows_n1TC = cache_SC.index_select(0, group.slots_nT.view(-1)).view(n, 1, keys, -1)
    mask = None if group.seen_nT is None else group.seen_nT.view(n, 1, 1, keys)
    out_nhC = scaled_dot_product_attention(query_nhC.unsqueeze(1), rows_n1TC, rows_n1TC, mask, scale=scale).squeeze(1)
    return out_nhC if group.keyless_n is None else out_nhC.masked_fill_(group.keyless_n.view(-1, 1, 1), 0.0)


def _attend_expanded(turned_RhD: Tensor, cache_SC: Tensor, span: Span, kv_b: FreeKvB, scale: float) -> Tensor:
    query_nhD = turned_RhD[span.first : span.end]
    heads, width = query_nhD.shape[1:]
    rows_TC = cache_SC.index_select(0, span.slots_T)
    rotated = width - kv_b.key_width
    keys_values = kv_b.keys_values(rows_TC[:, :-rotated]).view(len(rows_TC), heads, -1)
    key_ThD = torch.cat([keys_values[..., : kv_b.key_width], rows_TC[:, None, -rotated:].expand(-1, heads, -1)], dim=-1)
    value_ThV = pad(keys_values[..., kv_b.key_width :], (0, max(0, width - kv_b.value_width)))
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query_nhD, key_ThD, value_ThV))
    causal = span.seen_nT is None
    out_1hnV = scaled_dot_product_attention(query, key, value, span.seen_nT, is_causal=causal, scale=scale)
    return out_1hnV[0, ..., : kv_b.value_width].transpose(0, 1)


def _turned(query_RhD: Tensor, plan: CpuPlan) -> Tensor:
    """The query with its last channels rotated in interleaved pairs."""
    turned_RhD = query_RhD.clone(memory_format=torch.contiguous_format)
    rows = row_array(turned_RhD.view(-1, turned_RhD.shape[2]))
    cost = _TURN_COST * turned_RhD.shape[1] * turned_RhD.shape[2]
    over_rows(_turn, len(turned_RhD), cost, rows, turned_RhD.shape[1], plan.cos_RJ, plan.sin_RJ)
    return turned_RhD


@kernel(f"void(int64, int64, {CACHE}, int64, {F2}, {F2})")
def _turn(first: int, end: int, rows: Cache, heads: int, cos: Floats, sin: Floats) -> None:
    width = rows.shape[1]
    scratch, row = np.empty(width, np.float32), np.empty(width, np.float32)
    for r in range(first, end):
        for i in range(r * heads, (r + 1) * heads):
            wide = row_at(rows, i, scratch)
            for c in range(width):
                row[c] = wide[c]
            rotate_interleaved(row, width - 2 * cos.shape[1], cos[r], sin[r])
            store_row(rows, i, row)
