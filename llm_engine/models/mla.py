"""Multi-head latent attention over the paged latent cache, sparse where the model has an indexer.

Shapes: R rows, H hidden, Q query rank, C latent cache width (latent ‖ rotated key), h heads, D index key width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm_engine.models.indexer import Indexer
from llm_engine.models.layers import LayerPlanes, LayerWeights, Step
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import Ops
from llm_engine.ops.fp8 import over_each_other
from llm_engine.ops.spec import Selection


@dataclass(frozen=True, slots=True)
class Projected:
    """Rows between the two halves of attention: their cache entries are written, their queries are not yet made."""

    x_RH: Tensor
    query_latent_RQ: Tensor


class MlaAttention:
    """One layer's attention in two halves, so that a caller can act as soon as the cache rows are in place."""

    def __init__(self, spec: ModelSpec, ops: Ops, weights: LayerWeights) -> None:
        self._spec = spec
        self._ops = ops
        names = ["q_a_proj.weight", "kv_a_proj_with_mqa.weight"]
        if spec.indexer is not None:
            names.append("indexer.wk.weight")
        inputs = [weights.loaded(name) for name in names]
        self._widths = [weight.shape[0] for weight in inputs]
        self._inputs = ops.pack_linear(over_each_other(inputs))
        self._query_norm = weights["q_a_layernorm.weight"]
        self._latent_norm = weights["kv_a_layernorm.weight"]
        self._query = ops.pack_linear(weights.loaded("q_b_proj.weight"))
        per_head = weights["kv_b_proj.weight"].view(spec.num_heads, spec.nope_dim + spec.v_dim, spec.kv_lora_rank)
        self._kv_b = ops.pack_kv_b(per_head[:, : spec.nope_dim], per_head[:, spec.nope_dim :])
        self._output = ops.pack_linear(weights.loaded("o_proj.weight"))
        self._indexer = None if spec.indexer is None else Indexer(spec.indexer, ops, weights.under("indexer."))

    def write(self, x_RH: Tensor, planes: LayerPlanes, step: Step) -> Projected:
        """Compute and store the rows' latent and index entries."""
        eps = self._spec.rms_norm_eps
        query_RQ, kv_RC, *rest = torch.split(self._ops.linear(x_RH, self._inputs), self._widths, dim=-1)
        if self._indexer is not None and self._ops.enter is not None:
            (key_RD,) = rest
            key_norm, key_eps, interleaved = self._indexer.key_form
            query_latent_RQ = self._ops.enter(
                query_RQ, self._query_norm, planes.latent, kv_RC, self._latent_norm, _required(planes.index), key_RD,
                key_norm, eps, key_eps, step.plan, interleaved=interleaved,
            )  # fmt: skip
            return Projected(x_RH, query_latent_RQ)
        self._ops.write_latent(planes.latent, kv_RC, self._latent_norm, eps, step.plan)
        if self._indexer is not None:
            (key_RD,) = rest
            self._indexer.write_keys(key_RD, _required(planes.index), step)
        return Projected(x_RH, self._ops.rms_norm(query_RQ, self._query_norm, eps))

    def attend(self, rows: Projected, planes: LayerPlanes, step: Step) -> Tensor:
        """Attention output [R, H] of rows that `write` has stored."""
        spec, ops = self._spec, self._ops
        chosen: Selection = None
        if self._indexer is not None and self._indexer.leaves_out(step):
            index = _required(planes.index)
            chosen = ops.beside(partial(self._indexer.select, rows.x_RH, rows.query_latent_RQ, index, step))
        query_RhE = ops.linear(rows.query_latent_RQ, self._query).view(-1, spec.num_heads, spec.qk_dim)
        heads_RhV = ops.mla_attend(query_RhE, planes.latent, step.plan, chosen, self._kv_b, spec.softmax_scale)
        return ops.linear(heads_RhV, self._output)


def _required(plane: Tensor | None) -> Tensor:
    if plane is None:
        raise ValueError("the model has an indexer but the KV store has no index plane; plan the layout from its spec")
    return plane
