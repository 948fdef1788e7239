"""Routed experts in row tiles.

Rows are dealt into tiles of TILE_ROWS rows of one expert, so that every product has one fixed shape. When many experts
are active, the first tiles of all experts run as one batched product; further tiles run expert by expert. A shared
expert of the routed experts' width is one more expert that every row chooses last, with weight one.

Shapes: R rows, H hidden, E experts, F expert width, K chosen, t tiles, M = TILE_ROWS.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_engine.ops.fp8 import Weight, in_full
from llm_engine.ops_cpu.gemm import TILE_ROWS
from llm_engine.ops_cpu.jit import F2, F2S, I1, I2, ZERO, Floats, Longs, kernel
from llm_engine.ops_cpu.mlp import PackedMlp, mlp, silu_mul


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Experts as [E, in, out] stacks in fp32. `merged`: the last one is the shared expert."""

    gate_up_EH2F: Tensor
    down_EFH: Tensor
    merged: bool
    shared: PackedMlp | None


def pack_experts(
    experts: Iterable[tuple[Weight, Weight]], num_experts: int, *, shared: PackedMlp | None = None
) -> PackedExperts:
    """See `llm_engine.ops.spec.PackExperts`."""
    gate_up_E2FH, down_EHF, merged = stacked(experts, num_experts, shared)
    return PackedExperts(_in_out(gate_up_E2FH), _in_out(down_EHF), merged, None if merged else shared)


def stacked(
    experts: Iterable[tuple[Weight, Weight]], num_experts: int, shared: PackedMlp | None
) -> tuple[Tensor, Tensor, bool]:
    """Gate over up [E, 2F, H], down [E, H, F], and whether the shared expert's width put it behind the others."""
    stacks: list[Tensor] = []
    merged = False
    for place, weights in enumerate(experts):
        pair = [in_full(weight) for weight in weights]
        if not stacks:
            merged = shared is not None and shared.gate_up_2FH.shape == pair[0].shape
            stacks = [weight.new_empty(num_experts + merged, *weight.shape) for weight in pair]
        for stack, weight in zip(stacks, pair, strict=True):
            stack[place] = weight
    gate_up_E2FH, down_EHF = stacks
    if merged and shared is not None:
        gate_up_E2FH[-1], down_EHF[-1] = shared.gate_up_2FH, shared.down_HF
    return gate_up_E2FH, down_EHF, merged


def _in_out(weight_EOI: Tensor) -> Tensor:
    return weight_EOI.float().transpose(1, 2).contiguous()


