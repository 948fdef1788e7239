"""Free block ids kept as maximal runs, so that large allocations come out contiguous.

Contiguous blocks are sent between machines as one large write; scattered ones cost an operation each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable


class FreeRuns:
    """A set of ids in [0, n) stored as runs [start, start + length) that never touch each other."""

    def __init__(self, num_ids: int) -> None:
        self._count = 0
        self._length_at: dict[int, int] = {}  # start → length
        self._start_to: dict[int, int] = {}  # end → start
        self._by_length: list[tuple[int, int]] = []  # (length, start), sorted
        if num_ids:
            self._insert(0, num_ids)

    def __len__(self) -> int:
        return self._count

    def runs(self) -> list[tuple[int, int]]:
        """(start, length) of every run, by start."""
        return sorted(self._length_at.items())

    def add(self, ids: Iterable[int]) -> None:
        """Return ids that are not in the set."""
        start = end = -1
        for block in sorted(ids):
            if block == end:
                end += 1
                continue
            if end > start:
                self._join(start, end)
            start, end = block, block + 1
        if end > start:
            self._join(start, end)

    def take(self, n: int, after: int = -1) -> list[int]:
        """Remove and return `n` of the ids; there must be that many.

        The run that starts at `after` is used first (it prolongs what the caller holds), then the smallest run that
        holds the rest, then the largest runs there are.
        """
        taken: list[int] = []
        if after in self._length_at:
            self._cut(after, n, taken)
        while len(taken) < n:
            at = bisect_left(self._by_length, (n - len(taken), -1))
            _, start = self._by_length[min(at, len(self._by_length) - 1)]
            self._cut(start, n - len(taken), taken)
        return taken

    def _cut(self, start: int, n: int, taken: list[int]) -> None:
        """Move the first `n` ids of the run at `start` (all of it, if it is shorter) to `taken`."""
        length = self._remove(start)
        n = min(n, length)
        taken.extend(range(start, start + n))
        if n < length:
            self._insert(start + n, length - n)

    def _join(self, start: int, end: int) -> None:
        """Insert [start, end), merged with the runs it touches."""
        if start in self._start_to:
            start = self._start_to[start]
            self._remove(start)
        if end in self._length_at:
            end += self._remove(end)
        self._insert(start, end - start)

    def _insert(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_to[start + length] = start
        insort(self._by_length, (length, start))
        self._count += length

    def _remove(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._start_to[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        self._count -= length
        return length
