"""The least time a card needs for a pass of the model: bytes it must read, operations it must do.

Weights count one byte where they may be fp8, cache rows 656 and 132 bytes. Experts are those that uniform routing wakes
on average; the rows of one sequence are taken to select the same cache rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_engine.models.spec import IndexerSpec, ModelSpec

_LATENT_BYTES, _INDEX_BYTES = 656, 132
# Milliseconds a step, drafts aside, that eight layers should take on an H200.
_TARGETS_MS = {(1, 1024): 2.1, (1, 65536): 2.3, (16, 8192): 9.8, (64, 4096): 18.5, (128, 2048): 23.9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Measured rates: bytes/s of memory, operations/s of bf16 and fp8 products."""

    bytes_per_s: float = 4.27e12
    bf16_per_s: float = 793e12
    fp8_per_s: float = 1335e12


def _attention_params(spec: ModelSpec) -> int:
    """Linear weights of one layer's attention, indexer included."""
    heads, rank, query = spec.num_heads, spec.kv_lora_rank, spec.q_lora_rank
    inputs = spec.hidden_size * (query + spec.latent_dim)
    per_head = query * spec.qk_dim + rank * (spec.nope_dim + spec.v_dim) + spec.v_dim * spec.hidden_size
    return inputs + heads * per_head + _indexer_params(spec)


def _indexer_params(spec: ModelSpec) -> int:
    if spec.indexer is None:
        return 0
    heads, dim = spec.indexer.num_heads, spec.indexer.head_dim
    return spec.q_lora_rank * heads * dim + spec.hidden_size * (dim + heads)


def _expert_params(spec: ModelSpec) -> int:
    return 3 * spec.hidden_size * spec.moe.intermediate


def _moe_layers(spec: ModelSpec) -> int:
    return sum(spec.is_moe(layer) for layer in range(spec.num_layers))


def _dense_params(spec: ModelSpec) -> int:
    """Linear weights every row passes through: attention, dense MLPs, shared experts."""
    moe = _moe_layers(spec)
    mlps = (spec.num_layers - moe) * 3 * spec.hidden_size * spec.dense_intermediate
    return spec.num_layers * _attention_params(spec) + mlps + moe * spec.moe.num_shared * _expert_params(spec)


def decode_bytes(spec: ModelSpec, batch: int, context: int, rows_per_seq: int = 1) -> float:
    """Bytes of one decode pass of `batch` sequences with `context` tokens each, drafts not counted."""
    moe, layers = spec.moe, _moe_layers(spec)
    gates, head = layers * moe.num_experts * spec.hidden_size, spec.vocab_size * spec.hidden_size
    woken = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** (batch * rows_per_seq))
    weights = _dense_params(spec) + 2 * (gates + head) + layers * woken * _expert_params(spec)
    seen = context if spec.indexer is None else min(context, spec.indexer.topk)
    scored = _scored(spec.indexer, context)
    return weights + batch * spec.num_layers * (_LATENT_BYTES * seen + _INDEX_BYTES * scored)


def target_ms(spec: ModelSpec, batch: int, context: int) -> float | None:
    """Milliseconds that a decode step is wanted to take, where that was laid down."""
    return _TARGETS_MS.get((batch, context)) if spec.num_layers == 8 else None


def prefill_seconds(spec: ModelSpec, card: Card, batch: int, context: int) -> float:
    """Time of the operations of a prompt's prefill: linear and indexer in fp8, attention in bf16."""
    active = _dense_params(spec) + _moe_layers(spec) * spec.moe.top_k * _expert_params(spec)
    linear = 2 * active * context + 2 * spec.vocab_size * spec.hidden_size
    topk = context if spec.indexer is None else min(spec.indexer.topk, context)
    expanded = 2 * spec.num_heads * (spec.qk_dim + spec.v_dim)
    absorbed = 2 * spec.num_heads * (2 * spec.kv_lora_rank + spec.rope.dim)
    attention = spec.num_layers * (expanded * _up_to(topk) + absorbed * topk * (context - topk))
    scores = 0.0
    if spec.indexer is not None:
        per_key = 2 * spec.indexer.num_heads * spec.indexer.head_dim
        scores = spec.num_layers * per_key * (_up_to(context) - _up_to(topk))
    return batch * ((linear + scores) / card.fp8_per_s + attention / card.bf16_per_s)


def _scored(indexer: IndexerSpec | None, context: int) -> int:
    return context if indexer is not None and context > indexer.topk else 0


def _up_to(count: int) -> float:
    """1 + 2 + … + count."""
    return count * (count + 1) / 2
