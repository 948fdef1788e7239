"""Hand-offs on the receiver: offers wait, become leases, are verified at commit, and admitted or rejected."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

from kv_transfer.custody import Custody, Held
from kv_transfer.link import Landed
from kv_transfer.metrics import HandoffReport, Tally
from kv_transfer.offers import Attempts, OfferQueue, Waiting
from kv_transfer.pairs import Pair
from kv_transfer.probes import Probes
from kv_transfer.reserver import BlockReserver, R
from kv_transfer.verifier import AnyLanding, new_verifier
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import ServingError, TransferError
from llm_engine.api.handoff import (
    Accepted,
    Commit,
    Fenced,
    Grant,
    KvLayout,
    Offer,
    Probe,
    ProbeCommit,
    Progress,
    Rejected,
    Withdraw,
)
from llm_engine.api.messages import Message

if TYPE_CHECKING:  # needs torch
    from kv_transfer.device import DeviceRegion


@dataclass(slots=True, eq=False)
class _Active(Generic[R]):
    """A granted hand-off."""

    waiting: Waiting
    held: Held[R]
    landing: AnyLanding


class Intakes(Generic[R]):
    """All hand-offs into one worker. `send` delivers a control message to a pair or raises TransferError."""

    def __init__(
        self,
        *,
        config: TransferConfig,
        layout: KvLayout,
        region: str,
        memory: memoryview | DeviceRegion,
        reserver: BlockReserver[R],
        send: Callable[[Pair, Message], None],
        tally: Tally,
    ) -> None:
        self.weight_version = ""
        self.custody = Custody(region, reserver, self.send, tally)
        self.offers = OfferQueue(
            config=config, layout=layout, reserver=reserver, grant=self._grant, send=self.send, tally=tally
        )
        self.custody.on_freed = self.offers.wake
        self._max_pending = config.max_pending
        self._layout = layout
        self._reserver = reserver
        self._send_or_raise = send
        self._tally = tally
        self._attempts = Attempts()
        self._active: dict[str, _Active[R]] = {}  # by request: granted, neither concluded nor revoked
        self._admitting = 0
        self._verifier = new_verifier(layout, memory)
        self._probes = Probes(self.custody, reserver, self._verifier, self.send, config.commit_timeout_s)
        self._tasks: asyncio.TaskGroup

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start the background work in `tasks`."""
        self._tasks = tasks
        tasks.create_task(self.offers.run())
        tasks.create_task(self.custody.repeat_fences())

    def close(self) -> None:
        """Stop the timers and the hashing threads."""
        self.offers.close()
        self.custody.close()
        self._verifier.close()

    @property
    def num_pending(self) -> int:
        """Offers waiting, leases granted, sequences being admitted: what a drain waits for."""
        return len(self.offers) + len(self._active) + self._admitting

    @property
    def num_leases(self) -> int:
        """Granted and not concluded."""
        return len(self._active)

    def cancel(self, request_id: str, attempt: int, cause: str = "cancelled") -> bool:
        """End this attempt and every older one, wherever it stands before `admit`."""
        self._attempts.close(request_id, attempt)
        waiting, active = self.offers.find(request_id), self._active.get(request_id)
        if waiting is not None and waiting.attempt <= attempt:
            self.offers.refuse(waiting, "stale", cause)
            return True
        if active is not None and active.held.lease.attempt <= attempt:
            self.custody.revoke(active.held, cause)
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
            if self.num_pending < self._max_pending:
                self.offers.add(pair, offer)
            else:
                refuse(pair, offer, "full", f"{self.num_pending} hand-offs are pending")

    def on_progress(self, pair: Pair, progress: Progress) -> None:
        """Hash what has landed. A claim under any other lease than this writer's own, still open, is ignored."""
        held = self.custody.find(pair, progress.lease_id)
        if held is None or held.lease.key.epoch != progress.epoch or not held.receiving or held.sealed:
            return
        active = self._active.get(held.lease.request_id)
        if active is not None and active.held is held:
            active.landing.advance(progress.layers)

    def on_commit(self, pair: Pair, commit: Commit) -> None:
        """Verify and admit in a task of its own."""
        active = self._active.get(commit.request_id)
        if active is None or not _names(commit, active.held, pair):
            self._tally.failed["stale_commit"] += 1
            self._reject(pair, commit, "the lease is gone")
            return
        landed = self.custody.seal(active.held)
        self._tasks.create_task(self._conclude(active, commit, landed, time.monotonic()))

    def on_withdraw(self, pair: Pair, message: Withdraw) -> None:
        """The writer has stopped for good."""
        waiting = self.offers.find(message.request_id)
        if waiting is not None and waiting.pair is pair and waiting.attempt == message.attempt:
            self.offers.drop(waiting)
            self._tally.failed["withdrawn"] += 1
        elif self.custody.withdraw(pair, message.request_id, message.attempt):
            self._tally.failed["withdrawn"] += 1

    def on_fenced(self, pair: Pair, message: Fenced) -> None:
        """The writer has stopped under this lease, asked by a fence or not."""
        standing = self.custody.on_fenced(pair, message)
        if standing is not None:
            self._tally.failed["withdrawn"] += 1
            self.custody.end(standing)

    def on_connection_lost(self, pair: Pair, connection: int, proven: bool) -> None:
        """The data connection of a pair is over. `proven`: its writer can't write any more."""
        for waiting in self.offers.of(pair):
            self.offers.drop(waiting)
            self._tally.failed["writer_lost"] += 1
        self.custody.on_connection_lost(connection, proven)

    def on_probe(self, pair: Pair, message: Probe | ProbeCommit) -> None:
        """The canary."""
        if isinstance(message, Probe):
            self._probes.on_probe(pair, message, self._tasks)
        else:
            self._probes.on_commit(pair, message, self._tasks)

    # Internals.

    def _grant(self, waiting: Waiting, reservation: R) -> None:
        request_id, attempt, pair = waiting.request_id, waiting.attempt, waiting.pair
        held = self.custody.take(
            pair,
            request_id,
            attempt,
            reservation,
            left_s=waiting.left_s(),
            overdue="deadline",
            on_over=lambda: self._active.pop(request_id).landing.end(),
        )
        key = held.lease.key
        landing = self._verifier.land(key, held.lease.blocks, pair.policy)
        self._active[request_id] = _Active(waiting, held, landing)
        pair.inlet.watch(key, landing.on_landed)
        grant = Grant(
            request_id=request_id,
            attempt=attempt,
            lease_id=key.lease_id,
            epoch=key.epoch,
            have_tokens=reservation.have_tokens,
            blocks=tuple(reservation.blocks),
        )
        self.send(pair, grant)

    async def _conclude(self, active: _Active[R], commit: Commit, landed: Landed | None, received_at: float) -> None:
        held, offer = active.held, active.waiting.offer
        reason = await self._verify(active, commit, landed, offer.num_tokens)
        if not held.receiving:  # revoked while we were hashing: fence or withdrawal deal with it
            self._reject(held.pair, commit, "the lease was revoked")
            return
        if reason is not None:
            self._tally.failed["rejected"] += 1
            self.custody.end(held)
            self._reject(held.pair, commit, reason)
            return
        report = self._report(active, commit, received_at)
        reservation = self.custody.commit(held)
        self._admitting += 1
        try:
            await self._reserver.admit(offer.submit, reservation, commit.first, report)
        except ServingError as exc:
            self._tally.failed["not_admitted"] += 1
            self._reserver.release(reservation)
            self._reject(held.pair, commit, str(exc))
            return
        finally:
            self._admitting -= 1
        self._tally.count_accepted(report)
        accepted = Accepted(request_id=commit.request_id, attempt=commit.attempt, lease_id=commit.lease_id)
        self.send(held.pair, accepted)

    async def _verify(self, active: _Active[R], commit: Commit, landed: Landed | None, num_tokens: int) -> str | None:
        if commit.weight_version != self.weight_version:
            return self._other_weights(commit.weight_version)
        expected = self._verifier.num_rows * len(active.held.lease.blocks)
        if landed is not None and landed.num_cells != expected:
            return f"{landed.num_cells} of {expected} blocks of layers arrived"
        return await self._verifier.check(commit.manifest, active.landing, num_tokens)

    def _report(self, active: _Active[R], commit: Commit, received_at: float) -> HandoffReport:
        now = time.monotonic()
        held, num_blocks = active.held, len(active.held.lease.blocks)
        return HandoffReport(
            request_id=commit.request_id,
            attempt=commit.attempt,
            peer=held.pair.name,
            transport=held.pair.inlet.transport,
            num_tokens=active.waiting.offer.num_tokens,
            have_tokens=held.reservation.have_tokens,
            num_blocks=num_blocks,
            num_bytes=num_blocks * self._layout.bytes_per_block(),
            handoff_s=now - active.waiting.received_at,
            exposed_s=commit.compute_end_age_s + now - received_at,
            verify_s=now - received_at,
        )

    def _reject(self, pair: Pair, commit: Commit, reason: str) -> None:
        answer = Rejected(request_id=commit.request_id, attempt=commit.attempt, lease_id=commit.lease_id, reason=reason)
        self.send(pair, answer)

    def _other_weights(self, version: str) -> str:
        return f"computed with weights {version}, served are {self.weight_version}"


def _names(commit: Commit, held: Held[R], pair: Pair) -> bool:
    """Whether a commit is the first of this writer for exactly this lease."""
    lease = held.lease
    named = (commit.attempt, commit.lease_id, commit.epoch) == (lease.attempt, *lease.key)
    return named and held.pair is pair and not held.sealed
