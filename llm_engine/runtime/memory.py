"""How much of a card a worker takes: weights, the largest pass, recorded passes, and caches in what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llm_engine.api.config import ClusterConfig
from llm_engine.api.handoff import KvLayout
from llm_engine.models.deepseek_v32 import CausalLM
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import ForwardBatch
from llm_engine.runtime.kv_store import KvStore, place_planes, plan_layout

_TRIAL_BLOCKS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes on the device of one worker. `free`: left to nobody; `total`: of the device, all processes together."""

    weights: int
    activations: int  # peak of the largest pass
    caches: int
    graphs: int
    free: int
    total: int

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name) >> 20}" for name in self.__slots__)
        return f"device memory in MiB: {parts}"


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Bytes of a device that nobody has taken, and all of them."""
    module: Any = torch.get_device_module(device)
    free, total = module.mem_get_info(device)
    return free, total


def taken(device: torch.device) -> int:
    """Bytes of tensors of this process."""
    return torch.accelerator.memory_allocated(device)


@torch.inference_mode()
def trial_pass(
    model: CausalLM, layout: KvLayout, pages: torch.dtype, device: torch.device, num_rows: int, num_drawn: int
) -> int:
    """Run the largest pass over empty caches; returns the bytes it takes at its peak. Compiles most kernels.

    `num_drawn`: rows whose logits are computed.
    """
    planes = [(plane.name, plane.num_layers, plane.block_bytes) for plane in layout.planes]
    store = KvStore.allocate(place_planes(planes, layout.block_tokens, _TRIAL_BLOCKS), pages, device)
    rows_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
    longest = max(model.max_len, num_rows)
    batch = ForwardBatch(
        token_ids_R=rows_R,
        positions_R=rows_R,
        slots_N=rows_R - 1,
        block_tables_SB=torch.zeros(1, -(-longest // layout.block_tokens), dtype=torch.int32, device=device),
        row_starts=(0, num_rows),
        context_lens=(longest,),
    )
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats(device)
    before = taken(device)
    hidden_RH = model.forward(batch, store)
    model.logits(hidden_RH[:num_drawn])
    if model.has_mtp:
        model.draft_logits(model.mtp(batch, hidden_RH, store)[:num_drawn])
    torch.accelerator.synchronize()
    return torch.accelerator.max_memory_allocated(device) - before


def size_caches(
    config: ClusterConfig, spec: ModelSpec, pages: torch.dtype, device: torch.device, activations: int, with_mtp: bool
) -> KvLayout:
    """The layout of caches on a device: `kv.num_blocks`, `kv.memory_mb`, or `kv.memory_fraction` of what is free.

    Raises ConfigError when that is too few blocks, or more than there is.
    """
    torch.accelerator.empty_cache()
    free, _ = free_and_total(device)
    room = int(max(free - activations, 0) * config.kv.memory_fraction)
    if config.kv.memory_mb is not None:
        room = config.kv.memory_mb << 20
    return plan_layout(spec, config.kv, pages, with_mtp=with_mtp, num_bytes=room)
