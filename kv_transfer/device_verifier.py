"""Compares a manifest with device memory, where the bytes are. See `verifier` for what is compared when."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kv_transfer.device import DeviceRegion
from kv_transfer.device_digests import DeviceDigests
from kv_transfer.layout import Blocks, layer_planes, plane_rows
from kv_transfer.link import LeaseKey, Stretch
from kv_transfer.manifest import Policy, check_counts, checksum, sample_phase
from kv_transfer.verifier import AnyLanding
from llm_engine.api.handoff import KvLayout, Manifest

_INLINE_BYTES = 1 << 30  # a card hashes less than this in less time than a hop to a thread and back takes


class DeviceLanding:
    """A `verifier.Landing` over device memory."""

    def __init__(
        self,
        layout: KvLayout,
        region: DeviceRegion,
        policy: Policy,
        lease: LeaseKey,
        blocks: Sequence[int],
    ) -> None:
        self.layout = layout
        self.blocks = Blocks.of(blocks)
        self.policy = policy
        self._row_bytes = [] if policy == "count" else _layer_bytes(layout)
        self._digests = None if policy == "count" else DeviceDigests(region, layout, sample_phase(policy, lease))
        if self._digests is not None:
            region.table(self.blocks)  # while nobody waits
        self._asked = [0] * len(self._row_bytes)  # loop only
        self._done = [0] * len(self._row_bytes)
        self._left_bytes = len(blocks) * sum(self._row_bytes)
        self._lock = threading.Lock()
        self._over = False

    @property
    def num_layers(self) -> int:
        """Layers that are hashed at all."""
        return len(self._row_bytes)

    def advance(self, layers: Sequence[tuple[int, int]]) -> None:
        """See Landing.advance. No layers: the last will land soon."""
        due: list[tuple[int, int]] = []
        for layer, num_blocks in layers:
            wanted = min(num_blocks, len(self.blocks))
            if 0 <= layer < len(self._asked) and wanted > self._asked[layer]:
                self._asked[layer] = wanted
                due.append((layer, wanted))
        if due:
            self._enqueue(due)  # launches only: less than a hop to a thread takes
        elif not layers and self._digests is not None and self._left_bytes:
            self._digests.rehearse(self.blocks)

    def on_landed(self, stretch: Stretch) -> None:
        """Peers store here unseen."""

    def end(self) -> None:
        """Hash no more: the blocks have another owner."""
        self._over = True

    def left_bytes(self) -> int:
        """What has not been hashed yet."""
        return self._left_bytes

    def finish(self, manifest: Manifest) -> str | None:
        """Hash the rest and compare. None: it holds; otherwise what is wrong. Waits for the device."""
        if self._digests is None:
            return None
        count = len(self.blocks)
        self._enqueue([(layer, count) for layer, done in enumerate(self._done) if done < count])
        if self._left_bytes:
            return "the lease ended while its blocks were being verified"
        values = self._digests.values()
        for claim, own, plane in zip(manifest.planes, values, self.layout.planes, strict=True):
            if list(claim.checksums) != own:
                layer = next(layer for layer, found in enumerate(own) if claim.checksums[layer] != found)
                return f"plane {plane.name}, layer {layer}: the bytes here are not the bytes that were sent"
        return None

    def _enqueue(self, due: Sequence[tuple[int, int]]) -> None:
        assert self._digests is not None
        with self._lock:
            if self._over:
                return
            new = [(layer, self._done[layer], count) for layer, count in sorted(due) if count > self._done[layer]]
            # Neighbouring layers that have come equally far take one launch.
            for _, group in itertools.groupby(enumerate(new), lambda item: (item[1][0] - item[0], *item[1][1:])):
                taken = [entry for _, entry in group]
                (first, done, count), (last, _, _) = taken[0], taken[-1]
                whole = count - done == len(self.blocks)
                blocks = self.blocks if whole else self.blocks[done:count]
                self._digests.add(range(first, last + 1), blocks, done)
                self._done[first : last + 1] = [count] * len(taken)
                self._left_bytes -= (count - done) * sum(self._row_bytes[first : last + 1])
            if new and self._left_bytes == 0:
                self._digests.fetch()


def _layer_bytes(layout: KvLayout) -> list[int]:
    """Of one block, for every layer."""
    return [sum(layout.planes[row.plane].block_bytes for row in rows) for rows in layer_planes(layout)]


class DeviceVerifier:
    """A `verifier.Verifier` over device memory. One thread, for what waits for the card long."""

    def __init__(self, layout: KvLayout, region: DeviceRegion) -> None:
        self._layout = layout
        self._region = region
        self.num_rows = sum(plane.num_layers for plane in layout.planes)
        self._thread = ThreadPoolExecutor(1, "kv-verify")

    def close(self) -> None:
        """Join the thread."""
        self._thread.shutdown(cancel_futures=True)

    def land(self, lease: LeaseKey, blocks: Sequence[int], policy: Policy) -> DeviceLanding:
        """Begin to receive these blocks."""
        return DeviceLanding(self._layout, self._region, policy, lease, tuple(blocks))

    async def check(self, manifest: Manifest, landing: AnyLanding, num_tokens: int) -> str | None:
        """See Verifier.check."""
        assert isinstance(landing, DeviceLanding)
        wrong = check_counts(manifest, self._layout, len(landing.blocks), num_tokens, landing.policy)
        if wrong is not None or landing.policy == "count":
            return wrong
        if landing.left_bytes() <= _INLINE_BYTES:
            return landing.finish(manifest)
        return await asyncio.get_running_loop().run_in_executor(self._thread, landing.finish, manifest)

    async def block_checksum(self, block: int) -> int:
        """xxh3-64 over one block of every plane and layer, fetched from the card (probes)."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._block_checksum, block)

    def _block_checksum(self, block: int) -> int:
        parts = []
        with self._region.checking():
            for row in plane_rows(self._layout):
                plane = self._layout.planes[row.plane]
                start = plane.address(row.layer, block, self._layout.num_blocks)
                parts.append(self._region.memory[start : start + plane.block_bytes].cpu().numpy().tobytes())
        return checksum(b"".join(parts))
