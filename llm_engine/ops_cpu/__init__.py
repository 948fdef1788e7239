"""Kernels in torch for any CPU: the reference of every other backend, and the backend of a machine without a card."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from llm_engine.ops import Ops
from llm_engine.ops.fp8 import Weight, in_full
from llm_engine.ops.spec import nothing_to_warm_up
from llm_engine.ops_cpu import mla, mla_free, moe, moe_free
from llm_engine.ops_cpu import plan as exact_plan
from llm_engine.ops_cpu.cache import write_index_keys, write_latent
from llm_engine.ops_cpu.gate import gate
from llm_engine.ops_cpu.gemm import TILE_ROWS, FreeGemm, Gemm, PackedProduct, TiledGemm
from llm_engine.ops_cpu.index_topk import index_topk
from llm_engine.ops_cpu.jit import compile_kernels
from llm_engine.ops_cpu.mlp import PackedMlp, mlp
from llm_engine.ops_cpu.norm import add_rms_norm, rms_norm
from llm_engine.ops_cpu.self_check import check_products


def build(numerics: Literal["exact", "fast"], dtype: torch.dtype) -> Ops:
    """The CPU table. Kernels compute in fp32 from weights and caches of `dtype`, unless they say otherwise."""
    compile_kernels(dtype)
    exact = numerics == "exact"
    free = FreeGemm(dtype)
    gemm: Gemm = TiledGemm() if exact else free
    bf16_experts = not exact and free.has_bf16

    def pack_linear(weight_OI: Weight, *, fp32: bool = False) -> PackedProduct:
        return gemm.linear(in_full(weight_OI), torch.float32 if fp32 else dtype)

    def pack_mlp(gate_up_2FH: Weight, down_HF: Weight) -> PackedMlp:
        return PackedMlp.pack(gemm, in_full(gate_up_2FH), in_full(down_HF), dtype)

    return Ops(
        name=f"cpu/{numerics}/{str(dtype).removeprefix('torch.')}",
        dtype=dtype,
        row_tile=TILE_ROWS if exact else 1,
        pack_linear=pack_linear,
        linear=_apply,
        pack_mlp=pack_mlp,
        mlp=mlp,
        pack_experts=partial(moe_free.pack_experts, gemm) if bf16_experts else moe.pack_experts,
        gate=gate,
        moe=moe_free.moe if bf16_experts else moe.moe,
        rms_norm=partial(rms_norm, dtype=dtype),
        add_rms_norm=partial(add_rms_norm, dtype=dtype),
        plan=exact_plan.plan if exact else mla_free.plan,
        write_latent=write_latent,
        write_index_keys=write_index_keys,
        index_topk=index_topk,
        pack_kv_b=partial(mla.PackedKvB.pack, gemm) if exact else partial(mla_free.FreeKvB.pack, gemm, dtype),
        mla_attend=mla.mla_attend if exact else mla_free.mla_attend,
        self_check=partial(check_products, gemm) if exact else _nothing_to_check,
        warm_up=nothing_to_warm_up if exact else free.warm_up,
    )


def _apply(x_RI: Tensor, packed: PackedProduct) -> Tensor:
    return packed(x_RI.flatten(1))


def _nothing_to_check() -> None:
    """`fast` promises closeness only."""
