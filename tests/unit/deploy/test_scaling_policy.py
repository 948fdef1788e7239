from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.scaling_policy import LOOPS, Decision, Need, PoolState, ScalingPolicy, Signals, split
from llm_engine.api.config import AutoscalerConfig
from tests.unit.deploy.pool_model import Cluster, Mix

CALM = Signals(
    ttft_s=0.3,
    backlog_s=0.1,
    prefill_busy=0.5,
    tpot_s=0.03,
    decode_kv=0.5,
    decode_kv_mean=0.5,
    decode_seqs=0.5,
    decode_seqs_mean=0.5,
    seqs_per_decode=8,
)
IDLE = Signals(backlog_s=0.0, prefill_busy=0.0, decode_kv=0.0, decode_seqs=0.0)
AGENTS = Mix(prompt_tokens=8000, output_tokens=100)  # long prompts, short answers
REASONING = Mix(prompt_tokens=500, output_tokens=2000)  # short prompts, long answers


def config(**settings: Any) -> AutoscalerConfig:
    return AutoscalerConfig(**{"mode": "act", "tpot_slo_s": 0.04, **settings})


def pools(prefill: int = 2, decode: int = 2, **bounds: int) -> dict[str, PoolState]:
    sizes = {"prefill": prefill, "decode": decode}
    return {pool: PoolState(replicas=size, ready=size, **bounds) for pool, size in sizes.items()}


def settled(policy: ScalingPolicy, state: dict[str, PoolState], signals: Signals, seconds: float = 1e4) -> Decision:
    """What the policy says when the signals have stayed like this for long."""
    policy.decide(0.0, state, signals)
    return policy.decide(seconds, state, signals)


def test_a_load_that_fits_changes_nothing() -> None:
    decision = settled(ScalingPolicy(config()), pools(), CALM)
    assert decision.sizes == {"prefill": 2, "decode": 2}
    assert decision.flips == 0


@pytest.mark.parametrize(
    ("signals", "pool", "said"),
    [
        (replace(CALM, backlog_s=5.0), "prefill", "backlog 5 s"),
        (replace(CALM, prefill_busy=1.0), "prefill", "computes 100%"),
        (replace(CALM, ttft_s=6.0, queue_share=0.9), "prefill", "TTFT p90 6 s"),
        (replace(CALM, tpot_s=0.06), "decode", "TPOT p90 60 ms"),
        (replace(CALM, decode_kv=0.95), "decode", "KV 95%"),
        (replace(CALM, decode_seqs=1.5), "decode", "places 150%"),
    ],
)
def test_each_signal_grows_its_own_pool_and_says_why(signals: Signals, pool: str, said: str) -> None:
    decision = settled(ScalingPolicy(config()), pools(), signals)
    assert decision.sizes[pool] > 2
    assert decision.sizes[{"prefill": "decode", "decode": "prefill"}[pool]] == 2
    assert said in decision.reasons[pool]


def test_more_workers_are_not_asked_to_shorten_what_they_can_not() -> None:
    slow_prompts = replace(CALM, ttft_s=9.0, queue_share=0.0)
    assert settled(ScalingPolicy(config()), pools(), slow_prompts).sizes["prefill"] == 2
    one_each = replace(CALM, tpot_s=0.09, seqs_per_decode=1.0)
    assert settled(ScalingPolicy(config()), pools(), one_each).sizes["decode"] == 2


def test_a_short_peak_is_not_an_order() -> None:
    policy, state, peak = ScalingPolicy(config(up_after_s=10.0)), pools(), replace(CALM, backlog_s=9.0)
    assert policy.decide(0.0, state, peak).sizes == {"prefill": 2, "decode": 2}
    policy.decide(9.0, state, CALM)
    assert policy.decide(12.0, state, peak).sizes == {"prefill": 2, "decode": 2}
    assert policy.decide(22.0, state, peak).sizes["prefill"] == 4


def test_a_pool_that_is_short_does_not_wait_for_the_change_of_the_other() -> None:
    policy, state, short = ScalingPolicy(config(up_after_s=10.0)), pools(), replace(CALM, backlog_s=9.0)
    policy.decide(0.0, state, short)
    policy.changed(9.0, ["decode"])
    assert policy.decide(10.0, state, short).sizes["prefill"] == 4
    policy.changed(10.0, ["prefill"])
    assert policy.decide(12.0, state, short).sizes["prefill"] == 2


def test_a_pool_shrinks_slowly_and_never_right_after_a_change() -> None:
    policy, state = ScalingPolicy(config(down_after_s=120.0, cooldown_s=300.0)), pools(4, 4)
    policy.changed(0.0)
    policy.decide(0.0, state, IDLE)
    assert policy.decide(299.0, state, IDLE).sizes == {"prefill": 4, "decode": 4}
    decision = policy.decide(300.0, state, IDLE)
    assert sorted(decision.sizes.values()) == [3, 4], "one replica at a time"


