"""The decode worker: KV caches in, tokens 2 … n out.

life of a request   Offer → `Intake.reserve` (own prefix hits pinned, the rest leased) → blocks land → Commit verified →
                    `Intake.admit` → Started to the router → deltas from index 0 → finish, or handed back
The router is known from the Offer's Submit; it need not have sent anything about the request to this worker.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Self

from decode_worker.intake import Intake, Place, is_probe
from kv_transfer.device import DeviceRegion
from kv_transfer.memory import Arena
from kv_transfer.metrics import HandoffReport, links_of
from kv_transfer.receiver import Ground, HandoffServer
from llm_engine.api.config import ClusterConfig, cluster_key
from llm_engine.api.errors import LeaseRevoked, TransferError
from llm_engine.api.messages import Cancel, Deltas, Role, Started, Submit, WorkerInfo
from llm_engine.sched import Reservation, StepResult
from llm_engine.serving.assembly import Assembly, assemble, plan
from llm_engine.serving.ledger import Live
from llm_engine.serving.staging import Inbound
from llm_engine.serving.vitals import PeerReport
from llm_engine.serving.worker import Worker


class DecodeWorker(Worker[Reservation]):
    """One replica of the decode pool."""

    def __init__(self, config: ClusterConfig, name: str, key: bytes, assembly: Assembly, arena: Arena | None) -> None:
        """`arena`: host memory for the caches, or for the slots that `assembly` has; None: peers reach a card only."""
        super().__init__(config, name, Role.DECODE, key, assembly)
        self._arena = arena
        self._slots: Inbound | None = None
        memory = arena if arena is not None and assembly.slots is None else DeviceRegion(assembly.store.arena)
        ground, staging = Ground(assembly.layout, memory, self._intake(None)), self._staging(assembly)
        if staging is not None and self._slots is not None and config.transfer.transport != "auto":
            ground, staging = staging, None
            self._slots.prepare()
        self._server: HandoffServer[Place] = HandoffServer(
            config=config.transfer,
            key=key,
            layout=ground.layout,
            arena=ground.arena,
            reserver=ground.reserver,
            staging=staging,
        )

    @classmethod
    def build(cls, config: ClusterConfig, name: str) -> Self:
        """Load the model and allocate the caches; blocks for as long as that takes. Raises ConfigError."""
        key = cluster_key()
        planned = plan(config, uses_control_port=True)
        arenas = list[Arena]()

        def host_memory(num_bytes: int) -> memoryview:
            asked_for = config.transfer.transport
            # Slots beside caches on a card may never be used.
            eager = planned.on_host or asked_for != "auto"
            arenas.append(Arena.create(num_bytes, shared=asked_for in ("auto", "shm"), populate=eager))
            return arenas[-1].buffer

        assembly = assemble(config, planned, host_memory, Role.DECODE)
        return cls(config, name, key, assembly, arenas[0] if arenas else None)

    # -- requests -----------------------------------------------------------------------------------------------------

    def on_submit(self, submit: Submit) -> None:
        """Decode workers get their work from prefill workers."""
        self._refuse(submit, "invalid", "a decode worker does not prefill", retryable=False)

    def on_cancel(self, cancel: Cancel) -> None:
        """Also stops hand-offs that are not live yet, and refuses such as have not been offered yet."""
        super().on_cancel(cancel)
        self._server.cancel(cancel.request_id, cancel.attempt)

    def _end(self, live: Live[Reservation], reason: str) -> None:
        self._server.cancel(live.request_id, live.attempt)
        self._steps.post(
            lambda engine: engine.abort(live.request_id, live.attempt), lambda _: self._server.blocks_freed()
        )

    def _num_drawn(self, result: StepResult) -> int:
        return result.stats.decode_tokens  # deltas restate the first token, which prefill drew

    def _after_step(self, result: StepResult) -> None:
        if result.finished or result.failed:
            self._server.blocks_freed()

    def _staging(self, assembly: Assembly) -> Ground[Place] | None:
        """The slots, for peers that don't reach a card."""
        if assembly.slots is None or assembly.mirror is None or self._arena is None:
            return None
        self._slots = Inbound(assembly.mirror, assembly.slots.num_blocks)
        return Ground(assembly.slots, self._arena, self._intake(self._slots))

    def _intake(self, slots: Inbound | None) -> Intake:
        return Intake(
            self._steps,
            self,
            block_tokens=self._assembly.layout.block_tokens,
            on_blocks_freed=lambda: self._server.blocks_freed(),
            staged=slots,
        )

    # -- intake -------------------------------------------------------------------------------------------------------

    def may_reserve(self, submit: Submit) -> None:
        """`intake.Owner`."""
        if self._ledger.is_stale(submit.request_id, submit.attempt):
            raise LeaseRevoked("this attempt is over", request_id=submit.request_id)
        if not self._plane.knows(submit.router_id):
            raise TransferError(f"router {submit.router_id} is not connected here", request_id=submit.request_id)

    def reserved(self, submit: Submit, reservation: Reservation) -> bool:
        """`intake.Owner`."""
        return self._plane.knows(submit.router_id) and self._take_over(submit, reservation) is not None

    def dropped(self, reservation: Reservation) -> None:
        """`intake.Owner`: the prefill worker tells the router."""
        if not is_probe(reservation):
            self._ledger.close(reservation.request_id, reservation.attempt)

    def may_admit(self, submit: Submit) -> bool:
        """`intake.Owner`."""
        return self._ledger.get(submit.request_id, submit.attempt) is not None

    def admitted(self, submit: Submit, report: HandoffReport) -> None:
        """`intake.Owner`."""
        self._metrics.handoff(total_s=report.handoff_s, exposed_s=report.exposed_s, num_bytes=report.num_bytes)
        if self._ledger.get(submit.request_id, submit.attempt) is None:
            return  # ended between Commit and admission: the abort is behind the admission in the inbox
        started = Started(
            request_id=submit.request_id,
            attempt=submit.attempt,
            handoff_s=report.handoff_s,
            exposed_s=report.exposed_s,
            num_bytes=report.num_bytes,
        )
        self._plane.send(submit.router_id, Deltas(started=[started]))

    # -- peers --------------------------------------------------------------------------------------------------------

    def _bind_peers(self) -> str:
        return self._server.bind(self.config.worker.host, self.config.worker.control_port)

    def _peer_services(self, info: WorkerInfo) -> list[Coroutine[Any, Any, None]]:
        return [self._server.run(info)]

    async def _close_peers(self) -> None:
        await self._server.close()
        if self._arena is not None:
            self._arena.close()

    def _drain_peers(self) -> None:
        self._server.drain()

    def _peers(self) -> PeerReport:
        stats = self._server.stats()
        return PeerReport(pending=stats.pending, failed=stats.failed, links=links_of(stats.peers))
