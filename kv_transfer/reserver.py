"""What the hand-off needs from the decode worker: block pool, engine, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kv_transfer.metrics import HandoffReport
from kv_transfer.transports import Memory
from llm_engine.api.handoff import FirstToken, KvLayout
from llm_engine.api.messages import Submit


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
    """The decode worker's blocks, as the hand-off sees them.

    A reservation ends in exactly one of: `admit` returning, `release`, or `quarantine` followed (perhaps much later) by
    `free`. The plain methods must not block; all of them must take effect in the order of their calls.
    """

    async def reserve(self, submit: Submit, num_tokens: int, digests: bytes) -> R | None:
        """Match the own prefix cache and take the missing blocks. None: no blocks now (the offer waits).

        The tokens of `submit` come later (`prepare`); `digests`: see Offer. They are a claim until then.
        Raises PromptTooLong or another ServingError when this worker can never take the request. Several calls may be
        under way at once.
        """
        ...

    async def reserve_probe(self) -> R | None:
        """One block for a canary (have_tokens = 0), or None when there is none to spare."""
        ...

    def prepare(self, submit: Submit, reservation: R) -> None:
        """The same submit with its tokens: whether they fit the reservation is for `admit` to say."""
        ...

    async def admit(self, submit: Submit, reservation: R, first: FirstToken, report: HandoffReport) -> None:
        """Every block is verified: make the sequence schedulable.

        Takes the reservation over by returning. If it raises ServingError the hand-off is rejected and the reservation
        released.
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


@dataclass(frozen=True, slots=True)
class Ground(Generic[R]):
    """Memory that writers write into, and who gives out its blocks."""

    layout: KvLayout
    arena: Memory
    reserver: BlockReserver[R]
