"""Forms in which products and their operands may come: turned tiles, quantised forms carried along, fused epilogues."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from llm_engine.ops_triton import arrivals, gemm
from llm_engine.ops_triton.deal import deal
from llm_engine.ops_triton.lang import INTERPRETED
from llm_engine.ops_triton.moe import _down, _swiglu_fp8, _up, moe, pack_experts, pack_mlp
from llm_engine.ops_triton.norm import add_rms_norm, rms_norm
from llm_engine.ops_triton.quant import (
    BLOCK,
    Fp8Rows,
    carry_rows,
    quantise_rows,
    quantise_weight,
    scaled_mm,
)
from llm_engine.ops_triton.tiles import Cut, Tile, cut_product

UPRIGHT = Tile(rows=16, columns=64, depth=128, warps=4, stages=2)
CUTS = [Cut(UPRIGHT, 1, parallel=False), Cut(UPRIGHT, 3, parallel=False), Cut(UPRIGHT, 2, parallel=True)]


def in_full(rows: Fp8Rows) -> Tensor:
    return rows.values_RI.double() * rows.scales_GR.T.double().repeat_interleave(BLOCK, 1)


def turned(cut: Cut) -> Cut:
    return replace(cut, tile=replace(cut.tile, turned=True))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("width", [192, 200])
def test_turned_tiles_give_the_same_product(cut: Cut, width: int) -> None:
    torch.manual_seed(width)
    x, weight = torch.randn(21, 640).bfloat16(), torch.randn(width, 640).bfloat16()
    expected = x.double() @ weight.double().T
    for each in (cut, turned(cut)):
        out = torch.full((21, width), torch.nan, dtype=torch.bfloat16)
        gemm._launch(x[:, None], weight[None], out[:, None], each)
        torch.testing.assert_close(out.double(), expected, atol=0.3, rtol=1e-2)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("width", [192, 200])
def test_turned_tiles_give_the_same_product_in_fp8(cut: Cut, width: int) -> None:
    torch.manual_seed(width)
    x = quantise_rows(torch.randn(21, 640).bfloat16())
    weight = quantise_weight(torch.randn(width, 640).bfloat16() / 9)
    spread = weight.scales.repeat_interleave(BLOCK, 0)[:width].repeat_interleave(BLOCK, 1)
    expected = in_full(x) @ (weight.values_OI.double() * spread.double()).T
    for each in (cut, turned(cut)):
        out = torch.full((21, width), torch.nan, dtype=torch.bfloat16)
        gemm._launch_fp8(x, weight, out, each)
        torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=1e-2)


@contextmanager
def arriving(order: Callable[[int], list[int]]) -> Iterator[None]:
    """Interpreted programs run in another order along the splits of a launch."""
    plain = interpreter.interpreter_builder.set_grid_idx

    def set_grid_idx(x: int, y: int, z: int) -> None:
        splits = interpreter.interpreter_builder.grid_dim[1]
        plain(x, order(splits)[y], z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.interpreter_builder, "set_grid_idx", set_grid_idx)
        yield


@pytest.mark.skipif(not INTERPRETED, reason="a card has its own order")
@pytest.mark.parametrize("fp8", [False, True])
def test_who_arrives_last_changes_nothing(fp8: bool) -> None:
    """The same bits in any order, from counters that every product leaves at zero."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 1024).bfloat16(), torch.randn(200, 1024).bfloat16() / 9
    x *= torch.logspace(-3, 3, 8).repeat_interleave(BLOCK)  # sums that depend on their order
    cut, outs = Cut(UPRIGHT, 8, parallel=True), []
    orders: list[Callable[[int], list[int]]] = [
        lambda count: list(range(count)),
        lambda count: list(range(count))[::-1],
        lambda count: [(3 * place + 2) % count for place in range(count)],
    ]
    for order in orders:
        out = torch.full((5, 200), torch.nan)
        with arriving(order):
            if fp8:
                gemm._launch_fp8(quantise_rows(x), quantise_weight(weight), out, cut)
            else:
                gemm._launch(x[:, None], weight[None], out[:, None], cut)
        outs.append(out)
        assert not arrivals.counters(out.device).any()
    assert all(torch.equal(out, outs[0]) for out in outs)
    in_turn = torch.full((5, 200), torch.nan)
    if not fp8:
        gemm._launch(x[:, None], weight[None], in_turn[:, None], replace(cut, parallel=False))
        assert torch.equal(in_turn, outs[0])


def test_counters_are_shared_by_nobody_at_the_same_time() -> None:
    device = torch.get_default_device()
    here = arrivals.counters(device)
    assert arrivals.counters(device) is here
    apart = arrivals.make(device)
    with arrivals.set_apart(apart):
        assert arrivals.counters(device) is apart
    with ThreadPoolExecutor(1) as other:
        there = other.submit(arrivals.counters, torch.device("cpu")).result(timeout=10)
    assert there is not arrivals.counters(torch.device("cpu"))


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(("depth", "width", "heads"), [(128, 512, 3), (512, 128, 3)])
def test_products_by_head_of_few_rows(rows: int, depth: int, width: int, heads: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(heads, rows, depth + 64).bfloat16(), torch.randn(heads, width, depth).bfloat16() / 16
    x_RhI = x.transpose(0, 1)[..., :depth]
    out = torch.full((rows, heads, width), torch.nan, dtype=torch.bfloat16)
    gemm._launch(x_RhI, weight, out, cut_product("fast", rows, depth, width, heads))
    expected = torch.einsum("rhi,hoi->rho", x_RhI.double(), weight.double())
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=1e-2)


