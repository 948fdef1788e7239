"""What the hand-off counts: plain snapshots and one report per hand-off. Exporting them is the worker's business."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llm_engine.api.control import LinkStatus


class Marks(dict[str, float]):
    """When one hand-off reached its stages, on this end's monotonic clock. Any thread.

    The writer's: offered (the message has left), granted, writing (the sender has begun), enqueued (on a card: the last
    copies, summed: their checksums are here), landed, told_manifest and told_first (the parts of Commit have left).
    The receiver's: offered (the message is here), granted (the answer has left), manifest, verified, first (the parts
    of Commit are here), admitted.
    """

    def reach(self, stage: str) -> None:
        """Now, unless it was reached before."""
        self.setdefault(stage, time.monotonic())


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffReport:
    """One completed hand-off, as one end saw it. All durations on that end's monotonic clock."""

    request_id: str
    attempt: int
    peer: str
    transport: str
    num_tokens: int
    have_tokens: int  # found in the receiver's own prefix cache, not sent
    num_blocks: int
    num_bytes: int
    handoff_s: float  # Offer → Commit verified (receiver); Offer → Accepted (writer)
    exposed_s: float  # last prefill kernel end → decode may schedule, without the Commit's flight time
    verify_s: float = 0.0  # receiver only: Commit → verified, part of exposed_s
    drain_s: float = 0.0  # writer only: last prefill kernel end → everything has landed, part of exposed_s
    write_s: float = 0.0  # writer only: time of the sender thread's turns
    hash_s: float = 0.0  # writer only: time spent hashing, beside the copying where that pays
    marks: Marks = field(default_factory=Marks)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStats:
    """One end's view of the other. A receiver sees connected writers only, and leaves health to their canaries."""

    name: str
    incarnation: str
    transport: str  # "" until connected
    reason: str  # why this transport
    healthy: bool = True
    detail: str = ""  # why not healthy
    pending: int = 0  # the writer's count
    call_s: float = 0.0  # the writer's measured cost of the link: fixed time of a call …
    bytes_per_s: float = 0.0  # … and rate; 0 until something was sent


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterStats:
    """Snapshot of a HandoffClient. `pending`: offered and not yet concluded, exact."""

    pending: int
    offered: int
    accepted: int
    failed: Mapping[str, int]  # by cause
    num_bytes: int  # written, probes not included
    num_blocks: int
    write_s: float
    probes: Mapping[str, int]  # ok | failed | skipped
    dropped_frames: int  # malformed or not authentic
    peers: tuple[PeerStats, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverStats:
    """Snapshot of a HandoffServer. `pending` = offers waiting + leases not yet concluded, exact; 0 when drained."""

    pending: int
    waiting_offers: int
    leases: int
    quarantined_leases: int
    quarantined_blocks: int
    offered: int
    deferred: int
    accepted: int
    failed: Mapping[str, int]  # by cause: refused, rejected and revoked
    num_bytes: int  # of accepted hand-offs
    num_blocks: int
    exposed_s: float  # sum over accepted hand-offs
    verify_s: float
    late_bytes: int  # arrived for leases that were gone, never stored (tcp and local; shm can't see them)
    dropped_frames: int
    undeliverable: int  # messages for writers that were gone
    refused_connections: Mapping[str, int]  # data plane, by cause
    peers: tuple[PeerStats, ...]


def links_of(peers: Sequence[PeerStats]) -> list[LinkStatus]:
    """The peers of either end as status and metrics show them; peers that were never connected say what is wrong."""
    return [
        LinkStatus(
            peer=f"{peer.name}/{peer.incarnation}",
            transport=peer.transport,
            reason=peer.reason,
            healthy=peer.healthy,
            detail=peer.detail,
            call_s=peer.call_s,
            bytes_per_s=peer.bytes_per_s,
        )
        for peer in peers
    ]


@dataclass(slots=True)
class Tally:
    """Mutable counters behind a snapshot. Touched by the event loop only."""

    offered: int = 0
    deferred: int = 0
    accepted: int = 0
    num_bytes: int = 0
    num_blocks: int = 0
    exposed_s: float = 0.0
    verify_s: float = 0.0
    write_s: float = 0.0
    dropped_frames: int = 0
    undeliverable: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    probes: Counter[str] = field(default_factory=Counter)

    def count_accepted(self, report: HandoffReport) -> None:
        """A hand-off has succeeded."""
        self.accepted += 1
        self.num_bytes += report.num_bytes
        self.num_blocks += report.num_blocks
        self.exposed_s += report.exposed_s
        self.verify_s += report.verify_s
        self.write_s += report.write_s
