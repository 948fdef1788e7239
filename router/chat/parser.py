"""The answer of DeepSeek V3.2 while it arrives: reasoning, content, tool calls.

    REASONING ──</think>──▶ CONTENT ──<calls>──▶ CALLS ──<invoke name="…">──▶ BODY ⇄ VALUE, or BARE
                                                   ▲                            │
                                                   └────────── </invoke> ───────┘   </calls> ──▶ DONE

Text is released as soon as it can't be the beginning of a marker any more, so what is emitted depends on the text
alone, not on how it was cut. Malformed calls are left out; markup never reaches the content.
"""

from __future__ import annotations

import enum
import logging
import re
from collections.abc import Callable

import msgspec

from router.chat import dsml
from router.chat.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from router.stream import held_suffix

logger = logging.getLogger(__name__)

MAX_HEADER_CHARS = 1024  # of an opening tag; a longer one is malformed
_HEADER_END = re.compile(r'(?:[^">]|"[^"]*")*>')
_HEADER = re.compile(r'\s+name="([^"\n]+)"(?:\s+string="(true|false)")?\s*>')
_CALLS_MARKERS = (dsml.CALLS_GAP + dsml.CALLS_OPEN, dsml.CALLS_OPEN)
_BODY_MARKERS = (dsml.PARAMETER_OPEN, dsml.INVOKE_CLOSE, dsml.INVOKE_OPEN, dsml.CALLS_CLOSE)


class _State(enum.Enum):
    REASONING = enum.auto()
    CONTENT = enum.auto()
    CALLS = enum.auto()  # inside the block, between calls
    CALL_HEADER = enum.auto()
    CALL_START = enum.auto()  # inside a call, in front of its first parameter
    BODY = enum.auto()  # inside a call, between parameters
    PARAMETER_HEADER = enum.auto()
    VALUE = enum.auto()
    BARE = enum.auto()  # inside a call whose arguments are one JSON object
    DONE = enum.auto()


_PLAIN: dict[_State, type[Reasoning] | type[Content]] = {_State.REASONING: Reasoning, _State.CONTENT: Content}


