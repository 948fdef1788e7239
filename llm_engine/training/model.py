"""Baton-nano as a trainable module. Parameters carry the official names, but experts are stacked.

Experts are computed densely and weighted by the gate: at this size that is faster than dispatching tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_engine.models.rope import rope_tables
from llm_engine.models.spec import ModelSpec
from llm_engine.training.attention import Attention, RmsNorm, Step, linear


class DenseMlp(nn.Module):
    """Gated MLP."""

    def __init__(self, hidden: int, width: int, gain: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden, gain)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Gate(nn.Module):
    """Sigmoid gate with group-limited choice. `e_score_correction_bias` balances the experts; `load` counts tokens."""

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self._moe = spec.moe
        self.weight = nn.Parameter(torch.randn(spec.moe.num_experts, spec.hidden_size) * spec.hidden_size**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(spec.moe.num_experts))
        self.register_buffer("load", torch.zeros(spec.moe.num_experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weight of every expert for every token, zero where it is not chosen."""
        moe = self._moe
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            choice = (scores + self.e_score_correction_bias).view(*scores.shape[:-1], moe.num_groups, -1)
            worth = choice.topk(2, -1).values.sum(-1)
            kept = torch.zeros_like(worth).scatter_(-1, worth.topk(moe.top_groups, -1).indices, 1.0)
            choice = choice.masked_fill(kept[..., None] == 0, -torch.inf).flatten(-2)
            chosen = torch.zeros_like(scores).scatter_(-1, choice.topk(moe.top_k, -1).indices, 1.0)
            if self.training:
                self.load += chosen.flatten(0, -2).sum(0)
        weights = scores * chosen
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * moe.scaling

    @torch.no_grad()
    def balance(self, rate: float) -> Tensor:
        """Move the bias towards equal load; returns the largest load over the mean since the last call."""
        mean = self.load.mean()
        self.e_score_correction_bias += rate * torch.sign(mean - self.load)
        worst = self.load.max() / mean.clamp_min(1.0)
        self.load.zero_()
        return worst


class Moe(nn.Module):
    """Routed experts and a shared one."""

    def __init__(self, spec: ModelSpec, gain: float) -> None:
        super().__init__()
        count, width, hidden = spec.moe.num_experts, spec.moe.intermediate, spec.hidden_size
        self.gate = Gate(spec)
        self.gate_proj = nn.Parameter(torch.randn(count, width, hidden) * hidden**-0.5)
        self.up_proj = nn.Parameter(torch.randn(count, width, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(count, hidden, width) * gain * width**-0.5)
        self.shared_experts = DenseMlp(hidden, spec.moe.num_shared * width, gain)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x)
        inner = F.silu(F.linear(x, self.gate_proj.flatten(0, 1))) * F.linear(x, self.up_proj.flatten(0, 1))
        inner = inner.view(*weights.shape, -1) * weights[..., None].to(inner.dtype)
        routed = F.linear(inner.flatten(-2), self.down_proj.transpose(0, 1).flatten(1))
        out: Tensor = routed + self.shared_experts(x)
        return out


class Block(nn.Module):
    """A decoder layer on an fp32 residual stream."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        gain = (2 * spec.num_layers) ** -0.5
        self.input_layernorm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec, gain)
        self.post_attention_layernorm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        dense = not spec.is_moe(layer)
        self.mlp = DenseMlp(spec.hidden_size, spec.dense_intermediate, gain) if dense else Moe(spec, gain)

    def forward(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        attended, loss = self.self_attn(self.input_layernorm(x), step)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), loss


class MtpBlock(Block):
    """The draft layer: joins the hidden state of a position with the token after it."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, spec.num_layers)
        self.enorm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        self.hnorm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        self.eh_proj = linear(2 * spec.hidden_size, spec.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RmsNorm(spec.hidden_size, spec.rms_norm_eps)})

    def draft(self, embedded: Tensor, hidden: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """States whose logits draft the token after next, and the indexer's loss."""
        joined = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))
        out, loss = self(joined.float(), step)
        return self.shared_head["norm"](out), loss


class Body(nn.Module):
    """Embedding, layers and final norm. The last layer is the MTP layer."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.3)
        self.layers = nn.ModuleList([*(Block(spec, layer) for layer in range(spec.num_layers)), MtpBlock(spec)])
        self.norm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(self, ids: Tensor, step: Step) -> tuple[Tensor, list[Tensor]]:
        """Hidden states after the final norm, and the indexers' losses."""
        x, losses = self.embed_tokens(ids), []
        for layer in self.layers[:-1]:
            x, loss = layer(x, step)
            losses.append(loss)
        return self.norm(x), losses

    def draft(self, ids: Tensor, hidden: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The MTP layer's states from the hidden states and the tokens that follow them, and its indexer's loss."""
        mtp = self.layers[-1]
        assert isinstance(mtp, MtpBlock)
        return mtp.draft(self.embed_tokens(F.pad(ids[:, 1:], (0, 1))), hidden, step)


class NanoModel(nn.Module):
    """The whole model."""

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Body(spec)
        self.lm_head = linear(spec.hidden_size, spec.vocab_size, gain=0.3)
        cos, sin = rope_tables(spec.rope, spec.max_position)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, ids: Tensor, segments: Tensor, *, sparse: bool, sampled: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, S, V] for the next token, those of the MTP layer for the one after it, the mean indexer loss.

        `segments` [B, S]: positions see only earlier ones of their own segment. `sparse`, `sampled`: see `Step`.
        """
        step = self._step(segments, sparse, sampled)
        hidden, losses = self.model(ids, step)
        drafted, loss = self.model.draft(ids, hidden, step)
        return self.lm_head(hidden), self.lm_head(drafted), torch.stack([*losses, loss]).mean()

    def gates(self) -> list[Gate]:
        """The gates of all layers."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    def _step(self, segments: Tensor, sparse: bool, sampled: Tensor | None) -> Step:
        length = segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        visible = (segments[:, :, None] == segments[:, None, :]) & causal
        half = torch.bfloat16 if torch.is_autocast_enabled(segments.device.type) else torch.float32
        bias = torch.zeros(visible.shape, dtype=half, device=segments.device).masked_fill_(~visible, -torch.inf)
        return Step(self.cos[:length], self.sin[:length], visible, bias[:, None], sparse, sampled)
