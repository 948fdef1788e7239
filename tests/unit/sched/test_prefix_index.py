"""The prefix index, and a router's mirror of it that lives on events alone."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llm_engine.api.messages import KvEvents
from llm_engine.sched.prefix_index import PrefixIndex

DIGESTS = [bytes([i]) * 16 for i in range(6)]


class MirrorModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.holder: dict[bytes, int] = {}
        self.next_block = 0
        self.mirror: set[bytes] = set()
        self.mirror_seq = 0
        self.late_mirror: set[bytes] | None = None

    @rule(digest=st.sampled_from(DIGESTS))
    def insert(self, digest: bytes) -> None:
        block, self.next_block = self.next_block, self.next_block + 1
        assert self.index.insert(digest, block) == (digest not in self.holder)
        self.holder.setdefault(digest, block)

    @rule(digest=st.sampled_from(DIGESTS))
    def evict(self, digest: bytes) -> None:
        if digest in self.holder:
            self.index.evict(self.holder.pop(digest))

    @rule()
    def publish(self) -> None:
        events = self.index.take_events()
        if events is None:
            assert self.mirror == set(self.holder)
            return
        assert events.seq == self.mirror_seq + 1
        self.mirror_seq = events.seq
        assert not set(events.stored) & set(events.removed)
        for mirror in (self.mirror, self.late_mirror):
            if mirror is not None:
                _apply(mirror, events)
        assert self.mirror == set(self.holder)
        assert self.late_mirror in (None, set(self.holder))

    @rule()
    def snapshot(self) -> None:
        snapshot = self.index.snapshot()
        assert snapshot.seq == self.mirror_seq
        self.late_mirror = set(snapshot.digests)

    @rule(chain=st.lists(st.sampled_from(DIGESTS), unique=True))
    def find(self, chain: list[bytes]) -> None:
        expected = []
        for digest in chain:
            if digest not in self.holder:
                break
            expected.append(self.holder[digest])
        assert self.index.find(chain) == expected

    @invariant()
    def holds(self) -> None:
        self.index.check()
        assert self.index.blocks() == set(self.holder.values())


def _apply(mirror: set[bytes], events: KvEvents) -> None:
    mirror.update(events.stored)
    mirror.difference_update(events.removed)


TestMirror = MirrorModel.TestCase


def test_nothing_changed_means_no_event() -> None:
    index = PrefixIndex()
    assert index.take_events() is None
    index.insert(DIGESTS[0], 3)
    assert index.take_events() == KvEvents(seq=1, stored=[DIGESTS[0]], removed=[])
    assert index.take_events() is None
