"""Which block holds which prefix: chain digest → block id, and the stream of its changes for the routers.

One block id addresses the same tokens in every cache group (latent, indexer keys, MTP), so an entry is atomic over all
of them: it is found, kept and evicted as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable

from llm_engine.api.messages import KvEvents, KvSnapshot


class PrefixIndex:
    """The entries of one engine. Only full blocks have one; the first block computed for a digest is the one known."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._changed: dict[bytes, bool] = {}  # since the last event: digest → stored (True) or removed
        self._seq = 0

    def __len__(self) -> int:
        return len(self._block_of)

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known leading part of a chain."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def blocks(self) -> set[int]:
        """Every block that holds an entry."""
        return set(self._digest_of)

    def insert(self, digest: bytes, block: int) -> bool:
        """Make `block` the holder of `digest`. False when another block already is: this one stays private."""
        if digest in self._block_of:
            return False
        assert block not in self._digest_of, f"block {block} already holds another prefix"
        self._block_of[digest] = block
        self._digest_of[block] = digest
        self._changed[digest] = True
        return True

    def evict(self, block: int) -> None:
        """Forget the entry that `block` holds."""
        digest = self._digest_of.pop(block)
        del self._block_of[digest]
        self._changed[digest] = False

    def take_events(self) -> KvEvents | None:
        """The net changes since the last call, under the next sequence number; None if there are none."""
        if not self._changed:
            return None
        self._seq += 1
        stored = [digest for digest, present in self._changed.items() if present]
        removed = [digest for digest, present in self._changed.items() if not present]
        self._changed = {}
        return KvEvents(seq=self._seq, stored=stored, removed=removed)

    def snapshot(self) -> KvSnapshot:
        """Every entry. It may hold changes that the next event repeats; applying an event twice changes nothing."""
        return KvSnapshot(seq=self._seq, digests=list(self._block_of))

    def check(self) -> None:
        """Verify every invariant. Raises AssertionError."""
        assert {block: digest for digest, block in self._block_of.items()} == self._digest_of
        assert all((digest in self._block_of) == present for digest, present in self._changed.items())
