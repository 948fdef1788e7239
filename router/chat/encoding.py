"""DeepSeek V3.2's prompt format: a conversation becomes segments of text.

Only markup is trusted to contain special tokens. What users, tools and models wrote is rendered as plain text, so it
can't open a turn, close a thought or forge a tool call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from llm_engine.api.errors import RequestError
from router.chat import dsml
from router.chat.messages import (
    AssistantMessage,
    DeveloperMessage,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    ResponseFormat,
    SystemMessage,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
    plain,
)
from router.chat.template import PromptTexts, fill
from router.tokenizer import Segment

_RESULTS_OPEN = "\n\n<function_results>"
_RESULTS_CLOSE = "\n</function_results>"
_DEVELOPER_HEADING = "\n\n# The user's message is: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What is to be rendered. `tools` and `response_format` of the request; messages may bring tools of their own."""

    messages: Sequence[Message]
    thinking: bool = False
    tools: Sequence[Tool] = ()
    response_format: ResponseFormat | None = None


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt, and whether the model's answer starts inside its reasoning."""

    segments: tuple[Segment, ...]
    in_reasoning: bool

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    def plus(self, forced: str) -> Rendered:
        """The same prompt with the beginning of the answer already written (trusted)."""
        return replace(self, segments=(*self.segments, Segment(forced, trusted=True)))


def render(conversation: Conversation, texts: PromptTexts) -> Rendered:
    """Raises RequestError for a conversation that has no rendering."""
    return _Renderer(conversation, texts).render()


