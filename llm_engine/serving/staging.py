"""Hand-offs into caches on a card from peers that can't write there, through host memory that every transport reaches.

The host memory has the planes of the caches with fewer blocks, its *slots*. A hand-off holds a slot for each of its
blocks: peers see slots, and the engine never learns of them.

slots filled and verified ─▶ copy on a side stream, waited for ─▶ the engine admits the sequence
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from llm_engine.api.config import KvConfig
from llm_engine.api.errors import ConfigError
from llm_engine.api.handoff import KvLayout
from llm_engine.ops import to_device
from llm_engine.ops.table import Ops
from llm_engine.runtime.kv_store import KvStore, place_planes
from llm_engine.sched.free_runs import FreeRuns

_DEFAULT_BYTES = 256 << 20
_LONGEST = 2  # sequences of the largest length that must fit, unless kv.staging_mb says otherwise


def staging_layout(layout: KvLayout, kv: KvConfig, max_len: int) -> KvLayout:
    """Slots for a store's planes. Raises ConfigError when not even one sequence of `max_len` tokens fits."""
    longest = -(-max_len // layout.block_tokens)
    per_block = layout.bytes_per_block()
    if kv.staging_mb is None:
        slots = max(_LONGEST * longest, _DEFAULT_BYTES // per_block)
    else:
        slots = (kv.staging_mb << 20) // per_block
    slots = min(slots, layout.num_blocks)
    if slots < min(longest, layout.num_blocks):
        needed = -(-longest * per_block // (1 << 20))
        raise ConfigError(f"kv.staging_mb={kv.staging_mb}: expected at least {needed}, for {max_len} tokens; or unset")
    planes = [(plane.name, plane.num_layers, plane.block_bytes) for plane in layout.planes]
    return place_planes(planes, layout.block_tokens, slots)


class Mirror:
    """The same planes twice, on a card and in host memory: copies of blocks to the card, on a stream of its own."""

    def __init__(self, store: KvStore, layout: KvLayout, host: Tensor, ops: Ops) -> None:
        """`host`: flat uint8 that holds `layout`. One thread at a time may copy."""
        self.device = store.device
        self.pinned = False
        self._host = host
        self._ops = ops
        self._stream = None if self.device.type == "cpu" else torch.Stream(self.device)
        self._rows = list(zip(_rows_of(store.layout, store.arena), _rows_of(layout, host), strict=True))

    def pin(self) -> None:
        """Take the host memory and lock it, which makes copies fast; seconds for gigabytes. Raises ConfigError."""
        if not self.pinned:
            with self._on_stream():  # of the store's card, whatever the thread's was
                self._ops.pin(self._host)
            self.pinned = True

    def to_card(self, slots: Seq[int], blocks: Seq[int]) -> None:
        """Copy all layers of some slots and wait until that is done."""
        with self._on_stream() as stream:
            ids = to_device(torch.tensor(blocks), self.device)
            for card, host in self._rows:
                arrived = torch.empty(len(slots), *card.shape[1:], dtype=card.dtype, device=card.device)
                for start, slot, count in _runs(slots):
                    arrived[start : start + count].copy_(host[slot : slot + count], non_blocking=True)
                card.index_copy_(0, ids, arrived)
            if stream is not None:
                stream.synchronize()

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[torch.Stream | None]:
        if self._stream is None:
            yield None
            return
        torch.accelerator.set_device_index(self._stream.device_index)
        with self._stream:
            yield self._stream


class Inbound:
    """Slots that peers fill, and their way to the card. On the asyncio thread, but for `prepare` and `load`."""

    def __init__(self, mirror: Mirror, num_slots: int) -> None:
        self._mirror = mirror
        self._free = FreeRuns(num_slots)
        self._copying = threading.Lock()

    @property
    def num_free(self) -> int:
        """Slots that no hand-off holds."""
        return len(self._free)

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` was called."""
        return self._mirror.pinned

    def prepare(self) -> None:
        """Pin the slots' memory: at the start, or before the first peer that needs slots gets some. Blocks the calling
        thread, for seconds if there are gigabytes. Raises ConfigError; idempotent."""
        with self._copying, torch.inference_mode():
            self._mirror.pin()

    def take(self, count: int) -> list[int] | None:
        """Slots for a hand-off; None: not so many are free now."""
        return self._free.take(count) if count <= len(self._free) else None

    def give(self, slots: Seq[int]) -> None:
        """Nobody can write into them any more."""
        self._free.add(slots)

    def load(self, slots: Seq[int], blocks: Seq[int]) -> None:
        """Copy verified slots to blocks of the card; blocks the calling thread until they are there."""
        if slots:
            with self._copying, torch.inference_mode():
                self._mirror.to_card(slots, blocks)


def _rows_of(layout: KvLayout, arena: Tensor) -> list[Tensor]:
    """Every layer of every plane as [blocks, block_bytes]."""
    rows: list[Tensor] = []
    for plane in layout.planes:
        size = plane.num_layers * layout.num_blocks * plane.block_bytes
        rows += arena[plane.offset : plane.offset + size].view(plane.num_layers, layout.num_blocks, -1).unbind()
    return rows


def _runs(slots: Seq[int]) -> Iterator[tuple[int, int, int]]:
    """(place, first slot, length) of every run of neighbours."""
    for _, group in itertools.groupby(enumerate(slots), lambda item: item[1] - item[0]):
        members = list(group)
        yield members[0][0], members[0][1], len(members)
