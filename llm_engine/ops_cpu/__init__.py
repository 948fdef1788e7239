"""Kernels in torch for any CPU: the reference of every other backend, and the backend of a machine without a card."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from llm_engine.ops import Ops
from llm_engine.ops_cpu import mla, mla_expanded
from llm_engine.ops_cpu.cache import write_index_keys, write_latent
from llm_engine.ops_cpu.gate import gate
from llm_engine.ops_cpu.gemm import TILE_ROWS, FreeGemm, Gemm, PackedProduct, TiledGemm
from llm_engine.ops_cpu.index_topk import index_topk
from llm_engine.ops_cpu.jit import compile_kernels
from llm_engine.ops_cpu.moe import PackedExperts, PackedMlp, mlp, moe
from llm_engine.ops_cpu.norm import add_rms_norm, rms_norm
from llm_engine.ops_cpu.plan import plan
from llm_engine.ops_cpu.self_check import check_products


def build(numerics: Literal["exact", "fast"], dtype: torch.dtype) -> Ops:
    """The CPU table. Kernels compute in fp32 from weights and caches of `dtype`, unless they say otherwise."""
    compile_kernels(dtype)
    gemm: Gemm = TiledGemm() if numerics == "exact" else FreeGemm()

    def pack_linear(weight_OI: Tensor, *, fp32: bool = False) -> PackedProduct:
        return gemm.linear(weight_OI, torch.float32 if fp32 else dtype)

    def pack_mlp(gate_up_2FH: Tensor, down_HF: Tensor) -> PackedMlp:
        return PackedMlp.pack(gemm, gate_up_2FH, down_HF, dtype)

    def pack_experts(gate_up_E2FH: Tensor, down_EHF: Tensor, *, shared: PackedMlp | None = None) -> PackedExperts:
        return PackedExperts.pack(gate_up_E2FH, down_EHF, shared)

    return Ops(
        name=f"cpu/{numerics}/{str(dtype).removeprefix('torch.')}",
        dtype=dtype,
        row_tile=TILE_ROWS if numerics == "exact" else 1,
        pack_linear=pack_linear,
        linear=_apply,
        pack_mlp=pack_mlp,
        mlp=mlp,
        pack_experts=pack_experts,
        gate=gate,
        moe=moe,
        rms_norm=partial(rms_norm, dtype=dtype),
        add_rms_norm=partial(add_rms_norm, dtype=dtype),
        plan=plan,
        write_latent=write_latent,
        write_index_keys=write_index_keys,
        index_topk=index_topk,
        pack_kv_b=partial(mla.PackedKvB.pack if numerics == "exact" else mla_expanded.BothKvB.pack, gemm),
        mla_attend=mla.mla_attend if numerics == "exact" else mla_expanded.mla_attend,
        self_check=partial(check_products, gemm) if numerics == "exact" else _nothing_to_check,
    )


def _apply(x_RI: Tensor, packed: PackedProduct) -> Tensor:
    return packed(x_RI)


def _nothing_to_check() -> None:
    """`fast` promises closeness only."""
