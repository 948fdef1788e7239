"""Routed experts in bf16 for `fast`, in two forms.

Wide: all experts stand side by side in one wide MLP, and every row zeroes the activations of those it did not choose.
Two products in all: for few rows, most of which wake other experts, reading the weights and starting products are
what takes time. Apart: rows are sorted by expert and every expert runs alone.

A shared expert of the routed experts' width is one more expert that every row chooses last, with weight one.

Shapes: R rows, H hidden, E experts, F expert width, K chosen, N = R · K choices, P padded rows of all experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from llm_engine.ops.fp8 import Weight
from llm_engine.ops_cpu.gemm import Gemm, PackedProduct, padded
from llm_engine.ops_cpu.jit import (
    B2,
    F2,
    I2,
    ZERO,
    Cache,
    Floats,
    Longs,
    kernel,
    over_rows,
    row_array,
    row_at,
    store_row,
)
from llm_engine.ops_cpu.mlp import ACTIVATION_COST, PackedMlp, mlp, silu_mul, silu_mul_row
from llm_engine.ops_cpu.moe import stacked

# Costs in weights read from memory, as measured on a Xeon with AMX.
_CALLS_COST: Final = 800_000  # of starting the two products of one expert
_FREE_ROWS: Final = 50  # rows that a weight is multiplied with in the time it takes to read it
_MAX_WIDE_WEIGHTS: Final = 4 * _CALLS_COST  # of an expert; larger ones gain little and are not laid out twice


@dataclass(frozen=True, slots=True)
class FreeExperts:
    """Gate-and-up and down products of all experts together and of each alone. `merged`: the last one is shared."""

    wide: tuple[PackedProduct, PackedProduct] | None
    apart: list[tuple[PackedProduct, PackedProduct]]
    width: int
    weights: int  # of one expert
    merged: bool
    shared: PackedMlp | None

    def prefers_wide(self, rows: int, choices: int) -> bool:
        """Whether one wide product is expected to be faster."""
        experts = len(self.apart)
        active = min(experts, rows * choices)
        wide = experts * self.weights * max(1, rows // _FREE_ROWS)
        apart = active * _CALLS_COST + self.weights * max(active, rows * choices // _FREE_ROWS)
        return wide <= apart


def pack_experts(
    gemm: Gemm, experts: Iterable[tuple[Weight, Weight]], num_experts: int, *, shared: PackedMlp | None = None
) -> FreeExperts:
    """See `llm_engine.ops.spec.PackExperts`."""
    gate_up_E2FH, down_EHF, merged = stacked(experts, num_experts, shared)
    linear = partial(gemm.linear, out_dtype=torch.bfloat16)
    weights = gate_up_E2FH[0].numel() + down_EHF[0].numel()
    wide = None
    if weights <= _MAX_WIDE_WEIGHTS:
        wide = linear(gate_up_E2FH.flatten(0, 1)), linear(down_EHF.transpose(0, 1).flatten(1))
    apart = [(linear(gate_up), linear(down)) for gate_up, down in zip(gate_up_E2FH, down_EHF, strict=True)]
    return FreeExperts(wide, apart, down_EHF.shape[2], weights, merged, None if merged else shared)


def moe(x_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor, packed: FreeExperts) -> Tensor:
    """See `llm_engine.ops.spec.Moe`."""
    if packed.merged:
        ids_RK = torch.nn.functional.pad(ids_RK, (0, 1), value=len(packed.apart) - 1)
        weights_RK = torch.nn.functional.pad(weights_RK, (0, 1), value=1.0)
    if packed.wide is not None and packed.prefers_wide(*ids_RK.shape):
        out_RH = _wide(x_RH, ids_RK, weights_RK, packed.width, *packed.wide)
    else:
        out_RH = _apart(x_RH, ids_RK, weights_RK, packed)
    return out_RH if packed.shared is None else out_RH.add_(mlp(x_RH, packed.shared))


def _wide(
    x_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor, width: int, gate_up: PackedProduct, down: PackedProduct
) -> Tensor:
    gate_up_RE2F = gate_up(x_RH)
    hidden_REF = torch.zeros(len(x_RH), gate_up_RE2F.shape[1] // 2, dtype=gate_up_RE2F.dtype)
    over_rows(
        _activate_chosen,
        len(x_RH),
        ACTIVATION_COST * width * ids_RK.shape[1],
        row_array(gate_up_RE2F),
        ids_RK.contiguous().numpy(),
        weights_RK.contiguous().numpy(),
        width,
        row_array(hidden_REF),
    )
    return down(hidden_REF)


def _apart(x_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor, packed: FreeExperts) -> Tensor:
    choices = ids_RK.shape[1]
    ids_N = ids_RK.flatten().numpy()
    counts_E = np.bincount(ids_N, minlength=len(packed.apart))
    padded_E = np.array([padded(count) for count in counts_E.tolist()])
    starts_E, padded_starts_E = counts_E.cumsum() - counts_E, padded_E.cumsum() - padded_E
    order_N = ids_N.argsort(kind="stable")
    slots_N = np.empty_like(order_N)  # where each choice stands among the padded rows of all experts
    slots_N[order_N] = np.arange(len(ids_N)) + (padded_starts_E - starts_E)[ids_N[order_N]]
    rows_P = np.zeros(padded_E.sum(), np.int64)  # padding repeats row 0
    rows_P[slots_N] = np.arange(len(ids_N)) // choices
    x_PH = x_RH.index_select(0, torch.from_numpy(rows_P))
    down_PH = torch.empty_like(x_PH)
    for (gate_up, down), first, count in zip(packed.apart, padded_starts_E.tolist(), padded_E.tolist(), strict=True):
        if count:
            down_PH[first : first + count] = down(silu_mul(gate_up(x_PH[first : first + count])))
    out_RH = torch.empty_like(x_RH, memory_format=torch.contiguous_format)
    over_rows(
        _combine,
        len(x_RH),
        choices * x_RH.shape[1],
        row_array(down_PH),
        slots_N.reshape(-1, choices),
        weights_RK.contiguous().numpy(),
        row_array(out_RH),
    )
    return out_RH


@kernel(f"void(int64, int64, {B2}, {I2}, {F2}, int64, {B2})")
def _activate_chosen(first: int, end: int, gate_up: Cache, ids: Longs, weights: Floats, width: int, out: Cache) -> None:
    """weight · silu(g) · u in the columns of the chosen experts; the others stay as they are."""
    wide, row = np.empty(2 * width, np.float32), np.empty(width, np.float32)
    for r in range(first, end):
        for k in range(ids.shape[1]):
            e, weight = ids[r, k], weights[r, k]
            silu_mul_row(row_at(gate_up[:, 2 * width * e : 2 * width * (e + 1)], r, wide), row)
            for c in range(width):
                row[c] *= weight
            store_row(out[:, width * e : width * (e + 1)], r, row)


@kernel(f"void(int64, int64, {B2}, {I2}, {F2}, {B2})")
def _combine(first: int, end: int, down: Cache, slots: Longs, weights: Floats, out: Cache) -> None:
    row, scratch = np.empty(out.shape[1], np.float32), np.empty(out.shape[1], np.float32)
    for r in range(first, end):
        for c in range(row.shape[0]):
            row[c] = ZERO
        for k in range(slots.shape[1]):
            weight, chosen = weights[r, k], row_at(down, slots[r, k], scratch)
            for c in range(row.shape[0]):
                row[c] += weight * chosen[c]
        store_row(out, r, row)
