"""What the receiver does with hand-offs: offers wait, become leases, and end accepted, rejected or revoked; revoked
ones in quarantine where the link can't prove on the spot that the writer has stopped.

One asyncio loop; the lease table decides every transition, this file carries it out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic

from kv_transfer.layout import CellMap
from kv_transfer.lease import Lease, LeaseState, LeaseTable
from kv_transfer.manifest import block_checksum, verify
from kv_transfer.metrics import HandoffReport, Tally
from kv_transfer.offers import Attempts, OfferQueue, Waiting
from kv_transfer.pairs import Pair
from kv_transfer.reserver import BlockReserver, R
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import ServingError, TransferError
from llm_engine.api.handoff import (
    Accepted,
    Commit,
    Fence,
    Fenced,
    Grant,
    KvLayout,
    Offer,
    Probe,
    ProbeCommit,
    ProbeGrant,
    ProbeResult,
    Rejected,
    Withdraw,
)
from llm_engine.api.messages import Message

_INLINE_BYTES = 1 << 20  # hashing less than this costs less than a hop to a thread
_FENCE_AGAIN_S = 1.0
_STOPPABLE = (LeaseState.REVOKED, LeaseState.QUARANTINED)


@dataclass(slots=True, eq=False)
class _Intake(Generic[R]):
    """A lease and what hangs on it. `waiting` is None for a probe."""

    pair: Pair
    lease: Lease
    reservation: R
    waiting: Waiting | None
    timer: asyncio.TimerHandle
    nonce: int = 0
    verifying: bool = False


class Intakes(Generic[R]):
    """All hand-offs into one worker. `send` delivers a control message to a pair or raises TransferError."""

    def __init__(
        self,
        *,
        config: TransferConfig,
        layout: KvLayout,
        region: str,
        memory: memoryview,
        reserver: BlockReserver[R],
        send: Callable[[Pair, Message], None],
        tally: Tally,
    ) -> None:
        self.weight_version = ""
        self.leases = LeaseTable(region)
        self.offers = OfferQueue(
            config=config, layout=layout, reserver=reserver, grant=self._grant, send=self.send, tally=tally
        )
        self._config = config
        self._layout = layout
        self._memory = memory
        self._reserver = reserver
        self._send_or_raise = send
        self._tally = tally
        self._attempts = Attempts()
        self._active: dict[str, _Intake[R]] = {}  # by request: granted, neither concluded nor revoked
        self._intakes: dict[int, _Intake[R]] = {}  # by lease, quarantined ones and probes included
        self._admitting = 0
        self._num_rows = CellMap(layout).num_rows
        self._hasher = ThreadPoolExecutor(1, "kv-verify")
        self._tasks: asyncio.TaskGroup

    # Lifetime and snapshots.

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start the background work in `tasks`."""
        self._tasks = tasks
        tasks.create_task(self.offers.run())
        tasks.create_task(self._repeat_fences())

    def close(self) -> None:
        """Stop timers and the hashing thread."""
        self.offers.close()
        for intake in self._intakes.values():
            intake.timer.cancel()
        self._hasher.shutdown()
        self._memory.release()

    @property
    def num_pending(self) -> int:
        """Offers waiting, leases granted, sequences being admitted: what a drain waits for."""
        return len(self.offers) + len(self._active) + self._admitting

    @property
    def num_leases(self) -> int:
        """Granted and not concluded."""
        return len(self._active)

    def quarantined(self) -> tuple[int, int]:
        """Leases and blocks whose writer is not proven stopped."""
        leases = [lease for lease in self.leases if lease.state in _STOPPABLE]
        return len(leases), sum(len(lease.blocks) for lease in leases)

    def cancel(self, request_id: str, attempt: int, cause: str = "cancelled") -> bool:
        """End this attempt and every older one, wherever it stands before `admit`."""
        self._attempts.close(request_id, attempt)
        waiting, intake = self.offers.find(request_id), self._active.get(request_id)
        if waiting is not None and waiting.attempt <= attempt:
            self.offers.refuse(waiting, "stale", cause)
            return True
        if intake is not None and intake.lease.attempt <= attempt:
            self._revoke(intake, cause)
            return True
        return False

    def send(self, pair: Pair, message: Message) -> None:
        """A lost answer costs the writer its timeout; a writer that is gone is noticed by its data connection."""
        try:
            self._send_or_raise(pair, message)
        except TransferError:
            self._tally.undeliverable += 1

    # Messages.

    def on_offer(self, pair: Pair, offer: Offer) -> None:
        """Queue an offer, or refuse it."""
        self._tally.offered += 1
        submit, refuse = offer.submit, self.offers.answer_refused
        if self._attempts.is_stale(submit.request_id, submit.attempt):
            refuse(pair, offer, "stale", "this attempt is over or was overtaken")
        elif self.offers.draining:
            refuse(pair, offer, "draining", "the worker is draining")
        elif pair.connection is None:
            refuse(pair, offer, "transport", "the data connection is not there")
        elif offer.weight_version != self.weight_version:
            refuse(pair, offer, "weights", self._other_weights(offer.weight_version))
        elif offer.num_tokens < 1:
            refuse(pair, offer, "too_long", f"{offer.num_tokens} tokens")
        else:
            self.cancel(submit.request_id, submit.attempt, "overtaken")  # older ones; this one must not be repeated
            if self.num_pending < self._config.max_pending:
                self.offers.add(pair, offer)
            else:
                refuse(pair, offer, "full", f"{self.num_pending} hand-offs are pending")

    def on_commit(self, pair: Pair, commit: Commit) -> None:
        """Verify and admit in a task of its own."""
        intake = self._intakes.get(commit.lease_id)
        if intake is None or not self._matches(intake, pair, commit):
            self._tally.failed["stale_commit"] += 1
            self._reply_rejected(pair, commit, "the lease is gone")
            return
        intake.verifying = True
        self._tasks.create_task(self._conclude(intake, commit, time.monotonic()))

    def on_withdraw(self, pair: Pair, message: Withdraw) -> None:
        """The writer has stopped for good."""
        waiting = self.offers.find(message.request_id)
        if waiting is not None and waiting.pair is pair and waiting.attempt == message.attempt:
            self.offers.drop(waiting)
            self._tally.failed["withdrawn"] += 1
        for intake in tuple(self._intakes.values()):
            lease = intake.lease
            if intake.pair is pair and (lease.request_id, lease.attempt) == (message.request_id, message.attempt):
                if lease.state is LeaseState.RECEIVING:
                    self._tally.failed["withdrawn"] += 1
                self._end(intake)

    def on_fenced(self, pair: Pair, message: Fenced) -> None:
        """The answer to a fence: the blocks leave quarantine. Or a writer gives up a probe."""
        intake = self._intakes.get(message.lease_id)
        if intake is None or intake.pair is not pair or intake.lease.key.epoch != message.epoch:
            return
        if intake.lease.state in _STOPPABLE or intake.waiting is None:
            self._end(intake)

    def on_connection_lost(self, pair: Pair, connection: int, proven: bool) -> None:
        """The data connection of a pair is over. `proven`: its writer can't write any more."""
        for waiting in self.offers.of(pair):
            self.offers.drop(waiting)
            self._tally.failed["writer_lost"] += 1
        for lease in self.leases.owned_by(connection):
            intake = self._intakes[lease.key.lease_id]
            self._revoke(intake, "writer_lost", fence=not proven)
            if proven and lease.state in _STOPPABLE:
                self._free(intake)

    def on_probe(self, pair: Pair, probe: Probe) -> None:
        """Canary, step 1."""
        if pair.probing or pair.connection is None:
            self.send(pair, ProbeResult(nonce=probe.nonce, ok=True, detail="busy"))
            return
        pair.probing = True
        self._tasks.create_task(self._grant_probe(pair, probe))

    def on_probe_commit(self, pair: Pair, message: ProbeCommit) -> None:
        """Canary, step 3."""
        intake = self._intakes.get(message.lease_id)
        if intake is None or intake.pair is not pair or intake.waiting is not None or intake.nonce != message.nonce:
            self.send(pair, ProbeResult(nonce=message.nonce, ok=False, detail="the probe's lease is gone"))
        elif not intake.verifying:
            intake.verifying = True
            self._tasks.create_task(self._conclude_probe(intake, message))

    # Offers → leases.

    def _grant(self, item: Waiting, reservation: R) -> None:
        submit = item.offer.submit
        intake = self._lease(item.pair, submit.request_id, submit.attempt, reservation, item, item.left_s())
        self._active[submit.request_id] = intake
        key = intake.lease.key
        grant = Grant(
            request_id=submit.request_id,
            attempt=submit.attempt,
            lease_id=key.lease_id,
            epoch=key.epoch,
            have_tokens=reservation.have_tokens,
            blocks=tuple(reservation.blocks),
        )
        self.send(item.pair, grant)

    def _lease(
        self, pair: Pair, request_id: str, attempt: int, reservation: R, item: Waiting | None, left_s: float
    ) -> _Intake[R]:
        assert pair.connection is not None
        lease = self.leases.reserve(request_id, attempt, reservation.blocks, pair.connection)
        cause = "deadline" if item is not None else "probe_timeout"
        timer = asyncio.get_running_loop().call_later(left_s, self._overdue, lease.key.lease_id, cause)
        intake = _Intake(pair, lease, reservation, item, timer)
        self._intakes[lease.key.lease_id] = intake
        pair.inlet.open_lease(lease.key, pair.connection, lease.blocks)
        self.leases.grant(lease)
        return intake

    def _overdue(self, lease_id: int, cause: str) -> None:
        if (intake := self._intakes.get(lease_id)) is not None:
            self._revoke(intake, cause)

    # Leases → verdicts.

    def _matches(self, intake: _Intake[R], pair: Pair, commit: Commit) -> bool:
        lease = intake.lease
        named = (lease.request_id, lease.attempt, lease.key.epoch) == (commit.request_id, commit.attempt, commit.epoch)
        fresh = lease.state is LeaseState.RECEIVING and not intake.verifying
        return named and fresh and intake.pair is pair and intake.waiting is not None

    async def _conclude(self, intake: _Intake[R], commit: Commit, received_at: float) -> None:
        item, lease = intake.waiting, intake.lease
        assert item is not None
        reason = await self._verify(intake, commit, item.offer.num_tokens)
        if lease.state is not LeaseState.RECEIVING:  # revoked while we were hashing: fence or withdrawal deal with it
            self._reply_rejected(intake.pair, commit, "the lease was revoked")
            return
        if reason is not None:
            self._tally.failed["rejected"] += 1
            self._end(intake)  # Commit promises that no write follows
            self._reply_rejected(intake.pair, commit, reason)
            return
        report = self._report(intake, item, commit, received_at)
        intake.pair.inlet.end_lease(lease.key)
        self.leases.commit(lease)
        self._forget(intake)
        self._admitting += 1
        try:
            await self._reserver.admit(item.offer.submit, intake.reservation, commit.first, report)
        except ServingError as exc:
            self._tally.failed["not_admitted"] += 1
            self._reserver.release(intake.reservation)
            self._reply_rejected(intake.pair, commit, str(exc))
            return
        finally:
            self._admitting -= 1
        self._count(report)
        self.send(
            intake.pair, Accepted(request_id=lease.request_id, attempt=lease.attempt, lease_id=lease.key.lease_id)
        )

    async def _verify(self, intake: _Intake[R], commit: Commit, num_tokens: int) -> str | None:
        blocks = intake.lease.blocks
        if commit.weight_version != self.weight_version:
            return self._other_weights(commit.weight_version)
        landed = intake.pair.inlet.landed(intake.lease.key)
        if landed is not None and landed.num_cells != self._num_rows * len(blocks):
            return f"{landed.num_cells} of {self._num_rows * len(blocks)} blocks of layers arrived"
        job = (commit.manifest, self._layout, self._memory, blocks, num_tokens, self._config.checksum)
        if len(blocks) * self._layout.bytes_per_block() <= _INLINE_BYTES:
            return verify(*job)
        return await asyncio.get_running_loop().run_in_executor(self._hasher, verify, *job)

    def _report(self, intake: _Intake[R], item: Waiting, commit: Commit, received_at: float) -> HandoffReport:
        now = time.monotonic()
        blocks = len(intake.lease.blocks)
        return HandoffReport(
            request_id=intake.lease.request_id,
            attempt=intake.lease.attempt,
            peer=intake.pair.name,
            transport=intake.pair.inlet.transport,
            num_tokens=item.offer.num_tokens,
            have_tokens=intake.reservation.have_tokens,
            num_blocks=blocks,
            num_bytes=blocks * self._layout.bytes_per_block(),
            handoff_s=now - item.received_at,
            exposed_s=commit.compute_end_age_s + now - received_at,
            verify_s=now - received_at,
        )

    def _count(self, report: HandoffReport) -> None:
        self._tally.accepted += 1
        self._tally.num_bytes += report.num_bytes
        self._tally.num_blocks += report.num_blocks
        self._tally.exposed_s += report.exposed_s
        self._tally.verify_s += report.verify_s

    # Ends without success.

    def _revoke(self, intake: _Intake[R], cause: str, *, fence: bool = True) -> None:
        """Take the blocks back: free at once if the link proves that nothing lands any more, else to quarantine."""
        lease = intake.lease
        if lease.state is not LeaseState.RECEIVING:
            return
        self._tally.failed[cause] += 1
        intake.timer.cancel()
        self._deactivate(intake)
        self.leases.revoke(lease)
        proven = intake.pair.inlet.end_lease(lease.key)
        if fence:
            self._fence(intake)
        if proven:
            self._free(intake)
        else:
            self.leases.quarantine(lease)
            self._reserver.quarantine(intake.reservation)

    def _end(self, intake: _Intake[R]) -> None:
        """The writer itself says that it has stopped."""
        lease = intake.lease
        if lease.state is LeaseState.RECEIVING:
            intake.pair.inlet.end_lease(lease.key)
            self.leases.revoke(lease)
        self._free(intake)

    def _free(self, intake: _Intake[R]) -> None:
        """Proof in hand: the blocks may have a new owner."""
        give_back = self._reserver.free if intake.lease.state is LeaseState.QUARANTINED else self._reserver.release
        self.leases.prove_stopped(intake.lease)
        self._forget(intake)
        give_back(intake.reservation)
        self.offers.wake()

    def _forget(self, intake: _Intake[R]) -> None:
        intake.timer.cancel()
        self._intakes.pop(intake.lease.key.lease_id, None)
        self._deactivate(intake)
        if intake.waiting is None:
            intake.pair.probing = False

    def _deactivate(self, intake: _Intake[R]) -> None:
        if self._active.get(intake.lease.request_id) is intake:
            del self._active[intake.lease.request_id]

    def _fence(self, intake: _Intake[R]) -> None:
        lease = intake.lease
        fence = Fence(
            request_id=lease.request_id, attempt=lease.attempt, lease_id=lease.key.lease_id, epoch=lease.key.epoch
        )
        self.send(intake.pair, fence)

    async def _repeat_fences(self) -> None:
        """A fence may be lost with a connection; asking again is free."""
        while True:
            await asyncio.sleep(_FENCE_AGAIN_S)
            for intake in tuple(self._intakes.values()):
                if intake.lease.state is LeaseState.QUARANTINED:
                    self._fence(intake)

    # Probes.

    async def _grant_probe(self, pair: Pair, probe: Probe) -> None:
        reservation = await self._reserver.reserve_probe()
        if reservation is None or pair.connection is None:
            pair.probing = False
            if reservation is not None:
                self._reserver.release(reservation)
            self.send(pair, ProbeResult(nonce=probe.nonce, ok=True, detail="no block to spare"))
            return
        intake = self._lease(pair, "", 0, reservation, None, self._config.commit_timeout_s)
        intake.nonce = probe.nonce
        key, block = intake.lease.key, intake.lease.blocks[0]
        self.send(pair, ProbeGrant(nonce=probe.nonce, lease_id=key.lease_id, epoch=key.epoch, block=block))

    async def _conclude_probe(self, intake: _Intake[R], message: ProbeCommit) -> None:
        job = (self._layout, self._memory, intake.lease.blocks[0])
        checksum = await asyncio.get_running_loop().run_in_executor(self._hasher, block_checksum, *job)
        if intake.lease.state is not LeaseState.RECEIVING:
            return  # out of time: the fence went out
        self._end(intake)
        ok = checksum == message.checksum
        detail = "" if ok else "the bytes here are not the bytes that were sent"
        self.send(intake.pair, ProbeResult(nonce=message.nonce, ok=ok, detail=detail))

    def _reply_rejected(self, pair: Pair, commit: Commit, reason: str) -> None:
        self.send(
            pair,
            Rejected(request_id=commit.request_id, attempt=commit.attempt, lease_id=commit.lease_id, reason=reason),
        )

    def _other_weights(self, version: str) -> str:
        return f"computed with weights {version}, served are {self.weight_version}"
