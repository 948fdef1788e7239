"""DeepSeek V3.2, and V3 as its special case without an indexer.

Shapes: R rows (padding included), H hidden, V vocabulary. Rows that pad a batch carry meaningless values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llm_engine.api.errors import ConfigError
from llm_engine.models.checkpoint import EMBED, FINAL_NORM, HEAD, Weights, layer_prefix
from llm_engine.models.decoder_layer import DecoderLayer
from llm_engine.models.layers import Caches, Head, LayerWeights, Step
from llm_engine.models.mtp import MtpLayer
from llm_engine.models.rope import rope_tables
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import ForwardBatch, Ops


class CausalLM:
    """A model ready to run. Holds weights and tables only: caches belong to the store that every call is given.

    Positions from `max_len` on have no rotary table and must not occur in a batch.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, ops: Ops, max_len: int) -> None:
        self.spec = spec
        self.max_len = max_len
        self._ops = ops
        whole = LayerWeights(weights.tensors, "")
        self._embedding_VH = whole[EMBED]
        cos_TJ, sin_TJ = rope_tables(spec.rope, max_len)
        self._rope_tables = cos_TJ.to(self._embedding_VH.device), sin_TJ.to(self._embedding_VH.device)
        self._layers = [
            DecoderLayer(spec, ops, whole.under(layer_prefix(layer)), layer) for layer in range(spec.num_layers)
        ]
        self._final_norm = whole[FINAL_NORM]
        self._head = Head(ops, whole[HEAD], spec.num_tokens)
        self._mtp = None
        if weights.has_mtp:
            mtp_weights = whole.under(layer_prefix(spec.num_layers))
            self._mtp = MtpLayer(spec, ops, mtp_weights, self._embedding_VH, self._head)

    @property
    def row_tile(self) -> int:
        """A batch holds a multiple of this many rows."""
        return self._ops.row_tile

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self._ops.dtype

    @property
    def has_mtp(self) -> bool:
        """Whether the draft layer is loaded."""
        return self._mtp is not None

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, store: Caches, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """Hidden states [R, H] after the final norm. `on_layer(l)` is called once layer l's cache rows are stored."""
        step = self._step(batch, store)
        delta_RH, residual_RH = torch.nn.functional.embedding(batch.token_ids_R, self._embedding_VH), None
        for index, (layer, planes) in enumerate(zip(self._layers, store.layers, strict=True)):
            on_written = None if on_layer is None else partial(on_layer, index)
            delta_RH, residual_RH = layer(delta_RH, residual_RH, planes, step, on_written)
        assert residual_RH is not None, "a model has at least one layer"
        return self._ops.add_rms_norm(delta_RH, residual_RH, self._final_norm, self.spec.rms_norm_eps)[0]

    @torch.inference_mode()
    def logits(self, hidden_MH: Tensor) -> Tensor:
        """fp32 logits [M, V] of any rows of `forward`'s result; ids beyond the tokenizer are -inf."""
        return self._head(hidden_MH)

    @torch.inference_mode()
    def mtp(self, batch: ForwardBatch, hidden_RH: Tensor, store: Caches) -> Tensor:
        """One draft pass: row i holds token i + 1 at position i, `hidden_RH` the state of position i.

        The state is `forward`'s result, or this function's own for a chained draft. Returns [R, H] for
        `draft_logits`, whose winner is the drafted token i + 2. Writes the MTP planes of the store.
        Raises ValueError when the model or the store has no MTP layer.
        """
        if self._mtp is None or store.mtp is None:
            raise ValueError("no MTP layer: load the weights and plan the layout with it, or set engine.num_drafts=0")
        return self._mtp(batch.token_ids_R, hidden_RH, store.mtp, self._step(batch, store))

    @torch.inference_mode()
    def draft_logits(self, hidden_MH: Tensor) -> Tensor:
        """fp32 logits [M, V] of any rows of `mtp`'s result."""
        return self._head(hidden_MH) if self._mtp is None else self._mtp.head(hidden_MH)

    def _step(self, batch: ForwardBatch, store: Caches) -> Step:
        cos_TJ, sin_TJ = self._rope_tables
        plan = self._ops.plan(batch, block_tokens=store.block_tokens, cos_TJ=cos_TJ, sin_TJ=sin_TJ)
        return Step(plan, max(batch.context_lens, default=0))


def build_model(spec: ModelSpec, weights: Weights, ops: Ops, max_len: int | None = None) -> CausalLM:
    """Lay the weights out for one kernel table, for contexts of up to `max_len` tokens (None: the model's own limit).

    Raises ConfigError when the model cannot serve that length.
    """
    if max_len is not None and max_len > spec.max_position:
        raise ConfigError(f"model.max_len={max_len}: the model's max_position_embeddings is {spec.max_position}")
    return CausalLM(spec, weights, ops, max_len or spec.max_position)
