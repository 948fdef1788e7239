"""Hand-offs from and to caches on a card, through host memory that every transport can reach.

The host memory has the planes of the caches with fewer blocks, its *slots*. A hand-off holds a slot for each of its
blocks: peers see slots, and the engine never learns of them.

outgoing   layer computed ─ event ─▶ copy on a side stream ─▶ slots are ready ─▶ the hand-off sends them
incoming   slots filled and verified ─▶ copy on a side stream, waited for ─▶ the engine admits the sequence

The compute stream waits for nothing. A hand-off takes all of its slots at once and in the order of arrival, so that no
two of them can wait for each other; until it has them its blocks stay pinned on the card, as for any slow peer.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm_engine.api.config import KvConfig
from llm_engine.api.errors import ConfigError
from llm_engine.api.handoff import KvLayout
from llm_engine.ops import to_device
from llm_engine.ops.table import Ops
from llm_engine.runtime.kv_store import KvStore, place_planes
from llm_engine.sched.free_runs import FreeRuns

_log = logging.getLogger(__name__)

_DEFAULT_BYTES = 256 << 20
_LONGEST = 2  # sequences of the largest length that must fit, unless kv.staging_mb says otherwise
_JOIN_S = 5.0
_BATCH = 16  # copies submitted before the first is waited for

Deliver = Callable[[int, int, Seq[int]], None]  # layer, index of the first block in its sequence, slots


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
    """The same planes twice, on a card and in host memory: copies of blocks between them, on a stream of its own."""

    def __init__(self, store: KvStore, layout: KvLayout, host: Tensor, ops: Ops) -> None:
        """`host`: flat uint8 that holds `layout`. One thread at a time may copy."""
        ops.pin(host)
        self.device = store.device
        self._stream = None if self.device.type == "cpu" else torch.Stream(self.device)
        self._rows: list[list[tuple[Tensor, Tensor]]] = []  # by layer: planes on the card and on the host
        for is_mtp in (False, True):
            group = [_rows_of(store.layout, store.arena, is_mtp), _rows_of(layout, host, is_mtp)]
            self._rows += [list(zip(*pair, strict=True)) for pair in zip(*group, strict=True)]

    @property
    def num_layers(self) -> int:
        """Main layers, then those of the draft layer."""
        return len(self._rows)

    def event(self) -> torch.Event | None:
        """The work submitted to the current stream so far."""
        if self._stream is None:
            return None
        event = torch.Event(self.device)
        event.record()
        return event

    def to_host(self, layer: int, blocks: Seq[int], slots: Seq[int], after: torch.Event | None) -> torch.Event | None:
        """Submit the copy of one layer's blocks once `after` has come to pass; returns its end."""
        with self._on_stream() as stream:
            if stream is not None and after is not None:
                stream.wait_event(after)
            ids = to_device(torch.tensor(blocks), self.device)
            for card, host in self._rows[layer]:
                gathered = card.index_select(0, ids)
                for start, slot, count in _runs(slots):
                    host[slot : slot + count].copy_(gathered[start : start + count], non_blocking=True)
            return self.event()

    def to_card(self, slots: Seq[int], blocks: Seq[int]) -> None:
        """Copy all layers of some slots and wait until that is done."""
        with self._on_stream() as stream:
            ids = to_device(torch.tensor(blocks), self.device)
            for rows in self._rows:
                for card, host in rows:
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


@dataclass(slots=True, eq=False)
class Sending:
    """One sequence's way to the host. `deliver` is called on the stager's thread, in the order of the reports."""

    stager: Stager
    num_blocks: int
    deliver: Deliver
    slots: list[int] = field(default_factory=list)
    parked: list[_Report] = field(default_factory=list)  # reported before there were slots
    in_flight: int = 0
    closed: bool = False

    def layer_ready(self, layer: int, first: int, blocks: Seq[int]) -> None:
        """Blocks `first …` of the sequence are submitted to the current stream. On the step thread; never waits."""
        self.stager.put(_Report(self, layer, first, blocks, self.stager.mirror.event()))

    def close(self) -> None:
        """Nobody reads the slots any more. Any thread; idempotent."""
        self.stager.release(self)


@dataclass(frozen=True, slots=True)
class _Report:
    sending: Sending
    layer: int
    first: int
    blocks: Seq[int]
    computed: torch.Event | None


