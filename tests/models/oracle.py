"""transformers as the oracle: logits, the margins of its discrete choices, its MTP layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v32.modeling_deepseek_v32 import apply_rotary_pos_emb

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-4
MAX_OUTLIERS = 0.02
NEAR_TIE = 1e-5  # scores are O(1): engines that round differently may choose differently below this


@dataclass
class Reference:
    """One pass of the oracle: logits [T, V], hidden states [T, H] and how close any choice of a row was."""

    logits: Tensor
    hidden: Tensor
    margins: Tensor  # [T]: the smallest gap between a chosen and a rejected score, over layers, experts and positions


@dataclass
class Oracle:
    """A checkpoint loaded by transformers in fp32."""

    path: Path
    _margins: list[Tensor] = field(default_factory=list)

    @cached_property
    def model(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        for name, module in model.named_modules():
            if name.endswith("self_attn.indexer"):
                module.register_forward_hook(self._watch_indexer)
            elif name.endswith("mlp.gate"):
                module.register_forward_hook(self._watch_gate)
        return model

    @torch.no_grad()
    def run(self, ids: Sequence[int]) -> Reference:
        self._margins.clear()
        out = self.model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        margins = torch.stack([m.reshape(-1) for m in self._margins]).amin(0)
        assert margins.min() > -NEAR_TIE, "the recomputed scores are not those the oracle chose by"
        return Reference(out.logits[0], out.hidden_states[-1][0], margins)

    @torch.no_grad()
    def mtp(self, next_ids: Sequence[int], hidden: Tensor) -> Tensor:
        """States [T, H] of the MTP layer for tokens `next_ids` after hidden states [T, H]."""
        count = len(next_ids)
        layer = self._mtp
        positions = torch.arange(1, count + 1)[None]  # its convention: the position of the token, not of the state
        causal = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
        layer.create_masks_for_mtp_layer = lambda *_args, **_kwargs: {"attention_mask": causal}
        out: Tensor = layer.forward_layer(0, hidden[None], positions, None, input_ids=torch.tensor([next_ids]))
        return out[0]

    @cached_property
    def _mtp(self) -> Any:
        model = self.model
        config = model.config
        config.num_mtp_layers, config.mtp_layer_types, config.mtp_mlp_layer_types = 1, ["full_attention"], ["sparse"]
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config.num_hidden_layers}\."]
        mtp = MtpModel.from_pretrained(model).eval()
        mtp.config.layer_types = ["indexed_attention"]
        return mtp

    def _watch_indexer(self, module: Any, args: tuple[Any, ...], chosen: Tensor) -> None:
        """Recompute the scores behind a top-k, to see how close the decision was."""
        hidden, query_latent, (cos, sin) = args[:3]
        heads, dim, turned = module.n_heads, module.head_dim, module.qk_rope_head_dim
        query = module.wq_b(query_latent).view(1, -1, heads, dim)
        key = module.k_norm(module.wk(hidden)).unsqueeze(2)
        turned_query, turned_key = apply_rotary_pos_emb(
            query[..., :turned], key[..., :turned], cos, sin, unsqueeze_dim=2
        )
        query = torch.cat([turned_query, query[..., turned:]], -1)[0]
        key = torch.cat([turned_key, key[..., turned:]], -1)[0, :, 0]
        weights = module.weights_proj(hidden)[0] * (heads**-0.5 * dim**-0.5)
        scores = torch.einsum("sh,sht->st", weights, torch.einsum("shd,td->sht", query, key).relu())
        visible = torch.ones_like(scores, dtype=torch.bool).tril()
        self._margins.append(_margin(scores, chosen[0].long(), visible))

    def _watch_gate(self, module: Any, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        """The same for the choice of groups and, within the kept groups, of experts."""
        logits, _, chosen = output
        grouped = (logits.sigmoid() + module.e_score_correction_bias).view(len(logits), module.num_group, -1)
        of_groups = grouped.topk(2, -1).values.sum(-1)
        best = of_groups.topk(module.topk_group, -1).indices
        kept = torch.zeros_like(of_groups, dtype=torch.bool).scatter_(1, best, True)
        allowed = kept[..., None].expand_as(grouped).flatten(1)
        self._margins.append(_margin(of_groups, best, torch.ones_like(kept)))
        self._margins.append(_margin(grouped.flatten(1), chosen, allowed))


def _margin(scores: Tensor, chosen: Tensor, allowed: Tensor) -> Tensor:
    """Worst chosen minus best rejected score of each row, among the allowed ones."""
    picked = torch.zeros_like(allowed).scatter_(1, chosen, True) & allowed
    worst = scores.masked_fill(~picked, torch.inf).amin(1)
    return worst - scores.masked_fill(picked | ~allowed, -torch.inf).amax(1)


def assert_agrees(ours: Tensor, reference: Reference) -> None:
    """Logits [T, ≤ V] equal the reference to rounding, but for a few rows that a choice between near equals explains.

    A choice that went the other way at one row may reach any later row through the caches.
    """
    error = (ours - reference.logits[:, : ours.shape[1]]).abs().amax(1)
    outliers = (error > TOLERANCE).nonzero().flatten()
    if len(outliers):
        assert len(outliers) <= MAX_OUTLIERS * len(error), f"{len(outliers)} of {len(error)} rows differ: {error}"
        closest = reference.margins[: int(outliers[0]) + 1].min()
        assert closest < NEAR_TIE, (
            f"row {int(outliers[0])} differs by {error.max()}, no choice was closer than {closest}"
        )
