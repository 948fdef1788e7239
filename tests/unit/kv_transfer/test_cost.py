"""Batches follow from the measured cost of a link."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.cost import CostCurve, CostMeter, choose_batching

curves = st.builds(CostCurve, st.floats(0, 1e-2), st.floats(1e5, 1e12))


@given(curves)
def test_batches_are_bounded_whatever_was_measured(curve: CostCurve) -> None:
    call, turn = choose_batching(curve)
    assert 1 << 20 <= call <= 64 << 20
    assert call <= turn <= 2 << 30


@given(curves)
def test_the_fixed_cost_of_a_call_does_not_show(curve: CostCurve) -> None:
    call, _ = choose_batching(curve)
    if call < 64 << 20 and curve.call_s < 1e-3:
        assert curve.call_s <= 0.0201 * curve.seconds(call)


def test_calls_grow_with_the_fixed_cost_and_turns_with_the_rate() -> None:
    network, slow, card = CostCurve(30e-6, 3e9), CostCurve(30e-6, 5e6), CostCurve(30e-6, 380e9)
    assert choose_batching(slow).turn_bytes == 1 << 20
    assert choose_batching(network).turn_bytes == pytest.approx(15e6, rel=0.02)
    assert choose_batching(card).turn_bytes == pytest.approx(1.9e9, rel=0.02)
    assert choose_batching(card).call_bytes == 64 << 20
    assert choose_batching(slow).call_bytes == 1 << 20
    assert choose_batching(network._replace(call_s=300e-6)).call_bytes > choose_batching(network).call_bytes


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-6, 1e-3), st.floats(1e7, 1e11), st.integers(0, 1 << 32))
def test_the_meter_finds_the_curve_that_calls_follow(call_s: float, bytes_per_s: float, seed: int) -> None:
    truth, meter, rng = CostCurve(call_s, bytes_per_s), CostMeter(), random.Random(seed)
    for _ in range(400):
        num_bytes = rng.choice([64 << 10, 1 << 20, 8 << 20, 32 << 20])
        meter.measured(num_bytes, truth.seconds(num_bytes) * rng.uniform(0.98, 1.02))
    for num_bytes in (1 << 20, 32 << 20):
        assert meter.curve.seconds(num_bytes) == pytest.approx(truth.seconds(num_bytes), rel=0.2)


def test_equal_calls_do_not_invent_a_fixed_part() -> None:
    meter = CostMeter(CostCurve(50e-6, 1e9))
    for _ in range(500):
        meter.measured(8 << 20, 2e-3)
    assert meter.curve.call_s < 200e-6
    assert meter.curve.seconds(8 << 20) == pytest.approx(2e-3, rel=0.01)


def test_a_link_that_became_slow_is_noticed_within_some_calls() -> None:
    meter = CostMeter()
    for _ in range(200):
        meter.measured(4 << 20, 1e-3)
    fast = meter.batching
    for _ in range(120):
        meter.measured(1 << 20, 0.2)
    assert meter.curve.bytes_per_s < 2e7
    assert meter.batching.turn_bytes < fast.turn_bytes
