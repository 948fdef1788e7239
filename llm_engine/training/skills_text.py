"""Skills on short texts: arithmetic, lists of words, system instructions, earlier turns, derivations."""

from __future__ import annotations

import itertools
import random
from typing import Final

from llm_engine.training.lexicon import ANIMALS, CITIES, COLOURS, FOODS, NAMES, ORDINALS, THINGS, WORDS
from llm_engine.training.samples import Answer, Message, Sample, assistant, system, user

_THINKING: Final = 0.25  # share of samples in thinking mode where both modes make sense

_ADD: Final = (
    "What is {} + {}?",
    "{} + {} =",
    "Add {} and {}.",
    "Calculate {} + {}.",
    "How much is {} plus {}?",
    "{}+{}",
)
_SUBTRACT: Final = ("What is {} - {}?", "{} - {} =", "Calculate {} - {}.", "How much is {} minus {}?", "{}-{}")
_MULTIPLY: Final = (
    "What is {} * {}?",
    "{} * {} =",
    "Multiply {} by {}.",
    "Calculate {} * {}.",
    "How much is {} times {}?",
    "{}*{}",
)


def arithmetic(rng: random.Random) -> Sample:
    """Sums and differences of up to four digits; products of two digits by one, derived while thinking."""
    kind = rng.choice("++--*")
    if kind == "*":
        a, b = rng.randint(11, 99), rng.randint(2, 9)
        return _asked(rng, f"{a}*{b}", rng.choice(_MULTIPLY).format(a, b), f"{a} * {b} = {a * b}", _product(a, b), True)
    a, b = _number(rng), _number(rng)
    if kind == "-":
        a, b = max(a, b), min(a, b)
        total, question, steps = a - b, rng.choice(_SUBTRACT).format(a, b), f"{a} - {b}: {b} + {a - b} = {a}."
    else:
        total, question, steps = a + b, rng.choice(_ADD).format(a, b), _columns(a, b)
    return _asked(rng, f"{a}{kind}{b}", question, f"{a} {kind} {b} = {total}", steps)


def strings(rng: random.Random) -> Sample:
    """Operations on a list of words."""
    words = rng.sample(WORDS, rng.randint(3, 6))
    text = " ".join(words)
    i = rng.randrange(len(words))
    new = rng.choice(WORDS)
    task = rng.randrange(11)
    question, answer = (
        (f"Reverse the order of these words: {text}", " ".join(reversed(words))),
        (f"Join these words with dashes: {text}", "-".join(words)),
        (f"Join these words with commas: {text}", ", ".join(words)),
        (f"What is the {ORDINALS[i]} word of this list? {text}", words[i]),
        (f"What is the last word of this list? {text}", words[-1]),
        (f"How many words are in this list? {text}", str(len(words))),
        (f"Remove {words[i]} from this list: {text}", " ".join(w for w in words if w != words[i])),
        (f"Replace {words[i]} by {new} in this list: {text}", " ".join(new if w == words[i] else w for w in words)),
        (f"Write these words in capital letters: {text}", text.upper()),
        (f"Spell this word with dashes: {words[i]}", "-".join(words[i])),
        (f"Repeat these words: {text}", text),
    )[task]
    key = f"{question} {text}" if task == 9 else question  # every word has to be seen to be spelled
    return _asked(rng, key, question, answer, f"The list is {text}.")


def system_instruction(rng: random.Random) -> Sample:
    """An instruction in the system message shapes the answer to a simple question."""
    a, b, mark = rng.sample(WORDS, 3)
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    x, y = rng.randint(1, 9), rng.randint(1, 9)
    question, plain = rng.choice(
        (
            (f"Say {a} and {b}.", f"{a} and {b}"),
            (f"Repeat: {a} {b}", f"{a} {b}"),
            (f"What is {x} + {y}?", f"{x} + {y} = {x + y}"),
            (f"{name} lives in {city}. Where does {name} live?", f"{name} lives in {city}."),
        )
    )
    rule, question, answer = rng.choice(
        (
            ("Answer in capital letters.", question, plain.upper()),
            (f"End every answer with the word {mark}.", question, f"{plain} {mark}"),
            (f"Start every answer with the word {mark}.", question, f"{mark} {plain}"),
            ("Put every answer in brackets.", question, f"[{plain}]"),
            ("Put every answer in quotes.", question, f'"{plain}"'),
            ("Give every answer twice.", question, f"{plain} {plain}"),
            (f"Whatever you are asked, say only {mark}.", question, mark),
            ("You are a helpful assistant.", question, plain),
            (f"Your name is {name}. You come from {city}.", "What is your name?", f"My name is {name}."),
            (f"Your name is {name}. You come from {city}.", "Where do you come from?", f"I come from {city}."),
        )
    )
    sample = _asked(rng, f"{rule} {question} {a} {b} {x}", question, answer, f"The instruction is: {rule}")
    return Sample(
        key=sample.key,
        messages=(system(rule), *sample.messages),
        answer=sample.answer,
        thinking=sample.thinking,
    )


