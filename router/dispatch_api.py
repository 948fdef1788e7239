"""The seam between the HTTP edge and the dispatcher.

The edge turns an HTTP request into one GenerationRequest per choice and reads its OutputChunks; the dispatcher picks
workers, recovers from losses and owns the journal. Neither side knows how the other one is built.

    edge                                              dispatcher
    submit(request) ───────────────────────────────▶  nothing happens until the generator is first awaited
    anext()         ───────────────────────────────▶  admits, or raises Overloaded / RequestError
                    ◀───────────────────────────────  everything that has arrived since the last chunk, as one chunk
    anext()         ───────────────────────────────▶  the previous chunk has been written to the client by now
    aclose()        ───────────────────────────────▶  the client is gone or has enough: abort on both workers
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

import msgspec

from llm_engine.api.request import FinishReason, SamplingParams, TokenLogprobs


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. `arrived` is the `time.monotonic()` at which the HTTP request reached the process."""

    request_id: str  # unique in the process; choices of one HTTP request differ by a suffix
    prompt_tokens: list[int]  # never empty, ids below the vocabulary size; with max_tokens within max_model_len
    sampling: SamplingParams
    deadline_s: float  # seconds left for the whole request, counted from `arrived`
    arrived: float
    salt: str = ""  # separates prefix caches of different tenants
    whole: bool = False  # nothing is wanted before the end: one chunk has it all


class OutputChunk(msgspec.Struct, kw_only=True):
    """Everything that became available since the previous chunk, each output index exactly once and in order.

    `tokens` includes the end-of-sequence or stop token that ended the sequence (finish = STOP). `logprobs`, if asked
    for, has one entry per token. The chunk with a `finish` is the last one. `cached_tokens` comes with the first.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    cached_tokens: int | None = None


class Dispatcher(Protocol):
    """What the edge needs from the cluster."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names clients may use; the first one is reported in answers."""
        ...

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens of one sequence together."""
        ...

    def ready(self) -> bool:
        """Whether a request submitted now has workers to run on."""
        ...

    def status(self) -> Mapping[str, Any]:
        """A JSON-serialisable report of workers and queues, for operators."""
        ...

    def submit(self, request: GenerationRequest) -> AsyncGenerator[OutputChunk, None]:
        """Generate. Closing the generator aborts the request at once, whatever it was waiting for.

        Raises ServingError subclasses: Overloaded before the first chunk, DeadlineExceeded at any time, others when
        no attempt can help. `finish` is STOP or LENGTH in normal operation; CANCELLED and DEADLINE never reach the edge
        (they end as errors).
        """
        ...


class EdgeMetrics(Protocol):
    """What the edge reports about HTTP, and where it gets the exposition from."""

    def http_response(self, route: str, status: int, seconds: float) -> None:
        """One finished HTTP exchange. `route` is a path template, `status` 499 for a client that left or stalled."""
        ...

    def render(self) -> bytes:
        """Every metric of the process in the Prometheus text format (version 0.0.4)."""
        ...
