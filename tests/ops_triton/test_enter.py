"""The norm of queries and the writing of both caches at once, against the operations that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_engine.ops_triton import build_on
from llm_engine.ops_triton.quant import quantise_rows
from tests.ops.paged import PAIRS, Paged


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("format", ["fp8", "bf16"])
def test_at_once_and_one_after_the_other(device: torch.device, format: str, interleaved: bool) -> None:
    torch.manual_seed(0)
    fp8, rank, key_width = format == "fp8", 256, 128
    ops = build_on(device, "exact", torch.bfloat16, fp8=fp8)
    assert ops.enter is not None
    projected = torch.randn(5, 384 + rank + 2 * PAIRS + key_width).bfloat16()
    query, kv, key = projected.split([384, rank + 2 * PAIRS, key_width], dim=-1)
    query_norm, latent_norm, key_norm = torch.randn(384), torch.randn(rank), (torch.randn(key_width), torch.randn(128))
    cache = Paged.random([20, 9], 16, torch.bfloat16)
    batch = cache.batch([(0, 15, 18), (1, 7, 9)], 1)
    batch.slots_N[1] = -1
    angles = torch.rand(20, PAIRS) * 6
    plan = ops.plan(batch, block_tokens=8, cos_TJ=angles.cos(), sin_TJ=angles.sin())
    widths = (rank + 8 + 4 * PAIRS, key_width + 4) if fp8 else (rank + 2 * PAIRS, key_width)
    planes = [torch.zeros(len(cache.plane), 8, width, dtype=torch.uint8 if fp8 else torch.bfloat16) for width in widths]
    others = [plane.clone() for plane in planes]
    got = ops.enter(
        query, query_norm, planes[0], kv, latent_norm, planes[1], key, key_norm, 1e-6, 1e-5, plan,
        interleaved=interleaved,
    )  # fmt: skip
    ops.write_latent(others[0], kv, latent_norm, 1e-6, plan)
    ops.write_index_keys(others[1], key, *key_norm, 1e-5, plan, interleaved=interleaved)
    expected = ops.rms_norm(query, query_norm, 1e-6)
    assert torch.equal(got, expected)
    assert all(torch.equal(*pair) for pair in zip(planes, others, strict=True))
    assert all(plane.any() for plane in planes)

    def quantised(x: Tensor) -> Tensor:
        rows = quantise_rows(x)
        return rows.values_RI.float() * rows.scales_GR.T.repeat_interleave(128, 1)

    assert torch.equal(quantised(got), quantised(expected.clone()))
