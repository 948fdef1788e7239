"""SwiGLU MLPs: dense, and routed experts in row tiles.

Rows are sorted by expert into tiles of TILE_ROWS rows of one expert, so that every product has one fixed shape. The
first tiles of all experts run as one batched product when many experts are active; further tiles run expert by expert.
A shared expert of the routed experts' width is one more expert that every row chooses last, with weight one.

Shapes: R rows, H hidden, E experts, F expert width, K chosen, t tiles, M = TILE_ROWS.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_engine.ops_cpu import rows
from llm_engine.ops_cpu.gemm import TILE_ROWS, Gemm, PackedProduct

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedMlp:
    """Gate and up projection over each other, then down. The weights are kept for merging with routed experts."""

    gate_up: PackedProduct
    down: PackedProduct
    gate_up_2FH: Tensor
    down_HF: Tensor

    @classmethod
    def pack(cls, gemm: Gemm, gate_up_2FH: Tensor, down_HF: Tensor, dtype: torch.dtype) -> PackedMlp:
        return cls(gemm.linear(gate_up_2FH, torch.float32), gemm.linear(down_HF, dtype), gate_up_2FH, down_HF)


def mlp(x_RH: Tensor, packed: PackedMlp) -> Tensor:
    """See `llm_engine.ops.spec.Mlp`."""
    return packed.down(rows.silu_mul(packed.gate_up(x_RH)))


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Experts as [E, in, out] stacks in fp32. `merged`: the last one is the shared expert."""

    gate_up_EH2F: Tensor
    down_EFH: Tensor
    merged: bool
    shared: PackedMlp | None

    @classmethod
    def pack(cls, gate_up_E2FH: Tensor, down_EHF: Tensor, shared: PackedMlp | None) -> PackedExperts:
        merged = shared is not None and shared.gate_up_2FH.shape == gate_up_E2FH.shape[1:]
        if merged and shared is not None:
            gate_up_E2FH = torch.cat([gate_up_E2FH, shared.gate_up_2FH[None]])
            down_EHF = torch.cat([down_EHF, shared.down_HF[None]])
        return cls(_in_out(gate_up_E2FH), _in_out(down_EHF), merged, None if merged else shared)


def _in_out(weight_EOI: Tensor) -> Tensor:
    return weight_EOI.float().transpose(1, 2).contiguous()


def moe(x_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor, packed: PackedExperts) -> Tensor:
    """See `llm_engine.ops.spec.Moe`."""
    experts = packed.gate_up_EH2F.shape[0]
    ids = ids_RK.numpy()
    if packed.merged:
        ids = np.concatenate([ids, np.full((len(ids), 1), experts - 1)], axis=1)
        weights_RK = torch.nn.functional.pad(weights_RK, (0, 1), value=1.0)
    layout = TileLayout.of(ids, experts)
    x = x_RH.float().index_select(0, torch.from_numpy(layout.row_of_slot)).view(-1, TILE_ROWS, x_RH.shape[1])
    gate_up = _by_expert(x, packed.gate_up_EH2F, layout)
    down = _by_expert(rows.silu_mul(gate_up), packed.down_EFH, layout)
    chosen_RKH = down.view(-1, x_RH.shape[1]).index_select(0, torch.from_numpy(layout.slot_of_choice))
    out_RH = torch.bmm(weights_RK.unsqueeze(1), chosen_RKH.view(*ids.shape, -1)).squeeze(1).to(x_RH.dtype)
    return out_RH if packed.shared is None else out_RH.add_(mlp(x_RH, packed.shared))


@dataclass(frozen=True, slots=True)
class TileLayout:
    """Which row stands in which slot of which expert's tiles."""

    row_of_slot: Ints  # [t · M]; unused slots hold row 0
    slot_of_choice: Ints  # [R · K]
    batched: bool  # tile e of the first E is the first of expert e
    runs: list[tuple[int, int, int]]  # (expert, first tile, end) of the tiles not covered by `batched`

    @classmethod
    def of(cls, ids_RK: Ints, experts: int) -> TileLayout:
        choices = ids_RK.reshape(-1)
        order = np.argsort(choices, kind="stable")
        counts = np.bincount(choices, minlength=experts)
        tiles = -(-counts // TILE_ROWS)
        batched = 2 * int(np.count_nonzero(tiles)) >= experts
        head = 1 if batched else 0  # tiles of an expert that stand in the batched part
        rest = np.maximum(tiles - head, 0)
        ends = np.cumsum(rest) + head * experts
        starts = ends - rest
        sorted_ids = choices[order]
        rank = np.arange(len(order)) - (np.cumsum(counts) - counts)[sorted_ids]
        tile = starts[sorted_ids] + rank // TILE_ROWS - head
        if batched:
            tile = np.where(rank < TILE_ROWS, sorted_ids, tile)
        slots = tile * TILE_ROWS + rank % TILE_ROWS
        row_of_slot = np.zeros(int(ends[-1]) * TILE_ROWS, dtype=np.int64)
        row_of_slot[slots] = order // ids_RK.shape[1]
        slot_of_choice = np.empty_like(slots)
        slot_of_choice[order] = slots
        active = np.flatnonzero(rest).tolist()
        runs = [(expert, int(starts[expert]), int(ends[expert])) for expert in active]
        return cls(row_of_slot, slot_of_choice, batched, runs)


def _by_expert(x_tMI: Tensor, weight_EIO: Tensor, layout: TileLayout) -> Tensor:
    """Every tile times its expert's matrix."""
    experts, _, out = weight_EIO.shape
    y_tMO = x_tMI.new_empty(*x_tMI.shape[:2], out)
    if layout.batched:
        torch.bmm(x_tMI[:experts], weight_EIO, out=y_tMO[:experts])
    for expert, first, end in layout.runs:
        weight = weight_EIO[expert].expand(end - first, -1, -1)
        torch.bmm(x_tMI[first:end], weight, out=y_tMO[first:end])
    return y_tMO
