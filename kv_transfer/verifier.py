"""Compares a manifest with the arena, off the event loop where that takes long. What it takes is exposed latency."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from kv_transfer.manifest import Policy, block_checksum, check_bytes, check_counts, rows_of
from llm_engine.api.handoff import KvLayout, Manifest

_INLINE_BYTES = 1 << 20  # hashing less than this costs less than a hop to a thread
_THREADS = min(4, os.cpu_count() or 1)


class Verifier:
    """Hashes `memory`, the bytes that `layout` describes."""

    def __init__(self, layout: KvLayout, memory: memoryview, policy: Policy) -> None:
        self._layout = layout
        self._memory = memory
        self._policy = policy
        self._rows = rows_of(layout)
        self._threads = ThreadPoolExecutor(_THREADS, "kv-verify")

    @property
    def num_rows(self) -> int:
        """Cells of one block."""
        return len(self._rows)

    def close(self) -> None:
        """Join the threads, let the memory go."""
        self._threads.shutdown()
        self._memory.release()

    async def check(self, manifest: Manifest, blocks: Sequence[int], num_tokens: int) -> str | None:
        """None if the manifest is complete and the bytes are those that were sent; otherwise what is wrong."""
        wrong = check_counts(manifest, self._layout, len(blocks), num_tokens, self._policy)
        if wrong is not None or self._policy == "count":
            return wrong
        check = partial(check_bytes, manifest, self._layout, self._memory, blocks)
        if len(blocks) * self._layout.bytes_per_block() <= _INLINE_BYTES:
            return check(self._rows)
        loop = asyncio.get_running_loop()
        shares = (self._rows[first::_THREADS] for first in range(_THREADS))
        answers = await asyncio.gather(*(loop.run_in_executor(self._threads, check, share) for share in shares))
        return next((answer for answer in answers if answer is not None), None)

    async def block_checksum(self, block: int) -> int:
        """xxh3-64 over one block of every plane and layer."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, block_checksum, self._layout, self._memory, block)
