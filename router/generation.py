"""What both generation endpoints share: from prompts to requests, and from chunks to an answer or a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import msgspec

from llm_engine.api.errors import RequestError, ServingError
from router import sampling
from router.answers import PromptDetails, Usage
from router.dispatch_api import GenerationRequest, OutputChunk
from router.edge import Edge
from router.exchange import Exchange
from router.failures import error_body
from router.schemas import GenerationBody, StreamOptions
from router.sources import ChunkSource, open_source
from router.stream import TextStream

encode_json = msgspec.json.Encoder().encode

STREAM_END = b"data: [DONE]\n\n"


class Choice(Protocol):
    """One of the answers: takes chunks, and gives them back in the shape of its endpoint."""

    @property
    def done(self) -> bool:
        """Whether the choice has its finish reason."""
        ...

    def collect(self, chunk: OutputChunk) -> None:
        """Add a chunk to the answer."""
        ...

    def events(self, chunk: OutputChunk) -> bytes:
        """The server-sent events that a chunk gives rise to; may be empty."""
        ...


class Job(msgspec.Struct, kw_only=True):
    """One HTTP request under way. Sequence i belongs to prompt i // n and is choice i % n of it.

    Nothing a job holds refers back to it or to the choices: a finished request is freed at once, not by a collection.
    """

    id: str
    model: str
    seed: int
    n: int
    prompts: Sequence[list[int]]
    requests: list[GenerationRequest]
    created: int
    streams: list[TextStream] = []  # one per sequence, in order

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        return ((b"x-request-id", self.id.encode()), (b"x-baton-seed", b"%d" % self.seed))

    def usage(self) -> Usage:
        """Token counts so far."""
        num_prompt = sum(map(len, self.prompts))
        num_output = sum([stream.num_tokens for stream in self.streams])
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_output,
            total_tokens=num_prompt + num_output,
            prompt_tokens_details=PromptDetails(sum([stream.cached_tokens for stream in self.streams[:: self.n]])),
        )


def plan(
    edge: Edge,
    exchange: Exchange,
    body: GenerationBody,
    prompts: Sequence[list[int]],
    *,
    kind: str,
    max_tokens: int | None,
    default_tokens: int | None,
    logprobs: int | None,
) -> Job:
    """Check the request against the limits and lay out its sequences. Raises RequestError.

    `max_tokens`: asked for; `default_tokens`: used if nothing was asked for, None for the whole context.
    """
    limits = edge.limits
    n = sampling.num_choices(body, limits)
    if len(prompts) * n > limits.max_sequences:
        raise RequestError(f"at most {limits.max_sequences} sequences a request are served", param="n")
    job_id = f"{kind}-{sampling.fresh_id()}"
    seed = sampling.draw_seed() if body.seed is None else body.seed
    requests: list[GenerationRequest] = []
    for prompt in prompts:
        budget = sampling.output_budget(max_tokens, default_tokens, len(prompt), limits)
        for choice in range(n):
            requests.append(
                GenerationRequest(
                    request_id=f"{job_id}-{len(requests)}",
                    prompt_tokens=prompt,
                    sampling=sampling.sampling_params(
                        body,
                        limits,
                        seed=sampling.choice_seed(seed, choice),
                        max_tokens=budget,
                        logprobs=logprobs,
                    ),
                    deadline_s=edge.config.request_timeout_s,
                    arrived=exchange.arrived,
                    salt=exchange.salt + (body.cache_salt or ""),
                    whole=not (body.stream or body.stop),
                )
            )
    return Job(
        id=job_id, model=body.model, seed=seed, n=n, prompts=prompts, requests=requests, created=int(time.time())
    )


def open_stream(
    job: Job, body: GenerationBody, index: int, table: Sequence[bytes], *, want_offsets: bool = False
) -> TextStream:
    """The text of one sequence of a job; call in the order of the sequences."""
    stream = TextStream(
        table,
        stops=sampling.stop_strings(body),
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=job.requests[index].sampling.min_tokens,
        want_offsets=want_offsets,
    )
    job.streams.append(stream)
    return stream


class Envelope:
    """The part of a server-sent event that is the same for all chunks of a request."""

    def __init__(self, job: Job, object_name: str, options: StreamOptions | None) -> None:
        self._object = object_name
        self._usage_in_every_chunk = options is not None and bool(options.continuous_usage_stats)
        self._usage_at_end = options is not None and bool(options.include_usage)
        self._tail = b'],"usage":null}\n\n' if self._usage_at_end else b"]}\n\n"
        self._job = job

    @cached_property
    def head(self) -> bytes:
        """What precedes the choice."""
        job = self._job
        fields = {"id": job.id, "object": self._object, "created": job.created, "model": job.model}
        return b"data: " + encode_json(fields)[:-1] + b',"choices":['

    def tail(self) -> bytes:
        """What follows the choice."""
        return self._with_usage() if self._usage_in_every_chunk else self._tail

    def end(self) -> bytes:
        """The usage, if asked for, and the end of the stream."""
        usage = self.head + self._with_usage() if self._usage_at_end else b""
        return usage + STREAM_END

    def _with_usage(self) -> bytes:
        return b'],"usage":' + encode_json(self._job.usage()) + b"}\n\n"


async def collect(edge: Edge, job: Job, choices: Sequence[Choice]) -> None:
    """Run the job to its end. Raises ServingError."""
    async with open_source(edge.dispatcher, job.requests) as source:
        running = len(choices)
        while running:
            index, chunk = await source.next()
            choice = choices[index]
            choice.collect(chunk)
            if choice.done:
                running -= 1
                await source.drop(index)


async def stream(edge: Edge, exchange: Exchange, job: Job, choices: Sequence[Choice], envelope: Envelope) -> None:
    """Run the job and send its events. Until the first chunk a failure is raised, afterwards it is an event."""
    async with open_source(edge.dispatcher, job.requests) as source:
        index, chunk = await source.next()
        exchange.start_stream(job.headers)
        try:
            await _relay(exchange, source, choices, envelope, index, chunk)
        except ServingError as exc:
            await exchange.write(b"data: " + error_body(exc) + b"\n\n" + STREAM_END, last=True)


async def _relay(
    exchange: Exchange,
    source: ChunkSource,
    choices: Sequence[Choice],
    envelope: Envelope,
    index: int,
    chunk: OutputChunk,
) -> None:
    running = len(choices)
    while True:
        choice = choices[index]
        data = choice.events(chunk)
        if choice.done:
            running -= 1
            await source.drop(index)
            if not running:
                await exchange.write(data + envelope.end(), last=True)
                return
        if data:
            await exchange.write(data)
        index, chunk = await source.next()
