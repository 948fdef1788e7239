"""Lightning indexer: a small attention that picks, for every row, the positions the large one may see.

Shapes: R rows, H hidden, Q query rank, i index heads, D index head width, K chosen.
"""

from __future__ import annotations

from torch import Tensor

from llm_engine.models.layers import LayerWeights, Step
from llm_engine.models.spec import IndexerSpec
from llm_engine.ops import Ops

_KEY_NORM_EPS = 1e-6  # fixed in the released model, whatever rms_norm_eps is


class Indexer:
    """One layer's indexer. Its key projection is part of the attention's fused input projection."""

    def __init__(self, spec: IndexerSpec, ops: Ops, weights: LayerWeights) -> None:
        self._spec = spec
        self._ops = ops
        self._query = ops.pack_linear(weights.loaded("wq_b.weight"))
        self._key_norm = weights["k_norm.weight"], weights["k_norm.bias"]
        # The two constants scale all scores of a row alike; they are kept so that scores compare across engines.
        scale = spec.num_heads**-0.5 * spec.head_dim**-0.5
        self._head_weights = ops.pack_linear(weights["weights_proj.weight"] * scale, fp32=True)

    @property
    def key_form(self) -> tuple[tuple[Tensor, Tensor], float, bool]:
        """What `write_keys` gives the table: weight and bias of the keys' norm, its eps, whether pairs interleave."""
        return self._key_norm, _KEY_NORM_EPS, self._spec.rope_interleave

    def write_keys(self, key_RD: Tensor, plane_BPD: Tensor, step: Step) -> None:
        """Norm, rotate and cache the keys of all rows. Needed on every pass, also when nothing is left out."""
        weight_D, bias_D = self._key_norm
        interleaved = self._spec.rope_interleave
        self._ops.write_index_keys(
            plane_BPD, key_RD, weight_D, bias_D, _KEY_NORM_EPS, step.plan, interleaved=interleaved
        )

    def leaves_out(self, step: Step) -> bool:
        """Whether some row of the batch may see more positions than are chosen."""
        return step.longest > self._spec.topk

    def select(self, x_RH: Tensor, query_latent_RQ: Tensor, plane_BPD: Tensor, step: Step) -> Tensor | None:
        """Positions [R, K] each row attends to, or None when no row of the batch has to leave any out."""
        spec = self._spec
        if not self.leaves_out(step):
            return None
        query_RiD = self._ops.linear(query_latent_RQ, self._query).view(-1, spec.num_heads, spec.head_dim)
        g_Ri = self._ops.linear(x_RH, self._head_weights)
        return self._ops.index_topk(query_RiD, g_Ri, plane_BPD, step.plan, spec.topk, interleaved=spec.rope_interleave)
