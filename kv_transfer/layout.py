"""Where blocks lie: which plane rows a model layer fills, how neighbours merge into runs, and what an offset means.

A *cell* is one block of one layer of one plane: the unit that is sent, counted and checked.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kv_transfer.link import Cells, Copy
from llm_engine.api.errors import LayoutMismatch, ProtocolError
from llm_engine.api.handoff import KvLayout

PIECE_BYTES = 1 << 20  # a copy is at most this long, or one block
_MTP = "mtp_"


class PlaneLayer(NamedTuple):
    """Row `layer` of plane number `plane`."""

    plane: int
    layer: int


class Run(NamedTuple):
    """`num_blocks` neighbours on both ends, starting at block `source` here and block `target` there."""

    source: int
    target: int
    num_blocks: int


class Blocks(tuple[int, ...]):
    """Block ids that are looked up for every layer: hashed, and made an array, once."""

    @classmethod
    def of(cls, blocks: Sequence[int]) -> Blocks:
        """The same object if it is one already."""
        return blocks if isinstance(blocks, Blocks) else cls(blocks)

    @property
    def array(self) -> npt.NDArray[np.int32]:
        """The same numbers; not to be changed."""
        try:
            return self._array
        except AttributeError:
            self._array: npt.NDArray[np.int32] = np.array(self, np.int32)
            return self._array

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            self._hash: int = super().__hash__()
            return self._hash


@functools.lru_cache(maxsize=64)
def layer_planes(layout: KvLayout) -> tuple[tuple[PlaneLayer, ...], ...]:
    """For each layer as the engine counts them (main layers, then MTP layers) the plane rows that it fills."""
    planes = list(enumerate(layout.planes))
    layers: list[tuple[PlaneLayer, ...]] = []
    for is_mtp in (False, True):
        group = [(index, plane) for index, plane in planes if plane.name.startswith(_MTP) == is_mtp]
        depth = max((plane.num_layers for _, plane in group), default=0)
        layers.extend(
            tuple(PlaneLayer(index, layer) for index, plane in group if layer < plane.num_layers)
            for layer in range(depth)
        )
    return tuple(layers)


def row_starts(layout: KvLayout) -> tuple[int, ...]:
    """Where the rows of each layer begin among all rows in the order of layers; after the last, their number."""
    return tuple(itertools.accumulate((len(rows) for rows in layer_planes(layout)), initial=0))


def plane_rows(layout: KvLayout) -> Iterator[PlaneLayer]:
    """Every plane row by its running number."""
    for index, plane in enumerate(layout.planes):
        yield from (PlaneLayer(index, layer) for layer in range(plane.num_layers))


def merge_runs(source_blocks: Sequence[int], target_blocks: Sequence[int]) -> list[Run]:
    """Pair the blocks up in order; neighbours on both ends become one run."""
    sources, targets = Blocks.of(source_blocks).array, Blocks.of(target_blocks).array
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} blocks here, {len(targets)} there")
    if not len(sources):
        return []
    starts = np.flatnonzero((np.diff(sources) != 1) | (np.diff(targets) != 1)) + 1
    bounds = [0, *starts.tolist(), len(sources)]
    return [Run(int(sources[first]), int(targets[first]), last - first) for first, last in itertools.pairwise(bounds)]


def count_runs(source_blocks: Sequence[int], target_blocks: Sequence[int]) -> int:
    """How many runs `merge_runs` would find."""
    sources, targets = Blocks.of(source_blocks).array, Blocks.of(target_blocks).array
    return 1 + int(np.count_nonzero((np.diff(sources) != 1) | (np.diff(targets) != 1))) if len(sources) else 0


class CopyPlan:
    """How blocks of `source` reach `target`. Built once per pair; both layouts hold the same planes."""

    def __init__(self, source: KvLayout, target: KvLayout) -> None:
        self.source = source
        self.target = target
        self.layers = layer_planes(source)
        self.most_layer_bytes = max(sum(source.planes[row.plane].block_bytes for row in rows) for rows in self.layers)

    def copies(self, row: PlaneLayer, runs: Sequence[Run]) -> Iterator[Copy]:
        """Copies of one plane row in run order, none longer than PIECE_BYTES unless a single block is."""
        source, target = self.source.planes[row.plane], self.target.planes[row.plane]
        size = source.block_bytes
        step = max(1, PIECE_BYTES // size)
        from_ = source.address(row.layer, 0, self.source.num_blocks)
        to = target.address(row.layer, 0, self.target.num_blocks)
        for run in runs:
            for first in range(0, run.num_blocks, step):
                length = min(step, run.num_blocks - first) * size
                yield Copy(from_ + (run.source + first) * size, to + (run.target + first) * size, length)

    def block_copies(self, block: int) -> Iterator[Copy]:
        """Copies that fill every plane and layer of target block `block` from one packed buffer (for probes)."""
        offset = 0
        for plane in self.target.planes:
            for layer in range(plane.num_layers):
                yield Copy(offset, plane.address(layer, block, self.target.num_blocks), plane.block_bytes)
                offset += plane.block_bytes


class CellMap:
    """Translates byte ranges of an arena into cells, refusing everything that is not exactly that."""

    def __init__(self, layout: KvLayout) -> None:
        self._num_blocks = layout.num_blocks
        rows = itertools.accumulate((p.num_layers for p in layout.planes), initial=0)
        self._planes = tuple(zip(layout.planes, rows, strict=False))
        self.num_rows = sum(p.num_layers for p in layout.planes)

    def locate(self, offset: int, num_bytes: int) -> Cells:
        """Cells covered by [offset, offset + num_bytes).

        Raises ProtocolError unless they are whole cells of one row.
        """
        for plane, first_row in self._planes:
            index, remainder = divmod(offset - plane.offset, plane.block_bytes)
            if not 0 <= index < plane.num_layers * self._num_blocks:
                continue
            layer, block = divmod(index, self._num_blocks)
            num_blocks, rest = divmod(num_bytes, plane.block_bytes)
            if remainder or rest or not 0 < num_blocks <= self._num_blocks - block:
                break
            return Cells(first_row + layer, block, num_blocks)
        raise ProtocolError(f"range [{offset}, {offset}+{num_bytes}) is not whole blocks of one layer of one plane")


def check_layout(layout: KvLayout, region_bytes: int) -> None:
    """Raises LayoutMismatch unless the planes are well formed, disjoint and inside the region."""
    if layout.num_blocks <= 0 or layout.block_tokens <= 0 or not layout.planes:
        raise LayoutMismatch(
            f"layout has {layout.num_blocks} blocks of {layout.block_tokens} tokens, no planes or none"
        )
    end = 0
    for plane in sorted(layout.planes, key=lambda p: p.offset):
        if plane.num_layers <= 0 or plane.block_bytes <= 0:
            raise LayoutMismatch(f"plane {plane.name}: {plane.num_layers} layers of {plane.block_bytes} bytes a block")
        if plane.offset < end:
            raise LayoutMismatch(f"plane {plane.name} at offset {plane.offset} overlaps bytes up to {end}")
        end = plane.offset + plane.num_layers * layout.num_blocks * plane.block_bytes
    if end > region_bytes:
        raise LayoutMismatch(f"layout needs {end} bytes, the region holds {region_bytes}")


def describe(layout: KvLayout) -> str:
    """The part of a layout that both ends must share, for messages."""
    planes = ", ".join(f"{p.name}[{p.num_layers} layers × {p.block_bytes} B]" for p in layout.planes)
    return f"blocks of {layout.block_tokens} tokens, {planes}"


def mismatch(writer: tuple[str, str, KvLayout], receiver: tuple[str, str, KvLayout]) -> str | None:
    """Why (name, format id, layout) of both ends don't fit, naming both; None if they do. Block counts may differ."""
    (writer_name, writer_format, ours), (receiver_name, receiver_format, theirs) = writer, receiver
    if writer_format != receiver_format:
        return (
            f"{writer_name} has cache format {writer_format}, {receiver_name} has {receiver_format}: "
            "serve the same model, weights, dtype and kv settings on both"
        )
    if describe(ours) != describe(theirs):
        return f"{writer_name} has {describe(ours)}; {receiver_name} has {describe(theirs)}"
    return None
