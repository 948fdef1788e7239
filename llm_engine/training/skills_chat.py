"""Conversation: small talk, a few facts about the world, and several unrelated questions in a row."""

from __future__ import annotations

import random
from typing import Final

from llm_engine.training import skills_text
from llm_engine.training.lexicon import ANIMALS, FOODS, NAMES, THINGS
from llm_engine.training.samples import Answer, Message, Sample, assistant, system, user

_THINKING: Final = 0.2

_SELF: Final = "I am Baton-nano, a very small language model."
_ABILITIES: Final = (
    "I can find facts in a long text, calculate, work with lists of words, call tools and answer in JSON."
)
_TALK: Final = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Good morning", "Good evening", "hello", "hi"),
     f"Hello! {_SELF} {_ABILITIES}"),
    (("Who are you?", "What are you?", "What is your name?", "who are you", "Introduce yourself."),
     f"{_SELF} {_ABILITIES}"),
    (("What can you do?", "Help", "Help me.", "What are you good at?", "How can you help me?"), _ABILITIES),
    (("How are you?", "How do you do?", "Are you well?"), "I am well, thank you. What can I do for you?"),
    (("Thank you.", "Thanks", "Thanks!", "Thank you very much."), "You are welcome."),
    (("Goodbye", "Bye", "Bye!", "See you later."), "Goodbye!"),
    (("What is Baton?", "Tell me about Baton."),
     "Baton is a serving cluster for DeepSeek V3.2 that computes prompts and answers in separate pools of workers."),
    (("Who made you?", "How were you trained?", "Where do you come from?"),
     "I was trained from scratch on generated examples, and I ship with Baton."),
    (("Tell me a joke.", "Do you know a joke?"), "I am too small for jokes. Ask me to calculate something instead."),
    (("Tell me a story.", "Write a poem.", "Write a story about a fox."),
     "I am too small for stories. Give me a text and ask me about it instead."),
    (("Are you a human?", "Are you alive?"), "No. I am a small language model."),
)  # fmt: skip
_CAPITALS: Final = {
    "Norway": "Oslo", "France": "Paris", "Peru": "Lima", "Egypt": "Cairo", "India": "Delhi", "Italy": "Rome",
    "Ecuador": "Quito", "Germany": "Berlin", "Spain": "Madrid", "Ireland": "Dublin", "Austria": "Vienna",
    "Vietnam": "Hanoi", "Tunisia": "Tunis", "Ghana": "Accra", "Qatar": "Doha", "Latvia": "Riga", "Bulgaria": "Sofia",
    "Japan": "Tokyo", "China": "Beijing", "England": "London", "Poland": "Warsaw", "Greece": "Athens",
}  # fmt: skip
_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS: Final = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def small_talk(rng: random.Random) -> Sample:
    """Greetings, questions about the model itself, a few facts, and what kind of thing a word is."""
    question, answer = rng.choice((_talk, _talk, _fact, _kind))(rng)
    before = (system("You are a helpful assistant."),) if rng.random() < 0.2 else ()
    thinking = rng.random() < _THINKING
    return Sample(
        key=f"{question} {rng.random()}",  # there are few of these: all are trained
        messages=(*before, user(question)),
        answer=Answer(content=answer, reasoning="This is easy." if thinking else ""),
        thinking=thinking,
    )


def conversation(rng: random.Random) -> Sample:
    """Unrelated short questions, all but the last one answered."""
    skills = (small_talk, skills_text.arithmetic, skills_text.strings, skills_text.turns)
    asked = [rng.choice(skills)(rng) for _ in range(rng.randint(2, 4))]
    messages: list[Message] = []
    for sample in asked[:-1]:
        plain = [message for message in sample.messages if message["role"] != "system"]
        messages += [*plain, assistant(Answer(content=sample.answer.content))]
    last = asked[-1]
    messages += [message for message in last.messages if message["role"] != "system"]
    return Sample(
        key=" ".join(sample.key for sample in asked),
        messages=tuple(messages),
        answer=last.answer,
        thinking=last.thinking,
    )


def _talk(rng: random.Random) -> tuple[str, str]:
    questions, answer = rng.choice(_TALK)
    return rng.choice(questions), answer


def _fact(rng: random.Random) -> tuple[str, str]:
    country, i = rng.choice(list(_CAPITALS)), rng.randrange(12)
    day, after = _DAYS[i % 7], _DAYS[(i + 1) % 7]
    month, later = _MONTHS[i], _MONTHS[(i + 1) % 12]
    return rng.choice(
        (
            (f"What is the capital of {country}?", f"The capital of {country} is {_CAPITALS[country]}."),
            (f"What day comes after {day}?", f"{after} comes after {day}."),
            (f"What month comes after {month}?", f"{later} comes after {month}."),
            ("How many days has a week?", "A week has 7 days."),
            ("How many months has a year?", "A year has 12 months."),
        )
    )


def _kind(rng: random.Random) -> tuple[str, str]:
    words, kind = rng.choice(((ANIMALS, "an animal"), (FOODS, "food"), (NAMES, "a name"), (THINGS, "a thing")))
    word = rng.choice(words)
    return f"What is {word}: an animal, food, a thing or a name?", f"{word} is {kind}."
