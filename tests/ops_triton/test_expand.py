"""The end of attention of next to no rows in one launch, against its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm_engine.ops_triton import build_on, mla
from llm_engine.ops_triton.expand import merge_and_expand, serves
from llm_engine.ops_triton.quant import quantise_rows
from tests.ops import reference
from tests.ops.paged import PAIRS, Paged, all_angles


@pytest.mark.parametrize(("rows", "splits", "value"), [(1, 16, 128), (2, 5, 128), (2, 2, 64)])
def test_merged_expanded_and_quantised(rows: int, splits: int, value: int) -> None:
    torch.manual_seed(rows)
    partial_sums, sums = torch.randn(splits, rows, 4, 256), torch.rand(splits, rows, 4, 2) + 0.1
    partial_sums[:, 0, 1], sums[:, 0, 1, 1] = 0.0, 0.0  # has seen no keys
    weight = torch.randn(4, value, 256).bfloat16() / 16
    assert serves(rows, splits, weight)
    got = merge_and_expand(partial_sums, sums, weight, fp8=True)
    share = torch.exp2(sums[..., 0] - sums[..., 0].amax(0))
    total = (sums[..., 1] * share).sum(0)
    latent = (partial_sums.double() * share[..., None]).sum(0) / torch.where(total == 0, 1.0, total)[..., None]
    expected = torch.einsum("rhl,hvl->rhv", latent, weight.double())
    torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=1e-2)
    assert not got[0, 1].any()
    carried, anew = quantise_rows(got), quantise_rows(got.flatten(1))
    assert torch.equal(carried.values_RI.float(), anew.values_RI.float())
    assert torch.equal(carried.scales_GR, anew.scales_GR)


def test_attention_ends_so_for_a_row_of_several_splits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ops, cache = (
        build_on(device, "fast", torch.bfloat16, fp8=True),
        Paged.random([300], 128 + 2 * PAIRS, torch.bfloat16),
    )
    key, value = torch.randn(4, 24, 128).bfloat16() / 9, torch.randn(4, 128, 128).bfloat16() / 9
    query, used = torch.randn(2, 4, 24 + 2 * PAIRS).bfloat16(), []

    def noted(*args: Any, fp8: bool) -> Tensor:
        used.append(args[0].shape)
        return merge_and_expand(*args, fp8=fp8)

    monkeypatch.setattr(mla, "merge_and_expand", noted)
    plan = cache.plan(ops, [(0, 298, 300)])
    got = ops.mla_attend(query, cache.plane, plan, None, ops.pack_kv_b(key, value), 0.17)
    assert used == [(5, 2, 4, 128)]
    for row in range(2):
        expected = reference.attend(query[row], all_angles()[298 + row], cache.rows[0][: 299 + row], key, value, 0.17)
        torch.testing.assert_close(got[row].double(), expected, atol=3e-2, rtol=3e-2)
    weight = ops.pack_linear(torch.randn(128, 512).bfloat16() / 9)
    assert torch.equal(ops.linear(got, weight), ops.linear(got.clone(), weight))
