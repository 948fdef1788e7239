"""Choosing experts: sigmoid scores, a bias for the choice only, a limit on groups.

Shapes: R rows, E experts, K chosen.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llm_engine.ops.spec import GateConfig
from llm_engine.ops_cpu.jit import F1, F2, I2, MINUS_INF, ONE, ZERO, Floats, Longs, exp, inline, kernel


def gate(logits_RE: Tensor, bias_E: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
    """See `llm_engine.ops.spec.Gate`. Among equals the lowest expert wins."""
    rows = logits_RE.shape[0]
    ids_RK = torch.empty(rows, config.top_k, dtype=torch.int64)
    weights_RK = torch.empty(rows, config.top_k)
    _gate(
        logits_RE.contiguous().numpy(),
        bias_E.float().numpy(),
        config.num_groups,
        config.top_groups,
        config.normalise,
        config.scale,
        ids_RK.numpy(),
        weights_RK.numpy(),
    )
    return ids_RK, weights_RK


@inline
def _drop_groups(choice: Floats, groups: int, kept: int) -> None:
    """Set all but the best groups to -inf; a group is worth the sum of its two best experts."""
    size = choice.shape[0] // groups
    worth = np.empty(groups, np.float32)
    for g in range(groups):
        best, second = MINUS_INF, MINUS_INF
        for e in range(g * size, (g + 1) * size):
            if choice[e] > best:
                best, second = choice[e], best
            elif choice[e] > second:
                second = choice[e]
        worth[g] = best + second if size > 1 else best
    for _ in range(groups - kept):
        worst = -1
        for g in range(groups):
            if worth[g] != np.float32(np.inf) and (worst < 0 or worth[g] <= worth[worst]):
                worst = g
        worth[worst] = np.inf
        choice[worst * size : (worst + 1) * size] = MINUS_INF


@kernel(f"void({F2}, {F1}, int64, int64, boolean, float64, {I2}, {F2})")
def _gate(
    logits: Floats,
    bias: Floats,
    groups: int,
    kept: int,
    normalise: bool,
    scale: float,
    ids: Longs,
    weights: Floats,
) -> None:
    experts, top_k = logits.shape[1], ids.shape[1]
    score, choice = np.empty(experts, np.float32), np.empty(experts, np.float32)
    for r in range(logits.shape[0]):
        for e in range(experts):
            score[e] = ONE / (ONE + exp(-logits[r, e]))
            choice[e] = score[e] + bias[e]
        if kept < groups:
            _drop_groups(choice, groups, kept)
        total = ZERO
        for k in range(top_k):
            best = 0
            for e in range(1, experts):
                if choice[e] > choice[best]:
                    best = e
            ids[r, k], weights[r, k] = best, score[best]
            choice[best] = MINUS_INF
            total += score[best]
        factor = np.float32(scale)
        if normalise:
            factor = factor / (total + np.float32(1e-20))
        for k in range(top_k):
            weights[r, k] *= factor
