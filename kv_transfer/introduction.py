"""How a session begins: the writer introduces itself on a control channel, and opens the link that the receiver chose.

Where the choice is automatic and the link can't be opened (cards that don't reach each other's memory, say), it asks
again without that transport and tells why, so that the reason reaches both ends' status.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kv_transfer.client_context import ClientContext
from kv_transfer.control import Channel
from kv_transfer.cost import CostMeter
from kv_transfer.layout import CopyPlan, check_layout, mismatch
from kv_transfer.link import Link
from kv_transfer.manifest import POLICIES, Policy
from kv_transfer.transports import WriterEnd, connect, offer
from llm_engine.api.errors import LayoutMismatch, TransferError, TransferTimeout
from llm_engine.api.handoff import PROTOCOL_VERSION, Connect, Connected, Refused
from llm_engine.api.messages import Peer as Target

if TYPE_CHECKING:  # needs torch
    from kv_transfer.staged import Bounce

log = logging.getLogger(__name__)

_CONNECT_S = 5.0  # or grant_timeout_s, if that is shorter
_MAX_REASON = 300

OnLost = Callable[[TransferError], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a session runs on."""

    channel: Channel
    link: Link
    reason: str  # why this transport
    plan: CopyPlan
    policy: Policy  # the receiver's: it verifies
    cost: CostMeter
    bounce: Bounce | None  # host memory that bytes of a card go through

    def release(self) -> None:
        """Nobody writes any more."""
        if self.bounce is not None:
            self.bounce.close()


class _Prepared(NamedTuple):
    link: Link
    plan: CopyPlan
    cost: CostMeter
    bounce: Bounce | None


async def introduce(context: ClientContext, target: Target, shunned: Mapping[str, str], on_lost: OnLost) -> Opened:
    """`shunned`: transports to do without, and why. Raises TransferError; then nothing is left open."""
    transports = [name for name in context.transports if name not in shunned]
    lacking = {**context.lacking, **shunned}
    while True:
        channel, connected = await _greet(context, target, transports, lacking)
        try:
            link, plan, cost, bounce = await _prepare(context, connected, on_lost)
        except TransferError as exc:
            channel.close()
            failed = connected.link.transport
            if failed not in transports or len(transports) == 1:
                raise
            log.warning("hand-off to %s goes without %s: %s", target.name, failed, exc)
            transports.remove(failed)
            lacking[failed] = str(exc)[:_MAX_REASON]
            continue
        except BaseException:
            channel.close()
            raise
        return Opened(
            channel=channel,
            link=link,
            reason=connected.reason,
            plan=plan,
            policy=POLICIES[connected.checksum],
            cost=cost,
            bounce=bounce,
        )


async def _greet(
    context: ClientContext, target: Target, transports: Sequence[str], lacking: dict[str, str]
) -> tuple[Channel, Connected]:
    timeout_s = min(_CONNECT_S, context.config.grant_timeout_s)
    channel: Channel | None = None
    try:
        async with asyncio.timeout(timeout_s):
            try:
                channel = await Channel.connect(target.control_addr)
            except TransferError as exc:
                raise TransferError(f"{target.name} at {target.control_addr}: {exc}") from exc
            channel.trust()  # what it sends is checked against the key; it was chosen by the cluster
            links = tuple(offer(name, context.network) for name in transports)
            hello = Connect(
                version=PROTOCOL_VERSION, info=context.info, layout=context.layout, links=links, lacking=lacking
            )
            channel.send(context.codec.encode(hello))
            return channel, _checked(context, target, await _answer(context, channel))
    except BaseException as exc:
        if channel is not None:
            channel.close()
        if isinstance(exc, TimeoutError):
            where = f"{target.name} at {target.control_addr}"
            raise TransferTimeout(f"{where} does not answer within {timeout_s:g} s") from None
        raise


async def _answer(context: ClientContext, channel: Channel) -> Connected:
    while True:
        match context.decode(await channel.recv()):
            case Connected() as answer:
                return answer
            case Refused() as refusal:
                kind = LayoutMismatch if refusal.code == "layout" else TransferError
                raise kind(refusal.reason)
            case _:
                pass


def _checked(context: ClientContext, target: Target, answer: Connected) -> Connected:
    """The receiver compared both ends; so do we: a wrong layout here would write into the wrong bytes."""
    mine, theirs = context.info, answer.info
    if theirs.incarnation != target.incarnation:
        raise TransferError(f"{target.name} restarted: {theirs.incarnation} is not {target.incarnation}")
    reason = mismatch((mine.name, mine.format_id, context.layout), (theirs.name, theirs.format_id, answer.layout))
    if reason is not None:
        raise LayoutMismatch(reason)
    check_layout(answer.layout, answer.layout.arena_bytes)
    return answer


async def _prepare(context: ClientContext, connected: Connected, on_lost: OnLost) -> _Prepared:
    """In a thread, because mapping a large region takes a while; the link closes itself if nobody waits any more."""
    opening = asyncio.ensure_future(asyncio.to_thread(_open_link, context, connected, on_lost))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_late)
        raise


def _open_link(context: ClientContext, connected: Connected, on_lost: OnLost) -> _Prepared:
    card = None if isinstance(context.source, memoryview) else context.source
    plan, cost, bounce = CopyPlan(context.layout, connected.layout), CostMeter(), None
    if card is not None and connected.link.transport == "cuda_ipc":
        from kv_transfer.device_outbox import START

        cost = CostMeter(START)
    elif card is not None:
        from kv_transfer.staged import Bounce, StagedPlan

        bounce = Bounce(card, context.layout, context.engine if connected.link.transport == "mooncake" else None)
        plan = StagedPlan(context.layout, connected.layout, bounce)
    end = WriterEnd(config=context.config, key=context.key, network=context.network, engine=context.engine, device=card)
    try:
        return _Prepared(connect(connected, end, on_lost), plan, cost, bounce)
    except BaseException:
        if bounce is not None:
            bounce.close()
        raise


def _close_late(opening: asyncio.Future[_Prepared]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        prepared = opening.result()
        prepared.link.close()
        if prepared.bounce is not None:
            prepared.bounce.close()
