"""Choosing experts: sigmoid scores, a bias for the choice only, a limit on groups.

Shapes: R rows, E experts, G groups, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_engine.ops.spec import GateConfig
from llm_engine.ops_cpu import rows


def gate(logits_RE: Tensor, bias_E: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
    """See `llm_engine.ops.spec.Gate`."""
    scores_RE = rows.sigmoid(logits_RE)
    choice_RE = scores_RE + bias_E
    if config.top_groups < config.num_groups:
        _drop_groups(choice_RE, config)
    ids_RK = choice_RE.topk(config.top_k, dim=-1).indices
    weights_RK = scores_RE.gather(1, ids_RK)
    if config.normalise:
        weights_RK.div_(weights_RK.sum(-1, keepdim=True).add_(1e-20))
    return ids_RK, weights_RK.mul_(config.scale)


def _drop_groups(choice_RE: Tensor, config: GateConfig) -> None:
    """Set all but the best groups to -inf; a group is worth the sum of its two best experts."""
    choice_RGe = choice_RE.view(len(choice_RE), config.num_groups, -1)
    worth_RG = choice_RGe.topk(min(2, choice_RGe.shape[2]), dim=-1).values.sum(-1)
    dropped = worth_RG.topk(config.num_groups - config.top_groups, dim=-1, largest=False, sorted=False).indices
    choice_RGe.scatter_(1, dropped.unsqueeze(-1).expand(-1, -1, choice_RGe.shape[2]), -torch.inf)
