"""The desired state in the hands of its one writer: every change goes through here, whoever asked for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import msgspec

from deploy import desired
from deploy.desired import Desired, DesiredStore
from llm_engine.api.config import PoolConfig, PoolsConfig
from llm_engine.api.control import Change, PoolStatus
from llm_engine.api.errors import RequestError

_log = logging.getLogger(__name__)


class Pools:
    """Sizes of the pools, their bounds, and the store that keeps them. Belongs to one asyncio loop."""

    def __init__(
        self,
        configured: PoolsConfig,
        store: DesiredStore,
        clock: Callable[[], float] = time.time,
        *,
        max_cards: int | None = None,
    ) -> None:
        """`max_cards`: of all pools together; None: no budget."""
        self.max_cards = max_cards
        self._configured = configured
        self._store = store
        self._clock = clock
        self._desired = desired.obeyed(None, configured)
        self._writing = asyncio.Lock()
        self.changed = asyncio.Event()  # set by every change of a size

    @property
    def sizes(self) -> Mapping[str, int]:
        """Replicas wanted, by pool."""
        return self._desired.replicas

    @property
    def revision(self) -> int:
        """Which every worker should have."""
        return self._desired.revision

    @property
    def cards(self) -> Mapping[str, int]:
        """Cards per replica, by pool."""
        return {pool: self.settings(pool).cards for pool in desired.POOLS}

    @property
    def changes(self) -> list[Change]:
        """The last changes, oldest first."""
        return self._desired.changes

    def settings(self, pool: str) -> PoolConfig:
        """Bounds and resources of a pool, as configured."""
        found: PoolConfig = getattr(self._configured, pool)
        return found

    async def obey(self, configured: PoolsConfig, settings: str | None = None) -> None:
        """Take configured sizes and bounds into the stored state: what is stored counts, not what is remembered.

        `settings`: of workers, as a digest; others than the stored ones make a new revision.
        """
        async with self._writing:
            saved = await asyncio.to_thread(self._store.desired)
            wanted = desired.obeyed(saved, configured, at=self._clock())
            self._configured = configured
            await self._save(wanted if settings is None else desired.revised(wanted, settings))

    async def revise(self, settings: str) -> None:
        """Every worker is to be replaced by one with these settings, even if they are the old ones."""
        async with self._writing:
            await self._save(desired.revised(self._desired, settings, anew=True))

    async def scale(self, pool: str, replicas: int, *, by: str, reason: str = "") -> None:
        """Resize one pool within its bounds and the card budget. Raises RequestError."""
        async with self._writing:
            sizes = desired.scaled(self._desired.replicas, pool, replicas, self._configured)
            needed = desired.cards_of(sizes, self._configured)
            if self.max_cards is not None and self.max_cards < needed > desired.cards_of(self.sizes, self._configured):
                raise RequestError(
                    f"replicas={replicas}: the pools would hold {needed} cards, autoscaler.max_cards={self.max_cards}; "
                    "scale another pool down first",
                    param="replicas",
                )
            await self._save(desired.resized(self._desired, sizes, at=self._clock(), by=by, reasons={pool: reason}))

    async def move(
        self, before: Mapping[str, int], after: Mapping[str, int], *, by: str, reasons: Mapping[str, str]
    ) -> bool:
        """Several sizes at once, if they still are what the decision was based on."""
        async with self._writing:
            if any(self._desired.replicas.get(pool) != size for pool, size in before.items()):
                return False
            sizes: Mapping[str, int] = self._desired.replicas
            for pool, size in after.items():
                sizes = desired.scaled(sizes, pool, size, self._configured)
            await self._save(desired.resized(self._desired, sizes, at=self._clock(), by=by, reasons=reasons))
        return True

    def clear(self) -> None:
        """Nobody is wanted any more: the cluster stops. Not stored."""
        self._desired = msgspec.structs.replace(self._desired, replicas=dict.fromkeys(self.sizes, 0))

    def status(self, ready: Callable[[str], int]) -> dict[str, PoolStatus]:
        """Every pool that has workers or should have some."""
        return {
            pool: PoolStatus(
                desired=wanted,
                ready=ready(pool),
                low=self.settings(pool).min_replicas,
                high=self.settings(pool).max_replicas,
                cards=self.settings(pool).cards,
            )
            for pool, wanted in self.sizes.items()
            if wanted or ready(pool)
        }

    async def _save(self, wanted: Desired) -> None:
        """A new desired state; nothing happens unless it could be stored."""
        await asyncio.to_thread(self._store.save, wanted)
        for change in wanted.changes:
            if change not in self._desired.changes:
                why = f": {change.reason}" if change.reason else ""
                _log.info("%s: %d → %d, by %s%s", change.pool, change.before, change.after, change.by, why)
        self._desired = wanted
        self.changed.set()
