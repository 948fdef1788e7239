"""What attention does with its input projection, in one launch: norm the queries, write the latents and index keys.

Shapes: R rows, Q query rank, L latent rank, J rope pairs, C = L + 2J, D index key width.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops_triton.cache import (
    SCALE_GROUP,
    is_fp8,
    put_index_key,
    put_latent_fp8,
    write_index_keys,
    write_latent,
)
from llm_engine.ops_triton.lang import Ptr, await_inputs, kernel, let_next_in, tile_size
from llm_engine.ops_triton.norm import norm_row, rms_norm
from llm_engine.ops_triton.plan import TritonPlan
from llm_engine.ops_triton.quant import BLOCK, carry_rows, empty_rows

_WARPS = 4


def enter(
    query_RQ: Tensor,
    query_norm_Q: Tensor,
    latent_BPC: Tensor,
    kv_RC: Tensor,
    latent_norm_L: Tensor,
    index_BPD: Tensor,
    key_RD: Tensor,
    key_norm: tuple[Tensor, Tensor],
    eps: float,
    key_eps: float,
    plan: TritonPlan,
    *,
    interleaved: bool = False,
    dtype: torch.dtype,
    fp8: bool,
) -> Tensor:
    """See `llm_engine.ops.spec.Enter`. `fp8`: the queries carry their quantised form."""
    (rows, width), rank, pairs = query_RQ.shape, len(latent_norm_L), plan.cos_RJ.shape[1]
    at_once = fp8 and is_fp8(latent_BPC) and is_fp8(index_BPD) and width % BLOCK == 0 and rows == plan.num_rows > 0
    if not at_once:
        write_latent(latent_BPC, kv_RC, latent_norm_L, eps, plan)
        write_index_keys(index_BPD, key_RD, *key_norm, key_eps, plan, interleaved=interleaved)
        return rms_norm(query_RQ, query_norm_Q, eps, dtype, fp8=fp8)
    out_RQ, quantised = query_RQ.new_empty(rows, width, dtype=dtype), empty_rows(rows, width, query_RQ.device)
    key_width = key_RD.shape[1]
    _enter[(rows, 3)](
        query_RQ, query_norm_Q, out_RQ, quantised.values_RI, quantised.scales_GR, latent_BPC, kv_RC, latent_norm_L,
        index_BPD, key_RD, *key_norm, plan.slots_N, plan.cos_RJ, plan.sin_RJ, rows, query_RQ.stride(0), kv_RC.stride(0),
        key_RD.stride(0), eps, key_eps, width, tile_size(width), BLOCK, rank, rank // SCALE_GROUP, SCALE_GROUP, pairs,
        tile_size(pairs), key_width, tile_size(key_width), interleaved, plan.block_tokens, num_warps=_WARPS,
    )  # fmt: skip
    return carry_rows(out_RQ, quantised)


@kernel
def _enter(
    query: Ptr,
    query_norm: Ptr,
    out: Ptr,
    out_values: Ptr,
    out_scales: Ptr,
    latent_plane: Ptr,
    kv: Ptr,
    latent_norm: Ptr,
    index_plane: Ptr,
    key: Ptr,
    key_norm: Ptr,
    key_bias: Ptr,
    slots: Ptr,
    cos: Ptr,
    sin: Ptr,
    num_rows: int,
    query_stride: int,
    kv_stride: int,
    key_stride: int,
    eps: float,
    key_eps: float,
    Q: tl.constexpr,
    Q_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    L: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    J: tl.constexpr,
    J_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    P: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """One of the three for one row."""
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row = tl.program_id(0)
    if tl.program_id(1) == 0:
        norm_row(
            query, query, query_norm, out, out, out_values, out_scales, row.to(tl.int64), num_rows, query_stride, 0,
            eps, Q, Q_TILE, False, True, BLOCK,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        put_latent_fp8(latent_plane, slots, kv, latent_norm, cos, sin, row, kv_stride, eps, L, GROUPS, GROUP, J)
    else:
        put_index_key(
            index_plane, slots, key, key_norm, key_bias, cos, sin, row, key_stride, key_eps, D, D_TILE, J, J_TILE,
            INTERLEAVED, P, True,
        )  # fmt: skip
