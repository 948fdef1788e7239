from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.ops import GateConfig, Ops, load_ops
from llm_engine.ops_cpu.moe_free import FreeExperts
from tests.ops import reference

HIDDEN, WIDTH = 48, 32


@pytest.mark.parametrize(
    "config",
    [
        GateConfig(top_k=4, num_groups=4, top_groups=2, scale=2.5),
        GateConfig(top_k=2, num_groups=8, top_groups=3, normalise=False),
        GateConfig(top_k=3),
        GateConfig(top_k=2, num_groups=16, top_groups=5),
    ],
)
def test_gate_matches_float64(ops: Ops, config: GateConfig) -> None:
    torch.manual_seed(config.top_k)
    logits, bias = torch.randn(40, 16), torch.randn(16) / 4
    ids, weights = ops.gate(logits, bias, config)
    for row in range(40):
        expected = reference.gate(logits[row], bias, config)
        assert set(ids[row].tolist()) == set(expected)
        got = weights[row].tolist()
        assert got == pytest.approx([expected[e] for e in ids[row].tolist()], rel=1e-5)
        choice = (logits[row].sigmoid() + bias)[ids[row]]
        assert torch.equal(choice, choice.sort(descending=True).values), "best first"


def test_the_bias_chooses_but_does_not_weigh(exact: Ops) -> None:
    logits, bias = torch.zeros(1, 8), torch.zeros(8)
    bias[5] = bias[6] = 3.0
    ids, weights = exact.gate(logits, bias, GateConfig(top_k=2, normalise=False))
    assert ids[0].tolist() == [5, 6]
    assert weights[0].tolist() == [0.5, 0.5]


def test_dropped_groups_stay_out_when_all_scores_are_negative(exact: Ops) -> None:
    """A dropped group counts as -inf, not as zero."""
    bias = torch.full((8,), -5.0)
    bias[0] = bias[4] = -4.0
    ids, _ = exact.gate(torch.zeros(1, 8), bias, GateConfig(top_k=3, num_groups=2, top_groups=1))
    assert ids[0].tolist() == [0, 1, 2], "of equal groups and experts the lowest"


def test_nan_logits_do_not_break_the_others(exact: Ops) -> None:
    torch.manual_seed(0)
    logits, config = torch.randn(3, 16), GateConfig(top_k=4, num_groups=4, top_groups=2)
    alone = exact.gate(logits[2:], torch.zeros(16), config)
    logits[:2] = torch.nan
    ids, weights = exact.gate(logits, torch.zeros(16), config)
    assert torch.equal(ids[2:], alone[0])
    assert torch.equal(weights[2:], alone[1])
    assert ids.min() >= 0
    assert ids.max() < 16


class Experts:
    def __init__(self, ops: Ops, experts: int, shared_width: int | None) -> None:
        torch.manual_seed(experts)
        self.gate_up = (torch.randn(experts, 2 * WIDTH, HIDDEN) / 6).to(ops.dtype)
        self.down = (torch.randn(experts, HIDDEN, WIDTH) / 6).to(ops.dtype)
        self.shared: tuple[torch.Tensor, torch.Tensor] | None = None
        packed = None
        if shared_width is not None:
            self.shared = (
                (torch.randn(2 * shared_width, HIDDEN) / 6).to(ops.dtype),
                (torch.randn(HIDDEN, shared_width) / 6).to(ops.dtype),
            )
            packed = ops.pack_mlp(*self.shared)
        self.packed = ops.pack_experts(zip(self.gate_up, self.down, strict=True), experts, shared=packed)

    def expected(self, x: torch.Tensor, ids: list[int], weights: list[float]) -> torch.Tensor:
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for expert, weight in zip(ids, weights, strict=True):
            total += weight * reference.mlp(x, self.gate_up[expert], self.down[expert])
        return total if self.shared is None else total + reference.mlp(x, *self.shared)


@pytest.mark.parametrize("shared_width", [None, WIDTH, 2 * WIDTH])
@pytest.mark.parametrize(("rows", "experts"), [(1, 16), (9, 16), (70, 8), (40, 3)])
def test_experts_match_float64(ops: Ops, rows: int, experts: int, shared_width: int | None) -> None:
    moe = Experts(ops, experts, shared_width)
    x = torch.randn(rows, HIDDEN).to(ops.dtype)
    ids = torch.stack([torch.randperm(experts)[:3] for _ in range(rows)])
    weights = torch.rand(rows, 3)
    got = ops.moe(x, ids, weights, moe.packed)
    assert got.dtype == ops.dtype
    tolerance = 1e-5 if ops.dtype == torch.float32 else 3e-2
    for row in range(rows):
        expected = moe.expected(x[row], ids[row].tolist(), weights[row].tolist())
        torch.testing.assert_close(got[row].double(), expected, atol=tolerance, rtol=tolerance)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_rows_do_not_feel_their_neighbours(data: st.DataObject) -> None:
    """Any company, crowded and idle experts: the same bits for a row."""
    ops = load_ops("cpu", "exact", data.draw(st.sampled_from(["fp32", "bf16"])))
    experts = data.draw(st.sampled_from([4, 16, 40]))
    moe = Experts(ops, experts, data.draw(st.sampled_from([None, WIDTH, 2 * WIDTH])))
    rows = 30
    x, weights = torch.randn(rows, HIDDEN).to(ops.dtype), torch.rand(rows, 3)
    crowd = data.draw(st.integers(3, experts))
    ids = torch.stack([torch.randperm(crowd)[:3] for _ in range(rows)])
    alone = torch.cat([ops.moe(x[r : r + 1], ids[r : r + 1], weights[r : r + 1], moe.packed) for r in range(rows)])
    order = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=90)))
    together = x[order].clone()
    got = ops.moe(together, ids[order], weights[order], moe.packed)
    assert torch.equal(got, alone[order])


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("rows", "experts"), [(1, 16), (70, 8)])
def test_both_forms_of_free_experts_match_float64(wide: bool, rows: int, experts: int) -> None:
    ops = load_ops("cpu", "fast", "bf16")
    moe = Experts(ops, experts, WIDTH)
    if not isinstance(moe.packed, FreeExperts):
        pytest.skip("this CPU has no bf16 products")
    packed = moe.packed if wide else replace(moe.packed, wide=None)
    x = torch.randn(rows, HIDDEN).to(ops.dtype)
    ids = torch.stack([torch.randperm(experts)[:3] for _ in range(rows)])
    got = ops.moe(x, ids, torch.full((rows, 3), 0.5), packed)
    for row in range(rows):
        expected = moe.expected(x[row], ids[row].tolist(), [0.5] * 3)
        torch.testing.assert_close(got[row].double(), expected, atol=3e-2, rtol=3e-2)