def moe(x_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor, packed: PackedExperts) -> Tensor:
    """See `llm_engine.ops.spec.Moe`."""
    tiles = _deal(x_RH.float(), ids_RK, packed)
    gate_up = _by_expert(tiles.x_tMH, packed.gate_up_EH2F, tiles)
    hidden = silu_mul(gate_up.view(-1, gate_up.shape[2])).view(-1, TILE_ROWS, gate_up.shape[2] // 2)
    down = _by_expert(hidden, packed.down_EFH, tiles)
    out_RH = torch.empty(x_RH.shape)
    down_rows = down.view(-1, down.shape[2])
    _combine(down_rows.numpy(), tiles.slot_of_choice, weights_RK.contiguous().numpy(), packed.merged, out_RH.numpy())
    out_RH = out_RH.to(x_RH.dtype)
    return out_RH if packed.shared is None else out_RH.add_(mlp(x_RH, packed.shared))


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows dealt to experts."""

    x_tMH: Tensor  # unused rows are zero
    slot_of_choice: Longs  # [R, K (+ 1 if merged)] flat row of x_tMH
    batched: bool  # tile e of the first E is the first of expert e
    runs: list[tuple[int, int, int]]  # (expert, first tile, end) of the tiles that `batched` does not cover


def _deal(x_RH: Tensor, ids_RK: Tensor, packed: PackedExperts) -> Tiles:
    rows, hidden = x_RH.shape
    experts = packed.gate_up_EH2F.shape[0]
    choices = ids_RK.shape[1] + packed.merged
    bound = experts + rows * choices // TILE_ROWS
    x_tMH = torch.empty(bound, TILE_ROWS, hidden)
    slot_of_choice = np.empty((rows, choices), np.int64)
    first, end = np.empty(experts, np.int64), np.empty(experts, np.int64)
    x, ids, out = x_RH.numpy(), ids_RK.contiguous().numpy(), x_tMH.view(-1, hidden).numpy()
    batched = bool(_deal_rows(x, ids, TILE_ROWS, out, slot_of_choice, first, end))
    spans = zip(range(experts), first.tolist(), end.tolist(), strict=True)
    runs = [span for span in spans if span[1] < span[2]]
    used = max((span[2] for span in runs), default=experts if batched else 0)
    return Tiles(x_tMH[:used], slot_of_choice, batched, runs)


def _by_expert(x_tMI: Tensor, weight_EIO: Tensor, tiles: Tiles) -> Tensor:
    """Every tile times its expert's matrix."""
    experts, _, out = weight_EIO.shape
    y_tMO = x_tMI.new_empty(*x_tMI.shape[:2], out)
    if tiles.batched:
        torch.bmm(x_tMI[:experts], weight_EIO, out=y_tMO[:experts])
    for expert, first, end in tiles.runs:
        weight = weight_EIO[expert].expand(end - first, -1, -1)
        torch.bmm(x_tMI[first:end], weight, out=y_tMO[first:end])
    return y_tMO


@kernel(f"boolean({F2S}, {I2}, int64, {F2}, {I2}, {I1}, {I1})")
def _deal_rows(
    x: Floats, ids: Longs, tile_rows: int, out: Floats, slot_of_choice: Longs, first: Longs, end: Longs
) -> bool:
    """Assign slots and copy rows. `first` and `end` span each expert's tiles outside the batched part."""
    experts, width = first.shape[0], out.shape[1]
    counts = np.zeros(experts, np.int64)
    for r in range(ids.shape[0]):
        for k in range(slot_of_choice.shape[1]):
            counts[ids[r, k] if k < ids.shape[1] else experts - 1] += 1
    active = 0
    for e in range(experts):
        active += counts[e] > 0
    batched: bool = 2 * active >= experts
    head = 1 if batched else 0
    tile = head * experts
    for e in range(experts):
        first[e] = tile
        tile += max((counts[e] + tile_rows - 1) // tile_rows - head, 0)
        end[e] = tile
    filled = np.zeros(experts, np.int64)
    for r in range(ids.shape[0]):
        for k in range(slot_of_choice.shape[1]):
            e = ids[r, k] if k < ids.shape[1] else experts - 1
            rank = filled[e]
            filled[e] += 1
            tile = first[e] + rank // tile_rows - head
            if batched and rank < tile_rows:
                tile = e
            slot = tile * tile_rows + rank % tile_rows
            slot_of_choice[r, k] = slot
            for c in range(width):
                out[slot, c] = x[r, c]
    for e in range(experts):
        tiles = max(end[e] - first[e] + head, head)
        for rank in range(counts[e], tiles * tile_rows):
            tile = first[e] + rank // tile_rows - head
            if batched and rank < tile_rows:
                tile = e
            slot = tile * tile_rows + rank % tile_rows
            for c in range(width):
                out[slot, c] = ZERO
    return batched


@kernel(f"void({F2}, {I2}, {F2}, boolean, {F2})")
def _combine(down: Floats, slot_of_choice: Longs, weights: Floats, merged: bool, out: Floats) -> None:
    routed = weights.shape[1]
    for r in range(out.shape[0]):
        row = out[r]
        for c in range(row.shape[0]):
            row[c] = ZERO
        for k in range(routed):
            weight, chosen = weights[r, k], down[slot_of_choice[r, k]]
            for c in range(row.shape[0]):
                row[c] += weight * chosen[c]
        if merged:
            shared = down[slot_of_choice[r, routed]]
            for c in range(row.shape[0]):
                row[c] += shared[c]
