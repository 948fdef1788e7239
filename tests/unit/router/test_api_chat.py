from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from llm_engine.api.request import FinishReason
from router.dispatch_api import GenerationRequest
from tests.unit.router.edge_harness import (
    EOS_ID,
    MODEL,
    RunningEdge,
    Script,
    ScriptedDispatcher,
    byte_tokenizer,
    ids_of,
    running_edge,
    sse_events,
)

TOKENIZER = byte_tokenizer()
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wie ist das Wetter?",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLS = (
    "\n\n<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Tromsø "N"</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">[1, 2]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>"
)
ARGUMENTS = ['{"city": "Tromsø \\"N\\"", "days": [1, 2]}', "{}"]
ANSWERS = {
    "plain": "Hällo 🙂",
    "think": "hm…</think>Hällo",
    "call": f"Let me see.{CALLS}",
    "think-call": f"hm</think>{CALLS}",
    "cut": f"Let me see.{CALLS[:120]}",
    "second-cut": f"Let me see.{CALLS}"[:-60],
    "named": CALLS.partition('invoke name="weather">\n')[2],
    "required": CALLS.partition('invoke name="')[2],
}


def scripted(request: GenerationRequest) -> Script:
    """The salt names the answer; it comes in chunks of three tokens."""
    name, _, finish = request.salt.partition("/")
    tokens = ids_of(TOKENIZER, ANSWERS[name])
    if finish != "length":
        tokens.append(EOS_ID)
    chunks = [tokens[i : i + 3] for i in range(0, len(tokens), 3)]
    return Script(chunks, finish=FinishReason.LENGTH if finish == "length" else FinishReason.STOP)


@pytest.fixture(scope="module")
def edge() -> Iterator[RunningEdge]:
    with running_edge(ScriptedDispatcher(scripted)) as running:
        yield running


@pytest.fixture
def client(edge: RunningEdge) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(edge: RunningEdge, answer: str = "plain", **body: Any) -> httpx.Response:
    base = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "cache_salt": answer}
    return edge.http.post("/v1/chat/completions", json=base | body)


def prompt_text(edge: RunningEdge) -> str:
    return TOKENIZER.decode(edge.dispatcher.requests[-1].prompt_tokens)


def assembled(response: httpx.Response) -> dict[str, Any]:
    """What a client ends up with after reading a stream, checked delta by delta."""
    events = sse_events(response.text)
    assert [event["choices"][0]["delta"].get("role") for event in events][:2] == ["assistant", None]
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for event in events:
        [choice] = event["choices"]
        delta = dict(choice["delta"])
        delta.pop("role", None)
        assert len(delta) <= 1, "readers look at one member of a delta at a time"
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        assert (choice["finish_reason"] is None) == (event is not events[-1])
    message["finish_reason"] = events[-1]["choices"][0]["finish_reason"]
    return message


def test_the_openai_client_chats(edge: RunningEdge, client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}],
        extra_body={"cache_salt": "plain"},
        max_completion_tokens=50,
    )
    message = completion.choices[0].message
    assert (message.role, message.content, message.tool_calls) == ("assistant", "Hällo 🙂", None)
    assert completion.choices[0].finish_reason == "stop"
    assert prompt_text(edge) == "<｜begin▁of▁sentence｜>S<｜User｜>hi<｜Assistant｜></think>"
    assert edge.dispatcher.requests[-1].sampling.max_tokens == 50
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(edge.dispatcher.requests[-1].prompt_tokens)
    assert "reasoning_content" not in message.model_extra


def test_the_openai_client_streams_and_assembles_tool_calls(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        tools=[WEATHER],  # type: ignore[list-item]
        extra_body={"cache_salt": "call"},
        stream_options={"include_usage": True},
    ) as stream:
        completion = stream.get_final_completion()
    message = completion.choices[0].message
    assert message.content == "Let me see."
    assert message.tool_calls is not None
    assert [call.function.name for call in message.tool_calls] == ["weather", "now"]
    assert [call.function.arguments for call in message.tool_calls] == ARGUMENTS
    assert completion.choices[0].finish_reason == "tool_calls"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == len(ids_of(TOKENIZER, ANSWERS["call"])) + 1


def test_reasoning_comes_in_its_own_field(edge: RunningEdge) -> None:
    response = post(edge, "think", thinking={"type": "enabled"})
    message = response.json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm…", "Hällo")
    assert prompt_text(edge).endswith("<｜Assistant｜><think>")
    streamed = assembled(post(edge, "think", thinking={"type": "enabled"}, stream=True))
    assert (streamed["reasoning_content"], streamed["content"]) == ("hm…", "Hällo")


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"thinking": False}, "reasoning_effort": "high"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, False),
    ],
)
def test_ways_to_switch_thinking(edge: RunningEdge, fields: dict[str, Any], thinks: bool) -> None:
    assert post(edge, "think", **fields).status_code == 200
    assert prompt_text(edge).endswith("<think>" if thinks else "</think>")