def test_a_weight_in_two_terms_is_multiplied_in_fp32() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 256).bfloat16(), torch.randn(64, 256)
    packed = gemm.pack_linear(weight, fp32=True, dtype=torch.bfloat16, fp8=False, numerics="fast")
    assert packed.in_two
    assert packed.out == 64
    torch.testing.assert_close(gemm.linear(x, packed).double(), x.double() @ weight.double().T, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("width", [256, 640, 96])
def test_norms_carry_the_quantised_form_of_what_they_give(width: int) -> None:
    torch.manual_seed(width)
    wide, residual, weight = torch.randn(5, 2 * width).bfloat16(), torch.randn(5, width).bfloat16(), torch.randn(width)
    x = wide[:, :width]
    for out in (
        rms_norm(x, weight, 1e-6, torch.bfloat16, fp8=True),
        add_rms_norm(x, residual, weight, 1e-6, torch.bfloat16, fp8=True)[0],
    ):
        carried = getattr(out, "fp8_rows", None)
        if width % BLOCK:
            assert carried is None
            continue
        assert quantise_rows(out) is carried
        anew = quantise_rows(out.clone())
        assert torch.equal(carried.values_RI.view(torch.uint8), anew.values_RI.view(torch.uint8))
        assert torch.equal(carried.scales_GR, anew.scales_GR)


def test_views_carry_no_quantised_form() -> None:
    x = torch.randn(4, 256).bfloat16()
    carry_rows(x, quantise_rows(x))
    assert len(quantise_rows(x[:2]).values_RI) == 2


@pytest.mark.parametrize("turned", [False, True])
def test_experts_quantise_what_they_would_hand_on(turned: bool) -> None:
    """The fused form and the torch-sized one hold what quantising the unfused result gives."""
    torch.manual_seed(0)
    x, gate_up = torch.randn(21, 256).bfloat16(), quantise_weight(torch.randn(512, 256).bfloat16() / 16)
    tile = replace(UPRIGHT, columns=BLOCK, turned=turned)
    plain = _up(x, gate_up, None, tile, False)
    assert isinstance(plain, Tensor)
    expected = in_full(quantise_rows(plain))
    fused = _up(x, gate_up, None, tile, True)
    assert isinstance(fused, Fp8Rows)
    assert torch.equal(in_full(fused), expected)
    spread = gate_up.scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    both = in_full(quantise_rows(x)) @ (gate_up.values_OI.double() * spread.double()).T
    apart = in_full(_swiglu_fp8(both.bfloat16()))
    assert (apart - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_a_shared_expert_is_the_same_merged_or_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pack = {"fp8": True, "numerics": "fast"}
    shared = pack_mlp(
        torch.randn(512, 256).bfloat16() / 16, torch.randn(256, 256).bfloat16() / 16, dtype=torch.bfloat16, **pack
    )
    gate_up, down = torch.randn(4, 512, 256).bfloat16() / 16, torch.randn(4, 256, 256).bfloat16() / 16
    experts = pack_experts(zip(gate_up, down, strict=True), 4, shared=shared, **pack)
    assert experts.merged
    x, weights, ids = torch.randn(9, 256).bfloat16(), torch.rand(9, 2), torch.rand(9, 4).argsort(-1)[:, :2]
    together = moe(x, ids, weights, experts)
    monkeypatch.setattr(sys.modules[moe.__module__], "_alone_is_faster", lambda *_: True)
    torch.testing.assert_close(moe(x, ids, weights, experts), together, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("columns", [64, 128])
def test_paired_tiles_give_the_same_product(columns: int) -> None:
    torch.manual_seed(0)
    experts = [(torch.randn(768, 256).bfloat16(), torch.randn(256, 384).bfloat16() / 16) for _ in range(3)]
    down = pack_experts(experts, 3, fp8=True, numerics="fast").down_EHF
    dealt = deal(torch.rand(40, 3).argsort(-1)[:, :2], 3, UPRIGHT.rows, with_shared=False)
    x = quantise_rows(torch.randn(dealt.num_tiles * UPRIGHT.rows, 384).bfloat16())
    tile = replace(UPRIGHT, columns=columns)
    single, paired = (_down(x, down, dealt, each, torch.bfloat16) for each in (tile, replace(tile, paired=True)))
    used = (dealt.expert_of_tile_T >= 0).repeat_interleave(UPRIGHT.rows)
    assert torch.equal(single[used], paired[used])


@pytest.mark.parametrize("rows", [7, 8])
def test_torch_multiplies_whole_units_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And rows of a weight up to the end of its last block; neither is left in the result."""
    torch.manual_seed(rows)
    x, weight = quantise_rows(torch.randn(rows, 256).bfloat16()), quantise_weight(torch.randn(200, 256).bfloat16())

    def product(
        a: Tensor, b: Tensor, a_scales: Tensor, _a: object, b_scales: Tensor, _b: object, **_: object
    ) -> Tensor:
        assert a.shape == (8, 256)
        assert a_scales.shape == (8, 2)
        assert b.shape == (256, 256)
        assert b_scales.shape == (4, 2)
        spread = b_scales[:2].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return ((a.float() * a_scales.repeat_interleave(BLOCK, 1)) @ (b.float() * spread)).bfloat16()

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", product)
    got = scaled_mm(x, weight)
    assert got.shape == (rows, 200)
    spread = weight.scales.repeat_interleave(BLOCK, 0)[:200].repeat_interleave(BLOCK, 1)
    expected = in_full(x) @ (weight.values_OI.double() * spread.double()).T
    torch.testing.assert_close(got.double(), expected, atol=0.3, rtol=1e-2)
