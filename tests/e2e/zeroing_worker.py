"""A prefill worker whose hand-offs lose the indexer's pages: they arrive in time and in full, but hold zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import prefill_worker.main
import prefill_worker.worker
from kv_transfer.link import Copy, LeaseKey, Link, Sent, no_news
from kv_transfer.writer import HandoffClient
from llm_engine.api.handoff import KvLayout


class ZeroIndexLink:
    """Wraps a link; what comes from an index plane is replaced by zeros."""

    def __init__(self, inner: Link, layout: KvLayout) -> None:
        self.transport = inner.transport
        self._inner = inner
        self._index = [
            range(plane.offset, plane.offset + plane.num_layers * layout.num_blocks * plane.block_bytes)
            for plane in layout.planes
            if plane.name.endswith("index")
        ]

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
            if any(copy.source in plane for plane in self._index):
                self._inner.write(lease, memoryview(bytes(copy.num_bytes)), [copy._replace(source=0)], stopped)
            else:
                self._inner.write(lease, source, [copy], stopped)

    def confirm(self, lease: LeaseKey) -> Future[int | None]:
        """See Link.confirm."""
        return self._inner.confirm(lease)

    def close(self) -> None:
        """See Link.close."""
        self._inner.close()


class ZeroingClient(HandoffClient):
    """All its links lose index pages."""

    def __init__(self, *, layout: KvLayout, **options: Any) -> None:
        super().__init__(layout=layout, wrap_link=lambda link: ZeroIndexLink(link, layout), **options)


if __name__ == "__main__":
    prefill_worker.worker.HandoffClient = ZeroingClient
    raise SystemExit(prefill_worker.main.main())
