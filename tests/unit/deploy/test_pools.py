from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from deploy.desired import MAX_CHANGES
from deploy.pools import Pools
from deploy.rundir import RunDir
from llm_engine.api.config import PoolsConfig
from llm_engine.api.errors import RequestError


def configured(**decode: Any) -> PoolsConfig:
    return PoolsConfig.model_validate({"prefill": {"replicas": 1}, "decode": {"replicas": 2, **decode}})


@pytest.fixture
def store(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


async def make(store: RunDir, pools: PoolsConfig, max_cards: int | None = None) -> Pools:
    made = Pools(pools, store, lambda: 1000.0, max_cards=max_cards)
    await made.obey(pools)
    return made


async def test_a_size_survives_the_same_configuration_and_yields_to_a_changed_one(store: RunDir) -> None:
    pools = await make(store, configured())
    await pools.scale("decode", 5, by="cli")
    again = await make(store, configured())
    assert again.sizes["decode"] == 5
    await again.obey(configured(max_replicas=9))
    assert again.sizes["decode"] == 5, "nothing was said about the size"
    await again.obey(configured(replicas=3))
    assert again.sizes["decode"] == 3
    assert [(c.before, c.after, c.by) for c in again.changes] == [(2, 5, "cli"), (5, 3, "configuration")]


async def test_the_budget_bounds_growth_and_never_a_shrinking_pool(store: RunDir) -> None:
    pools = await make(store, configured(cards=2), max_cards=5)
    with pytest.raises(RequestError, match=r"would hold 7 cards, autoscaler\.max_cards=5"):
        await pools.scale("decode", 3, by="cli")
    assert pools.sizes["decode"] == 2
    pools.max_cards = 1
    await pools.scale("decode", 1, by="cli")
    assert pools.sizes["decode"] == 1
    with pytest.raises(RequestError, match="scale another pool down first"):
        await pools.scale("prefill", 2, by="cli")


async def test_a_decision_about_other_sizes_is_not_carried_out(store: RunDir) -> None:
    pools = await make(store, configured())
    seen = dict(pools.sizes)
    await pools.scale("decode", 4, by="admin")
    assert not await pools.move(seen, {"decode": 3}, by="autoscaler", reasons={})
    assert await pools.move(dict(pools.sizes), {"decode": 3, "prefill": 2}, by="autoscaler", reasons={"decode": "idle"})
    assert (pools.sizes["prefill"], pools.sizes["decode"]) == (2, 3)
    assert {(change.pool, change.reason) for change in pools.changes[-2:]} == {("prefill", ""), ("decode", "idle")}


async def test_orders_at_the_same_time_are_all_kept_and_old_notes_are_dropped(store: RunDir) -> None:
    pools = await make(store, configured())
    orders = [pools.scale(("prefill", "decode")[i % 2], 3 + i, by=f"client {i}") for i in range(MAX_CHANGES + 10)]
    await asyncio.gather(*orders)
    saved = store.desired()
    assert saved is not None
    assert saved.replicas == dict(pools.sizes)
    assert saved.changes == pools.changes
    assert len(pools.changes) == MAX_CHANGES
    for pool in ("prefill", "decode"):
        steps = [change for change in pools.changes if change.pool == pool]
        assert all(b.before == a.after for a, b in itertools.pairwise(steps)), "an order was lost"
        assert steps[-1].after == pools.sizes[pool]
