from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from llm_engine.api.errors import DeadlineExceeded, Overloaded, ServingError, TooManyRequests
from llm_engine.api.request import FinishReason
from router.dispatch_api import GenerationRequest
from router.sampling import choice_seed
from tests.unit.router.edge_harness import (
    EOS_ID,
    MODEL,
    VOCAB_SIZE,
    RunningEdge,
    Script,
    ScriptedDispatcher,
    byte_tokenizer,
    ids_of,
    running_edge,
    sse_events,
)

TOKENIZER = byte_tokenizer()
ANSWER = "grüße 🙂 ok"


def tokens(text: str) -> list[int]:
    return ids_of(TOKENIZER, text)


def answer_in_bytes(request: GenerationRequest) -> Script:
    """ANSWER, one byte a chunk, then the end token; the prompt 'fail…' raises instead."""
    prompt = TOKENIZER.decode(request.prompt_tokens)
    if prompt.startswith("fail"):
        errors = {
            "o": Overloaded("full", retry_after_s=2.5),
            "r": TooManyRequests("fast", retry_after_s=1.5),
            "d": DeadlineExceeded("late"),
            "s": ServingError("broken"),
        }
        start = [tokens("ab")] if prompt.endswith("midway") else []
        return Script(start, error=errors.get(prompt[5:6], RuntimeError("a bug")))
    return Script([[token] for token in [*tokens(ANSWER), EOS_ID]])


@pytest.fixture(scope="module")
def edge() -> Iterator[RunningEdge]:
    with running_edge(ScriptedDispatcher(answer_in_bytes), max_n=4, max_logprobs=5) as running:
        yield running


@pytest.fixture
def client(edge: RunningEdge) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(edge: RunningEdge, **body: Any) -> httpx.Response:
    return edge.http.post("/v1/completions", json={"model": MODEL, "prompt": "hi"} | body)


def last_request(edge: RunningEdge) -> GenerationRequest:
    return edge.dispatcher.requests[-1]


def test_the_openai_client_completes(edge: RunningEdge, client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt="hi", max_tokens=64)
    assert completion.choices[0].text == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    num_output = len(tokens(ANSWER)) + 1
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2, num_output)
    assert completion.usage.total_tokens == 2 + num_output
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 2
    assert last_request(edge).prompt_tokens == tokens("hi")
    assert last_request(edge).request_id == f"{completion.id}-0"


def test_the_openai_client_streams(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="hi", max_tokens=64, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokens(ANSWER)) + 1
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_options_has_no_usage(edge: RunningEdge) -> None:
    response = post(edge, stream=True, max_tokens=64)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert all("usage" not in event for event in sse_events(response.text))


def test_usage_can_come_with_every_chunk(edge: RunningEdge) -> None:
    response = post(edge, stream=True, max_tokens=64, stream_options={"continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in sse_events(response.text)]
    assert counts == sorted(set(counts))
    assert counts[0] == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        ("e 🙂", "grüß", 12),
        (["zz", "üß"], "gr", 6),
        (["🙂"], "grüße ", 12),
        ("zzz", ANSWER, 15),
    ],
)
def test_stop_strings_end_the_text_at_the_exact_token(
    edge: RunningEdge, stop: Any, text: str, num_tokens: int, stream: bool
) -> None:
    stopped_early = num_tokens < len(tokens(ANSWER))
    edge.dispatcher.closed_early.clear()
    options = {"stream_options": {"include_usage": True}} if stream else {}
    response = post(edge, stop=stop, max_tokens=64, stream=stream, **options)
    if stream:
        *events, last = sse_events(response.text)
        assert "".join(event["choices"][0]["text"] for event in events) == text
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
        usage = last["usage"]
    else:
        choice = response.json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text, "stop")
        usage = response.json()["usage"]
    assert usage["completion_tokens"] == num_tokens + (not stopped_early)
    assert edge.dispatcher.closed_early == ([last_request(edge).request_id] if stopped_early else [])


def test_the_stop_string_can_be_kept(edge: RunningEdge) -> None:
    choice = post(edge, stop="üß", include_stop_str_in_output=True).json()["choices"][0]
    assert choice["text"] == "grüß"


