"""The manifest over device memory: the same counts as on the host, with checksums computed where the bytes are."""

from __future__ import annotations

from collections.abc import Sequence

from kv_transfer.device import DeviceRegion, Mark
from kv_transfer.device_digests import DeviceDigests
from kv_transfer.link import LeaseKey
from kv_transfer.manifest import Policy, sample_phase
from llm_engine.api.handoff import KvLayout, Manifest, PlaneManifest


class DeviceManifest:
    """Collects the checksums on the sending side. Sender thread."""

    def __init__(self, region: DeviceRegion, layout: KvLayout, policy: Policy, lease: LeaseKey) -> None:
        self._layout = layout
        self._digests = None if policy == "count" else DeviceDigests(region, layout, sample_phase(policy, lease))

    def add(self, layers: range, blocks: Sequence[int], first: int, ready: Mark = None) -> None:
        """Blocks of consecutive layers, from position `first` of the lease on, complete at `ready`. Enqueues."""
        if self._digests is not None:
            self._digests.add(layers, blocks, first, ready)

    def seal(self) -> None:
        """Everything was added: `build` will find the checksums on the host. Enqueues."""
        if self._digests is not None:
            self._digests.fetch()

    def build(self, num_tokens: int, num_blocks: int) -> Manifest:
        """The manifest of `num_blocks` sent blocks of a sequence of `num_tokens` tokens. Waits for the device."""
        values = self._digests.values() if self._digests is not None else []
        planes = [
            PlaneManifest(
                plane=plane.name,
                num_blocks=num_blocks,
                num_bytes=num_blocks * plane.num_layers * plane.block_bytes,
                checksums=tuple(values[index]) if values else (),
            )
            for index, plane in enumerate(self._layout.planes)
        ]
        return Manifest(num_tokens=num_tokens, planes=tuple(planes))
