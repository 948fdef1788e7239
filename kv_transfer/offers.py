"""Offers on the receiver: a bounded queue, asked against the worker's blocks until granted, refused or overdue."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import msgspec

from kv_transfer.metrics import Marks, Tally
from kv_transfer.pairs import Pair
from kv_transfer.reserver import BlockReserver, R
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import PromptTooLong, ServingError
from llm_engine.api.handoff import Defer, KvLayout, Offer, Refused
from llm_engine.api.messages import Message

_RETRY_S = 0.25  # waiting offers are tried again this often even if nobody reports free blocks
_BATCH = 16  # offers tried at once: a reservation costs a round trip to the step loop
_REMEMBERED = 1 << 16


@dataclass(slots=True, eq=False)
class Waiting:
    """An offer in the queue."""

    pair: Pair
    offer: Offer
    received_at: float
    timer: asyncio.TimerHandle
    deferred: bool = False
    marks: Marks = field(default_factory=Marks)

    @property
    def request_id(self) -> str:
        """The queue holds one attempt of a request at most."""
        return self.offer.submit.request_id

    @property
    def attempt(self) -> int:
        """The attempt."""
        return self.offer.submit.attempt

    def left_s(self) -> float:
        """Seconds until the request's own deadline."""
        return max(0.0, self.offer.submit.deadline_s - (time.monotonic() - self.received_at))


class Attempts:
    """The newest attempt of each request that must not be offered (again), for the last `limit` requests."""

    def __init__(self, limit: int = _REMEMBERED) -> None:
        self._limit = limit
        self._newest: OrderedDict[str, int] = OrderedDict()

    def is_stale(self, request_id: str, attempt: int) -> bool:
        """Whether this attempt was offered before, or cancelled, or overtaken by a newer one."""
        return attempt <= self._newest.get(request_id, -1)

    def close(self, request_id: str, attempt: int) -> None:
        """This attempt and all older ones are stale from now on."""
        self._newest[request_id] = max(attempt, self._newest.pop(request_id, -1))
        if len(self._newest) > self._limit:
            self._newest.popitem(last=False)


class OfferQueue(Generic[R]):
    """Waiting offers in order of arrival. `grant` turns one with its reservation into a lease; `send` never raises."""

    def __init__(
        self,
        *,
        config: TransferConfig,
        layout: KvLayout,
        reserver: BlockReserver[R],
        grant: Callable[[Waiting, R], None],
        send: Callable[[Pair, Message], None],
        tally: Tally,
    ) -> None:
        self.draining = False
        self._config = config
        self._block_tokens = layout.block_tokens
        self._reserver = reserver
        self._grant = grant
        self._send = send
        self._tally = tally
        self._waiting: dict[str, Waiting] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def wake(self) -> None:
        """Blocks may have become free."""
        self._wake.set()

    def add(self, pair: Pair, offer: Offer) -> None:
        """Queue an offer; it is refused when its time runs out."""
        submit = offer.submit
        wait_s = max(0.0, min(self._config.grant_timeout_s, submit.deadline_s))
        timer = asyncio.get_running_loop().call_later(wait_s, self._overdue, submit.request_id)
        item = self._waiting[submit.request_id] = Waiting(pair, offer, time.monotonic(), timer)
        item.marks.reach("offered")
        self._wake.set()

    def find(self, request_id: str) -> Waiting | None:
        """The waiting offer of a request."""
        return self._waiting.get(request_id)

    def of(self, pair: Pair) -> list[Waiting]:
        """The waiting offers of a writer."""
        return [item for item in self._waiting.values() if item.pair is pair]

    def drop(self, item: Waiting) -> None:
        """Take an offer out without an answer."""
        item.timer.cancel()
        self._waiting.pop(item.request_id, None)

    def refuse(self, item: Waiting, code: str, reason: str) -> None:
        """Take an offer out and say why."""
        self.drop(item)
        self.answer_refused(item.pair, item.offer, code, reason)

    def drain(self) -> None:
        """Refuse everything that waits."""
        self.draining = True
        for item in tuple(self._waiting.values()):
            self.refuse(item, "draining", "the worker is draining")

    def close(self) -> None:
        """Stop the timers."""
        for item in self._waiting.values():
            item.timer.cancel()

    def answer_refused(self, pair: Pair, offer: Offer, code: str, reason: str) -> None:
        """Refuse an offer that is not (or no longer) in the queue."""
        self._tally.failed[f"refused_{code}"] += 1
        self._send(
            pair,
            Refused(
                code=code,
                reason=reason,
                request_id=offer.submit.request_id,
                attempt=offer.submit.attempt,
                retryable=code != "too_long",
            ),
        )

    async def run(self) -> None:
        """Grant offers as blocks become free, for ever."""
        while True:
            try:
                async with asyncio.timeout(_RETRY_S if self._waiting else None):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            while self._waiting and await self._try_batch():
                pass

    async def _try_batch(self) -> bool:
        """Try the first offers. False: blocks ran out.

        An offer may overtake a larger one, but not once that has used up half of its time.
        """
        batch = list(self._waiting.values())[:_BATCH]
        if time.monotonic() - batch[0].received_at > self._config.grant_timeout_s / 2:
            del batch[1:]
        if len(batch) == 1:
            results = [await self._reserve(batch[0])]
        else:
            results = await asyncio.gather(*(self._reserve(item) for item in batch))
        if all(results):
            return True
        for item in self._waiting.values():
            self._defer(item)
        return False

    async def _reserve(self, item: Waiting) -> bool:
        """False: no blocks now."""
        offer, num_tokens = item.offer, item.offer.num_tokens
        submit = msgspec.structs.replace(offer.submit, deadline_s=item.left_s())
        try:
            reservation = await self._reserver.reserve(submit, num_tokens, offer.digests)
        except ServingError as exc:
            if self._waiting.get(item.request_id) is item:
                self.refuse(item, "too_long" if isinstance(exc, PromptTooLong) else "refused", str(exc))
            return True
        if self._waiting.get(item.request_id) is not item:  # withdrawn, cancelled or lost meanwhile
            if reservation is not None:
                self._reserver.release(reservation)
            return True
        if reservation is None:
            return False
        self._check(reservation, num_tokens)
        self.drop(item)
        self._grant(item, reservation)
        return True

    def _check(self, reservation: R, num_tokens: int) -> None:
        have, rest = divmod(reservation.have_tokens, self._block_tokens)
        expected = -(-num_tokens // self._block_tokens) - have
        if rest or len(reservation.blocks) != expected:
            raise ValueError(
                f"reservation for {num_tokens} tokens: {reservation.have_tokens} cached and "
                f"{len(reservation.blocks)} blocks, expected {expected}"
            )

    def _overdue(self, request_id: str) -> None:
        if (item := self._waiting.get(request_id)) is not None:
            self.refuse(item, "timeout", "no blocks became free in time")

    def _defer(self, item: Waiting) -> None:
        if not item.deferred:
            item.deferred = True
            self._tally.deferred += 1
            self._send(item.pair, Defer(request_id=item.request_id, attempt=item.attempt, reason="no free blocks"))
