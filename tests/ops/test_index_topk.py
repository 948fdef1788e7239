from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_engine.ops import Ops, load_ops
from llm_engine.ops_cpu.index_topk import as_order
from tests.ops import reference
from tests.ops.paged import PAIRS, Paged, all_angles, padded_rows

WIDTH = 24


def choose(ops: Ops, cache: Paged, spans: list[tuple[int, int, int]], query: Tensor, g: Tensor, k: int) -> Tensor:
    """Selections of the real rows; a batch that leaves nothing out selects all visible positions."""
    plan = cache.plan(ops, spans)
    sel = ops.index_topk(padded_rows(query, ops.row_tile), padded_rows(g, ops.row_tile), cache.plane, plan, k)
    if sel is None:
        visible = torch.cat([torch.arange(first, end) + 1 for _, first, end in spans])
        positions = torch.arange(k).expand(len(visible), k)
        sel = torch.where(positions < visible[:, None], positions, -1)
    assert sel.shape == (len(query), k)
    return sel.long()


@pytest.mark.parametrize("heads", [3, 4, 8])
def test_selection_matches_float64_up_to_near_ties(ops: Ops, heads: int) -> None:
    check_selection(ops, heads, near=1e-4)


def check_selection(ops: Ops, heads: int, near: float) -> None:
    """No position is chosen that is worse than a rejected one by more than `near`."""
    torch.manual_seed(heads)
    k, spans = 16, [(0, 90, 130), (1, 20, 21), (2, 0, 30)]
    cache = Paged.random([130, 21, 30], WIDTH, ops.dtype)
    query, g = torch.randn(71, heads, WIDTH).to(ops.dtype), torch.randn(71, heads)
    sel = choose(ops, cache, spans, query, g, k)
    row = 0
    for seq, first, end in spans:
        for position in range(first, end):
            front = reference.rotate_halves(query[row : row + 1, :, : 2 * PAIRS], all_angles()[position : position + 1])
            turned = torch.cat([front[0], query[row, :, 2 * PAIRS :].double()], dim=-1)
            scores = reference.index_scores(turned, g[row], cache.rows[seq][: position + 1])
            got = [t for t in sel[row].tolist() if t >= 0]
            assert got == sorted(set(got))
            assert len(got) == min(k, position + 1)
            margin = float(scores[reference.top_k(scores, k)].min() - scores[got].min())
            assert margin < near, f"row {row} chose a position that is worse by {margin}"
            row += 1


def test_ties_go_to_the_lowest_position(exact: Ops) -> None:
    """Queries opposite to all keys: every relu is zero, so every score is."""
    cache = Paged.random([100], WIDTH, torch.float32)
    cache.plane.abs_()
    query = -torch.ones(1, 4, WIDTH)
    query[..., : 2 * PAIRS] = 0.0  # what is rotated may change its sign
    for g in (torch.ones(1, 4), -torch.ones(1, 4), torch.tensor([[1.0, -1.0, 2.0, -3.0]])):  # 0.0 and -0.0 are equal
        assert choose(exact, cache, [(0, 99, 100)], query, g, 16)[0].tolist() == list(range(16))


def test_ties_at_the_last_place(exact: Ops) -> None:
    """A few clear winners, then a crowd with equal scores."""
    cache = Paged.random([50], WIDTH, torch.float32)
    keys = torch.zeros(50, WIDTH)
    keys[:, -1] = 1.0
    keys[[7, 30, 49], -1] = 2.0
    keys[[3, 20], -1] = 0.5
    table = cache.tables[0].long()
    at = torch.arange(50)
    cache.plane.view(-1, WIDTH)[table[at // 8] * 8 + at % 8] = keys
    query = torch.zeros(1, 4, WIDTH)
    query[..., -1] = 1.0
    assert choose(exact, cache, [(0, 49, 50)], query, torch.ones(1, 4), 8)[0].tolist() == [0, 1, 2, 4, 5, 7, 30, 49]


def test_nothing_to_leave_out(exact: Ops) -> None:
    cache = Paged.random([16, 5], WIDTH, torch.float32)
    plan = cache.plan(exact, [(0, 10, 16), (1, 4, 5)])
    assert exact.index_topk(torch.randn(8, 4, WIDTH), torch.randn(8, 4), cache.plane, plan, 16) is None
    sel = exact.index_topk(torch.randn(8, 4, WIDTH), torch.randn(8, 4), cache.plane, plan, 15)
    assert sel is not None
    assert sel[4].tolist() == [*range(15)]
    assert sel[6].tolist() == [0, 1, 2, 3, 4, *[-1] * 10]


def test_a_sequence_of_nan_keeps_to_itself(exact: Ops) -> None:
    torch.manual_seed(0)
    cache = Paged.random([60, 60], WIDTH, torch.float32)
    query, g = torch.randn(2, 4, WIDTH), torch.randn(2, 4)
    alone = choose(exact, cache, [(1, 59, 60)], query[1:], g[1:], 16)
    query[0] = torch.nan
    both = choose(exact, cache, [(0, 59, 60), (1, 59, 60)], query, g, 16)
    assert torch.equal(both[1:], alone)
    assert both[0].min() >= 0
    assert both[0].max() < 60


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_selection_does_not_depend_on_the_batch(data: st.DataObject) -> None:
    """The same rows in one pass, in chunks, one by one and among others choose the same positions."""
    ops = load_ops("cpu", "exact", data.draw(st.sampled_from(["fp32", "bf16"])))
    torch.manual_seed(1)
    k, length = 16, 75
    cache = Paged.random([length, 40], WIDTH, ops.dtype)
    query, g = torch.randn(length, 4, WIDTH).to(ops.dtype), torch.randn(length, 4)
    other_query, other_g = torch.randn(40, 4, WIDTH).to(ops.dtype), torch.randn(40, 4)
    whole = choose(ops, cache, [(0, 0, length)], query, g, k)
    bounds = [0, *sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6))), length]
    for first, end in pairwise(bounds):
        beside = data.draw(st.integers(1, 40))
        other_first = data.draw(st.booleans())
        spans, rows, gates = [(0, first, end)], [query[first:end]], [g[first:end]]
        at = beside if other_first else 0
        spans.insert(0 if other_first else 1, (1, 40 - beside, 40))
        rows.insert(0 if other_first else 1, other_query[-beside:])
        gates.insert(0 if other_first else 1, other_g[-beside:])
        sel = choose(ops, cache, spans, torch.cat(rows), torch.cat(gates), k)
        assert torch.equal(sel[at : at + end - first], whole[first:end])


def test_threads_share_the_rows(exact: Ops) -> None:
    torch.manual_seed(0)
    cache = Paged.random([300], WIDTH, torch.float32)
    query, g = torch.randn(300, 4, WIDTH), torch.randn(300, 4)
    single = choose(exact, cache, [(0, 0, 300)], query, g, 16)
    torch.set_num_threads(3)
    assert torch.equal(choose(exact, cache, [(0, 0, 300)], query, g, 16), single)


def test_order_of_scores() -> None:
    scores = np.array([-np.inf, -2.5, -1e-40, 0.0, 1e-40, 3.0, np.inf], np.float32)
    order = as_order(scores.copy())
    assert (np.diff(order.astype(np.int64)) > 0).all()
    assert as_order(np.array([-0.0], np.float32))[0] == order[3]
    assert as_order(np.array([np.nan], np.float32))[0] < order[0]
    assert as_order(np.array([-np.nan], np.float32))[0] < order[0]
