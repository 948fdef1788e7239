"""Writer side of the hand-off, as the prefill worker uses it.

Everything here runs on one asyncio loop except `Handoff.layers_ready`, which any thread may call, and the copying,
which runs on one sender thread per peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from kv_transfer.client_context import ClientContext
from kv_transfer.handoff import Handoff
from kv_transfer.layout import check_layout
from kv_transfer.link import Link
from kv_transfer.local import LocalNetwork
from kv_transfer.metrics import WriterStats
from kv_transfer.mooncake import Engine
from kv_transfer.peer import Peer
from kv_transfer.transports import ON_HOST, usable
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import Overloaded, TransferError
from llm_engine.api.handoff import KvLayout, ReceiverMessage
from llm_engine.api.messages import Codec, Submit, WorkerInfo
from llm_engine.api.messages import Peer as Target

if TYPE_CHECKING:  # needs torch
    from kv_transfer.device import DeviceRegion

__all__ = ["Handoff", "HandoffClient"]

log = logging.getLogger(__name__)


class HandoffClient:
    """All hand-offs of one prefill worker, with its connections to decode workers.

    Life: construct, `offer` … while `run()` is awaited by the worker's task group, `close()`.
    """

    def __init__(
        self,
        *,
        config: TransferConfig,
        key: bytes,
        info: WorkerInfo,
        layout: KvLayout,
        source: memoryview | DeviceRegion,
        network: LocalNetwork | None = None,
        wrap_link: Callable[[Link], Link] = lambda link: link,
    ) -> None:
        """`key`: the cluster key. `source`: the bytes `layout` describes (any arena, or memory of a card).

        `network`: where the receivers of transport `local` are. `wrap_link`: put something around every link (tests).
        """
        host_source = source if isinstance(source, memoryview) else None
        card = None if isinstance(source, memoryview) else source
        transports, lacking = usable(config, network, layout, card=card)
        for name, reason in lacking.items():
            if reason != ON_HOST:
                log.warning("hand-offs from %s can't use %s: %s", info.name, name, reason)
        check_layout(layout, len(source) if isinstance(source, memoryview) else source.num_bytes)
        own_host = info.request_addr.removeprefix("tcp://").rpartition(":")[0] or "127.0.0.1"
        self._closed = asyncio.Event()
        self._done = asyncio.Event()
        self._started = False
        self._tasks: asyncio.TaskGroup | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bug: Exception | None = None
        self._peers: dict[tuple[str, str], Peer] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._context = ClientContext(
            config=config,
            key=key,
            info=info,
            layout=layout,
            source=source,
            network=network,
            transports=transports,
            lacking=lacking,
            engine=Engine(host_source, own_host, config) if "mooncake" in transports else None,
            wrap_link=wrap_link,
            codec=Codec(key, ReceiverMessage),
            spawn=self._spawn,
            post=self._post,
            crash=self._crash,
        )

    async def run(self) -> None:
        """Own the background tasks; returns after `close`, raises what killed one of them."""
        self._loop, self._started = asyncio.get_running_loop(), True
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for peer in self._peers.values():
                    self._start(tasks, peer)
                await self._closed.wait()
                if self._bug is not None:
                    raise self._bug
                await asyncio.gather(*(handoff.abort("shutting down") for handoff in tuple(self._context.handoffs)))
                for task in self._serving:
                    task.cancel()
        finally:
            self._tasks = None
            if self._ending:
                await asyncio.wait(self._ending)  # quick: every link is closed
            self._release()
            self._done.set()

    async def close(self) -> None:
        """Abort what is pending, close every connection, join every thread. Safe in every state."""
        self._closed.set()
        if self._started:
            await self._done.wait()
        else:
            self._release()

    def offer(
        self,
        submit: Submit,
        num_tokens: int,
        weight_version: str,
        *,
        digests: bytes = b"",
        on_failed: Callable[[Handoff, TransferError], None] | None = None,
    ) -> Handoff:
        """Start the hand-off of `num_tokens` tokens of KV to `submit.decode`. Returns at once; call it before compute.

        `submit.deadline_s` must be the time left now; `digests`: see Offer. `on_failed` is called once on the loop if
        the hand-off fails while nobody awaits `commit` (refused, no grant in time, revoked, peer lost): stop computing,
        then `abort()`.
        Raises Overloaded when config.max_pending hand-offs are under way, TransferError when the client is closed.
        """
        context, self._loop = self._context, asyncio.get_running_loop()
        if self._closed.is_set() or self._done.is_set():
            raise TransferError("hand-off client is closed", request_id=submit.request_id)
        if submit.decode is None or num_tokens < 1:
            raise ValueError(f"{submit.request_id}: a hand-off needs a decode worker and tokens")
        if len(context.handoffs) >= context.config.max_pending:
            raise Overloaded(f"{len(context.handoffs)} hand-offs are under way", request_id=submit.request_id)
        handoff = Handoff(context, submit, num_tokens, weight_version, digests, on_failed)
        context.handoffs.add(handoff)
        context.tally.offered += 1
        self._peer(submit.decode).offer(handoff)
        return handoff

    def bad_peers(self) -> list[str]:
        """Incarnations of decode workers whose canary fails or that can't be reached (Load.bad_peers).

        Not names: a worker that has restarted must be given work before anything can be known of its new life.
        """
        peers = [peer.stats() for peer in self._peers.values()]
        return sorted(peer.incarnation for peer in peers if not peer.healthy)

    def stats(self) -> WriterStats:
        """Exact counters and gauges."""
        tally = self._context.tally
        return WriterStats(
            pending=len(self._context.handoffs),
            offered=tally.offered,
            accepted=tally.accepted,
            failed=dict(tally.failed),
            num_bytes=tally.num_bytes,
            num_blocks=tally.num_blocks,
            write_s=tally.write_s,
            probes=dict(tally.probes),
            dropped_frames=tally.dropped_frames,
            peers=tuple(peer.stats() for peer in self._peers.values()),
        )

    def _peer(self, target: Target) -> Peer:
        key = (target.name, target.incarnation)
        peer = self._peers.get(key)
        if peer is None:
            peer = self._peers[key] = Peer(self._context, target)
            if self._tasks is not None:
                self._start(self._tasks, peer)
        return peer

    def _start(self, tasks: asyncio.TaskGroup, peer: Peer) -> None:
        task = tasks.create_task(self._serve(peer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, peer: Peer) -> None:
        try:
            await peer.run()
        finally:
            del self._peers[peer.target.name, peer.target.incarnation]

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """The last steps of a hand-off; they run even while the client is being cancelled."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._ending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._crash(error)

    def _release(self) -> None:
        if self._context.engine is not None:
            self._context.engine.close()

    def _post(self, callback: Callable[..., None], *args: Any) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                self._loop.call_soon_threadsafe(callback, *args)

    def _crash(self, error: Exception) -> None:
        self._bug = error
        self._closed.set()
