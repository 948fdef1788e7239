"""What a skill produces: one request in the words of the chat API, and the answer that is right.

Training and evaluation never meet: a sample whose key falls into the held-out tenth is evaluated and never trained on.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

Message = Mapping[str, Any]  # as in the chat API; assistant messages may carry reasoning_content and tool_calls

_HELD_OUT: Final = 10  # one key of this many


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call the model is to make."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The right answer. `reasoning` is one way to it, and is trained but not compared."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A request and its answer. `key` identifies the problem behind the wording."""

    key: str
    messages: tuple[Message, ...]
    answer: Answer
    tools: tuple[Mapping[str, Any], ...] = ()
    schema: Mapping[str, Any] | None = None
    thinking: bool = False


Skill = Callable[[random.Random], Sample]


def is_held_out(key: str) -> bool:
    """Whether a problem belongs to the evaluation."""
    return zlib.crc32(key.encode()) % _HELD_OUT == 0


def draw(skill: Skill, rng: random.Random, *, held_out: bool = False) -> Sample:
    """The next sample of a skill on the wanted side of the split."""
    while True:
        sample = skill(rng)
        if is_held_out(sample.key) == held_out:
            return sample


def user(content: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": content}


def system(content: str) -> Message:
    """A system message."""
    return {"role": "system", "content": content}


def assistant(answer: Answer) -> Message:
    """An answer as a message of the conversation's history."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {
                "id": f"call_{i}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)},
            }
            for i, call in enumerate(answer.calls)
        ]
    return message
