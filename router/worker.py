"""One worker as the router sees it: its link, whether it lives, what it holds.

                       Welcome                silent for heartbeat_timeout_s, connection broken
      CONNECTING ───────────────▶ ALIVE ──────────────────────────────────────────────────────▶ LOST
          │                        ▲  └── Welcome with another incarnation: the old one is lost    │
          └──▶ REFUSED             └──────────────── any message from the same incarnation ◀───────┘
               (other version or model)

A loss is a statement about this router's connection only: attempts on a lost worker are recovered elsewhere, and if the
same incarnation comes back it is told to cancel them.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping
from typing import Protocol

from llm_engine.api.messages import (
    Cancel,
    Deltas,
    Drain,
    Failed,
    KvSnapshot,
    Load,
    Message,
    Peer,
    SnapshotRequest,
    Welcome,
    WorkerInfo,
    WorkerMessage,
)
from router.ledger import Ledger
from router.plane import Link, LinkHandler
from router.prefix_map import PrefixMap

logger = logging.getLogger(__name__)

SNAPSHOT_RETRY_S = 1.0
WorkMessage = Deltas | Failed
_WORK_MESSAGES = (Deltas, Failed)


class LinkState(enum.StrEnum):
    """What is known about the process behind an address."""

    CONNECTING = "connecting"
    ALIVE = "alive"
    LOST = "lost"
    REFUSED = "refused"


class WorkListener(Protocol):
    """What the dispatcher hears about workers."""

    def pools_changed(self) -> None:
        """Workers started or ceased to take new work."""

    def load_changed(self) -> None:
        """A worker reported its load: waiting requests may have a place now."""

    def worker_lost(self, worker: Worker, attempts: Mapping[str, int], cause: str) -> None:
        """These attempts (request id → attempt) are void; cancel them on the worker, which may come back."""

    def worker_said(self, worker: Worker, message: WorkMessage) -> None:
        """News about attempts."""


class Connector(Protocol):
    """How links are opened: the plane."""

    def connect(self, address: str, handler: LinkHandler) -> Link: ...


class WorkerContext(Protocol):
    """What a worker needs from the membership it belongs to."""

    listener: WorkListener
    connector: Connector
    hello_frame: bytes

    def clock(self) -> float: ...

    def refusal(self, welcome: Welcome) -> str:
        """Why a worker can't be used at all; "" if it can."""

    def usability_changed(self, worker: Worker) -> None:
        """`worker.usable` has changed."""


