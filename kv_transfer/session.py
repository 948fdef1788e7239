"""One life of the writer's connection to one receiver: a control channel, a data link and a sender thread.

When the link breaks the session is over, with all its hand-offs. See `peer` for what happens next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from kv_transfer.canary import Canary
from kv_transfer.client_context import ClientContext
from kv_transfer.control import Channel
from kv_transfer.cost import CostMeter
from kv_transfer.handoff import Handoff
from kv_transfer.introduction import Opened, introduce
from kv_transfer.layout import CopyPlan
from kv_transfer.link import Link
from kv_transfer.manifest import Policy
from kv_transfer.sender import Sender
from llm_engine.api.errors import ServingError, TransferError
from llm_engine.api.handoff import (
    Accepted,
    Connected,
    Defer,
    Fence,
    Fenced,
    Grant,
    ProbeGrant,
    ProbeResult,
    ReceiverMessage,
    Refused,
    Rejected,
    Withdraw,
)
from llm_engine.api.messages import Message
from llm_engine.api.messages import Peer as Target

log = logging.getLogger(__name__)


class Session:
    """One life of the connection to one receiver. `open`, then `run` until it is lost."""

    def __init__(self, context: ClientContext, target: Target, shunned: dict[str, str]) -> None:
        """`shunned`: transports that are not to be chosen, and why; outlives the session."""
        self.context = context
        self.target = target
        self.transport = ""
        self.cost = CostMeter()
        self.reason = ""
        self.canary = Canary(self, context.config.canary_period_s, context.config.commit_timeout_s)
        self.plan: CopyPlan
        self.policy: Policy  # the receiver's: it verifies
        self.sender: Sender
        self._shunned = shunned
        self._opened: Opened | None = None
        self._channel: Channel | None = None
        self._link: Link | None = None
        self._handoffs: dict[tuple[str, int], Handoff] = {}
        self._sent_at = 0.0
        self._lost = asyncio.Event()
        self._error: TransferError | None = None

    async def open(self) -> None:
        """Handshake on the control channel, then the data link. Raises TransferError."""
        opened = await introduce(
            self.context, self.target, self._shunned, lambda error: self.context.post(self.cut, error)
        )
        self._channel, self._opened = opened.channel, opened
        self.plan, self.policy, self.cost = opened.plan, opened.policy, opened.cost
        self.transport, self.reason = opened.link.transport, opened.reason
        self._link = self.context.wrap_link(opened.link)
        self.sender = Sender(self._link, lambda exc: self.context.post(self._on_sender_error, exc))
        log.info("hand-off to %s/%s: %s", self.target.name, self.target.incarnation, self.reason)

    async def run(self) -> TransferError:
        """Serve the control channel and the canary until the session is lost; returns why."""
        async with asyncio.TaskGroup() as tasks:
            workers = [tasks.create_task(self._receive()), tasks.create_task(self.canary.run())]
            await self._lost.wait()
            for task in workers:
                task.cancel()
        assert self._error is not None
        return self._error

    def close(self) -> None:
        """End link, channel and thread; fail what is left."""
        self.cut(TransferError("session closed"))
        if self._link is not None:
            self._link.close()
            self.sender.stop()
            self.context.spawn(asyncio.to_thread(self._release))
        if self._channel is not None:
            self._channel.close()

    def cut(self, error: TransferError) -> None:
        """The session is over. Its hand-offs fail, running writes end."""
        if self._error is not None:
            return
        self._error = error
        self._lost.set()
        if self._link is not None:
            self._link.close()
        for handoff in tuple(self._handoffs.values()):
            handoff.fail("link", TransferError(f"{self.target.name}: {error}", request_id=handoff.request_id))

    def shun(self, reason: str) -> None:
        """Bytes arrive wrong: if others are left, the next session does without this transport."""
        if len(self.context.transports) > len(self._shunned) + 1:
            self._shunned[self.transport] = reason
            self.cut(TransferError(f"{self.transport}: {reason}"))

    def offer(self, handoff: Handoff) -> None:
        """Start a hand-off on this session."""
        key = (handoff.request_id, handoff.attempt)
        if key in self._handoffs:
            handoff.fail("duplicate", TransferError(f"{key[0]}/{key[1]} is under way", request_id=key[0]))
            return
        self._handoffs[key] = handoff
        handoff.attach(self)

    def forget(self, handoff: Handoff) -> None:
        """The hand-off is over."""
        if self._handoffs.get((handoff.request_id, handoff.attempt)) is handoff:
            del self._handoffs[handoff.request_id, handoff.attempt]

    @property
    def is_over(self) -> bool:
        """It was lost or closed, and is being taken down."""
        return self._error is not None

    @property
    def num_pending(self) -> int:
        """Hand-offs under way."""
        return len(self._handoffs)

    def send(self, message: Message) -> None:
        """Send a control message, from any thread. Raises TransferError when the session is over or the queue full."""
        if self._error is not None or self._channel is None:
            raise TransferError(f"{self.target.name}: {self._error or 'not connected'}")
        self._channel.send(self.context.codec.encode(message))
        self._sent_at = time.monotonic()

    def silent_s(self) -> float:
        """How long nothing has been sent."""
        return time.monotonic() - self._sent_at

    def send_quietly(self, message: Message) -> None:
        """The same for messages whose loss is harmless."""
        with contextlib.suppress(TransferError):
            self.send(message)

    def _release(self) -> None:
        """In a thread."""
        self.sender.join()
        if self._opened is not None:
            self._opened.release()

    async def _receive(self) -> None:
        assert self._channel is not None
        try:
            await self._channel.serve(self._on_frame)
        except TransferError as exc:
            self.cut(exc)

    def _on_frame(self, frame: memoryview) -> None:
        if (message := self.context.decode(frame)) is not None:
            self._dispatch(message)

    def _dispatch(self, message: ReceiverMessage) -> None:
        match message:
            case ProbeGrant() | ProbeResult():
                self.canary.on_answer(message)
            case Fence():
                self._on_fence(message)
            case Grant():
                handoff = self._handoffs.get((message.request_id, message.attempt))
                if handoff is not None:
                    handoff.on_grant(message)
                else:  # forgotten, so it has stopped; or never known
                    self.send_quietly(Withdraw(request_id=message.request_id, attempt=message.attempt))
            case Defer() | Refused() | Accepted() | Rejected():
                handoff = self._handoffs.get((message.request_id, message.attempt))
                if handoff is not None:
                    _deliver(handoff, message)
            case Connected():
                pass

    def _on_fence(self, fence: Fence) -> None:
        handoff = self._handoffs.get((fence.request_id, fence.attempt))
        if handoff is not None:
            handoff.on_fence(fence)
        elif not self.canary.on_fence(fence):
            # Hand-offs are forgotten only when they have stopped writing.
            self.send_quietly(Fenced(lease_id=fence.lease_id, epoch=fence.epoch))

    def _on_sender_error(self, error: Exception) -> None:
        if isinstance(error, ServingError):
            self.cut(error if isinstance(error, TransferError) else TransferError(str(error)))
        else:
            self.context.crash(error)


def _deliver(handoff: Handoff, message: Defer | Refused | Accepted | Rejected) -> None:
    match message:
        case Defer():
            handoff.on_defer(message)
        case Refused():
            handoff.on_refused(message)
        case Accepted() | Rejected():
            handoff.on_verdict(message)
