"""Compares a manifest with the arena, off the event loop where that takes long. What it takes after Commit is exposed
latency, so layers are hashed as they land (`Landing.advance`) and only the rest at the end (`Verifier.check`).

A block is hashed once, after its writer said that it has landed. Nothing else can write into it under the lease but
that writer, whose copies of a block are over by then.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Protocol

from kv_transfer.layout import PlaneLayer, layer_planes, merge_runs, plane_rows
from kv_transfer.link import LeaseKey, Stretch
from kv_transfer.manifest import Policy, RowDigest, block_checksum, check_counts, sample_phase
from llm_engine.api.handoff import KvLayout, Manifest

if TYPE_CHECKING:  # needs torch
    from kv_transfer.device import DeviceRegion

_INLINE_BYTES = {"full": 1 << 20, "sampled": 4 << 20}  # hashing less than this costs less than a hop to a thread
_THREADS = min(4, os.cpu_count() or 1)


class AnyLanding(Protocol):
    """The checksums of one lease's blocks, over host or device memory; see Landing."""

    policy: Policy

    def advance(self, layers: Sequence[tuple[int, int]]) -> None:
        """The writer says that so many blocks of these layers have landed; no layers: that the last will soon."""
        ...

    def on_landed(self, stretch: Stretch) -> None:
        """The link has stored these blocks."""
        ...

    def end(self) -> None:
        """The lease is over."""
        ...


class AnyVerifier(Protocol):
    """Of host or device memory; see Verifier."""

    num_rows: int

    def land(self, lease: LeaseKey, blocks: Sequence[int], policy: Policy) -> AnyLanding:
        """Begin to receive these blocks."""
        ...

    async def check(self, manifest: Manifest, landing: AnyLanding, num_tokens: int) -> str | None:
        """None if the manifest is complete and the bytes are those that were sent; otherwise what is wrong."""
        ...

    async def block_checksum(self, block: int) -> int:
        """xxh3-64 over one block of every plane and layer."""
        ...

    def close(self) -> None:
        """Join the threads, let the memory go."""
        ...


def new_verifier(layout: KvLayout, memory: memoryview | DeviceRegion) -> AnyVerifier:
    """For the memory that `layout` describes."""
    if isinstance(memory, memoryview):
        return Verifier(layout, memory)
    from kv_transfer.device_verifier import DeviceVerifier

    return DeviceVerifier(layout, memory)


class _Row:
    """One plane row of a lease: how many of its blocks have been hashed."""

    __slots__ = ("digest", "done", "lock", "rewritten", "value")

    def __init__(self, digest: RowDigest) -> None:
        self.lock = threading.Lock()
        self.digest = digest
        self.done = 0
        self.rewritten = False  # a hashed block was written again: what was hashed is not what is there
        self.value: int | None = None  # of all blocks, unless rewritten


