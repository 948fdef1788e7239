"""One transformer block: attention, then MLP or experts, each behind a norm and added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llm_engine.models.layers import DenseMlp, LayerPlanes, LayerWeights, Step
from llm_engine.models.mla import MlaAttention
from llm_engine.models.moe import Moe
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import Ops


class DecoderLayer:
    """Layer `layer` of the model; the MTP layer is numbered after the main ones."""

    def __init__(self, spec: ModelSpec, ops: Ops, weights: LayerWeights, layer: int) -> None:
        self._ops = ops
        self._eps = spec.rms_norm_eps
        self._norm_in = weights["input_layernorm.weight"]
        self._norm_post = weights["post_attention_layernorm.weight"]
        self._attention = MlaAttention(spec, ops, weights.under("self_attn."))
        mlp = weights.under("mlp.")
        self._mlp = Moe(spec.moe, ops, mlp) if spec.is_moe(layer) else DenseMlp(ops, mlp)

    def __call__(
        self,
        delta_RH: Tensor,
        residual_RH: Tensor | None,
        planes: LayerPlanes,
        step: Step,
        on_written: Callable[[], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the block on `delta + residual` (None: zero). The new stream is the sum of the two tensors returned.

        `on_written` is called once the rows' cache entries are stored, before they are read.
        """
        if residual_RH is None:
            x_RH, residual_RH = self._ops.rms_norm(delta_RH, self._norm_in, self._eps), delta_RH
        else:
            x_RH, residual_RH = self._ops.add_rms_norm(delta_RH, residual_RH, self._norm_in, self._eps)
        rows = self._attention.write(x_RH, planes, step)
        if on_written is not None:
            on_written()
        attended_RH = self._attention.attend(rows, planes, step)
        x_RH, residual_RH = self._ops.add_rms_norm(attended_RH, residual_RH, self._norm_post, self._eps)
        return self._mlp(x_RH), residual_RH
