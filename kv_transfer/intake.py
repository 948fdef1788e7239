"""Hand-offs on the receiver: offers wait, become leases, are verified at commit, and admitted or rejected.

A receiver that is reached in two memories, its caches on a card and slots on the host, has one `Intakes` for each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Generic

from kv_transfer.active import Active
from kv_transfer.custody import Custody
from kv_transfer.link import Landed
from kv_transfer.metrics import HandoffReport, Tally
from kv_transfer.offers import Attempts, OfferQueue, Waiting
from kv_transfer.pairs import Pair
from kv_transfer.probes import Probes
from kv_transfer.reserver import BlockReserver, R
from kv_transfer.tasks import start
from kv_transfer.verifier import new_verifier
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import ServingError, TransferError
from llm_engine.api.handoff import (
    Accepted,
    Commit,
    Fenced,
    Grant,
    KvLayout,
    Manifest,
    Offer,
    Probe,
    ProbeCommit,
    Progress,
    Rejected,
    Tokens,
    Withdraw,
)
from llm_engine.api.hashing import DIGEST_BYTES
from llm_engine.api.messages import Message

if TYPE_CHECKING:  # needs torch
    from kv_transfer.device import DeviceRegion


class Intakes(Generic[R]):
    """All hand-offs into one memory of a worker. `send` delivers a control message to a pair or raises TransferError.

    `all`: every `Intakes` of the worker, this one among them. An attempt is under way in one of them at most.
    """

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
        all: Collection[Intakes[R]],
    ) -> None:
        self.weight_version = ""
        self.custody = Custody(region, reserver, self.send, tally)
        self.offers = OfferQueue(
            config=config, layout=layout, reserver=reserver, grant=self._grant, send=self.send, tally=tally
        )
        self.custody.on_freed = self.offers.wake
        self._max_pending = config.max_pending
        self._block_bytes = layout.bytes_per_block()
        self._block_tokens = layout.block_tokens
        self._reserver = reserver
        self._send_or_raise = send
        self._tally = tally
        self._attempts = Attempts()
        self._all = all
        self._active: dict[str, Active[R]] = {}  # by request: granted, neither concluded nor revoked
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
        elif submit.tokens or len(offer.digests) not in (0, offer.num_tokens // self._block_tokens * DIGEST_BYTES):
            said = f"{len(offer.digests)} bytes of digests and {len(submit.tokens)} of tokens"
            refuse(pair, offer, "refused", f"{said} for {offer.num_tokens} tokens")
        else:
            for each in self._all:
                each.cancel(submit.request_id, submit.attempt, "overtaken")  # older ones; this one must not be repeated
            pending = sum(each.num_pending for each in self._all)
            if pending < self._max_pending:
                self.offers.add(pair, offer)
            else:
                refuse(pair, offer, "full", f"{pending} hand-offs are pending")

    def on_tokens(self, pair: Pair, tokens: Tokens) -> None:
        """The rest of a granted offer; once, for exactly this lease, as many tokens as were offered."""
        active = self._active.get(tokens.request_id)
        submit = active.take_tokens(tokens, pair) if active is not None else None
        if active is not None and submit is not None:
            self._reserver.prepare(submit, active.held.reservation)

    def on_progress(self, pair: Pair, progress: Progress) -> None:
        """Hash what has landed. A claim under any other lease than this writer's own, still open, is ignored."""
        held = self.custody.find(pair, progress.lease_id)
        if held is None or held.lease.key.epoch != progress.epoch or not held.receiving:
            return
        active = self._active.get(held.lease.request_id)
        if active is not None and active.held is held and not active.written:
            active.landing.advance(progress.layers)

    def on_commit(self, pair: Pair, commit: Commit) -> None:
        """Verify when the manifest is here, admit when the rest is; in a task of its own."""
        active = self._active.get(commit.request_id)
        if active is None or not active.take_part(commit, pair):
            self._tally.failed["stale_commit"] += 1
            self._reject(pair, commit, "the lease is gone")
            return
        if commit.manifest is not None:
            landed = self.custody.shut(active.held)
            start(self._tasks, self._conclude(active, commit, commit.manifest, landed))
        elif active.verified:
            start(self._tasks, self._admit(active, commit, time.monotonic()))

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
        grant = Grant(
            request_id=request_id,
            attempt=attempt,
            lease_id=key.lease_id,
            epoch=key.epoch,
            have_tokens=reservation.have_tokens,
            blocks=held.lease.blocks,
        )
        unseen = pair.inlet.landed(key) is None
        if unseen:  # nothing is missed meanwhile
            self.send(pair, grant)
        landing = self._verifier.land(key, held.lease.blocks, pair.policy)
        self._active[request_id] = Active(waiting, held, landing)
        pair.inlet.watch(key, landing.on_landed)
        if not unseen:
            self.send(pair, grant)
        waiting.marks.reach("granted")

    async def _conclude(self, active: Active[R], commit: Commit, manifest: Manifest, landed: Landed | None) -> None:
        """Verify what was written; admit, if the first token is here."""
        held, received_at = active.held, time.monotonic()
        reason = self._wrong_counts(active, commit, landed)
        if reason is None:
            num_tokens = active.waiting.offer.num_tokens
            reason = await self._verifier.check(manifest, active.landing, num_tokens)
        if not held.receiving:  # revoked while we were hashing: fence or withdrawal deal with it
            self._reject(held.pair, commit, "the lease was revoked")
            return
        if reason is not None:
            self._give_up(active, commit, reason)
            return
        active.waiting.marks.reach("verified")
        if active.last is not None:
            await self._admit(active, active.last, max(received_at, active.last_at))
        else:
            active.verified = True

    async def _admit(self, active: Active[R], last: Commit, complete_at: float) -> None:
        """Everything is here since `complete_at`, and verified."""
        held, submit = active.held, active.submit
        if not held.receiving:
            self._reject(held.pair, last, "the lease was revoked")
            return
        if last.weight_version != self.weight_version:
            self._give_up(active, last, self._other_weights(last.weight_version))
            return
        if submit is None:
            self._give_up(active, last, f"the offer's {active.waiting.offer.num_tokens} tokens are not here")
            return
        assert last.first is not None
        report = self._report(active, last, complete_at)
        reservation = self.custody.commit(held)
        self._admitting += 1
        try:
            await self._reserver.admit(submit, reservation, last.first, report)
        except ServingError as exc:
            self._tally.failed["not_admitted"] += 1
            self._reserver.release(reservation)
            self._reject(held.pair, last, str(exc))
            return
        finally:
            self._admitting -= 1
        accepted = Accepted(request_id=submit.request_id, attempt=submit.attempt, lease_id=last.lease_id)
        self.send(held.pair, accepted)
        self._tally.count_accepted(report)

    def _give_up(self, active: Active[R], commit: Commit, reason: str) -> None:
        """The writer has written everything, but nothing of it is used."""
        self._tally.failed["rejected"] += 1
        self.custody.end(active.held)
        self._reject(active.held.pair, commit, reason)

    def _wrong_counts(self, active: Active[R], commit: Commit, landed: Landed | None) -> str | None:
        if commit.weight_version != self.weight_version:
            return self._other_weights(commit.weight_version)
        expected = self._verifier.num_rows * len(active.held.lease.blocks)
        if landed is not None and landed.num_cells != expected:
            return f"{landed.num_cells} of {expected} blocks of layers arrived"
        return None

    def _report(self, active: Active[R], last: Commit, complete_at: float) -> HandoffReport:
        now = time.monotonic()
        held, num_blocks = active.held, len(active.held.lease.blocks)
        return HandoffReport(
            request_id=last.request_id,
            attempt=last.attempt,
            peer=held.pair.name,
            transport=held.pair.inlet.transport,
            num_tokens=active.waiting.offer.num_tokens,
            have_tokens=held.reservation.have_tokens,
            num_blocks=num_blocks,
            num_bytes=num_blocks * self._block_bytes,
            handoff_s=now - active.waiting.received_at,
            exposed_s=last.compute_end_age_s + now - active.last_at,
            verify_s=now - complete_at,
            marks=active.waiting.marks,
        )

    def _reject(self, pair: Pair, commit: Commit, reason: str) -> None:
        answer = Rejected(request_id=commit.request_id, attempt=commit.attempt, lease_id=commit.lease_id, reason=reason)
        self.send(pair, answer)

    def _other_weights(self, version: str) -> str:
        return f"computed with weights {version}, served are {self.weight_version}"
