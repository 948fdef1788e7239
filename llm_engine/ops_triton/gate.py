"""Choosing experts: sigmoid scores, a bias for the choice only, a limit on groups. One program a row.

Shapes: R rows, E experts, K chosen.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops.spec import GateConfig
from llm_engine.ops_triton.lang import Ptr, await_inputs, kernel, let_next_in, sigmoid, tile_size


def gate(logits_RE: Tensor, bias_E: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
    """See `llm_engine.ops.spec.Gate`. Among equals the lowest expert wins."""
    rows, experts = logits_RE.shape
    ids_RK = logits_RE.new_empty(rows, config.top_k, dtype=torch.int64)
    weights_RK = logits_RE.new_empty(rows, config.top_k, dtype=torch.float32)
    if rows:
        size = experts // config.num_groups
        groups = (config.num_groups, tile_size(config.num_groups), size, tile_size(size), config.top_groups)
        choice = (config.top_k, tile_size(config.top_k), config.normalise, config.scale)
        _gate[(rows,)](logits_RE.contiguous(), bias_E, ids_RK, weights_RK, *groups, *choice, num_warps=1)
    return ids_RK, weights_RK


@kernel
def _gate(
    logits: Ptr,
    bias: Ptr,
    ids: Ptr,
    weights: Ptr,
    GROUPS: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_TILE: tl.constexpr,
    KEPT: tl.constexpr,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    NORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, GROUP_TILE), tl.arange(0, SIZE_TILE)
    expert = group[:, None] * SIZE + member[None, :]
    mask = (group[:, None] < GROUPS) & (member[None, :] < SIZE)
    minus_inf = float("-inf")
    score = sigmoid(tl.load(logits + row * (GROUPS * SIZE) + expert, mask=mask, other=0.0))
    choice = score + tl.load(bias + expert, mask=mask, other=0.0)
    choice = tl.where(mask & (choice == choice), choice, minus_inf)
    if KEPT < GROUPS:
        best = tl.max(choice, 1)
        worth = best
        if SIZE > 1:
            others = tl.where(member[None, :] == tl.argmax(choice, 1)[:, None], minus_inf, choice)
            worth = best + tl.max(others, 1)
        # As a column beside a row: the same values in the other direction.
        across = tl.sum(tl.where(group[:, None] == group[None, :], worth[:, None], 0.0), 0)
        better = (across[None, :] > worth[:, None]) | (
            (across[None, :] == worth[:, None]) & (group[None, :] < group[:, None])
        )
        rank = tl.sum((better & (group[None, :] < GROUPS)).to(tl.int32), 1)
        choice = tl.where((rank < KEPT)[:, None], choice, minus_inf)
    chosen = tl.zeros((K_TILE,), tl.int64)
    weight = tl.zeros((K_TILE,), tl.float32)
    place = tl.arange(0, K_TILE)
    total = 0.0
    for k in tl.static_range(K):
        top = tl.max(tl.max(choice, 1), 0)
        first = tl.min(tl.min(tl.where(choice == top, expert, GROUPS * SIZE - 1), 1), 0)
        picked = expert == first
        value = tl.sum(tl.sum(tl.where(picked & mask, score, 0.0), 1), 0)
        chosen = tl.where(place == k, first.to(tl.int64), chosen)
        weight = tl.where(place == k, value, weight)
        choice = tl.where(picked, minus_inf, choice)
        total += value
    factor = SCALE / (total + 1e-20) if NORMALISE else SCALE
    tl.store(ids + row * K + place, chosen, mask=place < K)
    tl.store(weights + row * K + place, weight * factor, mask=place < K)