@pytest.mark.parametrize("answer", ["call", "think-call"])
def test_tool_calls_are_the_same_streamed_and_whole(edge: RunningEdge, answer: str) -> None:
    fields = {"tools": [WEATHER], "reasoning_effort": "high" if answer == "think-call" else None}
    response = post(edge, answer, **fields)
    choice = response.json()["choices"][0]
    calls = choice["message"]["tool_calls"]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        ("weather", ARGUMENTS[0]),
        ("now", ARGUMENTS[1]),
    ]
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == ("Let me see." if answer == "call" else None)
    streamed = assembled(post(edge, answer, stream=True, **fields))
    assert [(call["name"], call["arguments"]) for call in streamed["tool_calls"]] == [
        ("weather", ARGUMENTS[0]),
        ("now", ARGUMENTS[1]),
    ]
    assert len({call["id"] for call in streamed["tool_calls"]}) == 2
    assert streamed["finish_reason"] == "tool_calls"
    assert streamed["content"] == (choice["message"]["content"] or "")
    assert streamed["reasoning_content"] == choice["message"].get("reasoning_content", "")


def test_tools_are_in_the_prompt_unless_switched_off(edge: RunningEdge) -> None:
    post(edge, tools=[WEATHER])
    assert json.dumps(WEATHER["function"], ensure_ascii=False) in prompt_text(edge)
    post(edge, "call", tools=[WEATHER], tool_choice="none")
    assert "functions" not in prompt_text(edge)