class Stager:
    """Copies what is to be handed over from the card to the host, on a thread of its own."""

    def __init__(self, mirror: Mirror, num_slots: int, crash: Callable[[Exception], None]) -> None:
        """`crash` is told, on the stager's thread, what ended it."""
        self.mirror = mirror
        self._crash = crash
        self._lock = threading.Lock()
        self._free = FreeRuns(num_slots)
        self._waiting: deque[Sending] = deque()  # for slots
        self._inbox: queue.SimpleQueue[_Report | Sending | None] = queue.SimpleQueue()  # Sending: it has slots now
        self._thread = threading.Thread(target=self._run, name="kv-staging", daemon=True)
        self._thread.start()

    @property
    def num_free(self) -> int:
        """Slots that no hand-off holds."""
        return len(self._free)

    def open(self, num_blocks: int, deliver: Deliver) -> Sending:
        """Begin with a sequence of so many blocks."""
        sending = Sending(self, num_blocks, deliver)
        with self._lock:
            self._waiting.append(sending)
            self._assign()
        return sending

    def put(self, report: _Report) -> None:
        """Queue a copy. The queue is bounded by the blocks that sequences hold."""
        self._inbox.put(report)

    def release(self, sending: Sending) -> None:
        """See `Sending.close`."""
        with self._lock:
            if sending.closed:
                return
            sending.closed = True
            sending.parked.clear()
            if sending in self._waiting:
                self._waiting.remove(sending)
            self._reclaim(sending)

    def close(self) -> None:
        """End the thread; what is queued behind this is not copied."""
        self._inbox.put(None)
        self._thread.join(_JOIN_S)

    def _assign(self) -> None:
        """Give slots to those who wait, in order. With the lock held."""
        while self._waiting and self._waiting[0].num_blocks <= len(self._free):
            sending = self._waiting.popleft()
            sending.slots = self._free.take(sending.num_blocks)
            self._inbox.put(sending)

    def _reclaim(self, sending: Sending) -> None:
        """Take the slots back once nobody uses them. With the lock held."""
        if sending.closed and sending.in_flight == 0:
            self._free.add(sending.slots)
            sending.slots = []
            self._assign()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._round():
                    pass
        except Exception as exc:
            _log.critical("copies to the host failed", exc_info=True)
            self._crash(exc)

    def _round(self) -> bool:
        """Submit a few copies, then pass on each as it ends. False: closed."""
        items = [self._inbox.get()]
        with contextlib.suppress(queue.Empty):
            while len(items) < _BATCH:
                items.append(self._inbox.get_nowait())
        submitted = [self._submit(report) for item in items if item is not None for report in self._ready(item)]
        for report, slots, copied in submitted:
            if copied is not None:
                copied.synchronize()
            sending = report.sending
            if not sending.closed:
                sending.deliver(report.layer, report.first, slots)
            with self._lock:
                sending.in_flight -= 1
                self._reclaim(sending)
        return None not in items

    def _ready(self, item: _Report | Sending) -> list[_Report]:
        """What can be copied now, in the order of the reports: those without slots are parked until there are some."""
        sending = item.sending if isinstance(item, _Report) else item
        with self._lock:
            if sending.closed:
                return []
            if isinstance(item, _Report):
                sending.parked.append(item)
            if not sending.slots:
                return []
            ready, sending.parked = sending.parked, []
            sending.in_flight += len(ready)
            return ready

    def _submit(self, report: _Report) -> tuple[_Report, list[int], torch.Event | None]:
        slots = report.sending.slots[report.first : report.first + len(report.blocks)]
        return report, slots, self.mirror.to_host(report.layer, report.blocks, slots, report.computed)


class Inbound:
    """Slots that peers fill, and their way to the card. On the asyncio thread, but for `load`."""

    def __init__(self, mirror: Mirror, num_slots: int) -> None:
        self._mirror = mirror
        self._free = FreeRuns(num_slots)
        self._copying = threading.Lock()

    @property
    def num_free(self) -> int:
        """Slots that no hand-off holds."""
        return len(self._free)

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


def _rows_of(layout: KvLayout, arena: Tensor, is_mtp: bool) -> list[list[Tensor]]:
    """By layer: its planes as [blocks, block_bytes]."""
    planes = [plane for plane in layout.planes if plane.name.startswith("mtp_") == is_mtp]
    depth = max((plane.num_layers for plane in planes), default=0)
    views = []
    for plane in planes:
        size = plane.num_layers * layout.num_blocks * plane.block_bytes
        views.append(arena[plane.offset : plane.offset + size].view(plane.num_layers, layout.num_blocks, -1))
    return [[view[layer] for view in views] for layer in range(depth)]


def _runs(slots: Seq[int]) -> Iterator[tuple[int, int, int]]:
    """(place, first slot, length) of every run of neighbours."""
    for _, group in itertools.groupby(enumerate(slots), lambda item: item[1] - item[0]):
        members = list(group)
        yield members[0][0], members[0][1], len(members)
