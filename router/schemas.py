"""Request bodies of the API. The structs validate types and ranges, and the OpenAPI document is generated from them.

Unknown fields are refused: a misspelt option that is silently ignored costs its author hours. Fields of other servers
that change the output are listed with the one value that means "off"; fields that never change it are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from router.chat.messages import FunctionName, Message, ResponseFormat, Tool

MAX_STOPS = 16
MAX_STOP_CHARS = 256

StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Unsupported = Annotated[Any, Meta(extra_json_schema={"type": "null"}, description="Not supported.")]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries beside the output; without a stream they mean nothing."""

    include_usage: bool | None = None  # a last chunk with the usage of the whole request
    continuous_usage_stats: bool | None = None  # the usage so far in every chunk
    include_obfuscation: bool | None = None  # accepted; chunks are never padded


class GenerationBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options that both generation endpoints share. `null` means the default everywhere."""

    model: str
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, description="max_tokens wins over it.")] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, description="0 and -1: off.")] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, description="Drawn if absent.")] | None = None
    n: Count | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[Annotated[str, Meta(pattern=r"^[0-9]{1,9}$")], Bias] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: Annotated[bool, Meta(description="Adds the token ids to the answer.")] | None = None
    cache_salt: Annotated[str, Meta(max_length=256, description="Prefix caches are shared per salt.")] | None = None

    # Values that mean "off" for samplers this server does not have.
    repetition_penalty: Annotated[float, Meta(ge=1, le=1)] | None = None
    length_penalty: Annotated[float, Meta(ge=1, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=0)] | None = None

    # No effect on the output.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionBody(GenerationBody, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: str | list[int | str | list[int]]
    logprobs: Annotated[int, Meta(ge=0)] | None = None
    add_special_tokens: Annotated[bool, Meta(description="Start with the begin-of-sentence token.")] | None = None
    best_of: Literal[1] | None = None
    echo: Annotated[bool | None, Meta(extra_json_schema={"enum": [False, None]}, description="Not supported.")] = None
    suffix: Unsupported = None


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    """The name of a function."""

    name: FunctionName


class NamedToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """Makes the model call this function."""

    function: NamedFunction
    type: Literal["function"] = "function"


class Thinking(msgspec.Struct, forbid_unknown_fields=True):
    """Switches thinking on or off."""

    type: Literal["enabled", "disabled"]


class TemplateOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Options of the chat format."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class ChatBody(GenerationBody, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, description="Wins over max_tokens.")] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, description="Needs logprobs.")] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    store: bool | None = None
    verbosity: str | None = None

    def thinks(self) -> bool:
        """Whether the model should reason first. The most specific field that is given decides; the default is no."""
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        options = self.chat_template_kwargs
        for choice in (options.thinking, options.enable_thinking) if options is not None else ():
            if choice is not None:
                return choice
        return self.reasoning_effort not in (None, "none")


class TokenizeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /tokenize. Chat requests are tokenised as /v1/chat/completions would."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /detokenize."""

    tokens: list[Annotated[int, Meta(ge=0)]]
    model: str | None = None
