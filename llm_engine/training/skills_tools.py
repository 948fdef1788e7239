"""Structured skills: calling functions by their schema, using their results, answering in JSON for a schema."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llm_engine.training.lexicon import (
    BOOLEAN_FIELDS,
    INTEGER_FIELDS,
    NOUNS,
    STRING_FIELDS,
    TEXT_FIELDS,
    VERBS,
    WORDS,
)
from llm_engine.training.samples import Answer, Call, Message, Sample, assistant, system, user
from llm_engine.training.skills_chat import small_talk
from llm_engine.training.skills_text import arithmetic, strings

Function = tuple[str, dict[str, str]]  # name, and the type of every parameter

_THINKING = 0.35


def tool_call(rng: random.Random) -> Sample:
    """One or two calls that the user asks for, among up to three functions."""
    return _called(rng, _functions(rng))


def tool_choice(rng: random.Random) -> Sample:
    """Functions are on offer, but the question needs none of them in one case of four."""
    functions = _functions(rng)
    if rng.random() < 0.75:
        return _called(rng, functions)
    plain = rng.choice((small_talk, arithmetic, strings))(rng)
    return replace(plain, tools=tuple(_tool(name, fields) for name, fields in functions))


def _called(rng: random.Random, functions: list[Function]) -> Sample:
    wanted = rng.sample(functions, 2) if len(functions) > 1 and rng.random() < 0.2 else [rng.choice(functions)]
    calls = tuple(
        Call(name, {field: _value(rng, field, kind) for field, kind in fields.items()}) for name, fields in wanted
    )
    text = " Then ".join(_request(rng, call) for call in calls)
    thinking = rng.random() < _THINKING
    reasoning = f"I call {' and '.join(call.name for call in calls)}." if thinking else ""
    return Sample(
        key=text,
        messages=(*_greeting(rng), user(text)),
        answer=Answer(reasoning=reasoning, calls=calls),
        tools=tuple(_tool(name, fields) for name, fields in functions),
        thinking=thinking,
    )


def tool_result(rng: random.Random) -> Sample:
    """The result of a call has come back; the answer tells it."""
    asked = tool_call(rng)
    fields = rng.sample([*STRING_FIELDS, *INTEGER_FIELDS], len(asked.answer.calls))
    results: list[Message] = []
    told: list[str] = []
    for i, field in enumerate(fields):
        value = _value(rng, field, "string" if field in STRING_FIELDS else "integer")
        results.append({"role": "tool", "tool_call_id": f"call_{i}", "content": json.dumps({field: value})})
        told.append(f"The {field} is {value}.")
    content = " ".join(told)
    reasoning = f"The result has the {' and the '.join(fields)}." if asked.thinking else ""
    return Sample(
        key=asked.key + content,
        messages=(*asked.messages, assistant(asked.answer), *results),
        answer=Answer(content=content, reasoning=reasoning),
        tools=asked.tools,
        thinking=asked.thinking,
    )


def json_answer(rng: random.Random) -> Sample:
    """Facts in any order become the JSON object that a schema asks for."""
    types = _fields(rng, rng.randint(3, 5))
    values = {field: _value(rng, field, kind) for field, kind in types.items()}
    told = list(values.items())
    rng.shuffle(told)
    text = (
        f"{rng.choice(('Facts', 'Data', 'Record'))}: {', '.join(f'{field} {_spoken(value)}' for field, value in told)}."
    )
    wanted = rng.sample(list(types), rng.randint(2, len(types)))
    schema = {"type": "object", "properties": {field: {"type": types[field]} for field in wanted}, "required": wanted}
    thinking = rng.random() < 0.2
    return Sample(
        key=text,
        messages=(user(text),),
        answer=Answer(
            content=json.dumps({field: values[field] for field in wanted}, ensure_ascii=False),
            reasoning=f"The schema wants {', '.join(wanted)}." if thinking else "",
        ),
        schema=schema,
        thinking=thinking,
    )


def _functions(rng: random.Random) -> list[Function]:
    names = {f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}" for _ in range(rng.randint(1, 3))}
    return [(name, _fields(rng, rng.randint(1, 3))) for name in sorted(names)]


def _fields(rng: random.Random, count: int) -> dict[str, str]:
    kinds = {
        **dict.fromkeys((*STRING_FIELDS, *TEXT_FIELDS), "string"),
        **dict.fromkeys(INTEGER_FIELDS, "integer"),
        **dict.fromkeys(BOOLEAN_FIELDS, "boolean"),
    }
    return {field: kinds[field] for field in rng.sample(list(kinds), count)}


def _value(rng: random.Random, field: str, kind: str) -> Any:
    if field in TEXT_FIELDS:
        return " ".join(rng.sample(WORDS, rng.randint(2, 4)))
    if kind == "string":
        return rng.choice(STRING_FIELDS[field])
    return rng.random() < 0.5 if kind == "boolean" else rng.randrange(10 ** rng.randint(1, 3))


def _spoken(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _request(rng: random.Random, call: Call) -> str:
    verb, noun = call.name.split("_")
    arguments = list(call.arguments.items())
    rng.shuffle(arguments)
    told = " and ".join(f"{field} {_spoken(value)}" for field, value in arguments)
    return rng.choice(
        (
            f"{verb.capitalize()} the {noun} with {told}.",
            f"Please {verb} a {noun} with {told}.",
            f"I want to {verb} a {noun}: {told}.",
        )
    )


def _greeting(rng: random.Random) -> Sequence[Message]:
    return (system("You are a helpful assistant."),) if rng.random() < 0.3 else ()


def _tool(name: str, fields: Mapping[str, str]) -> dict[str, Any]:
    verb, noun = name.split("_")
    properties = {field: {"type": kind} for field, kind in fields.items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{verb.capitalize()} a {noun}",
            "parameters": {"type": "object", "properties": properties, "required": list(fields)},
        },
    }
