"""What an answer consists of, in the order in which it arrives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The model calls a function. Indices count from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the text of a call's JSON arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is complete. A call without its end was cut off and must not be executed."""

    index: int


Event = Reasoning | Content | CallStart | CallArguments | CallEnd
