"""Every kernel once more, row by row in float64, straight from the formulas. Slow and obvious.

Sequences are plain lists of positions here: no blocks, no batches. Shapes as in `llm_engine.ops.spec`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_engine.ops import GateConfig


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=-1)
    return silu(gate) * up @ down.double().T


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Interleaved layout: pairs (2j, 2j + 1). `angles` [R, J] for `x` [R, ..., 2J]."""
    x = x.double()
    out = x.clone()
    for row in range(len(x)):
        for j, angle in enumerate(angles[row].double()):
            a, b = x[row, ..., 2 * j], x[row, ..., 2 * j + 1]
            out[row, ..., 2 * j] = a * angle.cos() - b * angle.sin()
            out[row, ..., 2 * j + 1] = b * angle.cos() + a * angle.sin()
    return out


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Half-split layout: pairs (j, j + J)."""
    pairs = angles.shape[1]
    interleave = torch.arange(2 * pairs).view(2, pairs).T.reshape(-1)
    out = torch.empty_like(x, dtype=torch.float64)
    out[..., interleave] = rotate_pairs(x[..., interleave], angles)
    return out


def index_scores(query_hD: Tensor, g_h: Tensor, keys_TD: Tensor) -> Tensor:
    return g_h.double() @ (query_hD.double() @ keys_TD.double().T).relu()


def top_k(scores_T: Tensor, k: int) -> list[int]:
    """Positions of the k largest scores, ascending; the lowest position wins a tie."""
    best_first = sorted(range(len(scores_T)), key=lambda t: (-float(scores_T[t]), t))
    return sorted(best_first[:k])


def attend(
    query_hD: Tensor, angles_J: Tensor, rows_TC: Tensor, key_hDL: Tensor, value_hVL: Tensor, scale: float
) -> Tensor:
    """Expanded form for one row: keys and values of every head from the cached rows [latent ‖ rotated key]."""
    rank, width = key_hDL.shape[2], 2 * len(angles_J)
    plain = query_hD[:, :-width].double()
    turned = rotate_pairs(query_hD[None, :, -width:], angles_J[None])[0]
    if not len(rows_TC):
        return torch.zeros(len(query_hD), value_hVL.shape[1], dtype=torch.float64)
    latents, keys = rows_TC[:, :rank].double(), rows_TC[:, rank:].double()
    out = []
    for h in range(len(query_hD)):
        scores = (latents @ key_hDL[h].double().T) @ plain[h] + keys @ turned[h]
        weights = (scores * scale).softmax(0)
        out.append(weights @ (latents @ value_hVL[h].double().T))
    return torch.stack(out)


def gate(logits_E: Tensor, bias_E: Tensor, config: GateConfig) -> dict[int, float]:
    """Expert → weight for one row."""
    scores = 1 / (1 + (-logits_E.double()).exp())
    choice = (scores + bias_E.double()).view(config.num_groups, -1)
    worth = choice.topk(min(2, choice.shape[1])).values.sum(-1)
    dropped = set(range(config.num_groups)) - set(worth.topk(config.top_groups).indices.tolist())
    for group in dropped:
        choice[group] = -torch.inf
    chosen = choice.flatten().topk(config.top_k).indices
    weights = scores[chosen]
    if config.normalise:
        weights = weights / (weights.sum() + 1e-20)
    return dict(zip(chosen.tolist(), (weights * config.scale).tolist(), strict=True))
