"""Trainable multi-head latent attention with its lightning indexer, in expanded form.

Shapes: B rows of a batch, S positions, D head width, R positions sampled for the indexer's loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_engine.models.spec import IndexerSpec, ModelSpec

_KEY_NORM_EPS = 1e-6
_INDEX_CHUNK = 1 << 26  # scores of this many (row, position) pairs at a time


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one pass share.

    `visible` [B, S, S] is true where a position may look; `bias` [B, 1, S, S] is the same for the attention kernel.
    `sparse`: attend to the indexer's choice only. `sampled` [R]: positions at which the indexer learns, None: nowhere.
    """

    cos: Tensor
    sin: Tensor
    visible: Tensor
    bias: Tensor
    sparse: bool
    sampled: Tensor | None


class RmsNorm(nn.Module):
    """RMSNorm in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self._eps)


def linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """A projection without bias that keeps the variance, times `gain`."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=gain * inputs**-0.5)
    return layer


class Indexer(nn.Module):
    """Scores all positions for every position. Its inputs are detached: it learns from its own loss alone."""

    def __init__(self, hidden: int, query_rank: int, spec: IndexerSpec) -> None:
        super().__init__()
        self._heads, self._dim = spec.num_heads, spec.head_dim
        self.wq_b = linear(query_rank, spec.num_heads * spec.head_dim)
        self.wk = linear(hidden, spec.head_dim)
        self.k_norm = nn.LayerNorm(spec.head_dim, eps=_KEY_NORM_EPS)
        self.weights_proj = linear(hidden, spec.num_heads)

    def forward(self, x: Tensor, query_latent: Tensor, step: Step, rows: Tensor | None = None) -> Tensor:
        """Scores [B, S or R, S], fp32, of the positions `rows` (None: all); what is not visible is not masked."""
        cos, sin = step.cos, step.sin
        key = rotate_half(self.k_norm(self.wk(x).float()), cos, sin)
        if rows is not None:
            x, query_latent, cos, sin = x[:, rows], query_latent[:, rows], cos[rows], sin[rows]
        query = self.wq_b(query_latent).unflatten(-1, (self._heads, self._dim)).transpose(1, 2)
        query = rotate_half(query.float(), cos, sin).to(key.dtype)
        gates = self.weights_proj(x).float() * (self._heads**-0.5 * self._dim**-0.5)
        scores = torch.zeros((), device=x.device)
        for head in range(self._heads):
            scores = scores + gates[..., head, None] * (query[:, head] @ key.transpose(1, 2)).relu()
        return scores


class Attention(nn.Module):
    """One layer's attention. `forward` returns its output and the indexer's loss."""

    def __init__(self, spec: ModelSpec, gain: float) -> None:
        super().__init__()
        assert spec.indexer is not None
        self._spec, self._topk = spec, spec.indexer.topk
        heads, hidden = spec.num_heads, spec.hidden_size
        self.q_a_proj = linear(hidden, spec.q_lora_rank)
        self.q_a_layernorm = RmsNorm(spec.q_lora_rank, spec.rms_norm_eps)
        self.q_b_proj = linear(spec.q_lora_rank, heads * spec.qk_dim)
        self.kv_a_proj_with_mqa = linear(hidden, spec.latent_dim)
        self.kv_a_layernorm = RmsNorm(spec.kv_lora_rank, spec.rms_norm_eps)
        self.kv_b_proj = linear(spec.kv_lora_rank, heads * (spec.nope_dim + spec.v_dim))
        self.o_proj = linear(heads * spec.v_dim, hidden, gain)
        self.indexer = Indexer(hidden, spec.q_lora_rank, spec.indexer)

    def forward(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        spec = self._spec
        query_latent = self.q_a_layernorm(self.q_a_proj(x))
        query = self.q_b_proj(query_latent).unflatten(-1, (spec.num_heads, spec.qk_dim)).transpose(1, 2)
        plain, turned = query.split([spec.nope_dim, spec.rope.dim], -1)
        query = torch.cat([plain, rotate_pairs(turned, step.cos, step.sin)], -1)
        latent, shared = self.kv_a_proj_with_mqa(x).split([spec.kv_lora_rank, spec.rope.dim], -1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (spec.num_heads, -1)).transpose(1, 2)
        key, value = expanded.split([spec.nope_dim, spec.v_dim], -1)
        shared = rotate_pairs(shared, step.cos, step.sin)[:, None].expand(-1, spec.num_heads, -1, -1)
        key = torch.cat([key, shared], -1)
        chosen, bias = step.visible, step.bias
        if step.sparse:
            chosen = self._choose(x, query_latent, step)
            bias = torch.zeros_like(bias).masked_fill_(~chosen[:, None], -torch.inf)
        out = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), scale=spec.softmax_scale)
        loss = self._index_loss(x, query_latent, query, key, chosen, step)
        return self.o_proj(out.transpose(1, 2).flatten(2)), loss

    @torch.no_grad()
    def _choose(self, x: Tensor, query_latent: Tensor, step: Step) -> Tensor:
        """[B, S, S], true at the visible positions with the highest scores."""
        per_pass = max(1, _INDEX_CHUNK // x.shape[1] ** 2)
        chosen = torch.zeros_like(step.visible)
        for first in range(0, x.shape[0], per_pass):
            part = slice(first, first + per_pass)
            scores = self.indexer(x[part], query_latent[part], step)
            scores.masked_fill_(~step.visible[part], -torch.inf)
            best = scores.topk(min(self._topk, scores.shape[-1]), -1, sorted=False).indices
            chosen[part].scatter_(-1, best, True)
        return chosen & step.visible

    def _index_loss(
        self, x: Tensor, query_latent: Tensor, query: Tensor, key: Tensor, chosen: Tensor, step: Step
    ) -> Tensor:
        """KL divergence from the heads' mean attention to the indexer's, at sampled positions."""
        if step.sampled is None:
            return torch.zeros((), device=x.device)
        allowed = chosen[:, step.sampled]
        with torch.no_grad():
            weights = (query[:, :, step.sampled] @ key.transpose(2, 3)).float() * self._spec.softmax_scale
            target = weights.masked_fill(~allowed[:, None], -torch.inf).softmax(-1).mean(1)
        scores = self.indexer(x.detach(), query_latent.detach(), step, step.sampled)
        logs = scores.masked_fill(~allowed, -torch.inf).log_softmax(-1).masked_fill(~allowed, 0.0)
        loss: Tensor = (target * (target.clamp_min(1e-9).log() - logs)).sum(-1).mean()
        return loss


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring channels; `cos`, `sin` [S, D / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first 2J channels in half-split layout; `cos`, `sin` [S, J]."""
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
