"""Retrieval: facts lie somewhere in a long text, and questions ask for one or several of them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from llm_engine.training.lexicon import ANIMALS, ATTRIBUTES, CITIES, COLOURS, FOODS, NAMES, THINGS, VERBS
from llm_engine.training.samples import Answer, Message, Sample, assistant, user

_PIECE: Final = re.compile(r" (?=\d)|\d|[A-Z]|[a-z]+|[^\w\s]")
_TOKENS_PER_PIECE: Final = 1.1
_SKIPPED: Final = 90  # more tokens than a query may select


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to find: how the text says it, how one asks for it, and the answer."""

    subject: str
    said: str
    question: str
    answer: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a text looks like: about `num_tokens` long.

    The facts that are asked for last lie in its first `within` part, but not in the first `skipped` tokens.
    """

    num_tokens: int
    within: float = 1.0
    skipped: int = 0
    questions: int = 1
    needles: int = 1


def retrieval(rng: random.Random, shape: Shape) -> Sample:
    """A text of facts and filler, then questions; all but the last are answered in the history."""
    style = rng.choice(_STYLES)
    facts = _distinct(rng, style, max(4, shape.num_tokens // rng.choice((18, 30, 60))))
    lines = _lines(rng, facts, shape.num_tokens)
    asked = [rng.sample(facts, min(shape.needles, len(facts))) for _ in range(shape.questions)]
    if shape.within < 1:
        _move_forward(rng, lines, [fact.said for fact in asked[-1]], shape)
    messages: list[Message] = []
    text = rng.choice(("\n", " ")).join(lines)
    opening = f"{rng.choice(('Read this', 'Here is a text', 'Notes', 'Remember this'))}:\n{text}\n\n"
    thinking = rng.random() < 0.15
    for i, wanted in enumerate(asked):
        last = i == len(asked) - 1
        reasoning = " ".join(fact.said for fact in wanted) if thinking and last else ""
        answer = Answer(content=" ".join(fact.answer for fact in wanted), reasoning=reasoning)
        messages += [user(opening + " ".join(fact.question for fact in wanted)), assistant(answer)]
        opening = ""
    return Sample(key=text, messages=tuple(messages[:-1]), answer=answer, thinking=thinking)


def training(rng: random.Random, longest: int) -> Sample:
    """Any length up to about `longest` tokens, several questions in a row."""
    shape = Shape(
        num_tokens=rng.randint(min(60, longest // 2), longest),
        questions=rng.randint(2, 6) if longest < 1000 else rng.randint(4, 10),
        needles=rng.choice((1, 1, 1, 2, 3)),
    )
    return retrieval(rng, shape)


def far(distance: int, needles: int = 1) -> Callable[[random.Random], Sample]:
    """A skill whose answers lie at least `distance` tokens before the question."""
    part = 0.03 if needles == 1 else 0.08
    total = int(distance * 1.18) + 50 + _SKIPPED
    shape = Shape(num_tokens=total, within=part + _SKIPPED / total, skipped=_SKIPPED, needles=needles)
    return lambda rng: retrieval(rng, shape)


def _keyed(rng: random.Random) -> Fact:
    key, value, what = f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}", str(rng.randrange(100, 10000)), "code"
    said = f"The {what} of the {key} is {value}."
    return Fact(key, said, _what(rng, what, key), said, value)


def _attributes(rng: random.Random) -> Fact:
    what, key = rng.choice(ATTRIBUTES), f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    value = str(rng.randrange(10, 1000))
    said = f"The {what} of the {key} is {value}."
    return Fact(f"{what} {key}", said, _what(rng, what, key), said, value)


def _people(rng: random.Random) -> Fact:
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    said = f"{name} lives in {city}."
    return Fact(name, said, f"Where does {name} live?", said, city)


def _places(rng: random.Random) -> Fact:
    thing, place = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}", rng.choice(NAMES)
    said = f"The {thing} belongs to {place}."
    return Fact(thing, said, f"To whom does the {thing} belong?", said, place)


def _table(rng: random.Random) -> Fact:
    key = f"{rng.choice('ABCDEFGHKLMNPRSTUVXZ')}{rng.choice('ABCDEFGHKLMNPRSTUVXZ')}{rng.randrange(10, 100)}"
    value = rng.choice((*COLOURS, *ANIMALS))
    return Fact(key, f"{key}: {value}", f"What stands at {key}?", f"{key}: {value}", value)


def _what(rng: random.Random, what: str, key: str) -> str:
    return rng.choice(
        (
            f"What is the {what} of the {key}?",
            f"Tell me the {what} of the {key}.",
            f"Which {what} has the {key}?",
            f"Find the {what} of the {key}.",
        )
    )


_STYLES: Final = (_keyed, _keyed, _attributes, _people, _places, _table)


def _distinct(rng: random.Random, style: Callable[[random.Random], Fact], count: int) -> list[Fact]:
    facts: dict[str, Fact] = {}
    for _ in range(2 * count):
        fact = style(rng)
        facts.setdefault(fact.subject, fact)
        if len(facts) == count:
            break
    return list(facts.values())


def _lines(rng: random.Random, facts: Sequence[Fact], num_tokens: int) -> list[str]:
    """The facts among filler sentences, shuffled, about `num_tokens` in all."""
    lines = [fact.said for fact in facts]
    budget = num_tokens - sum(map(_length, lines))
    while budget > 0:
        filler = _filler(rng)
        lines.append(filler)
        budget -= _length(filler)
    rng.shuffle(lines)
    return lines


def _filler(rng: random.Random) -> str:
    """A sentence that says nothing of what is asked."""
    colour, animal, other = rng.choice(COLOURS), rng.choice(ANIMALS), rng.choice(ANIMALS)
    thing, near, name, food = rng.choice(THINGS), rng.choice(THINGS), rng.choice(NAMES), rng.choice(FOODS)
    return rng.choice(
        (
            f"The {colour} {animal} and the {other} {rng.choice(VERBS)} the {thing} near the {near}.",
            f"{name} likes {food} but not {rng.choice(FOODS)}.",
            f"Nobody has seen the {animal} since the {thing} was painted {colour}.",
            f"There are {rng.randrange(2, 100)} pieces of {food} in the {thing}.",
            f"When it rains, {name} sits by the {thing} and reads about the {animal}.",
            f"It took {rng.randrange(2, 60)} minutes to carry the {thing} to the {near}.",
            f"A {colour} {thing} is not a {near}.",
            f"The {animal} sleeps, the {other} eats {food}.",
        )
    )


def _move_forward(rng: random.Random, lines: list[str], wanted: Sequence[str], shape: Shape) -> None:
    """Put the wanted lines at random places in the first part of the text."""
    for line in wanted:
        lines.remove(line)
    first, passed = 0, 0.0
    while passed < shape.skipped:
        passed += _length(lines[first])
        first += 1
    for line in wanted:
        lines.insert(rng.randint(first, max(first, int(shape.within * len(lines)))), line)


def _length(line: str) -> float:
    return 1 + len(_PIECE.findall(line)) * _TOKENS_PER_PIECE
