"""Device memory that blocks are sent from and received into, without a way through host memory.

A region is one flat tensor of bytes, laid out as `KvLayout` says. Work on it is enqueued on streams of its own, one for
copies and one for checksums: the compute stream is never made to wait, and they wait for it by events only.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, TypeVar

import msgspec
import numpy.typing as npt
import torch
from torch import Tensor

from kv_transfer.cuda import driver
from kv_transfer.host import host_id
from kv_transfer.layout import Blocks, PlaneLayer, Run, count_runs, merge_runs
from llm_engine.api.errors import LayoutMismatch, TransferError
from llm_engine.api.handoff import KvLayout

WORD_BYTES = 8
_ENGINE_RUN_BYTES = 4 << 20  # runs at least so long on average are left to the copy engines
_KEPT_MARKS = 1024
_KEPT = 32  # concurrent hand-offs, times two ends
T = TypeVar("T")
Mark: TypeAlias = "torch.cuda.Event | None"


class Descriptor(msgspec.Struct, frozen=True, kw_only=True):
    """How another process of the host finds a region: a handle of the allocation, and the place in it."""

    device: str  # uuid of the card
    driver: int
    handle: bytes
    offset: int
    num_bytes: int
    allocation_bytes: int

    def check(self, layout_bytes: int) -> None:
        """Raises TransferError unless the region lies inside its allocation and holds the layout."""
        if len(self.handle) != 64 or self.offset < 0 or self.offset + self.num_bytes > self.allocation_bytes:
            raise TransferError(
                f"device region of {self.num_bytes} bytes at {self.offset} of {self.allocation_bytes}: not inside"
            )
        if self.num_bytes < layout_bytes:
            raise TransferError(f"device region holds {self.num_bytes} bytes, the layout needs {layout_bytes}")


class DeviceRegion:
    """`memory`: flat uint8 tensor. `region` names it for this life of the process, as `Arena.region` does."""

    shared = False

    def __init__(self, memory: Tensor) -> None:
        """Raises LayoutMismatch for memory of another kind."""
        if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
            raise LayoutMismatch(f"device region: expected flat bytes, not {memory.dtype} {tuple(memory.shape)}")
        if memory.device.type not in ("cpu", "cuda"):  # of others it is not known how to wait for what computes
            raise LayoutMismatch(f"device region: memory of {memory.device.type} can't be handed over")
        if memory.data_ptr() % WORD_BYTES:
            raise LayoutMismatch(f"device region: {memory.data_ptr():#x} is not the address of a word of 8 bytes")
        self.memory = memory
        self.words = memory[: memory.numel() // WORD_BYTES * WORD_BYTES].view(torch.int64)
        self.region = secrets.token_hex(8)
        self.num_bytes = memory.numel()
        self.device = memory.device
        self.stream = _stream(memory)
        self._check_stream = _stream(memory)
        self._marks: deque[torch.cuda.Event] = deque(maxlen=_KEPT_MARKS)
        self._fetches: deque[tuple[Mark, Tensor]] = deque()  # under way, or just over
        self._last_stream: tuple[int, torch.cuda.Stream] | None = None  # of `mark`, with its handle
        self._lock = threading.Lock()
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self._runs: dict[tuple[Blocks, Blocks, int], list[Run]] = {}
        self._once: dict[object, Any] = {}

    @property
    def ordinal(self) -> int:
        """Index of the card among those visible here."""
        return self.device.index or 0

    @property
    def check_handle(self) -> int:
        """The driver's handle of the checksums' stream."""
        return self._check_stream.cuda_stream if self._check_stream is not None else 0

    @property
    def uuid(self) -> str:
        """Of the card."""
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def describe(self) -> Descriptor:
        """Raises TransferError when the driver can't share the memory."""
        cuda = driver()
        cuda.bind(self.ordinal)
        handle, offset, size = cuda.export(self.memory.data_ptr())
        return Descriptor(
            device=self.uuid,
            driver=cuda.version,
            handle=handle,
            offset=offset,
            num_bytes=self.num_bytes,
            allocation_bytes=size,
        )

    def mark(self) -> Mark:
        """Everything enqueued so far on the caller's stream. Step thread."""
        if self.stream is None:
            return None
        return self._record(self._current_stream())

    def copied(self) -> Mark:
        """Every copy enqueued so far."""
        return self._record(self.stream)

    def checked(self) -> Mark:
        """Every checksum enqueued so far."""
        return self._record(self._check_stream)

    def fetch(self, source: Tensor, target: Tensor) -> Mark:
        """Enqueue a copy into pinned memory of the host, behind every checksum so far; the end of it.

        The target is kept until then, whoever else lets it go.
        """
        if self._check_stream is None:
            target.copy_(source)
            return None
        cuda, num_bytes = driver(), source.numel() * source.element_size()
        cuda.bind(self.ordinal)
        cuda.copy([(target.data_ptr(), source.data_ptr(), num_bytes)], self.check_handle)
        mark = self.checked()
        with self._lock:
            self._fetches.append((mark, target))
            while self._fetches and self.reached(self._fetches[0][0]):
                self._fetches.popleft()
        return mark

    def recycle(self, marks: Iterable[Mark]) -> None:
        """Nobody will ask for these any more; what was enqueued behind them stays so."""
        self._marks.extend(mark for mark in marks if mark is not None)

    def reached(self, mark: Mark) -> bool:
        """Whether the device has passed `mark`."""
        return mark is None or bool(mark.query())  # type: ignore[no-untyped-call]

    def copying(self, after: Mark = None) -> AbstractContextManager[object]:
        """What torch and Triton enqueue inside goes to the copies' stream, behind `after`."""
        return _behind(self.stream, after)

    def checking(self) -> AbstractContextManager[object]:
        """What torch and Triton enqueue inside goes to the checksums' stream."""
        return _behind(self._check_stream, None)

    def check_after(self, mark: Mark) -> None:
        """What is enqueued on the checksums' stream from now on runs when the device has passed `mark`."""
        if self._check_stream is not None and mark is not None:
            self._check_stream.wait_event(mark)

    def synchronize(self) -> None:
        """Wait, without the interpreter's lock, until every copy has been done. Checksums may still be running."""
        if self.stream is not None:
            self.stream.synchronize()

    def wait(self, mark: Mark) -> None:
        """The same until the device has passed `mark`."""
        if mark is not None:
            mark.synchronize()

    def tensor(self, values: npt.NDArray[Any]) -> Tensor:
        """Numbers on the device, for work on both streams. Waits for the checksums enqueued so far, not for copies."""
        with self.checking():
            made = torch.from_numpy(values).to(self.device, copy=True)
        if self.stream is not None:
            made.record_stream(self.stream)
        return made

    def table(self, blocks: Sequence[int]) -> Tensor:
        """Block ids on the device; the last few are kept, because every layer of a chunk asks for the same."""
        key = Blocks.of(blocks)
        return self._keep(self._tables, key, lambda: self.tensor(key.array))

    def long_runs(self, sources: Sequence[int], targets: Sequence[int], block_bytes: int) -> list[Run]:
        """Neighbours on both ends, if they are long enough on average for the copy engines; kept like tables."""
        key = (Blocks.of(sources), Blocks.of(targets), block_bytes)

        def find() -> list[Run]:
            few = are_long(count_runs(*key[:2]), len(sources), block_bytes)
            return merge_runs(*key[:2]) if few else []

        return self._keep(self._runs, key, find)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What `make` puts on the device, the first time that it is asked for."""
        value: T = self._keep(self._once, key, make)
        return value

    def _current_stream(self) -> torch.cuda.Stream:
        """The caller's; looked up anew only when it is another one, because a step asks once a layer."""
        handle, last = torch._C._cuda_getCurrentRawStream(self.ordinal), self._last_stream
        if last is None or handle != last[0]:
            last = self._last_stream = handle, torch.cuda.current_stream(self.device)
        return last[1]

    def _record(self, stream: torch.cuda.Stream | None) -> Mark:
        if stream is None:
            return None
        try:
            event = self._marks.pop()
        except IndexError:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def _keep(self, kept: dict[Any, T], key: object, make: Callable[[], T]) -> T:
        with self._lock:
            value = kept.pop(key, None)
            if value is None:
                value = make()
            kept[key] = value
            if len(kept) > _KEPT:
                del kept[next(iter(kept))]
        return value


