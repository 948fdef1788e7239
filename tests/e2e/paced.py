"""Workers that are real but for their model, which takes a stated time and computes nothing.

So a pool of several workers has the power of several, whatever the machine: a test of scaling needs cores for the
cluster itself only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deploy.actors import WorkerActor
from deploy.local_ray import ControllerActor
from llm_engine.models.deepseek_v32 import CausalLM
from llm_engine.models.layers import Caches
from llm_engine.ops import ForwardBatch

STEP_S = 0.02
ROW_S = 0.001
TOKEN = 65


def forward(
    self: CausalLM, batch: ForwardBatch, store: Caches, on_layer: Callable[[int], None] | None = None
) -> Tensor:
    """Takes STEP_S, and ROW_S a row."""
    time.sleep(STEP_S + ROW_S * batch.num_rows)
    for layer in range(self.spec.num_layers):
        if on_layer is not None:
            on_layer(layer)
    return torch.zeros(len(batch.token_ids_R), self.spec.hidden_size)


def logits(self: CausalLM, hidden_MH: Tensor) -> Tensor:
    """Every token is TOKEN."""
    logits_MV = torch.zeros(len(hidden_MH), self.spec.vocab_size)
    logits_MV[:, TOKEN] = 100.0
    return logits_MV


class PacedWorkerActor(WorkerActor):
    """A worker's process with such a model."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        CausalLM.forward = forward  # type: ignore[method-assign]
        CausalLM.logits = logits  # type: ignore[method-assign]


class PacedController(ControllerActor):
    """The controller, which starts these workers."""

    worker_kind = PacedWorkerActor
