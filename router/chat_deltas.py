"""The events of an answer as one message, or as the deltas of a stream. Both tell the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from router.chat.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from router.sampling import fresh_id

_encode = msgspec.json.Encoder().encode


def call_id() -> str:
    """The model does not name its calls; clients need names."""
    return f"call_{fresh_id()}"


@dataclass(slots=True)
class Call:
    """A call that is being collected."""

    name: str
    id: str = field(default_factory=call_id)
    pieces: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)


class MessageBuilder:
    """Collects a whole message."""

    def __init__(self, max_calls: int | None = None) -> None:
        """Calls beyond `max_calls` are left out."""
        self._max_calls = max_calls
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[Call] = []

    def add(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Content(text):
                    self._content.append(text)
                case Reasoning(text):
                    self._reasoning.append(text)
                case CallStart(_, name):
                    self._calls.append(Call(name))
                case CallArguments(index, text):
                    self._calls[index].pieces.append(text)
                case CallEnd(index):
                    self._calls[index].complete = True

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def complete_calls(self) -> list[Call]:
        """A call that was cut off is no call: its arguments would be executed half read."""
        return [call for call in self._calls[: self._max_calls] if call.complete]


class DeltaWriter:
    """Turns events into the JSON of `delta` objects: neighbouring pieces of one kind become one delta."""

    def __init__(self, max_calls: int | None = None) -> None:
        """Calls beyond `max_calls` are left out."""
        self._max_calls = max_calls

    def deltas(self, events: Sequence[Event]) -> list[bytes]:
        if len(events) == 1 and isinstance(event := events[0], Content):
            return [b'{"content":%b}' % _encode(event.text)]
        out: list[bytes] = []
        i = 0
        while i < len(events):
            event = events[i]
            end = i + 1
            match event:
                case Content() | Reasoning():
                    while end < len(events) and type(events[end]) is type(event):
                        end += 1
                    out.append(self._text_delta(event, events[i:end]))
                case CallStart(index) | CallArguments(index):
                    while end < len(events) and isinstance(events[end], CallArguments):
                        end += 1
                    if self._max_calls is None or index < self._max_calls:
                        out.append(self._call_delta(event, index, events[i:end]))
            i = end
        return out

    def _text_delta(self, event: Content | Reasoning, events: Sequence[Event]) -> bytes:
        name = b"content" if isinstance(event, Content) else b"reasoning_content"
        text = "".join(piece.text for piece in events if isinstance(piece, Content | Reasoning))
        return b'{"%b":%b}' % (name, _encode(text))

    def _call_delta(self, first: CallStart | CallArguments, index: int, events: Sequence[Event]) -> bytes:
        function: dict[str, str] = {"arguments": "".join(e.text for e in events if isinstance(e, CallArguments))}
        call: dict[str, object] = {"index": index}
        if isinstance(first, CallStart):
            call |= {"id": call_id(), "type": "function"}
            function = {"name": first.name} | function
        return b'{"tool_calls":%b}' % _encode([call | {"function": function}])
