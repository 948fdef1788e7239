"""local: both ends in one process. For tests and for engines that share an address space."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from kv_transfer.gate import SeenInlet
from kv_transfer.link import Copy, LeaseKey, Sent, all_landed, no_news
from kv_transfer.listener import Events, next_connection
from kv_transfer.memory import Arena
from llm_engine.api.errors import LeaseRevoked, TransferError
from llm_engine.api.handoff import KvLayout, LinkOffer


class LocalNetwork:
    """Where local inlets can be found. Hand the same one to both ends."""

    def __init__(self) -> None:
        self._inlets: dict[str, LocalInlet] = {}

    def host_id(self) -> str:
        """Equal for ends that share this object."""
        return f"{os.getpid()}/{id(self):x}"

    def add(self, inlet: LocalInlet) -> None:
        """Make an inlet reachable."""
        self._inlets[inlet.region] = inlet

    def remove(self, inlet: LocalInlet) -> None:
        """The inlet is closed."""
        self._inlets.pop(inlet.region, None)

    def find(self, region: str) -> LocalInlet:
        """Raises TransferError when there is no such region (any more)."""
        try:
            return self._inlets[region]
        except KeyError:
            raise TransferError(f"local region {region} is gone") from None


class LocalLink:
    """Writer's end."""

    transport = "local"

    def __init__(self, inlet: LocalInlet, connection: int, on_lost: Callable[[TransferError], None]) -> None:
        self._inlet = inlet
        self._connection = connection
        self.lost = on_lost

    @classmethod
    def connect(
        cls, network: LocalNetwork, *, ticket: str, region: str, on_lost: Callable[[TransferError], None]
    ) -> LocalLink:
        """Find the inlet and make the connection known to it. Raises TransferError."""
        inlet = network.find(region)
        link = cls(inlet, next_connection(), on_lost)
        inlet.attach(link, link._connection, ticket)
        return link

    def write(
        self,
        lease: LeaseKey,
        source: memoryview,
        copies: Sequence[Copy],
        stopped: Callable[[], bool],
        sent: Sent = no_news,
    ) -> None:
        """See Link.write."""
        for index, copy in enumerate(copies):
            if stopped():
                raise LeaseRevoked(f"lease {lease.lease_id}: stopped")
            self._inlet.store(lease, self._connection, source[copy.source : copy.source + copy.num_bytes], copy.target)
            sent(index, 0, copy.num_bytes)

    def confirm(self, lease: LeaseKey) -> Future[int | None]:
        """Copies are done when `write` returns."""
        return all_landed()

    def close(self) -> None:
        """Detach from the inlet."""
        self._inlet.detach(self._connection)


class LocalInlet(SeenInlet):
    """Receiver's end."""

    transport = "local"

    def __init__(self, arena: Arena, layout: KvLayout, events: Events, network: LocalNetwork) -> None:
        super().__init__(layout)
        self.region = arena.region
        self._memory: memoryview | None = arena.buffer
        self._events = events
        self._network = network
        self._lock = threading.Lock()
        self._links: dict[int, LocalLink] = {}
        network.add(self)

    def offer(self) -> LinkOffer:
        """Reachable through the shared LocalNetwork only."""
        return LinkOffer(transport="local", address=self.region, host_id=self._network.host_id())

    def close(self) -> None:
        """Forget every link; their next write fails."""
        self._network.remove(self)
        with self._lock:
            links, self._links = self._links, {}
            self._memory = None
        for link in links.values():
            link.lost(TransferError("local link closed by the receiver"))

    def attach(self, link: LocalLink, connection: int, ticket: str) -> None:
        """A writer connects. Raises TransferError when the owner refuses it."""
        if refusal := self._events.connected(connection, "local", ticket):
            raise TransferError(f"local connection refused: {refusal}")
        with self._lock:
            self._links[connection] = link

    def detach(self, connection: int) -> None:
        """A writer is gone."""
        with self._lock:
            known = self._links.pop(connection, None)
        if known is not None:
            self._events.closed(connection, True)

    def store(self, lease: LeaseKey, connection: int, data: memoryview, target: int) -> None:
        """Copy one piece if the lease is open for this connection; silently drop it otherwise, as a network would."""
        door = self._doors.find(lease, connection)
        if door is None:
            self._late += len(data)
            return
        memory = self._memory
        if memory is None:
            raise TransferError("local link closed by the receiver")
        stretches = self._doors.check(door, [(target, len(data))], memory)
        with door.lock:
            if self._memory is None:
                raise TransferError("local link closed by the receiver")
            if not door.is_open:
                self._late += len(data)
                return
            np.copyto(np.frombuffer(memory[target : target + len(data)], np.uint8), np.frombuffer(data, np.uint8))
        for each in stretches:
            door.record(each)
