"""A small HTTP client for end-to-end tests: whole completions, compared to the last bit of their logprobs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One completion request on token ids."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int

    def body(self) -> dict[str, Any]:
        return {
            "model": "baton",
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": 0.9 if self.temperature else 1.0,
            "seed": self.seed,
            "ignore_eos": True,
            "logprobs": 2,
        }


def random_asks(count: int, *, seed: int, longest: int, max_tokens: int) -> list[Ask]:
    """Prompts of 1 to `longest` byte tokens, a third of them on shared prefixes, half of them sampled."""
    rng = random.Random(seed)
    prefixes = [rng.choices(range(3, 259), k=rng.randint(longest // 4, longest // 2)) for _ in range(4)]
    asks = []
    for index in range(count):
        head = rng.choice(prefixes) if index % 3 == 0 else []
        tail = rng.choices(range(3, 259), k=rng.randint(1, longest - len(head)))
        asks.append(
            Ask(
                prompt=tuple(head + tail),
                max_tokens=rng.randint(1, max_tokens),
                temperature=0.0 if index % 2 else 0.8,
                seed=index,
            )
        )
    return asks


def client(url: str, timeout_s: float = 110.0) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
    return httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits, trust_env=False)


async def complete(http: httpx.AsyncClient, ask: Ask) -> dict[str, Any]:
    """The choice of a whole completion: text, logprobs, finish reason."""
    response = await http.post("/v1/completions", json=ask.body())
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


async def stream(http: httpx.AsyncClient, ask: Ask) -> dict[str, Any]:
    """The same completion through SSE, put together again."""
    text, finish = "", None
    merged: dict[str, list[Any]] = {}
    body = ask.body() | {"stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        done = False
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                break
            event = msgspec.json.decode(line[6:])
            assert "error" not in event, event
            for choice in event["choices"]:
                text += choice["text"]
                finish = choice["finish_reason"] or finish
                for key, values in (choice.get("logprobs") or {}).items():
                    merged.setdefault(key, []).extend(values)
    assert done, "stream ended without [DONE]"
    return {"text": text, "finish_reason": finish, "logprobs": merged}


async def complete_all(url: str, asks: Sequence[Ask], *, at_once: int, streaming: bool = False) -> list[dict[str, Any]]:
    """All completions, `at_once` in flight, in the order of `asks`."""
    slots = asyncio.Semaphore(at_once)
    async with client(url) as http:

        async def one(ask: Ask) -> dict[str, Any]:
            async with slots:
                return await (stream if streaming else complete)(http, ask)

        return list(await asyncio.gather(*(one(ask) for ask in asks)))


def essence(choice: dict[str, Any]) -> tuple[Any, ...]:
    """What must be equal bit for bit however the tokens came about."""
    logprobs = choice["logprobs"]
    return (
        choice["text"],
        choice["finish_reason"],
        tuple(logprobs["tokens"]),
        tuple(logprobs["token_logprobs"]),
    )
