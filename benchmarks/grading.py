"""One generated problem asked over HTTP, and whether the answer is right."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx

from llm_engine.training.samples import Sample

MAX_TOKENS: Final = 192
_Z: Final = 1.96  # two-sided 95 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one problem. `error`: the request itself failed."""

    skill: str
    right: bool
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""
    question: str = ""
    wanted: str = ""
    got: str = ""


def request_body(sample: Sample, model: str, seed: int) -> dict[str, Any]:
    """The sample as a greedy chat request."""
    body: dict[str, Any] = {
        "model": model,
        "messages": list(sample.messages),
        "max_tokens": MAX_TOKENS,
        "temperature": 0.0,
        "seed": seed,
        "thinking": {"type": "enabled" if sample.thinking else "disabled"},
    }
    if sample.tools:
        body["tools"] = list(sample.tools)
    if sample.schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": sample.schema}}
    return body


async def ask(client: httpx.AsyncClient, skill: str, sample: Sample, model: str, seed: int) -> Verdict:
    """Send one request and judge the answer. Transport and HTTP errors end up in `Verdict.error`."""
    try:
        response = await client.post("/v1/chat/completions", json=request_body(sample, model, seed))
        if response.status_code != 200:
            return Verdict(skill=skill, right=False, error=f"HTTP {response.status_code}: {response.text[:200]}")
        answer = response.json()
        message, usage = answer["choices"][0]["message"], answer["usage"]
    except (httpx.HTTPError, ValueError, LookupError) as exc:
        return Verdict(skill=skill, right=False, error=f"{type(exc).__name__}: {exc}")
    wanted, got = _comparable(sample), _received(message, structured=sample.schema is not None)
    return Verdict(
        skill=skill,
        right=wanted == got,
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        question=str(sample.messages[-1]["content"])[-200:],
        wanted=json.dumps(wanted),
        got=json.dumps(got),
    )


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927); (0, 1) without observations."""
    if not total:
        return 0.0, 1.0
    share, spread = right / total, _Z**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def _comparable(sample: Sample) -> list[Any]:
    """Content (parsed where it must be JSON), then the calls. Reasoning is not judged."""
    answer = sample.answer
    content = json.loads(answer.content) if sample.schema is not None else answer.content
    return [content, *([call.name, dict(call.arguments)] for call in answer.calls)]


def _received(message: Mapping[str, Any], *, structured: bool) -> list[Any]:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    content: Any = message.get("content") or ""
    if structured:
        content = _parsed(content)
    return [content, *([call["name"], _parsed(call["arguments"])] for call in calls)]


def _parsed(text: str) -> Any:
    """The JSON value of a text, or the text itself, which then equals no value that was wanted."""
    try:
        return json.loads(text)
    except ValueError:
        return f"not JSON: {text}"
