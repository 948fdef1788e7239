"""Norms, rotations and cache writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.ops import Ops, load_ops
from tests.ops import reference
from tests.ops.paged import PAIRS, Paged, all_angles, padded_rows

RANK, WIDTH = 40, 24
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def test_norms_match_float64(ops: Ops) -> None:
    torch.manual_seed(0)
    wide, residual = torch.randn(13, 120).to(ops.dtype), torch.randn(13, 77).to(ops.dtype)
    x, weight, tolerance = wide[:, 20:97], torch.randn(77).to(ops.dtype), TOLERANCE[ops.dtype]
    expected = reference.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6).double(), expected, atol=tolerance, rtol=tolerance)
    total = x.double() + residual.double()
    normed, stream = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert normed.dtype == stream.dtype == ops.dtype
    torch.testing.assert_close(stream.double(), total, atol=tolerance, rtol=tolerance)
    expected = reference.rms_norm(total, weight, 1e-6)
    torch.testing.assert_close(normed.double(), expected, atol=2 * tolerance, rtol=2 * tolerance)


def test_norm_of_zeros_is_zero(exact: Ops) -> None:
    assert torch.equal(exact.rms_norm(torch.zeros(3, 8), torch.ones(8), 1e-6), torch.zeros(3, 8))


def test_latent_rows_are_normed_rotated_and_placed(ops: Ops) -> None:
    torch.manual_seed(0)
    cache = Paged.random([30, 17], RANK + 2 * PAIRS, ops.dtype)
    spans = [(0, 10, 30), (1, 16, 17)]
    plan = cache.plan(ops, spans)
    kv, weight = torch.randn(21, RANK + 2 * PAIRS).to(ops.dtype), torch.randn(RANK).to(ops.dtype)
    before = cache.plane.clone()
    ops.write_latent(cache.plane, padded_rows(kv, ops.row_tile), weight, 1e-6, plan)
    batch = cache.batch(spans, ops.row_tile)
    written = cache.plane.view(-1, RANK + 2 * PAIRS)[batch.slots_N].double()
    turned = reference.rotate_pairs(kv[:, RANK:], all_angles()[batch.positions_R[:21]])
    tolerance = TOLERANCE[ops.dtype]
    expected = reference.rms_norm(kv[:, :RANK], weight, 1e-6)
    torch.testing.assert_close(written[:, :RANK], expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(written[:, RANK:], turned, atol=tolerance, rtol=tolerance)
    untouched = torch.ones(len(before.flatten(0, 1)), dtype=torch.bool)
    untouched[batch.slots_N] = False
    same = torch.equal(
        cache.plane.flatten(0, 1)[untouched].nan_to_num(7.0), before.flatten(0, 1)[untouched].nan_to_num(7.0)
    )
    assert same, "a slot outside of the batch was written"


@pytest.mark.parametrize("interleaved", [False, True])
def test_index_keys_are_normed_rotated_and_placed(ops: Ops, interleaved: bool) -> None:
    torch.manual_seed(0)
    cache = Paged.random([30], WIDTH, ops.dtype)
    plan = cache.plan(ops, [(0, 3, 30)])
    key, weight, bias = torch.randn(27, WIDTH).to(ops.dtype), torch.randn(WIDTH), torch.randn(WIDTH)
    ops.write_index_keys(cache.plane, padded_rows(key, ops.row_tile), weight, bias, 1e-6, plan, interleaved=interleaved)
    slots = cache.batch([(0, 3, 30)], ops.row_tile).slots_N
    written = cache.plane.view(-1, WIDTH)[slots].double()
    normed = reference.layer_norm(key, weight, bias, 1e-6)
    right, wrong = reference.rotate_halves, reference.rotate_pairs
    if interleaved:
        right, wrong = wrong, right
    front = right(normed[:, : 2 * PAIRS], all_angles()[3:30])
    tolerance = TOLERANCE[ops.dtype]
    torch.testing.assert_close(written[:, : 2 * PAIRS], front, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(written[:, 2 * PAIRS :], normed[:, 2 * PAIRS :], atol=tolerance, rtol=tolerance)
    assert (written[:, : 2 * PAIRS] - wrong(normed[:, : 2 * PAIRS], all_angles()[3:30])).abs().max() > 0.5


def test_bf16_cache_rows_round_to_nearest_even(exact_bf16: Ops) -> None:
    """The only rounding of a rotated, un-normed channel at position 0 is the store."""
    cache = Paged.random([1], RANK + 2 * PAIRS, torch.bfloat16)
    plan = cache.plan(exact_bf16, [(0, 0, 1)])
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x00008000, 0x7FC12345, 0x3F800000]
    )
    values = bits.to(torch.int32).view(torch.float32)
    kv = torch.ones(1, RANK + 2 * PAIRS)
    kv[0, RANK::2] = values
    kv[0, RANK + 1 :: 2] = 0.0
    exact_bf16.write_latent(cache.plane, kv, torch.ones(RANK), 1e-6, plan)
    slot = cache.batch([(0, 0, 1)], 1).slots_N[0]
    stored = cache.plane.view(-1, RANK + 2 * PAIRS)[slot, RANK::2]
    assert torch.equal(stored.nan_to_num(7.0), values.bfloat16().nan_to_num(7.0))
    assert stored.isnan().sum() == 1


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_cache_rows_do_not_depend_on_the_chunking(data: st.DataObject) -> None:
    ops = load_ops("cpu", "exact", data.draw(st.sampled_from(["fp32", "bf16"])))
    torch.manual_seed(0)
    length, width = 60, RANK + 2 * PAIRS
    x = torch.randn(length, width + WIDTH).to(ops.dtype)
    weight, index_weight, bias = torch.randn(RANK), torch.randn(WIDTH), torch.randn(WIDTH)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=8)))

    def fill(bounds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        latent = Paged.random([length], width, ops.dtype)
        index = Paged.random([length], WIDTH, ops.dtype)
        for first, end in zip([0, *bounds], [*bounds, length], strict=True):
            rows = padded_rows(x[first:end], ops.row_tile)
            ops.write_latent(latent.plane, rows[:, :width], weight, 1e-6, latent.plan(ops, [(0, first, end)]))
            plan = index.plan(ops, [(0, first, end)])
            ops.write_index_keys(index.plane, rows[:, width:], index_weight, bias, 1e-6, plan)
        return latent.plane.nan_to_num(7.0), index.plane.nan_to_num(7.0)

    for whole, chunked in zip(fill([]), fill(cuts), strict=True):
        assert torch.equal(whole, chunked)
