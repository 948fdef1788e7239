"""The writer's canary: from time to time real bytes go through the pair's link into a scratch block and are compared.

A pair whose canary fails is taken out of routing (`Load.bad_peers`) until a later probe succeeds, or, where the choice
is automatic, until it has another transport: cards may map each other's memory and still not reach it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from typing import TYPE_CHECKING

from kv_transfer.gate import WriteGate
from kv_transfer.link import LeaseKey, Link
from kv_transfer.manifest import checksum
from llm_engine.api.errors import LeaseRevoked, TransferError
from llm_engine.api.handoff import Fence, Fenced, Probe, ProbeCommit, ProbeGrant, ProbeResult

if TYPE_CHECKING:
    from kv_transfer.session import Session


class Canary:
    """Probes one session, one probe at a time."""

    def __init__(self, session: Session, period_s: float, timeout_s: float) -> None:
        self.healthy = True
        self.detail = ""
        self._session = session
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._nonce = 0
        self._answer: asyncio.Future[ProbeGrant | ProbeResult] | None = None
        self._gates: dict[int, WriteGate] = {}  # lease id → gate, until the result or the fence

    async def run(self) -> None:
        """Probe for ever."""
        while True:
            await asyncio.sleep(self._period_s)
            await self.probe()

    async def probe(self) -> None:
        """One probe; updates `healthy` and `detail`."""
        tally = self._session.context.tally
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await self._exchange()
        except TimeoutError:
            self.healthy, self.detail = False, f"canary: no answer within {self._timeout_s:g} s"
            tally.probes["failed"] += 1
            return
        except TransferError:
            return  # the session is ending and says why
        finally:
            self._answer = None
        if result.ok and result.detail:
            tally.probes["skipped"] += 1  # busy, not broken: traffic itself shows that the link works
            return
        self.healthy, self.detail = result.ok, "" if result.ok else f"canary: {result.detail}"
        tally.probes["ok" if result.ok else "failed"] += 1
        if not result.ok:
            self._session.shun(self.detail)

    def on_answer(self, message: ProbeGrant | ProbeResult) -> None:
        """Next step of the running probe. A grant that comes too late is given back."""
        if self._answer is not None and message.nonce == self._nonce and not self._answer.done():
            self._answer.set_result(message)
        elif isinstance(message, ProbeGrant):
            self._session.send_quietly(Fenced(lease_id=message.lease_id, epoch=message.epoch))

    def on_fence(self, fence: Fence) -> bool:
        """The receiver gave up on a probe. False: the lease is not a probe's."""
        gate = self._gates.pop(fence.lease_id, None)
        if gate is None:
            return False
        answer = Fenced(lease_id=fence.lease_id, epoch=fence.epoch)
        gate.stop(lambda: self._session.context.post(self._session.send_quietly, answer))
        return True

    async def _exchange(self) -> ProbeResult:
        self._nonce = secrets.randbits(62)
        grant = await self._ask(Probe(nonce=self._nonce))
        if isinstance(grant, ProbeResult):
            return grant
        gate = self._gates[grant.lease_id] = WriteGate()
        data = os.urandom(self._session.plan.target.bytes_per_block())
        await self._write(LeaseKey(grant.lease_id, grant.epoch), grant.block, data, gate)
        result = await self._ask(ProbeCommit(nonce=self._nonce, lease_id=grant.lease_id, checksum=checksum(data)))
        self._gates.pop(grant.lease_id, None)
        if isinstance(result, ProbeGrant):
            raise TransferError("receiver granted a probe twice")
        return result

    async def _ask(self, message: Probe | ProbeCommit) -> ProbeGrant | ProbeResult:
        self._answer = asyncio.get_running_loop().create_future()
        self._session.send(message)
        return await self._answer

    async def _write(self, lease: LeaseKey, block: int, data: bytes, gate: WriteGate) -> None:
        context = self._session.context
        landed = asyncio.Event()
        copies = list(self._session.plan.block_copies(block))

        def job(link: Link) -> bool:
            if gate.enter():
                try:
                    link.write(lease, memoryview(data), copies, gate.stopped)
                    link.confirm(lease).add_done_callback(lambda _: context.post(landed.set))
                except LeaseRevoked:  # fenced: the probe has run out of time already
                    pass
                finally:
                    gate.leave()
            return False

        self._session.sender.submit(job)
        await landed.wait()
