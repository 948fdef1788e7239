"""Which workers to start and which to drain: pure functions of the desired and the present state."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from llm_engine.api.config import PoolsConfig
from llm_engine.api.errors import RequestError
from llm_engine.api.messages import Role

POOLS: Mapping[str, Role] = {role.value: role for role in Role}
MAX_REPLICAS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """A worker that exists. A draining one no longer counts towards its pool."""

    name: str
    pool: str
    draining: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Names to start, by pool, and names to drain."""

    start: tuple[tuple[str, str], ...]
    drain: tuple[str, ...]


def initial(pools: PoolsConfig) -> dict[str, int]:
    """Desired sizes as configured."""
    return {pool: getattr(pools, pool).replicas for pool in POOLS}


def scaled(desired: Mapping[str, int], pool: str, replicas: int) -> dict[str, int]:
    """The desired state with one pool resized. Raises RequestError."""
    if pool not in POOLS:
        raise RequestError(f"pool {pool!r}: expected one of {', '.join(POOLS)}", param="pool")
    if not 0 <= replicas <= MAX_REPLICAS:
        raise RequestError(f"replicas={replicas}: expected 0 to {MAX_REPLICAS}", param="replicas")
    return {**desired, pool: replicas}


def plan(desired: Mapping[str, int], present: Collection[Present]) -> Plan:
    """Fill each pool with the lowest free names; shrink it from the highest."""
    taken = {worker.name for worker in present}
    start: list[tuple[str, str]] = []
    drain: list[str] = []
    for pool, wanted in desired.items():
        active = sorted((w.name for w in present if w.pool == pool and not w.draining), key=index_of)
        start.extend((pool, name) for name in itertools.islice(_free_names(pool, taken), max(0, wanted - len(active))))
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
