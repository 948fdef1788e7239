from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_engine.ops import Ops, load_ops
from tests.ops import reference
from tests.ops.paged import PAIRS, Paged, all_angles, padded_rows

RANK, PLAIN, VALUE, SCALE = 40, 24, 16, 0.17
WIDTH = RANK + 2 * PAIRS


class Attention:
    """Random weights and queries of one layer."""

    def __init__(self, ops: Ops, rows: int, heads: int = 4) -> None:
        torch.manual_seed(heads)
        self.ops = ops
        self.key = (torch.randn(heads, PLAIN, RANK) / 4).to(ops.dtype)
        self.value = (torch.randn(heads, VALUE, RANK) / 4).to(ops.dtype)
        self.query = torch.randn(rows, heads, PLAIN + 2 * PAIRS).to(ops.dtype)
        self.kv_b = ops.pack_kv_b(self.key, self.value)

    def __call__(
        self, cache: Paged, spans: list[tuple[int, int, int]], query: Tensor, sel: Tensor | None = None
    ) -> Tensor:
        rows = padded_rows(query, self.ops.row_tile)
        sel = None if sel is None else sel.int()
        plan = cache.plan(self.ops, spans)
        return self.ops.mla_attend(rows, cache.plane, plan, sel, self.kv_b, SCALE)[: len(query)]

    def expected(self, query: Tensor, position: int, rows: Tensor) -> Tensor:
        return reference.attend(query, all_angles()[position], rows, self.key, self.value, SCALE)


@pytest.mark.parametrize("heads", [1, 3, 4, 6])
def test_dense_attention_matches_the_expanded_form_in_float64(ops: Ops, heads: int) -> None:
    spans = [(0, 60, 61), (1, 3, 33), (2, 0, 2)]
    cache = Paged.random([61, 33, 2], WIDTH, ops.dtype)
    attention = Attention(ops, 33, heads)
    got = attention(cache, spans, attention.query)
    tolerance = 1e-5 if ops.dtype == torch.float32 else 2e-2
    row = 0
    for seq, first, end in spans:
        for position in range(first, end):
            expected = attention.expected(attention.query[row], position, cache.rows[seq][: position + 1])
            torch.testing.assert_close(got[row].double(), expected, atol=tolerance, rtol=tolerance)
            row += 1


