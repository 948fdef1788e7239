"""A link that misbehaves on purpose, for tests: every outcome must be a rejection or the right bytes."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from kv_transfer.link import Copy, LeaseKey, Link, Sent, no_news
from llm_engine.api.errors import TransferError


class Fault(enum.Enum):
    """What happens to one copy."""

    NONE = "none"
    DROP = "drop"  # it never arrives
    TRUNCATE = "truncate"  # its second half never arrives
    DUPLICATE = "duplicate"  # it arrives twice
    FLIP = "flip"  # one bit of it changes
    SWAP = "swap"  # it arrives with the bytes of an earlier copy of its length
    LATE = "late"  # it arrives only when `deliver_late` is called (networks do that; shared memory can't)


class FaultyLink:
    """Wraps a link; `choose` decides the fate of each copy in turn."""

    def __init__(self, inner: Link, choose: Callable[[], Fault]) -> None:
        self.transport = inner.transport
        self._inner = inner
        self._choose = choose
        self._lock = threading.Lock()
        self._late: list[tuple[LeaseKey, bytes, Copy]] = []
        self._before: dict[int, bytes] = {}  # the last copy of each length

    def write(
        self,
        lease: LeaseKey,
        source: memoryview,
        copies: Sequence[Copy],
        stopped: Callable[[], bool],
        sent: Sent = no_news,
    ) -> None:
        """See Link.write."""
        for index, copy in enumerate(copies):
            sent(index, 0, copy.num_bytes)
            fault = self._choose()
            original = bytes(source[copy.source : copy.source + copy.num_bytes])
            data = bytearray(original)
            copy = copy._replace(source=0)
            if fault is Fault.FLIP:
                data[len(data) // 2] ^= 0x10
            elif fault is Fault.TRUNCATE:
                copy = copy._replace(num_bytes=copy.num_bytes // 2)
            elif fault is Fault.SWAP:
                data[:] = self._before.get(len(data), original)
            self._before[len(original)] = original
            if fault is Fault.LATE:
                with self._lock:
                    self._late.append((lease, bytes(data), copy))
            elif fault is not Fault.DROP:
                for _ in range(2 if fault is Fault.DUPLICATE else 1):
                    self._inner.write(lease, memoryview(data), [copy], stopped)

    def deliver_late(self) -> int:
        """Let the held copies arrive now; bytes sent. The receiver may cut the link meanwhile."""
        with self._lock:
            late, self._late = self._late, []
        for lease, data, copy in late:
            try:
                self._inner.write(lease, memoryview(data), [copy], lambda: False)
            except TransferError:
                break
        return sum(copy.num_bytes for _, _, copy in late)

    def confirm(self, lease: LeaseKey) -> Future[int | None]:
        """See Link.confirm."""
        return self._inner.confirm(lease)

    def close(self) -> None:
        """See Link.close."""
        self._inner.close()
