"""With `exact` a row has the same bits in any batch, any chunk and at any place, and however the work was split."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from llm_engine.api.errors import ConfigError
from llm_engine.ops import Ops, load_ops
from llm_engine.ops_triton import gemm
from llm_engine.ops_triton.self_check import Product, check_products
from llm_engine.ops_triton.tiles import Cut, Tile
from tests.ops import reference
from tests.ops.paged import PAIRS, Paged, all_angles, padded_rows

RANK, PLAIN, VALUE, KEY, HEADS = 40, 24, 16, 24, 4
BATCHES = [(0, 1), (1, 4), (21, 90)]


@pytest.fixture(scope="module")
def exact() -> Ops:
    return load_ops("triton", "exact", "bf16")


def test_products(exact: Ops) -> None:
    """Few rows run their splits side by side, many one after the other."""
    torch.manual_seed(0)
    rows = torch.randn(90, 1100).to(exact.dtype)
    packed = exact.pack_linear(torch.randn(40, 1100).to(exact.dtype))
    whole = exact.linear(rows, packed)
    for first, end in BATCHES:
        assert torch.equal(exact.linear(rows[first:end], packed), whole[first:end])


@pytest.mark.parametrize("splits", [2, 8])
def test_splits_side_by_side_or_in_turn(exact: Ops, splits: int) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(5, 1, 1100).to(exact.dtype), torch.randn(1, 40, 1100).to(exact.dtype)
    out = [rows.new_empty(5, 1, 40) for _ in range(2)]
    cut = Cut(Tile(rows=64, columns=64, depth=64, warps=4, stages=3), splits, parallel=False)
    gemm._launch(rows, weight, out[0], cut)
    gemm._launch(rows, weight, out[1], replace(cut, parallel=True))
    assert torch.equal(*out)


def test_self_check(exact: Ops) -> None:
    """It accepts this machine, and notices a product that rounds one row by its place."""
    exact.self_check()

    def make_product(weight_OI: Tensor) -> Product:
        def product(rows_RI: Tensor) -> Tensor:
            out = rows_RI @ weight_OI.T
            out[9:10] *= 1 + 2**-20
            return out

        return product

    with pytest.raises(ConfigError, match=r"engine\.numerics=exact.*set engine\.numerics=fast"):
        check_products(make_product, torch.float32, torch.get_default_device())


def test_experts(exact: Ops) -> None:
    torch.manual_seed(0)
    gate_up, down = torch.randn(6, 64, 48).to(exact.dtype) / 6, torch.randn(6, 48, 32).to(exact.dtype) / 6
    shared = exact.pack_mlp(torch.randn(64, 48).to(exact.dtype) / 6, torch.randn(48, 32).to(exact.dtype) / 6)
    experts = exact.pack_experts(zip(gate_up, down, strict=True), 6, shared=shared)
    x, weights = torch.randn(90, 48).to(exact.dtype), torch.rand(90, 3)
    ids = torch.rand(90, 6).argsort(-1)[:, :3]
    whole = exact.moe(x, ids, weights, experts)
    for first, end in BATCHES:
        part = exact.moe(x[first:end], ids[first:end], weights[first:end], experts)
        assert torch.equal(part, whole[first:end])


class Layer:
    """Everything attention does for the rows of one long and one short sequence."""

    def __init__(self, ops: Ops, length: int) -> None:
        torch.manual_seed(length)
        self.ops = ops
        dtype = ops.dtype
        self.rows = torch.randn(length, RANK + 2 * PAIRS + KEY).to(dtype)
        self.query = torch.randn(length, HEADS, PLAIN + 2 * PAIRS).to(dtype)
        self.index_query, self.g = torch.randn(length, HEADS, KEY).to(dtype), torch.randn(length, HEADS)
        self.norms = torch.randn(RANK).to(dtype), torch.randn(KEY), torch.randn(KEY)
        self.halves = torch.randn(HEADS, PLAIN, RANK).to(dtype), torch.randn(HEADS, VALUE, RANK).to(dtype)
        self.kv_b = ops.pack_kv_b(*self.halves)
        self.latent = Paged.random([length, 9], RANK + 2 * PAIRS, dtype)
        self.index = Paged.random([length, 9], KEY, dtype)

    def run(self, first: int, end: int, k: int | None, beside: int = 0) -> tuple[Tensor, ...]:
        """Rows `first` .. `end` of the long sequence, behind the last `beside` rows of the short one."""
        spans = [*([(1, 9 - beside, 9)] if beside else []), (0, first, end)]

        def batched(x: Tensor) -> Tensor:
            return padded_rows(torch.cat([x[:beside], x[first:end]]), self.ops.row_tile)

        kv, key = batched(self.rows[:, : RANK + 2 * PAIRS]), batched(self.rows[:, RANK + 2 * PAIRS :])
        plan, index_plan = self.latent.plan(self.ops, spans), self.index.plan(self.ops, spans)
        self.ops.write_latent(self.latent.plane, kv, self.norms[0], 1e-6, plan)
        self.ops.write_index_keys(self.index.plane, key, *self.norms[1:], 1e-6, index_plan)
        sel = None
        if k is not None:
            sel = self.ops.index_topk(batched(self.index_query), batched(self.g), self.index.plane, index_plan, k)
        out = self.ops.mla_attend(batched(self.query), self.latent.plane, plan, sel, self.kv_b, 0.2)
        return out[beside:], self.latent.plane.clone(), self.index.plane.clone()


@pytest.mark.parametrize("k", [None, 8])
def test_attention(exact: Ops, k: int | None) -> None:
    length, bounds = 20, [0, 1, 9, 20]
    whole = Layer(exact, length).run(0, length, k)
    layer = Layer(exact, length)
    parts = [layer.run(first, end, k, beside=i) for i, (first, end) in enumerate(pairwise(bounds))]
    assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
    at = layer.latent.batch([(0, 0, length)], 1).slots_N
    for part, plane in zip(parts[-1][1:], whole[1:], strict=True):
        assert torch.equal(part.flatten(0, 1)[at], plane.flatten(0, 1)[at])


def test_attention_over_several_splits(exact: Ops) -> None:
    """A row of one split among rows of three; a selection of everything; few rows and more."""
    layer = Layer(exact, 512 + 512 + 90)
    last = len(layer.rows)
    whole = layer.run(last - 3, last, None, beside=2)[0]
    rows = layer.latent.plane.flatten(0, 1)[layer.latent.batch([(0, 0, last)], 1).slots_N]
    expected = reference.attend(layer.query[-1], all_angles()[last - 1], rows, *layer.halves, 0.2)
    torch.testing.assert_close(whole[-1].double(), expected, atol=5e-2, rtol=5e-2)
    assert torch.equal(layer.run(last - 2, last, None)[0], whole[1:])
    plan = layer.latent.plan(exact, [(0, last - 3, last)])
    sel = torch.arange(2048, dtype=torch.int32).expand(3, -1)
    sel = torch.where(sel < torch.tensor([[last - 2], [last - 1], [last]]), sel, -1).contiguous()
    selected = exact.mla_attend(layer.query[-3:], layer.latent.plane, plan, sel, layer.kv_b, 0.2)
    assert torch.equal(selected, whole)
    short = layer.run(30, 32, None)[0]
    mixed = layer.latent.plan(exact, [(0, 30, 32), (1, 0, 9)])
    query = torch.cat([layer.query[30:32], layer.query[:9]])
    sel = torch.arange(2048, dtype=torch.int32).expand(11, -1)
    sel = torch.where(sel < mixed.visible_N[:, None], sel, -1).contiguous()
    assert torch.equal(exact.mla_attend(query, layer.latent.plane, mixed, sel, layer.kv_b, 0.2)[:2], short)
