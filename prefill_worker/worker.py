"""The prefill worker: prompt in, first token to the router, KV cache to the decode worker.

life of a request   on_submit → engine.add (step thread) ─ queue ─▶ Offer a little ahead of compute ─▶ layers are pushed
                    as they finish ─▶ token 1 goes straight to the router ─▶ Commit ─▶ Accepted: pins dropped
Whatever ends it earlier goes through `_end`: abort in the engine, stop the hand-off, and only then unpin the blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any, Self

import msgspec

from kv_transfer.device import DeviceRegion
from kv_transfer.memory import Arena
from kv_transfer.metrics import links_of
from kv_transfer.transports import Memory
from kv_transfer.writer import Handoff, HandoffClient
from llm_engine.api.config import ClusterConfig, cluster_key
from llm_engine.api.errors import LayoutMismatch, Overloaded, TransferError, TransferTimeout
from llm_engine.api.messages import Role, Submit, WorkerInfo
from llm_engine.api.request import TOKEN_BYTES
from llm_engine.runtime.engine import Engine
from llm_engine.sched import Prefilled, Refusal, Sequence, StepResult
from llm_engine.serving.assembly import Assembly, assemble, plan
from llm_engine.serving.ledger import Live
from llm_engine.serving.vitals import PeerReport
from llm_engine.serving.worker import Worker
from prefill_worker.handoff import OfferQueue, Outbound, Outbox

_log = logging.getLogger(__name__)

_LOOKAHEAD_STEPS = 2


class PrefillWorker(Worker[Outbound]):
    """One replica of the prefill pool."""

    def __init__(
        self, config: ClusterConfig, name: str, key: bytes, assembly: Assembly, arena: Memory, outbox: Outbox
    ) -> None:
        """`arena`: the memory of the caches."""
        super().__init__(config, name, Role.PREFILL, key, assembly)
        self._key = key
        self._arena = arena
        self._outbox = outbox
        self._offers = OfferQueue(_LOOKAHEAD_STEPS * config.scheduler.max_step_tokens)
        self._client: HandoffClient | None = None

    @classmethod
    def build(cls, config: ClusterConfig, name: str) -> Self:
        """Load the model and allocate the caches; blocks for as long as that takes. Raises ConfigError."""
        key = cluster_key()
        planned = plan(config, uses_control_port=False)
        outbox, arenas = Outbox(), list[Arena]()

        def host_memory(num_bytes: int) -> memoryview:
            arenas.append(Arena.create(num_bytes, shared=False))
            return arenas[-1].buffer

        assembly = assemble(config, planned, host_memory, Role.PREFILL, outbox)
        arena = arenas[0] if arenas else DeviceRegion(assembly.store.arena)
        return cls(config, name, key, assembly, arena, outbox)

    # -- requests -----------------------------------------------------------------------------------------------------

    def on_submit(self, submit: Submit) -> None:
        """Queue a prompt whose KV goes to `submit.decode`."""
        if submit.decode is None:
            self._refuse(submit, "invalid", "a prefill worker needs a decode worker for the request", retryable=False)
            return
        if self._draining:
            self._refuse(submit, "draining", "this worker takes no new work", retryable=True)
            return
        opened: asyncio.Future[Handoff] = asyncio.get_running_loop().create_future()
        outbound = Outbound(submit, len(submit.tokens) // TOKEN_BYTES, opened)
        live = self._take_over(submit, outbound)
        if live is None:
            return
        self._outbox.open(outbound)

        def add(engine: Engine) -> Sequence | Refusal:
            outcome = engine.add(submit)
            if isinstance(outcome, Sequence):
                outbound.seq = outcome
                outbound.digests = b"".join(engine.digests(outcome))
            return outcome

        if not self._steps.offer(add, lambda outcome: self._added(live, outcome)):
            self._fail(live, "full", "the worker's inbox is full")

    def _added(self, live: Live[Outbound], outcome: Sequence | Refusal) -> None:
        if isinstance(outcome, Refusal):
            self._metrics.refused(outcome.code)
            self._fail(live, outcome.code, outcome.reason, retryable=outcome.retryable)
        elif self._ledger.get(live.request_id, live.attempt) is live:
            self._metrics.accepted(live.data.num_tokens)
            self._offers.add(live.data)
            self._pump_offers()

    def _on_finished(self, live: Live[Outbound]) -> None:
        self._dismiss(live.data, "finished at the first token")

    def _on_result(self, result: StepResult) -> None:
        for prefilled in result.prefilled:
            self._outbox.prefilled(prefilled)

    def _on_prefilled(self, prefilled: Prefilled) -> None:
        live = self._ledger.get(prefilled.seq.request_id, prefilled.seq.attempt)
        if live is None:  # ended meanwhile: `_end` releases the blocks
            return
        self._errands.run(self._commit(live, prefilled))

    def _end(self, live: Live[Outbound], reason: str) -> None:
        self._steps.post(lambda engine: engine.abort(live.request_id, live.attempt))
        self._dismiss(live.data, reason)

    def _dismiss(self, outbound: Outbound, reason: str) -> None:
        """Let go of everything but the engine's sequence."""
        self._outbox.close(outbound)
        self._offers.remove(outbound)
        self._errands.run(self._release(outbound, reason))

    async def _release(self, outbound: Outbound, reason: str) -> None:
        """Stop the hand-off, then unpin: until it has stopped a sender thread may still read the blocks."""
        if not outbound.opened.cancel():
            await outbound.opened.result().abort(reason)
        self._steps.post(lambda engine: None if outbound.seq is None else engine.release_sent(outbound.seq))
        self._pump_offers()

    # -- hand-offs ----------------------------------------------------------------------------------------------------

    def _pump_offers(self) -> None:
        """Offer what is due. On the asyncio thread after every arrival, start and end."""
        while (outbound := self._offers.due()) is not None:
            live = self._ledger.get(outbound.submit.request_id, outbound.submit.attempt)
            if live is None or self._client is None:
                continue
            if not self._offer(live):
                break

    def _offer(self, live: Live[Outbound]) -> bool:
        """Open the hand-off of one request; False when the client has no room for it now."""
        assert self._client is not None
        outbound = live.data
        submit = msgspec.structs.replace(outbound.submit, deadline_s=max(0.0, live.deadline - time.monotonic()))
        try:
            handoff = self._client.offer(
                submit,
                outbound.num_tokens,
                self._assembly.weight_version,
                digests=outbound.digests,
                on_failed=lambda _, exc: self._lost(live, exc),
            )
        except Overloaded:
            self._offers.defer(outbound)
            return False
        except TransferError as exc:
            self._lost(live, exc)
            return True
        outbound.attach(handoff)
        outbound.opened.set_result(handoff)
        return True

    def _lost(self, live: Live[Outbound], exc: TransferError) -> None:
        """A hand-off failed: the request, if it still is live, is over here."""
        if self._ledger.get(live.request_id, live.attempt) is not live:
            return
        _log.info("hand-off of %s/%d failed: %s", live.request_id, live.attempt, exc)
        if isinstance(exc, LayoutMismatch):
            _log.error("%s can't serve with its peer: %s", self.name, exc)
        self._fail(live, "handoff", str(exc))

    async def _commit(self, live: Live[Outbound], prefilled: Prefilled) -> None:
        try:
            async with asyncio.timeout(self.config.transfer.grant_timeout_s):
                handoff = await asyncio.shield(live.data.opened)
            await handoff.commit(prefilled.first, compute_end=prefilled.compute_end)
        except TimeoutError:
            self._lost(live, TransferTimeout("too many hand-offs are under way"))
            return
        except TransferError as exc:
            self._lost(live, exc)
            return
        if self._ledger.close(live.request_id, live.attempt) is live:
            self._dismiss(live.data, "handed over")

    def _started(self, outbound: Outbound) -> None:
        self._offers.start(outbound)
        self._pump_offers()

    # -- peers --------------------------------------------------------------------------------------------------------

    def _peer_services(self, info: WorkerInfo) -> list[Coroutine[Any, Any, None]]:
        loop = asyncio.get_running_loop()
        self._outbox.on_started = lambda outbound: _post(loop, self._started, outbound)
        self._client = HandoffClient(
            config=self.config.transfer,
            key=self._key,
            info=info,
            layout=self._assembly.layout,
            source=self._arena.buffer if isinstance(self._arena, Arena) else self._arena,
        )
        return [self._client.run()]

    async def _close_peers(self) -> None:
        if self._client is not None:
            await self._client.close()
        if isinstance(self._arena, Arena):
            self._arena.close()

    def _peers(self) -> PeerReport:
        if self._client is None:
            return PeerReport()
        stats = self._client.stats()
        return PeerReport(
            pending=stats.pending, bad=self._client.bad_peers(), failed=stats.failed, links=links_of(stats.peers)
        )


def _post(loop: asyncio.AbstractEventLoop, callback: Any, *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is leaving
        loop.call_soon_threadsafe(callback, *args)
