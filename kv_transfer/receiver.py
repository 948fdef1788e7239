"""Receiver side of the hand-off, as the decode worker uses it. Everything public runs on one asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic

from kv_transfer.control import Channel
from kv_transfer.control_server import ControlServer
from kv_transfer.intake import Intakes
from kv_transfer.layout import check_layout
from kv_transfer.link import Inlet
from kv_transfer.local import LocalNetwork
from kv_transfer.memory import Arena
from kv_transfer.metrics import PeerStats, ReceiverStats, Tally
from kv_transfer.pairs import Pair, Pairs
from kv_transfer.reserver import BlockReserver, R, ReservedBlocks
from kv_transfer.transports import Memory, ReceiverEnd, open_inlet, usable
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import ConfigError, ProtocolError, TransferError
from llm_engine.api.handoff import (
    Commit,
    Connect,
    Fenced,
    KvLayout,
    Offer,
    Probe,
    ProbeCommit,
    Progress,
    Tokens,
    Withdraw,
    WriterMessage,
)
from llm_engine.api.messages import Codec, Message, WorkerInfo

__all__ = ["BlockReserver", "HandoffServer", "ReservedBlocks"]

_LOOP_ANSWER_S = 5.0


class _Closing(Exception):
    """Ends the task group of `run` in order."""


class HandoffServer(Generic[R]):
    """All hand-offs into one decode worker.

    Life: construct, `bind()` (gives `WorkerInfo.control_addr`), `run(info)` in the worker's task group, `close()`.
    """

    def __init__(
        self,
        *,
        config: TransferConfig,
        key: bytes,
        layout: KvLayout,
        arena: Memory,
        reserver: BlockReserver[R],
        network: LocalNetwork | None = None,
    ) -> None:
        """`arena` must hold the layout, on the host or on a card; the shm transport needs it shared.

        `network`: for transport `local`. Raises LayoutMismatch when the layout does not fit.
        """
        check_layout(layout, arena.num_bytes)
        self._config = config
        self._key = key
        self._layout = layout
        self._arena = arena
        self._network = network
        self._codec: Codec[WriterMessage] = Codec(key, WriterMessage)
        self._tally = Tally()
        self._inlets: dict[str, Inlet] = {}
        self._refused: Counter[str] = Counter()
        self._pairs = Pairs(layout, arena.region, self._inlets, config.checksum)
        self._intakes = Intakes(
            config=config,
            layout=layout,
            region=arena.region,
            memory=arena.buffer if isinstance(arena, Arena) else arena,
            reserver=reserver,
            send=self._send,
            tally=self._tally,
        )
        self._control: ControlServer | None = None
        self._info: WorkerInfo | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = asyncio.Event()
        self._done = asyncio.Event()

    def bind(self, host: str, port: int = 0) -> str:
        """Bind the control channel and the data listeners; returns the control address.

        Raises ConfigError when an address or the configured transport can't be used here.
        """
        if host in ("", "0.0.0.0", "::", "*"):
            raise ConfigError(f"worker.host={host!r}: give the address at which prefill workers reach this one")
        self._open_inlets(host)
        self._control = ControlServer(host, port, handle=self._handle, lost=self._pairs.lost, refused=self.refused)
        return self._control.address

    async def run(self, info: WorkerInfo) -> None:
        """Serve peers until `close`; raises what killed one of its tasks."""
        assert self._control is not None, "bind first"
        self._loop, self._info = asyncio.get_running_loop(), info
        self._intakes.weight_version = info.weight_version
        try:
            async with asyncio.TaskGroup() as tasks:
                self._intakes.start(tasks)
                tasks.create_task(self._control.run())
                await self._closed.wait()
                raise _Closing  # cancels the tasks
        except* _Closing:
            pass
        finally:
            await self._shut_down()
            self._done.set()

    async def close(self) -> None:
        """Close every connection, join every thread. Leased blocks are not given back. Safe in every state."""
        self._closed.set()
        if self._loop is not None:
            await self._done.wait()
        else:
            await self._shut_down()

    def blocks_freed(self) -> None:
        """Blocks may be available again: waiting offers are tried. Call it after any step that freed blocks."""
        self._intakes.offers.wake()

    def cancel(self, request_id: str, attempt: int) -> bool:
        """Revoke this attempt and every older one, and refuse them from now on. True if one was under way here.

        A sequence already passed to `admit` is the engine's: abort it there too.
        """
        return self._intakes.cancel(request_id, attempt)

    def drain(self) -> None:
        """Refuse new offers (queued ones too); what has been granted goes on. Done when `stats().pending` is 0."""
        self._intakes.offers.drain()

    def stats(self) -> ReceiverStats:
        """Exact counters and gauges."""
        tally, intakes = self._tally, self._intakes
        quarantined_leases, quarantined_blocks = intakes.custody.quarantined()
        return ReceiverStats(
            pending=intakes.num_pending,
            waiting_offers=len(intakes.offers),
            leases=intakes.num_leases,
            quarantined_leases=quarantined_leases,
            quarantined_blocks=quarantined_blocks,
            offered=tally.offered,
            deferred=tally.deferred,
            accepted=tally.accepted,
            failed=dict(tally.failed),
            num_bytes=tally.num_bytes,
            num_blocks=tally.num_blocks,
            exposed_s=tally.exposed_s,
            verify_s=tally.verify_s,
            late_bytes=sum(inlet.late_bytes for inlet in self._inlets.values()),
            dropped_frames=tally.dropped_frames,
            undeliverable=tally.undeliverable,
            refused_connections=dict(self._refused),
            peers=tuple(
                PeerStats(
                    name=pair.name, incarnation=pair.incarnation, transport=pair.inlet.transport, reason=pair.reason
                )
                for pair in self._pairs
                if pair.connection is not None
            ),
        )

    # Events of the inlets, from their threads.

    def connected(self, connection: int, transport: str, ticket: str) -> str | None:
        """See listener.Events."""
        answer: Future[str | None] = Future()

        def attach() -> None:
            if answer.set_running_or_notify_cancel():
                answer.set_result(self._pairs.attach(ticket, transport, connection))

        if not self._post(attach):
            return "not serving"
        try:
            return answer.result(_LOOP_ANSWER_S)
        except FutureTimeout:
            return "not serving" if answer.cancel() else answer.result()

    def closed(self, connection: int, proven: bool) -> None:
        """See listener.Events."""

        def detach() -> None:
            pair = self._pairs.detach(connection)
            if pair is not None:
                self._intakes.on_connection_lost(pair, connection, proven)

        self._post(detach)

    def refused(self, cause: str) -> None:
        """See listener.Events."""
        self._post(lambda: self._refused.update((cause,)))

    # Internals.

    def _open_inlets(self, host: str) -> None:
        names, self._pairs.note = usable(self._config, self._network, self._arena)
        end = ReceiverEnd(
            config=self._config,
            key=self._key,
            arena=self._arena,
            layout=self._layout,
            events=self,
            network=self._network,
            host=host,
        )
        for name in names:
            self._inlets[name] = open_inlet(name, end)

    def _handle(self, channel: Channel, frame: bytes | memoryview) -> bool:
        """See ControlServer."""
        try:
            self._dispatch(channel, self._codec.decode(frame))
        except ProtocolError:
            self._tally.dropped_frames += 1
            return False
        return True

    def _dispatch(self, channel: Channel, message: WriterMessage) -> None:
        if isinstance(message, Connect):
            self._connect(channel, message)
            return
        pair = self._pairs.find(channel)
        if pair is None:
            raise ProtocolError("message of a writer that has not connected")
        match message:
            case Offer():
                self._intakes.on_offer(pair, message)
            case Tokens():
                self._intakes.on_tokens(pair, message)
            case Progress():
                self._intakes.on_progress(pair, message)
            case Commit():
                self._intakes.on_commit(pair, message)
            case Withdraw():
                self._intakes.on_withdraw(pair, message)
            case Fenced():
                self._intakes.on_fenced(pair, message)
            case Probe() | ProbeCommit():
                self._intakes.on_probe(pair, message)

    def _connect(self, channel: Channel, message: Connect) -> None:
        assert self._info is not None
        answer = self._pairs.connect(channel, message, self._info)
        with contextlib.suppress(TransferError):
            channel.send(self._codec.encode(answer))

    def _send(self, pair: Pair, message: Message) -> None:
        pair.channel.send(self._codec.encode(message))

    def _post(self, callback: Callable[[], object]) -> bool:
        """Run on the loop, from any thread. False: there is none."""
        if self._loop is None:
            return False
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # closed
            return False
        return True

    async def _shut_down(self) -> None:
        for inlet in self._inlets.values():  # in a thread: their threads may be waiting for an answer of this loop
            await asyncio.to_thread(inlet.close)
        self._intakes.close()
        if self._control is not None:
            self._control.close()