@pytest.mark.parametrize("nothing", [Signals(), Signals(ttft_s=9.0, tpot_s=9.0)])
def test_without_measurements_nothing_changes(nothing: Signals) -> None:
    decision = settled(ScalingPolicy(config()), pools(3, 3), nothing)
    assert decision == Decision({"prefill": 3, "decode": 3}, dict.fromkeys(LOOPS, "nothing measured"))


def test_a_full_budget_moves_a_worker_from_the_pool_that_has_room() -> None:
    policy = ScalingPolicy(config(max_cards=6))
    decision = settled(policy, pools(4, 2), replace(CALM, prefill_busy=0.2, decode_kv=0.99))
    assert (decision.sizes, decision.flips) == ({"prefill": 3, "decode": 3}, 1)
    assert "gives 1 to decode" in decision.reasons["prefill"]


def test_a_full_budget_moves_nobody_when_both_are_short_or_the_last_change_is_recent() -> None:
    short = replace(CALM, backlog_s=3.0, decode_kv=0.99)
    decision = settled(ScalingPolicy(config(max_cards=4)), pools(), short)
    assert decision.sizes == {"prefill": 2, "decode": 2}
    assert "no card is free" in decision.reasons["prefill"]
    policy, state = ScalingPolicy(config(max_cards=6, cooldown_s=60.0)), pools(4, 2)
    policy.changed(0.0)
    lopsided = replace(CALM, prefill_busy=0.1, decode_kv=0.99)
    policy.decide(0.0, state, lopsided)
    assert policy.decide(59.0, state, lopsided).flips == 0
    assert policy.decide(61.0, state, lopsided).flips == 1


shares = st.floats(0, 3, allow_nan=False)
sizes = st.integers(1, 12)


@given(
    st.builds(
        Signals,
        ttft_s=st.none() | st.floats(0, 60),
        queue_share=st.floats(0, 1),
        backlog_s=st.none() | st.floats(0, 100),
        prefill_busy=st.none() | st.floats(0, 1),
        tpot_s=st.none() | st.floats(0, 1),
        decode_kv=st.none() | st.floats(0, 1),
        decode_kv_mean=st.floats(0, 1),
        decode_seqs=st.none() | st.floats(0, 1),
        decode_seqs_mean=st.floats(0, 1),
        prefill_busy_now=st.floats(0, 1),
        queued_s=st.floats(0, 100),
        queued_seqs=shares,
        seqs_per_decode=st.floats(0, 64),
    ),
    sizes,
    sizes,
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(2, 40),
    st.integers(0, 4),
)
def test_bounds_and_budget_hold_whatever_is_measured(
    signals: Signals, p: int, d: int, p_ready: int, d_ready: int, p_cards: int, d_cards: int, budget: int, others: int
) -> None:
    state = {
        "prefill": PoolState(replicas=p, ready=min(p, p_ready), low=1, high=12, cards=p_cards),
        "decode": PoolState(replicas=d, ready=min(d, d_ready), low=1, high=12, cards=d_cards),
    }
    policy = ScalingPolicy(config(max_cards=budget))
    policy.decide(0.0, state, signals, others=others)
    decision = policy.decide(1e4, state, signals, others=others)
    assert all(1 <= size <= 12 for size in decision.sizes.values())
    before, after = (
        others + sum(counts[pool] * state[pool].cards for pool in LOOPS)
        for counts in ({"prefill": p, "decode": d}, decision.sizes)
    )
    assert after <= max(before, budget)
    for pool, there in state.items():
        assert decision.sizes[pool] <= max(there.replicas, 2 * there.ready, there.ready + 1), "grew too fast"
        if decision.sizes[pool] < there.replicas and not decision.flips:
            assert decision.sizes[pool] == there.replicas - 1


@given(
    st.floats(0.1, 30), st.floats(0.1, 30), st.integers(2, 24), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)
)
def test_the_split_of_a_budget_is_the_best_there_is(
    p: float, d: float, cards: int, p_cards: int, d_cards: int, low: int
) -> None:
    state = {
        "prefill": PoolState(replicas=1, ready=1, low=low, cards=p_cards),
        "decode": PoolState(replicas=1, ready=1, low=low, cards=d_cards),
    }
    needs = {"prefill": Need(p, "", p), "decode": Need(d, "", d)}
    got = split(cards, state, needs)
    if p_cards == d_cards == 1 and cards >= 2 * low:
        best = min(max(p / n, d / (cards - n)) for n in range(low, cards - low + 1))
        assert max(p / got["prefill"], d / got["decode"]) == pytest.approx(best)
    assert all(size >= low for size in got.values())


