"""Two small locks with a memory: the writer's gate (may a write start, is one in flight) and the receiver's doors
(which leases may bytes land under), with the inlets that are built on doors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kv_transfer.layout import CellMap
from kv_transfer.link import Cells, Landed, LeaseKey
from llm_engine.api.errors import ProtocolError
from llm_engine.api.handoff import KvLayout


class WriteGate:
    """One per hand-off on the writing side, between the loop that stops it and the sender thread that writes.

    After `stop` no write starts; `on_stopped` runs when none is in flight either: at once, or from the sender thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self._writing = False
        self._on_stopped: list[Callable[[], None]] = []

    def stopped(self) -> bool:
        """Polled by links between pieces."""
        return self._stopped

    def enter(self) -> bool:
        """Sender thread: a write is about to start. False: it must not."""
        with self._lock:
            self._writing = not self._stopped
            return self._writing

    def leave(self) -> None:
        """Sender thread: the write is over, however it ended."""
        with self._lock:
            self._writing = False
            waiting, self._on_stopped = self._on_stopped, []
        for callback in waiting:
            callback()

    def stop(self, on_stopped: Callable[[], None]) -> None:
        """Close the gate for good. May be called again: each callback runs once."""
        with self._lock:
            self._stopped = True
            if self._writing:
                self._on_stopped.append(on_stopped)
                return
        on_stopped()


class Door:
    """Receiving side: one lease that bytes may land under, for transports whose bytes pass through this process.

    Bytes are stored under `lock`, and only while `is_open`; so once `shut` returns, not a byte lands any more.
    """

    def __init__(self, connection: int, blocks: Sequence[int], num_rows: int) -> None:
        self.connection = connection
        self.lock = threading.Lock()
        self.is_open = True
        self.on_landed: Callable[[Sequence[Cells]], None] = lambda _: None
        self._width = len(blocks)
        self._position = {block: index for index, block in enumerate(blocks)}
        self._landed = bytearray(num_rows * len(blocks))
        self._num_bytes = 0

    def admits(self, cells: Cells) -> bool:
        """Whether the lease holds every one of the blocks."""
        return all(block in self._position for block in range(cells.block, cells.block + cells.num_blocks))

    def record(self, cells: Sequence[Cells], ranges: Sequence[tuple[int, int]]) -> None:
        """These cells, which are these (offset, length) ranges, have landed completely."""
        for (row, first, count), (_, length) in zip(cells, ranges, strict=True):
            base = row * self._width
            for block in range(first, first + count):
                index = base + self._position[block]
                if not self._landed[index]:
                    self._landed[index] = 1
                    self._num_bytes += length // count
        self.on_landed(cells)

    def landed(self) -> Landed:
        """What has landed so far; a cell written twice counts once."""
        return Landed(self._landed.count(1), self._num_bytes)

    def shut(self) -> None:
        """Refuse further bytes; waits for the slice that is just being stored."""
        self.is_open = False
        with self.lock:
            pass


class Doors:
    """All open leases of one inlet."""

    def __init__(self, cells: CellMap) -> None:
        self._cells = cells
        self._doors: dict[LeaseKey, Door] = {}

    def open(self, lease: LeaseKey, connection: int, blocks: Sequence[int]) -> None:
        """From now on `connection` may fill `blocks`."""
        self._doors[lease] = Door(connection, blocks, self._cells.num_rows)

    def watch(self, lease: LeaseKey, on_landed: Callable[[Sequence[Cells]], None]) -> None:
        """Report what lands under this lease, if it is open."""
        if (door := self._doors.get(lease)) is not None:
            door.on_landed = on_landed

    def find(self, lease: LeaseKey, connection: int) -> Door | None:
        """The door, if it is this connection's. None: the lease is over or never was; its bytes must not be stored."""
        door = self._doors.get(lease)
        return door if door is not None and door.connection == connection else None

    def check(self, door: Door, ranges: Sequence[tuple[int, int]]) -> list[Cells]:
        """Cells of (offset, length) ranges. Raises ProtocolError for a range outside the lease's blocks."""
        cells = [self._cells.locate(offset, length) for offset, length in ranges]
        for item in cells:
            if not door.admits(item):
                last = item.block + item.num_blocks - 1
                raise ProtocolError(f"blocks {item.block}..{last} are not all in the lease they are written under")
        return cells

    def landed(self, lease: LeaseKey) -> Landed:
        """What has landed under an open lease (nothing under any other)."""
        door = self._doors.get(lease)
        return door.landed() if door is not None else Landed(0, 0)

    def shut(self, lease: LeaseKey) -> None:
        """End the lease: when this returns nothing lands under it any more."""
        door = self._doors.pop(lease, None)
        if door is not None:
            door.shut()


class SeenInlet:
    """Part of the inlets whose own threads store the bytes: a lease is a door, and shutting it is its own proof."""

    def __init__(self, layout: KvLayout) -> None:
        self._doors = Doors(CellMap(layout))
        self._late = 0

    @property
    def late_bytes(self) -> int:
        """Bytes that arrived for leases that were over; none of them was stored."""
        return self._late

    def open_lease(self, lease: LeaseKey, connection: int, blocks: Sequence[int]) -> None:
        """Bytes under this lease are stored from now on."""
        self._doors.open(lease, connection, blocks)

    def watch(self, lease: LeaseKey, on_landed: Callable[[Sequence[Cells]], None]) -> None:
        """See Inlet.watch."""
        self._doors.watch(lease, on_landed)

    def landed(self, lease: LeaseKey) -> Landed | None:
        """Counted as bytes are stored."""
        return self._doors.landed(lease)

    def end_lease(self, lease: LeaseKey) -> bool:
        """Proven at once."""
        self._doors.shut(lease)
        return True
