"""The two ends of a data link, one implementation of each per transport.

The writer holds a `Link` per peer; the receiver holds an `Inlet` per transport, which takes the links of all writers.
Both authenticate with the cluster key before anything else. Offsets are relative to the receiver's region; what a
writer may touch is decided by leases: (lease id, epoch, list of blocks).

A new transport implements both protocols, says in its docstring what proves that a writer has stopped, and is named in
`transports`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from llm_engine.api.handoff import LinkOffer


class LeaseKey(NamedTuple):
    """Names one lease for good: every later lease of any of its blocks has a higher epoch."""

    lease_id: int
    epoch: int


class Cells(NamedTuple):
    """`num_blocks` neighbouring cells of one plane row. A cell is one block of one layer of one plane."""

    row: int  # running number of (plane, layer) over all planes
    block: int
    num_blocks: int


@dataclass(slots=True)
class Stretch:
    """Blocks [first, last) of one lease, counted in its order, in one plane row, and the memory that they are."""

    row: int  # as in Cells
    first: int
    last: int
    num_bytes: int
    parts: list[memoryview]


class Copy(NamedTuple):
    """`num_bytes` from `source` (offset in the writer's buffer) to `target` (offset in the receiver's region)."""

    source: int
    target: int
    num_bytes: int


Sent = Callable[[int, int, int], None]
CACHED_BYTES = 512 << 10  # read twice, so much comes from the cache the second time


def all_landed() -> Future[int | None]:
    """The answer to `confirm` of a link whose writes return when they have landed."""
    future: Future[int | None] = Future()
    future.set_result(None)
    return future


def no_news(index: int, first: int, last: int) -> None:
    """A `Sent` for writers that don't care."""


def cuts(num_bytes: int) -> Iterator[tuple[int, int]]:
    """[first, last) pieces of CACHED_BYTES that cover so many bytes."""
    for first in range(0, num_bytes, CACHED_BYTES):
        yield first, min(first + CACHED_BYTES, num_bytes)


class Link(Protocol):
    """Writer's end. `write` blocks and is called from sender threads; everything else returns at once."""

    transport: str

    def write(
        self,
        lease: LeaseKey,
        source: memoryview,
        copies: Sequence[Copy],
        stopped: Callable[[], bool],
        sent: Sent = no_news,
    ) -> None:
        """Copy from `source`, which is not read any more on return. `stopped` is polled at least once a copy or frame.

        `sent(i, first, last)` is called for bytes [first, last) of copy i, in order and without gaps, right before or
        after they are read, in pieces small enough to stay in the cache between the two.
        Raises LeaseRevoked once `stopped()` is true, TransferError when the link is broken.
        """
        ...

    def confirm(self, lease: LeaseKey) -> Future[int | None]:
        """Done once everything written before has landed: bytes stored under the lease as the receiver counted them,
        None if the transport copies synchronously. Fails with TransferError when the link breaks."""
        ...

    def close(self) -> None:
        """After this nothing is written; running `write` calls raise. Idempotent, joins the link's threads."""
        ...


@dataclass(frozen=True, slots=True)
class Landed:
    """What an inlet saw arrive under a lease: distinct (plane, layer, block) cells, and their bytes."""

    num_cells: int
    num_bytes: int


class Inlet(Protocol):
    """Receiver's end of one transport."""

    transport: str

    @property
    def late_bytes(self) -> int:
        """Bytes that arrived for leases that were over; none of them was stored."""
        ...

    def offer(self) -> LinkOffer:
        """How a writer reaches this inlet."""
        ...

    def open_lease(self, lease: LeaseKey, connection: int, blocks: Sequence[int]) -> None:
        """From now on this connection may write into these blocks."""
        ...

    def watch(self, lease: LeaseKey, on_landed: Callable[[Stretch], None]) -> None:
        """Call this with blocks that have just been stored under an open lease, from the thread that stored them: they
        are in its cache. Not called by transports that can't see what lands."""
        ...

    def landed(self, lease: LeaseKey) -> Landed | None:
        """What has landed; None if the transport can't see it (shm)."""
        ...

    def end_lease(self, lease: LeaseKey) -> bool:
        """Stop accepting writes. True: proven, not a byte lands after this call; False: only the writer can say."""
        ...

    def close(self) -> None:
        """Close the listener and every connection, join every thread. Idempotent."""
        ...