def test_a_tenfold_load_is_followed_within_three_minutes_and_given_back() -> None:
    cluster = Cluster(config=config(up_after_s=10.0))
    cluster.run(600, lambda now: 1.0, Mix())
    assert cluster.met()
    small = dict(cluster.sizes)
    cluster.run(180, lambda now: 10.0, Mix())
    assert cluster.met(), (cluster.sizes, cluster.signals)
    large = dict(cluster.sizes)
    assert min(large.values()) > max(small.values())
    cluster.run(3600, lambda now: 10.0, Mix())
    assert cluster.met()
    assert [cluster.turns(pool) for pool in LOOPS] <= [1, 1], "it swings under a steady load"
    cluster.run(7200, lambda now: 1.0, Mix())
    assert cluster.sizes == small
    assert cluster.met()


def best_sizes(mix: Mix, rate: float, budget: int) -> tuple[int, int]:
    """By trying every split: the one with the lowest TTFT and TPOT relative to their targets after ten minutes."""

    def score(prefill: int) -> float:
        trial = Cluster(
            config=config(mode="act", up_after_s=1e9, down_after_s=1e9),
            sizes={"prefill": prefill, "decode": budget - prefill},
        )
        trial.run(600, lambda now: rate, mix)
        signals = trial.signals
        assert signals.ttft_s is not None
        assert signals.tpot_s is not None
        waits = trial.waiting / max(trial.running, 1.0)
        return max(signals.ttft_s / trial.config.ttft_slo_s, signals.tpot_s / trial.config.tpot_slo_s + waits)

    prefill = min(range(1, budget), key=score)
    return prefill, budget - prefill


@pytest.mark.parametrize(("mix", "rate"), [(AGENTS, 5.5), (REASONING, 2.0)])
@pytest.mark.parametrize("start", [(2, 6), (4, 4), (6, 2)])
def test_a_full_budget_ends_at_a_split_that_serves_the_mix(mix: Mix, rate: float, start: tuple[int, int]) -> None:
    cluster = Cluster(config=config(max_cards=8), sizes=dict(zip(LOOPS, start, strict=True)))
    cluster.run(1800, lambda now: rate, mix)
    assert cluster.met(), (cluster.sizes, cluster.signals)
    assert sum(cluster.sizes.values()) <= 8
    more, fewer = ("prefill", "decode") if mix is AGENTS else ("decode", "prefill")
    assert cluster.sizes[more] > cluster.sizes[fewer], cluster.sizes
    best = dict(zip(LOOPS, best_sizes(mix, rate, 8), strict=True))
    assert best[more] > best[fewer], "the test's own arithmetic"


def test_a_shift_of_the_mix_is_followed_by_flips() -> None:
    cluster = Cluster(config=config(max_cards=8), sizes={"prefill": 6, "decode": 2})
    cluster.run(900, lambda now: 5.0, AGENTS)
    cluster.run(1800, lambda now: 2.0, REASONING)
    assert cluster.sizes["decode"] > cluster.sizes["prefill"]
    assert cluster.met(), (cluster.sizes, cluster.signals)
    late = [sizes for at, sizes in cluster.changes if at > cluster.now - 600]
    assert len(list(itertools.groupby(late))) <= 2, "it swings under a steady load"


@pytest.mark.parametrize(
    ("busy_now", "taken", "growing"),
    [(1.0, 0.4, {"prefill"}), (0.3, 1.0, {"decode"}), (1.0, 1.0, {"prefill", "decode"}), (0.3, 0.4, set())],
)
def test_what_waits_at_the_routers_counts_for_the_pool_that_is_full(
    busy_now: float, taken: float, growing: set[str]
) -> None:
    waiting = replace(CALM, prefill_busy_now=busy_now, queued_s=8.0, decode_seqs=taken, queued_seqs=3.0)
    decision = settled(ScalingPolicy(config()), pools(), waiting)
    assert {pool for pool in LOOPS if decision.sizes[pool] == 4} == growing
    assert {pool for pool in LOOPS if decision.sizes[pool] == 2} == set(LOOPS) - growing


def test_hand_offs_that_wait_for_their_prefill_do_not_hold_a_decode_worker_back() -> None:
    policy = ScalingPolicy(config(max_cards=4))
    idle = dict.fromkeys(("decode_kv", "decode_kv_mean", "decode_seqs", "decode_seqs_mean"), 0.2)
    slow_prefill = replace(CALM, prefill_busy=1.0, queued_seqs=0.7, tpot_s=0.01, **idle)
    decision = settled(policy, pools(), slow_prefill)
    assert (decision.sizes, decision.flips) == ({"prefill": 3, "decode": 1}, 1)


def test_a_queue_at_prefill_workers_that_rest_is_the_decode_pools() -> None:
    blocked = replace(
        CALM, ttft_s=9.0, queue_share=0.9, backlog_s=5.0, prefill_busy=0.1, decode_seqs=1.0, decode_seqs_mean=0.9
    )
    decision = settled(ScalingPolicy(config(max_cards=4)), pools(), replace(blocked, queued_seqs=1.0))
    assert decision.sizes == {"prefill": 1, "decode": 3}
