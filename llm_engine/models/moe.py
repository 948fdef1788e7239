"""Mixture of experts: sigmoid gate with group-limited choice, routed experts, shared expert.

Shapes: R rows, H hidden, E experts, F expert width, K chosen experts.
"""

from __future__ import annotations

from torch import Tensor

from llm_engine.models.layers import LayerWeights, pack_swiglu, swiglu
from llm_engine.models.spec import MoeSpec
from llm_engine.ops import GateConfig, Ops


class Moe:
    """One layer's experts."""

    def __init__(self, spec: MoeSpec, ops: Ops, weights: LayerWeights) -> None:
        self._ops = ops
        self._gate = ops.pack_linear(weights["gate.weight"], fp32=True)
        self._bias_E = weights["gate.e_score_correction_bias"]
        self._config = GateConfig(
            top_k=spec.top_k,
            num_groups=spec.num_groups,
            top_groups=spec.top_groups,
            normalise=spec.norm_topk,
            scale=spec.scaling,
        )
        experts = (swiglu(weights.under(f"experts.{i}.")) for i in range(spec.num_experts))
        shared = pack_swiglu(ops, weights.under("shared_experts.")) if spec.num_shared else None
        self._experts = ops.pack_experts(experts, spec.num_experts, shared=shared)

    def __call__(self, x_RH: Tensor) -> Tensor:
        logits_RE = self._ops.linear(x_RH, self._gate)
        ids_RK, weights_RK = self._ops.gate(logits_RE, self._bias_E, self._config)
        return self._ops.moe(x_RH, ids_RK, weights_RK, self._experts)
