"""What is enqueued on a device region: blocks pushed to a peer, and checksums of blocks. Nothing here waits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kv_transfer.cuda import driver
from kv_transfer.device import WORD_BYTES, DeviceRegion, Mark, alignment, are_long, row_start
from kv_transfer.device_kernels import COPY_TILE, DIGEST_TILE, SAMPLE_TILE, copy_cells, digest_cells
from kv_transfer.layout import CopyPlan, PlaneLayer, layer_planes, plane_rows
from kv_transfer.manifest import PAGE_BYTES
from llm_engine.api.handoff import KvLayout

_WARPS = 4


class PeerMemory:
    """Device memory of another process, mapped at `address`, as an argument of kernels."""

    dtype = torch.int64

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        """Where it begins."""
        return self.address


Target: TypeAlias = "PeerMemory | Tensor"  # a tensor: the peer is this process (tests)


def push_blocks(
    region: DeviceRegion,
    target: Target,
    plan: CopyPlan,
    layers: range,
    sources: Sequence[int],
    targets: Sequence[int],
    ready: Mark = None,
) -> int:
    """Enqueue copies of blocks of consecutive layers: by copy engine where runs are long, else by one kernel. Bytes.

    They begin when the device has passed `ready`.
    """
    rows = [row for layer in layers for row in plan.layers[layer]]
    sizes = [plan.source.planes[row.plane].block_bytes for row in rows]
    runs = region.runs(sources, targets)
    if region.stream is not None and are_long(runs, len(sources), min(sizes)):
        base, stream = region.memory.data_ptr(), region.stream.cuda_stream
        cuda = driver()
        cuda.bind(region.ordinal)
        with region.copying(ready):
            for row, size in zip(rows, sizes, strict=True):
                from_, to = base + row_start(plan.source, row), target.data_ptr() + row_start(plan.target, row)
                cuda.copy(
                    [(to + run.target * size, from_ + run.source * size, run.num_blocks * size) for run in runs], stream
                )
    else:
        _scatter(region, target, plan, layers, sources, targets, ready)
    return len(sources) * sum(sizes)


def _scatter(
    region: DeviceRegion,
    target: Target,
    plan: CopyPlan,
    layers: range,
    sources: Sequence[int],
    targets: Sequence[int],
    ready: Mark,
) -> None:
    table = region.once(("copy", plan.source, plan.target), lambda: _copy_rows(region, plan))
    tables = region.table(sources), region.table(targets)
    first, last = row_bounds(plan.layers, layers)
    largest = max(plane.block_bytes for plane in plan.source.planes) // WORD_BYTES
    tile = min(COPY_TILE, 1 << (largest - 1).bit_length())
    with region.copying(ready):
        copy_cells[(len(sources), -(-largest // tile), last - first)](
            region.words, target, table.rows[first:last], *tables, ALIGN=table.align, TILE=tile, num_warps=_WARPS
        )


class _CopyRows(NamedTuple):
    """Plane rows on the device in the order of layers, and the words that divide all their starts and cells."""

    rows: Tensor
    align: int


def _copy_rows(region: DeviceRegion, plan: CopyPlan) -> _CopyRows:
    entries = [
        (row_start(plan.source, row), row_start(plan.target, row), plan.source.planes[row.plane].block_bytes)
        for rows in plan.layers
        for row in rows
    ]
    align = alignment(*(size for entry in entries for size in entry))
    words = [[size // WORD_BYTES for size in entry] for entry in entries]
    return _CopyRows(region.tensor(words, torch.int64), align)


def _digest_rows(region: DeviceRegion, layout: KvLayout) -> Tensor:
    numbers = {row: number for number, row in enumerate(plane_rows(layout))}
    entries = []
    for row in (row for rows in layer_planes(layout) for row in rows):
        size = layout.planes[row.plane].block_bytes
        start = row_start(layout, row) // WORD_BYTES
        entries.append((start, size // WORD_BYTES, numbers[row], int(size > PAGE_BYTES)))
    return region.tensor(entries, torch.int64)


class DeviceDigests:
    """Checksums of a lease's plane rows, over blocks in the order of the lease. Thread-safe."""

    def __init__(self, region: DeviceRegion, layout: KvLayout, phase: int | None) -> None:
        """`phase`: see manifest.sample_phase."""
        self._region = region
        self._layout = layout
        self._layers = layer_planes(layout)
        self._phase = phase
        self._rows = region.once(("digest", layout), lambda: _digest_rows(region, layout))
        self._lock = threading.Lock()
        with region.checking():
            self._sums = torch.zeros(len(self._rows), dtype=torch.int64, device=region.device)

    def add(self, layers: range, blocks: Sequence[int], first: int, ready: Mark = None) -> None:
        """Enqueue, for consecutive layers: `blocks` are the lease's blocks from position `first` on.

        They are read when the device has passed `ready`.
        """
        begin, end = row_bounds(self._layers, layers)
        with self._lock:
            table = self._region.table(blocks)
            with self._region.checking(ready):
                digest_cells[(len(blocks), end - begin)](
                    self._region.words,
                    self._rows[begin:end],
                    table,
                    self._sums,
                    first,
                    0 if self._phase is None else self._phase // WORD_BYTES,
                    SAMPLED=self._phase is not None,
                    TILE=DIGEST_TILE if self._phase is None else SAMPLE_TILE,
                    num_warps=4,
                )

    def values(self) -> list[list[int]]:
        """Of every plane's layers, as unsigned numbers. Waits for what was added on this region."""
        with self._lock, self._region.checking():
            flat = [value % (1 << 64) for value in self._sums.tolist()]
        values, start = [], 0
        for plane in self._layout.planes:
            values.append(flat[start : start + plane.num_layers])
            start += plane.num_layers
        return values


def row_bounds(layers: Sequence[Sequence[PlaneLayer]], wanted: range) -> tuple[int, int]:
    """Where the rows of consecutive layers lie among all rows in the order of layers."""
    first = sum(len(rows) for rows in layers[: wanted.start])
    return first, first + sum(len(rows) for rows in layers[wanted.start : wanted.stop])
