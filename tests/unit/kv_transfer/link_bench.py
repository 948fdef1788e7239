"""One end of a data link on its own: an arena with an inlet, its owner who writes everything down, and links to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kv_transfer.link import Copy, Inlet, LeaseKey, Link
from kv_transfer.memory import Arena
from kv_transfer.mooncake import Engine
from kv_transfer.transports import ReceiverEnd, WriterEnd, connect, open_inlet
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import Connected, KvLayout
from tests.unit.kv_transfer.rig import KEY, cells, make_info, make_layout

LAYOUT = make_layout(16)
TICKET = "good"


@dataclass
class Recorder:
    """The owner of an inlet: accepts one ticket, writes everything down."""

    connections: list[int] = field(default_factory=list)
    ended: list[tuple[int, bool]] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def connected(self, connection: int, transport: str, ticket: str) -> str | None:
        if ticket != TICKET:
            return "unknown pairing"
        self._note(self.connections, connection)
        return None

    def closed(self, connection: int, proven: bool) -> None:
        self._note(self.ended, (connection, proven))

    def refused(self, cause: str) -> None:
        self._note(self.causes, cause)

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 10), f"{self}"

    def _note(self, where: list, what: object) -> None:  # type: ignore[type-arg]
        with self.changed:
            where.append(what)
            self.changed.notify_all()


class Bench:
    """An arena with an inlet of either kind, and links to it."""

    def __init__(self, transport: str) -> None:
        self.transport = transport
        self.layout: KvLayout = LAYOUT
        self.arena = Arena.create(LAYOUT.arena_bytes, shared=True)
        self.events = Recorder()
        self.lost: list[TransferError] = []
        self.links: list[Link] = []
        self.config = TransferConfig(transport=transport)
        end = ReceiverEnd(
            config=self.config,
            key=KEY,
            arena=self.arena,
            layout=LAYOUT,
            events=self.events,
            network=None,
            host="127.0.0.1",
        )
        self.inlet: Inlet = open_inlet(transport, end)
        self.data = memoryview(np.random.default_rng(0).integers(1, 256, 1 << 14, np.uint8).tobytes())
        self.engine = Engine(self.data, "127.0.0.1", self.config) if transport == "mooncake" else None

    def connect(self, *, key: bytes = KEY, ticket: str = TICKET, region: str | None = None) -> Link:
        connected = Connected(
            info=make_info("d", "d1", LAYOUT, "x"),
            layout=LAYOUT,
            link=self.inlet.offer(),
            reason="",
            region=region or self.arena.region,
            ticket=ticket,
        )
        end = WriterEnd(config=self.config, key=key, network=None, engine=self.engine, device=None)
        link = connect(connected, end, self.lost.append)
        self.links.append(link)
        return link

    def cell(self, block: int, row: int = 0) -> slice:
        return list(cells(self.layout, block))[row]

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.inlet.close()
        if self.engine is not None:
            self.engine.close()
        self.data.release()
        self.arena.close()


def never() -> bool:
    return False


def write(bench: Bench, link: Link, lease: LeaseKey, target: slice | int, length: int | None = None) -> None:
    start = target if isinstance(target, int) else target.start
    size = length if length is not None else (target.stop - target.start if isinstance(target, slice) else 0)
    link.write(lease, bench.data, [Copy(0, start, size)], never)
