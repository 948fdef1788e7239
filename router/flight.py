"""One request inside the router: its journal, where it runs now, and the stream its client reads.

    QUEUED ──place──▶ RUNNING ──loss, Failed(retryable), silence──▶ RECOVERING ──place──▶ RUNNING …
       │                 └── finish, error, abort ──▶ OVER
       └── refused, abort ──▶ OVER

There is no queue between the worker's messages and the client: the stream is a cursor into the journal's output, so a
slow client costs no memory and gets everything that arrived since its last read as one chunk.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Protocol

from llm_engine.api.errors import DeadlineExceeded, ServingError
from llm_engine.api.hashing import chain_digests, root_digest
from llm_engine.api.request import StageTimes, pack_tokens
from router.dispatch_api import GenerationRequest, OutputChunk
from router.journal import AttemptRecord, Journal
from router.ledger import Booking
from router.worker import Worker

HASH_AT_ONCE_TOKENS = 4096  # half a millisecond; longer prompts are hashed in pieces


class Phase(enum.Enum):
    """What a request owns."""

    QUEUED = "queued"  # a place in the queue
    RUNNING = "running"  # a credit, and an attempt on its workers
    RECOVERING = "recovering"  # a credit; no worker
    OVER = "over"  # nothing


class PrefixChain:
    """The block digests of a request, extended as its output grows: no block is hashed twice."""

    __slots__ = ("_block_tokens", "_digests", "_format_id", "_salt")

    def __init__(self, salt: str) -> None:
        self._salt = salt
        self._format_id = ""
        self._block_tokens = 0
        self._digests: list[bytes] = []

    async def fill(self, tokens: list[int], format_id: str, block_tokens: int) -> None:
        """Prepare `digests` of a long prompt; the event loop gets its turn in between."""
        for end in range(HASH_AT_ONCE_TOKENS, len(tokens), HASH_AT_ONCE_TOKENS):
            self.digests(tokens[:end], format_id, block_tokens)
            await asyncio.sleep(0)

    def digests(self, tokens: list[int], format_id: str, block_tokens: int) -> list[bytes]:
        """Digests of all full blocks. `tokens` only ever grows."""
        if self._block_tokens != block_tokens or self._format_id != format_id:
            self._format_id, self._block_tokens, self._digests = format_id, block_tokens, []
        known = len(self._digests)
        if known == len(tokens) // block_tokens:
            return self._digests
        parent = self._digests[-1] if known else root_digest(format_id, self._salt)
        fresh = tokens[known * block_tokens :] if known else tokens
        self._digests.extend(chain_digests(fresh, block_tokens, parent))
        return self._digests


class Flight:
    """The run-time side of a journal. Times are `time.monotonic()`."""

    __slots__ = (
        "_loop", "_waiter", "arrived", "avoid", "booking", "chain", "deadline", "decode", "ended_s", "enqueued",
        "error", "first_of_attempt", "first_s", "journal", "last_output", "over", "patience_s", "phase", "prefill",
        "progress", "request_id", "stages", "started", "strikes", "tokens", "whole",
    )  # fmt: skip

    def __init__(self, request: GenerationRequest, chain: PrefixChain | None = None) -> None:
        """`chain`: of the prompt, if it has been begun."""
        self.request_id = request.request_id
        self.whole = request.whole
        self.journal = Journal(
            request_id=request.request_id,
            prompt=pack_tokens(request.prompt_tokens),
            num_prompt=len(request.prompt_tokens),
            sampling=request.sampling,
            arrived_unix=time.time() - (time.monotonic() - request.arrived),
            deadline_s=request.deadline_s,
            salt=request.salt,
            logprobs=[] if request.sampling.logprobs is not None else None,
        )
        self.tokens = request.prompt_tokens  # the current attempt's input; not to be changed in place
        self.chain = chain or PrefixChain(request.salt)
        self.arrived = request.arrived
        self.deadline = request.arrived + request.deadline_s
        self.enqueued = 0.0
        self.phase = Phase.QUEUED
        self.prefill: Worker | None = None
        self.decode: Worker | None = None  # the same as `prefill` on an aggregated worker
        self.started = False  # decode owns the sequence: the loss of prefill no longer matters
        self.booking: Booking | None = None
        self.avoid: frozenset[str] = frozenset()
        self.strikes = 0  # attempts given up without progress
        self.progress = 0.0  # when the current attempt last gave a sign of life
        self.patience_s = 0.0  # how long it may stay silent
        self.error: ServingError | None = None
        self.first_s: float | None = None  # first token at the router, since arrival
        self.first_of_attempt = True  # the current attempt has sent no new token yet
        self.last_output = 0.0
        self.stages: dict[str, float] = {}
        self.ended_s: float | None = None
        self.over = False  # phase is OVER
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """There is something for the stream."""
        waiter = self._waiter
        if waiter is not None and not waiter.done() and (self.over or not self.whole):
            waiter.set_result(None)

    def change(self) -> asyncio.Future[None]:
        """Done at the next `wake`. One reader at a time."""
        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError(f"two readers of one stream: {self.request_id}")
        self._waiter = self._loop.create_future()
        return self._waiter

    def ttft_stages(self, written: float, served: AttemptRecord) -> dict[str, float]:
        """Stages of the time to first token; they add up to `written - arrived` exactly.

        router: until the first Submit; recovery: attempts that were lost; queue and compute as the prefill worker of
        `served` measured them; relay: everything else, that is both networks, this router and the client's socket.
        """
        left = max(0.0, written - self.arrived)
        first_sent_s = self.journal.attempts[0].sent_s
        times = served.times or StageTimes()
        stages: dict[str, float] = {}
        for name, seconds in (
            ("router", first_sent_s),
            ("recovery", served.sent_s - first_sent_s),
            ("prefill_queue", times.queue_s),
            ("prefill_compute", times.compute_s),
        ):
            stages[name] = min(left, max(0.0, seconds))
            left -= stages[name]
        stages["relay"] = left
        return stages


class StreamOwner(Protocol):
    """What a stream needs from the dispatcher."""

    async def hash_ahead(self, request: GenerationRequest) -> PrefixChain:
        """The block digests of a long prompt, without holding up the event loop."""

    def open(self, request: GenerationRequest, chain: PrefixChain | None = None) -> Flight:
        """Admit. Raises Overloaded or RequestError."""

    def abort(self, flight: Flight) -> None:
        """The client does not want the rest. Idempotent."""

    def first_chunk_written(self, flight: Flight) -> None:
        """The client has the first token, or of a whole answer the router has it."""


class OutputStream(AsyncGenerator[OutputChunk, None]):
    """The async generator that `submit` returns. A class: it costs less a chunk and can be closed while it is read."""

    __slots__ = ("_cursor", "_done", "_first_pending", "_flight", "_owner", "_request")

    def __init__(self, owner: StreamOwner, request: GenerationRequest) -> None:
        self._owner = owner
        self._request = request
        self._flight: Flight | None = None
        self._cursor = 0
        self._first_pending = False
        self._done = False

    async def __anext__(self) -> OutputChunk:
        flight = self._flight
        if flight is None or self._first_pending or self._done:
            flight = await self._begin()
        try:
            while not flight.over and (flight.whole or len(flight.journal.output) == self._cursor):
                await flight.change()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        return self._take(flight)

    async def _begin(self) -> Flight:
        """What has to be done at the first two reads. Raises StopAsyncIteration after the last chunk."""
        flight = self._flight
        if self._first_pending and flight is not None:
            self._first_pending = False
            self._owner.first_chunk_written(flight)
        if self._done:
            raise StopAsyncIteration
        if flight is not None:
            return flight
        chain = None
        if len(self._request.prompt_tokens) > HASH_AT_ONCE_TOKENS:
            chain = await self._owner.hash_ahead(self._request)
            if self._done:  # closed meanwhile
                raise StopAsyncIteration
        self._done = True  # until it is admitted
        flight = self._flight = self._owner.open(self._request, chain)
        self._done = False
        return flight

    def _take(self, flight: Flight) -> OutputChunk:
        """Everything since the last chunk. Raises what the request ended with when there is nothing."""
        journal, start = flight.journal, self._cursor
        end = len(journal.output)
        finish = journal.finish if flight.over and flight.error is None else None
        if end == start and finish is None:
            self._done = True
            raise flight.error or StopAsyncIteration
        chunk = OutputChunk(
            tokens=journal.output[start:end],
            logprobs=None if journal.logprobs is None else journal.logprobs[start:end],
            finish=finish,
        )
        if start == 0:
            chunk.cached_tokens = journal.cached_tokens
            self._first_pending = True
        self._cursor = end
        self._done = finish is not None
        return chunk

    async def aclose(self) -> None:
        """Abort, whatever the stream is waiting for. Idempotent, also while another task reads."""
        self._done = True
        flight = self._flight
        if flight is None:
            return
        if self._first_pending:
            self._first_pending = False
            self._owner.first_chunk_written(flight)
        self._owner.abort(flight)

    async def asend(self, value: None) -> OutputChunk:
        """Part of the generator protocol: the same as `anext`."""
        return await self.__anext__()

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> OutputChunk:
        """Part of the generator protocol: close, then raise."""
        await self.aclose()
        if isinstance(typ, BaseException):
            raise typ
        raise val if isinstance(val, BaseException) else typ()


def deadline_error(flight: Flight) -> DeadlineExceeded:
    """The error a request ends with when its own deadline passes."""
    return DeadlineExceeded(
        f"not finished within {flight.journal.deadline_s:g} s ({len(flight.journal.output)} tokens so far)",
        request_id=flight.request_id,
    )
