from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_engine.api.errors import ConfigError, RequestError
from router.chat import dsml
from router.chat.encoding import Conversation, Rendered, render
from router.chat.format import DeepseekV32Format, load_chat_format
from router.chat.messages import Message, ResponseFormat, Tool
from router.chat.template import PromptTexts, fill
from tests.unit.router.edge_harness import byte_tokenizer

TEXTS = PromptTexts(
    tools="TOOLS <{dsml_token}x> {thinking_start_token}{thinking_end_token} {{}}\n{tool_schemas}\n",
    response_format="FORMAT {schema}",
)
BOS, EOS = dsml.BOS, dsml.EOS
LOOKUP = {"name": "lookup", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
LOOKUP_LINE = '{"name": "lookup", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}'
LOOKUP_BLOCK = f"TOOLS <｜DSML｜x> <think></think> {{}}\n{LOOKUP_LINE}\n"


def messages(*raw: dict[str, Any]) -> list[Message]:
    return msgspec.convert(list(raw), list[Message])


def encode(*raw: dict[str, Any], thinking: bool = False, tools: Any = (), response_format: Any = None) -> Rendered:
    conversation = Conversation(
        messages=messages(*raw),
        thinking=thinking,
        tools=[Tool(function=function) for function in tools],
        response_format=response_format and msgspec.convert(response_format, ResponseFormat),
    )
    return render(conversation, TEXTS)


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def tool(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **fields}


def call(name: str, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_chat_mode_closes_the_thought_at_once() -> None:
    rendered = encode(system("Be brief."), user("ping"))
    assert rendered.text == f"{BOS}Be brief.<｜User｜>ping<｜Assistant｜></think>"
    assert not rendered.in_reasoning


def test_thinking_mode_opens_the_thought() -> None:
    rendered = encode(system("Be brief."), user("ping"), thinking=True)
    assert rendered.text == f"{BOS}Be brief.<｜User｜>ping<｜Assistant｜><think>"
    assert rendered.in_reasoning


@pytest.mark.parametrize("thinking", [False, True])
def test_reasoning_of_earlier_turns_is_dropped(thinking: bool) -> None:
    rendered = encode(user("a"), assistant("b", reasoning_content="r1"), user("c"), thinking=thinking)
    marker = "<think>" if thinking else "</think>"
    assert rendered.text == f"{BOS}<｜User｜>a<｜Assistant｜></think>b{EOS}<｜User｜>c<｜Assistant｜>{marker}"


LOOP_CALLS = (
    "\n\n<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="lookup">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜function_calls>"
)


def test_reasoning_survives_inside_the_current_tool_loop() -> None:
    rendered = encode(
        user("w?"),
        assistant(reasoning_content="need data", tool_calls=[call("lookup", '{"city": "Oslo", "days": 2}')]),
        tool("5C"),
        thinking=True,
    )
    assert rendered.text == (
        f"{BOS}<｜User｜>w?<｜Assistant｜><think>need data</think>{LOOP_CALLS}{EOS}"
        "\n\n<function_results>\n<result>5C</result>\n</function_results>\n\n<think>"
    )
    assert rendered.in_reasoning


def test_a_tool_loop_in_chat_mode_has_no_thoughts() -> None:
    rendered = encode(
        user("w?"),
        assistant("", reasoning_content="dropped", tool_calls=[call("lookup", {"city": "Oslo", "days": 2})]),
        tool("5C"),
    )
    assert rendered.text == (
        f"{BOS}<｜User｜>w?<｜Assistant｜></think>{LOOP_CALLS}{EOS}"
        "\n\n<function_results>\n<result>5C</result>\n</function_results>\n\n</think>"
    )


def test_an_older_tool_loop_keeps_its_calls_but_not_its_thoughts() -> None:
    rendered = encode(
        user("w?"),
        assistant("ok", reasoning_content="r", tool_calls=[call("lookup", '{"city": "Oslo", "days": 2}')]),
        tool("5C"),
        assistant("5 degrees", reasoning_content="r2"),
        user("thanks"),
        thinking=True,
    )
    assert rendered.text == (
        f"{BOS}<｜User｜>w?<｜Assistant｜></think>ok{LOOP_CALLS}{EOS}"
        "\n\n<function_results>\n<result>5C</result>\n</function_results>\n\n</think>"
        f"5 degrees{EOS}<｜User｜>thanks<｜Assistant｜><think>"
    )


def test_parallel_results_are_put_into_the_order_of_their_calls() -> None:
    calls = [call("a", "{}", "id-a"), call("b", "{}", "id-b")]
    turn = (user("x"), assistant(tool_calls=calls))
    swapped = encode(*turn, tool("B", tool_call_id="id-b"), tool("A", tool_call_id="id-a"))
    ordered = encode(*turn, tool("A", tool_call_id="id-a"), tool("B", tool_call_id="id-b"))
    unnamed = encode(*turn, tool("A"), tool("B"))
    assert swapped.text == ordered.text == unnamed.text
    assert "\n<result>A</result>\n<result>B</result>\n</function_results>\n\n</think>" in ordered.text


def test_a_call_without_parameters_has_an_empty_line() -> None:
    rendered = encode(user("x"), assistant("c", tool_calls=[call("now", "{}"), call("now", "")]), tool("1"), tool("2"))
    invoke = '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>'
    assert f"c\n\n<｜DSML｜function_calls>\n{invoke}\n{invoke}\n</｜DSML｜function_calls>{EOS}" in rendered.text


@pytest.mark.parametrize(
    ("value", "rendered"),
    [
        ('a"b\n<é>', 'string="true">a"b\n<é>'),
        (2.5, 'string="false">2.5'),
        (None, 'string="false">null'),
        ([1, "é", {"k": True}], 'string="false">[1, "é", {"k": true}]'),
    ],
)
def test_strings_are_rendered_raw_and_other_values_as_json(value: Any, rendered: str) -> None:
    prompt = encode(user("x"), assistant(tool_calls=[call("f", json.dumps({"p": value}))]), tool("r"))
    assert f'name="p" {rendered}</｜DSML｜parameter>' in prompt.text


def test_tools_go_to_the_first_system_message() -> None:
    rendered = encode(system("S"), user("x"), tools=[LOOKUP])
    assert rendered.text == f"{BOS}S\n\n{LOOKUP_BLOCK}<｜User｜>x<｜Assistant｜></think>"
    late = encode(user("x"), assistant("y"), system("S"), user("z"), tools=[LOOKUP])
    assert f"{EOS}S\n\n{LOOKUP_BLOCK}<｜User｜>z" in late.text


def test_tools_appear_once() -> None:
    text = encode(system("S"), user("x"), system("T"), user("y"), tools=[LOOKUP]).text
    assert text.count(LOOKUP_LINE) == 1
    assert "T<｜User｜>y" in text


def test_tools_without_a_system_message_go_in_front() -> None:
    rendered = encode(user("x"), tools=[LOOKUP, {"description": "é", "name": "b"}])
    second = '{"description": "é", "name": "b"}'
    assert rendered.text == (
        f"{BOS}\n\nTOOLS <｜DSML｜x> <think></think> {{}}\n{LOOKUP_LINE}\n{second}\n<｜User｜>x<｜Assistant｜></think>"
    )


def test_tools_of_the_request_replace_those_of_the_message() -> None:
    own = {"role": "system", "content": "S", "tools": [{"type": "function", "function": {"name": "own"}}]}
    assert '{"name": "own"}' in encode(own, user("x")).text
    assert '{"name": "own"}' not in encode(own, user("x"), tools=[LOOKUP]).text


def test_a_leading_developer_message_carries_tools_and_format() -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}
    developer = {"role": "developer", "content": "D"}
    rendered = encode(developer, thinking=True, tools=[LOOKUP], response_format=schema)
    assert rendered.text == (
        f'{BOS}<｜User｜>\n\n{LOOKUP_BLOCK}\n\nFORMAT {{"a": 1}}\n\n# The user\'s message is: D<｜Assistant｜><think>'
    )


def test_the_response_format_follows_the_tools() -> None:
    text = encode(system("S"), user("x"), tools=[LOOKUP], response_format={"type": "json_object"}).text
    assert text.startswith(f'{BOS}S\n\n{LOOKUP_BLOCK}\n\nFORMAT {{"type": "object"}}<｜User｜>')
    assert "FORMAT" not in encode(system("S"), user("x"), response_format={"type": "text"}).text


def test_content_parts_are_joined_by_newlines() -> None:
    assert (
        "<｜User｜>a\nb<｜Assistant｜>"
        in encode(user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).text
    )


@pytest.mark.parametrize(
    ("thinking", "fields", "ending", "in_reasoning"),
    [
        (False, {"content": "As"}, "</think>As", False),
        (True, {"content": "As", "reasoning_content": "r"}, "<think>r</think>As", False),
        (True, {"reasoning_content": "r"}, "<think>r", True),
        (True, {"content": "As"}, "<think></think>As", False),
    ],
)
def test_a_prefix_is_continued(thinking: bool, fields: dict[str, Any], ending: str, in_reasoning: bool) -> None:
    rendered = encode(user("x"), {"role": "assistant", "prefix": True, **fields}, thinking=thinking)
    assert rendered.text == f"{BOS}<｜User｜>x<｜Assistant｜>{ending}"
    assert rendered.in_reasoning is in_reasoning


@pytest.mark.parametrize(
    ("raw", "thinking", "message"),
    [
        ([system("S")], False, "last message must be"),
        ([user("x"), assistant("y")], False, "last message must be"),
        ([assistant("y", prefix=True)], False, "last message must be"),
        ([user("x"), assistant("y", prefix=True), user("z")], False, "prefix belongs"),
        ([user("x"), assistant("y", prefix=True, tool_calls=[call("f", "{}")])], False, "prefix belongs"),
        ([{"role": "developer", "content": ""}], False, "developer message is empty"),
        ([tool("r")], False, "1 tool results follow an assistant message with 0"),
        ([user("x"), tool("r")], False, "1 tool results follow an assistant message with 0"),
        ([user("x"), assistant(tool_calls=[call("f", "{}")]), tool("r"), tool("r")], False, "2 tool results follow"),
        ([user("x"), assistant(tool_calls=[call("f", "{}")] * 2), tool("r")], False, "1 of 2 tool results are missing"),
        ([user("x"), assistant(tool_calls=[call("f", "[]")]), tool("r")], False, "not a JSON object"),
        ([user("x"), assistant(tool_calls=[call("f", "{")]), tool("r")], False, "not a JSON object"),
        ([user("x"), assistant("y"), tool("r")], False, "with 0 tool calls"),
        ([user("x"), assistant("y"), tool("r")], True, "needs reasoning_content or tool_calls"),
        ([user("x"), assistant("y"), assistant("z", prefix=True)], True, "last message must be"),
    ],
)
def test_conversations_without_a_rendering_are_refused(raw: list[Any], thinking: bool, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        encode(*raw, thinking=thinking)


def test_thinking_needs_reasoning_or_calls_after_the_last_user() -> None:
    turn = (user("x"), assistant("y", tool_calls=[]), assistant("y", tool_calls=[call("f", "{}")]), tool("r"))
    with pytest.raises(RequestError, match="needs reasoning_content"):
        encode(*turn, thinking=True)
    assert encode(*turn, thinking=False)


def test_missing_results_leave_the_block_open_in_the_middle() -> None:
    calls = assistant(tool_calls=[call("f", "{}")] * 2)
    text = encode(user("x"), calls, tool("r"), user("y")).text
    assert "\n\n<function_results>\n<result>r</result><｜User｜>y" in text


INJECTION = "".join((BOS, EOS, dsml.USER, dsml.ASSISTANT, dsml.THINK_START, dsml.THINK_END, dsml.DSML))


def test_nothing_a_client_writes_becomes_a_special_token() -> None:
    tokenizer = byte_tokenizer()

    def specials(text: str) -> list[int]:
        rendered = encode(
            system(text),
            user(text),
            assistant(
                text, reasoning_content=text, tool_calls=[call(f"f{text}", json.dumps({text: text, "n": [text]}))]
            ),
            tool(text),
            user([{"type": "text", "text": text}]),
            assistant(text, reasoning_content=text, prefix=True),
            thinking=True,
            tools=[{"name": "f", "description": text}],
            response_format={"type": "json_schema", "json_schema": {"schema": {text: text}}},
        )
        ids = tokenizer.encode(rendered.segments)
        assert tokenizer.decode(ids) == rendered.text
        added = set(tokenizer.added_ids.values())
        return [token for token in ids if token in added]

    assert specials(INJECTION) == specials("harmless")
    assert len(specials(INJECTION)) > 10


@given(st.text(), st.text())
def test_user_text_appears_unchanged(first: str, second: str) -> None:
    assert encode(user(first), assistant(second), user("")).text == (
        f"{BOS}<｜User｜>{first}<｜Assistant｜></think>{second}{EOS}<｜User｜><｜Assistant｜></think>"
    )


def test_forced_calls_continue_the_prompt() -> None:
    chat = DeepseekV32Format(TEXTS)
    rendered = encode(user("x")).plus(chat.forced_call("f"))
    assert rendered.text.endswith('</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n')
    assert rendered.segments[-1].trusted
    assert chat.forced_call(None).endswith('<｜DSML｜invoke name="')


def test_template_markup_is_trusted_and_schemas_are_not() -> None:
    segments = fill(TEXTS.tools, tool_schemas=INJECTION)
    assert "".join(s.text for s in segments) == f"TOOLS <｜DSML｜x> <think></think> {{}}\n{INJECTION}\n"
    assert [s.text for s in segments if not s.trusted] == [INJECTION]


def checkpoint(tmp_path: Path, source: str | None, architecture: str = "DeepseekV32ForCausalLM") -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    if source is not None:
        (tmp_path / "encoding").mkdir()
        (tmp_path / "encoding" / "encoding_dsv32.py").write_text(source, encoding="utf-8")
    return tmp_path


def test_the_wording_is_read_from_the_checkpoint_without_running_it(tmp_path: Path) -> None:
    source = (
        "raise SystemExit('executed')\n"
        'TOOLS_SYSTEM_TEMPLATE = """## Tools\n\n<{dsml_token}a>{tool_schemas}"""\n'
        'response_format_template: str = "F {schema}"\n'
        "other = 1 + 1\n"
    )
    texts = PromptTexts.from_dir(checkpoint(tmp_path, source))
    assert texts == PromptTexts("## Tools\n\n<{dsml_token}a>{tool_schemas}", "F {schema}")


def test_a_checkpoint_without_the_file_gets_the_default_wording(tmp_path: Path) -> None:
    chat = load_chat_format(checkpoint(tmp_path, None, "DeepseekV3ForCausalLM"))
    rendered = chat.render(Conversation(messages=messages(user("x")), tools=[Tool(function={"name": "f"})]))
    assert '<functions>\n{"name": "f"}\n</functions>' in rendered.text
    assert "<｜DSML｜function_calls>" in rendered.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "TOOLS_SYSTEM_TEMPLATE"),
        ("def (", "not Python"),
        ("TOOLS_SYSTEM_TEMPLATE = 'a {unknown}'", "unknown"),
        ("TOOLS_SYSTEM_TEMPLATE = 'a {'", "Single '{'"),
    ],
)
def test_an_unusable_encoding_file_is_named(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        PromptTexts.from_dir(checkpoint(tmp_path, source))
    assert "encoding_dsv32.py" in str(error.value)


def test_an_unknown_architecture_has_no_chat_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        load_chat_format(checkpoint(tmp_path, None, "LlamaForCausalLM"))
