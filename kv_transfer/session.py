"""One life of the writer's connection to one receiver: a control channel, a data link and a sender thread.

When the link breaks the session is over, with all its hand-offs. See `peer` for what happens next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kv_transfer.canary import Canary
from kv_transfer.control import Channel
from kv_transfer.cost import CostMeter
from kv_transfer.handoff import Handoff
from kv_transfer.layout import CopyPlan, check_layout, mismatch
from kv_transfer.link import Link
from kv_transfer.local import LocalNetwork
from kv_transfer.manifest import POLICIES, Policy
from kv_transfer.metrics import Tally
from kv_transfer.mooncake import Engine
from kv_transfer.outbox import Outbox
from kv_transfer.sender import Sender
from kv_transfer.transports import WriterEnd, connect, offer
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import LayoutMismatch, ProtocolError, ServingError, TransferError, TransferTimeout
from llm_engine.api.handoff import (
    PROTOCOL_VERSION,
    Accepted,
    Connect,
    Connected,
    Defer,
    Fence,
    Fenced,
    Grant,
    KvLayout,
    ProbeGrant,
    ProbeResult,
    ReceiverMessage,
    Refused,
    Rejected,
    Withdraw,
)
from llm_engine.api.messages import Codec, Message, WorkerInfo
from llm_engine.api.messages import Peer as Target

if TYPE_CHECKING:  # needs torch, which workers without a card in the data plane do without
    from kv_transfer.device import DeviceRegion

log = logging.getLogger(__name__)

_CONNECT_S = 5.0  # or grant_timeout_s, if that is shorter


@dataclass(slots=True, kw_only=True)
class ClientContext:
    """What every part of one HandoffClient shares."""

    config: TransferConfig
    key: bytes
    info: WorkerInfo
    layout: KvLayout
    source: memoryview | DeviceRegion
    network: LocalNetwork | None
    transports: Sequence[str]
    engine: Engine | None
    wrap_link: Callable[[Link], Link]
    codec: Codec[ReceiverMessage]
    spawn: Callable[[Coroutine[Any, Any, None]], None]
    post: Callable[..., None]  # call on the loop, from any thread
    crash: Callable[[Exception], None]  # a bug: the worker must notice
    tally: Tally = field(default_factory=Tally)
    handoffs: set[Handoff] = field(default_factory=set)

    def new_cost(self) -> CostMeter:
        """For one link from `source`."""
        if isinstance(self.source, memoryview):
            return CostMeter()
        from kv_transfer.device_outbox import START

        return CostMeter(START)

    def new_outbox(self, num_tokens: int) -> Outbox:
        """For one hand-off out of `source`."""
        if isinstance(self.source, memoryview):
            return Outbox(self.layout, self.source, num_tokens)
        from kv_transfer.device_outbox import DeviceOutbox

        return DeviceOutbox(self.layout, self.source, num_tokens)


class Session:
    """One life of the connection to one receiver. `open`, then `run` until it is lost."""

    def __init__(self, context: ClientContext, target: Target) -> None:
        self.context = context
        self.target = target
        self.transport = ""
        self.cost = context.new_cost()
        self.reason = ""
        self.canary = Canary(self, context.config.canary_period_s, context.config.commit_timeout_s)
        self.plan: CopyPlan
        self.policy: Policy  # the receiver's: it verifies
        self.sender: Sender
        self._channel: Channel | None = None
        self._link: Link | None = None
        self._handoffs: dict[tuple[str, int], Handoff] = {}
        self._lost = asyncio.Event()
        self._error: TransferError | None = None

    async def open(self) -> None:
        """Handshake on the control channel, then the data link. Raises TransferError; close the session then."""
        timeout_s = min(_CONNECT_S, self.context.config.grant_timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                connected = await self._greet()
        except TimeoutError:
            where = f"{self.target.name} at {self.target.control_addr}"
            raise TransferTimeout(f"{where} does not answer within {timeout_s:g} s") from None
        self.plan = CopyPlan(self.context.layout, connected.layout)
        self.policy = POLICIES[connected.checksum]
        self.transport, self.reason = connected.link.transport, connected.reason
        # In a thread, because mapping a large region takes a while; the link closes itself if nobody waits any more.
        opening = asyncio.ensure_future(asyncio.to_thread(self._connect_link, connected))
        try:
            link = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_late)
            raise
        self._link = self.context.wrap_link(link)
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
            self.context.spawn(asyncio.to_thread(self.sender.join))
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

    def send_quietly(self, message: Message) -> None:
        """The same for messages whose loss is harmless."""
        with contextlib.suppress(TransferError):
            self.send(message)

    async def _greet(self) -> Connected:
        context = self.context
        try:
            self._channel = await Channel.connect(self.target.control_addr)
        except TransferError as exc:
            raise TransferError(f"{self.target.name} at {self.target.control_addr}: {exc}") from exc
        self._channel.trust()  # what it sends is checked against the key; it was chosen by the cluster
        links = tuple(offer(name, context.network) for name in context.transports)
        hello = Connect(version=PROTOCOL_VERSION, info=context.info, layout=context.layout, links=links)
        self.send(hello)
        while True:
            match await self._next_message():
                case Connected() as answer:
                    return self._check(answer)
                case Refused() as refusal:
                    kind = LayoutMismatch if refusal.code == "layout" else TransferError
                    raise kind(refusal.reason)
                case _:
                    pass

    def _check(self, answer: Connected) -> Connected:
        """The receiver compared both ends; so do we: a wrong layout here would write into the wrong bytes."""
        mine, theirs = self.context.info, answer.info
        if theirs.incarnation != self.target.incarnation:
            raise TransferError(f"{self.target.name} restarted: {theirs.incarnation} is not {self.target.incarnation}")
        reason = mismatch(
            (mine.name, mine.format_id, self.context.layout), (theirs.name, theirs.format_id, answer.layout)
        )
        if reason is not None:
            raise LayoutMismatch(reason)
        check_layout(answer.layout, answer.layout.arena_bytes)
        return answer

    def _connect_link(self, connected: Connected) -> Link:
        """In a thread."""

        def on_lost(error: TransferError) -> None:
            self.context.post(self.cut, error)

        context = self.context
        device = None if isinstance(context.source, memoryview) else context.source
        end = WriterEnd(
            config=context.config, key=context.key, network=context.network, engine=context.engine, device=device
        )
        return connect(connected, end, on_lost)

    async def _receive(self) -> None:
        assert self._channel is not None
        try:
            await self._channel.serve(self._on_frame)
        except TransferError as exc:
            self.cut(exc)

    def _on_frame(self, frame: memoryview) -> None:
        if (message := self._decode(frame)) is not None:
            self._dispatch(message)

    async def _next_message(self) -> ReceiverMessage:
        assert self._channel is not None
        while True:
            if (message := self._decode(await self._channel.recv())) is not None:
                return message

    def _decode(self, frame: bytes | memoryview) -> ReceiverMessage | None:
        try:
            return self.context.codec.decode(frame)
        except ProtocolError:
            self.context.tally.dropped_frames += 1
            return None

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


def _close_late(opening: asyncio.Future[Link]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
