"""What is enqueued on a device region: blocks pushed to a peer, and checksums of blocks. Nothing here waits."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from kv_transfer.cuda import driver
from kv_transfer.device import WORD_BYTES, DeviceRegion, Mark, alignment, row_start
from kv_transfer.device_kernels import (
    COPY_TILE,
    DIGEST_TILE,
    SAMPLE_CELLS,
    SAMPLE_TILE,
    SLOTS,
    copy_cells,
    digest_cells,
)
from kv_transfer.launcher import Launcher
from kv_transfer.layout import CopyPlan, PlaneLayer, Run, layer_planes, plane_rows
from kv_transfer.manifest import PAGE_BYTES
from llm_engine.api.handoff import KvLayout

_WARPS = 4


class PeerMemory:
    """Device memory of another process, mapped at `address`, as an argument of kernels."""

    def __init__(self, address: int, dtype: torch.dtype = torch.int64) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        """Where it begins."""
        return self.address


Target: TypeAlias = "PeerMemory | Tensor"  # a tensor: the peer is this process (tests)
Copies: TypeAlias = Callable[[range, Tensor, Tensor], None]  # of layers, from blocks here to blocks there


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
    runs = region.long_runs(sources, targets, min(sizes))
    if region.stream is not None and runs:
        if ready is not None:
            region.stream.wait_event(ready)
        cuda = driver()
        cuda.bind(region.ordinal)
        cuda.copy(_engine_copies(region, target, plan, rows, runs), region.stream.cuda_stream)
    else:
        _scatter(region, target, plan, layers, sources, targets, ready)
    return len(sources) * sum(sizes)


def _engine_copies(
    region: DeviceRegion, target: Target, plan: CopyPlan, rows: Sequence[PlaneLayer], runs: Sequence[Run]
) -> list[tuple[int, int, int]]:
    """(to, from, bytes), plane by plane: where runs fill whole rows on both ends, rows that touch are one copy."""
    from_base, to_base = region.memory.data_ptr(), target.data_ptr()
    copies: list[tuple[int, int, int]] = []
    last_to = last_from = -1  # ends of the last copy
    for row in sorted(rows):
        size = plan.source.planes[row.plane].block_bytes
        to_row, from_row = to_base + row_start(plan.target, row), from_base + row_start(plan.source, row)
        for run in runs:
            to, from_, length = to_row + run.target * size, from_row + run.source * size, run.num_blocks * size
            if (to, from_) == (last_to, last_from):
                first_to, first_from, so_far = copies.pop()
                copies.append((first_to, first_from, so_far + length))
            else:
                copies.append((to, from_, length))
            last_to, last_from = to + length, from_ + length
    return copies


def _scatter(
    region: DeviceRegion,
    target: Target,
    plan: CopyPlan,
    layers: range,
    sources: Sequence[int],
    targets: Sequence[int],
    ready: Mark,
) -> None:
    copies = region.once((plan, target.data_ptr()), lambda: make_copies(region, target, plan))
    tables = region.table(sources), region.table(targets)
    with region.copying(ready):
        copies(layers, *tables)


def make_copies(region: DeviceRegion, target: Target, plan: CopyPlan) -> Copies:
    """By tensor copies where the card has them and the layouts suit them."""
    if _is_hopper(region.device):
        try:
            from kv_transfer.device_hopper import TileCopies, row_bytes
        except (ImportError, AttributeError):  # Gluon is experimental: names come and go
            return CellCopies(region, target, plan)
        if size := row_bytes(region, target, plan):
            return TileCopies(region, target, plan, size)
    return CellCopies(region, target, plan)


def _is_hopper(device: torch.device) -> bool:
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) == (9, 0)


class CellCopies:
    """Copies of blocks from a region to one target, by loads and stores of any card."""

    def __init__(self, region: DeviceRegion, target: Target, plan: CopyPlan) -> None:
        self._words, self._target = region.words, target
        cells = first_cells(plan)
        self._align = alignment(*itertools.chain.from_iterable(cells))
        self._rows = region.tensor(np.array(cells, np.int64) // WORD_BYTES)
        self._starts = row_starts(plan.source)
        self._most_words = max(size for _, _, size in cells) // WORD_BYTES

    def __call__(self, layers: range, source_blocks: Tensor, target_blocks: Tensor) -> None:
        """Enqueue copies of some blocks of consecutive layers on the current stream."""
        rows = self._rows[self._starts[layers.start] : self._starts[layers.stop]]
        tile = min(COPY_TILE, 1 << (self._most_words - 1).bit_length())
        copy_cells[(len(source_blocks), -(-self._most_words // tile), len(rows))](
            self._words, self._target, rows, source_blocks, target_blocks, ALIGN=self._align, TILE=tile,
            num_warps=_WARPS,
        )  # fmt: skip


def first_cells(plan: CopyPlan) -> list[tuple[int, int, int]]:
    """Of block 0 of every plane row in the order of layers: start in the source, in the target, bytes."""
    return [
        (row_start(plan.source, row), row_start(plan.target, row), plan.source.planes[row.plane].block_bytes)
        for rows in plan.layers
        for row in rows
    ]


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
        with self._lock:
            self._region.check_after(ready)
            self._launch(range(self._starts[layers.start], self._starts[layers.stop]), blocks, len(blocks), first)

    def fetch(self) -> None:
        """Everything was added: enqueue the way of the checksums to the host."""
        with self._lock:
            self._fetched_at = self._region.fetch(self._sums, self._on_host)
            self._fetched = True

    def rehearse(self, blocks: Sequence[int]) -> None:
        """The last of these blocks will soon be added and fetched: do it with none, as the first time after a pause
        is several times as slow."""
        with self._lock:
            self._launch(range(1), blocks, 0, 0)
            self._region.fetch(self._sums, self._on_host)

    def _launch(self, rows: range, blocks: Sequence[int], num_blocks: int, first: int) -> None:
        """The first `num_blocks` of `blocks`."""
        programs = max(1, -(-num_blocks // (1 if self._phase is None else SAMPLE_CELLS)))
        self._used = max(self._used, min(SLOTS, programs))
        self._kernel(
            (programs, len(rows), 1),
            self._region.words,
            self._rows,
            self._region.table(blocks),
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


def row_starts(layout: KvLayout) -> tuple[int, ...]:
    """Where the rows of each layer begin among all rows in the order of layers; after the last, their number."""
    return tuple(itertools.accumulate((len(rows) for rows in layer_planes(layout)), initial=0))