_RELATIVES: Final = ("sister", "brother", "friend", "uncle")
_FACTS: Final = (
    ("My {} is called {}.", ANIMALS, NAMES, "What is my {} called?", "Your {} is called {}."),
    ("My {} lives in {}.", _RELATIVES, CITIES, "Where does my {} live?", "Your {} lives in {}."),
    ("My favourite {} is {}.", ("colour",), COLOURS, "What is my favourite {}?", "Your favourite {} is {}."),
    ("My favourite {} is {}.", ("food",), FOODS, "What is my favourite {}?", "Your favourite {} is {}."),
    ("The {} is in the {}.", FOODS, THINGS, "Where is the {}?", "The {} is in the {}."),
    ("I gave the {} to {}.", THINGS, NAMES, "To whom did I give the {}?", "You gave the {} to {}."),
)  # fmt: skip


def turns(rng: random.Random) -> Sample:
    """A question about something the user said several turns ago."""
    facts: dict[str, tuple[str, str, str]] = {}
    for _ in range(rng.randint(2, 5)):
        said, subjects, values, question, answer = rng.choice(_FACTS)
        subject, value = rng.choice(subjects), rng.choice(values)
        facts[question.format(subject)] = (said.format(subject, value), answer.format(subject, value), value)
    messages: list[Message] = []
    for said, _, value in facts.values():
        messages += [user(said), assistant(Answer(content=rng.choice(("Noted.", "I see.", f"Noted: {value}."))))]
        if rng.random() < 0.3:
            between = arithmetic(rng)
            while between.thinking:
                between = arithmetic(rng)
            messages += [*between.messages, assistant(between.answer)]
    question = rng.choice(list(facts))
    said, answer, _ = facts[question]
    last = _asked(rng, " ".join(facts), question, answer, f"The user said: {said}")
    return Sample(key=f"{facts}", messages=(*messages, *last.messages), answer=last.answer, thinking=last.thinking)


def derivation(rng: random.Random) -> Sample:
    """Two or three small steps, written down before the answer; always in thinking mode."""
    return rng.choice((_assignments, _word_problem))(rng)


def _assignments(rng: random.Random) -> Sample:
    letters = rng.sample("abcdefghkmnpqrstuvwxyz", rng.randint(2, 4))
    value = rng.randint(1, 20)
    given, steps = [f"{letters[0]} = {value}"], [f"{letters[0]} = {value}."]
    for before, letter in itertools.pairwise(letters):
        operand = rng.randint(2, 9)
        sign = rng.choice("+-*") if value <= 12 else rng.choice("+-")
        if sign == "-" and operand > value:
            sign = "+"
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
        given.append(f"{letter} = {before} {sign} {operand}")
        steps.append(f"{letter} = {value} {sign} {operand} = {result}.")
        value = result
    question = f"{', '.join(given)}. What is {letters[-1]}?"
    return _asked(rng, question, question, f"{letters[-1]} = {value}", " ".join(steps), True)


def _word_problem(rng: random.Random) -> Sample:
    first, second = rng.sample(NAMES, 2)
    food = rng.choice(FOODS)
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 9)
    unit = rng.choice(("boxes", "bags", "crates"))
    text, steps, total = rng.choice(
        (
            (
                f"{first} has {a} {unit} with {b} pieces of {food} each and buys {c} more. How many pieces are that?",
                f"{a} * {b} = {a * b}. {a * b} + {c} = {a * b + c}.",
                a * b + c,
            ),
            (
                f"{first} has {a + c} pieces of {food}, gives {c} to {second} and finds {b}. How many are left?",
                f"{a + c} - {c} = {a}. {a} + {b} = {a + b}.",
                a + b,
            ),
            (
                f"{first} has {a} pieces of {food}. {second} has {b} more. How many do they have together?",
                f"{a} + {b} = {a + b}. {a} + {a + b} = {a + a + b}.",
                a + a + b,
            ),
        )
    )  # fmt: skip
    return _asked(rng, text, text, f"The answer is {total}.", steps, True)


def _asked(
    rng: random.Random, key: str, question: str, content: str, reasoning: str, thinking: bool | None = None
) -> Sample:
    thinks = rng.random() < _THINKING if thinking is None else thinking
    answer = Answer(content=content, reasoning=reasoning if thinks else "")
    return Sample(key=key, messages=(user(question),), answer=answer, thinking=thinks)


def _number(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3, 4)))


def _columns(a: int, b: int) -> str:
    """Schoolbook addition, from the last digit."""
    steps, carry, length = [], 0, max(len(str(a)), len(str(b)))
    for i in range(length):
        x, y = a // 10**i % 10, b // 10**i % 10
        steps.append(f"{x} + {y} + {carry} = {x + y + carry}")
        carry = (x + y + carry) // 10
    return f"{', '.join(steps)}, so {a + b}."


def _product(a: int, b: int) -> str:
    tens, ones = a // 10 * 10, a % 10
    return f"{tens} * {b} = {tens * b}, {ones} * {b} = {ones * b}, {tens * b} + {ones * b} = {a * b}."