def test_every_sampling_option_reaches_the_dispatcher(edge: RunningEdge) -> None:
    post(
        edge,
        seed=5,
        max_tokens=9,
        min_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"5": 1.5, "7": -100},
        stop_token_ids=[9, 10],
        ignore_eos=True,
        logprobs=2,
        cache_salt="tenant",
    )
    request = last_request(edge)
    sampling = request.sampling
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (5, 9, 3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
    assert sampling.logit_bias == {5: 1.5, 7: -100.0}
    assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.logprobs) == ((9, 10), True, 2)
    assert request.salt == "tenant"
    assert request.deadline_s == 600


def test_defaults(edge: RunningEdge) -> None:
    post(edge)
    sampling = last_request(edge).sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (16, 1.0, 1.0, 0)
    assert (sampling.logprobs, sampling.ignore_eos, sampling.stop_token_ids) == (None, False, ())
    post(edge, max_tokens=None, temperature=None, stop=None, logit_bias=None, stream=None, n=None, seed=None, top_k=-1)
    assert last_request(edge).sampling.top_k == 0


def test_a_vanishing_temperature_is_greedy(edge: RunningEdge) -> None:
    post(edge, temperature=1e-9)
    assert last_request(edge).sampling.temperature == 0.0


def test_the_drawn_seed_is_returned_and_repeats_the_request(edge: RunningEdge) -> None:
    first = post(edge)
    second = post(edge)
    seed = first.json()["seed"]
    assert first.headers["x-baton-seed"] == str(seed) == str(edge.dispatcher.requests[-2].sampling.seed)
    assert second.json()["seed"] != seed
    assert post(edge, seed=seed).json()["seed"] == seed
    assert post(edge, stream=True, seed=seed).headers["x-baton-seed"] == str(seed)
    assert last_request(edge).sampling.seed == seed


def test_choices_have_seeds_of_their_own(edge: RunningEdge) -> None:
    response = post(edge, prompt=["a", "b"], n=2, seed=-3, max_tokens=64)
    requests = edge.dispatcher.requests[-4:]
    assert [TOKENIZER.decode(request.prompt_tokens) for request in requests] == ["a", "a", "b", "b"]
    seeds = [request.sampling.seed for request in requests]
    assert seeds == [choice_seed(-3, 0), choice_seed(-3, 1)] * 2
    assert seeds[0] != seeds[1]
    assert all(seed >= 0 for seed in seeds)
    assert [choice["index"] for choice in response.json()["choices"]] == [0, 1, 2, 3]
    assert all(choice["text"] == ANSWER for choice in response.json()["choices"])
    usage = response.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 4 * (len(tokens(ANSWER)) + 1))
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4


def test_several_choices_stream_side_by_side(edge: RunningEdge) -> None:
    response = post(edge, prompt=["a", "b"], n=2, max_tokens=64, stream=True, stop="ok")
    texts = ["", "", "", ""]
    finished = set()
    for event in sse_events(response.text):
        [choice] = event["choices"]
        assert choice["index"] not in finished
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            finished.add(choice["index"])
    assert texts == [ANSWER.removesuffix("ok")] * 4
    assert len(finished) == 4


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("hé", [tokens("hé")]),
        ([5, 6, 7], [[5, 6, 7]]),
        (["a", "b"], [tokens("a"), tokens("b")]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        ("<｜User｜>a", [[TOKENIZER.added_ids["<｜User｜>"], *tokens("a")]]),
    ],
)
def test_kinds_of_prompt(edge: RunningEdge, prompt: Any, sent: list[list[int]]) -> None:
    response = post(edge, prompt=prompt)
    assert response.status_code == 200
    assert [request.prompt_tokens for request in edge.dispatcher.requests[-len(sent) :]] == sent


def test_the_begin_token_is_added_on_request_and_never_twice(edge: RunningEdge) -> None:
    post(edge, add_special_tokens=True)
    assert last_request(edge).prompt_tokens == [0, *tokens("hi")]
    post(edge, prompt="<｜begin▁of▁sentence｜>hi", add_special_tokens=True)
    assert last_request(edge).prompt_tokens == [0, *tokens("hi")]


