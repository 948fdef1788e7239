"""Checksums of blocks in device memory: enqueued, and fetched. Nothing here waits but `values`."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kv_transfer.device import WORD_BYTES, DeviceRegion, Mark, row_start
from kv_transfer.device_kernels import DIGEST_TILE, SAMPLE_CELLS, SAMPLE_TILE, SLOTS, digest_cells
from kv_transfer.launcher import Launcher
from kv_transfer.layout import layer_planes, plane_rows, row_starts
from kv_transfer.manifest import PAGE_BYTES
from llm_engine.api.handoff import KvLayout


def _digest_rows(region: DeviceRegion, layout: KvLayout) -> Tensor:
    numbers = {row: number for number, row in enumerate(plane_rows(layout))}
    entries = []
    for row in (row for rows in layer_planes(layout) for row in rows):
        size = layout.planes[row.plane].block_bytes
        start = row_start(layout, row) // WORD_BYTES
        entries.append((start, size // WORD_BYTES, numbers[row], int(size > PAGE_BYTES)))
    return region.tensor(np.array(entries, np.int64))


def _digest_kernel(region: DeviceRegion, *, sampled: bool) -> Launcher:
    cells, tile = (SAMPLE_CELLS, SAMPLE_TILE) if sampled else (1, DIGEST_TILE)
    return Launcher(region, digest_cells, 4, SLOTS=SLOTS, SAMPLED=sampled, CELLS=cells, TILE=tile)


class DeviceDigests:
    """Checksums of a lease's plane rows, over blocks in the order of the lease. Thread-safe."""

    def __init__(self, region: DeviceRegion, layout: KvLayout, phase: int | None) -> None:
        """`phase`: see manifest.sample_phase."""
        self._region = region
        self._planes = layout.planes
        self._starts = row_starts(layout)
        self._phase = phase
        self._rows = region.once(("digest", layout), lambda: _digest_rows(region, layout))
        self._kernel = region.once(("sums", phase is None), lambda: _digest_kernel(region, sampled=phase is not None))
        self._used = 0  # slots
        self._lock = threading.Lock()
        with region.checking():
            self._sums = torch.zeros((SLOTS, len(self._rows)), dtype=torch.int64, device=region.device)
            self._on_host = torch.empty(self._sums.shape, dtype=torch.int64, pin_memory=self._sums.is_cuda)
        self._values = self._on_host.numpy().view(np.uint64)
        self._fetched = False  # or under way to the host: there once the card has passed the mark
        self._fetched_at: Mark = None

    def add(self, layers: range, blocks: Sequence[int], first: int, ready: Mark = None) -> None:
        """Enqueue, for consecutive layers: `blocks` are the lease's blocks from position `first` on.

        They are read when the device has passed `ready`.
        """
        rows = range(self._starts[layers.start], self._starts[layers.stop])
        with self._lock:
            table = self._region.table(blocks)  # a new one waits for what is on the stream: not for `ready`
            self._region.check_after(ready)
            self._launch(rows, table, len(blocks), first)

    def fetch(self) -> None:
        """Everything was added: enqueue the way of the checksums to the host."""
        with self._lock:
            self._fetched_at = self._region.fetch(self._sums, self._on_host)
            self._fetched = True

    def rehearse(self, blocks: Sequence[int]) -> None:
        """The last of these blocks will soon be added and fetched: do it with none, as the first time after a pause
        is several times as slow."""
        with self._lock:
            self._launch(range(1), self._region.table(blocks), 0, 0)
            self._region.fetch(self._sums, self._on_host)

    def _launch(self, rows: range, blocks: Tensor, num_blocks: int, first: int) -> None:
        """The first `num_blocks` of `blocks`."""
        programs = max(1, -(-num_blocks // (1 if self._phase is None else SAMPLE_CELLS)))
        self._used = max(self._used, min(SLOTS, programs))
        self._kernel(
            (programs, len(rows), 1),
            self._region.words,
            self._rows,
            blocks,
            self._sums,
            num_blocks,
            len(self._rows),
            rows.start,
            first,
            0 if self._phase is None else self._phase // WORD_BYTES,
        )

    def values(self) -> list[list[int]]:
        """Of every plane's layers, as unsigned numbers. Waits for what was added on this region."""
        if not self._fetched:
            self.fetch()
        self._region.wait(self._fetched_at)
        used = self._values[: self._used]
        flat = (used[0] if len(used) == 1 else used.sum(axis=0, dtype=np.uint64)).tolist()
        values, start = [], 0
        for plane in self._planes:
            values.append(flat[start : start + plane.num_layers])
            start += plane.num_layers
        return values