class AnswerParser:
    """Feed text, get events. `finish` once at the end."""

    def __init__(self, *, in_reasoning: bool) -> None:
        self._state = _State.REASONING if in_reasoning else _State.CONTENT
        self._buffer = ""
        self._events: list[Event] = []
        self._call = -1
        self._names: set[str] = set()  # parameters of the current call
        self._value_is_string = True
        self._value: list[str] = []  # pieces of a JSON value or of bare arguments
        self.num_complete_calls = 0

    @property
    def done(self) -> bool:
        """Whether the block of calls is closed: nothing that follows matters."""
        return self._state is _State.DONE

    def feed(self, text: str) -> list[Event]:
        """Events that `text` completes."""
        if not self._buffer and self._state in _PLAIN and "<" not in text and "\n" not in text:
            return [_PLAIN[self._state](text)] if text else []  # nothing in it can begin a marker
        self._buffer += text
        while self._buffer and _STEPS[self._state](self):
            pass
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        """Release what was held back. A call that is still open stays without its end."""
        text, self._buffer = self._buffer, ""
        if self._state is _State.REASONING:
            self._emit(Reasoning, text)
        elif self._state is _State.CONTENT:
            markup = text.find(f"<{dsml.DSML}")
            self._emit(Content, text if markup < 0 else text[:markup].removesuffix(dsml.CALLS_GAP))
        events, self._events = self._events, []
        return events

    # Each step consumes a part of the buffer; False: it needs more text.

    def _reasoning(self) -> bool:
        text, found = self._take_until((dsml.THINK_END,))
        self._emit(Reasoning, text)
        if found is not None:
            self._state = _State.CONTENT
        return found is not None

    def _content(self) -> bool:
        text, found = self._take_until(_CALLS_MARKERS)
        self._emit(Content, text)
        if found is not None:
            self._state = _State.CALLS
        return found is not None

    def _calls(self) -> bool:
        _, found = self._take_until((dsml.INVOKE_OPEN, dsml.CALLS_CLOSE))
        if found is not None:
            self._state = _State.CALL_HEADER if found == dsml.INVOKE_OPEN else _State.DONE
        return found is not None

    def _call_header(self) -> bool:
        header = self._take_header()
        if header is None:
            return False
        name, _ = header
        if not name:
            self._state = _State.CALLS
            return True
        self._call += 1
        self._names.clear()
        self._events.append(CallStart(self._call, name))
        self._state = _State.CALL_START
        return True

    def _call_start(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        self._value.clear()
        self._state = _State.BARE if self._buffer[0] == "{" else _State.BODY
        return True

    def _body(self) -> bool:
        _, found = self._take_until(_BODY_MARKERS)
        match found:
            case dsml.PARAMETER_OPEN:
                self._state = _State.PARAMETER_HEADER
            case dsml.INVOKE_CLOSE:
                self._end_call("}" if self._names else "{}")
            case dsml.INVOKE_OPEN:  # the previous call was never closed
                self._state = _State.CALL_HEADER
            case dsml.CALLS_CLOSE:
                self._state = _State.DONE
        return found is not None

    def _parameter_header(self) -> bool:
        header = self._take_header()
        if header is None:
            return False
        name, is_string = header
        if not name:
            self._state = _State.BODY
            return True
        if name in self._names:
            logger.warning("a tool call repeats the parameter %r: the last value wins", name)
        opening = ", " if self._names else "{"
        self._names.add(name)
        self._value_is_string = is_string
        self._value.clear()
        self._arguments(f"{opening}{dsml.to_json(name)}: " + ('"' if is_string else ""))
        self._state = _State.VALUE
        return True

    def _parameter_value(self) -> bool:
        text, found = self._take_until((dsml.PARAMETER_CLOSE,))
        if self._value_is_string:
            self._arguments(_escaped(text))
        else:
            self._value.append(text)
        if found is None:
            return False
        self._arguments('"' if self._value_is_string else _json_or_string("".join(self._value)))
        self._state = _State.BODY
        return True

    def _bare_arguments(self) -> bool:
        text, found = self._take_until((dsml.INVOKE_CLOSE,))
        self._value.append(text)
        if found is None:
            return False
        arguments = "".join(self._value).strip()
        if _is_json(arguments):
            self._end_call(arguments)
        else:
            logger.warning("a tool call's bare arguments are not JSON: the call is left out")
            self._state = _State.CALLS
        return True

    def _drop(self) -> bool:
        self._buffer = ""
        return False

    def _take_until(self, markers: tuple[str, ...]) -> tuple[str, str | None]:
        """Consume up to and including the first marker; without one, all but what could become one.

        Returns (text in front, marker).
        """
        found = [(at, marker) for marker in markers if (at := self._buffer.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            text, self._buffer = self._buffer[:at], self._buffer[at + len(marker) :]
            return text, marker
        keep = len(self._buffer) - held_suffix(self._buffer, markers)
        text, self._buffer = self._buffer[:keep], self._buffer[keep:]
        return text, None

    def _take_header(self) -> tuple[str, bool] | None:
        """(name, value is a string) of an opening tag; ("", True) if it is malformed; None: not complete yet."""
        end = _HEADER_END.match(self._buffer, 0, MAX_HEADER_CHARS)
        if end is None and len(self._buffer) < MAX_HEADER_CHARS:
            return None
        length = MAX_HEADER_CHARS if end is None else end.end()
        header = _HEADER.fullmatch(self._buffer, 0, length)
        self._buffer = self._buffer[length:]
        return ("", True) if header is None else (header[1], header[2] != "false")

    def _end_call(self, rest: str) -> None:
        self._arguments(rest)
        self._events.append(CallEnd(self._call))
        self.num_complete_calls += 1
        self._state = _State.CALLS

    def _arguments(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(self._call, text))

    def _emit(self, kind: type[Reasoning] | type[Content], text: str) -> None:
        if text:
            self._events.append(kind(text))


_STEPS: dict[_State, Callable[[AnswerParser], bool]] = {
    _State.REASONING: AnswerParser._reasoning,
    _State.CONTENT: AnswerParser._content,
    _State.CALLS: AnswerParser._calls,
    _State.CALL_HEADER: AnswerParser._call_header,
    _State.CALL_START: AnswerParser._call_start,
    _State.BODY: AnswerParser._body,
    _State.PARAMETER_HEADER: AnswerParser._parameter_header,
    _State.VALUE: AnswerParser._parameter_value,
    _State.BARE: AnswerParser._bare_arguments,
    _State.DONE: AnswerParser._drop,
}


def _escaped(text: str) -> str:
    """`text` as the inside of a JSON string; pieces can be escaped one by one."""
    return dsml.to_json(text)[1:-1]


def _json_or_string(text: str) -> str:
    """A value that should be JSON, as it is if it is; else as a JSON string."""
    return text.strip() if _is_json(text) else dsml.to_json(text)


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return False
    return True
