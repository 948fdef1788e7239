"""The completeness proof of a hand-off: counts for every plane, and a checksum for every layer of it.

The writer hashes its own bytes in block order while it sends them; the receiver hashes the memory where they should be.
A block that never arrived, arrived elsewhere, was cut, overwritten or changed on the way gives another checksum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import xxhash

from kv_transfer.layout import PlaneLayer, merge_runs
from llm_engine.api.handoff import KvLayout, Manifest, PlaneManifest

Policy = Literal["full", "count"]


class ManifestBuilder:
    """Collects the checksums on the sending side. One user thread at a time."""

    def __init__(self, layout: KvLayout, policy: Policy) -> None:
        self._layout = layout
        self._hashes = (
            [[xxhash.xxh3_64() for _ in range(plane.num_layers)] for plane in layout.planes]
            if policy == "full"
            else None
        )

    def add(self, row: PlaneLayer, data: memoryview) -> None:
        """The next bytes of this plane row."""
        if self._hashes is not None:
            self._hashes[row.plane][row.layer].update(data)

    def build(self, num_tokens: int, num_blocks: int) -> Manifest:
        """The manifest of `num_blocks` sent blocks of a sequence of `num_tokens` tokens."""
        planes = []
        for index, plane in enumerate(self._layout.planes):
            sums = () if self._hashes is None else tuple(h.intdigest() for h in self._hashes[index])
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
        if policy == "full" and len(claim.checksums) != plane.num_layers:
            return f"plane {plane.name}: {len(claim.checksums)} checksums for {plane.num_layers} layers"
    return None


def rows_of(layout: KvLayout) -> list[PlaneLayer]:
    """Every plane row, in order."""
    return [PlaneLayer(index, layer) for index, plane in enumerate(layout.planes) for layer in range(plane.num_layers)]


def check_bytes(
    manifest: Manifest, layout: KvLayout, memory: memoryview, blocks: Sequence[int], rows: Sequence[PlaneLayer]
) -> str | None:
    """Compare the checksums of these rows with the arena bytes `memory`. None: they hold."""
    for row in rows:
        if manifest.planes[row.plane].checksums[row.layer] != row_checksum(layout, row, memory, blocks):
            name = layout.planes[row.plane].name
            return f"plane {name}, layer {row.layer}: the bytes here are not the bytes that were sent"
    return None


def row_checksum(layout: KvLayout, row: PlaneLayer, memory: memoryview, blocks: Sequence[int]) -> int:
    """xxh3-64 over `blocks` of one plane row, in that order."""
    plane = layout.planes[row.plane]
    digest = xxhash.xxh3_64()
    for run in merge_runs(blocks, blocks):
        start = plane.address(row.layer, run.source, layout.num_blocks)
        digest.update(memory[start : start + run.num_blocks * plane.block_bytes])
    return digest.intdigest()


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
