from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.desired import POOLS, Desired, Plan, Present, initial, obeyed, plan, scaled
from llm_engine.api.config import PoolConfig, PoolsConfig
from llm_engine.api.errors import RequestError

sizes = st.fixed_dictionaries({pool: st.integers(0, 5) for pool in POOLS})
workers = st.lists(
    st.builds(
        lambda pool, number, draining: Present(name=f"{pool}-{number}", pool=pool, draining=draining),
        st.sampled_from(sorted(POOLS)),
        st.integers(0, 12),
        st.booleans(),
    ),
    max_size=12,
    unique_by=lambda worker: worker.name,
)


def carried_out(present: list[Present], steps: Plan) -> list[Present]:
    kept = [Present(name=w.name, pool=w.pool, draining=w.draining or w.name in steps.drain) for w in present]
    return kept + [Present(name=name, pool=pool, draining=False) for pool, name in steps.start]


@given(sizes, workers)
def test_one_plan_reaches_the_desired_state_and_the_next_is_empty(
    desired: dict[str, int], present: list[Present]
) -> None:
    after = carried_out(present, plan(desired, present))
    assert len({worker.name for worker in after}) == len(after), "a name was given twice"
    for pool, wanted in desired.items():
        assert sum(worker.pool == pool and not worker.draining for worker in after) == wanted
    assert plan(desired, after) == Plan((), ())


@given(sizes, workers)
def test_no_pool_shrinks_and_grows_at_once(desired: dict[str, int], present: list[Present]) -> None:
    steps = plan(desired, present)
    draining = {worker.pool for worker in present if worker.name in steps.drain}
    assert draining.isdisjoint(pool for pool, _ in steps.start)
    assert not any(worker.draining for worker in present if worker.name in steps.drain)


@given(sizes, workers, st.integers(0, 20), st.fixed_dictionaries({pool: st.integers(0, 3) for pool in POOLS}))
def test_a_budget_is_never_exceeded_and_is_used_once_drained_workers_are_gone(
    desired: dict[str, int], present: list[Present], budget: int, cards: dict[str, int]
) -> None:
    def held(workers: list[Present]) -> int:
        return sum(cards[worker.pool] for worker in workers)

    after = carried_out(present, plan(desired, present, cards, budget))
    assert held(after) <= max(budget, held(present))
    if sum(cards[pool] * size for pool, size in desired.items()) <= budget:
        left = [worker for worker in after if not worker.draining]
        left = carried_out(left, plan(desired, left, cards, budget))
        assert all(sum(w.pool == pool for w in left) == size for pool, size in desired.items())


def test_a_replica_that_changes_pools_drains_before_it_comes_back() -> None:
    present = [Present(name=name, pool=name[:-2], draining=False) for name in ("prefill-0", "prefill-1", "decode-0")]
    cards = {"prefill": 1, "decode": 1}
    flip = {"prefill": 1, "decode": 2}
    assert plan(flip, present, cards, 3) == Plan((), ("prefill-1",))
    present[1] = Present(name="prefill-1", pool="prefill", draining=True)
    assert plan(flip, present, cards, 3) == Plan((), ())
    assert plan(flip, [present[0], present[2]], cards, 3) == Plan((("decode", "decode-1"),), ())


def test_a_pool_shrinks_from_the_highest_number_and_fills_the_lowest() -> None:
    present = [Present(name=f"decode-{n}", pool="decode", draining=False) for n in (0, 2, 10)]
    assert plan({"decode": 1}, present).drain == ("decode-10", "decode-2")
    assert plan({"decode": 5}, present).start == (("decode", "decode-1"), ("decode", "decode-3"))


def test_scaling_changes_one_pool() -> None:
    desired = initial(PoolsConfig())
    assert scaled(desired, "decode", 4) == {**desired, "decode": 4}
    assert desired["decode"] == 1


@pytest.mark.parametrize(("pool", "replicas"), [("encode", 1), ("decode", -1), ("decode", 1025)])
def test_an_impossible_size_is_refused(pool: str, replicas: int) -> None:
    with pytest.raises(RequestError, match="expected"):
        scaled(initial(PoolsConfig()), pool, replicas)


def decode_pool(**pool: int) -> PoolsConfig:
    return PoolsConfig(decode=PoolConfig(**pool))


def test_a_configured_size_is_an_order_only_when_it_has_changed() -> None:
    state = obeyed(None, decode_pool(replicas=2))
    assert state.replicas["decode"] == 2
    state = Desired(replicas=scaled(state.replicas, "decode", 6), configured=state.configured)
    state = obeyed(state, decode_pool(replicas=2))  # another setting changed, this one did not
    assert state.replicas["decode"] == 6
    state = obeyed(state, decode_pool(replicas=4))
    assert state.replicas["decode"] == 4
    assert obeyed(state, decode_pool(replicas=4)) == state


def test_bounds_hold_for_every_writer() -> None:
    pools = decode_pool(replicas=2, min_replicas=1, max_replicas=4)
    state = obeyed(None, pools)
    for replicas in (0, 5):
        with pytest.raises(RequestError, match="expected 1 to 4"):
            scaled(state.replicas, "decode", replicas, pools)
    state = Desired(replicas=scaled(state.replicas, "decode", 4, pools), configured=state.configured)
    assert obeyed(state, decode_pool(replicas=2, max_replicas=3)).replicas["decode"] == 3
    assert obeyed(state, decode_pool(replicas=2, max_replicas=3)).replicas["prefill"] == 1