def _stream(memory: Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(memory.device, priority=-1) if memory.is_cuda else None  # type: ignore[no-untyped-call]


def _behind(stream: torch.cuda.Stream | None, mark: Mark) -> AbstractContextManager[object]:
    if stream is None:
        return nullcontext()
    if mark is not None:
        stream.wait_event(mark)
    return torch.cuda.stream(stream)


def missing(region: DeviceRegion) -> str:
    """Why peers can't reach the region, or ""."""
    if region.stream is None:
        return f"the caches are on {region.device}, not on a card"
    if not place_id():
        return "/proc is not readable, so peers can't tell whether they share a host"
    try:
        region.describe()
    except TransferError as exc:
        return str(exc)
    return ""


def place_id() -> str:
    """Equal on two processes exactly if one can map the other's device memory and see it end; "" if unknown."""
    try:
        return f"{host_id()}/{os.stat('/proc/self/ns/pid').st_ino}/{driver().version}"
    except (OSError, TransferError):
        return ""


def check_words(layout: KvLayout) -> None:
    """Raises LayoutMismatch unless every cell begins and ends on a word."""
    for plane in layout.planes:
        if plane.offset % WORD_BYTES or plane.block_bytes % WORD_BYTES:
            raise LayoutMismatch(
                f"plane {plane.name}: blocks of {plane.block_bytes} bytes at {plane.offset} are not words of 8 bytes"
            )


def row_start(layout: KvLayout, row: PlaneLayer) -> int:
    """First byte of a plane row."""
    return layout.planes[row.plane].address(row.layer, 0, layout.num_blocks)


def alignment(*num_bytes: int) -> int:
    """The largest power of two, at most two words, that divides them all, in words."""
    return 2 if all(size % 16 == 0 for size in num_bytes) else 1


def are_long(num_runs: int, num_blocks: int, block_bytes: int) -> bool:
    """Whether runs of such blocks are long enough, on average, for the copy engines."""
    return num_blocks * block_bytes >= _ENGINE_RUN_BYTES * num_runs
