"""The lease table against a small world of memory, block pool and writers that write whenever they physically can."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv_transfer.lease import Lease, LeaseState, LeaseTable
from kv_transfer.offers import Attempts
from llm_engine.api.errors import LeaseRevoked

NUM_BLOCKS = 10


@dataclass(eq=False)
class Writer:
    """A process with the region mapped. It holds grants and writes under them until it knows that it must not."""

    connection: int
    alive: bool = True
    grants: list[Lease] = field(default_factory=list)
    inbox: list[Lease] = field(default_factory=list)  # fences that it has not read yet: it may be stopped


class World(RuleBasedStateMachine):
    """`memory[b]` is who wrote block b last; `owner[b]` is whose it is: a lease's, an engine sequence's, or nobody's.

    Shared memory: nothing stops a writer that has a grant, except its own reading of the fence, or death.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable("region")
        self.free = list(range(NUM_BLOCKS))
        self.owner: dict[int, object] = {}
        self.memory: dict[int, object] = {}
        self.writers = [Writer(connection) for connection in range(1, 4)]
        self.leases: list[Lease] = []
        self.sequences: list[tuple[Lease, tuple[int, ...]]] = []
        self.epoch_seen: dict[int, int] = {}

    def own(self, blocks: tuple[int, ...], who: object) -> None:
        for block in blocks:
            self.owner[block] = who
            self.memory[block] = None

    def give_back(self, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            del self.owner[block]
        self.free.extend(blocks)

    def in_state(self, *states: LeaseState) -> list[Lease]:
        return [lease for lease in self.leases if lease.state in states]

    @precondition(lambda self: self.free)
    @rule(data=st.data(), grant=st.booleans())
    def reserve(self, data: st.DataObject, grant: bool) -> None:
        count = data.draw(st.integers(0, min(4, len(self.free))))
        writer = data.draw(st.sampled_from(self.writers))
        blocks = tuple(self.free.pop(0) for _ in range(count))
        lease = self.table.reserve("r", len(self.leases), blocks, writer.connection)
        assert all(lease.key.epoch > self.epoch_seen.get(block, 0) for block in blocks)
        self.epoch_seen.update(dict.fromkeys(blocks, lease.key.epoch))
        self.own(blocks, lease)
        self.leases.append(lease)
        if grant:
            self.table.grant(lease)
            if writer.alive:
                writer.grants.append(lease)
        else:
            self.table.revoke(lease)  # the writer was never told
            assert lease.state is LeaseState.FREE
            self.give_back(blocks)

    @precondition(lambda self: self.in_state(LeaseState.RECEIVING))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        """Commit is a message of the writer: it has stopped by then."""
        lease = data.draw(st.sampled_from(self.in_state(LeaseState.RECEIVING)))
        writer = self.writers[lease.owner - 1]
        if not writer.alive:
            return
        writer.grants.remove(lease)
        self.table.commit(lease)
        self.own(lease.blocks, ("sequence", lease))  # from here on nobody but the engine writes: memory stays None
        self.sequences.append((lease, lease.blocks))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish_sequence(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(item)
        self.give_back(item[1])

    @precondition(lambda self: self.in_state(LeaseState.RECEIVING))
    @rule(data=st.data(), quarantine=st.booleans())
    def revoke(self, data: st.DataObject, quarantine: bool) -> None:
        lease = data.draw(st.sampled_from(self.in_state(LeaseState.RECEIVING)))
        self.table.revoke(lease)
        if quarantine:
            self.table.quarantine(lease)
        self.writers[lease.owner - 1].inbox.append(lease)
        with pytest.raises(LeaseRevoked):
            self.table.commit(lease)

    @precondition(lambda self: any(w.alive and w.inbox for w in self.writers))
    @rule(data=st.data())
    def writer_reads_a_fence(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from([w for w in self.writers if w.alive and w.inbox]))
        lease = writer.inbox.pop(0)
        if lease in writer.grants:
            writer.grants.remove(lease)
        if self.table.get(lease.key.lease_id) is lease:
            self.table.prove_stopped(lease)
            self.give_back(lease.blocks)

    @rule(data=st.data())
    def writer_dies(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from(self.writers))
        writer.alive, writer.grants, writer.inbox = False, [], []
        for lease in self.table.owned_by(writer.connection):
            if lease.state is LeaseState.RECEIVING:
                self.table.revoke(lease)
            self.table.prove_stopped(lease)
            self.give_back(lease.blocks)
        self.writers[writer.connection - 1] = Writer(writer.connection)

    @precondition(lambda self: any(w.grants for w in self.writers))
    @rule(data=st.data())
    def writer_writes(self, data: st.DataObject) -> None:
        """At any time, also long after the revocation."""
        writer = data.draw(st.sampled_from([w for w in self.writers if w.grants]))
        lease = data.draw(st.sampled_from(writer.grants))
        for block in lease.blocks:
            assert self.owner.get(block) is lease, f"late write of {lease} reached block {block} of a new owner"
            self.memory[block] = lease
        if lease.state is not LeaseState.RECEIVING:
            assert not any(self.table.may_write(lease.key, lease.owner, block) for block in range(NUM_BLOCKS))

    @invariant()
    def table_is_sound(self) -> None:
        self.table.check()
        for block, who in self.memory.items():
            assert block not in self.owner or who in (None, self.owner[block])
        waiting = self.in_state(LeaseState.REVOKED, LeaseState.QUARANTINED)
        assert not {block for lease in waiting for block in lease.blocks} & set(self.free)

    @invariant()
    def only_the_holder_may_write(self) -> None:
        for lease in self.leases[-8:]:
            for block in range(NUM_BLOCKS):
                allowed = self.table.may_write(lease.key, lease.owner, block)
                assert allowed == (lease.state is LeaseState.RECEIVING and block in lease.blocks)
                assert not self.table.may_write(lease.key, lease.owner + 1, block)
                assert not self.table.may_write(lease.key._replace(epoch=lease.key.epoch - 1), lease.owner, block)


World.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWorld = World.TestCase


def test_a_block_can_not_be_leased_twice() -> None:
    table = LeaseTable("region")
    lease = table.reserve("r", 0, [1, 2], 1)
    table.grant(lease)
    table.revoke(lease)
    table.quarantine(lease)
    for blocks in ([2, 3], [4, 4]):
        with pytest.raises(ValueError, match="reserved twice"):
            table.reserve("s", 0, blocks, 1)
    table.prove_stopped(lease)
    assert table.reserve("s", 0, [2, 3], 1).key.epoch > lease.key.epoch


def test_transitions_that_would_skip_a_proof_are_refused() -> None:
    table = LeaseTable("region")
    lease = table.reserve("r", 0, [1], 1)
    for step in (table.prove_stopped, table.quarantine):
        with pytest.raises(ValueError, match="reserved"):
            step(lease)
    table.grant(lease)
    with pytest.raises(ValueError, match="receiving, not revoked"):
        table.prove_stopped(lease)


def test_lease_ids_of_two_receivers_do_not_meet() -> None:
    ids = {LeaseTable("a").reserve("r", 0, [1], 1).key.lease_id for _ in range(100)}
    assert len(ids) == 100


def test_attempts_remember_the_newest_within_a_bound() -> None:
    attempts = Attempts(limit=2)
    attempts.close("a", 3)
    attempts.close("a", 1)
    assert attempts.is_stale("a", 3)
    assert not attempts.is_stale("a", 4)
    attempts.close("b", 0)
    attempts.close("a", 4)
    attempts.close("c", 0)  # forgets b, the one longest untouched
    assert attempts.is_stale("a", 4)
    assert not attempts.is_stale("b", 0)
