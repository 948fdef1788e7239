"""Leases and the reservations behind them: taking blocks into custody, and giving them back once nobody can write.

The lease table decides every transition; this file carries it out towards the link, the writer and the block pool.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from kv_transfer.lease import Lease, LeaseState, LeaseTable
from kv_transfer.link import Landed
from kv_transfer.metrics import Tally
from kv_transfer.pairs import Pair
from kv_transfer.reserver import BlockReserver, R
from llm_engine.api.handoff import Fence, Fenced
from llm_engine.api.messages import Message

log = logging.getLogger(__name__)

_FENCE_AGAIN_S = 1.0
_STOPPABLE = (LeaseState.REVOKED, LeaseState.QUARANTINED)


@dataclass(slots=True, eq=False)
class Held(Generic[R]):
    """A granted lease with its reservation. `on_over` runs once, when the writer's time is over, however it ended."""

    pair: Pair
    lease: Lease
    reservation: R
    timer: asyncio.TimerHandle
    on_over: Callable[[], object]
    sealed: bool = False  # the writer has said all: nothing more of it is needed
    writer_gone: bool = False  # proven by the end of its connection

    @property
    def receiving(self) -> bool:
        """Whether the lease still stands."""
        return self.lease.state is LeaseState.RECEIVING


class Custody(Generic[R]):
    """Every granted lease until its blocks belong to the engine or are free. `send` never raises."""

    def __init__(
        self, region: str, reserver: BlockReserver[R], send: Callable[[Pair, Message], None], tally: Tally
    ) -> None:
        self.leases = LeaseTable(region)
        self.on_freed: Callable[[], None] = lambda: None
        self._reserver = reserver
        self._send = send
        self._tally = tally
        self._held: dict[int, Held[R]] = {}

    def close(self) -> None:
        """Stop the timers."""
        for held in self._held.values():
            held.timer.cancel()

    def quarantined(self) -> tuple[int, int]:
        """Leases and blocks whose writer is not proven stopped."""
        leases = [lease for lease in self.leases if lease.state in _STOPPABLE]
        return len(leases), sum(len(lease.blocks) for lease in leases)

    def find(self, pair: Pair, lease_id: int) -> Held[R] | None:
        """The lease, if it is this writer's."""
        held = self._held.get(lease_id)
        return held if held is not None and held.pair is pair else None

    def take(
        self,
        pair: Pair,
        request_id: str,
        attempt: int,
        reservation: R,
        *,
        left_s: float,
        overdue: str,
        on_over: Callable[[], object],
    ) -> Held[R]:
        """Open a lease over a reservation for a connected pair; it is revoked after `left_s` with cause `overdue`."""
        assert pair.connection is not None
        lease = self.leases.reserve(request_id, attempt, reservation.blocks, pair.connection)
        timer = asyncio.get_running_loop().call_later(left_s, self._overdue, lease.key.lease_id, overdue)
        held = self._held[lease.key.lease_id] = Held(pair, lease, reservation, timer, on_over)
        pair.inlet.open_lease(lease.key, pair.connection, lease.blocks)
        self.leases.grant(lease)
        return held

    def shut(self, held: Held[R]) -> Landed | None:
        """The writer says that it has written everything: what has landed. Where the link can, it takes no more."""
        landed = held.pair.inlet.landed(held.lease.key)
        held.pair.inlet.end_lease(held.lease.key)
        return landed

    def commit(self, held: Held[R]) -> R:
        """Verified: the reservation leaves custody. Raises LeaseRevoked if the lease does not stand any more."""
        self.leases.commit(held.lease)
        self._forget(held)
        return held.reservation

    def revoke(self, held: Held[R], cause: str, *, fence: bool = True) -> None:
        """Take the blocks back: free at once if it is proven that nothing lands any more, else to quarantine."""
        if not held.receiving:
            return
        self._tally.failed[cause] += 1
        self.leases.revoke(held.lease)
        proven = held.pair.inlet.end_lease(held.lease.key) or held.writer_gone
        self._over(held)
        if fence and not held.writer_gone:
            self._fence(held)
        if proven:
            self._free(held)
        else:
            log.warning(
                "%d blocks of %s in quarantine until %s answers or dies (%s)",
                len(held.lease.blocks),
                held.lease.request_id or "a probe",
                held.pair,
                cause,
            )
            self.leases.quarantine(held.lease)
            self._reserver.quarantine(held.reservation)

    def end(self, held: Held[R]) -> None:
        """The writer itself says that it has stopped and gives up."""
        if held.receiving:
            self.leases.revoke(held.lease)
            held.pair.inlet.end_lease(held.lease.key)
            self._over(held)
        self._free(held)

    def withdraw(self, pair: Pair, request_id: str, attempt: int) -> bool:
        """The writer gives up an attempt. True if a lease was still standing."""
        standing = False
        for held in [h for h in self._held.values() if h.pair is pair]:
            if (held.lease.request_id, held.lease.attempt) == (request_id, attempt):
                standing = standing or held.receiving
                self.end(held)
        return standing

    def on_fenced(self, pair: Pair, message: Fenced) -> Held[R] | None:
        """The answer to a fence: the blocks leave quarantine. Returns a lease that has not been revoked, untouched."""
        held = self.find(pair, message.lease_id)
        if held is None or held.lease.key.epoch != message.epoch:
            return None
        if held.receiving:
            return held
        self._free(held)
        return None

    def on_connection_lost(self, connection: int, proven: bool) -> None:
        """A data connection is over. `proven`: its writer can't write any more.

        A lease that is sealed goes on: everything it needs is here.
        """
        for lease in self.leases.owned_by(connection):
            held = self._held[lease.key.lease_id]
            held.writer_gone = proven
            if not held.receiving:
                if proven:
                    self._free(held)
            elif not (held.sealed and proven):
                self.revoke(held, "writer_lost")

    async def repeat_fences(self) -> None:
        """A fence may be lost with a connection; asking again is free. For ever."""
        while True:
            await asyncio.sleep(_FENCE_AGAIN_S)
            for held in tuple(self._held.values()):
                if held.lease.state is LeaseState.QUARANTINED:
                    self._fence(held)

    def _overdue(self, lease_id: int, cause: str) -> None:
        if (held := self._held.get(lease_id)) is not None:
            self.revoke(held, cause)

    def _free(self, held: Held[R]) -> None:
        """Proof in hand: the blocks may have a new owner."""
        give_back = self._reserver.free if held.lease.state is LeaseState.QUARANTINED else self._reserver.release
        self.leases.prove_stopped(held.lease)
        self._forget(held)
        give_back(held.reservation)
        self.on_freed()

    def _forget(self, held: Held[R]) -> None:
        self._held.pop(held.lease.key.lease_id, None)
        self._over(held)

    def _over(self, held: Held[R]) -> None:
        held.timer.cancel()
        on_over, held.on_over = held.on_over, _nothing
        on_over()

    def _fence(self, held: Held[R]) -> None:
        lease = held.lease
        fence = Fence(
            request_id=lease.request_id, attempt=lease.attempt, lease_id=lease.key.lease_id, epoch=lease.key.epoch
        )
        self._send(held.pair, fence)


def _nothing() -> None:
    pass
