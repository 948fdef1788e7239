"""One hand-off on the writer's side: from the offer to the verdict.

Runs on the event loop, except `layers_ready` and `complete`, which any thread may call; see `delivery`. A hand-off is
over when `ended` is set: then no write is in flight and the receiver has been told, or has accepted, or is gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from kv_transfer.commit_parts import CommitParts
from kv_transfer.delivery import Delivery
from kv_transfer.metrics import HandoffReport
from llm_engine.api.errors import LayoutMismatch, LeaseRevoked, ProtocolError, TransferError, TransferTimeout
from llm_engine.api.handoff import (
    Accepted,
    Defer,
    Fence,
    Fenced,
    FirstToken,
    Grant,
    Offer,
    Refused,
    Rejected,
    Withdraw,
)
from llm_engine.api.messages import Submit

if TYPE_CHECKING:
    from kv_transfer.client_context import ClientContext
    from kv_transfer.session import Session

_QUIET_S = 2.0  # a write that is in flight for longer is ended by cutting the link


class Handoff:
    """One request on its way to one decode worker. Ends in `commit` returning or raising, or in `abort`.

    The source blocks must stay untouched until one of the two has returned or raised: only then nothing reads them.
    """

    def __init__(
        self,
        context: ClientContext,
        submit: Submit,
        num_tokens: int,
        weight_version: str,
        digests: bytes,
        on_failed: Callable[[Handoff, TransferError], None] | None,
    ) -> None:
        self.request_id = submit.request_id
        self.attempt = submit.attempt
        self.ended = asyncio.Event()
        self._context = context
        self._submit = submit
        self._weight_version = weight_version
        self._digests = digests
        self._on_failed = on_failed
        self._outbox = context.new_outbox(num_tokens)
        self._session: Session | None = None
        self._error: TransferError | None = None
        self._parts = CommitParts(submit, weight_version, self._outbox.marks)
        self._delivery: Delivery | None = None  # once there is a session
        self._awaited = False
        self._fence: Fence | None = None
        self._deferred = ""
        self._granted, self._verdict = asyncio.Event(), asyncio.Event()
        self._offered_at = time.monotonic()
        self._marks = self._outbox.marks
        wait_s = min(context.config.grant_timeout_s, submit.deadline_s)
        self._grant_timer = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._grant_overdue, wait_s)

    @property
    def error(self) -> TransferError | None:
        """Why the hand-off has failed, or None. It still needs `abort` before its blocks are released."""
        return self._error

    def layers_ready(self, layers: range, first_block_index: int, block_ids: Sequence[int]) -> None:
        """Blocks `first_block_index …` of the sequence are complete in `layers` (0..L-1 main, L.. MTP). Thread-safe.

        Never blocks. Per layer the calls must come in block order without gaps or repeats (ValueError otherwise); a
        call after the end is ignored.
        """
        wake = self._outbox.put(layers, first_block_index, block_ids)
        if (delivery := self._delivery) is not None:
            delivery.news(wake)

    def complete(self, first: FirstToken, *, compute_end: float) -> None:
        """The prompt is computed: the first token goes out now, or as soon as there is a lease. Thread-safe.

        Never blocks. For the thread that computes, before it tells the loop, which awaits `commit`; ignored when it
        comes twice, or after the end. `compute_end`: `time.monotonic()` at the end of the last prefill kernel.
        """
        self._parts.add_first(first, compute_end)

    async def commit(self, first: FirstToken, *, compute_end: float) -> HandoffReport:
        """`complete`, then wait until everything was written and for the receiver's verdict.

        On return the receiver owns the sequence. Raises TransferTimeout, LeaseRevoked, LayoutMismatch or TransferError;
        nothing of the hand-off was used then, unless it failed between Commit and verdict: the receiver's own messages
        to the router decide.
        """
        self._awaited = True
        self.complete(first, compute_end=compute_end)
        try:
            await self._reached(self._granted)
            async with asyncio.timeout(self._context.config.commit_timeout_s):
                await self._reached(self._verdict)
        except TimeoutError:
            step = "verdict" if self._parts.told_manifest else "write"
            self.fail("commit_timeout", TransferTimeout(self._say(f"no {step} in time"), request_id=self.request_id))
        except TransferError as exc:
            self.fail("link", exc)
        except asyncio.CancelledError:
            self.fail("aborted", TransferError("cancelled", request_id=self.request_id))
            await self.ended.wait()
            raise
        if self._error is not None:
            await self.ended.wait()
            raise self._error
        return self._conclude(compute_end)

    async def abort(self, reason: str = "aborted") -> None:
        """Give up: on return no write is in flight and the receiver was told. Idempotent; no-op after `commit`."""
        self.fail("aborted", TransferError(reason, request_id=self.request_id))
        await self.ended.wait()

    # Called by the session, on the loop.

    def attach(self, session: Session) -> None:
        """The connection is there: send the offer."""
        self._session = session
        self._delivery = Delivery(self._outbox, self._parts, session, self._fail_soon)
        try:
            session.send(
                Offer(
                    submit=msgspec.structs.replace(self._submit, tokens=b""),
                    num_tokens=self._outbox.num_tokens,
                    weight_version=self._weight_version,
                    digests=self._digests,
                )
            )
        except TransferError as exc:
            self.fail("link", exc)
        self._marks.reach("offered")

    def on_grant(self, grant: Grant) -> None:
        """Blocks are reserved. Ignored when it comes twice, or too late: then `_end` tells the receiver."""
        if self._error is not None or self._granted.is_set() or self._delivery is None:
            return
        self._marks.reach("granted")
        try:
            self._delivery.open(grant)
        except ProtocolError as exc:
            self.fail("protocol", TransferError(str(exc), request_id=self.request_id))
            return
        self._grant_timer.cancel()
        self._granted.set()

    def on_defer(self, message: Defer) -> None:
        """The offer waits at the receiver."""
        self._deferred = message.reason

    def on_refused(self, message: Refused) -> None:
        """The receiver won't take the request."""
        kind = LayoutMismatch if message.code == "layout" else TransferError
        self.fail(f"refused_{message.code}", kind(self._say(f"refused: {message.reason}"), request_id=self.request_id))

    def on_verdict(self, message: Accepted | Rejected) -> None:
        """Answer to Commit; one that does not belong to the lease is ignored."""
        lease = self._outbox.lease
        if self._error is not None or lease is None or message.lease_id != lease.lease_id or self._verdict.is_set():
            return
        if isinstance(message, Rejected):
            self.fail("rejected", TransferError(self._say(f"rejected: {message.reason}"), request_id=self.request_id))
        self._verdict.set()

    def on_fence(self, fence: Fence) -> None:
        """The receiver takes its blocks back and waits for us to say that we have stopped."""
        self._fence = fence
        self.fail("revoked", LeaseRevoked(self._say("the receiver revoked the lease"), request_id=self.request_id))

    def fail(self, cause: str, error: TransferError) -> None:
        """End without success; the first cause counts. Ignored after the end."""
        if self._error is not None or self.ended.is_set():
            return
        self._error = error
        self._parts.close()
        self._context.tally.failed[cause] += 1
        self._grant_timer.cancel()
        for event in (self._granted, self._verdict):
            event.set()
        self._context.spawn(self._end(told=cause == "rejected"))
        if self._on_failed is not None and not self._awaited and cause != "aborted":
            asyncio.get_running_loop().call_soon(self._on_failed, self, error)

    # Internals.

    def _fail_soon(self, cause: str, why: str) -> None:
        """Any thread."""
        self._context.post(self.fail, cause, TransferError(self._say(why), request_id=self.request_id))

    def _conclude(self, compute_end: float) -> HandoffReport:
        now = time.monotonic()
        outbox = self._outbox
        assert self._session is not None
        outbox.gate.stop(lambda: None)
        self._forget()
        report = HandoffReport(
            request_id=self.request_id,
            attempt=self.attempt,
            peer=self._session.target.name,
            transport=self._session.transport,
            num_tokens=outbox.num_tokens,
            have_tokens=outbox.have_tokens,
            num_blocks=outbox.num_sent_blocks,
            num_bytes=outbox.num_bytes,
            handoff_s=now - self._offered_at,
            exposed_s=now - compute_end,
            drain_s=max(0.0, self._marks["landed"] - compute_end),
            write_s=outbox.write_s,
            hash_s=outbox.hash_s,
            marks=self._marks,
        )
        self._context.tally.count_accepted(report)
        return report

    async def _end(self, told: bool) -> None:
        """Stop writing, say so, forget. Runs once, whoever failed the hand-off."""
        quiet = asyncio.Event()
        self._outbox.gate.stop(lambda: self._context.post(quiet.set))
        try:
            async with asyncio.timeout(_QUIET_S):
                await quiet.wait()
        except TimeoutError:
            if self._session is not None:
                self._session.cut(TransferError(self._say("a write did not end")))
            await quiet.wait()  # the cut makes it fail
        try:
            if self._session is None:
                return
            if self._fence is not None:
                self._session.send(Fenced(lease_id=self._fence.lease_id, epoch=self._fence.epoch))
            elif not told:
                self._session.send(Withdraw(request_id=self.request_id, attempt=self.attempt))
        except TransferError:
            pass  # the session is over; its end is the receiver's proof
        finally:
            self._forget()

    def _forget(self) -> None:
        self._grant_timer.cancel()
        self._context.handoffs.discard(self)
        if self._session is not None:
            self._session.forget(self)
        self.ended.set()

    async def _reached(self, event: asyncio.Event) -> None:
        await event.wait()
        if self._error is not None:
            raise self._error

    def _grant_overdue(self, wait_s: float) -> None:
        why = f"deferred: {self._deferred}" if self._deferred else "no answer to the offer"
        if self._session is None:
            why = "no connection"
        text = self._say(f"no grant within {wait_s:g} s ({why})")
        self.fail("grant_timeout", TransferTimeout(text, request_id=self.request_id))

    def _say(self, what: str) -> str:
        peer = self._submit.decode.name if self._submit.decode is not None else "?"
        return f"hand-off of {self.request_id}/{self.attempt} to {peer}: {what}"
