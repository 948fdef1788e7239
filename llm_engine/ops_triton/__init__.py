"""Kernels in Triton: for cards that Triton compiles for, and for CPU tensors under TRITON_INTERPRET=1, to test them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from llm_engine.api.errors import ConfigError
from llm_engine.ops import Ops
from llm_engine.ops.spec import at_once, pin_nothing, run_again
from llm_engine.ops_triton import mla
from llm_engine.ops_triton.cache import write_index_keys, write_latent
from llm_engine.ops_triton.capture import CudaCapture, pin
from llm_engine.ops_triton.enter import enter
from llm_engine.ops_triton.gate import gate
from llm_engine.ops_triton.gemm import linear, pack_linear
from llm_engine.ops_triton.index_topk import index_topk
from llm_engine.ops_triton.lang import INTERPRETED
from llm_engine.ops_triton.moe import mlp, moe, pack_experts, pack_mlp
from llm_engine.ops_triton.norm import add_rms_norm, rms_norm
from llm_engine.ops_triton.plan import plan
from llm_engine.ops_triton.quant import BLOCK
from llm_engine.ops_triton.race import race
from llm_engine.ops_triton.self_check import Product, check_products
from llm_engine.ops_triton.tiles import Numerics


def build(numerics: Numerics, dtype: torch.dtype) -> Ops:
    """The Triton table on this machine's accelerator. Raises ConfigError where there is none to run on.

    `dtype` fp8: bf16, with weights in fp8 blocks.
    """
    fp8 = dtype == torch.float8_e4m3fn
    return build_on(_device(), numerics, torch.bfloat16 if fp8 else dtype, fp8=fp8)


def build_on(device: torch.device, numerics: Numerics, dtype: torch.dtype, *, fp8: bool = False) -> Ops:
    """The table for tensors on `device`. `fp8`: weights whose shape allows it are kept in fp8 blocks."""

    def make_product(weight_OI: Tensor) -> Product:
        packed = pack_linear(weight_OI, dtype=dtype, fp8=fp8, numerics=numerics)
        return lambda rows_RI: linear(rows_RI, packed)

    check = partial(check_products, make_product, dtype, device) if numerics == "exact" else _nothing_to_check
    capture = CudaCapture() if device.type == "cuda" else None
    name = str(dtype).removeprefix("torch.")
    return Ops(
        name=f"triton/{numerics}/{name}{'+fp8' if fp8 else ''}",
        dtype=dtype,
        row_tile=1,
        device=device,
        fp8_block=(BLOCK, BLOCK) if fp8 else None,
        pack_linear=partial(pack_linear, dtype=dtype, fp8=fp8, numerics=numerics),
        linear=linear,
        pack_mlp=partial(pack_mlp, dtype=dtype, fp8=fp8, numerics=numerics),
        mlp=mlp,
        pack_experts=partial(pack_experts, fp8=fp8, numerics=numerics),
        gate=gate,
        moe=moe,
        rms_norm=partial(rms_norm, dtype=dtype, fp8=fp8),
        add_rms_norm=partial(add_rms_norm, dtype=dtype, fp8=fp8),
        plan=plan,
        write_latent=write_latent,
        write_index_keys=write_index_keys,
        enter=partial(enter, dtype=dtype, fp8=fp8),
        index_topk=partial(index_topk, numerics=numerics),
        pack_kv_b=partial(mla.pack_kv_b, numerics=numerics),
        mla_attend=partial(mla.mla_attend, fp8=fp8),
        self_check=check,
        race=race,
        capture=run_again if capture is None else capture,
        beside=at_once if capture is None else capture.beside,
        pin=pin if device.type == "cuda" else pin_nothing,
    )


def _device() -> torch.device:
    if INTERPRETED:
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    if device is None:
        raise ConfigError("engine.backend=triton: no accelerator found; use engine.backend=cpu on this machine")
    return torch.device(device.type, torch.accelerator.current_device_index())


def _nothing_to_check() -> None:
    """`fast` promises closeness only."""