def test_logprobs(edge: RunningEdge, client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt="hi", max_tokens=64, logprobs=2, stop="ß")
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    ids = tokens("grüß")
    assert logprobs.tokens == ["g", "r", "bytes:\\xc3", "bytes:\\xbc", "bytes:\\xc3", "bytes:\\x9f"]
    assert logprobs.token_logprobs == [-token / 1000 for token in ids]
    assert logprobs.text_offset == [0, 1, 2, 2, 3, 3]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"g": -ids[0] / 1000, "h": -(ids[0] + 1) / 1000}
    streamed = post(edge, max_tokens=64, logprobs=2, stop="ß", stream=True)
    parts = [event["choices"][0]["logprobs"] for event in sse_events(streamed.text)]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [item for part in parts if part for item in part[name]] == getattr(logprobs, name)


def test_logprobs_zero_tells_the_drawn_token_only(edge: RunningEdge) -> None:
    logprobs = post(edge, logprobs=0, max_tokens=64).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] == {"g": logprobs["token_logprobs"][0]}


def test_token_ids_can_be_returned(edge: RunningEdge) -> None:
    ids = [*tokens(ANSWER), EOS_ID]
    choice = post(edge, return_token_ids=True, max_tokens=64).json()["choices"][0]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == (ids, tokens("hi"))
    events = sse_events(post(edge, return_token_ids=True, max_tokens=64, stream=True).text)
    choices = [event["choices"][0] for event in events]
    assert [token for choice in choices for token in choice["token_ids"]] == ids
    assert [choice.get("prompt_token_ids") for choice in choices[:2]] == [tokens("hi"), None]


