"""Training data reads exactly like the prompts a server makes, and its answers like what the server parses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers

from llm_engine.training.render import PROMPT_WEIGHT, answer_text, document, prompt_text
from llm_engine.training.samples import Sample, draw, is_held_out
from llm_engine.training.skills import EVALUATION, INDEX_TOPK, MIXTURE
from router.chat.encoding import Conversation
from router.chat.events import CallArguments, CallStart, Content, Reasoning
from router.chat.format import load_chat_format
from router.chat.messages import JsonSchemaFormat, Message, ResponseSchema, Tool
from router.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).parents[3] / "llm_engine" / "checkpoints" / "baton-nano"
SKILLS = {share.name: share.draw for share in MIXTURE} | dict(EVALUATION)


@pytest.fixture(scope="module")
def served() -> Tokenizer:
    return Tokenizer.from_dir(CHECKPOINT)


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def conversation(sample: Sample) -> Conversation:
    """The sample as the server reads it from a request."""
    return Conversation(
        messages=msgspec.convert(list(sample.messages), list[Message]),
        thinking=sample.thinking,
        tools=msgspec.convert(list(sample.tools), list[Tool]),
        response_format=None
        if sample.schema is None
        else JsonSchemaFormat(json_schema=ResponseSchema(schema=dict(sample.schema))),
    )


@pytest.mark.parametrize("name", SKILLS)
def test_prompts_and_answers_are_those_of_the_server(
    name: str, served: Tokenizer, trained: tokenizers.Tokenizer
) -> None:
    rng = random.Random(name)
    chat = load_chat_format(CHECKPOINT)
    for _ in range(30):
        sample = draw(SKILLS[name], rng)
        rendered = chat.render(conversation(sample))
        assert rendered.text == prompt_text(sample)
        made = document(sample, trained)
        assert made.ids[: made.num_prompt] == served.encode(rendered.segments)
        assert served.decode(made.ids) == prompt_text(sample) + answer_text(sample)
        parser = chat.parser(in_reasoning=sample.thinking)
        answer = answer_text(sample).removesuffix("<｜end▁of▁sentence｜>")
        assert parsed([*parser.feed(answer), *parser.finish()]) == (
            sample.answer.reasoning,
            sample.answer.content,
            [(call.name, dict(call.arguments)) for call in sample.answer.calls],
        )


def parsed(events: list[Any]) -> tuple[str, str, list[tuple[str, Any]]]:
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    content = "".join(event.text for event in events if isinstance(event, Content))
    calls = [
        (
            start.name,
            json.loads("".join(e.text for e in events if isinstance(e, CallArguments) and e.index == start.index)),
        )
        for start in events
        if isinstance(start, CallStart)
    ]
    return reasoning, content, calls


def test_answers_weigh_most_and_markup_before_them_nothing(trained: tokenizers.Tokenizer) -> None:
    sample = draw(SKILLS["turns"], random.Random(1))
    made = document(sample, trained)
    assert set(made.weights[made.num_prompt :]) == {1.0}
    assert set(made.weights[: made.num_prompt]) == {0.0, PROMPT_WEIGHT, 1.0}
    assert made.weights[0] == 0.0


@pytest.mark.parametrize("name", SKILLS)
def test_trained_and_evaluated_problems_are_different_ones(name: str) -> None:
    skill = SKILLS[name]
    for held_out in (False, True):
        rng = random.Random(3)
        assert {is_held_out(draw(skill, rng, held_out=held_out).key) for _ in range(20)} == {held_out}


@pytest.mark.parametrize(("name", "distance"), [("retrieval-2x", 128), ("retrieval-8x", 512), ("retrieval-32x", 1900)])
def test_far_facts_are_far(name: str, distance: int, trained: tokenizers.Tokenizer) -> None:
    for seed in range(20):
        sample = draw(EVALUATION[name], random.Random(seed), held_out=True)
        before, _, behind = prompt_text(sample).partition(sample.answer.content)
        assert len(trained.encode(before).ids) > INDEX_TOPK, "or a selection of the first positions would see it"
        assert len(trained.encode(behind).ids) >= distance
