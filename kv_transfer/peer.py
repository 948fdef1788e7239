"""A decode worker as the writer knows it: connects for the first offer, and anew when a session is lost.

While it is unhealthy it is tried once a canary period, so that it can come back into routing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from kv_transfer.client_context import ClientContext
from kv_transfer.cost import CostCurve
from kv_transfer.handoff import Handoff
from kv_transfer.metrics import PeerStats
from kv_transfer.session import Session
from llm_engine.api.errors import TransferError
from llm_engine.api.messages import Peer as Target

log = logging.getLogger(__name__)

_FORGET_AFTER_PERIODS = 12


class Peer:
    """One decode worker as the writer knows it; outlives its sessions."""

    def __init__(self, context: ClientContext, target: Target) -> None:
        self.target = target
        self.healthy = True
        self.detail = ""
        self._context = context
        self._session: Session | None = None
        self._shunned: dict[str, str] = {}  # transports that automatic choice leaves out for this peer, and why
        self._waiting: list[Handoff] = []
        self._wanted = asyncio.Event()
        self._last_used = time.monotonic()

    @property
    def connected(self) -> bool:
        """Whether a session is live."""
        return self._session is not None

    def offer(self, handoff: Handoff) -> None:
        """Send it now, or as soon as there is a session."""
        self._last_used = time.monotonic()
        if self._session is not None and not self._session.is_over:
            self._session.offer(handoff)
        else:
            self._waiting.append(handoff)
            self._wanted.set()

    def stats(self) -> PeerStats:
        """Snapshot; a live session's canary has the last word on health."""
        session = self._session
        healthy, detail = self.healthy, self.detail
        if session is not None:
            healthy, detail = session.canary.healthy, session.canary.detail
        measured = session is not None and session.cost.num_calls > 0
        curve = session.cost.curve if session is not None and measured else CostCurve(0.0, 0.0)
        return PeerStats(
            name=self.target.name,
            incarnation=self.target.incarnation,
            transport=session.transport if session is not None else "",
            reason=session.reason if session is not None else "",
            healthy=healthy,
            detail=detail,
            pending=len(self._waiting) + (session.num_pending if session is not None else 0),
            call_s=curve.call_s,
            bytes_per_s=curve.bytes_per_s,
        )

    async def run(self) -> None:
        """Connect, serve, reconnect. Returns when the receiver has been out of reach and unused for long."""
        period = self._context.config.canary_period_s
        try:
            while self.healthy or time.monotonic() - self._last_used < _FORGET_AFTER_PERIODS * period:
                error = await self._run_session()
                log.warning("hand-off to %s/%s: %s", self.target.name, self.target.incarnation, error)
                self.healthy, self.detail = False, str(error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(period):
                        await self._wanted.wait()
        finally:
            self._fail_waiting(TransferError(self.detail or "shutting down"))

    async def _run_session(self) -> TransferError:
        """Why it is over. Who came after its end waits for the next one."""
        session = Session(self._context, self.target, self._shunned)
        try:
            try:
                await session.open()
            except TransferError as exc:
                self._fail_waiting(exc)
                return exc
            self._begin(session)
            return await session.run()
        finally:
            self._session = None
            session.close()

    def _fail_waiting(self, error: TransferError) -> None:
        for handoff in self._take_waiting():
            handoff.fail("unreachable", type(error)(str(error), request_id=handoff.request_id))

    def _begin(self, session: Session) -> None:
        self._session = session
        self.healthy, self.detail = True, ""
        for handoff in self._take_waiting():
            session.offer(handoff)

    def _take_waiting(self) -> list[Handoff]:
        waiting, self._waiting = self._waiting, []
        self._wanted.clear()
        return [handoff for handoff in waiting if handoff.error is None]
