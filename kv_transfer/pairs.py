"""The receiver's registry of writers: who has connected, over which inlet, and whether its data connection lives."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kv_transfer.control import Channel
from kv_transfer.layout import check_layout, mismatch
from kv_transfer.link import Inlet
from kv_transfer.manifest import Policy, policy_for
from kv_transfer.negotiate import End, choose
from llm_engine.api.errors import LayoutMismatch, TransferError
from llm_engine.api.handoff import PROTOCOL_VERSION, Connect, Connected, KvLayout, Refused
from llm_engine.api.messages import WorkerInfo

log = logging.getLogger(__name__)

MAX_PAIRS = 1024
_ORPHAN_S = 10.0


class Entrance(NamedTuple):
    """One transport's way in. `region` names the memory that it leads to."""

    inlet: Inlet
    region: str
    layout: KvLayout


@dataclass(slots=True, eq=False)
class Pair:
    """One session of one writer. `connection` is its data connection while that lives."""

    channel: Channel
    name: str
    incarnation: str
    inlet: Inlet
    region: str
    ticket: str
    reason: str  # why this transport
    policy: Policy
    connection: int | None = None
    seen_at: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"{self.name}/{self.incarnation}"


class Pairs:
    """All sessions, by control channel, by ticket and by data connection."""

    def __init__(self, layout: KvLayout, entrances: Mapping[str, Entrance], checksum: str) -> None:
        """`layout`: of any of the regions; their planes are the same. `entrances`: by transport."""
        self.lacking: Mapping[str, str] = {}  # transports that don't work here, and why
        self._layout = layout
        self._entrances = entrances
        self._checksum = checksum
        self._by_channel: dict[Channel, Pair] = {}
        self._by_ticket: dict[str, Pair] = {}
        self._by_connection: dict[int, Pair] = {}

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._by_channel.values())

    def find(self, channel: Channel) -> Pair | None:
        """The session that a control frame belongs to."""
        return self._by_channel.get(channel)

    def connect(self, channel: Channel, message: Connect, info: WorkerInfo) -> Connected | Refused:
        """A writer introduces itself; `info` is ours. Says what is wrong, naming both ends, if the pair can't work."""
        writer = message.info
        if message.version != PROTOCOL_VERSION:
            text = f"{writer.name} speaks hand-off protocol {message.version}, {info.name} speaks {PROTOCOL_VERSION}"
            return Refused(code="version", reason=text, retryable=False)
        try:
            check_layout(message.layout, message.layout.arena_bytes if message.layout.planes else 0)
            reason = mismatch(
                (writer.name, writer.format_id, message.layout), (info.name, info.format_id, self._layout)
            )
        except LayoutMismatch as exc:
            reason = f"{writer.name}: {exc}"
        if reason is not None:
            return Refused(code="layout", reason=reason, retryable=False)
        self._drop_orphans()
        if len(self._by_channel) >= MAX_PAIRS:
            return Refused(code="full", reason=f"{info.name} already serves {MAX_PAIRS} writers")
        try:
            offers = [entrance.inlet.offer() for entrance in self._entrances.values()]
            ends = End(writer.name, message.links, message.lacking), End(info.name, offers, self.lacking)
            link, why = choose(*ends)
        except TransferError as exc:
            return Refused(code="transport", reason=str(exc), retryable=False)
        log.info("hand-off from %s/%s: %s", writer.name, writer.incarnation, why)
        inlet, region, layout = self._entrances[link.transport]
        pair = self._by_channel.get(channel)
        if pair is None:
            policy, ticket = policy_for(self._checksum, link.transport), secrets.token_hex(16)
            pair = Pair(channel, writer.name, writer.incarnation, inlet, region, ticket, why, policy)
            self._by_channel[channel] = self._by_ticket[pair.ticket] = pair
        return Connected(
            info=info,
            layout=layout,
            link=link,
            reason=why,
            region=region,
            ticket=pair.ticket,
            checksum=pair.policy,
        )

    def attach(self, ticket: str, transport: str, connection: int) -> str | None:
        """A data connection arrived; a text refuses it. A ticket is good for one connection."""
        pair = self._by_ticket.pop(ticket, None)
        if pair is None or pair.inlet.transport != transport:
            return "unknown pairing: connect on the control channel first"
        pair.connection = connection
        self._by_connection[connection] = pair
        return None

    def detach(self, connection: int) -> Pair | None:
        """The data connection is over, and with it the session."""
        pair = self._by_connection.pop(connection, None)
        if pair is not None:
            pair.connection = None
            self._by_channel.pop(pair.channel, None)
        return pair

    def lost(self, channel: Channel) -> None:
        """A control channel is over. A data connection that lives ends by itself, and the session with it."""
        pair = self._by_channel.get(channel)
        if pair is not None and pair.connection is None:
            self._forget_waiting(pair)

    def _drop_orphans(self) -> None:
        """Forget sessions whose data connection never came."""
        limit = time.monotonic() - _ORPHAN_S
        for pair in [p for p in self._by_ticket.values() if p.seen_at < limit]:
            self._forget_waiting(pair)

    def _forget_waiting(self, pair: Pair) -> None:
        self._by_ticket.pop(pair.ticket, None)
        self._by_channel.pop(pair.channel, None)
