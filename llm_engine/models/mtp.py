"""The multi-token-prediction layer: drafts the token after next from a hidden state and the next token.

Row i of its cache belongs to (hidden state of position i, token at position i + 1) and has position id i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_engine.models.decoder_layer import DecoderLayer
from llm_engine.models.layers import Head, LayerPlanes, LayerWeights, Step
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import Ops


class MtpLayer:
    """The draft layer. Borrows the main model's embedding and head unless the checkpoint holds others for it."""

    def __init__(self, spec: ModelSpec, ops: Ops, weights: LayerWeights, embedding_VH: Tensor, head: Head) -> None:
        own_head = weights.get("shared_head.head.weight")
        own_embedding = weights.get("embed_tokens.weight")
        self.head = head if own_head is None else Head(ops, own_head, spec.num_tokens)
        self._embedding_VH = embedding_VH if own_embedding is None else own_embedding
        self._ops = ops
        self._eps = spec.rms_norm_eps
        self._norm_token = weights["enorm.weight"]
        self._norm_state = weights["hnorm.weight"]
        self._norm_out = weights["shared_head.norm.weight"]
        self._join = ops.pack_linear(weights.loaded("eh_proj.weight"))
        self._layer = DecoderLayer(spec, ops, weights, spec.num_layers)

    def __call__(self, token_ids_R: Tensor, state_RH: Tensor, planes: LayerPlanes, step: Step) -> Tensor:
        """State [R, H] whose head logits draft the token after `token_ids`; also what a chained draft builds on."""
        ops = self._ops
        token_RH = torch.nn.functional.embedding(token_ids_R, self._embedding_VH)
        token_RH = ops.rms_norm(token_RH, self._norm_token, self._eps)
        state_RH = ops.rms_norm(state_RH, self._norm_state, self._eps)
        joined_RH = ops.linear(torch.cat([token_RH, state_RH], dim=-1), self._join)
        delta_RH, residual_RH = self._layer(joined_RH, None, planes, step)
        return ops.add_rms_norm(delta_RH, residual_RH, self._norm_out, self._eps)[0]
