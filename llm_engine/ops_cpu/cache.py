"""Writing cache rows: norm, rotation and the scatter into the paged planes."""

from __future__ import annotations

from torch import Tensor

from llm_engine.ops_cpu import rows
from llm_engine.ops_cpu.plan import CpuPlan


def write_latent(plane_BPC: Tensor, kv_RC: Tensor, weight_L: Tensor, eps: float, plan: CpuPlan) -> None:
    """See `llm_engine.ops.spec.WriteLatent`."""
    kv_RC = kv_RC.float()
    rank = weight_L.shape[0]
    out_RC = kv_RC.new_empty(kv_RC.shape)
    rows.rms_norm_into(out_RC[:, :rank], kv_RC[:, :rank], weight_L, eps)
    plan.rope.rotate_interleaved(kv_RC[:, None, rank:], out_RC[:, None, rank:])
    _scatter(plane_BPC, out_RC, plan)


def write_index_keys(
    plane_BPD: Tensor,
    key_RD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    plan: CpuPlan,
    *,
    interleaved: bool = False,
) -> None:
    """See `llm_engine.ops.spec.WriteIndexKeys`."""
    key_RD = rows.layer_norm(key_RD, weight_D, bias_D, eps)
    rotate_front(key_RD.unsqueeze(1), plan, interleaved)
    _scatter(plane_BPD, key_RD, plan)


def rotate_front(x_RhD: Tensor, plan: CpuPlan, interleaved: bool) -> None:
    """Rotate the first channels of fp32 rows in place: the indexer's layout, rotated part first."""
    front = x_RhD[..., : plan.rope.width]
    if interleaved:
        plan.rope.rotate_interleaved(front.clone(), front)
    else:
        front.copy_(plan.rope.rotate_half(front))


def _scatter(plane_BPC: Tensor, rows_RC: Tensor, plan: CpuPlan) -> None:
    plane_BPC.view(-1, plane_BPC.shape[-1]).index_copy_(0, plan.slots_N, rows_RC[: plan.num_rows].to(plane_BPC.dtype))
