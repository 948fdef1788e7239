"""Requests and verdicts of the evaluation, against a server in this process."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from benchmarks import accuracy
from benchmarks.grading import ask, request_body, wilson
from llm_engine.training.samples import Sample, draw
from llm_engine.training.skills import EVALUATION


def sample_of(skill: str, seed: int = 1) -> Sample:
    return draw(EVALUATION[skill], random.Random(seed), held_out=True)


def perfect(sample: Sample) -> dict[str, Any]:
    calls = [
        {"function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), sort_keys=True)}}
        for call in sample.answer.calls
    ]
    return {"content": sample.answer.content, "tool_calls": calls or None}


async def verdict(skill: str, sample: Sample, message: dict[str, Any], status: int = 200) -> Any:
    answer = {"choices": [{"message": message}], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}
    transport = httpx.MockTransport(lambda request: httpx.Response(status, json=answer))
    async with httpx.AsyncClient(transport=transport, base_url="http://nano") as client:
        return await ask(client, skill, sample, "baton-nano", seed=0)


@pytest.mark.parametrize("skill", ["arithmetic", "tool-call", "tool-result", "json", "thinking"])
async def test_the_right_answer_is_right_and_any_other_is_not(skill: str) -> None:
    sample = sample_of(skill)
    assert (await verdict(skill, sample, perfect(sample))).right
    other = perfect(next(other for seed in range(2, 9) if (other := sample_of(skill, seed)).answer != sample.answer))
    assert not (await verdict(skill, sample, other)).right
    assert not (await verdict(skill, sample, {"content": "", "tool_calls": None})).right


async def test_a_failed_request_is_an_error_and_no_wrong_answer() -> None:
    sample = sample_of("arithmetic")
    failed = await verdict("arithmetic", sample, perfect(sample), status=503)
    assert failed.error.startswith("HTTP 503")
    report = accuracy.summarise([failed])
    assert (report["errors"], report["wrong"]) == (1, [])


def test_requests_carry_tools_schema_and_mode() -> None:
    assert request_body(sample_of("tool-call"), "m", 0)["tools"]
    assert request_body(sample_of("json"), "m", 0)["response_format"]["type"] == "json_schema"
    assert request_body(sample_of("thinking"), "m", 0)["thinking"] == {"type": "enabled"}


def test_equal_seeds_ask_equal_questions() -> None:
    a, b, c = (accuracy.problems(["strings", "turns"], 5, seed) for seed in (1, 1, 2))
    assert a == b != c
    assert [skill for skill, _ in a] == ["strings", "turns"] * 5


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (50, 100, 0.404, 0.596), (0, 0, 0, 1)],
)
def test_intervals(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(["--skills", "cooking"])
    assert "unknown: cooking; known: retrieval-2x" in capsys.readouterr().err
    assert accuracy.main(["--url", "http://127.0.0.1:9", "--short"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