def test_special_tokens_are_shown_on_request_only() -> None:
    text = "a<think>b｜DSML｜c"
    script = Script([[*tokens(text), EOS_ID]], finish=FinishReason.LENGTH)
    with running_edge(ScriptedDispatcher(lambda request: script)) as running:
        assert post(running).json()["choices"][0]["text"] == "a<think>bc"
        shown = post(running, skip_special_tokens=False).json()["choices"][0]
        assert (shown["text"], shown["finish_reason"]) == (f"{text}<｜end▁of▁sentence｜>", "length")


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"model": "other"}, 404, "model", "served: nano"),
        ({"prompt": [1] * 4090, "max_tokens": 100}, 400, "max_tokens", "context is 4096"),
        ({"prompt": [1] * 4096}, 400, "max_tokens", "context is 4096"),
        ({"prompt": [1] * 5000}, 400, "prompt", "context is 4096"),
        ({"prompt": "x" * 200_000}, 400, "prompt", "can't fit"),
        ({"prompt": ["x", "y" * 200_000]}, 400, "prompt", "can't fit"),
        ({"prompt": []}, 400, "prompt", "empty"),
        ({"prompt": ""}, 400, "prompt", "empty"),
        ({"prompt": [[]]}, 400, "prompt", "empty"),
        ({"prompt": [1, "a"]}, 400, "prompt", "mixes"),
        ({"prompt": [VOCAB_SIZE]}, 400, "prompt", "0 to 319"),
        ({"prompt": [-1]}, 400, "prompt", "0 to 319"),
        ({"prompt": [2**70]}, 400, "prompt", "0 to 319"),
        ({"prompt": [1.5]}, 400, "prompt[0]", "float"),
        ({"prompt": {"a": 1}}, 400, "prompt", "object"),
        ({"prompt": ["x"] * 129}, 400, "prompt", "128 prompts"),
        ({"prompt": ["x"] * 100, "n": 2}, 400, "n", "128 sequences"),
        ({"max_tokens": 0}, 400, "max_tokens", ">= 1"),
        ({"max_tokens": "5"}, 400, "max_tokens", "str"),
        ({"temperature": 2.5}, 400, "temperature", "<= 2"),
        ({"top_p": 0}, 400, "top_p", "> 0"),
        ({"top_k": -2}, 400, "top_k", ">= -1"),
        ({"n": 5}, 400, "n", "at most 4"),
        ({"logprobs": 6}, 400, "logprobs", "at most 5"),
        ({"stop": ""}, 400, "stop", ">= 1"),
        ({"stop": ["x"] * 17}, 400, "stop", "<= 16"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias", "regex"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias[...]", "<= 100"),
        ({"logit_bias": {"320": 1}}, 400, "logit_bias", "not a token id"),
        ({"stop_token_ids": [320]}, 400, "stop_token_ids", "not a token id"),
        ({"seed": 2**63}, 400, "seed", "<="),
        ({"echo": True}, 400, "echo", "not supported"),
        ({"suffix": "x"}, 400, "suffix", "not supported"),
        ({"best_of": 2}, 400, "best_of", "2"),
        ({"repetition_penalty": 1.2}, 400, "repetition_penalty", "<= 1"),
        ({"max_token": 5}, 400, None, "max_token"),
        ({"stream": "yes"}, 400, "stream", "str"),
    ],
)
def test_bad_requests_name_what_is_wrong(
    edge: RunningEdge, body: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    num_submitted = len(edge.dispatcher.requests)
    response = post(edge, **body)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert message in error["message"], error
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert len(edge.dispatcher.requests) == num_submitted


def test_integral_floats_are_integers(edge: RunningEdge) -> None:
    assert post(edge, prompt=[5.0, 6], max_tokens=3.0, seed=7.0, temperature=1).status_code == 200
    request = last_request(edge)
    assert (request.prompt_tokens, request.sampling.max_tokens, request.sampling.seed) == ([5, 6], 3, 7)


def test_codes_that_clients_act_on(edge: RunningEdge) -> None:
    assert post(edge, model="other").json()["error"]["code"] == "model_not_found"
    assert post(edge, max_tokens=5000).json()["error"]["code"] == "context_length_exceeded"
    assert post(edge, prompt="fail overloaded").json()["error"]["code"] == "overloaded"
    assert post(edge, prompt="fail rate").json()["error"]["code"] == "too_many_requests"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "status", "kind", "retry_after"),
    [
        ("fail overloaded", 503, "server_error", "3"),
        ("fail rate", 429, "rate_limit_error", "2"),
        ("fail deadline", 504, "server_error", None),
        ("fail serving", 500, "server_error", None),
        ("fail bug", 500, "server_error", None),
    ],
)
def test_failures_before_the_first_token_have_a_status(
    edge: RunningEdge, prompt: str, status: int, kind: str, retry_after: str | None, stream: bool
) -> None:
    response = post(edge, prompt=prompt, stream=stream)
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
    assert response.headers.get("retry-after") == retry_after
    assert "a bug" not in response.text


def test_a_failure_of_one_choice_fails_the_request(edge: RunningEdge) -> None:
    assert post(edge, prompt=["ok", "fail overloaded"]).status_code == 503


def test_a_failure_in_the_middle_of_a_stream_is_an_event(edge: RunningEdge, client: openai.OpenAI) -> None:
    events = sse_events(post(edge, prompt="fail serving midway", stream=True).text)
    assert [list(event) for event in events][-1] == ["error"]
    assert events[-1]["error"] == {"message": "broken", "type": "server_error", "param": None, "code": None}
    with pytest.raises(openai.APIError, match="broken"):
        list(client.completions.create(model=MODEL, prompt="fail serving midway", stream=True))


def test_a_bug_in_the_middle_of_a_stream_breaks_the_connection(edge: RunningEdge) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        post(edge, prompt="fail bug midway", stream=True)


def test_events_are_valid_json_whatever_the_text() -> None:
    text = '"\\\n\t\x00\x7f\u2028é🙂</script>'
    script = Script([[token] for token in tokens(text)], finish=FinishReason.LENGTH)
    with running_edge(ScriptedDispatcher(lambda request: script)) as running:
        events = sse_events(post(running, stream=True).text)
        assert "".join(event["choices"][0]["text"] for event in events) == text
        assert json.loads(post(running).text)["choices"][0]["text"] == text
