from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_engine.ops_triton.lang import Ptr, kernel
from llm_engine.ops_triton.topk import ALIGNED, as_order, choose


@kernel
def _orders(scores: Ptr, orders: Ptr, num_columns: int, TILE: tl.constexpr) -> None:
    at = tl.program_id(0) * num_columns + tl.arange(0, TILE)
    there = tl.arange(0, TILE) < num_columns
    order = as_order(tl.load(scores + at, mask=there, other=0.0))
    tl.store(orders + at, order.to(tl.int32, bitcast=True), mask=there)


def orders_of(scores: Tensor, visible: list[int]) -> Tensor:
    """Rows for `choose`. What nobody may look at is as large as can be."""
    orders = torch.empty(scores.shape, dtype=torch.int32)
    _orders[(len(scores),)](scores, orders, scores.shape[1], triton.next_power_of_2(scores.shape[1]))
    aligned = torch.full((len(scores), -(-scores.shape[1] // ALIGNED) * ALIGNED), -1, dtype=torch.int32)
    for row, count in enumerate(visible):
        aligned[row, :count] = orders[row, :count]
        aligned[row, count : -(-count // ALIGNED) * ALIGNED] = 0
    return aligned


def chosen(scores: Tensor, visible: list[int], k: int) -> list[list[int]]:
    """Selections, by row, without the -1 behind them."""
    sel = torch.full((len(visible), k), -7, dtype=torch.int32)
    choose(orders_of(scores, visible), torch.tensor(visible, dtype=torch.int32), sel)
    rows = []
    for row, count in zip(sel.tolist(), visible, strict=True):
        kept = min(k, count)
        assert row[kept:] == [-1] * (k - kept)
        rows.append(row[:kept])
    return rows


def expected(scores: Tensor, count: int, k: int) -> list[int]:
    """By sorting; NaN comes last, both zeros are equal."""
    values = [float("-inf") if score != score else score + 0.0 for score in scores[:count].tolist()]
    isnan = scores[:count].isnan().tolist()
    return sorted(sorted(range(count), key=lambda t: (isnan[t], -values[t], t))[:k])


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_equals_sorting(data: st.DataObject) -> None:
    width, k = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([1, 3, 16, 40]))
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 3.5, float("inf"), float("-inf"), float("nan"), 2.0**-130])
    scores = torch.tensor([data.draw(st.lists(values | st.floats(width=32), min_size=width, max_size=width))] * 2)
    visible = [data.draw(st.integers(1, width)), width]
    assert chosen(scores, visible, k) == [expected(scores[i], visible[i], k) for i in (0, 1)]


@pytest.mark.parametrize("distinct", [2, 1000])
def test_rows_longer_than_a_tile(distinct: int) -> None:
    """Counts and places carry over from tile to tile; with few distinct scores the last place is a tie across them."""
    torch.manual_seed(distinct)
    scores = torch.randint(0, distinct, (2, 9000)).float() - distinct / 2
    scores[:, 8500:] = torch.nan  # nobody may look beyond the end of a row
    visible = [8500, 4097]
    assert chosen(scores, visible, 2048) == [expected(scores[i], visible[i], 2048) for i in (0, 1)]


def test_zeros_of_both_signs_are_equal_and_nan_is_last() -> None:
    scores = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0], [torch.nan, -torch.inf, 1.0, -torch.nan, -5.0]])
    assert chosen(scores, [5, 5], 2) == [[0, 1], [2, 4]]
    assert chosen(scores, [5, 5], 3) == [[0, 1, 3], [1, 2, 4]]


def test_short_rows_select_everything() -> None:
    scores = torch.full((3, 20), torch.nan)
    assert chosen(scores, [1, 8, 7], 8) == [[0], list(range(8)), list(range(7))]


@pytest.mark.parametrize("width", [9000, 20000, 40000, 70000])
def test_rows_of_every_length(width: int) -> None:
    """Distinct scores, scores that differ in their last bits only, and zeros; a short row under a long bound."""
    torch.manual_seed(width)
    scores = torch.stack([torch.randn(width), 1 + torch.randint(0, 9, (width,)) * 2.0**-22, torch.zeros(width)])
    scores = torch.cat([scores, scores[:1]])
    visible = [width, width - 3, width, 3000]
    assert chosen(scores, visible, 2048) == [expected(scores[i], visible[i], 2048) for i in range(4)]