class Worker:
    """One address and what is known about the process behind it."""

    known: WorkerInfo  # `info`, from the first Welcome on
    peer: Peer  # the same as prefill workers are told

    def __init__(self, address: str, context: WorkerContext) -> None:
        self.address = address
        self.info: WorkerInfo | None = None
        self.state = LinkState.CONNECTING
        self.usable = False  # new work may be sent
        self.retired = False  # left the membership feed
        self.told_to_drain = False
        self.load = Load(seq=0)
        self.last_seen = 0.0
        self.prefix = PrefixMap(0)
        self.ledger = Ledger()
        self.attempts: dict[str, int] = {}  # request id → attempt that runs here
        self._context = context
        self._void: dict[str, int] = {}  # attempts still to be cancelled, when the worker can hear it
        self._snapshot_asked = float("-inf")
        self._link = context.connector.connect(address, self)

    @property
    def name(self) -> str:
        return self.info.name if self.info is not None else self.address

    def send(self, message: Message) -> bool:
        """False: not connected, or its queue is full."""
        return self._link.send(message)

    def cancel(self, request_id: str, attempt: int) -> None:
        """Stop an attempt and older ones. A worker that may not hear it now is told (again) when it comes back."""
        self.attempts.pop(request_id, None)
        sent = self._link.send(Cancel(request_id=request_id, attempt=attempt))
        if not sent or self.state is not LinkState.ALIVE:
            self._void[request_id] = attempt

    def drain(self, hand_back: bool) -> bool:
        """Ask the worker to take no new work; nothing is sent to it from now on. False: it can't be reached."""
        sent = self._link.send(Drain(hand_back=hand_back))
        self.told_to_drain = self.told_to_drain or sent
        self._update_usable()
        return sent

    def retire(self, retired: bool) -> None:
        """Take no new work because the address left the feed; or go on because it is back."""
        self.retired = retired
        self._update_usable()

    def tick(self) -> None:
        """The router's heartbeat, and what could not be sent earlier."""
        self._link.send_frame(self._context.hello_frame)
        if self.state is LinkState.ALIVE:
            self._send_void()
            if not self.prefix.in_step:
                self._ask_snapshot()

    def lose(self, cause: str) -> None:
        """Give up on what runs here. The address is still watched: its worker may come back, or a new one may."""
        if self.state is not LinkState.ALIVE:
            return
        self.state = LinkState.LOST
        logger.warning("lost worker %s (%s): %s, %d attempts", self.name, self.address, cause, len(self.attempts))
        self._update_usable()
        self._void_attempts(cause)

    def close(self, linger_ms: int = 0) -> None:
        """Drop the connection; nothing is reported."""
        self._link.close(linger_ms)

    # LinkHandler

    def connected(self) -> None:
        self._link.send_frame(self._context.hello_frame)

    def disconnected(self) -> None:
        self.lose("disconnected")

    def received(self, message: WorkerMessage) -> None:
        self.last_seen = self._context.clock()
        if self.state is not LinkState.ALIVE and not self._may_speak(message):
            return
        if isinstance(message, _WORK_MESSAGES):
            self._context.listener.worker_said(self, message)
        elif isinstance(message, Welcome):
            self._welcome(message)
        elif isinstance(message, Load):
            self._report(message)
        elif isinstance(message, KvSnapshot):
            self.prefix.restore(message)
        else:
            self.prefix.apply(message)

    def _may_speak(self, message: WorkerMessage) -> bool:
        """What a worker that is not alive says: first a Welcome; from a lost one, anything brings it back."""
        if isinstance(message, Welcome):
            return True
        if self.info is None or self.state is LinkState.REFUSED:
            return False
        if self.state is LinkState.LOST:
            self._come_back()
        return True

    def _welcome(self, welcome: Welcome) -> None:
        info = welcome.info
        if self.info is not None and self.info.incarnation == info.incarnation:
            if self.state is LinkState.LOST:
                self._come_back()
            return
        self.lose("restarted")
        self._become(info)
        refusal = self._context.refusal(welcome)
        if refusal:
            self.state = LinkState.REFUSED
            logger.error("refused worker %s (%s): %s", self.name, self.address, refusal)
            return
        logger.info("worker %s (%s) joined as %s, incarnation %s", self.name, self.address, info.role, info.incarnation)
        self.state = LinkState.ALIVE
        self._update_usable()

    def _become(self, info: WorkerInfo) -> None:
        """Forget everything about the previous incarnation."""
        self.info = self.known = info
        self.peer = Peer(name=info.name, incarnation=info.incarnation, control_addr=info.control_addr)
        self.load = Load(seq=0)
        self.ledger = Ledger()
        self.prefix = PrefixMap(info.num_blocks)
        self.told_to_drain = False
        self._void.clear()
        self._snapshot_asked = float("-inf")

    def _come_back(self) -> None:
        """The same incarnation speaks again: its old attempts were recovered elsewhere."""
        logger.warning("worker %s (%s) is back, %d attempts to cancel", self.name, self.address, len(self._void))
        self.state = LinkState.ALIVE
        self._send_void()
        self._update_usable()

    def _report(self, load: Load) -> None:
        stalled = self.load.healthy and not load.healthy
        self.load = load
        self.ledger.reported()
        self._update_usable()
        if stalled:
            logger.warning("worker %s (%s) reports a stalled step loop", self.name, self.address)
            self._void_attempts("unhealthy")
        self._context.listener.load_changed()

    def _void_attempts(self, cause: str) -> None:
        attempts, self.attempts = self.attempts, {}
        self._context.listener.worker_lost(self, attempts, cause)

    def _send_void(self) -> None:
        for request_id, attempt in list(self._void.items()):
            if not self._link.send(Cancel(request_id=request_id, attempt=attempt)):
                return
            del self._void[request_id]

    def _ask_snapshot(self) -> None:
        """Ask for the whole prefix index, at most once per SNAPSHOT_RETRY_S."""
        now = self._context.clock()
        if now - self._snapshot_asked >= SNAPSHOT_RETRY_S and self._link.send(SnapshotRequest()):
            self._snapshot_asked = now

    def _update_usable(self) -> None:
        load = self.load
        usable = (
            self.state is LinkState.ALIVE and load.healthy and not (load.draining or self.told_to_drain or self.retired)
        )
        if usable is not self.usable:
            self.usable = usable
            self._context.usability_changed(self)
