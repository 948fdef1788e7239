"""The conversation as clients send it. The structs validate, and the OpenAPI document is generated from them.

Messages ignore fields they don't know: clients send back what they received, from this server or from others. What
shapes the output (tools, formats) is strict.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llm_engine.api.errors import RequestError

FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}$", description="Letters, digits, `_`, `.`, `-`.")]
TypeName = Literal["object", "array", "string", "number", "integer", "boolean", "null"]


class TextPart(msgspec.Struct):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


Text = str | list[TextPart]


class JsonSchema(msgspec.Struct, omit_defaults=True):
    """The parts of a JSON schema whose shape is checked; other keywords pass through unread."""

    type: TypeName | list[TypeName] | msgspec.UnsetType = msgspec.UNSET
    description: str | msgspec.UnsetType = msgspec.UNSET
    properties: dict[str, JsonSchema | bool] | msgspec.UnsetType = msgspec.UNSET
    required: list[str] | msgspec.UnsetType = msgspec.UNSET
    items: JsonSchema | bool | list[JsonSchema | bool] | msgspec.UnsetType = msgspec.UNSET
    enum: list[Any] | msgspec.UnsetType = msgspec.UNSET
    anyOf: list[JsonSchema | bool] | msgspec.UnsetType = msgspec.UNSET
    allOf: list[JsonSchema | bool] | msgspec.UnsetType = msgspec.UNSET
    oneOf: list[JsonSchema | bool] | msgspec.UnsetType = msgspec.UNSET


class FunctionSpec(msgspec.Struct):
    """A function the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """A tool. `function` stays as received, because its keys are rendered in the order they came in."""

    function: Annotated[dict[str, Any], Meta(extra_json_schema={"$ref": "#/components/schemas/FunctionSpec"})]
    type: Literal["function"] = "function"

    def checked(self, path: str) -> FunctionSpec:
        """Raises RequestError when the function is malformed. `path` names the tool in the request."""
        try:
            spec = msgspec.convert(self.function, FunctionSpec)
        except msgspec.ValidationError as exc:
            raise RequestError(f"{path}.function: {exc}", param=path) from None
        if isinstance(spec.parameters, JsonSchema) and spec.parameters.type not in (msgspec.UNSET, "object"):
            raise RequestError(f"{path}.function.parameters: the type must be 'object'", param=path)
        return spec


class CalledFunction(msgspec.Struct):
    """A call the model made earlier. `arguments` is a JSON object, as an object or as its text."""

    name: str
    arguments: str | dict[str, Any] = "{}"

    def decoded(self) -> dict[str, Any]:
        """Raises RequestError unless the arguments are a JSON object."""
        if isinstance(self.arguments, dict):
            return self.arguments
        try:
            value = msgspec.json.decode(self.arguments or "{}")
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise RequestError(f"the arguments of the call of {self.name!r} are not a JSON object", param="messages")
        return value


class ToolCall(msgspec.Struct):
    """A tool call of an assistant message."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class ResponseSchema(msgspec.Struct):
    """A named schema for the answer."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, tag_field="type", tag="text"):
    """No constraint on the answer."""


class JsonObjectFormat(msgspec.Struct, tag_field="type", tag="json_object"):
    """The model is told to answer with a JSON object."""


class JsonSchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema"):
    """The model is told to answer with JSON of this schema."""

    json_schema: ResponseSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class SystemMessage(msgspec.Struct, tag_field="role", tag="system"):
    """Instructions."""

    content: Text | None = None
    tools: list[Tool] | None = None


class DeveloperMessage(msgspec.Struct, tag_field="role", tag="developer"):
    """Instructions of an agent's developer; takes the place of a user message."""

    content: Text
    tools: list[Tool] | None = None


class UserMessage(msgspec.Struct, tag_field="role", tag="user"):
    """What the user said."""

    content: Text


class AssistantMessage(msgspec.Struct, tag_field="role", tag="assistant"):
    """What the model said. With `prefix` on the last message, the model continues it."""

    content: Text | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    prefix: bool | None = None


class ToolMessage(msgspec.Struct, tag_field="role", tag="tool"):
    """The result of one tool call."""

    content: Text
    tool_call_id: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


def plain(content: Text | None) -> str:
    """The text of a message; parts are joined by newlines."""
    if isinstance(content, list):
        return "\n".join(part.text for part in content)
    return content or ""
