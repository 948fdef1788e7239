"""Writer side of the hand-off, as the prefill worker uses it.

Everything here runs on one asyncio loop except `Handoff.layer_ready`, which any thread may call, and the copying, which
runs on one sender thread per peer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kv_transfer.metrics import HandoffReport, WriterStats
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import FirstToken, KvLayout
from llm_engine.api.messages import Submit, WorkerInfo


class Handoff:
    """One request on its way to one decode worker. Ends in `commit` returning, or in `abort`.

    The source blocks must stay untouched until one of the two has returned or raised: only then nothing reads them.
    """

    request_id: str
    attempt: int

    @property
    def error(self) -> TransferError | None:
        """Why the hand-off has failed, or None. It still needs `abort` before its blocks are released."""
        raise NotImplementedError

    def layer_ready(self, layer: int, first_block_index: int, block_ids: Sequence[int]) -> None:
        """Blocks `first_block_index …` of the sequence are complete in `layer` (0..L-1 main, L.. MTP). Thread-safe.

        Never blocks. Per layer the calls must come in block order without gaps; a call after the end is ignored.
        """
        raise NotImplementedError

    async def commit(self, first: FirstToken, *, compute_end: float) -> HandoffReport:
        """Wait until every layer of every block was written, send the manifest and wait for the verdict.

        `compute_end`: `time.monotonic()` at the end of the last prefill kernel. On return the receiver owns the
        sequence.
        Raises TransferTimeout, LeaseRevoked, LayoutMismatch or TransferError; nothing of the hand-off was used then, or
        (timeout after Commit was sent) the receiver's own messages to the router say that it was.
        """
        raise NotImplementedError

    async def abort(self, reason: str = "aborted") -> None:
        """Give up: on return no write is in flight and the receiver has been told. Idempotent; no-op after `commit`."""
        raise NotImplementedError


class HandoffClient:
    """All hand-offs of one prefill worker, with its connections to decode workers.

    Life: construct, `offer` … while `run()` is awaited by the worker's task group, `close()`.
    """

    def __init__(
        self,
        *,
        config: TransferConfig,
        key: bytes,
        info: WorkerInfo,
        layout: KvLayout,
        source: memoryview,
    ) -> None:
        """`key`: the cluster key. `source`: the bytes `layout` describes (any arena, shared or not)."""
        raise NotImplementedError

    async def run(self) -> None:
        """Own the background tasks; returns after `close`, raises what killed one of them."""
        raise NotImplementedError

    async def close(self) -> None:
        """Abort what is pending, close every connection, join every thread."""
        raise NotImplementedError

    def offer(
        self,
        submit: Submit,
        num_tokens: int,
        weight_version: str,
        *,
        on_failed: Callable[[Handoff, TransferError], None] | None = None,
    ) -> Handoff:
        """Start the hand-off of `num_tokens` tokens of KV to `submit.decode`. Returns at once; call it before compute.

        `submit.deadline_s` must be the time left now. `on_failed` is called once on the loop if the hand-off fails
        while nobody awaits `commit` (refused, no grant in time, revoked, peer lost): stop computing, then `abort()`.
        Raises Overloaded when config.max_pending hand-offs are under way.
        """
        raise NotImplementedError

    def bad_peers(self) -> list[str]:
        """Names of decode workers whose canary fails or that can't be reached (Load.bad_peers)."""
        raise NotImplementedError

    def stats(self) -> WriterStats:
        """Exact counters and gauges."""
        raise NotImplementedError
