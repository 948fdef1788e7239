"""What the writer's threads do for one hand-off: blocks leave in the order in which they become ready, the receiver is
told what has landed, and what concludes the hand-off is said in the thread that had to be waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from kv_transfer.awake import EVERY_S, Awake
from kv_transfer.commit_parts import CommitParts
from kv_transfer.link import LeaseKey, Link
from kv_transfer.outbox import News, Outbox, Pumped, Turn
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import Grant, Progress
from llm_engine.api.messages import Message

if TYPE_CHECKING:
    from kv_transfer.session import Session

_TOKENS_LATER_S = 0.002  # the first blocks are under way by then, if any is ready


class Delivery:
    """From the connection to the end of a hand-off. `fail(cause, why)`: from any thread."""

    def __init__(self, outbox: Outbox, parts: CommitParts, session: Session, fail: Callable[[str, str], None]) -> None:
        self._outbox = outbox
        self._parts = parts
        self._session = session
        self._fail = fail
        self._prepared = False
        self._awake = Awake(self.say_nothing)

    def open(self, grant: Grant) -> None:
        """On the loop: blocks are reserved. Raises ProtocolError for an impossible grant."""
        self._outbox.open(grant, self._session.plan, self._session.policy)
        self._parts.open(LeaseKey(grant.lease_id, grant.epoch), self._send)
        self._session.sender.submit(self._pump)
        asyncio.get_running_loop().call_later(_TOKENS_LATER_S, self._parts.tell)

    def news(self, wake: bool) -> None:
        """The outbox was given blocks; `wake`: what it said. Any thread."""
        if wake:
            self._session.sender.submit(self._pump)
        elif not self._prepared and self._outbox.lease is None:
            self._prepared = True
            self._session.sender.submit(self._prepare)

    def _prepare(self, link: Link) -> bool:
        """Sender thread."""
        self._outbox.prepare(link, self._session.plan)
        return False

    def _pump(self, link: Link) -> bool:
        """Sender thread."""
        lease, session = self._outbox.lease, self._session
        if lease is None:
            return False

        def tell(news: News) -> None:
            link.confirm(lease).add_done_callback(partial(self._on_progress, lease, news))

        def near() -> None:
            session.context.post(self._awake.stay)

        pumped = self._outbox.pump(link, session.cost, Turn(session.sender.has_jobs, tell, near))
        if pumped is Pumped.WRITTEN:
            link.confirm(lease).add_done_callback(partial(self._on_confirmed, lease))
        return pumped is Pumped.MORE

    def _on_progress(self, lease: LeaseKey, layers: News, done: Future[int | None]) -> None:
        """Link's thread. What was written has landed: the receiver may hash it."""
        if done.exception() is None and not self._parts.closed:
            self._session.send_quietly(Progress(lease_id=lease.lease_id, epoch=lease.epoch, layers=layers))

    def _on_confirmed(self, lease: LeaseKey, done: Future[int | None]) -> None:
        """Link's thread. Everything has landed."""
        if done.exception() is not None:
            return  # the link is broken: the session fails all its hand-offs
        outbox, context = self._outbox, self._session.context
        outbox.marks.reach("landed")
        try:
            landed = done.result()
            if landed is not None and landed != outbox.num_bytes:
                self._fail("incomplete", f"{outbox.num_bytes} bytes sent, {landed} arrived")
                return
            self._parts.add_manifest(outbox.manifest())
            if not self._parts.told_first:
                context.post(self._awake.stay)
        except Exception as exc:  # a future swallows what its callbacks raise
            context.post(context.crash, exc)

    def say_nothing(self) -> bool:
        """On the loop. False: there is no need, everything has left or never will."""
        lease = self._outbox.lease
        if lease is None or self._parts.closed or (self._parts.told_first and self._parts.told_manifest):
            return False
        if self._session.silent_s() >= EVERY_S / 2:
            self._session.send_quietly(Progress(lease_id=lease.lease_id, epoch=lease.epoch, layers=()))
        return True

    def _send(self, message: Message) -> None:
        """Any thread."""
        try:
            self._session.send(message)
        except TransferError as exc:
            self._fail("link", str(exc))
