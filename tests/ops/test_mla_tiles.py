"""Attention of single rows on tile registers: what it computes, what it leaves alone, and who else uses the tiles."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_engine.ops import load_ops
from llm_engine.ops_cpu import mla_tiles
from llm_engine.ops_cpu.mla_free import FreePlan
from llm_engine.ops_cpu.tiles import configuration, has_tiles, load_configuration, store_configuration
from tests.ops.paged import Paged

pytestmark = pytest.mark.skipif(not has_tiles(), reason="needs a CPU with bf16 tiles (AMX)")

RANK, WIDTH, SCALE = 128, 160, 0.09
OPS = load_ops("cpu", "fast", "bf16")


def plan_of(cache: Paged, spans: list[tuple[int, int, int]]) -> FreePlan:
    plan = cache.plan(OPS, spans)
    assert isinstance(plan, FreePlan)
    return plan


def attend(cache: Paged, spans: list[tuple[int, int, int]], query_nhC: Tensor) -> Tensor:
    plan, cache_SC = plan_of(cache, spans), cache.plane.view(-1, WIDTH)
    assert mla_tiles.fits(cache_SC, RANK, cache.block_tokens)
    return mla_tiles.attend_rows(query_nhC, cache_SC, plan, plan.alone_n, RANK, SCALE)


def expected(cache: Paged, spans: list[tuple[int, int, int]], query_nhC: Tensor) -> Tensor:
    rows = [cache.rows[seq][: position + 1] for seq, first, end in spans for position in range(first, end)]
    scores = [torch.einsum("hc,tc->ht", q.double(), keys.double()) for q, keys in zip(query_nhC, rows, strict=True)]
    shares = [(score * SCALE).softmax(-1) for score in scores]
    return torch.stack([p @ keys.double()[:, :RANK] for p, keys in zip(shares, rows, strict=True)])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_it_matches_float64_for_any_lengths_heads_and_blocks(data: st.DataObject) -> None:
    """What nobody wrote is NaN, so a key too many shows."""
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=6))
    heads = data.draw(st.sampled_from([1, 3, 8, 16, 17, 40]))
    cache = Paged.random(lengths, WIDTH, torch.bfloat16, block_tokens=data.draw(st.sampled_from([16, 32])))
    spans = [(seq, length - data.draw(st.integers(1, min(4, length))), length) for seq, length in enumerate(lengths)]
    query = torch.randn(sum(end - first for _, first, end in spans), heads, WIDTH).bfloat16()
    got = attend(cache, spans, query)
    torch.testing.assert_close(got.double(), expected(cache, spans, query), atol=2e-2, rtol=2e-2)


def test_a_key_that_is_no_number_makes_the_row_none() -> None:
    """Sampling notices that, and no token is drawn from it. Rows that do not see the key stay sound."""
    cache = Paged.random([70, 70], WIDTH, torch.bfloat16, block_tokens=16)
    table = cache.tables[0].long()
    cache.plane[table[1], 3, 0] = torch.nan  # position 19
    got = attend(cache, [(0, 18, 20), (1, 69, 70)], torch.randn(3, 8, WIDTH).bfloat16())
    assert got.isfinite().flatten(1).all(1).tolist() == [True, False, True]
    assert got[1].isnan().all()


def test_a_large_score_does_not_overflow() -> None:
    cache = Paged.random([70], WIDTH, torch.bfloat16, block_tokens=16)
    query = 1000 * torch.randn(1, 8, WIDTH).bfloat16()
    got = attend(cache, [(0, 69, 70)], query)
    torch.testing.assert_close(got.double(), expected(cache, [(0, 69, 70)], query), atol=2e-2, rtol=2e-2)


@numba.njit()
def set_up(tiles: Any) -> None:
    load_configuration(tiles)


@numba.njit()
def read_set_up(tiles: Any) -> None:
    store_configuration(tiles)


def test_the_tiles_are_given_back_as_they_were() -> None:
    """They are one for all code of a thread, oneDNN's too."""
    others, after = configuration(), np.empty(64, np.uint8)
    others[48:56] = 8  # rows
    set_up(others)
    try:
        cache = Paged.random([40], WIDTH, torch.bfloat16, block_tokens=16)
        attend(cache, [(0, 39, 40)], torch.randn(1, 8, WIDTH).bfloat16())
        read_set_up(after)
    finally:
        set_up(np.zeros(64, np.uint8))
    assert after.tolist() == others.tolist()


def test_pages_that_are_no_whole_tiles_are_gathered() -> None:
    cache_SC = torch.zeros(64, WIDTH, dtype=torch.bfloat16)
    assert not mla_tiles.fits(cache_SC, RANK, 8)
    assert not mla_tiles.fits(cache_SC, 96, 16)
    assert not mla_tiles.fits(cache_SC[:, :144], RANK, 16)
    assert not mla_tiles.fits(cache_SC.float(), RANK, 16)


def test_both_forms_give_an_engine_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Paged.random([40, 90, 7], WIDTH, torch.bfloat16, block_tokens=16)
    plain, pairs, value, heads = 32, (WIDTH - RANK) // 2, 48, 8
    kv_b = OPS.pack_kv_b(torch.randn(heads, plain, RANK) / 8, torch.randn(heads, value, RANK) / 8)
    batch = cache.batch([(0, 39, 40), (1, 60, 90), (2, 5, 7)], 1)  # the chunk of 30 rows has a form of its own
    angles = torch.outer(torch.arange(90.0), 0.7 ** torch.arange(float(pairs)))
    query = torch.randn(33, heads, plain + 2 * pairs).bfloat16()

    def attention() -> Tensor:
        plan = OPS.plan(batch, block_tokens=16, cos_TJ=angles.cos(), sin_TJ=angles.sin())
        return OPS.mla_attend(query, cache.plane, plan, None, kv_b, SCALE)

    rows: list[int] = []
    through = mla_tiles.attend_rows

    def counted(query_nhC: Tensor, **kwargs: Any) -> Tensor:
        rows.append(len(query_nhC))
        return through(query_nhC, **kwargs)

    monkeypatch.setattr(mla_tiles, "attend_rows", counted)
    with_tiles = attention()
    monkeypatch.setattr(mla_tiles, "fits", lambda *_: False)
    torch.testing.assert_close(with_tiles, attention(), atol=2e-2, rtol=2e-2)
    assert rows == [3]
