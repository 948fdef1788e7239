"""fp8: how values are rounded, products of quantised operands, attention over fp8 pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_engine.ops import Ops, load_ops
from llm_engine.ops.fp8 import dequantise_blocks, quantise_blocks
from llm_engine.ops_triton import build_on, mla
from llm_engine.ops_triton.plan import TritonPlan
from llm_engine.ops_triton.quant import quantise_rows, quantise_weight
from tests.ops import reference
from tests.ops.paged import PAIRS, Paged, all_angles

RANK, KEY, BLOCK_TOKENS = 256, 128, 8
PAGE_ROW = RANK + 4 * (RANK // 128) + 4 * PAIRS


@pytest.fixture
def fp8(device: torch.device) -> Ops:
    return build_on(device, "exact", torch.bfloat16, fp8=True)


def as_quantised(x: Tensor) -> Tensor:
    """The values that e4m3 with one power-of-two scale for 128 of them can hold, in float64."""
    groups = x.double().unflatten(-1, (-1, 128))
    exponent = (groups.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448).log2().ceil()
    scaled = (groups / exponent.exp2()).clamp(-448, 448).to(torch.float32).to(torch.float8_e4m3fn)
    return (scaled.double() * exponent.exp2()).flatten(-2)


def test_activations_round_to_nearest_even_under_a_power_of_two() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 384) * torch.tensor([1e-6, 1e-3, 1.0, 448.0, 1e4, 0.0])[:, None]
    x[2, :8] = torch.tensor([17.0, 19.0, 21.0, 448.0, -17.0, 0.0019, 0.001, 0.0009])  # ties and subnormals
    x = x.bfloat16()
    rows = quantise_rows(x)
    got = rows.values_RI.double() * rows.scales_GR.T.double().repeat_interleave(128, 1)
    assert torch.equal(got, as_quantised(x))


@pytest.mark.parametrize("rows", [128, 192, 576])
def test_weights_that_come_from_blocks_return_to_them(rows: int) -> None:
    torch.manual_seed(rows)
    stored = quantise_blocks((torch.randn(rows, 256) / 9).cpu(), (128, 128))
    weight = dequantise_blocks(*stored, (128, 128)).bfloat16().to(torch.get_default_device())
    packed = quantise_weight(weight)
    back = packed.values_OI.float() * packed.scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
    assert torch.equal(back, weight.float())


@pytest.mark.parametrize("rows", [1, 21])
def test_products_are_those_of_the_quantised_operands(fp8: Ops, rows: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 640).bfloat16(), torch.randn(200, 640).bfloat16()
    packed = fp8.pack_linear(weight)
    held = packed.weight_OI
    spread = held.scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)
    expected = as_quantised(x) @ (held.values_OI.double() * spread.double()).T
    torch.testing.assert_close(fp8.linear(x, packed).double(), expected, atol=1e-2, rtol=1e-2)
    full = x.double() @ weight.double().T
    assert (fp8.linear(x, packed).double() - full).abs().mean() < 0.05 * full.abs().mean()


@pytest.mark.parametrize("shared", [False, True])
def test_experts_are_close_to_those_in_full(fp8: Ops, shared: bool) -> None:
    torch.manual_seed(1)
    full = load_ops("cpu", "exact", "fp32")
    gate_up, down = torch.randn(5, 256, 256).bfloat16() / 16, torch.randn(5, 256, 128).bfloat16() / 11
    one = (torch.randn(256, 256).bfloat16() / 16, torch.randn(256, 128).bfloat16() / 11)
    x, weights = torch.randn(9, 256).bfloat16(), torch.rand(9, 2)
    ids = torch.rand(9, 5).argsort(-1)[:, :2]
    packed = fp8.pack_experts(zip(gate_up, down, strict=True), 5, shared=fp8.pack_mlp(*one) if shared else None)
    got = fp8.moe(x, ids, weights, packed).float().cpu()
    host = [t.float().cpu() for t in (gate_up, down, *one)]
    with torch.device("cpu"):
        on_host = full.pack_experts(zip(*host[:2], strict=True), 5, shared=full.pack_mlp(*host[2:]) if shared else None)
        expected = full.moe(x.float().cpu(), ids.cpu(), weights.cpu(), on_host)
    assert (got - expected).abs().mean() < 0.1 * expected.abs().mean()


class Pages:
    """One sequence of `length` rows in fp8 pages of scattered blocks, and a second of `beside` rows."""

    def __init__(self, ops: Ops, length: int, beside: int = 1) -> None:
        torch.manual_seed(length)
        self.ops = ops
        self.cache = Paged.random([length, beside], 16, torch.bfloat16, block_tokens=BLOCK_TOKENS)
        blocks = len(self.cache.plane)
        self.latent = torch.full((blocks, BLOCK_TOKENS, PAGE_ROW), 0x7F, dtype=torch.uint8)  # e4m3 NaN
        self.index = torch.full((blocks, BLOCK_TOKENS, KEY + 4), 0x7F, dtype=torch.uint8)
        self.kv, self.norm = torch.randn(length, RANK + 2 * PAIRS).bfloat16(), torch.randn(RANK)
        self.key, self.key_norm = torch.randn(length, KEY).bfloat16(), (torch.randn(KEY), torch.randn(KEY))
        plan = self.cache.plan(ops, [(0, 0, length)])
        ops.write_latent(self.latent, self.kv, self.norm, 1e-6, plan)
        ops.write_index_keys(self.index, self.key, *self.key_norm, 1e-6, plan)
        self.slots = self.cache.batch([(0, 0, length)], 1).slots_N
        other = torch.randn(beside, RANK + 2 * PAIRS).bfloat16()
        ops.write_latent(self.latent, other, self.norm, 1e-6, self.cache.plan(ops, [(1, 0, beside)]))

    def latent_rows(self) -> Tensor:
        """What the latent pages hold, in float64."""
        rows = self.latent.view(-1, PAGE_ROW)[self.slots]
        values, rest = rows[:, :RANK].contiguous().view(torch.float8_e4m3fn), rows[:, RANK:].contiguous()
        scales = rest[:, : RANK // 32].contiguous().view(torch.float32).double()
        rope = rest[:, RANK // 32 :].contiguous().view(torch.bfloat16).double()
        return torch.cat([values.double() * scales.repeat_interleave(128, 1), rope], 1)

    def index_rows(self) -> Tensor:
        """What the index pages hold, in float64."""
        pages = self.index.view(len(self.index), -1)
        values = pages[:, : BLOCK_TOKENS * KEY].contiguous().view(torch.float8_e4m3fn).view(-1, KEY)
        scales = pages[:, BLOCK_TOKENS * KEY :].contiguous().view(torch.float32).view(-1)
        return values[self.slots].double() * scales[self.slots].double()[:, None]


def test_pages_hold_the_quantised_rows(fp8: Ops) -> None:
    pages, angles = Pages(fp8, 21), all_angles()[:21]
    latents = reference.rms_norm(pages.kv[:, :RANK], pages.norm, 1e-6)
    got = pages.latent_rows()
    assert (got[:, :RANK] - as_quantised(latents)).abs().max() < 0.07 * latents.abs().max()
    assert (got[:, :RANK] - latents).abs().mean() < 0.03 * latents.abs().mean()
    turned = reference.rotate_pairs(pages.kv[:, RANK:], angles)
    torch.testing.assert_close(got[:, RANK:], turned, atol=2e-2, rtol=2e-2)
    keys = reference.layer_norm(pages.key, *pages.key_norm, 1e-6)
    keys = torch.cat([reference.rotate_halves(keys[:, : 2 * PAIRS], angles), keys[:, 2 * PAIRS :]], 1)
    assert (pages.index_rows() - keys).abs().mean() < 0.03 * keys.abs().mean()


def test_attention_reads_the_pages(fp8: Ops) -> None:
    """Sparse and dense, compared with float64 over what the pages hold."""
    pages = Pages(fp8, 70)
    key, value = torch.randn(4, 24, RANK).bfloat16() / 9, torch.randn(4, 16, RANK).bfloat16() / 9
    query = torch.randn(2, 4, 24 + 2 * PAIRS).bfloat16()
    plan, rows = pages.cache.plan(fp8, [(0, 68, 70)]), pages.latent_rows()
    sel = torch.full((2, 16), -1, dtype=torch.int32)
    sel[0, :3] = torch.tensor([2, 40, 68])
    sel[1] = torch.arange(16) * 4
    for chosen in (None, sel):
        got = fp8.mla_attend(query, pages.latent, plan, chosen, fp8.pack_kv_b(key, value), 0.17)
        for row in range(2):
            seen = list(range(69 + row)) if chosen is None else [t for t in sel[row].tolist() if t >= 0]
            expected = reference.attend(query[row], all_angles()[68 + row], rows[seen], key, value, 0.17)
            torch.testing.assert_close(got[row].double(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("k", [None, 48])
def test_many_rows_read_unpacked_keys(fp8: Ops, device: torch.device, k: int | None) -> None:
    """Two sequences of different lengths with `fast`, against `exact`, which reads the pages for every row."""
    pages, fast = Pages(fp8, 70, beside=40), build_on(device, "fast", torch.bfloat16, fp8=True)
    halves = torch.randn(4, 24, RANK).bfloat16() / 9, torch.randn(4, 16, RANK).bfloat16() / 9
    query = torch.randn(110, 4, 24 + 2 * PAIRS).bfloat16()
    plan = pages.cache.plan(fast, [(1, 0, 40), (0, 0, 70)])
    assert isinstance(plan, TritonPlan)
    sel = None
    if k is not None:
        sel = torch.rand(110, 70).masked_fill(torch.arange(70) >= plan.visible_N[:, None], -1.0).topk(k).indices
        sel = torch.where(plan.visible_N[:, None] > k, sel.sort(1).values, -1)
        sel = torch.where((sel < 0) & (torch.arange(k) < plan.visible_N[:, None]), torch.arange(k), sel).int()
    assert mla._pays(plan, k or 70, RANK + 2 * PAIRS)
    got, expected = (
        ops.mla_attend(query, pages.latent, plan, sel, ops.pack_kv_b(*halves), 0.17) for ops in (fast, fp8)
    )
    torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-2)
    unpacked = mla._unpacked(pages.latent, plan, RANK, query)
    assert torch.equal(unpacked[40:].double(), pages.latent_rows())


def test_the_indexer_reads_the_pages(fp8: Ops) -> None:
    pages, k = Pages(fp8, 70), 16
    query, g = torch.randn(3, 8, KEY).bfloat16(), torch.randn(3, 8)
    plan = pages.cache.plan(fp8, [(0, 67, 70)])
    sel = fp8.index_topk(query, g, pages.index, plan, k)
    assert sel is not None
    turned = reference.rotate_halves(query[..., : 2 * PAIRS], all_angles()[67:70])
    turned = as_quantised(torch.cat([turned, query[..., 2 * PAIRS :].double()], -1))
    for row in range(3):
        scores = reference.index_scores(turned[row], g[row], pages.index_rows()[: 68 + row])
        margin = scores[reference.top_k(scores, k)].min() - scores[sel[row].long()].min()
        assert sel[row].tolist() == sorted(set(sel[row].tolist()))
        assert float(margin) < 0.02 * float(scores.abs().max())
