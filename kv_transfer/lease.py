"""Leases: who may write into which blocks. A pure state machine; no clock, no I/O, no memory.

    RESERVED ──grant──▶ RECEIVING ──commit──▶ COMMITTED
        │                   │
      revoke              revoke
        │                   ▼
        │                REVOKED ──quarantine──▶ QUARANTINED
        │                   │                        │
        │             prove_stopped            prove_stopped
        ▼                   ▼                        ▼
       FREE ◀───────────────┴────────────────────────┘

Blocks of a lease may get a new owner only after COMMITTED (the engine owns them then) or FREE. There is no way from
RECEIVING to FREE that does not pass through a proof, and no transition that the passing of time triggers.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kv_transfer.link import LeaseKey
from llm_engine.api.errors import LeaseRevoked


class LeaseState(enum.Enum):
    """What a lease's blocks are."""

    RESERVED = "reserved"  # taken from the pool; the writer has not been told
    RECEIVING = "receiving"  # granted: the writer may write
    COMMITTED = "committed"  # verified; the blocks are the engine's
    REVOKED = "revoked"  # taken back; the writer may still write
    QUARANTINED = "quarantined"  # the same, and the block pool knows; waiting for a proof that the writer has stopped
    FREE = "free"  # nobody can write


@dataclass(slots=True, eq=False)
class Lease:
    """Changed by its table only. `owner`: the data connection that the writer writes through."""

    key: LeaseKey
    request_id: str
    attempt: int
    owner: int
    blocks: tuple[int, ...]
    state: LeaseState = LeaseState.RESERVED


class LeaseTable:
    """Every lease that is not concluded.

    A lease's epoch is higher than that of every earlier lease, so than those of its blocks' earlier ones. Ids start at
    random, so that a frame recorded against another receiver, or an earlier life of this one, names no lease here.
    """

    def __init__(self, region: str) -> None:
        self.region = region
        self._leases: dict[int, Lease] = {}
        self._held: set[int] = set()  # blocks of all these leases
        self._epoch = 0  # the last
        self._next_id = secrets.randbits(48)

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(tuple(self._leases.values()))

    def get(self, lease_id: int) -> Lease | None:
        """The lease while it is not concluded."""
        return self._leases.get(lease_id)

    def owned_by(self, owner: int) -> list[Lease]:
        """Unconcluded leases whose writer uses data connection `owner`."""
        return [lease for lease in self._leases.values() if lease.owner == owner]

    def count_blocks(self, states: Iterable[LeaseState]) -> int:
        """Blocks under leases in these states."""
        wanted = set(states)
        return sum(len(lease.blocks) for lease in self._leases.values() if lease.state in wanted)

    def reserve(self, request_id: str, attempt: int, blocks: Sequence[int], owner: int) -> Lease:
        """Open a lease.

        Raises ValueError if a block is listed twice or held by an unconcluded lease: the caller's block pool gave away
        what it does not own.
        """
        taken = tuple(blocks)
        if not self._held.isdisjoint(taken) or len(set(taken)) != len(taken):
            raise ValueError(f"blocks {sorted(self._held.intersection(taken)) or taken}: reserved twice")
        self._epoch += 1
        lease = Lease(LeaseKey(self._next_id, self._epoch), request_id, attempt, owner, taken)
        self._next_id += 1
        self._leases[lease.key.lease_id] = lease
        self._held.update(taken)
        return lease

    def grant(self, lease: Lease) -> None:
        """The writer is about to be told."""
        self._move(lease, LeaseState.RECEIVING, LeaseState.RESERVED)

    def commit(self, lease: Lease) -> None:
        """The manifest is verified. Raises LeaseRevoked if the blocks were taken back meanwhile."""
        if lease.state is not LeaseState.RECEIVING:
            raise LeaseRevoked(f"lease {lease.key.lease_id} is {lease.state.value}", request_id=lease.request_id)
        self._conclude(lease, LeaseState.COMMITTED)

    def revoke(self, lease: Lease) -> None:
        """Take the blocks back. A lease that was never granted is free at once."""
        if lease.state is LeaseState.RESERVED:
            self._conclude(lease, LeaseState.FREE)
        else:
            self._move(lease, LeaseState.REVOKED, LeaseState.RECEIVING)

    def quarantine(self, lease: Lease) -> None:
        """No proof yet: the blocks wait."""
        self._move(lease, LeaseState.QUARANTINED, LeaseState.REVOKED)

    def prove_stopped(self, lease: Lease) -> None:
        """The writer answered the fence, withdrew, or can't reach the memory any more."""
        if lease.state not in (LeaseState.REVOKED, LeaseState.QUARANTINED):
            raise ValueError(f"lease {lease.key.lease_id} is {lease.state.value}, not revoked")
        self._conclude(lease, LeaseState.FREE)

    def may_write(self, key: LeaseKey, owner: int, block: int) -> bool:
        """Whether a write that names this lease, coming through this connection, may land in this block."""
        lease = self._leases.get(key.lease_id)
        return (
            lease is not None
            and lease.state is LeaseState.RECEIVING
            and lease.key == key
            and lease.owner == owner
            and block in lease.blocks
        )

    def check(self) -> None:
        """Every held block belongs to exactly one unconcluded lease, and no two leases have one epoch."""
        blocks = [block for lease in self._leases.values() for block in lease.blocks]
        assert len(blocks) == len(self._held)
        assert set(blocks) == self._held
        assert len({lease.key.epoch for lease in self._leases.values()}) == len(self._leases)
        assert all(lease.key.epoch <= self._epoch for lease in self._leases.values())

    def _move(self, lease: Lease, to: LeaseState, expected: LeaseState) -> None:
        if lease.state is not expected:
            raise ValueError(f"lease {lease.key.lease_id} is {lease.state.value}, expected {expected.value}")
        lease.state = to

    def _conclude(self, lease: Lease, state: LeaseState) -> None:
        lease.state = state
        del self._leases[lease.key.lease_id]
        self._held.difference_update(lease.blocks)
