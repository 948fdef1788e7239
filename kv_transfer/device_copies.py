"""Blocks pushed from a device region to a peer: enqueued, by copy engine or kernel. Nothing here waits."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from kv_transfer.cuda import driver
from kv_transfer.device import WORD_BYTES, DeviceRegion, Mark, alignment, row_start
from kv_transfer.device_kernels import COPY_TILE, copy_cells
from kv_transfer.layout import CopyPlan, PlaneLayer, Run, row_starts

log = logging.getLogger(__name__)

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
        copies = region.once((plan, target.data_ptr()), lambda: make_copies(region, target, plan))
        tables = region.table(sources), region.table(targets)
        with region.copying(ready):
            copies(layers, *tables)
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


def make_copies(region: DeviceRegion, target: Target, plan: CopyPlan) -> Copies:
    """By tensor copies where the card has them and the layouts suit them."""
    if _is_hopper(region.device):
        try:
            from kv_transfer.device_hopper import TileCopies, row_bytes
        except (ImportError, AttributeError) as exc:  # Gluon is experimental: names come and go
            log.warning("scattered blocks go by loads and stores, which slow the products beside them: %s", exc)
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
