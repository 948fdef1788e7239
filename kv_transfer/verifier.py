"""Compares a manifest with the arena, off the event loop where that takes long. What it takes after Commit is exposed
latency, so layers are hashed as they land (`Landing.advance`) and only the rest at the end (`Verifier.check`).

A block is hashed once, after its writer said that it has landed. Nothing else can write into it under the lease but
that writer, whose copies of a block are over by then.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from kv_transfer.layout import layer_planes, merge_runs
from kv_transfer.link import LeaseKey
from kv_transfer.manifest import Policy, RowDigest, block_checksum, check_counts, sample_phase
from llm_engine.api.handoff import KvLayout, Manifest

_INLINE_BYTES = 1 << 20  # hashing less than this costs less than a hop to a thread
_THREADS = min(4, os.cpu_count() or 1)


class Landing:
    """The checksums of one lease's blocks, as far as they have landed. `end` it when the lease is over."""

    def __init__(
        self,
        layout: KvLayout,
        memory: memoryview,
        policy: Policy,
        lease: LeaseKey,
        blocks: Sequence[int],
        submit: Callable[[Callable[[], None]], object],
    ) -> None:
        self.layout = layout
        self.blocks = blocks
        self._memory = memory
        self._submit = submit
        phase = sample_phase(policy, lease)
        self._layers = [] if policy == "count" else list(layer_planes(layout))
        self._digests = [
            [RowDigest(layout.planes[row.plane].block_bytes, phase) for row in rows] for rows in self._layers
        ]
        self._locks = [threading.Lock() for _ in self._layers]
        self._asked = [0] * len(self._layers)  # loop only
        self._done = [0] * len(self._layers)
        self._over = False

    @property
    def num_layers(self) -> int:
        """Layers that are hashed at all."""
        return len(self._layers)

    def advance(self, layers: Iterable[tuple[int, int]]) -> None:
        """Hash the first `num_blocks` blocks of each layer, in a thread. On the loop; ignores what is no block here."""
        due: list[tuple[int, int]] = []
        for layer, num_blocks in layers:
            wanted = min(num_blocks, len(self.blocks))
            if 0 <= layer < len(self._layers) and wanted > self._asked[layer]:
                self._asked[layer] = wanted
                due.append((layer, wanted))
        if due:
            self._submit(partial(self._hash_all, due))

    def end(self) -> None:
        """Hash no more: the blocks have another owner."""
        self._over = True

    def left_bytes(self) -> int:
        """What `finish` would still have to hash; 0 under the count policy."""
        return sum(
            (len(self.blocks) - done) * sum(self.layout.planes[row.plane].block_bytes for row in rows)
            for rows, done in zip(self._layers, self._done, strict=True)
        )

    def finish(self, manifest: Manifest, layers: Iterable[int]) -> str | None:
        """Hash the rest of these layers and compare. None: they hold; otherwise what is wrong."""
        for layer in layers:
            self._hash(layer, len(self.blocks))
            for row, digest in zip(self._layers[layer], self._digests[layer], strict=True):
                if manifest.planes[row.plane].checksums[row.layer] != digest.value():
                    name = self.layout.planes[row.plane].name
                    return f"plane {name}, layer {row.layer}: the bytes here are not the bytes that were sent"
        return None

    def _hash_all(self, due: Sequence[tuple[int, int]]) -> None:
        for layer, num_blocks in due:
            self._hash(layer, num_blocks)

    def _hash(self, layer: int, num_blocks: int) -> None:
        with self._locks[layer]:
            done = self._done[layer]
            if self._over or num_blocks <= done:
                return
            blocks = self.blocks[done:num_blocks]
            runs = merge_runs(blocks, blocks)
            for row, digest in zip(self._layers[layer], self._digests[layer], strict=True):
                plane = self.layout.planes[row.plane]
                for run in runs:
                    start = plane.address(row.layer, run.source, self.layout.num_blocks)
                    digest.update(self._memory[start : start + run.num_blocks * plane.block_bytes])
            self._done[layer] = num_blocks


class Verifier:
    """Hashes `memory`, the bytes that `layout` describes."""

    def __init__(self, layout: KvLayout, memory: memoryview, policy: Policy) -> None:
        self._layout = layout
        self._memory = memory
        self._policy = policy
        self.num_rows = sum(plane.num_layers for plane in layout.planes)  # cells of one block
        self._threads = ThreadPoolExecutor(_THREADS, "kv-verify")

    def close(self) -> None:
        """Join the threads, let the memory go."""
        self._threads.shutdown(cancel_futures=True)
        self._memory.release()

    def land(self, lease: LeaseKey, blocks: Sequence[int]) -> Landing:
        """Begin to receive these blocks."""
        return Landing(self._layout, self._memory, self._policy, lease, blocks, self._threads.submit)

    async def check(self, manifest: Manifest, landing: Landing, num_tokens: int) -> str | None:
        """None if the manifest is complete and the bytes are those that were sent; otherwise what is wrong."""
        wrong = check_counts(manifest, self._layout, len(landing.blocks), num_tokens, self._policy)
        if wrong is not None or self._policy == "count":
            return wrong
        layers = range(landing.num_layers)
        if landing.left_bytes() <= _INLINE_BYTES:
            return landing.finish(manifest, layers)
        loop = asyncio.get_running_loop()
        shares = (layers[first::_THREADS] for first in range(_THREADS))
        answers = await asyncio.gather(
            *(loop.run_in_executor(self._threads, landing.finish, manifest, share) for share in shares)
        )
        return next((answer for answer in answers if answer is not None), None)

    async def block_checksum(self, block: int) -> int:
        """xxh3-64 over one block of every plane and layer."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, block_checksum, self._layout, self._memory, block)