@pytest.mark.parametrize("stream", [False, True])
def test_tool_choice_none_yields_no_calls(edge: RunningEdge, stream: bool) -> None:
    response = post(edge, "call", tools=[WEATHER], tool_choice="none", stream=stream)
    choice = response.json()["choices"][0] if not stream else None
    message = assembled(response) if choice is None else choice["message"] | {"finish_reason": choice["finish_reason"]}
    assert not message.get("tool_calls")
    assert (message["content"], message["finish_reason"]) == ("Let me see.", "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_parallel_calls_can_be_switched_off(edge: RunningEdge, stream: bool) -> None:
    response = post(edge, "call", tools=[WEATHER], parallel_tool_calls=False, stream=stream)
    calls = assembled(response)["tool_calls"] if stream else response.json()["choices"][0]["message"]["tool_calls"]
    assert len(calls) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_dictated_call_starts_in_the_prompt(edge: RunningEdge, choice: Any, stream: bool) -> None:
    named = isinstance(choice, dict)
    response = post(edge, "named" if named else "required", tools=[WEATHER], tool_choice=choice, stream=stream)
    assert prompt_text(edge).endswith(
        '</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="' + ('weather">\n' if named else "")
    )
    if stream:
        calls = assembled(response)["tool_calls"]
        assert [call["arguments"] for call in calls] == ARGUMENTS
    else:
        calls = response.json()["choices"][0]["message"]["tool_calls"]
        assert [call["function"]["arguments"] for call in calls] == ARGUMENTS
        assert response.json()["choices"][0]["message"]["content"] is None


def test_a_call_that_is_cut_off_is_not_returned(edge: RunningEdge) -> None:
    choice = post(edge, "cut/length", tools=[WEATHER]).json()["choices"][0]
    assert "tool_calls" not in choice["message"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Let me see.", "length")
    streamed = assembled(post(edge, "cut/length", tools=[WEATHER], stream=True))
    assert streamed["finish_reason"] == "length"
    assert streamed["content"] == "Let me see."


@pytest.mark.parametrize(
    ("answer", "num_calls", "finish"),
    [("second-cut/length", 1, "length"), ("second-cut", 1, "tool_calls"), ("call/length", 2, "tool_calls")],
)
def test_complete_calls_are_returned_whatever_follows(
    edge: RunningEdge, answer: str, num_calls: int, finish: str
) -> None:
    choice = post(edge, answer, tools=[WEATHER]).json()["choices"][0]
    assert (len(choice["message"]["tool_calls"]), choice["finish_reason"]) == (num_calls, finish)
    assert assembled(post(edge, answer, tools=[WEATHER], stream=True))["finish_reason"] == finish


def test_a_history_with_tools_is_rendered(edge: RunningEdge) -> None:
    first = post(edge, "call", tools=[WEATHER]).json()["choices"][0]["message"]
    history = [{"role": "user", "content": "hi"}, first]
    history += [{"role": "tool", "tool_call_id": call["id"], "content": "5C"} for call in first["tool_calls"]]
    assert post(edge, tools=[WEATHER], messages=history).status_code == 200
    text = prompt_text(edge)
    assert f"</think>Let me see.{CALLS}<｜end▁of▁sentence｜>" in text
    assert text.endswith("<result>5C</result>\n<result>5C</result>\n</function_results>\n\n</think>")


def test_stop_strings_apply_to_the_raw_text(edge: RunningEdge) -> None:
    message = post(edge, "think", thinking={"type": "enabled"}, stop=["</think>Hä"]).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm…", "")
    streamed = assembled(post(edge, "think", thinking={"type": "enabled"}, stop="äl", stream=True))
    assert (streamed["content"], streamed["finish_reason"]) == ("H", "stop")


def test_the_whole_context_is_the_default_budget(edge: RunningEdge) -> None:
    post(edge)
    request = edge.dispatcher.requests[-1]
    assert request.sampling.max_tokens == 4096 - len(request.prompt_tokens)
    post(edge, max_tokens=5, max_completion_tokens=7)
    assert edge.dispatcher.requests[-1].sampling.max_tokens == 7


def test_logprobs(edge: RunningEdge, client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        logprobs=True,
        top_logprobs=2,
        extra_body={"cache_salt": "plain"},
    )
    ids = [*ids_of(TOKENIZER, ANSWERS["plain"]), EOS_ID]
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.logprob for entry in logprobs.content] == [-token / 1000 for token in ids]
    assert bytes(byte for entry in logprobs.content[:-1] for byte in entry.bytes or []).decode() == ANSWERS["plain"]
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * len(ids)
    events = sse_events(post(edge, logprobs=True, top_logprobs=2, stream=True).text)
    parts = [event["choices"][0]["logprobs"] for event in events]
    streamed = [entry for part in parts if part for entry in part["content"]]
    assert streamed == [entry.model_dump() for entry in logprobs.content]


def test_token_ids_can_be_returned(edge: RunningEdge) -> None:
    ids = [*ids_of(TOKENIZER, ANSWERS["call"]), EOS_ID]
    body = post(edge, "call", return_token_ids=True).json()
    assert body["choices"][0]["token_ids"] == ids
    assert body["prompt_token_ids"] == edge.dispatcher.requests[-1].prompt_tokens
    events = sse_events(post(edge, "call", return_token_ids=True, stream=True).text)
    choices = [event["choices"][0] for event in events]
    assert [token for choice in choices for token in choice.get("token_ids", [])] == ids
    assert choices[0]["prompt_token_ids"] == body["prompt_token_ids"]


def test_several_answers_stream_side_by_side(edge: RunningEdge) -> None:
    texts = {0: "", 1: "", 2: ""}
    for event in sse_events(post(edge, n=3, stream=True).text):
        [choice] = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == dict.fromkeys(range(3), ANSWERS["plain"])
    assert len({request.sampling.seed for request in edge.dispatcher.requests[-3:]}) == 3


def test_a_prefix_is_continued(edge: RunningEdge) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Once", "prefix": True}]
    post(edge, messages=messages)
    assert prompt_text(edge).endswith("<｜User｜>x<｜Assistant｜></think>Once")


def test_the_response_format_is_in_the_prompt(edge: RunningEdge) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    post(edge, response_format=named)
    assert f"\n\n## Response Format:\n\nYou MUST use JSON of the following schema to reply:\n{json.dumps(schema)}" in (
        prompt_text(edge)
    )


def test_metadata_that_changes_nothing_is_accepted(edge: RunningEdge) -> None:
    message = {"role": "assistant", "content": "y", "refusal": None, "annotations": [], "audio": None, "x": 1}
    users = {"role": "user", "content": "x", "name": "bob"}
    response = post(
        edge, messages=[users, message, users], user="u", metadata={"a": "b"}, store=False, service_tier="auto"
    )
    assert response.status_code == 200


TOOL = {"type": "function", "function": {"name": "f"}}
BAD_SCHEMA = {"properties": {"x": {"type": "strng"}}}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": []}, "messages", ">= 1"),
        ({"messages": "hi"}, "messages", "str"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "robot"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "int"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "image"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "last message must be"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "tool results"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "function"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0].type", "retrieval"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0]", "name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]", "regex"),
        ({"tools": [TOOL, TOOL]}, "tools[1]", "two tools"),
        ({"tools": [{"function": {"name": "f", "parameters": "x"}}]}, "tools[0]", "parameters"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools[0]", "object"),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"properties": {"x": {"type": "strng"}}}}}]},
            "tools[0]",
            "strng",
        ),
        ({"tools": [{"function": {"name": "f", "parameters": {"required": True}}}]}, "tools[0]", "required"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice", "'g'"),
        ({"tool_choice": "required", "tools": [TOOL], "reasoning_effort": "high"}, "tool_choice", "thinking mode"),
        ({"tool_choice": "always"}, "tool_choice", "always"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "yaml"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs", "at most 20"),
        ({"functions": []}, None, "functions"),
        ({"max_completion_tokens": 4096}, "max_tokens", "context is 4096"),
        ({"thinking": {"type": "maybe"}}, "thinking.type", "maybe"),
    ],
)
def test_bad_requests_name_what_is_wrong(
    edge: RunningEdge, body: dict[str, Any], param: str | None, message: str
) -> None:
    response = post(edge, **body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert message in error["message"], error
    assert error["param"] == param, error