def test_sparse_attention_sees_the_selection_and_nothing_else(ops: Ops) -> None:
    cache = Paged.random([61], WIDTH, ops.dtype)
    attention = Attention(ops, 3)
    chosen = [[0, 5, 17, 58], [2], []]
    sel = torch.full((3, 6), -1)
    for row, positions in enumerate(chosen):
        sel[row, : len(positions)] = torch.tensor(positions, dtype=torch.int64)
    got = attention(cache, [(0, 58, 61)], attention.query, sel)
    tolerance = 1e-5 if ops.dtype == torch.float32 else 2e-2
    for row, positions in enumerate(chosen):
        expected = attention.expected(attention.query[row], 58 + row, cache.rows[0][positions])
        torch.testing.assert_close(got[row].double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(got[2], torch.zeros_like(got[2])), "a row without keys gives zeros"


def test_a_selection_may_be_made_late(ops: Ops) -> None:
    cache = Paged.random([40], WIDTH, ops.dtype)
    attention, sel = Attention(ops, 1), torch.tensor([[3, 17, 30]], dtype=torch.int32)
    rows, plan = padded_rows(attention.query, ops.row_tile), cache.plan(ops, [(0, 39, 40)])
    late = ops.mla_attend(rows, cache.plane, plan, lambda: sel, attention.kv_b, SCALE)
    assert torch.equal(late[:1], attention(cache, [(0, 39, 40)], attention.query, sel))


def test_swapped_rope_layout_is_noticed(exact: Ops) -> None:
    cache = Paged.random([40], WIDTH, torch.float32)
    attention = Attention(exact, 1)
    got = attention(cache, [(0, 39, 40)], attention.query)[0].double()
    swapped = attention.query[0].clone()
    interleave = torch.arange(2 * PAIRS).view(2, PAIRS).T.reshape(-1)
    swapped[:, PLAIN:] = attention.query[0, :, PLAIN:][:, interleave]
    assert (got - attention.expected(swapped, 39, cache.rows[0])).abs().max() > 0.05


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_selecting_everything_equals_selecting_nothing(dtype: str) -> None:
    ops = load_ops("cpu", "exact", dtype)
    for length in (1, 2, 15, 16, 17, 63, 64, 65, 200):
        cache = Paged.random([length], WIDTH, ops.dtype)
        attention = Attention(ops, 1)
        span = [(0, length - 1, length)]
        sel = torch.full((1, 256), -1)
        sel[0, :length] = torch.arange(length)
        assert torch.equal(attention(cache, span, attention.query), attention(cache, span, attention.query, sel))


def test_unseen_nan_does_not_leak(exact: Ops) -> None:
    """Positions that are later, not selected or of others hold NaN."""
    cache = Paged.random([50, 50], WIDTH, torch.float32)
    attention = Attention(exact, 2)
    sel = torch.tensor([[1, 4, 9, 20]] * 2)
    clean = attention(cache, [(0, 38, 40)], attention.query, sel), attention(cache, [(0, 38, 40)], attention.query)
    at = torch.arange(40, 50)
    table = cache.tables[0].long()
    cache.plane.view(-1, WIDTH)[table[at // 8] * 8 + at % 8] = torch.nan
    assert torch.equal(attention(cache, [(0, 38, 40)], attention.query), clean[1])
    at = torch.tensor([t for t in range(50) if t not in (1, 4, 9, 20)])
    cache.plane.view(-1, WIDTH)[table[at // 8] * 8 + at % 8] = torch.nan
    assert torch.equal(attention(cache, [(0, 38, 40)], attention.query, sel), clean[0])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_rows_do_not_depend_on_the_batch(data: st.DataObject) -> None:
    """The same rows in one pass, in chunks, one by one and among others, dense and sparse."""
    ops = load_ops("cpu", "exact", data.draw(st.sampled_from(["fp32", "bf16"])))
    length = 75
    cache = Paged.random([length, 40], WIDTH, ops.dtype)
    attention = Attention(ops, length + 40, heads=data.draw(st.sampled_from([4, 6])))
    query, other = attention.query[:length], attention.query[length:]
    sel = None
    if data.draw(st.booleans()):
        picks = torch.rand(length, length).masked_fill(torch.arange(length) > torch.arange(length)[:, None], 2.0)
        order = picks.argsort(-1)[:, :16]
        sel = order.masked_fill(picks.gather(1, order) > 1.0, length).sort(-1).values
        sel = sel.masked_fill(sel == length, -1)
    other_sel = None if sel is None else torch.arange(16).expand(40, 16)
    whole = attention(cache, [(0, 0, length)], query, sel)
    bounds = [0, *sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6))), length]
    for first, end in pairwise(bounds):
        beside = data.draw(st.integers(1, 20))
        spans = [(1, 40 - beside, 40), (0, first, end)]
        both = None if sel is None or other_sel is None else torch.cat([other_sel[:beside], sel[first:end]])
        got = attention(cache, spans, torch.cat([other[:beside], query[first:end]]), both)
        assert torch.equal(got[beside:], whole[first:end])


@pytest.mark.parametrize("sparse", [False, True])
def test_threads_share_the_rows(exact: Ops, sparse: bool) -> None:
    cache = Paged.random([200, 30], WIDTH, torch.float32)
    attention, spans = Attention(exact, 211), [(1, 19, 30), (0, 0, 200)]
    sel = torch.arange(64).expand(211, 64).where(torch.arange(64) <= cache.batch(spans, 1).positions_R[:, None], -1)
    chosen = sel if sparse else None
    single = attention(cache, spans, attention.query, chosen)
    torch.set_num_threads(3)
    assert torch.equal(attention(cache, spans, attention.query, chosen), single)