class Landing:
    """The checksums of one lease's blocks, as far as they have landed. `end` it when the lease is over.

    Links that see bytes arrive report them to `on_landed`, which hashes them on the spot, in the cache of the thread
    that stored them. For the others the writer's word is a hint (`advance`).
    """

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
        self.policy = policy
        self._memory = memory
        self._submit = submit
        self._phase = sample_phase(policy, lease)
        self._layers = [] if policy == "count" else list(layer_planes(layout))
        self._rows = {row: _Row(self._new_digest(row)) for row in plane_rows(layout)}
        self._numbered = list(self._rows.values())  # as links count rows
        self._asked = [0] * len(self._layers)  # loop only
        self._over = False

    @property
    def num_layers(self) -> int:
        """Layers that are hashed at all."""
        return len(self._layers)

    def advance(self, layers: Sequence[tuple[int, int]]) -> None:
        """Hash the first `num_blocks` blocks of each layer, in a thread. On the loop; ignores what is no block here."""
        due: list[tuple[int, int]] = []
        for layer, num_blocks in layers:
            wanted = min(num_blocks, len(self.blocks))
            if 0 <= layer < len(self._layers) and wanted > self._asked[layer]:
                self._asked[layer] = wanted
                if any(self._rows[row].done < wanted for row in self._layers[layer]):
                    due.append((layer, wanted))
        if due:
            self._submit(partial(self._hash_all, due))

    def on_landed(self, stretch: Stretch) -> None:
        """These blocks of the lease have just been stored. Any thread; hashes them if they are next in their row."""
        if self.policy == "count":
            return
        row = self._numbered[stretch.row]
        with row.lock:
            if stretch.first < row.done:
                row.rewritten, row.value = True, None
            elif stretch.first == row.done:
                self._hash_locked(row, stretch.last, stretch.parts)

    def end(self) -> None:
        """Hash no more: the blocks have another owner."""
        self._over = True

    def holds(self, manifest: Manifest) -> bool:
        """Whether everything has been hashed and is what was sent. False says nothing yet: see `finish`."""
        claimed = [value for plane in manifest.planes for value in plane.checksums]
        return claimed == [row.value for row in self._rows.values()]

    def left_bytes(self) -> int:
        """What `finish` would still have to hash; 0 under the count policy."""
        return sum(
            (len(self.blocks) - (0 if state.rewritten else state.done)) * self.layout.planes[row.plane].block_bytes
            for row, state in self._rows.items()
            if self._layers
        )

    def finish(self, manifest: Manifest, layers: Iterable[int]) -> str | None:
        """Hash the rest of these layers and compare. None: they hold; otherwise what is wrong."""
        for layer in layers:
            for row in self._layers[layer]:
                claimed = manifest.planes[row.plane].checksums[row.layer]
                if self._rows[row].value == claimed:  # hashed whole before
                    continue
                self._hash(row, len(self.blocks), last=True)
                if claimed != self._rows[row].digest.value():
                    name = self.layout.planes[row.plane].name
                    return f"plane {name}, layer {row.layer}: the bytes here are not the bytes that were sent"
        return None

    def _hash_all(self, due: Sequence[tuple[int, int]]) -> None:
        for layer, num_blocks in due:
            for row in self._layers[layer]:
                self._hash(row, num_blocks)

    def _hash(self, key: PlaneLayer, num_blocks: int, *, last: bool = False) -> None:
        row = self._rows[key]
        with row.lock:
            if last and row.rewritten:
                row.digest, row.done, row.rewritten = self._new_digest(key), 0, False
            self._hash_locked(row, num_blocks, self._parts(key, self.blocks[row.done : num_blocks]))

    def _hash_locked(self, row: _Row, num_blocks: int, parts: Iterable[memoryview]) -> None:
        """Hash the next blocks of the lease, up to `num_blocks`; `parts`: they. With the row's lock held."""
        if self._over or num_blocks <= row.done:
            return
        for part in parts:
            row.digest.update(part)
        row.done = num_blocks
        if num_blocks == len(self.blocks) and not row.rewritten:
            row.value = row.digest.value()

    def _parts(self, key: PlaneLayer, blocks: Sequence[int]) -> Iterator[memoryview]:
        """These blocks of a row, neighbours together."""
        plane = self.layout.planes[key.plane]
        for run in merge_runs(blocks, blocks):
            start = plane.address(key.layer, run.source, self.layout.num_blocks)
            yield self._memory[start : start + run.num_blocks * plane.block_bytes]

    def _new_digest(self, row: PlaneLayer) -> RowDigest:
        return RowDigest(self.layout.planes[row.plane].block_bytes, self._phase)


class Verifier:
    """Hashes `memory`, the bytes that `layout` describes."""

    def __init__(self, layout: KvLayout, memory: memoryview) -> None:
        self._layout = layout
        self._memory = memory
        self.num_rows = sum(plane.num_layers for plane in layout.planes)  # cells of one block
        self._threads = ThreadPoolExecutor(_THREADS, "kv-verify")

    def close(self) -> None:
        """Join the threads, let the memory go."""
        self._threads.shutdown(cancel_futures=True)
        self._memory.release()

    def land(self, lease: LeaseKey, blocks: Sequence[int], policy: Policy) -> Landing:
        """Begin to receive these blocks."""
        return Landing(self._layout, self._memory, policy, lease, tuple(blocks), self._threads.submit)

    async def check(self, manifest: Manifest, landing: AnyLanding, num_tokens: int) -> str | None:
        """None if the manifest is complete and the bytes are those that were sent; otherwise what is wrong."""
        assert isinstance(landing, Landing)
        wrong = check_counts(manifest, self._layout, len(landing.blocks), num_tokens, landing.policy)
        if wrong is not None or landing.policy == "count":
            return wrong
        if landing.holds(manifest):
            return None
        layers = range(landing.num_layers)
        if landing.left_bytes() <= _INLINE_BYTES[landing.policy]:
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
