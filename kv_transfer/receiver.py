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
from kv_transfer.local import LocalNetwork
from kv_transfer.memory import Arena
from kv_transfer.metrics import PeerStats, ReceiverStats, Tally
from kv_transfer.pairs import Entrance, Pair, Pairs
from kv_transfer.reserver import BlockReserver, Ground, R, ReservedBlocks
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

__all__ = ["BlockReserver", "Ground", "HandoffServer", "ReservedBlocks"]

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
        staging: Ground[R] | None = None,
    ) -> None:
        """`arena` must hold the layout, on the host or on a card; the shm transport needs it shared.

        `staging`: slots in host memory, with the planes of `layout`, for writers that can't reach an `arena` on a card.
        `network`: for transport `local`. Raises LayoutMismatch when a layout does not fit.
        """
        self._grounds = [Ground(layout, arena, reserver), *([staging] if staging is not None else [])]
        for ground in self._grounds:
            check_layout(ground.layout, ground.arena.num_bytes)
        self._config = config
        self._key = key
        self._network = network
        self._codec: Codec[WriterMessage] = Codec(key, WriterMessage)
        self._tally = Tally()
        self._entrances: dict[str, Entrance] = {}
        self._refused: Counter[str] = Counter()
        self._pairs = Pairs(layout, self._entrances, config.checksum)
        self._intakes: dict[str, Intakes[R]] = {}  # by region
        for ground in self._grounds:
            self._intakes[ground.arena.region] = Intakes(
                config=config,
                layout=ground.layout,
                region=ground.arena.region,
                memory=ground.arena.buffer if isinstance(ground.arena, Arena) else ground.arena,
                reserver=ground.reserver,
                send=self._send,
                tally=self._tally,
                all=self._intakes.values(),
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
        try:
            async with asyncio.TaskGroup() as tasks:
                for intakes in self._intakes.values():
                    intakes.weight_version = info.weight_version
                    intakes.start(tasks)
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
        for intakes in self._intakes.values():
            intakes.offers.wake()

    def cancel(self, request_id: str, attempt: int) -> bool:
        """Revoke this attempt and every older one, and refuse them from now on. True if one was under way here.

        A sequence already passed to `admit` is the engine's: abort it there too.
        """
        cancelled = [intakes.cancel(request_id, attempt) for intakes in self._intakes.values()]
        return any(cancelled)

    def drain(self) -> None:
        """Refuse new offers (queued ones too); what has been granted goes on. Done when `stats().pending` is 0."""
        for intakes in self._intakes.values():
            intakes.offers.drain()

    def stats(self) -> ReceiverStats:
        """Exact counters and gauges."""
        tally, every = self._tally, self._intakes.values()
        quarantined = [intakes.custody.quarantined() for intakes in every]
        return ReceiverStats(
            pending=sum(intakes.num_pending for intakes in every),
            waiting_offers=sum(len(intakes.offers) for intakes in every),
            leases=sum(intakes.num_leases for intakes in every),
            quarantined_leases=sum(leases for leases, _ in quarantined),
            quarantined_blocks=sum(blocks for _, blocks in quarantined),
            offered=tally.offered,
            deferred=tally.deferred,
            accepted=tally.accepted,
            failed=dict(tally.failed),
            num_bytes=tally.num_bytes,
            num_blocks=tally.num_blocks,
            exposed_s=tally.exposed_s,
            verify_s=tally.verify_s,
            late_bytes=sum(entrance.inlet.late_bytes for entrance in self._entrances.values()),
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
                self._intakes[pair.region].on_connection_lost(pair, connection, proven)

        self._post(detach)

    def refused(self, cause: str) -> None:
        """See listener.Events."""
        self._post(lambda: self._refused.update((cause,)))

    # Internals.

    def _open_inlets(self, host: str) -> None:
        memories = [ground.arena for ground in self._grounds]
        card = next((memory for memory in memories if not isinstance(memory, Arena)), None)
        arena = next((memory for memory in memories if isinstance(memory, Arena)), None)
        layout = self._grounds[0].layout
        names, self._pairs.lacking = usable(
            self._config, self._network, layout, card=card, by_host=arena is not None, arena=arena
        )
        for name in names:
            wanted = card if name == "cuda_ipc" else arena
            ground = next(ground for ground in self._grounds if ground.arena is wanted)
            end = ReceiverEnd(
                config=self._config,
                key=self._key,
                arena=ground.arena,
                layout=ground.layout,
                events=self,
                network=self._network,
                host=host,
            )
            self._entrances[name] = Entrance(open_inlet(name, end), ground.arena.region, ground.layout)

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
        intakes = self._intakes[pair.region]
        match message:
            case Offer():
                intakes.on_offer(pair, message)
            case Tokens():
                intakes.on_tokens(pair, message)
            case Progress():
                intakes.on_progress(pair, message)
            case Commit():
                intakes.on_commit(pair, message)
            case Withdraw():
                intakes.on_withdraw(pair, message)
            case Fenced():
                intakes.on_fenced(pair, message)
            case Probe() | ProbeCommit():
                intakes.on_probe(pair, message)

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
        for entrance in self._entrances.values():  # in a thread: theirs may be waiting for an answer of this loop
            await asyncio.to_thread(entrance.inlet.close)
        for intakes in self._intakes.values():
            intakes.close()
        if self._control is not None:
            self._control.close()
