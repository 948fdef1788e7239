"""The receiver's part of the canary: a scratch block per probe, under a lease like any other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic

from kv_transfer.custody import Custody, Held
from kv_transfer.pairs import Pair
from kv_transfer.reserver import BlockReserver, R
from kv_transfer.verifier import AnyVerifier
from llm_engine.api.handoff import Probe, ProbeCommit, ProbeGrant, ProbeResult
from llm_engine.api.messages import Message


class Probes(Generic[R]):
    """One probe a pair at a time. `send` never raises."""

    def __init__(
        self,
        custody: Custody[R],
        reserver: BlockReserver[R],
        verifier: AnyVerifier,
        send: Callable[[Pair, Message], None],
        timeout_s: float,
    ) -> None:
        self._custody = custody
        self._reserver = reserver
        self._verifier = verifier
        self._send = send
        self._timeout_s = timeout_s
        self._running: dict[Pair, int] = {}  # → nonce

    def on_probe(self, pair: Pair, probe: Probe, tasks: asyncio.TaskGroup) -> None:
        """Step 1."""
        if pair in self._running or pair.connection is None:
            self._send(pair, ProbeResult(nonce=probe.nonce, ok=True, detail="busy"))
            return
        self._running[pair] = probe.nonce
        tasks.create_task(self._grant(pair, probe))

    def on_commit(self, pair: Pair, message: ProbeCommit, tasks: asyncio.TaskGroup) -> None:
        """Step 3."""
        held = self._custody.find(pair, message.lease_id)
        if held is None or held.sealed or self._running.get(pair) != message.nonce:
            detail = "the probe's lease is gone"
            self._send(pair, ProbeResult(nonce=message.nonce, ok=False, detail=detail))
            return
        held.sealed = True
        self._custody.shut(held)
        tasks.create_task(self._conclude(held, message))

    async def _grant(self, pair: Pair, probe: Probe) -> None:
        reservation = await self._reserver.reserve_probe()
        if reservation is None or pair.connection is None:
            del self._running[pair]
            if reservation is not None:
                self._reserver.release(reservation)
            self._send(pair, ProbeResult(nonce=probe.nonce, ok=True, detail="no block to spare"))
            return
        held = self._custody.take(
            pair,
            "",
            0,
            reservation,
            left_s=self._timeout_s,
            overdue="probe_timeout",
            on_over=lambda: self._running.pop(pair),
        )
        key, block = held.lease.key, held.lease.blocks[0]
        self._send(pair, ProbeGrant(nonce=probe.nonce, lease_id=key.lease_id, epoch=key.epoch, block=block))

    async def _conclude(self, held: Held[R], message: ProbeCommit) -> None:
        checksum = await self._verifier.block_checksum(held.lease.blocks[0])
        if not held.receiving:
            return  # out of time: the fence went out
        self._custody.end(held)
        ok = checksum == message.checksum
        detail = "" if ok else "the bytes here are not the bytes that were sent"
        self._send(held.pair, ProbeResult(nonce=message.nonce, ok=ok, detail=detail))
