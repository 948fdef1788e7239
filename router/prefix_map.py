"""What a worker's prefix cache holds, as far as this router knows: a mirror fed by KvEvents, repaired by snapshots.

The mirror is a hint for routing: a wrong answer costs time, never tokens. Events carry a sequence number; after a gap
the mirror ignores events until a snapshot arrives and answers from what it knew before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from llm_engine.api.messages import KvEvents, KvSnapshot


class PrefixMap:
    """Digests of one worker's cached blocks, and of blocks that requests already sent there will store.

    `capacity` is the worker's number of blocks, which bounds the mirror.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._stored: set[bytes] = set()
        self._expected: dict[bytes, int] = {}  # digest → requests on their way that contain it
        self._seq: int | None = None  # None: out of step, waiting for a snapshot
        self.num_gaps = 0

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def in_step(self) -> bool:
        """False while a snapshot is needed."""
        return self._seq is not None

    def match(self, digests: Sequence[bytes]) -> int:
        """Number of leading blocks of a chain that the worker has or will have.

        Prefix caches evict from the tail, so presence is monotone along a chain and a binary search finds the end.
        """
        stored, expected = self._stored, self._expected
        if not digests or not (digests[0] in stored or digests[0] in expected):
            return 0
        return bisect_left(digests, True, lo=1, key=lambda digest: not (digest in stored or digest in expected))

    def apply(self, events: KvEvents) -> None:
        """Take in a change; out of step afterwards if events were missed."""
        if self._seq is None or events.seq <= self._seq:
            return  # no use, or already part of the snapshot
        if events.seq == self._seq + 1:
            self._seq = events.seq
            self._stored.difference_update(events.removed)
            self._stored.update(events.stored)
            if len(self._stored) <= self._capacity:
                return
        self._seq = None  # a gap, or more digests than blocks: the mirror has drifted
        self.num_gaps += 1

    def restore(self, snapshot: KvSnapshot) -> None:
        """Replace the mirror by the worker's whole index."""
        self._stored = set(snapshot.digests[: self._capacity])
        self._seq = snapshot.seq

    def expect(self, digests: Sequence[bytes]) -> None:
        """A request with this chain is on its way to the worker: requests that share its prefix should follow it."""
        expected = self._expected
        for digest in digests:
            expected[digest] = expected.get(digest, 0) + 1

    def unexpect(self, digests: Sequence[bytes]) -> None:
        """That request has left prefill: from now on only events tell what the worker holds."""
        expected = self._expected
        for digest in digests:
            count = expected.get(digest, 0) - 1
            if count > 0:
                expected[digest] = count
            else:
                expected.pop(digest, None)
