"""What is largest in rows of scores. Pure functions. Shapes: R rows, V vocabulary, G rows of a group.

Between equals the lowest id is first. On the CPU numpy searches and sorts many times faster than torch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from llm_engine.api.request import TokenLogprobs


def best_of(scores_RV: Tensor) -> Tensor:
    """[R, 2] fp64: the id of the largest score of each row, and that score. Waits for nothing.

    A NaN is larger than everything.
    """
    best_R = torch.from_numpy(scores_RV.numpy().argmax(axis=-1)) if scores_RV.is_cpu else scores_RV.argmax(dim=-1)
    scores_R = scores_RV.gather(1, best_R.unsqueeze(1)).squeeze(1)
    return torch.stack([best_R.double(), scores_R.double()], 1)  # side by side, so that the host waits once for both


def keep_most_likely(probs_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Zero all but the `top_k` most likely tokens, then all but the fewest of those that hold `top_p` of their mass.

    top_k in [1, V], top_p in (0, 1].
    """
    best_RV = _sorted_descending(probs_RV)
    mass_RV = best_RV.cumsum(dim=-1, dtype=torch.float64)
    top_k_R1 = top_k_R.unsqueeze(1)
    kept_mass_R1 = mass_RV.gather(1, top_k_R1 - 1) * top_p_R.unsqueeze(1)
    in_nucleus_RV = mass_RV - best_RV < kept_mass_R1  # true for a leading part of each row
    num_kept_R1 = in_nucleus_RV.sum(dim=-1, keepdim=True).minimum(top_k_R1).clamp_(min=1)
    threshold_R1 = best_RV.gather(1, num_kept_R1 - 1)
    above_RV = probs_RV > threshold_R1
    tied_RV = probs_RV == threshold_R1
    room_R1 = num_kept_R1 - above_RV.sum(dim=-1, keepdim=True)
    return probs_RV * (above_RV | (tied_RV & (tied_RV.cumsum(dim=-1) <= room_R1)))


def logprobs_of(logits_RV: Tensor, token_of: dict[int, int], asked: Seq[int]) -> dict[int, TokenLogprobs]:
    """Log probabilities, by row: of the row's token, and of its `asked[row]` most likely ones. Waits for the device.

    `token_of`: the rows that are wanted, and the token of each.
    """
    out: dict[int, TokenLogprobs] = {}
    for top in {asked[row] for row in token_of}:  # one width at a time: a row never depends on another's
        group = [row for row in token_of if asked[row] == top]
        logprobs_GV = logits_RV[group].log_softmax(dim=-1)
        values, ids = logprobs_GV.topk(min(top, logits_RV.shape[1]), dim=-1)
        own = logprobs_GV.gather(1, torch.tensor([[token_of[row]] for row in group], device=logits_RV.device))
        for row, logprob, row_values, row_ids in zip(group, own.tolist(), values.tolist(), ids.tolist(), strict=True):
            best = sorted(zip(row_values, row_ids, strict=True), key=lambda item: (-item[0], item[1]))
            out[row] = TokenLogprobs(logprob[0], [token for _, token in best], [value for value, _ in best])
    return out


def _sorted_descending(values_RV: Tensor) -> Tensor:
    """Each row from its largest value to its smallest."""
    if values_RV.is_cpu:
        return torch.from_numpy(np.sort(values_RV.numpy(), axis=-1)[:, ::-1].copy())
    return values_RV.sort(dim=-1, descending=True).values