class _Renderer:
    def __init__(self, conversation: Conversation, texts: PromptTexts) -> None:
        self._thinking = conversation.thinking
        self._texts = texts
        self._tools = conversation.tools
        self._format = conversation.response_format
        self._messages = list(conversation.messages)
        self._host = self._place_tools()
        self._last_user = max(
            (i for i, m in enumerate(self._messages) if isinstance(m, UserMessage | DeveloperMessage)), default=-1
        )
        self._out: list[Segment] = []

    def render(self) -> Rendered:
        self._check_turns()
        self._markup(dsml.BOS)
        for i, message in enumerate(self._messages):
            match message:
                case SystemMessage():
                    self._user_text(plain(message.content))
                    self._attachments(i, message.tools)
                case UserMessage():
                    self._markup(dsml.USER)
                    self._user_text(plain(message.content))
                    self._markup(dsml.ASSISTANT + self._thought_marker(i == self._last_user))
                case DeveloperMessage():
                    self._developer(i, message)
                case AssistantMessage():
                    self._assistant(i, message)
                case ToolMessage():
                    self._tool_results(i)
        last = self._messages[-1]
        continues = isinstance(last, AssistantMessage)
        return Rendered(tuple(self._out), self._thinking and not (continues and bool(plain(last.content))))

    def _place_tools(self) -> int | None:
        """Index of the message that carries the request's tools and format; an empty system message if none can."""
        if not self._tools and not isinstance(self._format, JsonObjectFormat | JsonSchemaFormat):
            return None
        for i, message in enumerate(self._messages):
            if isinstance(message, SystemMessage):
                return i
        if not isinstance(self._messages[0], DeveloperMessage):
            self._messages.insert(0, SystemMessage())
        return 0

    def _check_turns(self) -> None:
        """The model can only answer a user or complete tool results, or continue an answer to them."""
        turns = self._messages
        for i, message in enumerate(turns):
            if isinstance(message, AssistantMessage) and message.prefix:
                if i < len(turns) - 1 or message.tool_calls:
                    raise RequestError(
                        "prefix belongs on the last message, and on one without tool_calls",
                        param=f"messages[{i}].prefix",
                    )
                turns = turns[:-1]
        last = turns[-1] if turns else None
        if not isinstance(last, UserMessage | DeveloperMessage | ToolMessage):
            raise RequestError(
                "the last message must be from the user, a tool result, or an assistant message with prefix: true"
                " that follows one of them",
                param="messages",
            )
        if isinstance(last, ToolMessage):
            results = list(takewhile(lambda message: isinstance(message, ToolMessage), reversed(turns)))
            caller = turns[-len(results) - 1] if len(results) < len(turns) else None
            calls = (caller.tool_calls if isinstance(caller, AssistantMessage) else None) or []
            if len(results) < len(calls):
                raise RequestError(
                    f"{len(calls) - len(results)} of {len(calls)} tool results are missing", param="messages"
                )

    def _developer(self, i: int, message: DeveloperMessage) -> None:
        content = plain(message.content)
        if not content:
            raise RequestError("the content of a developer message is empty", param=f"messages[{i}].content")
        self._markup(dsml.USER)
        self._attachments(i, message.tools)
        self._markup(_DEVELOPER_HEADING)
        self._user_text(content)
        self._markup(dsml.ASSISTANT + self._thought_marker(i == self._last_user))

    def _attachments(self, i: int, own_tools: Sequence[Tool] | None) -> None:
        tools = self._tools if i == self._host and self._tools else own_tools
        if tools:
            self._markup("\n\n")
            schemas = "\n".join(dsml.to_json(tool.function) for tool in tools)
            self._out += fill(self._texts.tools, tool_schemas=schemas)
        schema = self._schema() if i == self._host else None
        if schema is not None:
            self._markup("\n\n")
            self._out += fill(self._texts.response_format, schema=schema)

    def _schema(self) -> str | None:
        match self._format:
            case JsonObjectFormat():
                return dsml.to_json({"type": "object"})
            case JsonSchemaFormat(json_schema=named):
                return dsml.to_json(named.schema)
        return None

    def _assistant(self, i: int, message: AssistantMessage) -> None:
        prefix = bool(message.prefix)
        content = plain(message.content)
        calls = message.tool_calls or []
        if self._thinking and i > self._last_user:
            reasoning = message.reasoning_content or ""
            if not (reasoning or calls or prefix):
                raise RequestError(
                    "in thinking mode an assistant message after the last user message needs reasoning_content"
                    " or tool_calls",
                    param=f"messages[{i}]",
                )
            self._user_text(reasoning)
            if content or not prefix:
                self._markup(dsml.THINK_END)
        self._user_text(content)
        if calls:
            self._calls(calls)
        if not prefix:
            self._markup(dsml.EOS)

    def _calls(self, calls: Sequence[ToolCall]) -> None:
        self._markup(dsml.CALLS_GAP + dsml.CALLS_OPEN + "\n")
        for i, call in enumerate(calls):
            self._markup("\n" if i else "")
            self._markup(f'{dsml.INVOKE_OPEN} name="')
            self._user_text(call.function.name)
            self._markup('">\n')
            for j, (name, value) in enumerate(call.function.decoded().items()):
                is_string, text = dsml.parameter_value(value)
                self._markup("\n" if j else "")
                self._markup(f'{dsml.PARAMETER_OPEN} name="')
                self._user_text(name)
                self._markup(f'" string="{is_string}">')
                self._user_text(text)
                self._markup(dsml.PARAMETER_CLOSE)
            self._markup(f"\n{dsml.INVOKE_CLOSE}")
        self._markup(f"\n{dsml.CALLS_CLOSE}")

    def _tool_results(self, i: int) -> None:
        """Render one run of tool messages when its first one is met, in the order of the calls they answer."""
        if i > 0 and isinstance(self._messages[i - 1], ToolMessage):
            return
        results: list[ToolMessage] = []
        for message in self._messages[i:]:
            if not isinstance(message, ToolMessage):
                break
            results.append(message)
        caller = self._messages[i - 1] if i > 0 else None
        calls = (caller.tool_calls if isinstance(caller, AssistantMessage) else None) or []
        if len(results) > len(calls):
            raise RequestError(
                f"{len(results)} tool results follow an assistant message with {len(calls)} tool calls",
                param=f"messages[{i}]",
            )
        self._markup(_RESULTS_OPEN)
        for result in _in_call_order(results, calls):
            self._markup("\n<result>")
            self._user_text(plain(result.content))
            self._markup("</result>")
        if len(results) == len(calls):
            self._markup(f"{_RESULTS_CLOSE}\n\n{self._thought_marker(i > self._last_user)}")

    def _thought_marker(self, current: bool) -> str:
        return dsml.THINK_START if self._thinking and current else dsml.THINK_END

    def _markup(self, text: str) -> None:
        self._out.append(Segment(text, trusted=True))

    def _user_text(self, text: str) -> None:
        self._out.append(Segment(text))


def _in_call_order(results: list[ToolMessage], calls: Sequence[ToolCall]) -> list[ToolMessage]:
    """Clients may answer parallel calls in any order; ids, where all are known, say which call a result is for."""
    place = {call.id: i for i, call in enumerate(calls) if call.id is not None}
    ids = [result.tool_call_id for result in results]
    if len(set(ids)) < len(ids) or not set(ids) <= place.keys():
        return results
    return sorted(results, key=lambda result: place[result.tool_call_id or ""])
