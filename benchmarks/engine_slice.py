"""A slice of the real model: full width, few layers, weights drawn on the device, no checkpoint.

Drawn weights would send every row to the same few experts, so the gate's logits are replaced: by noise (uniform
routing) or by the experts of a recorded trace. The gate itself still runs.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from llm_engine.models.checkpoint import TensorInfo, Weights, expected_tensors
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import GateConfig, Ops

_NOISES = 16  # different routings, taken in turn
_FULL: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"], "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048, "num_nextn_predict_layers": 1,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 163840, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip


def slice_spec(num_layers: int) -> ModelSpec:
    """The first layers of the real model, one of them dense, and its MTP layer."""
    return ModelSpec.from_config(_FULL | {"num_hidden_layers": num_layers}, where="the slice")


class DrawnTensors(Mapping[str, Tensor]):
    """Every tensor of a model, drawn anew, always the same, when it is asked for: only what is packed stays."""

    def __init__(self, spec: ModelSpec, ops: Ops, *, with_mtp: bool) -> None:
        self._infos = expected_tensors(spec, with_mtp=with_mtp)
        self._ops = ops

    def __getitem__(self, name: str) -> Tensor:
        info = self._infos[name]
        dtype = torch.float32 if info.exact else self._ops.dtype
        if len(info.shape) == 1:
            return torch.full(info.shape, float(name.endswith("weight")), dtype=dtype, device=self._ops.device)
        generator = torch.Generator(self._ops.device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.empty(info.shape, dtype=dtype, device=self._ops.device)
        return drawn.normal_(std=_spread(info), generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def _spread(info: TensorInfo) -> float:
    """Keeps rows at about their size."""
    return float(info.shape[-1] ** -0.5)


def drawn_weights(spec: ModelSpec, ops: Ops, *, with_mtp: bool) -> Weights:
    """Weights for `build_model`."""
    return Weights(DrawnTensors(spec, ops, with_mtp=with_mtp), "drawn", has_mtp=with_mtp)


def routed(ops: Ops, spec: ModelSpec, max_rows: int, trace: Tensor | None) -> Ops:
    """The same table, routing rows uniformly, or like rows of `trace` [T, K] (expert ids) drawn at random."""
    experts = spec.moe.num_experts
    generator = torch.Generator(ops.device).manual_seed(0)
    noises = torch.randn(_NOISES, max_rows, experts, generator=generator, device=ops.device)
    if trace is not None:
        rows = torch.randint(len(trace), (_NOISES, max_rows), generator=generator, device=ops.device)
        noises = noises.fill_(-10.0).scatter_(2, trace.to(ops.device).long()[rows], 10.0)
    turns = cycle(noises)

    def gate(logits_RE: Tensor, bias_E: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
        # A trace has already been through the limit on groups; uniform routing goes through it here.
        if trace is not None:
            config = dataclasses.replace(config, num_groups=1, top_groups=1)
        return ops.gate(next(turns)[: len(logits_RE)], bias_E, config)

    return dataclasses.replace(ops, gate=gate)


@dataclass(frozen=True, slots=True)
class Planes:
    """The cache planes of one layer."""

    latent: Tensor
    index: Tensor | None


@dataclass(frozen=True, slots=True)
class SliceCaches:
    """Caches of every layer, in full or in fp8 pages."""

    block_tokens: int
    layers: tuple[Planes, ...]
    mtp: Planes | None

    @property
    def num_bytes(self) -> int:
        """Of all planes."""
        planes = [*self.layers, *([] if self.mtp is None else [self.mtp])]
        tensors = [tensor for pair in planes for tensor in (pair.latent, pair.index) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @classmethod
    def allocate(
        cls, spec: ModelSpec, ops: Ops, blocks: int, block_tokens: int, *, fp8: bool, mtp: bool
    ) -> SliceCaches:
        """`fp8`: latent rows of 656 bytes and index rows of 132, at the real model's widths."""
        latent, index = spec.latent_dim, 0 if spec.indexer is None else spec.indexer.head_dim
        dtype = ops.dtype
        if fp8:
            latent, index = spec.kv_lora_rank + spec.kv_lora_rank // 32 + 2 * spec.rope.dim, index and index + 4
            dtype = torch.uint8

        def planes() -> Planes:
            shapes = [(blocks, block_tokens, width) for width in (latent, index)]
            first, second = (torch.zeros(shape, dtype=dtype, device=ops.device) for shape in shapes)
            return Planes(first, second if index else None)

        return cls(block_tokens, tuple(planes() for _ in range(spec.num_layers)), planes() if mtp else None)
