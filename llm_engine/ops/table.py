"""One frozen table of kernels. A model is built with one and never asks which hardware it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from llm_engine.ops import spec

_CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """Every kernel a model calls; contracts in `spec`."""

    name: str  # "cpu/exact/fp32": for logs
    dtype: torch.dtype  # compute dtype: activations, weights, caches
    row_tile: int  # a batch holds a multiple of this many rows
    device: torch.device = _CPU  # where weights, caches and batches must lie
    fp8_block: tuple[int, int] | None = None  # weights in fp8 blocks of this size are packed as stored

    pack_linear: spec.PackLinear
    linear: spec.Linear
    pack_mlp: spec.PackMlp
    mlp: spec.Mlp
    pack_experts: spec.PackExperts
    gate: spec.Gate
    moe: spec.Moe
    rms_norm: spec.RmsNorm
    add_rms_norm: spec.AddRmsNorm

    plan: spec.Plan
    write_latent: spec.WriteLatent
    write_index_keys: spec.WriteIndexKeys
    index_topk: spec.IndexTopk
    pack_kv_b: spec.PackKvB
    mla_attend: spec.MlaAttend

    self_check: spec.SelfCheck
    warm_up: spec.WarmUp = spec.nothing_to_warm_up
    enter: spec.Enter | None = None  # None: the three operations that it stands for
    race: spec.Race | None = None  # None: the sampler's own, out of library calls
    capture: spec.Capture = spec.run_again
    beside: spec.Beside = spec.at_once
    pin: spec.Pin = spec.pin_nothing
