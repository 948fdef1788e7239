"""Which workers to start and which to drain: pure functions of the desired and the present state.

The desired state has one home, a `DesiredStore`, and one writer, the controller. `baton scale`, the admin API and an
autoscaler ask the controller; a configuration file counts as such a request only when what it says has changed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from llm_engine.api.config import PoolsConfig
from llm_engine.api.control import Change
from llm_engine.api.errors import RequestError
from llm_engine.api.messages import Role

POOLS: Mapping[str, Role] = {role.value: role for role in Role}
MAX_REPLICAS = 1024
MAX_CHANGES = 64


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """Replicas per pool, who changed them, and the revision that every worker should have.

    `configured`: what the configuration said when it was last obeyed. `settings`: what workers of `revision` run with,
    as a digest; "": not known.
    """

    replicas: dict[str, int]
    configured: dict[str, int]
    revision: int = 0
    settings: str = ""
    changes: list[Change] = []  # the last MAX_CHANGES, oldest first


class DesiredStore(Protocol):
    """Keeps the desired state over restarts of the controller. Both methods may block; `save` raises ServingError."""

    def desired(self) -> Desired | None: ...

    def save(self, desired: Desired) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """A worker that exists. A draining one no longer counts towards its pool."""

    name: str
    pool: str
    draining: bool
    current: bool = True  # of the newest revision; others go first


@dataclass(frozen=True, slots=True)
class Plan:
    """Names to start, by pool, and names to drain."""

    start: tuple[tuple[str, str], ...]
    drain: tuple[str, ...]


def initial(pools: PoolsConfig) -> dict[str, int]:
    """Desired sizes as configured."""
    return {pool: getattr(pools, pool).replicas for pool in POOLS}


def obeyed(saved: Desired | None, pools: PoolsConfig, *, at: float = 0.0) -> Desired:
    """The desired state after a look at the configuration.

    A configured size that differs from the one obeyed before is an order; one that has not changed leaves the pool at
    the size that it was given since. Sizes outside the configured bounds move to the nearest bound.
    """
    configured = initial(pools)
    if saved is None:
        return Desired(replicas=configured, configured=configured)
    replicas = {
        pool: saved.replicas.get(pool, size) if saved.configured.get(pool) == size else size
        for pool, size in configured.items()
    }
    bounded = {
        pool: min(max(size, getattr(pools, pool).min_replicas), getattr(pools, pool).max_replicas)
        for pool, size in replicas.items()
    }
    state = msgspec.structs.replace(saved, configured=configured)
    return resized(state, bounded, at=at, by="configuration", reasons={})


def revised(desired: Desired, settings: str, *, anew: bool = False) -> Desired:
    """The desired state with the workers' settings: a new revision if they are others than before, or if `anew`."""
    if not anew and desired.settings in ("", settings):
        return msgspec.structs.replace(desired, settings=settings)
    return msgspec.structs.replace(desired, settings=settings, revision=desired.revision + 1)


def resized(desired: Desired, sizes: Mapping[str, int], *, at: float, by: str, reasons: Mapping[str, str]) -> Desired:
    """The desired state with some pools resized, and a note of who did it and why."""
    notes = [
        Change(at=at, pool=pool, before=desired.replicas.get(pool, 0), after=size, by=by, reason=reasons.get(pool, ""))
        for pool, size in sizes.items()
        if size != desired.replicas.get(pool, 0)
    ]
    return msgspec.structs.replace(
        desired, replicas={**desired.replicas, **sizes}, changes=[*desired.changes, *notes][-MAX_CHANGES:]
    )


def scaled(desired: Mapping[str, int], pool: str, replicas: int, pools: PoolsConfig | None = None) -> dict[str, int]:
    """The desired state with one pool resized, within the bounds of `pools`. Raises RequestError."""
    if pool not in POOLS:
        raise RequestError(f"pool {pool!r}: expected one of {', '.join(POOLS)}", param="pool")
    low, high = 0, MAX_REPLICAS
    if pools is not None:
        low, high = getattr(pools, pool).min_replicas, getattr(pools, pool).max_replicas
    if not low <= replicas <= high:
        raise RequestError(f"replicas={replicas}: expected {low} to {high}", param="replicas")
    return {**desired, pool: replicas}


def cards_of(sizes: Mapping[str, int], pools: PoolsConfig) -> int:
    """Cards that pools of these sizes hold."""
    return sum(size * int(getattr(pools, pool).cards) for pool, size in sizes.items())


def plan(
    desired: Mapping[str, int],
    present: Collection[Present],
    cards: Mapping[str, int] | None = None,
    max_cards: int | None = None,
) -> Plan:
    """Fill each pool with the lowest free names; shrink it from the highest.

    With a budget, a worker starts only once its `cards` are free: one that still drains holds its own, so a replica
    that changes pools drains first and comes back in its new role afterwards.
    """
    free = None
    if max_cards is not None and cards is not None:
        free = max_cards - sum(cards.get(worker.pool, 0) for worker in present)
    taken = {worker.name for worker in present}
    start: list[tuple[str, str]] = []
    drain: list[str] = []
    for pool, wanted in desired.items():
        staying = [worker for worker in present if worker.pool == pool and not worker.draining]
        active = [worker.name for worker in sorted(staying, key=lambda w: (not w.current, index_of(w.name)))]
        missing = max(0, wanted - len(active))
        if free is not None and cards is not None and cards.get(pool, 0) > 0:
            missing = max(0, min(missing, free // cards[pool]))
            free -= missing * cards[pool]
        start.extend((pool, name) for name in itertools.islice(_free_names(pool, taken), missing))
        drain.extend(reversed(active[wanted:]))
    return Plan(tuple(start), tuple(drain))


def pool_of(name: str) -> str:
    """The pool a worker's name belongs to."""
    return name.rpartition("-")[0]


def index_of(name: str) -> int:
    """The number in a worker's name, `decode-3`: 3."""
    match = re.fullmatch(r"[a-z]+-(\d+)", name)
    if match is None:
        raise ValueError(f"worker name {name!r}: expected POOL-NUMBER")
    return int(match[1])


def _free_names(pool: str, taken: Collection[str]) -> Iterator[str]:
    return (name for number in itertools.count() if (name := f"{pool}-{number}") not in taken)
