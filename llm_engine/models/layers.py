"""What the parts of the model share: access to a layer's weights, the caches they write, the MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llm_engine.ops import AttentionPlan, Ops
from llm_engine.ops.fp8 import Weight, in_full, over_each_other
from llm_engine.ops.spec import PackedLinear, PackedMlp


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights under one name prefix, already in the dtypes of the compute path."""

    tensors: Mapping[str, Weight]
    prefix: str

    def __getitem__(self, name: str) -> Tensor:
        return in_full(self.tensors[self.prefix + name])

    def get(self, name: str) -> Tensor | None:
        weight = self.tensors.get(self.prefix + name)
        return None if weight is None else in_full(weight)

    def loaded(self, name: str) -> Weight:
        """For the pack functions of a table: fp8 blocks where the loader has kept them."""
        return self.tensors[self.prefix + name]

    def under(self, name: str) -> LayerWeights:
        return LayerWeights(self.tensors, self.prefix + name)

    def stacked(self, *names: str) -> Weight:
        """Several [out, in] weights over each other: one multiplication instead of several."""
        return over_each_other([self.loaded(name) for name in names])


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward pass share. `longest`: cached tokens of the batch's longest sequence."""

    plan: AttentionPlan
    longest: int


class LayerPlanes(Protocol):
    """The cache planes of one layer, [blocks, block_tokens, channels]. `index` is None without an indexer."""

    @property
    def latent(self) -> Tensor: ...

    @property
    def index(self) -> Tensor | None: ...


class Caches(Protocol):
    """What the model needs of a KV store."""

    @property
    def block_tokens(self) -> int: ...

    @property
    def layers(self) -> Sequence[LayerPlanes]: ...

    @property
    def mtp(self) -> LayerPlanes | None: ...


def pack_swiglu(ops: Ops, weights: LayerWeights) -> PackedMlp:
    """Lay out the gated MLP under a prefix."""
    return ops.pack_mlp(*swiglu(weights))


def swiglu(weights: LayerWeights) -> tuple[Weight, Weight]:
    """Gate over up [2F, H] and down [H, F] under a prefix."""
    return weights.stacked("gate_proj.weight", "up_proj.weight"), weights.loaded("down_proj.weight")


class DenseMlp:
    """(silu(x·Wgᵀ) ⊙ (x·Wuᵀ)) · Wdᵀ."""

    def __init__(self, ops: Ops, weights: LayerWeights) -> None:
        self._ops = ops
        self._packed = pack_swiglu(ops, weights)

    def __call__(self, x_RH: Tensor) -> Tensor:
        return self._ops.mlp(x_RH, self._packed)


class Head:
    """Hidden states → fp32 logits over the vocabulary; ids that no tokenizer knows get -inf."""

    def __init__(self, ops: Ops, weight_VH: Tensor, num_tokens: int) -> None:
        self._ops = ops
        self._num_tokens = num_tokens
        self._packed: PackedLinear = ops.pack_linear(weight_VH, fp32=True)

    def __call__(self, hidden_RH: Tensor) -> Tensor:
        rows = hidden_RH.shape[0]
        missing = -rows % self._ops.row_tile
        padded_RH = torch.nn.functional.pad(hidden_RH, (0, 0, 0, missing)) if missing else hidden_RH
        logits_RV = self._ops.linear(padded_RH, self._packed)[:rows]
        logits_RV[:, self._num_tokens :] = -torch.inf
        return logits_RV
