"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from llm_engine.api.errors import RequestError
from llm_engine.api.request import TokenLogprobs
from router import generation
from router.answers import ChatChoice, ChatCompletion, ChatLogprobs, ChatMessage, Finish, FunctionCall, ToolCallAnswer
from router.chat.encoding import Conversation, Rendered
from router.chat.events import Event
from router.chat_deltas import DeltaWriter, MessageBuilder
from router.dispatch_api import OutputChunk
from router.edge import Edge
from router.exchange import Exchange
from router.generation import Envelope, Job, encode_json
from router.requests import decode_body
from router.schemas import ChatBody, NamedToolChoice
from router.stream import Piece

_decoder = msgspec.json.Decoder(ChatBody)


async def chat_completions(edge: Edge, exchange: Exchange) -> None:
    """Answer a conversation."""
    body = decode_body(_decoder, await exchange.json_body(edge.config.max_body_bytes))
    edge.check_model(body.model)
    _check_tools(body)
    rendered, forced = _render(edge, body)
    job = generation.plan(
        edge,
        exchange,
        body,
        [await edge.encode(rendered.segments)],
        kind="chatcmpl",
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        default_tokens=None,
        logprobs=_num_logprobs(body),
    )
    envelope = Envelope(job, "chat.completion.chunk", body.stream_options)
    choices = [_Choice(edge, body, job, i, envelope, rendered, forced) for i in range(len(job.requests))]
    if body.stream:
        await generation.stream(edge, exchange, job, choices, envelope)
        return
    await generation.collect(edge, job, choices)
    answer = ChatCompletion(
        id=job.id,
        created=job.created,
        model=job.model,
        choices=[choice.answer() for choice in choices],
        usage=job.usage(),
        seed=job.seed,
    )
    if body.return_token_ids:
        answer.prompt_token_ids = job.prompts[0]
    exchange.respond(200, encode_json(answer), headers=job.headers)


class _Choice:
    """One answer: collects its message, or turns chunks into events."""

    def __init__(
        self, edge: Edge, body: ChatBody, job: Job, index: int, envelope: Envelope, rendered: Rendered, forced: str
    ) -> None:
        """`forced`: the beginning of the answer that is already part of the prompt."""
        table = edge.tokenizer.token_bytes if body.skip_special_tokens is False else edge.chat_bytes
        self._stream = generation.open_stream(job, body, index, table)
        self._edge = edge
        self._index = index
        self._num_top = body.top_logprobs or 0
        self._return_ids = bool(body.return_token_ids)
        self._prompt = job.prompts[0]
        self._envelope = envelope
        self._thinks = rendered.in_reasoning
        self._max_calls = 0 if body.tool_choice == "none" else 1 if body.parallel_tool_calls is False else None
        self._parser = edge.chat.parser(in_reasoning=rendered.in_reasoning)
        self._forced_events = self._parser.feed(forced) if forced else []
        self._builder = MessageBuilder(self._max_calls)
        self._writer = DeltaWriter(self._max_calls)
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._started = False
        self.finish: Finish | None = None

    @property
    def done(self) -> bool:
        return self.finish is not None

    def collect(self, chunk: OutputChunk) -> None:
        piece = self._stream.feed(chunk)
        self._builder.add(self._parse(piece))
        if self._return_ids or piece.logprobs is not None:
            self._tokens += piece.tokens
        if piece.logprobs is not None:
            self._logprobs += piece.logprobs

    def answer(self) -> ChatChoice:
        message = ChatMessage(content=self._builder.content)
        if self._thinks:
            message.reasoning_content = self._builder.reasoning
        calls = self._builder.complete_calls
        if calls:
            message.content = message.content or None
            message.tool_calls = [
                ToolCallAnswer(id=call.id, function=FunctionCall(call.name, call.arguments)) for call in calls
            ]
        choice = ChatChoice(
            index=self._index,
            message=message,
            logprobs=self._format(self._tokens, self._logprobs) if self._logprobs else None,
            finish_reason=self.finish,
        )
        if self._return_ids:
            choice.token_ids = self._tokens
        return choice

    def events(self, chunk: OutputChunk) -> bytes:
        piece = self._stream.feed(chunk)
        deltas = self._writer.deltas(self._parse(piece))
        extras = self._extras(piece)
        if not self._started:
            deltas.insert(0, b'{"role":"assistant","content":""}')
            self._started = True
        if extras and not deltas:
            deltas.append(b"{}")
        head = self._envelope.head + b'{"index":%d,"delta":' % self._index
        tail = self._envelope.tail()
        out: list[bytes] = []
        for delta in deltas:
            logprobs = b"" if extras else b',"logprobs":null'
            out += [head, delta, extras, logprobs, b',"finish_reason":null}', tail]
            extras = b""
        if self.finish is not None:
            out += [head, b'{},"logprobs":null,"finish_reason":"%b"}' % self.finish.encode(), tail]
        return b"".join(out)

    def _parse(self, piece: Piece) -> list[Event]:
        """Events of a piece; with the last one, the finish reason."""
        events: list[Event] = [*self._forced_events, *self._parser.feed(piece.text)]
        self._forced_events = []
        if piece.finish is not None:
            events += self._parser.finish()
            called = self._parser.num_complete_calls > 0 and self._max_calls != 0
            complete = piece.finish == "stop" or self._parser.done
            self.finish = "tool_calls" if called and complete else piece.finish
        return events

    def _extras(self, piece: Piece) -> bytes:
        """Log probabilities and token ids of a piece, as members that follow the delta."""
        extras = b""
        if self._return_ids:
            extras += b',"token_ids":' + encode_json(piece.tokens)
            if not self._started:
                extras += b',"prompt_token_ids":' + encode_json(self._prompt)
        if piece.logprobs is not None:
            return extras + b',"logprobs":' + encode_json(self._format(piece.tokens, piece.logprobs))
        return extras + b',"logprobs":null' if extras else b""

    def _format(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
        return self._edge.logprobs.chat(tokens, logprobs, self._num_top)


def _render(edge: Edge, body: ChatBody) -> tuple[Rendered, str]:
    """The prompt, and the beginning of the answer if the request dictates it."""
    tools = body.tools if body.tools and body.tool_choice != "none" else ()
    conversation = Conversation(
        messages=body.messages, thinking=body.thinks(), tools=tools, response_format=body.response_format
    )
    rendered = edge.chat.render(conversation)
    choice = body.tool_choice
    if choice is None or choice in ("none", "auto"):
        return rendered, ""
    if rendered.in_reasoning:
        raise RequestError(
            "tool_choice can't dictate a call in thinking mode, where the answer starts with reasoning;"
            " use auto, or switch thinking off",
            param="tool_choice",
        )
    forced = edge.chat.forced_call(choice.function.name if isinstance(choice, NamedToolChoice) else None)
    return rendered.plus(forced), forced


def _check_tools(body: ChatBody) -> None:
    """Raises RequestError for malformed tools, and for a choice that they don't offer."""
    names: set[str] = set()
    for i, tool in enumerate(body.tools or ()):
        name = tool.checked(f"tools[{i}]").name
        if name in names:
            raise RequestError(f"two tools are named {name!r}", param=f"tools[{i}]")
        names.add(name)
    for i, message in enumerate(body.messages):
        for j, tool in enumerate(getattr(message, "tools", None) or ()):
            tool.checked(f"messages[{i}].tools[{j}]")
    choice = body.tool_choice
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise RequestError(f"tool_choice names {choice.function.name!r}, which is not in tools", param="tool_choice")
    if choice == "required" and not names:
        raise RequestError("tool_choice is required, but there are no tools", param="tool_choice")


def _num_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None
