"""The autoscaler: a loop of the controller that measures, decides, and writes the desired state like everybody else.

    scrape → signals → policy → decision log → (mode act) Pools

In the mode `recommend` it does everything but the last step. Each decision that differs from the one before is logged
with its reasons; `baton status` and the dashboard show the sizes it would choose.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import msgspec

from deploy.pools import Pools
from deploy.scaling_policy import LOOPS, Decision, PoolState, ScalingPolicy
from deploy.scaling_signals import Scraper, Window
from llm_engine.api.config import AutoscalerConfig
from llm_engine.api.control import PoolStatus
from llm_engine.api.errors import ServingError
from llm_engine.api.messages import WorkerInfo

_log = logging.getLogger(__name__)


class Members(Protocol):
    """The fleet, as the autoscaler sees it."""

    def members(self) -> Iterable[WorkerInfo]: ...

    def ready(self, pool: str) -> int: ...


class Autoscaler:
    """Runs on the controller's loop. Without traffic or measurements it changes nothing."""

    def __init__(
        self,
        config: AutoscalerConfig,
        pools: Pools,
        fleet: Members,
        router_url: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`router_url`: of the controller's own router, "" while there is none."""
        self._config, self._pools, self._fleet = config, pools, fleet
        self._router_url = router_url
        self._clock = clock
        self._policy = ScalingPolicy(config)
        self._window = Window(config.window_s)
        self._scraper = Scraper()
        self._seen: Mapping[str, int] = {}  # sizes at the last look: anybody's change starts the cool-down
        self._latest: Decision | None = None

    async def run(self) -> None:
        """Look every `period_s` until cancelled; returns at once when switched off."""
        while self._config.mode != "off":
            try:
                await self.look()
            except ServingError as exc:  # the store is away, or bounds have just changed: the next look tries again
                _log.warning("the decision was not carried out: %s", exc)
            await asyncio.sleep(self._config.period_s)

    async def look(self) -> Decision:
        """Measure and decide once; in the mode `act`, carry it out."""
        own = self._router_url()
        routers = self._config.router_metrics or ((f"{own}/metrics",) if own else ())
        self._window.add(self._clock(), await self._scraper.scrape(routers, self._fleet.members()))
        now, sizes = self._clock(), dict(self._pools.sizes)
        if self._seen and sizes != self._seen:
            self._policy.changed(now, [pool for pool in LOOPS if sizes[pool] != self._seen[pool]])
        self._seen = sizes
        decision = self._policy.decide(now, self._states(sizes), self._window.signals(), others=self._others(sizes))
        self._note(sizes, decision)
        self._latest = decision
        changes = {pool: size for pool, size in decision.sizes.items() if size != sizes[pool]}
        if changes and self._config.mode == "act":
            await self._pools.move(sizes, changes, by="autoscaler", reasons=decision.reasons)
        return decision

    def advise(self, pools: Mapping[str, PoolStatus]) -> dict[str, PoolStatus]:
        """The pools with what the last decision recommends."""
        latest = self._latest
        if latest is None:
            return dict(pools)
        return {
            name: msgspec.structs.replace(pool, recommended=latest.sizes[name], reason=latest.reasons[name])
            if name in latest.sizes
            else pool
            for name, pool in pools.items()
        }

    def _states(self, sizes: Mapping[str, int]) -> dict[str, PoolState]:
        return {
            pool: PoolState(
                replicas=sizes[pool],
                ready=self._fleet.ready(pool),
                low=max(1, self._pools.settings(pool).min_replicas),
                high=self._pools.settings(pool).max_replicas,
                cards=self._pools.settings(pool).cards,
            )
            for pool in LOOPS
        }

    def _others(self, sizes: Mapping[str, int]) -> int:
        """Cards of pools that the loops do not move."""
        return sum(size * self._pools.settings(pool).cards for pool, size in sizes.items() if pool not in LOOPS)

    def _note(self, sizes: Mapping[str, int], decision: Decision) -> None:
        if self._latest is not None and decision.sizes == self._latest.sizes:
            return
        verb = "scaling" if self._config.mode == "act" else "recommended, not carried out"
        for pool in LOOPS:
            if decision.sizes[pool] != sizes[pool]:
                flip = f" ({decision.flips} by role flip)" if decision.flips else ""
                text = f"{pool} {sizes[pool]} → {decision.sizes[pool]}{flip}: {decision.reasons[pool]}"
                _log.info("autoscaler: %s: %s", verb, text)
