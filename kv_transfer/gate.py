"""Two small locks with a memory: the writer's gate (may a write start, is one in flight) and the receiver's doors
(which leases may bytes land under), with the inlets that are built on doors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from kv_transfer.layout import CellMap
from kv_transfer.link import CACHED_BYTES, Landed, LeaseKey, Stretch
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
        self.on_landed: Callable[[Stretch], None] = lambda _: None
        self._blocks = tuple(blocks)
        self._position = {block: index for index, block in enumerate(blocks)}
        self._landed = bytearray(num_rows * len(blocks))
        self._num_bytes = 0

    def find(self, block: int, num_blocks: int) -> int | None:
        """Position in the lease of these neighbours in memory. None unless it holds them all, one after the other."""
        first = self._position.get(block)
        if num_blocks == 1 or first is None:
            return first
        expected = tuple(range(block, block + num_blocks))
        return first if self._blocks[first : first + num_blocks] == expected else None

    def record(self, stretch: Stretch) -> None:
        """These blocks have landed completely."""
        count = stretch.last - stretch.first
        begin = stretch.row * len(self._blocks) + stretch.first
        missing = self._landed.count(0, begin, begin + count)
        if missing:
            self._landed[begin : begin + count] = b"\1" * count
            self._num_bytes += stretch.num_bytes // count * missing
        self.on_landed(stretch)

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

    def watch(self, lease: LeaseKey, on_landed: Callable[[Stretch], None]) -> None:
        """Report what lands under this lease, if it is open."""
        if (door := self._doors.get(lease)) is not None:
            door.on_landed = on_landed

    def find(self, lease: LeaseKey, connection: int) -> Door | None:
        """The door, if it is this connection's. None: the lease is over or never was; its bytes must not be stored."""
        door = self._doors.get(lease)
        return door if door is not None and door.connection == connection else None

    def check(self, door: Door, ranges: Iterable[tuple[int, int]], memory: memoryview) -> list[Stretch]:
        """What (offset, length) ranges of `memory` are under the lease, in stretches of CACHED_BYTES or one block.

        Raises ProtocolError for a range that is not whole blocks of the lease in its order.
        """
        stretches: list[Stretch] = []
        for offset, length in ranges:
            row, block, num_blocks = self._cells.locate(offset, length)
            first = door.find(block, num_blocks)
            if first is None:
                named = f"{block}..{block + num_blocks - 1}"
                raise ProtocolError(f"blocks {named} do not follow each other in the lease they are written under")
            size = length // num_blocks
            step = max(1, CACHED_BYTES // size)
            for done in range(0, num_blocks, step):
                count = min(step, num_blocks - done)
                begin = offset + done * size
                _append(stretches, row, first + done, count, memory[begin : begin + count * size])
        return stretches

    def landed(self, lease: LeaseKey) -> Landed:
        """What has landed under an open lease (nothing under any other)."""
        door = self._doors.get(lease)
        return door.landed() if door is not None else Landed(0, 0)

    def shut(self, lease: LeaseKey) -> None:
        """End the lease: when this returns nothing lands under it any more."""
        door = self._doors.pop(lease, None)
        if door is not None:
            door.shut()


def _append(stretches: list[Stretch], row: int, first: int, num_blocks: int, part: memoryview) -> None:
    """To the last stretch, if it ends there and has room; otherwise it begins the next one."""
    last = stretches[-1] if stretches else None
    if last is not None and (last.row, last.last) == (row, first) and last.num_bytes + len(part) <= CACHED_BYTES:
        last.last += num_blocks
        last.num_bytes += len(part)
        last.parts.append(part)
    else:
        stretches.append(Stretch(row, first, first + num_blocks, len(part), [part]))


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

    def watch(self, lease: LeaseKey, on_landed: Callable[[Stretch], None]) -> None:
        """See Inlet.watch."""
        self._doors.watch(lease, on_landed)

    def landed(self, lease: LeaseKey) -> Landed | None:
        """Counted as bytes are stored."""
        return self._doors.landed(lease)

    def end_lease(self, lease: LeaseKey) -> bool:
        """Proven at once."""
        self._doors.shut(lease)
        return True
