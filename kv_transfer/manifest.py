"""The completeness proof of a hand-off: counts for every plane, and a checksum for every layer of it.

The writer hashes its own bytes in block order while it sends them; the receiver hashes the memory where they should be.
A block that never arrived, arrived elsewhere, was cut, overwritten or changed on the way gives another checksum.

Policies: `full` hashes every byte. `sampled` hashes one line of every page and the end of every block, at an offset
that follows from the lease: it notices whatever did not arrive or arrived elsewhere in units of pages, at a hundredth
of the cost, but not a changed bit. `count` compares numbers only. `auto` is `sampled` where the bytes stay in one
host's memory, which its own error correction protects, and `full` on every network.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import xxhash

from kv_transfer.layout import PlaneLayer
from kv_transfer.link import LeaseKey
from llm_engine.api.handoff import KvLayout, Manifest, PlaneManifest

Policy = Literal["full", "sampled", "count"]
POLICIES: dict[str, Policy] = {"full": "full", "sampled": "sampled", "count": "count"}

_ONE_MEMORY = ("local", "shm", "cuda_ipc")
PAGE_BYTES = 4096
LINE_BYTES = 64


def policy_for(setting: str, transport: str) -> Policy:
    """The policy of a pair under the receiver's `transfer.checksum`."""
    if setting == "auto":
        return "sampled" if transport in _ONE_MEMORY else "full"
    return POLICIES[setting]


class RowDigest:
    """xxh3-64 over the blocks of one plane row in block order, fed piece by piece. One thread at a time."""

    __slots__ = ("_block_bytes", "_hash", "_phase")

    def __init__(self, block_bytes: int, phase: int | None) -> None:
        """`phase`: where in a page the sampled line begins; None: every byte counts."""
        self._hash = xxhash.xxh3_64()
        self._block_bytes = block_bytes
        self._phase = phase

    def update(self, data: memoryview) -> None:
        """The next bytes; whole blocks where lines are sampled. How they are cut into calls does not matter."""
        size = self._block_bytes
        if self._phase is None or size <= PAGE_BYTES:
            self._hash.update(data)
            return
        blocks = np.frombuffer(data, np.uint8).reshape(-1, size)
        num_pages = size // PAGE_BYTES
        pages = blocks[:, : num_pages * PAGE_BYTES].reshape(-1, num_pages, PAGE_BYTES)
        lines = np.empty((len(blocks), num_pages + 1, LINE_BYTES), np.uint8)
        lines[:, :-1] = pages[:, :, self._phase : self._phase + LINE_BYTES]
        lines[:, -1] = blocks[:, -LINE_BYTES:]
        self._hash.update(lines.data)

    def value(self) -> int:
        """Of everything so far."""
        return self._hash.intdigest()


def sample_phase(policy: Policy, lease: LeaseKey) -> int | None:
    """Where lines are sampled under a lease: nobody who leaves pages out can rely on it."""
    return (lease.lease_id + lease.epoch) % (PAGE_BYTES // LINE_BYTES) * LINE_BYTES if policy == "sampled" else None


class ManifestBuilder:
    """Collects the checksums on the sending side. One user thread at a time."""

    def __init__(self, layout: KvLayout, policy: Policy, lease: LeaseKey) -> None:
        self.policy = policy
        self._layout = layout
        phase = sample_phase(policy, lease)
        self._digests = (
            None
            if policy == "count"
            else [[RowDigest(plane.block_bytes, phase) for _ in range(plane.num_layers)] for plane in layout.planes]
        )

    @property
    def hashes(self) -> bool:
        """Whether `add` costs anything."""
        return self._digests is not None

    def add(self, row: PlaneLayer, data: memoryview) -> None:
        """The next blocks of this plane row."""
        if self._digests is not None:
            self._digests[row.plane][row.layer].update(data)

    def build(self, num_tokens: int, num_blocks: int) -> Manifest:
        """The manifest of `num_blocks` sent blocks of a sequence of `num_tokens` tokens."""
        planes = []
        for index, plane in enumerate(self._layout.planes):
            sums = () if self._digests is None else tuple(digest.value() for digest in self._digests[index])
            num_bytes = num_blocks * plane.num_layers * plane.block_bytes
            planes.append(PlaneManifest(plane=plane.name, num_blocks=num_blocks, num_bytes=num_bytes, checksums=sums))
        return Manifest(num_tokens=num_tokens, planes=tuple(planes))


def check_counts(manifest: Manifest, layout: KvLayout, num_blocks: int, num_tokens: int, policy: Policy) -> str | None:
    """Compare everything but the bytes. None: it holds; otherwise what does not."""
    if manifest.num_tokens != num_tokens:
        return f"manifest covers {manifest.num_tokens} tokens, {num_tokens} were offered"
    names = [plane.plane for plane in manifest.planes]
    expected = [plane.name for plane in layout.planes]
    if names != expected:
        return f"manifest has planes {names}, expected {expected}"
    for claim, plane in zip(manifest.planes, layout.planes, strict=True):
        num_bytes = num_blocks * plane.num_layers * plane.block_bytes
        if (claim.num_blocks, claim.num_bytes) != (num_blocks, num_bytes):
            return (
                f"plane {plane.name}: {claim.num_blocks} blocks, {claim.num_bytes} bytes written, "
                f"expected {num_blocks} blocks, {num_bytes} bytes"
            )
        if policy != "count" and len(claim.checksums) != plane.num_layers:
            return f"plane {plane.name}: {len(claim.checksums)} checksums for {plane.num_layers} layers"
    return None


def block_checksum(layout: KvLayout, memory: memoryview, block: int) -> int:
    """xxh3-64 over one block of every plane and layer, in order (what a probe compares)."""
    digest = xxhash.xxh3_64()
    for plane in layout.planes:
        for layer in range(plane.num_layers):
            start = plane.address(layer, block, layout.num_blocks)
            digest.update(memory[start : start + plane.block_bytes])
    return digest.intdigest()


def checksum(data: bytes) -> int:
    """xxh3-64 of a buffer."""
    return xxhash.xxh3_64(data).intdigest()
