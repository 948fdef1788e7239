"""POST /v1/completions."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from llm_engine.api.errors import PromptTooLong, RequestError
from llm_engine.api.request import TokenLogprobs
from router import generation
from router.answers import Completion, CompletionChoice, CompletionLogprobs
from router.dispatch_api import OutputChunk
from router.edge import MAX_SEQUENCES, Edge
from router.exchange import Exchange
from router.generation import Envelope, Job, encode_json
from router.requests import decode_body
from router.schemas import CompletionBody
from router.stream import Finish, Piece
from router.tokenizer import Segment

DEFAULT_MAX_TOKENS = 16  # as documented by the OpenAI API

_decoder = msgspec.json.Decoder(CompletionBody)


async def completions(edge: Edge, exchange: Exchange) -> None:
    """Complete one prompt or several."""
    body = decode_body(_decoder, await exchange.json_body(edge.config.max_body_bytes))
    edge.check_model(body.model)
    _refuse_unsupported(body)
    job = generation.plan(
        edge,
        exchange,
        body,
        await _encode_prompts(edge, body),
        kind="cmpl",
        max_tokens=body.max_tokens,
        default_tokens=DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
    )
    envelope = Envelope(job, "text_completion", body.stream_options)
    choices = [_Choice(edge, body, job, i, envelope) for i in range(len(job.requests))]
    if body.stream:
        await generation.stream(edge, exchange, job, choices, envelope)
        return
    await generation.collect(edge, job, choices)
    answer = Completion(
        id=job.id,
        created=job.created,
        model=job.model,
        choices=[choice.answer() for choice in choices],
        usage=job.usage(),
        seed=job.seed,
    )
    exchange.respond(200, encode_json(answer), headers=job.headers)


class _Choice:
    """One completion: collects its text, or turns chunks into events."""

    def __init__(self, edge: Edge, body: CompletionBody, job: Job, index: int, envelope: Envelope) -> None:
        want_logprobs = body.logprobs is not None
        table = edge.tokenizer.token_bytes if body.skip_special_tokens is False else edge.completion_bytes
        self._stream = generation.open_stream(job, body, index, table, want_offsets=want_logprobs)
        self._edge = edge
        self._index = index
        self._num_top = body.logprobs or 0
        self._return_ids = bool(body.return_token_ids)
        self._prompt = job.requests[index].prompt_tokens
        self._envelope = envelope
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._offsets: list[int] = []
        self._started = False
        self.finish: Finish | None = None

    @property
    def done(self) -> bool:
        return self.finish is not None

    def collect(self, chunk: OutputChunk) -> None:
        piece = self._stream.feed(chunk)
        self._texts.append(piece.text)
        self.finish = piece.finish
        if self._return_ids or piece.logprobs is not None:
            self._tokens += piece.tokens
        if piece.logprobs is not None:
            self._logprobs += piece.logprobs
            self._offsets += piece.offsets or []

    def answer(self) -> CompletionChoice:
        choice = CompletionChoice(
            index=self._index,
            text="".join(self._texts),
            logprobs=self._format(self._tokens, self._logprobs, self._offsets) if self._offsets else None,
            finish_reason=self.finish,
        )
        if self._return_ids:
            choice.token_ids = self._tokens
            choice.prompt_token_ids = self._prompt
        return choice

    def events(self, chunk: OutputChunk) -> bytes:
        piece = self._stream.feed(chunk)
        if piece.logprobs is not None or self._return_ids:
            return self._full_event(piece)
        if piece.finish is not None:
            self.finish = piece.finish
            ending = b',"logprobs":null,"finish_reason":"%b"}' % piece.finish.encode()
        elif piece.text:
            ending = b',"logprobs":null,"finish_reason":null}'
        else:
            return b""
        beginning = b'{"index":%d,"text":' % self._index
        return self._envelope.head + beginning + encode_json(piece.text) + ending + self._envelope.tail()

    def _full_event(self, piece: Piece) -> bytes:
        self.finish = piece.finish
        choice = CompletionChoice(index=self._index, text=piece.text, logprobs=None, finish_reason=piece.finish)
        if piece.logprobs is not None:
            choice.logprobs = self._format(piece.tokens, piece.logprobs, piece.offsets or [])
        if self._return_ids:
            choice.token_ids = piece.tokens
            if not self._started:
                choice.prompt_token_ids = self._prompt
        self._started = True
        return self._envelope.head + encode_json(choice) + self._envelope.tail()

    def _format(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], offsets: Sequence[int]
    ) -> CompletionLogprobs:
        return self._edge.logprobs.completion(tokens, logprobs, self._num_top, offsets)


def _refuse_unsupported(body: CompletionBody) -> None:
    if body.echo:
        raise RequestError("echo is not supported", param="echo")
    if body.suffix is not None:
        raise RequestError("suffix is not supported: the model does not fill in the middle", param="suffix")


async def _encode_prompts(edge: Edge, body: CompletionBody) -> list[list[int]]:
    """The prompts as token ids. Raises RequestError for a mixture, and for anything empty or out of range."""
    prompts: list[Any] = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if len(prompts) > max(edge.dispatcher.max_model_len, MAX_SEQUENCES):
        raise PromptTooLong(f"the context is {edge.dispatcher.max_model_len} tokens", param="prompt")
    kinds = set(map(type, prompts))
    if kinds == {int}:
        return [_checked_ids(edge, prompts)]
    if len(prompts) > MAX_SEQUENCES:
        raise RequestError(f"at most {MAX_SEQUENCES} prompts a request are served", param="prompt")
    if kinds == {list}:
        return [_checked_ids(edge, ids) for ids in prompts]
    if kinds != {str}:
        problem = "mixes strings, token ids and lists" if kinds else "is empty"
        raise RequestError(f"the prompt {problem}", param="prompt")
    if not all(prompts):
        raise RequestError("the prompt is empty", param="prompt")
    return [await encode_text(edge, text, add_bos=body.add_special_tokens) for text in prompts]


async def encode_text(edge: Edge, text: str, *, add_bos: bool | None) -> list[int]:
    """Token ids of a raw prompt, in which special tokens are recognised; the begin token is never doubled.

    `add_bos` None: as the checkpoint's tokenizer does.
    """
    ids = await edge.encode((Segment(text, trusted=True),))
    bos = edge.tokenizer.bos_id
    wanted = edge.tokenizer.adds_bos if add_bos is None else add_bos
    if wanted and bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    return ids


def _checked_ids(edge: Edge, ids: list[int]) -> list[int]:
    vocab_size = edge.tokenizer.vocab_size
    if not ids:
        raise RequestError("the prompt is empty", param="prompt")
    try:
        array("i", ids)
    except (OverflowError, TypeError):
        raise RequestError(f"token ids are integers from 0 to {vocab_size - 1}", param="prompt") from None
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise RequestError(f"token ids are integers from 0 to {vocab_size - 1}", param="prompt")
    return ids
