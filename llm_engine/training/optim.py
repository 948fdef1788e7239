"""Muon for the matrices, Adam for everything else, both under one learning rate.

Muon (Jordan et al. 2024): momentum, orthogonalised by a Newton-Schulz iteration; scaled as in Moonlight (Liu et al.
2025) so that an update has the size of Adam's.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)
_STEPS: Final = 5
_RMS: Final = 0.2
_ADAM_NAMES: Final = ("embed_tokens", "lm_head", "gate.weight", "weights_proj")


class Optimizer:
    """Steps all parameters of a module. Parameters without a gradient stay as they are."""

    def __init__(self, model: nn.Module, *, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        self._momentum, self._weight_decay = momentum, weight_decay
        matrices: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or any(part in name for part in _ADAM_NAMES):
                others.append(parameter)
            else:
                matrices[tuple(parameter.shape[-2:])].append(parameter)
        self._matrices = list(matrices.values())
        self._moments = [[torch.zeros_like(p) for p in group] for group in self._matrices]
        self._adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)

    def step(self, rate: float) -> None:
        """Apply the gradients with this learning rate and clear them."""
        for options in self._adam.param_groups:
            options["lr"] = rate
        self._adam.step()
        self._adam.zero_grad()
        for group, moments in zip(self._matrices, self._moments, strict=True):
            self._step_matrices(group, moments, rate)

    @torch.no_grad()
    def _step_matrices(self, group: list[Tensor], moments: list[Tensor], rate: float) -> None:
        live = [i for i, parameter in enumerate(group) if parameter.grad is not None]
        if not live:
            return
        parameters = [group[i] for i in live]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        held = [moments[i] for i in live]
        torch._foreach_lerp_(held, gradients, 1 - self._momentum)
        ahead = torch._foreach_lerp(gradients, held, self._momentum)  # Nesterov
        rows, columns = parameters[0].shape[-2:]
        stacked = torch.cat([update.reshape(-1, rows, columns) for update in ahead])
        updates = orthogonalise(stacked) * (_RMS * max(rows, columns) ** 0.5)
        pieces = updates.split([update.numel() // (rows * columns) for update in ahead])
        torch._foreach_mul_(parameters, 1 - rate * self._weight_decay)
        torch._foreach_add_(
            parameters,
            [piece.reshape(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)],
            alpha=-rate,
        )
        for parameter in parameters:
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, momentum rounded to bf16."""
        moments = [[moment.bfloat16() for moment in held] for held in self._moments]
        return {"moments": moments, "adam": self._adam.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._adam.load_state_dict(state["adam"])
        for held, loaded in zip(self._moments, state["moments"], strict=True):
            for moment, value in zip(held, loaded, strict=True):
                moment.copy_(value)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Roughly U·Vᵀ of the singular value decompositions of a stack of matrices [n, r, c]."""
    a, b, c = _NEWTON_SCHULZ
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x.bfloat16() if x.is_cuda else x  # CPUs are slow in bf16
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = (x if wide else x.mT).float()
    return out
