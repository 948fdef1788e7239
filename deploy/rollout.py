"""Replacing every worker by one of the current revision, as pure functions of what is there.

With room to spare each pool first gets one worker more, of the new revision; then old workers drain, one at a time and
only while everybody else serves, always from the pool that is further behind. So at every moment both revisions have a
prefill and a decode worker, or only one revision is left: revisions that can't hand off to each other are never paired
by a router, and neither is ever left without its other half. Without room a worker drains before its successor starts;
a pool of one worker is then empty meanwhile, and its requests wait at the router.

A new worker that does not get ready stops the rollout with the old ones in place. The next rollout replaces it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from deploy.desired import POOLS, index_of
from llm_engine.api.config import ClusterConfig

_OF_WORKERS = {"model", "engine", "kv", "scheduler", "transfer", "worker"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A worker. `current`: of the newest revision; `ready`: it serves."""

    name: str
    pool: str
    current: bool
    ready: bool
    draining: bool = False


def worker_settings(config: ClusterConfig) -> str:
    """A digest of what workers run with: their settings, and what each takes of a node."""
    tree = config.model_dump(mode="json", include=_OF_WORKERS)
    tree["pools"] = {pool: getattr(config.pools, pool).model_dump(include={"cpus", "resources"}) for pool in POOLS}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def with_surge(
    sizes: Mapping[str, int], members: Collection[Member], cards: Mapping[str, int], max_cards: int | None
) -> dict[str, int]:
    """The sizes to hold now: one worker more in each pool that has old ones, if the budget allows all of that."""
    behind = {member.pool for member in members if not member.current and not member.draining}
    larger = {pool: size + (pool in behind and size > 0) for pool, size in sizes.items()}
    needed = sum(size * cards.get(pool, 0) for pool, size in larger.items())
    return larger if max_cards is None or needed <= max_cards else dict(sizes)


def next_drain(sizes: Mapping[str, int], members: Collection[Member]) -> str | None:
    """The old worker that may go now, given the sizes of `with_surge`; None: there is none, or it has to wait."""
    old = [member for member in members if not member.current and not member.draining]
    useless = next((member.name for member in old if not member.ready), None)
    if useless is not None:
        return useless
    complete = all(
        sum(member.pool == pool and not member.draining for member in members) >= size for pool, size in sizes.items()
    )
    if not old or not complete or not all(member.ready and not member.draining for member in members):
        return None

    def lag(pool: str) -> float:
        active = [member for member in members if member.pool == pool]
        return sum(not member.current for member in active) / len(active)

    pool = max(sorted({member.pool for member in old}, reverse=True), key=lag)
    return max((member.name for member in old if member.pool == pool), key=index_of)
