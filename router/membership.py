"""Which workers there are: addresses from `router.workers`, or from the controller's feed.

An address that leaves the feed takes no new work and is dropped once its attempts are over. A feed that falls silent
changes nothing: routers go on with the last list and their own heartbeats.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from llm_engine.api.errors import ProtocolError
from llm_engine.api.messages import PROTOCOL_VERSION, Codec, Hello, Members, Role, Welcome, WorkerInfo, WorkerMessage
from router.policy import kind
from router.worker import Connector, LinkState, Worker, WorkListener

logger = logging.getLogger(__name__)

_PARTNER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}


class Membership:
    """The set of workers, and the pools that take new work. Everything runs on the event loop."""

    def __init__(
        self,
        connector: Connector,
        listener: WorkListener,
        codec: Codec[WorkerMessage],
        *,
        router_id: str,
        model: str,
        heartbeat_s: float,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.connector = connector
        self.listener = listener
        self.hello_frame = codec.encode(Hello(version=PROTOCOL_VERSION, router_id=router_id))
        self.feed_version: int | None = None
        self.feed_seen: float | None = None
        self._clock = clock
        self._model = model
        self._heartbeat_s = heartbeat_s
        self._timeout_s = timeout_s
        self._workers: dict[str, Worker] = {}
        self._pools: dict[Role, list[Worker]] = {role: [] for role in Role}
        self._last_tick = clock()
        self._next_heartbeat = 0.0

    @property
    def workers(self) -> Collection[Worker]:
        """All of them, in the order in which they were added."""
        return self._workers.values()

    @property
    def num_routers(self) -> int:
        """Routers that serve these workers, this one included, as the worker that knows most of them says."""
        return max((worker.load.num_routers for worker in self._workers.values() if worker.usable), default=1) or 1

    def clock(self) -> float:
        return self._clock()

    def pool(self, role: Role) -> list[Worker]:
        """Workers of a role that take new work. Not to be changed by the caller."""
        return self._pools[role]

    def find(self, name: str) -> Worker | None:
        """A worker by its name; the living one if a restarted worker left an old address behind."""
        found = [worker for worker in self._workers.values() if worker.name == name]
        return max(found, key=lambda worker: worker.state is LinkState.ALIVE, default=None)

    def add(self, address: str) -> None:
        """Watch an address. Raises ProtocolError when it is not one."""
        if address not in self._workers:
            self._workers[address] = Worker(address, self)

    def update(self, members: Members) -> None:
        """Take over the controller's list."""
        self.feed_version = members.version
        self.feed_seen = self._clock()
        wanted = {info.request_addr for info in members.workers}
        incarnations = {info.name: info.incarnation for info in members.workers}
        for address in wanted:
            try:
                self.add(address)
            except ProtocolError as exc:
                logger.error("membership feed: %s", exc)
        for worker in self._workers.values():
            worker.retire(worker.address not in wanted)
            mine = worker.info.incarnation if worker.info is not None else None
            if mine is not None and incarnations.get(worker.name, mine) != mine:
                worker.lose("replaced")

    def tick(self) -> None:
        """Send heartbeats, notice silence, drop retired addresses. Call several times per heartbeat timeout."""
        now = self._clock()
        late = now - self._last_tick
        self._last_tick = now
        if late > self._timeout_s / 2:
            logger.warning("the router stood still for %.1f s", late)
            for worker in self._workers.values():
                worker.last_seen += late  # what the workers sent meanwhile is still unread
        beat = now >= self._next_heartbeat
        if beat:
            self._next_heartbeat = now + self._heartbeat_s
        for worker in list(self._workers.values()):
            if beat:
                worker.tick()
            if now - worker.last_seen > self._timeout_s:
                worker.lose("silent")
            if worker.retired and not worker.attempts:
                worker.close()
                del self._workers[worker.address]

    def close(self, linger_ms: int = 0) -> None:
        """Forget everybody; nothing is reported as lost. Messages just sent get `linger_ms` to leave."""
        for worker in self._workers.values():
            worker.close(linger_ms)
        self._workers.clear()
        self._pools = {role: [] for role in Role}

    # WorkerContext

    def refusal(self, welcome: Welcome) -> str:
        if welcome.version != PROTOCOL_VERSION:
            return f"it speaks protocol version {welcome.version}, this router {PROTOCOL_VERSION}"
        if welcome.info.model != self._model:
            return f"it serves model {welcome.info.model!r}, this router {self._model!r}"
        return ""

    def usability_changed(self, worker: Worker) -> None:
        for role in Role:
            self._pools[role] = [w for w in self._workers.values() if w.usable and w.info and w.info.role is role]
        if worker.usable and worker.info is not None:
            partner = _PARTNER.get(worker.info.role)
            for other in self._pools[partner] if partner is not None else ():
                if other.info is not None and kind(other.info) != kind(worker.info):
                    logger.error("workers can't be paired: %s", _difference(worker.info, other.info))
        self.listener.pools_changed()


def _difference(a: WorkerInfo, b: WorkerInfo) -> str:
    fields = ("model", "format_id", "weight_version", "block_tokens")
    key = next(field for field in fields if getattr(a, field) != getattr(b, field))
    return f"{a.name} has {key}={getattr(a, key)!r}, {b.name} has {getattr(b, key)!r}"
