from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from router.chat import dsml
from router.chat.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from router.chat.parser import MAX_HEADER_CHARS, AnswerParser
from router.chat_deltas import DeltaWriter, MessageBuilder

OPEN = "\n\n<｜DSML｜function_calls>\n"
CLOSE = "\n</｜DSML｜function_calls>"


def invoke(name: str, *parameters: str) -> str:
    body = "\n".join(parameters)
    return f'<｜DSML｜invoke name="{name}">\n{body}\n</｜DSML｜invoke>'


def parameter(name: str, value: str, string: bool = True) -> str:
    return f'<｜DSML｜parameter name="{name}" string="{str(string).lower()}">{value}</｜DSML｜parameter>'


def parse(*pieces: str, in_reasoning: bool = False) -> list[Event]:
    parser = AnswerParser(in_reasoning=in_reasoning)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.finish()


def merged(events: Sequence[Event]) -> list[Event]:
    """Neighbouring pieces of one kind joined: what a reader of the stream ends up with."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        match last, event:
            case Content(a), Content(b):
                out[-1] = Content(a + b)
            case Reasoning(a), Reasoning(b):
                out[-1] = Reasoning(a + b)
            case CallArguments(i, a), CallArguments(_, b):
                out[-1] = CallArguments(i, a + b)
            case _:
                out.append(event)
    return out


def calls_of(text: str) -> list[tuple[str, str]]:
    builder = MessageBuilder()
    builder.add(parse(text))
    return [(call.name, call.arguments) for call in builder.complete_calls]


def test_reasoning_content_and_calls_come_apart() -> None:
    call = invoke("lookup", parameter("city", "Oslo"), parameter("days", "2", string=False))
    assert merged(parse(f"need data</think>sure{OPEN}{call}{CLOSE}", in_reasoning=True)) == [
        Reasoning("need data"),
        Content("sure"),
        CallStart(0, "lookup"),
        CallArguments(0, '{"city": "Oslo", "days": 2}'),
        CallEnd(0),
    ]


def test_without_the_end_of_thinking_everything_is_reasoning() -> None:
    text = f"still{OPEN}{invoke('f')}"
    assert merged(parse(text, in_reasoning=True)) == [Reasoning(text)]


def test_chat_mode_has_no_reasoning() -> None:
    assert merged(parse("a</think>b")) == [Content("a</think>b")]


@pytest.mark.parametrize(
    ("text", "content"),
    [("a\n\n", "a"), ("a\n\n\n", "a\n"), ("a\n", "a\n"), ("", ""), ("\n\n\n\n", "\n\n")],
)
def test_the_gap_in_front_of_the_block_is_taken_off_once(text: str, content: str) -> None:
    events = merged(parse(f"{text}<｜DSML｜function_calls>\n{invoke('f')}{CLOSE}"))
    assert "".join(e.text for e in events if isinstance(e, Content)) == content
    assert isinstance(events[-1], CallEnd)


def test_trailing_newlines_without_a_block_are_content() -> None:
    assert merged(parse("a\n\n")) == [Content("a\n\n")]


def test_several_calls_and_every_kind_of_value() -> None:
    block = "\n".join(
        [
            invoke("a", parameter("s", 'q"\\\n\té '), parameter("j", ' {"x": [1, "é"]}\n', string=False)),
            invoke("b"),
            invoke("c", parameter("n", "1.50", string=False), parameter("bad", "{oops", string=False)),
        ]
    )
    assert calls_of(f"{OPEN}{block}{CLOSE}") == [
        ("a", '{"s": "q\\"\\\\\\n\\té ", "j": {"x": [1, "é"]}}'),
        ("b", "{}"),
        ("c", '{"n": 1.50, "bad": "{oops"}'),
    ]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "'a'", "", "[" * 100000])
def test_what_is_not_json_becomes_a_string(value: str) -> None:
    [(_, arguments)] = calls_of(OPEN + invoke("f", parameter("p", value, string=False)) + CLOSE)
    assert json.loads(arguments) == {"p": value}


def test_a_bare_object_serves_as_arguments() -> None:
    assert calls_of(f'{OPEN}<｜DSML｜invoke name="f">\n {{"a": {{}}}} \n</｜DSML｜invoke>{CLOSE}') == [
        ("f", '{"a": {}}')
    ]
    assert calls_of(f'{OPEN}<｜DSML｜invoke name="f">{{"a": </｜DSML｜invoke>\n{invoke("g")}{CLOSE}') == [("g", "{}")]


def test_the_last_of_repeated_parameters_wins() -> None:
    [(_, arguments)] = calls_of(OPEN + invoke("f", parameter("p", "1"), parameter("p", "2")) + CLOSE)
    assert json.loads(arguments) == {"p": "2"}


def test_a_call_that_is_cut_off_has_no_end() -> None:
    text = f'x{OPEN}{invoke("f", parameter("a", "1"))}\n<｜DSML｜invoke name="g">\n{parameter("b", "2")}'
    events = merged(parse(text))
    assert events[-2:] == [CallStart(1, "g"), CallArguments(1, '{"b": "2"')]
    assert calls_of(text) == [("f", '{"a": "1"}')]


@pytest.mark.parametrize("ending", ["</｜DSML｜function_calls>", '<｜DSML｜invoke name="h">\n\n</｜DSML｜invoke>'])
def test_a_call_that_is_never_closed_is_left_out(ending: str) -> None:
    text = f'{OPEN}<｜DSML｜invoke name="g">\n{parameter("b", "2")}\n{ending}'
    assert "g" not in dict(calls_of(text))


def test_text_behind_the_block_is_dropped() -> None:
    parser = AnswerParser(in_reasoning=False)
    parser.feed(OPEN + invoke("f") + CLOSE)
    assert parser.done
    assert parser.feed(f"more {OPEN}{invoke('g')}{CLOSE}") + parser.finish() == []
    assert parser.num_complete_calls == 1


@pytest.mark.parametrize(
    "junk",
    [
        '<｜DSML｜invoke nam="f">\n\n</｜DSML｜invoke>',
        '<｜DSML｜invoke name="">\n\n</｜DSML｜invoke>',
        '<｜DSML｜invoke name="a" other="b">\n\n</｜DSML｜invoke>',
        f'<｜DSML｜invoke name="{"x" * MAX_HEADER_CHARS}">\n\n</｜DSML｜invoke>',
        "stray text",
    ],
)
def test_malformed_calls_are_left_out(junk: str) -> None:
    assert calls_of(f"{OPEN}{junk}\n{invoke('ok')}{CLOSE}") == [("ok", "{}")]


def test_a_malformed_parameter_is_left_out() -> None:
    broken = '<｜DSML｜parameter name=x>{"v": 1}</｜DSML｜parameter>'
    assert calls_of(OPEN + invoke("f", broken, parameter("p", "1")) + CLOSE) == [("f", '{"p": "1"}')]


@pytest.mark.parametrize(
    "text", ["a\n\n<｜DSML｜", "a\n\n<｜DSML｜function_call", "a<｜DSML｜func", f"a{OPEN}", f"a{OPEN}<｜DSML｜in"]
)
def test_markup_that_is_cut_off_never_reaches_the_content(text: str) -> None:
    assert merged(parse(text)) == [Content("a")]


def test_text_is_released_as_soon_as_it_cannot_be_markup() -> None:
    parser = AnswerParser(in_reasoning=True)
    assert parser.feed("ab</th") == [Reasoning("ab")]
    assert parser.feed("at") == [Reasoning("</that")]
    assert parser.feed("</think>") == []
    assert parser.feed("x\n") == [Content("x")]
    assert parser.feed("\n\n<｜") == [Content("\n")]
    assert parser.feed("y") == [Content("\n\n<｜y")]


NAMES = st.text(st.characters(blacklist_characters='"\n', blacklist_categories=["Cs"]), min_size=1, max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3)


@given(CALLS, st.text("ab\n<", max_size=8))
def test_calls_survive_rendering_and_parsing(calls: list[tuple[str, dict[str, Any]]], content: str) -> None:
    blocks = []
    for name, arguments in calls:
        rendered = [(key, *dsml.parameter_value(value)) for key, value in arguments.items()]
        blocks.append(invoke(name, *(parameter(key, text, string == "true") for key, string, text in rendered)))
    text = content + OPEN + "\n".join(blocks) + CLOSE
    parsed = calls_of(text)
    assert [name for name, _ in parsed] == [name for name, _ in calls]
    assert [json.loads(arguments) for _, arguments in parsed] == [arguments for _, arguments in calls]


FRAGMENTS = st.sampled_from(
    [
        "<think>",
        "</think>",
        "\n",
        "\n\n",
        "<｜DSML｜function_calls>",
        "</｜DSML｜function_calls>",
        '<｜DSML｜invoke name="f">',
        "<｜DSML｜invoke",
        "</｜DSML｜invoke>",
        '<｜DSML｜parameter name="p" string="true">',
        '<｜DSML｜parameter name="q" string="false">',
        '<｜DSML｜parameter name="p>" string="false" >',
        "</｜DSML｜parameter>",
        "{",
        '{"a": 1}',
        "}",
        "1",
        '"',
        "x",
        " ",
        "<",
        "｜DSML｜",
    ]
)
OUTPUTS = st.lists(FRAGMENTS, max_size=25).map("".join)


@given(OUTPUTS, st.lists(st.integers(1, 9), max_size=60), st.booleans())
@example('\n\n<｜DSML｜function_calls><｜DSML｜invoke name="f">x{"a": 1}</｜DSML｜invoke>', [1] * 60, False)
def test_what_comes_out_does_not_depend_on_how_the_text_is_cut(text: str, sizes: list[int], in_reasoning: bool) -> None:
    pieces, rest = list[str](), text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    whole = merged(parse(text, in_reasoning=in_reasoning))
    assert merged(parse(*pieces, rest, in_reasoning=in_reasoning)) == whole
    assert merged(parse(*text, in_reasoning=in_reasoning)) == whole


@given(OUTPUTS, st.integers(0, 2) | st.none())
def test_deltas_tell_the_same_as_the_message(text: str, max_calls: int | None) -> None:
    events = parse(*text, in_reasoning=True)
    builder = MessageBuilder(max_calls)
    builder.add(events)
    content, reasoning, calls = "", "", dict[int, dict[str, str]]()
    for delta in map(json.loads, DeltaWriter(max_calls).deltas(events)):
        assert len(delta) == 1
        content += delta.get("content", "")
        reasoning += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", []):
            entry = calls.setdefault(call["index"], {"arguments": ""})
            entry["arguments"] += call["function"]["arguments"]
            if "id" in call:
                assert "name" not in entry
                entry["name"] = call["function"]["name"]
    assert (content, reasoning) == (builder.content, builder.reasoning)
    ended = {event.index for event in events if isinstance(event, CallEnd)}
    streamed = [(calls[i]["name"], calls[i]["arguments"]) for i in sorted(calls) if i in ended]
    assert streamed == [(call.name, call.arguments) for call in builder.complete_calls]
    assert max_calls is None or len(calls) <= max_calls


def test_complete_calls_have_valid_json_arguments() -> None:
    @given(OUTPUTS)
    def check(text: str) -> None:
        for _, arguments in calls_of(f"{OPEN}{text}"):
            assert isinstance(json.loads(arguments), dict)

    check()


def test_long_values_are_parsed_in_linear_time() -> None:
    """A quadratic scan of a buffered value would take minutes for this, not a fraction of a second."""
    parser = AnswerParser(in_reasoning=False)
    parser.feed(f'{OPEN}<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="p" string="false">')
    for _ in range(200_000):
        parser.feed("1")
    parser.feed("</｜DSML｜parameter>\n</｜DSML｜invoke>")
    assert parser.num_complete_calls == 1
