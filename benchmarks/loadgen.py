"""Open- and closed-loop load on an OpenAI completions endpoint, timed at the client's edge.

TTFT  request sent → first chunk with a token
ITL   gap between consecutive chunks of a stream (a chunk may carry several tokens when drafts are accepted)
TPOT  (last chunk - first chunk) / (output tokens - 1)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request: `prompt` token ids, sent `at_s` seconds after the start (open loop) or when a slot is free."""

    prompt: list[int]
    max_tokens: int
    at_s: float = 0.0
    seed: int = 0
    temperature: float = 0.0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What the client saw of one job. Times in seconds."""

    input_tokens: int
    output_tokens: int = 0
    cached_tokens: int = 0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    e2e_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    error: str = ""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


async def run_job(client: httpx.AsyncClient, job: Job, model: str) -> Outcome:
    """Stream one completion. Transport and HTTP errors end up in `Outcome.error`."""
    outcome = Outcome(input_tokens=len(job.prompt))
    body = {
        "model": model,
        "prompt": job.prompt,
        "max_tokens": job.max_tokens,
        "temperature": job.temperature,
        "seed": job.seed,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", content=msgspec.json.encode(body)) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                outcome.error = f"HTTP {response.status_code}: {text[:200]}"
                return outcome
            await _read_stream(response, outcome, start)
    except httpx.HTTPError as exc:
        outcome.error = f"{type(exc).__name__}: {exc}"
    outcome.e2e_s = time.perf_counter() - start
    return outcome


async def _read_stream(response: httpx.Response, outcome: Outcome, start: float) -> None:
    first = last = 0.0
    finished = False
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            finished = True
            break
        chunk = _decode_chunk(line[6:])
        if chunk.error is not None:
            outcome.error = str(chunk.error.get("message"))
            return
        if chunk.usage is not None:
            outcome.output_tokens = chunk.usage.completion_tokens
            details = chunk.usage.prompt_tokens_details
            outcome.cached_tokens = details.cached_tokens if details else 0
        if not chunk.choices:
            continue
        now = time.perf_counter()
        if first:
            outcome.itl_s.append(now - last)
        else:
            first, outcome.ttft_s = now, now - start
        last = now
    if not finished:
        outcome.error = "stream ended without [DONE]"
    elif outcome.output_tokens > 1:
        outcome.tpot_s = (last - first) / (outcome.output_tokens - 1)


async def run_open_loop(
    url: str, model: str, jobs: Sequence[Job], *, timeout_s: float, on_done: Callable[[Outcome], None]
) -> list[Outcome]:
    """Send every job at its own time, whether or not earlier ones have finished."""
    async with _client(url, timeout_s, len(jobs)) as client:
        start = time.perf_counter()

        async def one(job: Job) -> Outcome:
            await asyncio.sleep(max(0.0, job.at_s - (time.perf_counter() - start)))
            outcome = await run_job(client, job, model)
            on_done(outcome)
            return outcome

        return list(await asyncio.gather(*(one(job) for job in jobs)))


async def run_closed_loop(
    url: str, model: str, jobs: Sequence[Job], *, concurrency: int, timeout_s: float, on_done: Callable[[Outcome], None]
) -> list[Outcome]:
    """Keep `concurrency` jobs running until all are done."""
    slots = asyncio.Semaphore(concurrency)
    async with _client(url, timeout_s, concurrency) as client:

        async def one(job: Job) -> Outcome:
            async with slots:
                outcome = await run_job(client, job, model)
            on_done(outcome)
            return outcome

        return list(await asyncio.gather(*(one(job) for job in jobs)))


async def served_model(url: str) -> str:
    """Name of the first model the endpoint serves. Raises httpx.HTTPError when there is no endpoint."""
    async with _client(url, 10.0, 1) as client:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])


async def scrape(url: str) -> str:
    """The endpoint's Prometheus text."""
    async with _client(url, 10.0, 1) as client:
        response = await client.get("/metrics")
        response.raise_for_status()
        return response.text


def _client(url: str, timeout_s: float, connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=max(connections, 1), max_keepalive_connections=connections)
    return httpx.AsyncClient(
        base_url=url, timeout=timeout_s, limits=limits, headers={"content-type": "application/json"}, trust_env=False
    )
