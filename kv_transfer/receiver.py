"""Receiver side of the hand-off, as the decode worker uses it. Everything public runs on one asyncio loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from kv_transfer.memory import Arena
from kv_transfer.metrics import HandoffReport, ReceiverStats
from llm_engine.api.config import TransferConfig
from llm_engine.api.handoff import FirstToken, KvLayout
from llm_engine.api.messages import Submit, WorkerInfo


class ReservedBlocks(Protocol):
    """What a reservation tells the hand-off. The object itself is handed back to the reserver unchanged."""

    @property
    def have_tokens(self) -> int:
        """Tokens found in the own prefix cache (pinned by the reservation): a multiple of block_tokens."""
        ...

    @property
    def blocks(self) -> Sequence[int]:
        """Blocks that receive tokens [have_tokens, num_tokens), in order; each is in this reservation alone."""
        ...


R = TypeVar("R", bound=ReservedBlocks)


class BlockReserver(Protocol[R]):
    """The decode worker's blocks, as the hand-off sees them. A reservation ends in exactly one of: `admit` returning,
    `release`, or `quarantine` followed (perhaps much later) by `free`. The three plain methods must not block; they and
    the coroutines must take effect in the order of their calls."""

    async def reserve(self, submit: Submit, num_tokens: int) -> R | None:
        """Match the own prefix cache and take the missing blocks. None: no blocks now (the offer waits).

        Raises PromptTooLong or another ServingError when this worker can never take the request.
        """
        ...

    async def reserve_probe(self) -> R | None:
        """One block for a canary (have_tokens = 0), or None when there is none to spare."""
        ...

    async def admit(self, submit: Submit, reservation: R, first: FirstToken, report: HandoffReport) -> None:
        """Every block is verified: make the sequence schedulable.

        Takes the reservation over by returning; if it raises ServingError the hand-off is rejected and `release` follows.
        """
        ...

    def release(self, reservation: R) -> None:
        """Nobody can write into the blocks (any more): they are free now."""
        ...

    def quarantine(self, reservation: R) -> None:
        """The lease is revoked but its writer may still be writing: the blocks must not be used until `free`."""
        ...

    def free(self, reservation: R) -> None:
        """End of quarantine: the writer is proven stopped."""
        ...


class HandoffServer(Generic[R]):
    """All hand-offs into one decode worker.

    Life: construct, `bind()` (gives `WorkerInfo.control_addr`), `run(info)` in the worker's task group, `close()`.
    """

    def __init__(
        self,
        *,
        config: TransferConfig,
        key: bytes,
        layout: KvLayout,
        arena: Arena,
        reserver: BlockReserver[R],
    ) -> None:
        """`arena` must hold `layout.arena_bytes`; the shm transport needs it shared. Raises ConfigError otherwise."""
        raise NotImplementedError

    def bind(self, host: str, port: int = 0) -> str:
        """Bind the control channel and the data listeners; returns the control address. Raises ConfigError."""
        raise NotImplementedError

    async def run(self, info: WorkerInfo) -> None:
        """Serve peers until `close`; raises what killed one of its tasks."""
        raise NotImplementedError

    async def close(self) -> None:
        """Revoke everything, close every connection, join every thread. Leased blocks are not given back."""
        raise NotImplementedError

    def blocks_freed(self) -> None:
        """Blocks may be available again: waiting offers are tried. Call it after any step that freed blocks."""
        raise NotImplementedError

    def cancel(self, request_id: str, attempt: int) -> bool:
        """Revoke this attempt and every older one, and refuse them from now on. True if one was under way here.

        A sequence already passed to `admit` is the engine's: abort it there too.
        """
        raise NotImplementedError

    def drain(self) -> None:
        """Refuse new offers (queued ones too); what has been granted goes on. Done when `stats().pending` is 0."""
        raise NotImplementedError

    def stats(self) -> ReceiverStats:
        """Exact counters and gauges."""
        raise NotImplementedError
