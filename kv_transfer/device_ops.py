"""What is enqueued on a device region: blocks pushed to a peer, and checksums of blocks. Nothing here waits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kv_transfer.cuda import driver
from kv_transfer.device import WORD_BYTES, DeviceRegion, alignment, long_runs, row_start, sampled_words
from kv_transfer.device_kernels import COPY_TILE, DIGEST_TILE, copy_cells, digest_cells
from kv_transfer.layout import CopyPlan, PlaneLayer, plane_rows
from llm_engine.api.handoff import KvLayout

_WARPS = 8


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
    rows: Sequence[PlaneLayer],
    sources: Sequence[int],
    targets: Sequence[int],
) -> int:
    """Enqueue copies of blocks of these plane rows: by copy engine where runs are long, else by kernel. Bytes."""
    num_bytes = 0
    for row in rows:
        size = plan.source.planes[row.plane].block_bytes
        from_, to = row_start(plan.source, row), row_start(plan.target, row)
        runs = long_runs(sources, targets, size)
        if runs is not None and region.stream is not None:
            base = region.memory.data_ptr()
            cuda = driver()
            cuda.bind(region.ordinal)
            cuda.copy(
                [(target.data_ptr() + to + t * size, base + from_ + s * size, n * size) for s, t, n in runs],
                region.stream.cuda_stream,
            )
        else:
            _scatter(region, target, (from_, to, size), sources, targets)
        num_bytes += len(sources) * size
    return num_bytes


def _scatter(
    region: DeviceRegion, target: Target, where: tuple[int, int, int], sources: Sequence[int], targets: Sequence[int]
) -> None:
    """`where`: bytes at which the row begins here and there, and of a cell."""
    from_, to, size = where
    tables = region.table(sources), region.table(targets)
    words = size // WORD_BYTES
    tile = min(COPY_TILE, 1 << (words - 1).bit_length())
    with region.queue():
        copy_cells[(len(sources), -(-words // tile))](
            region.words,
            target,
            *tables,
            from_ // WORD_BYTES,
            to // WORD_BYTES,
            WORDS=words,
            ALIGN=alignment(from_, to, size),
            TILE=tile,
            num_warps=_WARPS,
        )


class DeviceDigests:
    """Checksums of a lease's plane rows, over blocks in the order of the lease. Thread-safe."""

    def __init__(self, region: DeviceRegion, layout: KvLayout, phase: int | None) -> None:
        """`phase`: see manifest.sample_phase."""
        self._region = region
        self._layout = layout
        self._phase = phase
        self._numbers = {row: number for number, row in enumerate(plane_rows(layout))}
        self._lock = threading.Lock()
        with region.queue():
            self._sums = torch.zeros(len(self._numbers), dtype=torch.int64, device=region.device)

    def add(self, row: PlaneLayer, blocks: Sequence[int], first: int) -> None:
        """Enqueue: `blocks` are the lease's blocks from position `first` on."""
        size = self._layout.planes[row.plane].block_bytes
        taken, phase, sampled = sampled_words(size, self._phase)
        number = self._numbers[row]
        with self._lock:
            table = self._region.table(blocks)
            with self._region.queue():
                digest_cells[(len(blocks),)](
                    self._region.words,
                    table,
                    self._sums[number : number + 1],
                    row_start(self._layout, row) // WORD_BYTES,
                    first,
                    phase,
                    WORDS=size // WORD_BYTES,
                    TAKEN=taken,
                    SAMPLED=sampled,
                    TILE=min(DIGEST_TILE, 1 << (taken - 1).bit_length()),
                    num_warps=4,
                )

    def values(self) -> list[list[int]]:
        """Of every plane's layers, as unsigned numbers. Waits for the region's stream."""
        with self._lock, self._region.queue():
            flat = [value % (1 << 64) for value in self._sums.tolist()]
        values, start = [], 0
        for plane in self._layout.planes:
            values.append(flat[start : start + plane.num_layers])
            start += plane.num_layers
        return values
